"""Mamba weights from other libraries and back: the logits are theirs, every tensor finds its place, and what is no Mamba-1 is refused.

The logits of transformers' MambaForCausalLM are recorded by tests/golden_peers/peers.py; where transformers is installed they are computed, too."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memarch import cli, convert, create_model, encode, from_pretrained
from memarch.convert import load, save_transformers
from memarch.layers import MambaConfig
from zoo import close

PEERS = Path(__file__).parent / "golden_peers"
sys.path.insert(0, str(PEERS))


def golden():
    data = load_file(PEERS / "mamba.safetensors")
    return {name.removeprefix("weights."): x for name, x in data.items() if name.startswith("weights.")}, data["tokens"], data["logits"]


def transformers_folder(folder, weights, **changes):
    from peers import MAMBA

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_act": "silu", **MAMBA, **changes}))
    save_file(weights, folder / "model.safetensors")
    return folder


def state_spaces_folder(folder, weights, ssm=(), **changes):
    """The same model as state-spaces writes it."""
    from peers import MAMBA as c

    folder.mkdir()
    inner = {"d_state": c["state_size"], "d_conv": c["conv_kernel"], "expand": c["expand"], "dt_rank": c["time_step_rank"], "bias": True, "dt_scale": 1.0}
    outer = {"d_model": c["hidden_size"], "n_layer": 2, "vocab_size": c["vocab_size"], "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    outer |= {"pad_vocab_size_multiple": 2, "norm_epsilon": 1e-4, "ssm_cfg": {**inner, **dict(ssm)}}
    (folder / "config.json").write_text(json.dumps({**outer, **changes}))
    weights = dict(weights)
    table = weights.pop("backbone.embeddings.weight")
    torch.save({"backbone.embedding.weight": table, "lm_head.weight": table, **weights}, folder / "pytorch_model.bin")
    return folder


def sharded(folder, suffix):
    """The weights of a folder in two files and their index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {name: f"{stem}-0000{i % 2 + 1}-of-00002.{suffix}" for i, name in enumerate(weights)}
    for file in sorted(set(index.values())):
        part = {name: x for name, x in weights.items() if index[name] == file}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def same_logits(model, tokens, logits):
    """All at once, and in pieces: theirs begins with an empty scan in every piece of several tokens, ours must not."""
    with torch.no_grad():
        close(model(tokens).logits, logits, "logits", 1e-6)  # theirs computes its norms and A in float32
        state, pieces = model.start(tokens.shape[0]), []
        for piece in tokens.split([1, 33, 1, 35], 1):
            out = model(piece, state)
            state = out.state
            pieces.append(out.logits)
    close(torch.cat(pieces, 1), logits, "logits in pieces", 1e-6)


# ------------------------------------------------------------------------------------------------ the logits


