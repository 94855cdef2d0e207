"""metrics.csv, speed and FLOPs: what is written is true, can be read at any moment, and costs training nothing."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from memarch import create_model, list_models
from memarch.callbacks import Guard, Metrics, logger
from memarch.callbacks.flops import PEAKS, Counter, count, peak
from memarch.callbacks.metrics import Window
from memarch.callbacks.table import Table, read
from memarch.data import MQAR
from memarch.data.module import TokenData
from memarch.layers import AttentionConfig, SwiGLUConfig
from memarch.models.lm import BlockConfig, LMConfig
from memarch.optim import OptimConfig
from memarch.task import Task

BATCH, LENGTH = 4, 16


def make(recompute: bool = False, layers: int = 2, **more: Any) -> Task:
    part = BlockConfig(mixer=AttentionConfig(heads=2), ffn=SwiGLUConfig(hidden=32))
    config = LMConfig(vocab_size=64, dim=16, layers=layers, pattern="A", parts={"A": part})
    return Task(config, OptimConfig(lr=1e-2, warmup=4), recompute=recompute, **more)


def fit(task: Task, run_dir: Path, callbacks: list[Any], steps: int = 6, **more: Any) -> Trainer:
    plain: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain |= {"max_steps": steps, "log_every_n_steps": 2, "val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1} | more
    trainer = Trainer(callbacks=callbacks, **plain)
    torch.manual_seed(0)
    trainer.fit(task, TokenData(MQAR(vocab_size=64, settings=((LENGTH, 2),)), batch_size=BATCH, val_batches=1))
    return trainer


# ------------------------------------------------------------------------------------------------ the table


def test_columns_grow_and_rows_survive(tmp_path: Path) -> None:
    table = Table(tmp_path / "metrics.csv", last=0)
    table.add({"step": 1, "loss": 1 / 3})
    table.add({"step": 2, "loss": math.nan, "val/loss": 2.0})
    table.add({"step": 3, "val/loss": 1e-9})
    columns, rows = read(tmp_path / "metrics.csv")
    assert columns == ["step", "loss", "val/loss"]
    assert [list(row.values()) for row in rows] == [["1", "0.333333333", ""], ["2", "nan", "2"], ["3", "", "1e-09"]]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_opening_again_drops_what_will_come_again(tmp_path: Path) -> None:
    """Rows beyond the step that is resumed, and a line that a kill cut off: "2,0.12" reads like a number and is half of one."""
    table = Table(tmp_path / "metrics.csv", last=0)
    for step in (1, 2, 3):
        table.add({"step": step, "loss": step / 8})
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "4,0.5")
    assert [row["step"] for row in read(path)[1]] == ["1", "2", "3"]
    Table(path, last=2).add({"step": 3, "loss": 7.0})
    assert path.read_text() == "step,loss\n1,0.125\n2,0.25\n3,7\n"
    Table(path, last=0)
    assert path.read_text() == "step,loss\n"


# ------------------------------------------------------------------------------------------------ a run


def test_rows_of_a_run(tmp_path: Path) -> None:
    """One row a step: validation joins the row of its step, or gets its own; the first and the last step have one whatever the interval."""
    rates: list[float] = []

    class Spy(Task):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

    task = Spy(make().model, OptimConfig(lr=1e-2, warmup=4))
    fit(task, tmp_path, [Guard(), Metrics(tmp_path)], steps=7, accumulate_grad_batches=2, val_check_interval=6)
    _, rows = read(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "6", "7"]
    assert [bool(row["val/loss"]) for row in rows] == [False, False, True, False, True, False]
    assert [bool(row["train/loss"]) for row in rows] == [True, True, False, True, True, True]
    assert [int(row["tokens"]) for row in rows] == [int(row["step"]) * 2 * BATCH * LENGTH for row in rows]
    trained = [row for row in rows if row["train/loss"]]
    assert [float(row["lr/matrices"]) for row in trained] == pytest.approx([rates[int(row["step"]) - 1] for row in trained])
    for name in ("train/accuracy", "grad_norm", "peak_memory_gib"):
        assert all(float(row[name]) >= 0 for row in trained), name
    for name in ("tokens_per_s", "step_ms", "tflops"):  # the first step of a process says nothing about speed
        assert [row[name] != "" and float(row[name]) > 0 for row in trained] == [False, True, True, True, True], name
    assert all(row["skipped"] == "0" for row in trained)
    assert "mfu" not in rows[0]  # nobody knows the peak of this processor
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_the_file_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    seen: list[int] = []

    class Reader(Task):
        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            seen.append(len(read(tmp_path / "metrics.csv")[1]))

    fit(Reader(make().model, OptimConfig(warmup=4)), tmp_path, [Metrics(tmp_path)], limit_val_batches=0)
    assert seen == [0, 1, 2, 2, 3, 3]  # a row stands there when its step is over


def test_a_skipped_step_says_so(tmp_path: Path) -> None:
    class Sick(Task):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step(batch, index) * (math.nan if index == 3 else 1.0)

    fit(Sick(make().model, OptimConfig(warmup=4)), tmp_path, [Guard(), Metrics(tmp_path)])
    _, rows = read(tmp_path / "metrics.csv")
    told = {row["step"]: (row["skipped"], row["grad_norm"]) for row in rows if row["skipped"]}
    assert told["4"] == ("1", "nan")  # and not the norm of the step before it
    assert told["6"][0] == "1"
    assert math.isfinite(float(told["6"][1]))


def test_time_spent_elsewhere_is_no_training_time() -> None:
    window = Window()
    window.began -= 10.0
    window.stop()
    assert window.stopped is not None
    window.stopped -= 4.0  # stopped four seconds ago
    assert window.elapsed() == pytest.approx(6.0, abs=0.1)
    window.go()
    assert window.elapsed() == pytest.approx(6.0, abs=0.1)
    window.add(600, 10**12)
    window.steps = 3
    assert window.rates(1e12) == pytest.approx({"tokens_per_s": 100, "step_ms": 2000, "tflops": 1 / 6, "mfu": 1 / 6}, rel=0.05)
    window.add(600, None)  # a batch whose work is unknown makes the sum unknown
    assert set(window.rates(1e12)) == {"tokens_per_s", "step_ms"}


# ------------------------------------------------------------------------------------------------ FLOPs


def work(task: Task) -> int:
    """FLOPs of a batch, counted in the middle of a run."""
    found: list[int | None] = []

    class Spy(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            found.append(count(trainer, pl_module, batch, batch_idx))

    fit(task, Path(), [Spy()], steps=1, limit_val_batches=0)
    assert found[0] is not None
    return found[0]


def test_flops_are_those_of_the_formula() -> None:
    """Per token and layer four maps of the mixer and three of the feed-forward, and the head: two FLOPs a weight, three times that with the
    backward. Attention: two products forward, five backward."""
    tokens, dim, hidden, vocab = BATCH * LENGTH, 16, 32, 64
    weights = 2 * (4 * dim * dim + 3 * dim * hidden) + dim * vocab
    attention = 2 * (2 * BATCH * LENGTH * LENGTH * dim)  # one layer, forward
    assert work(make()) == 6 * tokens * weights + 2 * (attention + attention * 5 // 2)


def test_attention_counts_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own counter does not know the operator that runs here; memarch.kernels files it, when it is asked to."""
    for suffix in ("", "_backward"):
        monkeypatch.delitem(flop_registry, getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}"), raising=False)
    q = torch.randn(2, 3, 8, 4, requires_grad=True)  # [B, H, T, D]
    with Counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * (2 * 3 * 8 * 8 * 4)  # two products forward, five backward


