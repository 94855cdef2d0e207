"""The task alone: however a batch is divided, whatever is carried, the numbers are those of plain PyTorch."""

import dataclasses
import json

import pytest
import torch
from lightning.pytorch import Trainer

from memarch import create_model, decode
from memarch import state as states
from memarch.data import MQAR, Text, split_seed
from memarch.data.module import TokenData
from memarch.models.lm import LMConfig
from memarch.optim import OptimConfig, build
from memarch.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged(MQAR):
    """Rows with different numbers of targets: where a mean of means goes wrong."""

    def batch(self, seed, indices):
        batch = super().batch(seed, indices)
        drop = torch.rand(batch.targets.shape, generator=torch.Generator().manual_seed(0))[:1] < torch.tensor([i % 4 / 4 for i in indices])[:, None]
        return batch._replace(targets=batch.targets.masked_fill(drop, -100))


RECALL = Ragged(settings=((16, 4),), vocab_size=32)
OPTIM = OptimConfig(lr=1e-2, warmup=2, clip=0.5)
MODEL = {"vocab_size": 32, "dim": 16, "set": {"parts.W.ffn.hidden": 32, "parts.M.ffn.hidden": 32}}


def trainer(steps, **more):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    usual = {"accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 2, "log_every_n_steps": 1}
    return Trainer(**quiet | usual | more)


def fit(task, data, steps, **more):
    runs = trainer(steps, **more)
    runs.fit(task, data)
    return runs


def small(dtype=torch.float64):
    return create_model("hybrid-tiny", **MODEL).to(dtype)


def weights(task):
    return {name: p.detach() for name, p in task.model.named_parameters()}


def test_it_is_plain_pytorch():
    """Three steps against a loop that can be read at a glance."""
    task = Task(small(), OPTIM)
    fit(task, TokenData(RECALL, batch_size=8), 3, precision="64-true")
    model = small()
    optimizer, schedule = build(model, OPTIM, 3)
    for step in range(3):
        batch = RECALL.step(split_seed(0, "train"), step, range(8), 8)
        out = model.loss(batch.tokens, batch.targets)
        (out.loss / out.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(task), dict(model.named_parameters()), rtol=1e-6, atol=1e-7)


def test_accumulation_is_a_larger_batch():
    whole, pieces = Task(small(), OPTIM), Task(small(), OPTIM)
    one = fit(whole, TokenData(RECALL, batch_size=12), 3, precision="64-true")
    many = fit(pieces, TokenData(RECALL, batch_size=4), 3, precision="64-true", accumulate_grad_batches=3, val_check_interval=6)
    torch.testing.assert_close(weights(whole), weights(pieces), rtol=1e-9, atol=1e-12)
    for name in ("train/loss", "train/accuracy", "grad_norm"):
        torch.testing.assert_close(one.callback_metrics[name], many.callback_metrics[name], rtol=1e-6, atol=0)


def test_losses_of_the_model_itself_are_added_by_count():
    """aux: loss/... joins the loss, anything else is only logged."""

    def train(size, micro):
        task = Task(small(), OPTIM)
        plain = task.loss

        def with_aux(*args, **kwargs):
            out = plain(*args, **kwargs)
            mean = task.model.embed(args[0])[args[1] != -100].square().mean()  # a mean over targets, so weighing by count makes batches agree
            return out._replace(aux={"loss/size": 10 * mean, "gauge": mean.detach()})

        task.loss = with_aux
        return task, fit(task, TokenData(RECALL, batch_size=size), 2, precision="64-true", accumulate_grad_batches=micro, val_check_interval=2 * micro)

    (whole, _), (pieces, runs), plain = train(12, 1), train(4, 3), Task(small(), OPTIM)
    fit(plain, TokenData(RECALL, batch_size=12), 2, precision="64-true")
    torch.testing.assert_close(weights(whole), weights(pieces), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(weights(whole)["embed.weight"], weights(plain)["embed.weight"])
    assert {"train/gauge", "train/loss/size"} <= set(runs.callback_metrics)


def test_validation_is_a_mean_over_targets():
    task = Task(small(), OPTIM)
    data = TokenData(RECALL, batch_size=4, val_batches=3)
    found = trainer(1, precision="64-true").validate(task, data, verbose=False)[0]
    sums = torch.zeros(3, dtype=torch.float64)
    for step in range(3):
        batch = RECALL.step(split_seed(0, "val"), step, range(4), 4)
        with torch.no_grad():
            out = task.model.loss(batch.tokens, batch.targets)
        sums += torch.stack([out.loss, out.correct.double(), out.count.double()])
    assert found["val/loss"] == pytest.approx((sums[0] / sums[2]).item(), rel=1e-6)
    assert found["val/accuracy"] == pytest.approx((sums[1] / sums[2]).item())
    assert "val/bits" not in found


# ------------------------------------------------------------------------------------------------ carried state


@pytest.fixture
def text(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text(f"document {i} says {'abc' * (i % 7 + 1)} and ends here. " * (i % 5 + 1))
    return Text(path=str(tmp_path), length=12, held_out=0.2, carry=True)


def streaming():
    return create_model("hybrid-tiny", dim=16, set={"parts.W.ffn.hidden": 32, "parts.M.ffn.hidden": 32, "parts.W.mixer.window": 6}).double()


def test_a_carried_state_goes_on_where_the_last_batch_stopped(text):
    task = Task(streaming(), OPTIM, carry=True)
    runs = fit(task, TokenData(text, batch_size=4), 3, precision="64-true")
    model, state = streaming(), None
    optimizer, schedule = build(model, OPTIM, 3)
    for step in range(3):
        batch = text.step(split_seed(0, "train"), step, range(4), 4)
        out = model.loss(batch.tokens, batch.targets, state, starts=batch.starts)
        state = states.detach(out.state)
        (out.loss / out.count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(task), dict(model.named_parameters()), rtol=1e-6, atol=1e-7)
    assert runs.callback_metrics["train/bits"] == pytest.approx((out.loss / out.count).item() / 0.6931471805599453, rel=1e-6)


def test_a_carried_state_goes_through_autocast(text):
    task = Task(streaming().float(), OPTIM, carry=True)
    assert torch.isfinite(fit(task, TokenData(text, batch_size=4), 3, precision="bf16-mixed").callback_metrics["train/loss"])


def test_a_carried_state_is_saved_as_plain_tensors_and_comes_back(text, tmp_path):
    task = Task(streaming(), OPTIM, carry=True)
    runs = fit(task, TokenData(text, batch_size=4), 2, precision="64-true")
    runs.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert all(isinstance(leaf, torch.Tensor) and not leaf.requires_grad for leaf in saved["carried"].values())
    assert decode(LMConfig, json.loads(saved["config"])) == task.model.config
    again = Task(streaming(), OPTIM, carry=True)
    again._trainer = runs
    again.on_load_checkpoint(saved)
    for (name, a), (_, b) in zip(states.leaves(task.carried), states.leaves(again.carried), strict=True):
        assert torch.equal(a, b), name


def test_a_new_run_begins_with_no_state(text):
    task = Task(streaming(), OPTIM, carry=True)
    fit(task, TokenData(text, batch_size=4), 1, precision="64-true")
    assert task.carried is not None
    task.setup("fit")
    assert task.carried is None


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("32-true", torch.float32)])
def test_precisions(precision, dtype):
    task = Task(small(torch.float32), OPTIM)
    runs = fit(task, TokenData(RECALL, batch_size=4), 2, precision=precision)
    assert task.model.embed.weight.dtype == dtype
    assert torch.isfinite(runs.callback_metrics["train/loss"]) and runs.callback_metrics["train/loss"].dtype == torch.float32


def test_recompute_changes_nothing_but_memory():
    plain, again = Task(small(), OPTIM), Task(small(), OPTIM, recompute=True)
    for task in (plain, again):
        fit(task, TokenData(RECALL, batch_size=4), 2, precision="64-true")
    torch.testing.assert_close(weights(plain), weights(again), rtol=1e-9, atol=1e-12)


def test_a_config_is_built_from_the_seed():
    config = small().config
    assert torch.equal(Task(config, seed=3).model.embed.weight, Task(config, seed=3).model.embed.weight)
    assert not torch.equal(Task(config, seed=3).model.embed.weight, Task(config, seed=4).model.embed.weight)


@pytest.mark.slow
def test_compile_keeps_names_and_numbers():
    plain, fast = Task(small(), OPTIM), Task(small(), OPTIM, compile=True)
    for task in (plain, fast):
        fit(task, TokenData(RECALL, batch_size=4), 2, precision="64-true")
    assert set(plain.state_dict()) == set(fast.state_dict())
    torch.testing.assert_close(weights(plain), weights(fast), rtol=1e-6, atol=1e-8)


def test_lightning_may_not_clip():
    with pytest.raises(ValueError, match=r"optim\.clip"):
        fit(Task(small(), OPTIM), TokenData(RECALL, batch_size=4), 1, gradient_clip_val=1.0)
