"""What a user can get wrong, in one table: each is one clear error that names the thing, says what is allowed, and what to do.

What goes through the command line is one line on stderr and exit status 2; `--debug` shows the traceback."""

import json

import pytest
import torch

from memarch import LM, LMConfig, create_model, decode, from_pretrained
from memarch import state as states
from memarch.cli import main
from memarch.kernels.weighted_bag import weighted_bag
from memarch.layers import ChannelConfig

MIXER = {"kind": "gated_delta", "heads": 2}
BASE = {"vocab_size": 32, "dim": 16, "layers": 2, "parts": {"A": {"mixer": MIXER}}}


def model(**changes):
    return LM(decode(LMConfig, {**BASE, **changes}))


def layer(**mixer):
    return model(parts={"A": {"mixer": mixer}})


def tokens(*ids):
    return torch.tensor([list(ids)])


def layer_alone(**said):
    return decode(ChannelConfig, said).build(16)


def other_state(**changes):
    """A state that does not belong to `model()`."""
    return model(**changes)(tokens(1, 2)).state


PYTHON = {
    "unknown key": (lambda: model(dmi=3), ["'dmi'", "Did you mean 'dim'", "vocab_size"]),
    "unknown key deep inside": (lambda: layer(kind="gated_delta", haeds=2), ["parts.A.mixer", "'haeds'", "Did you mean 'heads'"]),
    "unknown kind": (lambda: layer(kind="gated_dleta"), ["parts.A.mixer", "'gated_dleta'", "Did you mean 'gated_delta'", "attention"]),
    "no kind": (lambda: layer(heads=2), ["parts.A.mixer", "'kind' is missing", "gated_delta"]),
    "a number that is a word": (lambda: model(dim="wide"), ["dim", "expected int", "'wide'"]),
    "unknown model": (lambda: create_model("hybird-tiny"), ["'hybird-tiny'", "Did you mean 'hybrid-tiny'", "memarch list"]),
    "unknown override": (lambda: create_model("hybrid-tiny", vocab=3), ["'vocab'", "vocab_size"]),
    "heads do not divide": (lambda: layer(kind="attention", heads=3), ["block 0", "heads 3", "divide dim 16", "head_dim"]),
    "groups do not divide": (lambda: layer(kind="attention", heads=4, groups=3), ["groups 3", "divide heads 4"]),
    "window 0": (lambda: layer(kind="attention", heads=2, window=0), ["window", "at least 1", "got 0"]),
    "k > n": (lambda: model(parts={"A": {"ffn": {"kind": "pkm", "keys": 4, "topk": 5}}}), ["topk", "between 1 and keys (4)", "got 5"]),
    "a pattern that does not fit the depth": (lambda: model(pattern="AAA"), ["'AAA'", "3 letters", "layers is 2"]),
    "a letter without a part": (lambda: model(pattern="AB"), ["'AB'", "'B'", "Allowed: A"]),
    "a reader without a writer": (lambda: layer(kind="cross_attention", heads=2), ["block 0", "'kv'", "no block below writes"]),
    "a pool named like a method": (lambda: model(pools={"values": {"rows": 9}}), ["'values'", "plain word"]),
    "an undeclared pool": (lambda: model(parts={"A": {"ffn": {"kind": "pkm", "pool": "facts"}}}), ["'facts'", "pools"]),
    "a pool of the wrong size": (
        lambda: model(parts={"A": {"ffn": {"kind": "pkm", "keys": 8, "topk": 2, "pool": "facts"}}}, pools={"facts": {"rows": 9}}),
        ["'facts'", "9 x 16", "64 x 16"],
    ),
    "a table too large": (lambda: layer_alone(kind="pkm", keys=2**22), ["17,592,186,044,416 x 16", "1024 TiB", "GiB free", "fewer keys"]),
    "cores do not divide": (lambda: layer_alone(kind="ultramem", value_dim=7), ["cores 2", "divide the value width 7"]),
    "Tucker rank 0": (lambda: layer_alone(kind="ultramem_v2", rank=0), ["rank", "at least 1", "got 0"]),
    "NaN queries": (lambda: layer_alone(kind="pkm", keys=8, topk=2)(torch.full((1, 1, 16), torch.nan)), ["NaN", "queries", "overflowed"]),
    "ids outside the table": (lambda: weighted_bag(torch.zeros(4, 2), torch.tensor([[4]]), torch.ones(1, 1)), ["id 4", "0 .. 3", "4 rows"]),
    "a branch that adds before it reads": (
        lambda: model(parts={"A": {"mixer": MIXER, "ffn": {"kind": "swiglu"}}}, branches=[{"reads": 1, "adds": 0, "layer": {"kind": "swiglu"}}]),
        ["branches[0]", "reads <= adds"],
    ),
    "an empty part": (lambda: model(parts={"A": {}}), ["parts.A", "a mixer, an ffn, or both"]),
    "token id too large": (lambda: model()(tokens(3, 32)), ["32", "out of range", "0 to 31"]),
    "token id below 0": (lambda: model()(tokens(-1)), ["-1", "out of range"]),
    "no tokens": (lambda: model()(torch.zeros(1, 0, dtype=torch.int64)), ["T >= 1", "[1, 0]"]),
    "state of another model": (
        lambda: model()(tokens(1), other_state(parts={"A": {"mixer": {"kind": "attention", "heads": 2}}})),
        ["another model", "model.start"],
    ),
    "state of another size": (lambda: model()(tokens(1), other_state(dim=32)), ["another model", "model.start"]),
    "state of another batch": (lambda: model()(tokens(1), model().start(3)), ["3 rows", "1", "memarch.state.take"]),
    "state of another dtype": (lambda: model()(tokens(1), states.to(model().start(1), torch.float64)), ["float64", "float32", "memarch.state.to"]),
    "lengths too long": (lambda: model()(tokens(1, 2), lengths=torch.tensor([3])), ["lengths", "T = 2", "[3]"]),
    "starts of the wrong shape": (lambda: model()(tokens(1, 2), starts=torch.zeros(1, 3, dtype=torch.bool)), ["starts", "[1, 2]", "[1, 3]"]),
    "a missing state file": (lambda: states.load("nowhere.safetensors", model()), ["nowhere.safetensors", "memarch.state.save"]),
    "a missing folder": (lambda: from_pretrained("./nowhere"), ["nowhere"]),
}