def test_what_is_computed_twice_counts_once() -> None:
    assert work(make(recompute=True)) == work(make())


@pytest.mark.parametrize("name", list_models("*-tiny"))
def test_every_kind_can_be_counted(name: str) -> None:
    """Also where a layer calls a module with a parameter."""
    model = create_model(name)
    weights = [p for p in model.parameters() if p.requires_grad]
    with Counter() as counter:
        torch.autograd.grad(model(torch.ones(2, 40, dtype=torch.int64)).logits.sum(), weights, allow_unused=True)
    assert counter.get_total_flops() > 0


@pytest.mark.slow
def test_a_compiled_task_is_counted_as_written(tmp_path: Path) -> None:
    """And runs compiled afterwards, to the same bits as one that was not measured."""

    def ends(flops: bool) -> tuple[int | None, Tensor]:
        task = make()
        task.loss = torch.compile(task.model.loss, backend="aot_eager")
        metrics = Metrics(tmp_path, flops)
        fit(task, tmp_path, [metrics], steps=3, limit_val_batches=0)
        return next(iter(metrics.work.values()), None), torch.cat([p.detach().flatten() for p in task.parameters()])

    (nothing, plain), (found, measured) = ends(False), ends(True)
    assert (nothing, found) == (None, work(make()))
    assert torch.equal(plain, measured)


