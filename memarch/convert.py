"""Mamba-1 models of other libraries as memarch's, and back.

    model = load("mamba-130m-hf")           a folder with config.json and weights, or the file of the weights in it
    save_transformers(model, "out")         MambaForCausalLM.from_pretrained("out") gives the same logits

Two layouts are read: transformers' (MambaForCausalLM) and state-spaces' (MambaLMHeadModel), from safetensors, or from a .bin in which nothing but
tensors is unpickled. Every tensor must have its place in the model and every place its tensor. dtypes stay as they are.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from memarch.config import allowed, decode, encode, require
from memarch.hub import from_pretrained
from memarch.layers import MambaConfig
from memarch.models import LM, LMConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")  # in the order they are looked for


class Word(NamedTuple):
    """One thing that three configs say."""

    ours: str
    transformers: str
    state_spaces: str


MODEL = (
    Word("vocab_size", "vocab_size", "vocab_size"),
    Word("dim", "hidden_size", "d_model"),
    Word("layers", "num_hidden_layers", "n_layer"),
    Word("tie", "tie_word_embeddings", "tie_embeddings"),
    Word("norm_eps", "layer_norm_epsilon", "norm_epsilon"),
)
MIXER = (
    Word("state", "state_size", "d_state"),
    Word("conv", "conv_kernel", "d_conv"),
    Word("expand", "expand", "expand"),
    Word("rank", "time_step_rank", "dt_rank"),
    Word("bias", "use_bias", "bias"),
    Word("conv_bias", "use_conv_bias", "conv_bias"),
    Word("low", "time_step_min", "dt_min"),
    Word("high", "time_step_max", "dt_max"),
    Word("floor", "time_step_floor", "dt_init_floor"),
)
OF_THE_INIT = ("dt_init", "dt_scale", "use_fast_path")  # in state-spaces' ssm_cfg: of the init and the speed alone

# Names of tensors, ours and transformers'.
ENDS = {"embed.weight": "backbone.embeddings.weight", "backbone.norm.weight": "backbone.norm_f.weight", "head.weight": "lm_head.weight"}
PARTS = {"blocks": "layers", "norm1": "norm", "into": "in_proj", "conv": "conv1d", "select": "x_proj", "dt": "dt_proj", "out": "out_proj"}


def load(source: str | Path) -> LM:
    """The model in a folder of transformers, state-spaces or memarch, in eval mode."""
    source = Path(source).expanduser()
    folder = source.parent if source.is_file() else source
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: give a folder with {CONFIG} and weights, or the file of the weights in such a folder.")
    config = read_json(folder / CONFIG)
    if config.get("library_name") == "memarch":
        return from_pretrained(folder)
    return fill(decode(LMConfig, ours(config, str(folder)), str(folder / CONFIG)), read([source] if source.is_file() else find(folder)), str(source))


def save_transformers(model: LM, folder: str | Path) -> Path:
    """Write the folder that transformers' MambaForCausalLM.from_pretrained reads."""
    folder, config = Path(folder).expanduser(), transformers_config(model)
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; give a folder that is not, or an empty one.")
    folder.mkdir(parents=True, exist_ok=True)
    weights = {theirs(name): spread(name, p.detach()).contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")  # last: without it nothing loads
    return folder


# ------------------------------------------------------------------------------------------------ configs


def ours(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The data of an LMConfig from either config."""
    if "model_type" in config:
        require(config["model_type"] == "mamba", f"{where} is a {config['model_type']!r}, and only 'mamba', which is Mamba-1, can be converted.")
        require(config.get("hidden_act", "silu") in ("silu", "swish"), f"{where} has the activation {config.get('hidden_act')!r}; Mamba's is 'silu'.")
        return data(config, config, "transformers", where)
    require("d_model" in config, f"{where}: its {CONFIG} is neither transformers' (model_type 'mamba') nor state-spaces' (d_model, n_layer, ssm_cfg).")
    inner = dict(config.get("ssm_cfg") or {})
    layer = inner.pop("layer", "Mamba1")
    require(layer == "Mamba1", f"{where} has layers of the kind {layer!r}, and only 'Mamba1' can be converted.")
    require(config.get("rms_norm", True), f"{where} has LayerNorm between its blocks (rms_norm is false), and memarch has RMSNorm.")
    require(not config.get("d_intermediate"), f"{where} has an MLP in its blocks (d_intermediate), and only Mamba alone can be converted.")
    require(not config.get("attn_layer_idx"), f"{where} has attention (attn_layer_idx), and only Mamba alone can be converted.")
    known = [word.state_spaces for word in MIXER] + [*OF_THE_INIT]
    for key in inner:
        require(key in known, f"{where}: ssm_cfg: {allowed('key', key, known)}")
    found = data(config, inner, "state_spaces", where)
    multiple = config.get("pad_vocab_size_multiple", 8)
    return {**found, "vocab_size": math.ceil(found["vocab_size"] / multiple) * multiple}


def data(outer: Mapping[str, Any], inner: Mapping[str, Any], whose: str, where: str) -> dict[str, Any]:
    model = {word.ours: outer[getattr(word, whose)] for word in MODEL if getattr(word, whose) in outer}
    mixer = {word.ours: inner[getattr(word, whose)] for word in MIXER if getattr(word, whose) in inner}
    for word in MODEL[:3]:
        require(word.ours in model, f"{where}: its {CONFIG} lacks {getattr(word, whose)!r}.")
    low, high = MambaConfig.step
    mixer["step"] = [mixer.pop("low", low), mixer.pop("high", high)]
    if mixer.get("rank") == "auto":
        del mixer["rank"]
    return {"norm_eps": 1e-5, **model, "pattern": "M", "parts": {"M": {"mixer": {"kind": "mamba", **mixer}}}}


def transformers_config(model: LM) -> dict[str, Any]:
    config, mixer = model.config, only_mamba(model.config)
    low, high = mixer.step
    said = {**encode(mixer), "low": low, "high": high, "rank": mixer.ranks(config.dim)}
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        **{word.transformers: getattr(config, word.ours) for word in MODEL},
        "hidden_act": "silu",
        "intermediate_size": mixer.expand * config.dim,
        **{word.transformers: said[word.ours] for word in MIXER},
    }


def only_mamba(config: LMConfig) -> MambaConfig:
    """The mixer of a model that is Mamba blocks and nothing else."""
    blocks = [config.block(i) for i in range(config.layers)]
    more = sorted({"blocks without a mixer" if block.mixer is None else block.mixer.kind for block in blocks} - {"mamba"})
    more += ["feed-forward layers"] * any(block.ffn is not None for block in blocks)
    more += [name for name in ("pools", "branches", "wrap") if getattr(config, name)]
    more += ["inputs or outputs that are not tokens"] * ((config.embed, config.head) != ("tokens", "tokens"))
    require(not more, f"transformers' MambaForCausalLM is Mamba blocks and nothing else; this model has {', '.join(more)}.")
    require(all(block == blocks[0] for block in blocks), "the blocks of transformers' MambaForCausalLM are all alike; those of this model differ.")
    mixer = blocks[0].mixer
    assert isinstance(mixer, MambaConfig)
    return mixer


# ------------------------------------------------------------------------------------------------ tensors


def theirs(name: str) -> str:
    """transformers' name of a tensor of ours."""
    return ENDS.get(name) or ".".join(PARTS.get(word, word) for word in name.split("."))


def spread(name: str, x: Tensor) -> Tensor:
    """A tensor of ours in transformers' shape."""
    return x[:, None] if name.endswith("conv.weight") else x  # [E, 1, W]


def fill(config: LMConfig, weights: dict[str, Tensor], where: str) -> LM:
    with torch.device("meta"):
        model = LM(config)
    head = weights.pop("lm_head.weight", None) if config.tie else None
    if head is not None and not torch.equal(head, weights.get("backbone.embeddings.weight", head)):
        raise ValueError(f"{where} has a head of its own, and its config says that the head is the embedding; correct one of them.")
    places = dict(model.named_parameters())
    wanted = {theirs(name): spread(name, p).shape for name, p in places.items()}
    misfits = [name for name, shape in wanted.items() if name in weights and weights[name].shape != shape]
    problems = {
        "missing": sorted(wanted.keys() - weights.keys()),
        "without a place": sorted(weights.keys() - wanted.keys()),
        "of another shape": [f"{name} is {list(weights[name].shape)}, by the config {list(wanted[name])}" for name in misfits],
    }
    said = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
    if said:
        raise ValueError(f"the tensors of {where} do not fit its config. {said}.")
    # Copies, one by one: what safetensors gives is a window into the mapped file.
    model.load_state_dict({name: weights.pop(theirs(name)).reshape(p.shape).clone() for name, p in places.items()}, strict=False, assign=True)
    model.retie()  # strict=False is for the tied head, which is no parameter of its own
    return model.eval()


def some(names: list[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def find(folder: Path) -> list[Path]:
    """The files of the weights."""
    name = next((name for name in FILES if (folder / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(f"{folder} has no weights: none of {', '.join(FILES)} is there.")
    if not name.endswith(".json"):
        return [folder / name]
    places: Any = read_json(folder / name).get("weight_map")
    require(isinstance(places, dict), f"{folder / name} has no 'weight_map' from tensor names to files.")
    return [folder / Path(shard).name for shard in sorted(set(places.values()))]


def read(files: list[Path]) -> dict[str, Tensor]:
    """All tensors, by transformers' names."""
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is not a whole file of tensors and nothing else ({str(error).splitlines()[0]}).") from None
    if "backbone.embedding.weight" in found:  # the one name that state-spaces has otherwise
        found["backbone.embeddings.weight"] = found.pop("backbone.embedding.weight")
    return found


def read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from None
    require(isinstance(found, dict), f"{file} is not a mapping.")
    return found
