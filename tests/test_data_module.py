"""TokenData under Lightning: its command line, endless training, exact resume, a validation that never changes, several processes."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from memarch.config import decode
from memarch.data import DATA, MQAR, SPLITS, Copy, Needle, Text
from memarch.data.module import TokenData

TINY = MQAR(settings=((16, 2), (24, 4)), vocab_size=32)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
QUIET |= {"accelerator": "cpu", "devices": 1}

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LightningCLI's args", "ignore:.*litlogger")


class Watcher(LightningModule):
    """Trains one number and remembers what it was shown."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(scale))
        self.seen, self.held = [], []

    def training_step(self, batch, step):
        self.seen.append(batch.tokens.clone())
        return self.w * batch.tokens.float().mean()

    def validation_step(self, batch, step):
        self.held.append(batch.tokens.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


def first(loader, n):
    return [batch.tokens for batch in itertools.islice(loader, n)]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def cli(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    return LightningCLI(Watcher, TokenData, run=False, save_config_callback=None, trainer_defaults=QUIET, seed_everything_default=0).datamodule


def test_command_line_and_file(tmp_path, monkeypatch):
    data = cli(monkeypatch, "--data.train.kind", "mqar", "--data.train.vocab_size", "128", "--data.train.settings", "[[32, 2], [64, 4]]")
    assert data.train == data.val == MQAR(vocab_size=128, settings=((32, 2), (64, 4)))
    data = cli(
        monkeypatch,
        "--data.train.kind=text",
        "--data.train.carry=true",
        "--data.val.kind=needle",
        "--data.val.depth=0.5",
        "--data.workers=2",
    )
    assert (data.train, data.val, data.workers) == (Text(carry=True), Needle(depth=0.5), 2)
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  train: {kind: mqar, settings: [[32, 2]], vocab_size: 64}\n  val: {kind: copy, length: 40}\n  batch_size: 8\n")
    data = cli(monkeypatch, "--config", str(file))
    assert (data.train, data.val, data.batch_size) == (MQAR(settings=((32, 2),), vocab_size=64), Copy(length=40), 8)
    data = cli(monkeypatch, "--config", str(file), "--data.train.vocab_size", "128", "--data.val.copies", "3")
    assert (data.train, data.val) == (MQAR(settings=((32, 2),), vocab_size=128), Copy(length=40, copies=3))


@pytest.mark.parametrize("kind", DATA)
def test_one_more_field_keeps_the_kind_and_the_others(monkeypatch, tmp_path, kind):
    """All kinds have a length or a vocabulary size: a union that takes the first that fits would change the kind and forget the rest."""
    given = {
        "mqar": {"settings": [[32, 2]], "vocab_size": 64},
        "shards": {"path": "there"},
        "text": {"held_out": 0.1},
        "needle": {"needles": 3},
        "facts": {"facts": 512},
        "inertial": {"every": 5},
    }
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps({"data": {part: {"kind": kind, **given.get(kind, {"copies": 3})} for part in ("train", "val")}}))
    field = "vocab_size" if kind in ("mqar", "facts") else "length"
    data = cli(monkeypatch, "--config", str(file), f"--data.train.{field}=120", f"--data.val.{field}", "120")
    expected = dataclasses.replace(decode(DATA[kind], {"kind": kind, **given.get(kind, {"copies": 3})}), **{field: 120})
    assert data.train == data.val == expected


def test_a_printed_config_is_a_config(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli(
            monkeypatch,
            "--data.train.kind=copy",
            "--data.train.length=40",
            "--data.val.kind=mqar",
            "--data.val.settings=[[32, 2]]",
            "--print_config",
        )
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    data = cli(monkeypatch, "--config", str(tmp_path / "a.yaml"), "--data.train.copies=2")
    assert (data.train, data.val) == (Copy(length=40, copies=2), MQAR(settings=((32, 2),)))


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--data.train.vocab_size=127", "must be even"), ("--data.train.lenght=3", "lenght"), ("--data.train.kind=recall", "recall")],
)
def test_command_line_errors_name_the_field(monkeypatch, capsys, argument, message):
    with pytest.raises((SystemExit, ValueError)) as caught:
        cli(monkeypatch, "--data.train.kind=mqar", argument)
    assert message in str(caught.value) + capsys.readouterr().err


def test_a_run_resumes_where_it_stopped(tmp_path):
    def run(steps, start=0, checkpoint=None, save=None):
        data, model = TokenData(TINY, batch_size=4, val_batches=3, workers=0, seed=5), Watcher()
        data.start_step = start
        trainer = Trainer(**QUIET, max_steps=steps, val_check_interval=2, check_val_every_n_epoch=None, num_sanity_val_steps=0)
        trainer.fit(model, data, ckpt_path=checkpoint)
        if save:
            trainer.save_checkpoint(save)
        return model

    whole = run(6)
    assert equal(whole.seen, first(TokenData(TINY, batch_size=4, seed=5).train_dataloader(), 6))
    assert len(whole.held) == 9
    assert equal(whole.held[:3], whole.held[3:6])
    assert equal(whole.held[:3], whole.held[6:])
    start = run(3, save=tmp_path / "a.ckpt")
    rest = run(6, start=3, checkpoint=tmp_path / "a.ckpt")
    assert equal(start.seen + rest.seen, whole.seen)
    assert rest.w == whole.w


def test_accumulation_takes_one_micro_batch_per_step():
    data, model = TokenData(TINY, batch_size=4, val_batches=1), Watcher()
    Trainer(**QUIET, max_steps=2, accumulate_grad_batches=3, limit_val_batches=0).fit(model, data)
    assert equal(model.seen, first(TokenData(TINY, batch_size=4).train_dataloader(), 6))


def test_processes_see_their_share():
    whole = TokenData(TINY, batch_size=6, val_batches=2, seed=1)
    parts = [TokenData(TINY, batch_size=6, val_batches=2, seed=1) for _ in range(3)]
    for rank, part in enumerate(parts):
        part.trainer = SimpleNamespace(global_rank=rank, world_size=3)
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        together = [torch.cat(rows) for rows in zip(*(first(getattr(part, name)(), 2) for part in parts), strict=True)]
        assert equal(together, first(getattr(whole, name)(), 2))
    parts[0].trainer = SimpleNamespace(global_rank=0, world_size=4)
    with pytest.raises(ValueError, match=r"batch size 6 does not divide by 4 processes"):
        parts[0].train_dataloader()


def test_splits_differ_and_workers_do_not():
    data = TokenData(TINY, batch_size=4, val_batches=2, workers=2)
    seen = [first(getattr(data, f"{split}_dataloader")(), 2) for split in SPLITS]
    assert not equal(seen[0], seen[1])
    assert not equal(seen[1], seen[2])
    assert equal(seen[0], first(TokenData(TINY, batch_size=4).train_dataloader(), 2))
    assert len(list(data.val_dataloader())) == 2
    assert len(list(TokenData(TINY, val_batches=0).val_dataloader())) == 0


def test_loaders_leave_the_global_generator_alone():
    data = TokenData(TINY, batch_size=4, val_batches=2)
    before = torch.get_rng_state()
    first(data.train_dataloader(), 2), first(data.val_dataloader(), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_validation_takes_no_more_than_there_is(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 30)
    text = Text(path=str(tmp_path), length=50, held_out=0.2)
    data = TokenData(text, batch_size=4, val_batches=1000)
    batches = first(data.val_dataloader(), 10**6)
    assert 1 <= len(batches) < 30
    rows = [tuple(row) for batch in batches for row in batch.tolist()]
    assert len(set(rows)) == len(rows)
    assert data.vocab_size == 256


def test_bad_arguments_say_what_is_allowed():
    for arguments, message in [
        ({"batch_size": 0}, r"batch_size = 0: must be at least 1"),
        ({"val_batch_size": -1}, r"val_batch_size = -1"),
        ({"val_batches": -1}, r"val_batches = -1"),
        ({"workers": -1}, r"workers = -1"),
        ({"seed": -1}, r"seed = -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenData(TINY, **arguments)


def test_importing_data_is_light():
    heavy = {"lightning", "triton", "transformers", "tokenizers", "rich"}
    code = f"import sys, memarch.data; print({heavy} & {{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


TWO = """
import sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
from test_data_module import QUIET, TINY, TokenData, Trainer, Watcher
import torch.distributed as dist

class Saver(Watcher):
    def on_train_end(self):
        torch.save((self.seen, self.held), {out!r} + f"/{{self.global_rank}}.pt")
        dist.barrier()

if __name__ == "__main__":
    options = {{**QUIET, "devices": 2, "strategy": "ddp_spawn", "max_steps": 4, "val_check_interval": 4, "num_sanity_val_steps": 0}}
    trainer = Trainer(**options, check_val_every_n_epoch=None)
    trainer.fit(Saver(), TokenData(TINY, batch_size=6, val_batches=2, workers=1))
"""


@pytest.mark.slow
def test_two_real_processes(tmp_path):
    tests = Path(__file__).parent
    (tmp_path / "two.py").write_text(TWO.format(tests=str(tests), root=str(tests.parent), out=str(tmp_path)))
    subprocess.run([sys.executable, "two.py"], cwd=tmp_path, check=True, timeout=300)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = TokenData(TINY, batch_size=6, val_batches=2)
    for part, loader in enumerate((alone.train_dataloader(), alone.val_dataloader())):
        together = [torch.cat(rows) for rows in zip(*(seen[part] for seen in ranks), strict=True)]
        assert equal(together, first(loader, len(together)))
        assert len(together) == (4, 2)[part]
