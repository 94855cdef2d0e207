"""Every shipped run builds, and a wrong word in it is an error that names the word."""

import copy

import pytest
import torch

from memarch import kernels
from memarch.arguments import TREES, get
from memarch.config import ConfigError, decode
from memarch.config_file import read, shipped
from memarch.data import Facts
from memarch.data.module import TokenData
from memarch.layers import MIXERS
from memarch.models.lm import LM, LMConfig
from memarch.run import RunConfig
from memarch.training import main

FILES = [f"configs/{file.relative_to(shipped())}" for kind in ("recall", "text", "facts", "inertial") for file in sorted((shipped() / kind).glob("*.yaml"))]


@pytest.mark.parametrize("folder", ["recall", "text"])
def test_there_is_one_per_kind(folder):
    """A file named after every mixer (attention's are called transformer), in which that mixer is used."""
    for kind in MIXERS:
        config = decode(LMConfig, read(f"configs/{folder}/{'transformer' if kind == 'attention' else kind}.yaml")["model"])
        assert kind in {config.block(i).mixer.kind for i in range(config.layers)}


FACTS = {"dense": "swiglu", "moe": "moe", "pkm": "pkm", "memory_plus": "memory_plus", "peer": "peer", "ultramem": "ultramem", "ultramem_v2": "ultramem_v2"}


def test_facts_are_compared_at_equal_flops_and_tables_at_equal_parameters():
    """The runs differ in one layer alone, and that layer costs what the feed-forward costs."""
    runs = {name: read(f"configs/facts/{name}.yaml") for name in FACTS}
    tokens, flops, parameters = Facts().batch(0, range(2)).tokens, {}, {}
    for name, data in runs.items():
        config = decode(LMConfig, data["model"])
        assert config.block(1).ffn.kind == FACTS[name]
        model = LM(config)
        with kernels.flop_counter() as counter:
            model(tokens)
        flops[name], parameters[name] = counter.get_total_flops(), config.num_params()
        data["model"]["parts"]["F"]["ffn"] = None
    assert all(data == runs["dense"] for data in runs.values())
    dense = parameters.pop("dense")
    assert flops == pytest.approx(dict.fromkeys(runs, flops["dense"]), rel=0.01)
    assert parameters == pytest.approx(dict.fromkeys(parameters, parameters["pkm"]), rel=0.02)
    assert dense < parameters["pkm"] / 2


@pytest.mark.parametrize("file", FILES)
def test_a_shipped_run_is_complete_and_builds(file):
    data = read(file)
    with torch.device("meta"):
        model = LM(decode(LMConfig, data["model"], file))
    assert sum(p.numel() for p in model.parameters()) == model.config.num_params()
    for path, spec in TREES.items():
        if (node := get(data, path)) is not None:
            decode(spec, node, f"{file}: {path}")
    loader = TokenData(**data["data"] | {name: decode(TREES[f"data.{name}"], node) for name, node in data["data"].items() if name in ("train", "val")})
    assert loader.vocab_size <= model.config.vocab_size
    RunConfig(**data.get("run", {}))
    assert data["trainer"]["max_steps"] > 0


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("path", ["model", "model.parts", "mixer", "optim", "data.train"])
def test_an_unknown_word_in_it_is_an_error(file, path):
    data = copy.deepcopy(read(file))
    if path == "mixer":
        path, letter = "model", data["model"]["pattern"][0]
        node = data["model"]["parts"][letter]["mixer"]
    else:
        node = get(data, path)
        path = "model" if path.startswith("model") else path
    node["hads"] = 4
    with pytest.raises(ConfigError, match="hads"):
        decode(TREES[path], get(data, path), path)


@pytest.mark.parametrize("file", FILES)
def test_the_command_accepts_it(file, capsys):
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", file, "--print_config"])
    assert done.value.code == 0, capsys.readouterr().err
