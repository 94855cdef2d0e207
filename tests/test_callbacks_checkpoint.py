"""Checkpoints: whole files only, the newest few, nothing but tensors and numbers in them, and no other model taken up by mistake."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from memarch.callbacks import AtomicIO, Checkpoints, Guard, Metrics, Stopped, default_callbacks, latest
from memarch.callbacks.files import checkpoints, place, whole
from memarch.config import ConfigError
from memarch.data import MQAR, Text
from memarch.data.module import TokenData
from memarch.layers import AttentionConfig, SwiGLUConfig
from memarch.models.lm import BlockConfig, LMConfig
from memarch.optim import OptimConfig
from memarch.task import Task


def fit(
    run_dir: Path, steps: int = 6, callbacks: list[Any] | None = None, task: Task | None = None, window: int = 8, seed: int = 0, train: Any = None, **more: Any
) -> Task:
    part = BlockConfig(mixer=AttentionConfig(heads=2, window=window), ffn=SwiGLUConfig(hidden=32))
    task = task or Task(LMConfig(vocab_size=64, dim=16, layers=1, pattern="A", parts={"A": part}), OptimConfig(lr=1e-2, schedule="constant", warmup=2))
    data = TokenData(train or MQAR(vocab_size=64, settings=((16, 2),)), batch_size=2, val_batches=1, seed=seed)
    plain: dict[str, Any] = {"logger": False, "enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0, "check_val_every_n_epoch": None}
    plain |= {"max_steps": steps, "log_every_n_steps": 2, "val_check_interval": 3} | more
    found = default_callbacks(run_dir, save_every=2, flops=False, bar=False) if callbacks is None else callbacks
    Trainer(callbacks=found, enable_progress_bar=False, **plain).fit(task, data, ckpt_path=latest(run_dir))
    return task


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------ files


def test_the_newest_few_stay(tmp_path: Path) -> None:
    fit(tmp_path, steps=7)
    assert names(tmp_path) == ["step-00000006.ckpt", "step-00000007.ckpt"]
    assert latest(tmp_path) == place(tmp_path, 7)
    assert latest(tmp_path / "elsewhere") is None


def test_a_checkpoint_that_is_not_whole_is_not_the_latest(tmp_path: Path) -> None:
    fit(tmp_path)
    good, size = place(tmp_path, 4), place(tmp_path, 6).stat().st_size
    for cut in (0, 1, size // 2, size - 1):
        os.truncate(place(tmp_path, 6), cut) if cut else place(tmp_path, 6).write_bytes(b"")
        assert latest(tmp_path) == good, cut
    (tmp_path / "checkpoints" / "step-00000009.ckpt").mkdir()
    (tmp_path / "checkpoints" / "step-best.ckpt").write_text("of somebody else")
    assert latest(tmp_path) == good


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, io = tmp_path / "checkpoints" / "step-00000001.ckpt", AtomicIO()
    io.save_checkpoint({"x": torch.ones(3)}, path)

    def full(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"x": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert names(tmp_path) == [path.name]
    assert whole(path)
    assert torch.equal(io.load_checkpoint(path)["x"], torch.ones(3))


def test_the_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    AtomicIO().save_checkpoint({}, tmp_path / "x.ckpt")
    assert done == ["sync", "rename", "sync"]


def test_what_killed_runs_left_is_swept(tmp_path: Path) -> None:
    fit(tmp_path)
    left = tmp_path / "checkpoints" / ".step-00000008.ckpt.4711.tmp"
    left.write_bytes(b"half")
    fit(tmp_path, steps=7)
    assert not left.exists()


def test_a_checkpoint_holds_no_code(tmp_path: Path) -> None:
    """torch.load(weights_only=True) reads all of it, and what it would not read is refused, whatever Lightning asks for."""
    fit(tmp_path)
    path = place(tmp_path, 6)
    torch.load(path, weights_only=True)
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    torch.save({"state_dict": {}, "x": Evil()}, path)
    for asked in (None, False):
        with pytest.raises(ValueError, match="more than tensors and plain values"):
            AtomicIO().load_checkpoint(path, weights_only=asked)
    with pytest.raises(ValueError, match="more than tensors and plain values"):
        fit(tmp_path, steps=8)
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------ resuming


def test_a_run_in_pieces_is_the_whole_run(tmp_path: Path) -> None:
    """Stopped after any number of steps, at those with a validation too; the final checkpoint of a shorter run is one to go on from."""
    whole_run = fit(tmp_path / "whole", steps=7)
    pieces = tmp_path / "pieces"
    for steps in (1, 3, 4, 6, 7):
        last = fit(pieces, steps=steps)
    assert all(torch.equal(a, b) for a, b in zip(whole_run.parameters(), last.parameters(), strict=True))
    a, b = (torch.load(latest(tmp_path / name), weights_only=True) for name in ("whole", "pieces"))  # type: ignore[arg-type]
    assert a["memarch"]["batches"] == b["memarch"]["batches"] == 7
    assert a["loops"] == b["loops"]


def test_a_finished_run_takes_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fit(tmp_path)
    table, files = (tmp_path / "metrics.csv").read_text(), names(tmp_path)
    after = fit(tmp_path)
    assert "This run is finished: 6 of 6 steps are done." in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert ((tmp_path / "metrics.csv").read_text(), names(tmp_path)) == (table, files)


def test_a_run_that_stopped_early_is_finished_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> list[Any]:
        return [EarlyStopping("val/accuracy", mode="max", stopping_threshold=-1.0, check_on_train_epoch_end=False), *default_callbacks(tmp_path, bar=False)]

    fit(tmp_path, steps=8, callbacks=stop())
    assert latest(tmp_path) == place(tmp_path, 3)  # the first validation
    fit(tmp_path, steps=8, callbacks=stop())
    assert "This run is finished: it stopped early, at step 3." in capsys.readouterr().out
    assert latest(tmp_path) == place(tmp_path, 3)
    fit(tmp_path, steps=8)
    assert latest(tmp_path) == place(tmp_path, 8)


def test_a_trial_leaves_no_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, fast_dev_run=2)
    assert latest(tmp_path) is None


def test_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A window has no weights: without the check the run would go on as another model."""
    fit(tmp_path)
    with pytest.raises(ConfigError, match=r"another model: model\.parts\.A\.mixer\.window was 8 and is 4\. A run is resumed with the config"):
        fit(tmp_path, steps=8, window=4)
    part = BlockConfig(mixer=AttentionConfig(heads=2, window=8), ffn=SwiGLUConfig(hidden=32))
    wider = Task(LMConfig(vocab_size=64, dim=32, layers=1, pattern="A", parts={"A": part}), OptimConfig(schedule="constant"))
    with pytest.raises(ConfigError, match=r"model\.dim was 16 and is 32"):
        fit(tmp_path, steps=8, task=wider)
    with pytest.raises(ConfigError, match=r"another data: data\.seed was 0 and is 1"):
        fit(tmp_path, steps=8, seed=1)
    assert capsys.readouterr().out == ""  # not "Training failed": it had not begun


