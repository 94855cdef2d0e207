"""The command: what can be said on it, what it says back, and what it leaves in the run's folder."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from memarch import from_pretrained
from memarch.config_file import read, shipped
from memarch.training import main

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "model": {
        "vocab_size": 32,
        "dim": 16,
        "layers": 2,
        "pattern": "GW",
        "parts": {
            "G": {"mixer": {"kind": "gated_delta", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 32}},
            "W": {"mixer": {"kind": "attention", "heads": 2, "window": 8, "positions": "none", "conv": 4}},
        },
    },
    "data": {"train": {"kind": "mqar", "settings": [[16, 4]], "vocab_size": 32}, "batch_size": 4, "val_batches": 2},
    "optim": {"lr": 1e-2, "warmup": 2},
    "run": {"flops": False, "bar": False},
    "trainer": {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1, "accelerator": "cpu"},
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The path of a small config; runs go beside it."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recall" / "tiny.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(TINY))
    return str(file)


def said(capsys, *words):
    """What is printed as the resolved config."""
    with pytest.raises(SystemExit) as done:
        main(["fit", *words, "--print_config"])
    assert done.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def rows(folder):
    return list(csv.DictReader((Path(folder) / "metrics.csv").read_text().splitlines()))


def refused(capsys, *words):
    with pytest.raises(SystemExit) as done:
        main(list(words))
    told = capsys.readouterr().err
    assert done.value.code == 2 and "Traceback" not in told
    assert told.startswith("error: ") and told.count("\n") == 1, f"not one line: {told}"
    return told


# ------------------------------------------------------------------------------------------------ a run


def test_a_run_leaves_a_folder_that_says_everything(tiny):
    run = main(["fit", "--config", tiny])
    assert run.folder.parent == Path("runs/recall-tiny")
    assert {file.name for file in run.folder.iterdir()} == {"config.json", "config.yaml", "versions.json", "metrics.csv", "checkpoints", "export"}
    config = json.loads((run.folder / "config.json").read_text())
    assert config == yaml.safe_load((run.folder / "config.yaml").read_text()) == run.config
    assert config["model"]["parts"]["G"]["mixer"]["decay"] == [0.0, 16.0], "defaults are written out"
    assert {"python", "torch", "lightning", "git"} <= set(json.loads((run.folder / "versions.json").read_text()))
    written = rows(run.folder)
    assert [row["step"] for row in written] == ["1", "2", "3", "4"] and written[-1]["val/accuracy"]
    assert run.metrics["val/loss"] == pytest.approx(float(written[-1]["val/loss"]))
    loaded = from_pretrained(run.folder / "export")
    tokens = torch.arange(16)[None]
    assert torch.equal(loaded(tokens).logits, run.task.model.eval()(tokens).logits)
    assert "memarch train fit" in (run.folder / "export" / "README.md").read_text()


def test_a_resolved_config_is_a_config(tiny):
    first = main(["fit", "--config", tiny, "--run.export", "false"])
    again = main(["fit", "--config", str(first.folder / "config.yaml"), "--run.name", "again"])
    assert again.folder.parent.name == "again", "a new run, not the old one gone on"
    assert {k: v for k, v in again.config.items() if k != "run"} == {k: v for k, v in first.config.items() if k != "run"}
    for a, b in zip(first.task.parameters(), again.task.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resuming_goes_on_exactly(tiny):
    whole = main(["fit", "--config", tiny, "--run.export", "false"])

    class Killed(Exception):
        pass

    def build(config, seed):
        from memarch import LM

        model = LM(config, seed=seed)
        steps = []

        def die(module, args):
            steps.append(module.training)
            if sum(steps) == 4:
                raise Killed

        model.core.register_forward_pre_hook(die)
        return model

    with pytest.raises(Killed):
        main(["fit", "--config", tiny, "--run.folder", "stopped", "--run.save_every", "2", "--run.export", "false"], build=build)
    assert [file.name for file in Path("stopped/checkpoints").iterdir()] == ["step-00000002.ckpt"]
    again = main(["fit", "--resume", "stopped"])
    assert again.folder == Path("stopped")
    for a, b in zip(whole.task.parameters(), again.task.parameters(), strict=True):
        assert torch.equal(a, b)


def test_validate(tiny, capsys):
    run = main(["fit", "--config", tiny, "--run.export", "false"])
    capsys.readouterr()
    again = main(["validate", "--resume", str(run.folder)])
    assert again.metrics["val/loss"] == pytest.approx(run.metrics["val/loss"])
    assert "val/loss" in capsys.readouterr().out
    assert "validate needs trained weights" in refused(capsys, "validate", "--config", tiny)


def test_it_stops_when_it_is_good_enough(tiny):
    run = main(["fit", "--config", tiny, "--run.stop_at", "1e-9", "--trainer.max_steps", "400", "--run.export", "false", "--optim.warmup", "1"])
    assert run.metrics["val/accuracy"] > 0 and run.trainer.global_step < 400


def test_its_own_model(tiny):
    made = []

    def build(config, seed):
        from memarch import LM

        made.append((config, seed))
        return LM(config, seed=seed)

    main(["--config", tiny, "--seed", "7", "--run.export", "false"], build=build)
    assert made[0][0].dim == 16 and made[0][1] == 7


# ------------------------------------------------------------------------------------------------ what can be said


def test_every_place_is_reached_from_the_command_line(tiny, capsys):
    found = said(
        capsys, "--config", tiny, "--model.parts.G.mixer.heads", "4", "--model.parts.W.mixer.window=5", "--optim.lr", "1e-3", "--data.batch_size", "8",
        "--data.train.settings", "[[24, 3]]", "--data.val.kind", "mqar", "--trainer.max_steps", "500", "--trainer.precision", "bf16-mixed",
        "--task.carry", "true", "--run.stop_at", "0.9", "--model.pools", "{facts: {rows: 9}}", "--optim.betas", "[0.8, 0.9]",
    )  # fmt: skip
    assert found["model"]["parts"]["G"]["mixer"]["heads"] == 4 and found["model"]["parts"]["W"]["mixer"]["window"] == 5
    assert found["optim"]["lr"] == 1e-3 and found["optim"]["betas"] == [0.8, 0.9] and found["optim"]["warmup"] == 2
    assert found["data"]["batch_size"] == 8 and found["data"]["train"]["settings"] == [[24, 3]] and found["data"]["val"]["kind"] == "mqar"
    assert found["trainer"]["max_steps"] == 500 and found["trainer"]["precision"] == "bf16-mixed"
    assert found["task"]["carry"] is True and found["run"]["stop_at"] == 0.9 and found["model"]["pools"]["facts"]["rows"] == 9


def test_another_kind_replaces_its_node(tiny, capsys):
    found = said(capsys, "--config", tiny, "--model.parts.G.mixer.kind", "attention", "--model.parts.G.mixer.heads", "8", "--data.train.kind", "copy")
    assert found["model"]["parts"]["G"]["mixer"]["kind"] == "attention" and found["model"]["parts"]["G"]["mixer"]["heads"] == 8
    assert found["data"]["train"] == {"kind": "copy", "length": 256, "copies": 16, "vocab_size": 16}


def test_a_preset_replaces_the_model_and_flags_change_it(tiny, capsys):
    found = said(capsys, "--preset", "pkm-tiny", "--config", tiny, "--model.parts.W.ffn.topk", "4")
    assert found["model"]["parts"]["W"]["ffn"]["topk"] == 4 and found["model"]["dim"] == 64 and found["optim"]["lr"] == 1e-2


def test_a_file_may_name_a_preset_and_change_it(tiny, capsys):
    Path("p.yaml").write_text("preset: hybrid-tiny\nmodel: {vocab_size: 512, parts.W.mixer.window: 4}\ndata: {train: {kind: mqar}}\nseed: 5\n")
    found = said(capsys, "--config", "p.yaml")
    assert found["model"]["vocab_size"] == 512 and found["model"]["parts"]["W"]["mixer"]["window"] == 4 and found["model"]["pattern"] == "MW"
    assert found["task"]["seed"] == found["data"]["seed"] == found["seed_everything"] == 5


def test_later_files_change_earlier_ones(tiny, capsys):
    Path("more.yaml").write_text("optim: {lr: 3e-4}\ntrainer: {max_steps: 9}\ndata: {train: {vocab_size: 20}}\n")
    found = said(capsys, "--config", tiny, "--config", "more.yaml", "--seed", "3", "--data.seed", "4")
    assert found["optim"]["lr"] == 3e-4 and found["optim"]["warmup"] == 2 and found["trainer"]["max_steps"] == 9
    assert found["data"]["train"]["vocab_size"] == 20 and found["data"]["train"]["settings"] == [[16, 4]]
    assert (found["task"]["seed"], found["data"]["seed"]) == (3, 4), "one seed for all, then another for one"


def test_no_argument_is_the_default_run(capsys):
    found = said(capsys)
    default = read("configs/recall/default.yaml")
    assert found["model"]["pattern"] == default["model"]["pattern"] and found["trainer"]["max_steps"] == default["trainer"]["max_steps"]


def test_configs_are_found_without_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read("configs/recall/default.yaml") == yaml.safe_load((shipped() / "recall" / "default.yaml").read_text()) | read("configs/recall/default.yaml")


@pytest.mark.parametrize(
    ("written", "value"), [("5e-3", 5e-3), ("NO", "NO"), ("true", True), ("null", None), ("[1, 2]", [1, 2]), ("-3", -3), ("1e2", 100.0), ("07", 7)]
)
def test_words_of_yaml(written, value, tmp_path):
    (tmp_path / "a.yaml").write_text(f"a: {written}\n")
    assert read(str(tmp_path / "a.yaml")) == {"a": value}


def test_help(capsys):
    with pytest.raises(SystemExit) as done:
        main(["fit", "--help"])
    told = capsys.readouterr().out
    assert done.value.code == 0
    for option in ("--model.pattern", "--optim.lr", "--data.batch_size", "--trainer.max_steps", "--task.carry", "--run.stop_at", "--preset", "--resume"):
        assert option in told
    assert "fit" in help_of(capsys) and "validate" in help_of(capsys)


def help_of(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ mistakes

# what is said: in it the thing, what is allowed, what to do
MISTAKES = [
    (["train"], ["'train'", "fit, validate"]),
    (["--config", "none.yaml"], ["none.yaml does not exist", "configs/recall/default.yaml"]),
    (["--config", "configs/recall/hybrd.yaml"], ["Did you mean 'configs/recall/hybrid.yaml'"]),
    (["--config", "."], ["is a folder"]),
    (["--config"], ["--config needs a value"]),
    (["--config", "tab.yaml"], ["tab.yaml, line 2", "a tab", "spaces"]),
    (["--config", "open.yaml"], ["open.yaml", "not YAML"]),
    (["--config", "list.yaml"], ["expected a mapping"]),
    (["--config", "modl.yaml"], ["modl.yaml", "'modl'", "Did you mean 'model'"]),
    (["--config", "step.yaml"], ["step.yaml", "'trainer.max_step'", "Did you mean 'trainer.max_steps'"]),
    (["--config", "many.yaml"], ["trainer.max_steps: expected int, got 'many'"]),
    (["--config", "only.yaml"], ["nothing to train on", "--data.train.kind", "mqar"]),
    (["--config", "nomodel.yaml"], ["no model", "--preset"]),
    (["--config", "path.yaml"], ["'kind' is missing", "gated_delta"]),
    (["--config", "tiny.yaml", "--model.parts.G.mixer.hads", "4"], ["model.parts.G.mixer", "'hads'", "Did you mean 'heads'"]),
    (["--config", "tiny.yaml", "--model.parts.G.mixer.kind", "gatd_delta"], ["Did you mean 'gated_delta'"]),
    (["--config", "tiny.yaml", "--model.parts.X.mixer.heads", "4"], ["'X'", "Allowed: G, W"]),
    (["--config", "tiny.yaml", "--model.dim", "wide"], ["model.dim: expected int, got 'wide'"]),
    (["--config", "tiny.yaml", "--model.dim"], ["--model.dim needs a value"]),
    (["--config", "tiny.yaml", "--model.layers", "3"], ["pattern 'GW'", "layers is 3"]),
    (["--config", "tiny.yaml", "--model.parts.G.mixer.heads", "3"], ["heads 3", "divide dim 16"]),
    (["--config", "tiny.yaml", "--preset", "hybrid-tny"], ["Did you mean 'hybrid-tiny'"]),
    (["--config", "tiny.yaml", "--lr", "3"], ["unknown argument 'lr'", "Did you mean 'optim.lr'"]),
    (["--config", "tiny.yaml", "--optim.lrr", "3"], ["'lrr'", "Did you mean 'lr'"]),
    (["--config", "tiny.yaml", "--optim.lr", "-3"], ["lr must be above 0"]),
    (["--config", "tiny.yaml", "--data.train.kind", "mqr"], ["Did you mean 'mqar'"]),
    (["--config", "tiny.yaml", "--data.train.vocab_size", "64"], ["64 token ids", "--model.vocab_size 64"]),
    (["--config", "tiny.yaml", "--data.batchsize", "8"], ["Did you mean 'data.batch_size'"]),
    (["--config", "tiny.yaml", "--data.batch_size", "x"], ["data.batch_size: expected int, got 'x'"]),
    (["--config", "tiny.yaml", "--trainer.max_step", "8"], ["Did you mean 'trainer.max_steps'", "trainer.precision"]),
    (["--config", "tiny.yaml", "--trainer.precision", "bf17"], ["trainer.precision", "bf16-mixed", "got 'bf17'"]),
    (["--config", "tiny.yaml", "--trainer.accelerator", "quantum"], ["quantum", "cpu"]),
    (["--config", "tiny.yaml", "--trainer.gradient_clip_val", "1.0"], ["optim.clip"]),
    (["--config", "tiny.yaml", "--trainer.max_steps", "-1"], ["cosine", "trainer.max_steps"]),
    (["--config", "tiny.yaml", "--trainer.val_check_interval", "0.5"], ["val_check_interval"]),
    (["--config", "tiny.yaml", "--task.carry", "perhaps"], ["task.carry: expected bool, got 'perhaps'"]),
    (["--config", "tiny.yaml", "--run.stop_at", "99"], ["run.stop_at", "at most 1"]),
    (["--config", "tiny.yaml", "--run.logger", "board"], ["run.logger", "tensorboard", "got 'board'"]),
    (["--config", "tiny.yaml", "--seed", "x"], ["seed must be a whole number"]),
    (["--resume", "nowhere"], ["--resume nowhere", "not the folder of a run"]),
]
FILES = {
    "tab.yaml": "model:\n\tdim: 3\n",
    "open.yaml": "model: {dim: 3\n",
    "list.yaml": "- a\n",
    "modl.yaml": "modl: {dim: 3}\n",
    "step.yaml": "trainer: {max_step: 3}\n",
    "many.yaml": "preset: hybrid-tiny\ndata: {train: {kind: mqar}}\ntrainer: {max_steps: many}\n",
    "only.yaml": "preset: hybrid-tiny\n",
    "nomodel.yaml": "data: {train: {kind: mqar}}\n",
    "path.yaml": "model: {parts: {A: {mixer: {class_path: os.system}}}}\n",
    "tiny.yaml": yaml.safe_dump(TINY),
}


@pytest.mark.parametrize(("words", "parts"), MISTAKES, ids=lambda x: " ".join(x) if x and x[0].startswith("-") else None)
def test_a_mistake_is_one_sentence(words, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    told = refused(capsys, *words)
    for part in parts:
        assert part in told, f"{part!r} is not in: {told}"


def test_debug_shows_where(tiny):
    with pytest.raises(ValueError, match="hads"):
        main(["--config", tiny, "--model.parts.G.mixer.hads", "3", "--debug"])


# ------------------------------------------------------------------------------------------------ several processes


def test_two_processes_train_what_one_does(tiny, tmp_path):
    """The command starts them itself; both see halves of the same global batches. float64, so that only the order of sums differs."""
    same = ["--config", tiny, "--trainer.precision", "64-true", "--run.export", "false", "--trainer.accumulate_grad_batches", "2"]
    one = main([*same, "--run.folder", "one"])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [*same, "--run.folder", "two", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "fit", *words], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    saved = torch.load("two/checkpoints/step-00000004.ckpt", weights_only=True)["state_dict"]
    for name, p in one.task.state_dict().items():
        torch.testing.assert_close(p, saved[name], rtol=1e-9, atol=1e-12)
    for a, b in zip(rows("one"), rows("two"), strict=True):
        for name in ("train/loss", "train/accuracy", "grad_norm", "val/loss", "val/accuracy"):
            assert a[name] == b[name] == "" or float(a[name]) == pytest.approx(float(b[name]), rel=1e-5), name
    assert sorted(file.name for file in Path("two").iterdir()) == ["checkpoints", "config.json", "config.yaml", "metrics.csv", "versions.json"]
