"""Named models. A preset states differences only: a base, and what it sets. The same words that an ablation file uses.

Every mixer, memory and wrapper has a `<name>-tiny` that trains in a test; paper sizes stand beside it, with the paper's numbers.
"""

import difflib
import fnmatch
from dataclasses import dataclass
from typing import Any

import torch

from memarch.config import ConfigError, allowed, decode, override
from memarch.models.lm import LM, LMConfig


@dataclass(frozen=True)
class Preset:
    family: str
    paper: str
    base: str | None
    set: dict[str, Any]  # dotted path -> value; what is named is replaced
    published: str | None = None  # the parameter count as the paper, its code or its model card states it, "1.62B"; asserted by a test


SWIGLU = {"kind": "swiglu"}
NOTES = {"kind": "memmamba", "share": True}
TINY = {"vocab_size": 256, "dim": 64, "layers": 2, "tie": True}
GDN = "Yang et al. 2024, arXiv 2412.06464"
MOM = "Du et al. 2025, arXiv 2502.13685"
BASED = "Arora et al. 2024, arXiv 2402.18668"
MAMBA = "Gu & Dao 2023, arXiv 2312.00752"
MAMBA2 = "Dao & Gu 2024, arXiv 2405.21060"
MEMMAMBA = "Wang et al. 2025, arXiv 2510.03279"
PKM = "Lample et al. 2019, arXiv 1907.05242"
PEER = "He 2024, arXiv 2407.04153"
MEMORY_PLUS = "Berges et al. 2024, arXiv 2412.09764"
ULTRAMEM = "Huang et al. 2025, arXiv 2411.12364"
ULTRAMEM_V2 = "Huang et al. 2025, arXiv 2508.18756"
SAMBAY = "Ren et al. 2025, arXiv 2507.06607"
TITANS = "Behrouz et al. 2024, arXiv 2501.00663"
TRANSFORMER = "Vaswani et al. 2017, arXiv 1706.03762"


def model(vocab: int, dim: int, layers: int, mixer: dict[str, Any], hidden: int | None, **more: Any) -> dict[str, Any]:
    """One block, repeated; `hidden` of the SwiGLU, None for no feed-forward."""
    part = {"mixer": mixer} if hidden is None else {"mixer": mixer, "ffn": {**SWIGLU, "hidden": hidden}}
    return {"vocab_size": vocab, "dim": dim, "layers": layers, "pattern": "M", "parts": {"M": part}, "tie": True, **more}


def based(dim: int, layers: int, memories: tuple[int, ...]) -> dict[str, Any]:
    """Based's language models: a convolution in every block but those of `memories` and, behind each of them, a window."""
    ffn = {**SWIGLU, "hidden": 2 * dim}
    parts = {
        "C": {"mixer": {"kind": "base_conv"}, "ffn": ffn},
        "B": {"mixer": {"kind": "based", "heads": 16}, "ffn": ffn},
        "W": {"mixer": {"kind": "attention", "heads": 16, "window": 128}, "ffn": ffn},
    }
    pattern = "".join("B" if i in memories else "W" if i - 1 in memories else "C" for i in range(layers))
    return {"vocab_size": 50264, "dim": dim, "layers": layers, "pattern": pattern, "parts": parts, "tie": True, "norm_eps": 1e-5}


