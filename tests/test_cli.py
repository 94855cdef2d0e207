"""The command line: what it prints, what it refuses in one line, and that it starts without the heavy libraries."""

import argparse
import io
import json
import re
import subprocess
import sys
import time

import pytest
import torch

from memarch import cli, create_model, list_models
from memarch.commands import doctor, models, screen


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "hybrid"
    create_model("hybrid-tiny").save_pretrained(folder)
    return folder


def call(capsys, *words):
    status = cli.main([str(word) for word in words])
    out = capsys.readouterr()
    return status, out.out, out.err


# ------------------------------------------------------------------------------------------------ the frame


def test_importing_the_command_line_is_light():
    code = "import sys, memarch.cli; print([m for m in ('lightning', 'triton', 'transformers', 'matplotlib', 'rich', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_command_is_the_help(capsys):
    status, out, _ = call(capsys)
    assert status == 0 and all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "train"])
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0 and f"memarch {name}" in capsys.readouterr().out


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(ValueError, match="no model matches"):
        cli.main(["--debug", "list", "nothing-like-it"])


@pytest.mark.parametrize(
    ("error", "status", "said"), [(KeyboardInterrupt(), 130, ""), (BrokenPipeError(), 0, ""), (ImportError("no rich"), 2, "memarch: no rich\n")]
)
def test_how_a_command_can_end(error, status, said, capsys, monkeypatch):
    def run(args):
        raise error

    monkeypatch.setattr(models, "run", run)
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    assert cli.main(["list"]) == status
    assert capsys.readouterr().err == said


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(models, "run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["list"])


def test_train_gets_the_words_behind_it(monkeypatch):
    given = []
    monkeypatch.setitem(sys.modules, "memarch.training", argparse.Namespace(main=given.append))
    monkeypatch.setattr("memarch.training", sys.modules["memarch.training"], raising=False)
    assert cli.main(["train", "fit", "--config", "x.yaml", "--help"]) == 0
    assert cli.main(["--debug", "train", "fit"]) == 0
    assert given == [["fit", "--config", "x.yaml", "--help"], ["fit", "--debug"]]


# ------------------------------------------------------------------------------------------------ mistakes


def files(folder):
    """Every file the table of mistakes needs."""
    (folder / "empty").mkdir()
    create_model("hybrid-tiny").save_pretrained(folder / "weightless")
    (folder / "weightless" / "model.safetensors").unlink()
    for name, text in {
        "tab.yaml": "base: configs/recall/default.yaml\nset:\n\ta: {}\n",
        "key.yaml": "base: configs/recall/default.yaml\ngrids: {optim.lr: [1]}\n",
        "grid.yaml": "base: configs/recall/default.yaml\ngrid: {model.parts.Q.mixer.heads: [1]}\n",
        "leaf.yaml": "base: configs/recall/default.yaml\ngrid: {optim.learning_rate: [1]}\n",
        "nobase.yaml": "base: nowhere.yaml\n",
    }.items():
        (folder / name).write_text(text)
    return folder


MISTAKES = {
    "unknown command": ("evalute x", r"unknown command 'evalute'. Did you mean 'evaluate'\?"),
    "unknown option": ("list --jsn", r"unrecognized arguments: --jsn"),
    "no model of this name": ("list hybird-tiny", r"no model matches 'hybird-tiny'. Did you mean 'hybrid-tiny'\?"),
    "a preset has no weights": ("evaluate hybrid-tiny --task mqar", r"'hybrid-tiny' is a preset, a size without weights"),
    "unknown model name": ("evaluate hybird-tiny --task mqar", r"hybird-tiny .*neither a folder here nor"),
    "missing folder": ("evaluate {at}/nowhere --task mqar", r"there is no folder .*nowhere"),
    "folder without a model": ("generate {at}/empty x", r"has no config.json, so it is not an export of memarch"),
    "folder without weights": ("evaluate {at}/weightless --task mqar", r"has no weights: neither model.safetensors nor"),
    "unknown task": ("evaluate {model} --task mqr", r"unknown task 'mqr'. Did you mean 'mqar'\?"),
    "task as JSON": ("evaluate {model} --task {{'kind':'mqar'}}", r"--task: not JSON .*double quotes"),
    "option of another task": ("evaluate {model} --task mqar --copies 3", r"--copies is not for mqar, which takes --examples, --filler"),
    "impossible pairs": ("evaluate {model} --task mqar --lengths 8 --pairs 16", r"no cell of the grid is possible. length 8, pairs 16"),
    "odd length": ("evaluate {model} --task mqar --lengths 63 --pairs 4", r"length must be even"),
    "vocabulary": ("evaluate {model} --task mqar --vocab-size 512", r"the model knows 256 tokens"),
    "device": ("evaluate {model} --task mqar --device gpu7", r"--device gpu7: no such device"),
    "no text": ("evaluate {model} --task text --path {at}/nowhere.txt", r"no such file or folder"),
    "sampling": ("generate {model} x --top-p 2", r"top_p is a probability"),
    "empty prompt": ("generate {model} {empty}", r"the prompt is empty"),
    "prepare nothing": ("prepare {at}/nowhere --out {at}/out", r"nowhere: no such file or folder"),
    "ablation: missing file": ("ablate {at}/nowhere.yaml", r"config file .*nowhere.yaml does not exist"),
    "ablation: tab": ("ablate {at}/tab.yaml", r"tab.yaml, line 3: a tab; YAML wants spaces"),
    "ablation: unknown key": ("ablate {at}/key.yaml", r"unknown key 'grids'. Did you mean 'grid'\?"),
    "ablation: path that names nothing": ("ablate {at}/grid.yaml", r"path 'model.parts.Q.mixer.heads' names nothing.*unknown key 'Q'"),
    "ablation: leaf that names nothing": ("ablate {at}/leaf.yaml", r"unknown key 'learning_rate'"),
    "ablation: missing base": ("ablate {at}/nobase.yaml", r"nowhere.yaml does not exist"),
    "ablation: processes": ("ablate {at}/key.yaml --processes x", r"argument --processes: invalid int value: 'x'"),
}


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return files(tmp_path_factory.mktemp("mistakes"))


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_status_2(name, at, exported, capsys):
    words, message = MISTAKES[name]
    status, out, err = call(capsys, *[word.format(at=at, model=exported, empty="") for word in words.split()])
    assert status == 2 and out == ""
    assert err.startswith("memarch: ") and err.count("\n") == 1
    assert re.search(message, err), err


# ------------------------------------------------------------------------------------------------ list


def test_list_knows_every_preset_and_is_fast(capsys):
    models.describe("gated-delta-tiny")  # the first custom operator imports what all of them need
    began = time.process_time()
    status, out, _ = call(capsys, "list", "--json", "--training")
    assert time.process_time() - began < 10
    rows = {row["name"]: row for row in json.loads(out)}
    assert status == 0 and list(rows) == list_models()
    tiny = create_model("pkm-tiny")
    assert rows["pkm-tiny"]["parameters"] == sum(p.numel() for p in tiny.parameters())
    assert rows["pkm-tiny"]["active_parameters"] < rows["pkm-tiny"]["parameters"]
    assert rows["pkm-tiny"]["optimizer_bytes"] == 8 * rows["pkm-tiny"]["parameters"] > rows["pkm-tiny"]["optimizer_bytes_row"]
    assert rows["transformer-tiny"]["bytes_per_token"] == 2 * 2 * 64 * 4  # layers x (k, v) x width x fp32
    assert rows["gated-delta-tiny"]["bytes_per_token"] == 0


def test_list_takes_a_part_of_a_name_or_a_pattern(capsys):
    _, out, _ = call(capsys, "list", "window")
    assert "window-tiny" in out and "pkm-tiny" not in out
    _, out, _ = call(capsys, "list", "*-tiny")
    assert "grows: 1024 B/token" in out and "transformer-160m" not in out


def test_sizes_in_words():
    assert [screen.count(n) for n in (0, 999, 1234, 98_624, 123_587_328, 999_999)] == ["0", "999", "1.23k", "98.6k", "124M", "1.00M"]
    assert [screen.size(n) for n in (16, 20488, 2**30)] == ["16 B", "20.0 KiB", "1.00 GiB"]


# ------------------------------------------------------------------------------------------------ doctor


def test_doctor_says_what_runs_and_why_not_the_rest(capsys):
    from memarch.kernels import OPS

    status, out, _ = call(capsys, "doctor")
    assert status == 0 and all(op in out for op in OPS) and torch.__version__ in out and "reference" in out
    status, out, _ = call(capsys, "doctor", "--json")
    found = json.loads(out)
    assert {row["op"] for row in found["ops"]} == set(OPS) and {row["dtype"] for row in found["ops"]} >= {"float32", "bfloat16"}
    assert all(row["runs"] and row["reason"] for row in found["ops"])
    assert found["optional"]["flash-attn"]["problem"]


def test_doctor_names_a_known_bad_pair(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "gpus", lambda: [{"name": "H200", "capability": [9, 0], "bytes": 2**37}])
    monkeypatch.setattr(doctor, "version", lambda name: "3.6.0" if name == "triton" else None)
    status, out, _ = call(capsys, "doctor")
    assert status == 0 and "known bad: triton 3.6.0 on Hopper" in out
    monkeypatch.setattr(doctor, "version", lambda name: "3.7.1" if name == "triton" else None)
    assert "known bad" not in call(capsys, "doctor")[1]


def test_warmup_says_what_is_there_and_builds_it(capsys, monkeypatch, tmp_path):
    from memarch.kernels import native

    monkeypatch.setenv("MEMARCH_CACHE", str(tmp_path))
    native._state.cache_clear()
    assert call(capsys, "warmup", "--print")[:2] == (0, "C++ kernels: not built: run memarch warmup\n")
    monkeypatch.setattr(native, "compiler", lambda: None)
    native._state.cache_clear()
    status, out, _ = call(capsys, "warmup")
    assert status == 1 and "no C++ compiler" in out and "g++" in out
    native._state.cache_clear()


def test_doctor_names_a_broken_build(monkeypatch, tmp_path):
    (tmp_path / "mamba_ssm.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "version", lambda name: "2.2.4")
    assert doctor.problem("mamba-ssm", "mamba_ssm") == "installed, but does not import: ImportError: undefined symbol: _ZN3c10"


# ------------------------------------------------------------------------------------------------ prepare, generate, evaluate


def test_prepare_writes_shards(tmp_path, capsys):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 50)
    status, out, _ = call(capsys, "prepare", *sorted(tmp_path.glob("*.txt")), "--out", tmp_path / "shards", "--validation", "0.3")
    assert status == 0 and (tmp_path / "shards" / "index.json").is_file() and "vocabulary 256" in out


def test_generate_says_the_prompt_and_what_follows(exported, capsys, monkeypatch):
    status, out, _ = call(capsys, "generate", exported, "The ", "--tokens", "8", "--seed", "1")
    assert status == 0 and out.startswith("The ") and len(out) > len("The \n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("The "))
    assert call(capsys, "generate", exported, "--tokens", "8", "--seed", "1")[1] == out


def test_generate_ends_at_a_stop_token(exported, capsys):
    """Greedy, so that both calls say the same until one is told to stop at the first new byte."""
    whole = call(capsys, "generate", exported, "The ", "--tokens", "8", "--temperature", "0")[1]
    first = whole.removeprefix("The ").encode()[0]
    short = call(capsys, "generate", exported, "The ", "--tokens", "8", "--temperature", "0", "--stop", str(first))[1]
    assert len(short) <= len("The ") + 2 < len(whole)


def test_generate_with_a_tokenizer(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["the memory of the model"], tokenizers.trainers.BpeTrainer(initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    made.save(str(tmp_path / "tokenizer.json"))
    create_model("hybrid-tiny", vocab_size=made.get_vocab_size()).save_pretrained(tmp_path / "model")
    status, out, _ = call(capsys, "generate", tmp_path / "model", "the model", "--tokenizer", tmp_path / "tokenizer.json", "--tokens", "6")
    assert status == 0 and out.startswith("the model")
    status, _, err = call(capsys, "generate", tmp_path / "model", "the model")
    assert status == 2 and "name its tokenizer.json with --tokenizer" in err


def test_evaluate_prints_and_writes(exported, capsys):
    words = ["--task", "mqar", "--lengths", "16", "32", "--pairs", "4", "8", "--examples", "4", "--filler", "zero", "--dtype", "float64"]
    status, out, err = call(capsys, "evaluate", exported, *words)
    assert status == 0 and "mqar: accuracy" in out and "skipped length 16, pairs 8" in out and err == ""
    written = json.loads((exported / "evaluation" / "mqar.json").read_text())
    assert written["about"]["task"]["filler"] == "zero" and written["about"]["dtype"] == "float64" and len(written["rows"]) == 3
    assert (exported / "evaluation" / "mqar.png").is_file()


def test_evaluate_takes_the_rules_of_the_run_that_trained_the_model(tmp_path, capsys):
    create_model("hybrid-tiny").save_pretrained(tmp_path / "run" / "export")
    train = {"kind": "mqar", "settings": [[32, 4]], "vocab_size": 128, "filler": "zero", "power": 0.5}
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": {"train": train}}))
    for model in (tmp_path / "run", tmp_path / "run" / "export"):
        status, out, _ = call(capsys, "evaluate", model, "--task", "mqar", "--lengths", "32", "--pairs", "4", "--examples", "2", "--power", "1")
        assert status == 0 and "As in training: vocab_size 128, filler zero." in out
    task = json.loads((tmp_path / "run" / "export" / "evaluation" / "mqar.json").read_text())["about"]["task"]
    assert (task["vocab_size"], task["filler"], task["power"]) == (128, "zero", 1.0)


def test_evaluate_takes_a_whole_task(exported, tmp_path, capsys):
    task = {"kind": "needle", "lengths": [32], "depths": [0.0, 1.0], "examples": 2}
    status, out, _ = call(capsys, "evaluate", exported, "--task", json.dumps(task), "--out", tmp_path)
    assert status == 0 and "needle: accuracy" in out and (tmp_path / "needle.png").is_file()
