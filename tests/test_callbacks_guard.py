"""What the guard does with NaN: nothing happens to the run, until it happens too often, and then the culprit has a name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from memarch.callbacks import Guard, NonFinite

STEPS = 6


class Layer(nn.Module):
    """x -> x + W x, with what a test does to the output and to its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.sick: dict[str, bool] = {"inside": False, "output": False, "gradient": False}

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.inner(x / 0.0 if self.sick["inside"] else x)
        if self.sick["output"]:
            y = y / 0.0
        if self.sick["gradient"] and y.requires_grad:
            y.register_hook(lambda grad: grad * float("nan"))
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layer(), Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Toy(LightningModule):
    """bad(micro-batch) names what goes wrong then: "inside", "output" or "gradient" of the middle block, or "loss", whose gradient is fine."""

    def __init__(self, bad: Any = lambda index: None):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.bad = Model(), bad
        self.carried: Tensor | None = None
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        bad = self.bad(index)
        self.model.blocks[1].sick = {name: name == bad for name in ("inside", "output", "gradient")}
        y = self.model(batch) + (0.0 if self.carried is None else self.carried)
        self.carried = y.detach().mean(0)
        return y.square().mean() + (float("inf") if bad == "loss" else 0.0)

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        moments = [{name: value.clone() for name, value in state.items()} for state in optimizer.state.values()]  # type: ignore[union-attr]
        self.seen.append({"weights": [p.detach().clone() for p in self.parameters()], "moments": moments, "carried": self.carried})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def fit(task: Toy, guard: Guard, tmp_path: Path, accumulate: int = 1, **more: Any) -> Trainer:
    data = DataLoader(torch.randn(256, 4, generator=torch.Generator().manual_seed(1)), batch_size=4)
    plain: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain |= {"max_steps": STEPS, "default_root_dir": tmp_path, "accumulate_grad_batches": accumulate} | more
    trainer = Trainer(callbacks=[guard], **plain)
    trainer.fit(task, data)
    return trainer


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return len(a) == len(b) and all(equal(x, y) for x, y in (zip(a.values(), b.values()) if isinstance(a, dict) else zip(a, b)))


@pytest.mark.parametrize("bad", ["output", "gradient", "loss"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_step_changes_nothing(tmp_path: Path, bad: str, accumulate: int) -> None:
    """The first micro-batch of the third step is bad; with accumulation the second, good one does not hide it."""
    at = 2 * accumulate
    task, guard = Toy(lambda index: bad if index == at else None), Guard()
    trainer = fit(task, guard, tmp_path, accumulate)
    before, after = task.seen[at - 1], task.seen[at + accumulate - 1]
    assert equal(before["weights"], after["weights"])
    assert equal(before["moments"], after["moments"])
    assert equal(before["carried"], after["carried"])  # NaN carried on would spoil every step after it
    assert not equal(after["weights"], task.seen[-1]["weights"])  # and training went on
    assert all(torch.isfinite(p).all() for p in task.parameters())
    assert (guard.skipped, guard.row, trainer.global_step) == (1, 0, STEPS)


def test_norms_that_the_task_has_are_not_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configure_gradient_clipping leaves them in `norms`. A bad group is enough; the tables' 3 and the rest's 4 make 5."""
    from memarch.callbacks import guard as module

    class Measured(Toy):
        norms: dict[str, Tensor]

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            now = float("inf") if self.trainer.global_step == 2 else 3.0
            self.norms = {"tables": torch.tensor(now), "rest": torch.tensor(4.0)}

    task, guard = Measured(), Guard()
    task.norms = {}
    monkeypatch.setattr(module, "gradient_norm", lambda optimizer: pytest.fail("read twice"))
    fit(task, guard, tmp_path)
    assert (guard.skipped, guard.norm) == (1, 5.0)
    assert equal(task.seen[1]["weights"], task.seen[2]["weights"])
    assert "configure_gradient_clipping" not in vars(task)  # given back


def test_patience_counts_in_a_row(tmp_path: Path) -> None:
    guard = Guard(patience=2)
    fit(Toy(lambda index: "loss" if index % 2 else None), guard, tmp_path)
    assert guard.skipped == 3
    with pytest.raises(NonFinite, match="2 steps in a row"):
        fit(Toy(lambda index: "loss" if index in (2, 3) else None), Guard(patience=2), tmp_path)


@pytest.mark.parametrize("bad", ["inside", "output"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_error_names_the_layer(tmp_path: Path, accumulate: int, bad: str) -> None:
    """Its inner linear map is innocent even where its output is the first bad one: so was its input. And so is the third block."""
    with pytest.raises(NonFinite, match=r"comes out of blocks\.1 \(Layer\), from finite inputs: \d+ NaN and \d+ infinite among 16") as told:
        fit(Toy(lambda index: bad if index >= 2 else None), Guard(2), tmp_path, accumulate)
    assert "step" in str(told.value)
    assert "lower learning rate (now 0.01), a longer warm-up" in str(told.value)


def test_the_error_names_the_gradient(tmp_path: Path) -> None:
    """The third block's gradients are finite, the middle one's are where it begins; the first block only inherits them."""
    with pytest.raises(NonFinite, match=r"first bad gradient is that of blocks\.1\.inner\.(weight|bias)"):
        fit(Toy(lambda index: "gradient"), Guard(1), tmp_path)


def test_the_error_names_the_loss_or_a_weight(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match="Every layer's output is finite, and the loss made of them is inf"):
        fit(Toy(lambda index: "loss"), Guard(1), tmp_path)
    task = Toy()
    with torch.no_grad():
        task.model.blocks[2].inner.weight[0, 0] = float("inf")
    with pytest.raises(NonFinite, match=r"The weight blocks\.2\.inner\.weight itself is not finite: 0 NaN and 1 infinite among 16"):
        fit(task, Guard(1), tmp_path)


def test_a_layer_of_memarch_is_named_by_its_place_in_the_model(tmp_path: Path) -> None:
    from memarch.data import MQAR
    from memarch.data.module import TokenData
    from memarch.layers import GatedDeltaConfig, SwiGLUConfig
    from memarch.models.lm import BlockConfig, LMConfig
    from memarch.task import Task

    part = BlockConfig(mixer=GatedDeltaConfig(heads=2), ffn=SwiGLUConfig())
    task = Task(LMConfig(vocab_size=64, dim=16, layers=2, pattern="G", parts={"G": part}))
    core = task.model.core.blocks[1].mixer
    forward = core.forward
    core.forward = lambda *args, **kwargs: (lambda h: h._replace(y=h.y * float("nan")))(forward(*args, **kwargs))  # type: ignore[method-assign]
    trainer = Trainer(callbacks=[Guard(1)], max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(NonFinite, match=r"comes out of backbone\.blocks\.1\.mixer \(GatedDelta\)"):
        trainer.fit(task, TokenData(MQAR(vocab_size=64, settings=((16, 2),)), batch_size=2))


def test_sparse_gradients_are_looked_at(tmp_path: Path) -> None:
    from memarch.callbacks.guard import gradient_norm

    table = nn.Embedding(10, 3, sparse=True)
    (table(torch.tensor([1, 1, 4])).sum() * 2).backward()
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    assert float(gradient_norm(optimizer)) == pytest.approx((3 * 4.0**2 + 3 * 2.0**2) ** 0.5)  # row 1 was read twice
    table.weight.grad = None
    assert float(gradient_norm(optimizer)) == 0.0