def test_text_is_known_by_its_content(tmp_path: Path) -> None:
    def text(folder: str, words: str) -> Text:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(words * 200)
        return Text(path=str(tmp_path / folder / "text.txt"), length=8)

    part = BlockConfig(mixer=AttentionConfig(heads=2))
    config = LMConfig(vocab_size=256, dim=16, layers=1, pattern="A", parts={"A": part})
    for steps, train in ((2, text("here", "a word ")), (4, text("moved", "a word "))):
        fit(tmp_path / "run", steps, task=Task(config, OptimConfig(schedule="constant")), train=train)
    with pytest.raises(ConfigError, match=r"another data: data\.train\.fingerprint was"):
        fit(tmp_path / "run", 6, task=Task(config, OptimConfig(schedule="constant")), train=text("other", "a work "))


def test_data_go_on_at_the_micro_batch(tmp_path: Path) -> None:
    """Not at the optimiser step: with accumulation they differ."""
    seen: list[int] = []

    class Spy(Task):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            seen.append(int(batch.tokens.sum()))
            return super().training_step(batch, index)

    def spied(run_dir: Path, steps: int) -> list[int]:
        seen.clear()
        part = BlockConfig(mixer=AttentionConfig(heads=2, window=8), ffn=SwiGLUConfig(hidden=32))
        task = Spy(LMConfig(vocab_size=64, dim=16, layers=1, pattern="A", parts={"A": part}), OptimConfig(schedule="constant", warmup=2))
        fit(run_dir, steps, task=task, accumulate_grad_batches=3)
        return list(seen)

    everything = spied(tmp_path / "whole", 4)
    assert len(everything) == len(set(everything)) == 12
    assert spied(tmp_path / "pieces", 1) + spied(tmp_path / "pieces", 4) == everything