def sambay(dim: int, layers: int, heads: int, groups: int, window: int, head_dim: int | None = None, **more: Any) -> dict[str, Any]:
    """Half of the blocks remember, Mamba and a window by turns. The two after them do too, and leave a readout and all keys and values, which the other
    blocks read by turns. There are no positions."""
    queries = {"heads": heads, "head_dim": head_dim, "positions": "none"}
    keys = {"kind": "attention", "groups": groups, **queries}
    mixers = {
        "M": {"kind": "mamba"},
        "W": {**keys, "window": window},
        "S": {"kind": "mamba", "share": ["readout"]},
        "F": {**keys, "share": True},
        "G": {"kind": "gmu"},
        "X": {"kind": "cross_attention", **queries},
    }
    pattern = "MW" * (layers // 4) + "SF" + "GX" * (layers // 4 - 1)
    parts = {letter: {"mixer": mixer, "ffn": {**SWIGLU, "hidden": 4 * dim}} for letter, mixer in mixers.items()}
    return {"dim": dim, "layers": layers, "pattern": pattern, "parts": parts, **more}


def mom(dim: int, hidden: int, tie: bool) -> dict[str, Any]:
    inner = {"kind": "gated_delta", "heads": 4, "head_dim": 256}
    return model(32000, dim, 24, {"kind": "mom", "inner": inner}, hidden, tie=tie)


def gated_delta(dim: int, layers: int, hidden: int) -> dict[str, Any]:
    """NVIDIA's sizes: keys take 3/4 of the width, values 3/2, over nine heads."""
    mixer = {"kind": "gated_delta", "heads": 9, "head_dim": dim // 12, "value_dim": dim // 6}
    return model(32000, dim, layers, mixer, hidden, norm_eps=1e-5)


def tiny(mixer: dict[str, Any], ffn: dict[str, Any] | None = None) -> dict[str, Any]:
    return {**TINY, "pattern": "M", "parts": {"M": {"mixer": mixer, "ffn": ffn or {**SWIGLU, "hidden": 128}}}}


def titans(variant: str, heads: int, chunk: int, near: int, persistent: int) -> dict[str, Any]:
    """One of the four layers; `near` is how far attention reaches: a window, or MAC's segment."""
    memory = {"kind": "titans_lmm", "heads": heads, "chunk": chunk}
    if variant == "lmm":
        return memory
    if variant == "mac":
        return {"kind": "titans_mac", "segment": near, "persistent": persistent, "heads": heads, "memory": memory}
    return {"kind": f"titans_{variant}", "persistent": persistent, "attention": {"kind": "attention", "heads": heads, "window": near}, "memory": memory}


# Name, width, layers, and the feed-forward's hidden width where the memory stands alone and where it stands with attention.
TITANS_SIZES = (("170m", 768, 12, 3840, 2816), ("340m", 1024, 24, 2240, 896), ("400m", 1024, 24, 3072, 1728), ("760m", 1536, 24, 3584, 1536))


def ultramem(dim: int, layers: int, heads: int, keys: int, topk: int, spans: str) -> dict[str, Any]:
    """A transformer with UltraMem beside its blocks; spans "3:5 6:8" as the paper counts: blocks from 1, read before the first, added after the second.
    Its feed-forward has the 8 D^2 parameters of a plain one."""
    layer = {"kind": "ultramem", "keys": keys, "topk": topk}
    ends = [tuple(int(i) - 1 for i in span.split(":")) for span in spans.split()]
    branches = [{"reads": reads, "adds": adds, "layer": layer} for reads, adds in ends]
    return model(50304, dim, layers, {"kind": "attention", "heads": heads}, round(8 * dim / 3), branches=branches)


def ultramem_v2(dim: int, layers: int, heads: int, hidden: int, **memory: int) -> dict[str, Any]:
    data = model(50304, dim, layers, {"kind": "attention", "heads": heads}, None)
    return override(data, "parts.M.ffn", {"kind": "ultramem_v2", "hidden": hidden, **memory})


def memory_plus(dim: int, layers: int, heads: int, hidden: int, at: tuple[int, ...], keys: int) -> dict[str, Any]:
    """A Llama with the feed-forward of three blocks replaced; they share one table."""
    data = model(32000, dim, layers, {"kind": "attention", "heads": heads}, hidden, tie=False)
    memory = {"mixer": data["parts"]["M"]["mixer"], "ffn": {"kind": "memory_plus", "keys": keys, "pool": "facts"}}
    pattern = "".join("K" if i in at else "M" for i in range(layers))
    return {**data, "pattern": pattern, "parts": {**data["parts"], "K": memory}, "pools": {"facts": {"rows": keys**2}}}


def replaced(at: int, layers: int, ffn: dict[str, Any]) -> dict[str, Any]:
    """One block's feed-forward of transformer-160m is another."""
    mixer = {"kind": "attention", "heads": 12}
    return {"pattern": "M" * at + "K" + "M" * (layers - at - 1), "parts.K": {"mixer": mixer, "ffn": ffn}}


PRESETS: dict[str, Preset] = {
    "transformer-tiny": Preset("attention", TRANSFORMER, None, tiny({"kind": "attention", "heads": 2})),
    "window-tiny": Preset("attention", TRANSFORMER, "transformer-tiny", {"parts.M.mixer.window": 16}),
    "base-conv-tiny": Preset("convolution", BASED, None, tiny({"kind": "base_conv"})),
    "base-conv-mqar-tiny": Preset("convolution", "Arora et al. 2023, arXiv 2312.04927", None, tiny({"kind": "base_conv_mqar"})),
    "short-conv-tiny": Preset("convolution", "Fu et al. 2023, arXiv 2212.14052", None, tiny({"kind": "short_conv"})),
    "gated-delta-tiny": Preset("linear", GDN, None, tiny({"kind": "gated_delta", "heads": 2})),
    "delta-net-tiny": Preset("linear", "Yang et al. 2024, arXiv 2406.06484", None, tiny({"kind": "delta_net", "heads": 2})),
    "retnet-tiny": Preset("linear", "Sun et al. 2023, arXiv 2307.08621", None, tiny({"kind": "retnet", "heads": 2})),
    "linear-attention-tiny": Preset("linear", "Katharopoulos et al. 2020, arXiv 2006.16236", None, tiny({"kind": "linear_attention", "heads": 2})),
    "gla-tiny": Preset("linear", "Yang et al. 2023, arXiv 2312.06635", None, tiny({"kind": "gla", "heads": 2})),
    "mamba-tiny": Preset("linear", MAMBA, None, tiny({"kind": "mamba"})),
    "memmamba-tiny": Preset(
        "linear",
        MEMMAMBA,
        "mamba-tiny",
        {
            "layers": 3,
            "pattern": "MMN",
            "parts.M.mixer": {**NOTES, "window": 8, "slots": 4, "note": 16},
            "parts.N": {"mixer": {**NOTES, "window": 8, "slots": 4, "note": 16, "reach": 2}, "ffn": {**SWIGLU, "hidden": 128}},
        },
    ),
    "mamba2-tiny": Preset("linear", MAMBA2, None, tiny({"kind": "mamba2", "state": 32, "head_dim": 32})),
    "mom-tiny": Preset("linear", MOM, None, tiny({"kind": "mom", "inner": {"kind": "gated_delta", "heads": 2}})),
    "hybrid-tiny": Preset(
        "hybrid",
        GDN,
        "gated-delta-tiny",
        {
            "pattern": "MW",
            "parts.W": {"mixer": {"kind": "attention", "heads": 2, "window": 16, "positions": "none", "conv": 4}, "ffn": {**SWIGLU, "hidden": 128}},
        },
    ),
    "based-tiny": Preset(
        "hybrid",
        "Arora et al. 2024, arXiv 2402.18668",
        "transformer-tiny",
        {
            "layers": 3,
            "pattern": "CBM",
            "parts.C": {"mixer": {"kind": "short_conv", "taps": 3}, "ffn": {**SWIGLU, "hidden": 128}},
            "parts.B": {"mixer": {"kind": "based", "heads": 2}, "ffn": {**SWIGLU, "hidden": 128}},
            "parts.M.mixer.window": 16,
        },
    ),
    "yoco-tiny": Preset(
        "hybrid",
        "Sun et al. 2024, arXiv 2405.05254",
        "gated-delta-tiny",
        {
            "layers": 4,
            "pattern": "MFCC",
            "parts.F": {"mixer": {"kind": "attention", "heads": 2, "share": True}, "ffn": {**SWIGLU, "hidden": 128}},
            "parts.C": {"mixer": {"kind": "cross_attention", "heads": 2}, "ffn": {**SWIGLU, "hidden": 128}},
        },
    ),
    "gmu-tiny": Preset(
        "hybrid",
        SAMBAY,
        "mamba-tiny",
        {"pattern": "MG", "parts.M.mixer.share": ["readout"], "parts.G": {"mixer": {"kind": "gmu"}, "ffn": {**SWIGLU, "hidden": 128}}},
    ),
    "sambay-tiny": Preset("hybrid", SAMBAY, None, sambay(64, 8, 2, 1, 16, vocab_size=256, tie=True)),
    "memory-former-tiny": Preset("memory", "Ding et al. 2024, arXiv 2411.12992", "hybrid-tiny", {"parts.W.ffn": {"kind": "memory_former", "bits": 4}}),
    "memory-plus-tiny": Preset(
        "memory",
        MEMORY_PLUS,
        "hybrid-tiny",
        {
            "layers": 4,
            "parts.M.ffn": {"kind": "memory_plus", "keys": 32, "heads": 2, "topk": 8, "pool": "facts"},
            "pools": {"facts": {"rows": 1024}},
        },
    ),
    "moe-tiny": Preset(
        "memory",
        "Shazeer et al. 2017, arXiv 1701.06538",
        "hybrid-tiny",
        {"parts.W.ffn": {"kind": "moe", "experts": 4, "hidden": 64}},
    ),
    "peer-tiny": Preset("memory", PEER, "hybrid-tiny", {"parts.W.ffn": {"kind": "peer", "keys": 32, "heads": 2, "topk": 8}}),
    "pkm-tiny": Preset(
        "memory",
        PKM,
        "hybrid-tiny",
        {"parts.W.ffn": {"kind": "pkm", "keys": 32, "heads": 2, "topk": 8, "query_dim": 32, "pool": "facts"}, "pools": {"facts": {"rows": 1024}}},
    ),
    "ultramem-tiny": Preset(
        "memory",
        ULTRAMEM,
        "hybrid-tiny",
        {"branches": [{"reads": 0, "adds": 1, "layer": {"kind": "ultramem", "keys": 32, "topk": 8}}]},
    ),
    "ultramem-v2-tiny": Preset(
        "memory",
        ULTRAMEM_V2,
        "hybrid-tiny",
        {
            "parts.M.ffn": {"kind": "ultramem_v2", "hidden": 128, "keys": 32, "topk": 8, "pool": "facts", "pre_pool": "gates"},
            "parts.W.ffn": {"kind": "ultramem_v2", "hidden": 128, "keys": 32, "topk": 8, "pool": "facts", "pre_pool": "gates"},
            "pools": {name: {"rows": 1536, "width": 16, "window": 1024, "step": 512} for name in ("facts", "gates")},
        },
    ),
    "titans-lmm-tiny": Preset("neural", TITANS, None, tiny(titans("lmm", 2, 16, 16, 4))),
    "titans-mac-tiny": Preset("neural", TITANS, None, tiny(titans("mac", 2, 16, 32, 4))),
    "titans-mag-tiny": Preset("neural", TITANS, None, tiny(titans("mag", 2, 16, 16, 4))),
    "titans-mal-tiny": Preset("neural", TITANS, None, tiny(titans("mal", 2, 16, 16, 4))),
    "hiss-tiny": Preset("segment", "Bhirangi et al. 2024, arXiv 2402.10211", "mamba-tiny", {"wrap": [{"kind": "hiss", "chunk": 4}]}),
    "rmt-tiny": Preset("segment", "Bulatov et al. 2022, arXiv 2207.06881", "transformer-tiny", {"wrap": [{"kind": "rmt", "segment": 32, "memory": 4}]}),
    "transformer-160m": Preset(
        "attention",
        TRANSFORMER,
        "transformer-tiny",
        {"vocab_size": 50304, "dim": 768, "layers": 12, "parts.M": {"mixer": {"kind": "attention", "heads": 12}, "ffn": SWIGLU}},
    ),
    "based-360m": Preset("hybrid", BASED, None, based(1024, 27, (1, 6, 11, 16, 21)), "360M"),
    "based-1.3b": Preset("hybrid", BASED, None, based(1792, 36, (1, 6, 11, 16, 21, 27, 33)), "1.3B"),
    "gated-delta-400m": Preset("linear", GDN, None, gated_delta(1536, 11, 6144)),  # what NVIDIA's "0.4B" says adds up to 517M
    "gated-delta-1.3b": Preset("linear", GDN, None, gated_delta(2400, 16, 5888), "1.3B"),
    **{
        f"mamba-{size.lower()}": Preset("linear", MAMBA, None, model(50280, dim, layers, {"kind": "mamba"}, None, norm_eps=1e-5), size)
        for size, dim, layers in (("130M", 768, 24), ("370M", 1024, 48), ("790M", 1536, 48), ("1.4B", 2048, 48), ("2.8B", 2560, 64))
    },
    # "200M" in the paper, whose maps have no stated widths. With alpha 0 it starts as mamba-130m.
    "memmamba-130m": Preset("linear", MEMMAMBA, "mamba-130m", {"pattern": "MMMN", "parts.M.mixer": NOTES, "parts.N": {"mixer": {**NOTES, "reach": 4}}}),
    "mamba2-130m": Preset("linear", MAMBA2, None, model(50288, 768, 24, {"kind": "mamba2"}, None, norm_eps=1e-5), "130M"),
    "mamba2-1.3b": Preset("linear", MAMBA2, None, model(50288, 2048, 48, {"kind": "mamba2"}, None, norm_eps=1e-5), "1.3B"),
    # The shapes of the authors' scaling runs (microsoft/ArchScale). Phi-4-mini-flash is not here: it has differential attention, LayerNorm and biases.
    **{
        f"sambay-d{n}": Preset("hybrid", SAMBAY, None, sambay(124 * n, n, n, n // 4, 128, head_dim=128, vocab_size=32000, tie=False, norm_eps=1e-5))
        for n in (8, 12, 16, 20, 24)
    },
    "mom-380m": Preset("linear", MOM, None, mom(1024, 2048, tie=True), "0.5B"),  # the model card; the paper's 444M is not what its config adds up to
    "mom-1.3b": Preset("linear", MOM, None, mom(2048, 5632, tie=False), "1.62B"),
    # The paper prints totals and nothing else. Widths, depths and the 16 heads are those of the same authors' later tables (2504.13173; 400M has none and is
    # 340M's), chunks, windows and persistent tokens are guesses, and the feed-forward has the parameters that are left.
    **{
        f"titans-{variant}-{size}": Preset("neural", TITANS, None, model(32000, dim, layers, titans(variant, 16, 64, 512, 16), hidden), size.upper())
        for size, dim, layers, alone, beside in TITANS_SIZES
        for variant, hidden in (("lmm", alone), ("mac", beside), ("mag", beside), ("mal", beside))
    },
    # PKM's and PEER's papers name no model: their memory, of the papers' size and in the papers' place, on the same backbone.
    "pkm-160m": Preset("memory", PKM, "transformer-160m", replaced(9, 12, {"kind": "pkm", "keys": 512, "query_dim": 512})),
    "peer-160m": Preset("memory", PEER, "transformer-160m", replaced(6, 12, {"kind": "peer", "keys": 1024})),
    "memory-plus-373m": Preset("memory", MEMORY_PLUS, None, memory_plus(1024, 24, 16, 2816, (4, 12, 20), 1024)),
    "memory-plus-1.3b": Preset("memory", MEMORY_PLUS, None, memory_plus(2048, 24, 16, 5472, (4, 12, 20), 1024)),
    "ultramem-151m": Preset("memory", ULTRAMEM, None, ultramem(1024, 12, 16, 1100, 42, "3:5 6:8 9:11")),
    "ultramem-680m": Preset("memory", ULTRAMEM, None, ultramem(1536, 24, 16, 1632, 35, "3:7 8:12 13:17 18:22")),
    "ultramem-1.6b": Preset("memory", ULTRAMEM, None, ultramem(2048, 32, 16, 1792, 42, "3:7 8:12 13:17 18:22 23:27 28:32")),
    "ultramem-v2-227m": Preset("memory", ULTRAMEM_V2, None, ultramem_v2(768, 20, 12, 2496, keys=360)),
    # The paper prints no feed-forward; this one has its 1079M a token. Its tables of 528^2 rows then hold 5.14B, and 6.2B are the total, not the printed 6.70B.
    "ultramem-v2-1b": Preset("memory", ULTRAMEM_V2, None, ultramem_v2(2048, 16, 16, 5952, keys=528, topk=128, pre_dim=384, value_dim=768)),
}


def preset(name: str) -> dict[str, Any]:
    """The plain data of a preset, resolved through its bases."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown model {name!r}.{hint} memarch list prints the {len(PRESETS)} names.")
    entry = PRESETS[name]
    data: dict[str, Any] = {} if entry.base is None else preset(entry.base)
    for path, value in entry.set.items():
        data = override(data, path, value)
    return data


def create_model(
    name: str, *, seed: int = 0, device: torch.device | str | None = None, dtype: torch.dtype | None = None, set: dict[str, Any] | None = None, **overrides: Any
) -> LM:
    """A named model with fresh weights. Overrides replace fields of the config; `set` reaches any depth:

    create_model("hybrid-tiny", vocab_size=512, set={"parts.W.mixer.window": 32})"""
    data = preset(name)
    for path, value in {**overrides, **(set or {})}.items():
        if path.split(".")[0] not in LMConfig.__dataclass_fields__:
            raise ConfigError(f"{name}: {allowed('key', path.split('.')[0], LMConfig.__dataclass_fields__)}")
        data = override(data, path, value)
    config = decode(LMConfig, data, name)
    if device is not None and torch.device(device).type == "meta":
        with torch.device("meta"):
            return LM(config).to(dtype=dtype)
    return LM(config, seed=seed).to(device=device, dtype=dtype)


def list_models(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern: list_models("*-tiny")."""
    return sorted(fnmatch.filter(PRESETS, pattern))