LAYOUTS = {
    "transformers": transformers_folder,
    "transformers in shards": lambda folder, weights: sharded(transformers_folder(folder, weights), "safetensors"),
    "transformers in pickled shards": lambda folder, weights: sharded(transformers_folder(folder, weights), "bin"),
    "state-spaces": state_spaces_folder,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(layout, tmp_path):
    weights, tokens, logits = golden()
    assert logits.std() > 0.3
    model = load(LAYOUTS[layout](tmp_path / "theirs", weights))
    assert not model.training
    same_logits(model, tokens, logits)
    model.save_pretrained(tmp_path / "ours")
    same_logits(from_pretrained(tmp_path / "ours"), tokens, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", MambaConfig.examples())
def test_there_and_back_is_the_same_bit_for_bit(mixer, dtype, tmp_path):
    model = create_model("mamba-tiny", set={"parts.M": {"mixer": encode(mixer)}}, dtype=dtype, norm_eps=1e-4)
    back = load(save_transformers(model, tmp_path / "theirs"))
    mine, found = model.state_dict(), back.state_dict()
    assert mine.keys() == found.keys() and back.head.weight is back.embed.weight
    assert all(torch.equal(x, found[name]) and x.dtype == found[name].dtype == dtype for name, x in mine.items())
    assert back.config.block(0).mixer == dataclasses.replace(mixer, rank=mixer.ranks(64), init="standard", share=()) and back.config.norm_eps == 1e-4


def test_every_word_of_state_spaces_is_heard(tmp_path):
    weights = {name: x for name, x in golden()[0].items() if not name.endswith("conv1d.bias")}
    more = {"conv_bias": False, "dt_min": 0.01, "dt_max": 0.5, "dt_init_floor": 0.02}
    mixer = load(state_spaces_folder(tmp_path / "theirs", weights, ssm=more)).config.block(0).mixer
    assert mixer == MambaConfig(state=5, conv=3, expand=3, rank=4, bias=True, conv_bias=False, step=(0.01, 0.5), floor=0.02)


def test_the_vocabulary_is_padded_as_state_spaces_pads_it(tmp_path):
    """Their config says 50277 and their table has 50280 rows."""
    weights, tokens, logits = golden()
    folder = state_spaces_folder(tmp_path / "theirs", weights, vocab_size=47, pad_vocab_size_multiple=10)
    model = load(folder / "pytorch_model.bin")
    assert model.config.vocab_size == 50
    same_logits(model, tokens, logits)


def test_a_head_of_its_own_stays_one(tmp_path):
    model = create_model("mamba-tiny", set={"parts.M.ffn": None}, tie=False)
    back = load(save_transformers(model, tmp_path / "theirs"))
    assert torch.equal(back.head.weight, model.head.weight) and not torch.equal(back.head.weight, back.embed.weight)


# ------------------------------------------------------------------------------------------------ beside transformers itself


@pytest.fixture
def peers():
    pytest.importorskip("transformers", reason="the extra hf: pip install memarch[hf]")
    import peers

    return peers


TWO = {"as published": {"use_bias": False, "tie_word_embeddings": True, "conv_kernel": 4, "time_step_rank": "auto"}, "other": {"tie_word_embeddings": False}}


@pytest.mark.parametrize("options", TWO)
def test_transformers_writes_and_we_read(options, tmp_path, peers):
    theirs = peers.mamba(**TWO[options], use_conv_bias=options == "as published")
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.randint(50, (3, 70))
    model = load(tmp_path / "theirs")
    model(tokens).logits.square().mean().backward()
    logits = theirs(tokens).logits
    same_logits(model, tokens, logits.detach())
    logits.square().mean().backward()
    for name, p in model.named_parameters():
        close(convert.spread(name, p.grad), theirs.get_parameter(convert.theirs(name)).grad, f"gradient of {name}", 1e-5)


@pytest.mark.parametrize("options", TWO)
def test_we_write_and_transformers_reads(options, tmp_path, peers):
    from transformers import MambaForCausalLM

    mixer = {"as published": {"kind": "mamba"}, "other": {"kind": "mamba", "state": 5, "conv": 3, "expand": 3, "rank": 2, "bias": True, "conv_bias": False}}
    model = create_model("mamba-tiny", set={"parts.M": {"mixer": mixer[options]}}, tie=options == "as published", norm_eps=1e-4, vocab_size=50).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    theirs, about = MambaForCausalLM.from_pretrained(save_transformers(model, tmp_path / "theirs"), output_loading_info=True)
    assert not any(about.values()), about
    assert theirs.dtype == torch.float64
    tokens = torch.randint(50, (3, 70))
    with torch.no_grad():
        same_logits(model, tokens, theirs(tokens).logits)


def test_the_published_sizes_are_those_of_transformers(peers):
    from transformers import MambaConfig, MambaForCausalLM

    for size, dim, layers in (("130m", 768, 24), ("370m", 1024, 48), ("790m", 1536, 48), ("1.4b", 2048, 48), ("2.8b", 2560, 64)):
        with torch.device("meta"):
            theirs = MambaForCausalLM(MambaConfig(hidden_size=dim, num_hidden_layers=layers))
        assert create_model(f"mamba-{size}", device="meta").config.num_params() == sum(p.numel() for p in theirs.parameters())


# ------------------------------------------------------------------------------------------------ what is refused


def without(weights, name):
    return {key: x for key, x in weights.items() if key != name}


NORM = "backbone.layers.1.norm.weight"
REFUSED = {
    "a tensor without a place": (
        lambda at, w: transformers_folder(at, {**w, "backbone.layers.0.mixer.dt_norm.weight": torch.ones(72)}),
        "without a place: .*dt_norm",
    ),
    "a missing tensor": (lambda at, w: transformers_folder(at, without(w, NORM)), rf"do not fit its config. missing: {NORM}\."),
    "a wrong shape": (
        lambda at, w: transformers_folder(at, w, state_size=6),
        r"another shape: backbone.layers.0.mixer.A_log is \[72, 5\], by the config \[72, 6\]",
    ),
    "too few rows for the vocabulary": (lambda at, w: transformers_folder(at, w, vocab_size=56), r"embeddings.weight is \[50, 24\], by the config \[56, 24\]"),
    "a head that should be the embedding": (lambda at, w: transformers_folder(at, {**w, "lm_head.weight": torch.zeros(50, 24)}), "has a head of its own"),
    "another number of blocks": (lambda at, w: transformers_folder(at, w, num_hidden_layers=3), r"missing: (backbone.layers.2.[^,]*, ){7}[^,]* and 4 more\."),
    "Mamba-2": (lambda at, w: transformers_folder(at, w, model_type="mamba2"), "is a 'mamba2', and only 'mamba'"),
    "another activation": (lambda at, w: transformers_folder(at, w, hidden_act="gelu"), "has the activation 'gelu'"),
    "state-spaces' Mamba-2": (lambda at, w: state_spaces_folder(at, w, ssm={"layer": "Mamba2"}), "layers of the kind 'Mamba2'"),
    "LayerNorm": (lambda at, w: state_spaces_folder(at, w, rms_norm=False), "has LayerNorm"),
    "an MLP": (lambda at, w: state_spaces_folder(at, w, d_intermediate=64), "has an MLP"),
    "attention": (lambda at, w: state_spaces_folder(at, w, attn_layer_idx=[1]), "has attention"),
    "an unknown word": (lambda at, w: state_spaces_folder(at, w, ssm={"d_stat": 4}), "unknown key 'd_stat'. Did you mean 'd_state'"),
    "another library": (lambda at, w: transformers_folder(at, w, model_type=None), "only 'mamba'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_mamba_is_refused(what, tmp_path):
    make, says = REFUSED[what]
    folder = make(tmp_path / "theirs", golden()[0])
    with pytest.raises(ValueError, match=says):
        load(folder)


@pytest.mark.parametrize(
    "name, text, says", [("config.json", "{", "is not JSON"), ("config.json", "{}", "is neither transformers'"), ("config.json", "[]", "not a mapping")]
)
def test_a_config_that_is_none(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        load(tmp_path)


def test_a_file_that_holds_more_than_tensors_is_not_unpickled(tmp_path):
    folder = state_spaces_folder(tmp_path / "theirs", golden()[0])
    torch.save({"code": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is not a whole file of tensors and nothing else"):
        load(folder)


def test_an_index_that_is_none(tmp_path):
    folder = sharded(transformers_folder(tmp_path / "theirs", golden()[0]), "safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json has no 'weight_map'"):
        load(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_truncated_file(file, tmp_path):
    make = transformers_folder if file.startswith("model") else state_spaces_folder
    path = make(tmp_path / "theirs", golden()[0]) / file
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{file} is not a whole file of tensors"):
        load(path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json: give a folder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2}))
    with pytest.raises(FileNotFoundError, match=r"has no weights: none of model.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name, set, says",
    [
        ("mamba-tiny", {}, "this model has feed-forward layers"),
        ("mamba2-tiny", {"parts.M.ffn": None}, "this model has mamba2"),
        ("hybrid-tiny", {}, "this model has attention, gated_delta, feed-forward layers"),
        ("mamba-tiny", {"parts.M.ffn": None, "wrap": [{"kind": "rmt"}]}, "this model has wrap"),
        ("mamba-tiny", {"pattern": "MN", "parts.M.ffn": None, "parts.N": {"mixer": {"kind": "mamba", "state": 8}}}, "those of this model differ"),
    ],
)
def test_what_has_no_place_in_transformers_is_refused(name, set, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        save_transformers(create_model(name, set=set), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_goes_there_and_back(tmp_path, capsys):
    weights, tokens, logits = golden()
    state_spaces_folder(tmp_path / "theirs", weights)
    assert cli.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    assert "16.2k parameters, 2 blocks of width 24, 50 tokens" in capsys.readouterr().out
    same_logits(from_pretrained(tmp_path / "ours"), tokens, logits)
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "transformers"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], x) for name, x in weights.items())


def test_the_command_overwrites_nothing(tmp_path, capsys):
    folder = transformers_folder(tmp_path / "theirs", golden()[0])
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for to, says in (("memarch", "belongs to something else"), ("transformers", "is there already")):
        assert cli.main(["convert", str(folder), str(folder), "--to", to]) == 2
        assert says in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