def test_counting_changes_nothing(tmp_path: Path) -> None:
    """Weights, optimiser, carried state and random numbers: a run that is measured ends bit for bit as one that is not."""

    class Random(Task):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step(batch, index) * (0.5 + torch.rand(()))

    def ends(flops: bool) -> dict[str, Tensor]:
        task = Random(make().model, OptimConfig(lr=1e-2, warmup=4), carry=True)
        task.model.register_buffer("count", torch.zeros(()))
        task.model.embed.register_forward_pre_hook(lambda module, args: (task.model.count.add_(1), None)[1])
        fit(task, tmp_path, [Metrics(tmp_path, flops)], accumulate_grad_batches=2)
        return {**task.state_dict(), "random": torch.get_rng_state()}

    plain, measured = ends(False), ends(True)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)


def test_the_first_batch_of_a_shape_is_measured_and_no_other(tmp_path: Path) -> None:
    steps: list[int] = []

    class Counted(Task):
        def training_step(self, batch: Any, index: int) -> Tensor:
            steps.append(batch.tokens.shape[1])
            return super().training_step(batch, index)

    task = Counted(make().model, OptimConfig(warmup=4))
    plain: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[Metrics(tmp_path)], max_steps=6, log_every_n_steps=6, limit_val_batches=0, **plain)
    trainer.fit(task, TokenData(MQAR(vocab_size=64, settings=((8, 1), (16, 2))), batch_size=BATCH))
    assert len(steps) == 6 + 2
    assert float(read(tmp_path / "metrics.csv")[1][-1]["tflops"]) > 0


def test_no_peak_is_guessed() -> None:
    assert peak("NVIDIA H100 80GB HBM3", "bf16-mixed", tf32=False) == 989.4e12
    assert peak("NVIDIA H100 PCIe", "bf16-true", tf32=False) == 756e12
    assert peak("NVIDIA A100-SXM4-80GB", "32-true", tf32=True) == 156e12
    assert peak("NVIDIA A100-SXM4-80GB", "32-true", tf32=False) == 19.5e12
    assert peak("NVIDIA H200", "bf16-mixed", tf32=True) == 989.4e12
    assert peak("NVIDIA A10", "bf16-mixed", tf32=True) == 125e12
    for name in ("NVIDIA A10G", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4080 SUPER", "AMD EPYC 9004", ""):
        assert peak(name, "bf16-mixed", tf32=True) is None, name
    assert peak("Tesla V100-SXM2-16GB", "bf16-mixed", tf32=False) is None
    assert peak("NVIDIA H200", "64-true", tf32=False) is None
    assert all(half is None or single < half for _, half, _, single in PEAKS)


# ------------------------------------------------------------------------------------------------ loggers


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(make(), tmp_path, [Guard(), Metrics(tmp_path)], logger=logger("tensorboard", tmp_path))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "lr/matrices", "tokens_per_s", "tflops", "skipped", "peak_memory_gib"} <= names
    rows = [row for row in read(tmp_path / "metrics.csv")[1] if row["train/loss"] and row["step"] != "1"]  # Lightning sends multiples only
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([float(row["train/loss"]) for row in rows])
    assert [event.value for event in events.Scalars("tokens_per_s")] == pytest.approx([float(row["tokens_per_s"]) for row in rows])


def test_a_logger_that_is_not_there_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'memarch\[logging\]'"):
        logger("wandb", tmp_path)
    with pytest.raises(ValueError, match=r"unknown logger 'comet'\. Allowed: tensorboard, wandb"):
        logger("comet", tmp_path)