@pytest.mark.parametrize("case", PYTHON)
def test_python_says_what_is_wrong(case):
    call, parts = PYTHON[case]
    with pytest.raises((ValueError, OSError)) as error:
        call()
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text and len(text) < 600


def newer(folder):
    model().save_pretrained(folder / "newer")
    config = json.loads((folder / "newer" / "config.json").read_text())
    (folder / "newer" / "config.json").write_text(json.dumps({**config, "format_version": 99}))
    return ["evaluate", str(folder / "newer"), "--task", "mqar"]


def without_weights(folder):
    model().save_pretrained(folder / "empty")
    (folder / "empty" / "model.safetensors").unlink()
    return ["evaluate", str(folder / "empty"), "--task", "mqar"]


def written(folder, text):
    (folder / "run.yaml").write_text(text)
    return ["train", "fit", "--config", str(folder / "run.yaml")]


COMMAND = {
    "unknown command": (lambda f: ["trian"], ["trian", "train"]),
    "unknown config key": (lambda f: written(f, "model: {dmi: 3}"), ["dmi", "dim"]),
    "unknown config kind": (lambda f: written(f, "model: {parts: {M: {mixer: {kind: gated_dleta}}}}"), ["gated_dleta", "gated_delta"]),
    "unknown flag": (lambda f: ["train", "fit", "--trainer.max_stpes", "3"], ["max_stpes", "max_steps"]),
    "unknown deep flag": (lambda f: ["train", "fit", "--model.parts.G.mixer.haeds", "3"], ["haeds", "heads"]),
    "window 0": (lambda f: ["train", "fit", "--model.parts.W.mixer.window", "0"], ["window", "at least 1"]),
    "a YAML with a tab": (lambda f: written(f, "model:\n\tdim: 3\n"), ["run.yaml", "line 2", "tab"]),
    "a missing config": (lambda f: ["train", "fit", "--config", str(f / "nowhere.yaml")], ["nowhere.yaml"]),
    "a config from a newer format": (newer, ["99", "format"]),
    "a folder without weights": (without_weights, ["empty", "safetensors"]),
    "a missing model": (lambda f: ["evaluate", str(f / "nowhere"), "--task", "mqar"], ["nowhere"]),
    "an unknown task": (lambda f: ["evaluate", "x", "--task", "mqra"], ["mqra", "mqar"]),
    "a missing ablation": (lambda f: ["ablate", str(f / "nowhere.yaml")], ["nowhere.yaml"]),
    "a missing text": (lambda f: ["prepare", str(f / "nowhere.txt"), "--out", str(f / "out")], ["nowhere.txt"]),
}


@pytest.mark.parametrize("case", COMMAND)
def test_the_command_line_says_it_in_one_line(case, tmp_path, capsys, monkeypatch):
    make, parts = COMMAND[case]
    words = make(tmp_path)
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    told = capsys.readouterr().err.strip()
    assert status == 2, told
    assert "Traceback" not in told and told.count("\n") <= 1, told
    assert all(part in told for part in parts), told
    assert not (tmp_path / "runs").exists(), "a run that cannot be leaves nothing"
