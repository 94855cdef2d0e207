"""What a user sees: a bar on a terminal, plain lines in a file, nothing from other processes."""

import os
import pty
import re
import select
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from memarch.callbacks import Bar, Metrics
from memarch.callbacks.progress import clock, short


class Toy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.map(batch).square().mean()
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": torch.tensor(0.5)})
        return loss

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.log_dict({"val/loss": self.map(batch).square().mean(), "val/accuracy": torch.tensor(0.25)})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(tmp_path: Path, steps: int = 60, bar: Bar | None = None, task: LightningModule | None = None, **more: Any) -> None:
    data = DataLoader(torch.randn(400, 4), batch_size=2)
    plain: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
    }
    plain |= {"max_steps": steps, "val_check_interval": 25, "limit_val_batches": 2, "default_root_dir": tmp_path} | more
    Trainer(callbacks=[Metrics(tmp_path, flops=False), bar or Bar()], **plain).fit(task or Toy(), data, data)


def test_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    trained = [line for line in lines if "val" not in line]
    assert re.fullmatch(r"step  1/60  loss [\d.]+  accuracy 0\.500  8 tokens", trained[0])
    assert re.fullmatch(r"step 30/60  loss [\d.]+  accuracy 0\.500  240 tokens  \S+/s  ETA 0:\d\d", trained[10])
    assert re.search(r"step 60/60  .*ETA 0:00", trained[-1])
    assert 18 <= len(trained) <= 23
    assert [line.split("  (")[0] for line in lines if "val" in line] == [f"step {n}/60  val loss {v}  val accuracy 0.250" for n, v in vals(lines)]
    assert not any(ord(letter) < 32 for line in lines for letter in line)


def vals(lines: list[str]) -> list[tuple[int, str]]:
    found = [(int(m[1]), m[2]) for line in lines if (m := re.match(r"step (\d+)/60  val loss (\S+)", line))]
    assert [step for step, _ in found] == [25, 50]
    return found


def test_lines_are_of_steps_that_are_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Between them the task logs nothing, and a line would show the loss of another step."""
    fit(tmp_path, log_every_n_steps=10, limit_val_batches=0)
    assert [int(line.split("/")[0].split()[1]) for line in capsys.readouterr().out.splitlines()] == [1, 10, 20, 30, 40, 50, 60]


def test_lines_come_by_time_where_the_end_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("memarch.callbacks.progress.time.monotonic", lambda: now[0])

    class Slow(Toy):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            now[0] += 4.0
            return super().training_step(batch, index)

    fit(tmp_path, steps=-1, task=Slow(), max_epochs=1, limit_train_batches=10, limit_val_batches=0, val_check_interval=None)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in told] == ["1", "4", "7", "10"]
    assert "ETA" not in told[-1]


def test_a_validation_alone_has_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(callbacks=[Bar(), Metrics(tmp_path)], logger=False, enable_checkpointing=False, accelerator="cpu", limit_val_batches=2)
    trainer.validate(Toy(), DataLoader(torch.randn(8, 4), batch_size=2), verbose=False)
    assert re.fullmatch(r"val loss \S+  val accuracy 0\.250  \(\d+\.\d s\)\n", capsys.readouterr().out)
    assert not (tmp_path / "metrics.csv").exists()


def test_other_processes_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    fit(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    """A child on a terminal of its own, 100 columns wide."""
    child, screen = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, __file__, str(tmp_path)], {**os.environ, "TERM": "xterm", "COLUMNS": "100", "OMP_NUM_THREADS": "1"})
    seen = b""
    while select.select([screen], [], [], 60)[0]:
        try:
            piece = os.read(screen, 4096)
        except OSError:  # the child has gone
            break
        seen += piece
        if not piece:
            break
    assert os.waitpid(child, 0)[1] == 0, seen.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    drawn = [line for line in re.split(r"[\r\n]+", text) if "━" in line]
    assert re.match(r"step 60/60 ━+ loss \S+  accuracy 0.500  480 tokens  \S+/s  ETA 0:00 *$", drawn[-1]), drawn[-1]
    assert len(drawn) < 20  # it is not redrawn every step
    assert re.search(r"step 25/60  val loss \S+  val accuracy 0.250  \(\d+\.\d s\)", text)
    assert "\x1b[?25h" in seen.decode()  # the cursor is given back


def test_numbers_are_short() -> None:
    assert [short(n) for n in (0, 512, 999, 1234, 999_600, 1_234_567, 12_345_678_901)] == ["0", "512", "999", "1.23k", "1M", "1.23M", "12.3G"]
    assert [clock(s) for s in (0, 59.6, 3725)] == ["0:00", "1:00", "1:02:05"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]))
