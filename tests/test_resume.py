"""A run that is really killed, and started again with the same command, ends as one that was left alone: weights, optimiser, carried state and
metrics.csv, bit for bit. The command is this file."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

STEPS, SPEED = 24, {"seconds", "tokens_per_s", "step_ms", "tflops", "peak_memory_gib"}


def main(run_dir: Path, text: Path, steps: int, slow_write: float, tables: str = "") -> None:
    """Everything that could be forgotten: accumulation, carried state, a schedule, global random numbers, validation, data that are not replayed.
    tables: "" for a model without, else optim.tables."""
    from lightning.pytorch import Trainer, seed_everything

    from memarch.callbacks import default_callbacks, files, latest
    from memarch.data import Text
    from memarch.data.module import TokenData
    from memarch.layers import GatedDeltaConfig, PKMConfig, SwiGLUConfig
    from memarch.models.lm import BlockConfig, LMConfig
    from memarch.optim import OptimConfig
    from memarch.task import Task

    torch.set_num_threads(1)
    seed_everything(0, verbose=False)

    class Noisy(Task):
        """Draws from the global generator, as dropout would."""

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            time.sleep(0.01)  # long enough to be hit
            return super().training_step(batch, index) * (0.5 + torch.rand(()))

    def slowly(checkpoint: Any, file: Any, save: Any = torch.save) -> None:
        save(checkpoint, file)
        size = file.tell()
        file.truncate(size // 2)
        file.flush()
        time.sleep(slow_write)  # half of the file is there, as when a disk is slow
        file.seek(0)
        file.truncate()
        save(checkpoint, file)

    if slow_write:
        files.torch.save = slowly  # type: ignore[attr-defined]
    part = BlockConfig(mixer=GatedDeltaConfig(heads=2), ffn=PKMConfig(keys=16, heads=2, topk=4) if tables else SwiGLUConfig())
    optim = OptimConfig(lr=1e-2, warmup=4, **({"tables": tables, "memory_lr": 4.0, "memory_decay": 0.5} if tables else {}))
    task = Noisy(LMConfig(vocab_size=256, dim=16, layers=2, pattern="G", parts={"G": part}), optim, carry=True)
    data = TokenData(Text(path=str(text), length=16, carry=True), batch_size=4, val_batches=2)
    trainer = Trainer(
        callbacks=default_callbacks(run_dir, save_every=5, keep=2),
        max_steps=steps,
        accumulate_grad_batches=2,
        val_check_interval=10,
        check_val_every_n_epoch=None,
        log_every_n_steps=3,
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, data, ckpt_path=latest(run_dir))


def start(run_dir: Path, text: Path, slow_write: float = 0.0, tables: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(run_dir), str(text), str(STEPS), str(slow_write), tables]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == status, said
    return said


def table(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with (run_dir / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in SPEED} for row in csv.DictReader(file)]


def outcome(run_dir: Path) -> dict[str, Any]:
    from memarch.callbacks import latest

    path = latest(run_dir)
    assert path is not None
    found = torch.load(path, weights_only=True)
    return {name: found[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "carried", "global_step", "memarch", "loops")}


def same(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i in range(len(a)):
            same(a[i], b[i], f"{path}.{i}")
    else:
        assert a == b, path


def steps_done(run_dir: Path) -> int:
    try:
        return int(table(run_dir)[-1]["step"])
    except (OSError, IndexError):
        return 0


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(1000)))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The run that was left alone."""
    run_dir = tmp_path_factory.mktemp("whole")
    main(run_dir, text, STEPS, slow_write=0.0)
    return run_dir


def compare(run_dir: Path, whole: Path) -> None:
    same(outcome(whole), outcome(run_dir))
    assert table(run_dir) == table(whole)


def test_killed_once(tmp_path: Path, text: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(time.time())
    at = random.Random(seed).randrange(6, STEPS - 3)  # anything after the first checkpoint
    process = start(tmp_path, text)
    while steps_done(tmp_path) < at and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, f"it was over before step {at} (seed {seed})"
    said = finish(start(tmp_path, text))
    assert f"step {STEPS}/{STEPS}" in said
    compare(tmp_path, whole)
    main(tmp_path, text, STEPS, slow_write=0.0)  # once more, and no step is taken
    assert f"This run is finished: {STEPS} of {STEPS} steps" in capsys.readouterr().out
    compare(tmp_path, whole)


def test_tables_stepped_by_rows_go_on_too(tmp_path: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Their moments, and the fall of their rate. The config says how they are stepped; another way has other moments."""
    from memarch.config import ConfigError

    whole = tmp_path_factory.mktemp("whole")
    main(whole, text, STEPS, slow_write=0.0, tables="row")
    process = start(tmp_path, text, tables="row")
    while steps_done(tmp_path) < 12 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it was over before step 12"
    with pytest.raises(ConfigError, match=r'optim\.tables was "row" and is "lazy"'):
        main(tmp_path, text, STEPS, slow_write=0.0, tables="lazy")
    finish(start(tmp_path, text, tables="row"))
    compare(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_many_times(tmp_path: Path, text: Path, whole: Path, seed: int) -> None:
    """At random moments: while starting, in a step, in validation, between row and checkpoint, while a checkpoint is half written."""
    moment, kills = random.Random(seed), 0
    while kills < 12:
        process = start(tmp_path, text, slow_write=0.1)
        before = steps_done(tmp_path)
        while steps_done(tmp_path) == before and process.poll() is None:
            time.sleep(0.002)  # it has begun
        time.sleep(moment.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == 0:
            break
        kills += 1
    assert kills >= 3
    finish(start(tmp_path, text))
    compare(tmp_path, whole)
    assert not list((tmp_path / "checkpoints").glob(".*"))  # what was half written is swept away


@pytest.mark.slow
def test_killed_while_writing(tmp_path: Path, text: Path, whole: Path) -> None:
    """Four times, each time with half a checkpoint on disk: the first one of all, and later ones beside whole ones."""
    from memarch.callbacks import latest

    folder = tmp_path / "checkpoints"
    for known in (0, 0, 1, 2):
        process = start(tmp_path, text, slow_write=0.5)
        while len(list(folder.glob("step-*"))) < known or not (begun := list(folder.glob(f".step-*.{process.pid}.tmp"))) or not begun[0].stat().st_size:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert list(folder.glob(f".step-*.{process.pid}.tmp"))
        assert (latest(tmp_path) is None) == (known == 0)
    finish(start(tmp_path, text))
    compare(tmp_path, whole)
    assert not list(folder.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(tmp_path: Path, text: Path, whole: Path, number: int, status: int) -> None:
    process = start(tmp_path, text)
    while steps_done(tmp_path) < 7:
        time.sleep(0.002)
    process.send_signal(number)
    assert "goes on from step-" in finish(process, status)
    finish(start(tmp_path, text))
    compare(tmp_path, whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
