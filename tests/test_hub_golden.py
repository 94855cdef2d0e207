"""Exports made once load in every later version, and give the logits they gave."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from golden import make
from memarch import from_pretrained, list_models

EXPORTS = sorted(path.parent.name for path in make.HERE.glob("*/config.json"))


def check(folder: Path) -> None:
    expected = load_file(folder / make.EXPECTED)
    logits = make.answer(from_pretrained(folder), expected["given"])
    error = (logits - expected["logits"]).abs().max() / expected["logits"].abs().max()
    assert error < 1e-6  # they were kept in fp32


@pytest.mark.parametrize("name", EXPORTS)
def test_an_old_export_gives_what_it_gave(name):
    check(make.HERE / name)


@pytest.mark.parametrize("name", list_models("*-tiny"))
def test_every_tiny_preset_has_one(name):
    assert name in EXPORTS, f"run `python tests/golden/make.py {name}` and commit the folder, so that what is saved today loads for good."


def test_they_stay_small():
    for name in EXPORTS:
        assert sum(file.stat().st_size for file in (make.HERE / name).iterdir()) <= make.LIMIT


@pytest.mark.parametrize("name", list_models("*-tiny"))
def test_another_can_be_made(name, tmp_path):
    check(make.make(name, tmp_path))
    with pytest.raises(SystemExit, match="never made again"):
        make.make(name, tmp_path)


def test_the_logits_depend_on_every_tensor(tmp_path):
    """Or a golden export would not notice a tensor that is loaded into the wrong place."""
    folder = make.make("pkm-tiny", tmp_path)
    expected = load_file(folder / make.EXPECTED)["logits"]
    for name, _ in from_pretrained(folder).named_parameters():
        model = from_pretrained(folder)
        with torch.no_grad():
            model.get_parameter(name).mul_(1.1)
        assert (make.answer(model, make.tokens(model.config)) - expected).abs().max() > 1e-4, name