def test_loggers_count_on_after_a_validation(tmp_path: Path) -> None:
    """Resumed at a step that was validated, Lightning counts it twice; then training would be logged a step early ever after."""
    steps: list[int] = []

    class Spy(Metrics):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            steps.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    for last in (3, 6):
        fit(tmp_path, last, callbacks=[Spy(tmp_path, flops=False), Checkpoints(tmp_path)])
    assert steps == [0, 1, 2, 3, 4, 5]


# ------------------------------------------------------------------------------------------------ when


def test_checkpoints_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("memarch.callbacks.checkpoint.time.monotonic", lambda: now[0])

    class Slow(Task):
        def on_train_batch_end(self, *args: Any) -> None:
            now[0] += 50.0

    part = BlockConfig(mixer=AttentionConfig(heads=2))
    task = Slow(LMConfig(vocab_size=64, dim=16, layers=1, pattern="A", parts={"A": part}), OptimConfig(schedule="constant"))
    fit(tmp_path, 7, callbacks=[Checkpoints(tmp_path, every=None, minutes=2.0, keep=9)], task=task)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{n:08d}.ckpt" for n in (3, 6, 7)]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_between_two_steps(tmp_path: Path, number: int, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The step is finished, with its validation and its row; the checkpoint is of that step; handlers are as before."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}

    class Hit(Task):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if index == 2:
                os.kill(os.getpid(), number)
            return super().training_step(batch, index)

    part = BlockConfig(mixer=AttentionConfig(heads=2, window=8), ffn=SwiGLUConfig(hidden=32))
    config = LMConfig(vocab_size=64, dim=16, layers=1, pattern="A", parts={"A": part})
    with pytest.raises(Stopped) as stopped:
        fit(tmp_path, task=Hit(config, OptimConfig(lr=1e-2, schedule="constant", warmup=2)))
    assert stopped.value.code == status
    assert latest(tmp_path) == place(tmp_path, 3)
    assert f"Stopped by a signal at step 3. --resume {tmp_path} goes on from step-00000003.ckpt." in capsys.readouterr().out
    assert {each: signal.getsignal(each) for each in before} == before
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows[-1].startswith("3,")
    last, alone = fit(tmp_path), fit(tmp_path / "alone")
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), alone.parameters(), strict=True))
    assert (tmp_path / "metrics.csv").read_text().count("\n") == (tmp_path / "alone" / "metrics.csv").read_text().count("\n")


def test_a_failure_says_where_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Breaks(Task):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if index == 5:
                raise RuntimeError("the disk is gone")
            return super().training_step(batch, index)

    part = BlockConfig(mixer=AttentionConfig(heads=2))
    task = Breaks(LMConfig(vocab_size=64, dim=16, layers=1, pattern="A", parts={"A": part}), OptimConfig(schedule="constant"))
    with pytest.raises(RuntimeError, match="the disk is gone"):
        fit(tmp_path, task=task)
    assert f"Training failed at step 5. --resume {tmp_path} goes on from step-00000004.ckpt." in capsys.readouterr().out


def test_numbers_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every = 0: must be above 0, or null for never"):
        Checkpoints(tmp_path, every=0)
    with pytest.raises(ValueError, match="keep = 0: must be above 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="patience = 0"):
        Guard(0)
