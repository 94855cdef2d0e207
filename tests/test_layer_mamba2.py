"""Mamba-2 against transformers' own (logits recorded by tests/golden_peers/peers.py, and live where transformers is installed), and against its formula."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from memarch import LM, LMConfig, decode
from memarch.layers import Mamba2Config
from zoo import DIM, F64, close, noisy

PEERS = Path(__file__).parent / "golden_peers"
sys.path.insert(0, str(PEERS))


def ours(weights: dict[str, torch.Tensor]) -> LM:
    """memarch's model with the weights of a Mamba2ForCausalLM."""
    from peers import MAMBA2 as c

    mixer = {"kind": "mamba2", "state": c["state_size"], "head_dim": c["head_dim"], "expand": c["expand"], "groups": c["n_groups"], "conv": c["conv_kernel"]}
    config = {"vocab_size": c["vocab_size"], "dim": c["hidden_size"], "layers": c["num_hidden_layers"], "pattern": "M", "parts": {"M": {"mixer": mixer}}}
    model = LM(decode(LMConfig, {**config, "tie": False, "norm_eps": c["layer_norm_epsilon"]})).double()
    names = {"backbone.embeddings": "embed", "backbone.norm_f": "backbone.norm", "lm_head": "head"}
    for i in range(c["num_hidden_layers"]):
        theirs, mine = f"backbone.layers.{i}", f"backbone.blocks.{i}"
        names |= {f"{theirs}.norm": f"{mine}.norm1"}
        names |= {f"{theirs}.mixer.{a}": f"{mine}.mixer.{b}" for a, b in (("in_proj", "into"), ("conv1d", "conv"), ("norm", "norm"), ("out_proj", "out"))}
        names |= {f"{theirs}.mixer.{a}": f"{mine}.mixer.{a}" for a in ("A_log", "D", "dt_bias")}
    found = {}
    for name, x in weights.items():
        stem = next(a for a in names if name == a or name.startswith(a + "."))
        found[names[stem] + name[len(stem) :]] = x.squeeze(1) if name.endswith("conv1d.weight") else x
    model.load_state_dict(found)
    return model


def same_logits(model: LM, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """All at once, and in pieces: theirs drops the state of a piece of several tokens, ours must not."""
    with torch.no_grad():
        close(model(tokens).logits, logits, "logits", 1e-5)  # theirs computes its norms and its scan in float32
        state, pieces = model.start(tokens.shape[0]), []
        for piece in tokens.split([1, 33, 1, 35], 1):
            out = model(piece, state)
            state = out.state
            pieces.append(out.logits)
    close(torch.cat(pieces, 1), logits, "logits in pieces", 1e-5)


def test_logits_are_those_of_transformers():
    data = load_file(PEERS / "mamba2.safetensors")
    weights = {name.removeprefix("weights."): x for name, x in data.items() if name.startswith("weights.")}
    assert data["logits"].std() > 0.3
    same_logits(ours(weights), data["tokens"], data["logits"])


def test_logits_are_those_of_transformers_live():
    pytest.importorskip("transformers", reason="the extra hf: pip install memarch[hf]")
    from peers import MAMBA2, mamba2

    theirs = mamba2()
    tokens = torch.randint(MAMBA2["vocab_size"], (3, 70))
    with torch.no_grad():
        same_logits(ours(theirs.state_dict()), tokens, theirs(tokens).logits)


def test_it_is_its_formula():
    layer = noisy(Mamba2Config(state=4, head_dim=6, expand=3, groups=2, conv=2).build(DIM))
    x = torch.randn(2, 40, DIM, dtype=F64)
    z, mixed, dt = layer.into(x).split(layer.sizes, -1)
    mixed = F.pad(mixed, (0, 0, 1, 0))
    mixed = F.silu(mixed[:, :-1] * layer.conv.weight[:, 0] + mixed[:, 1:] * layer.conv.weight[:, 1] + layer.conv.bias)
    u, B, C = mixed.split(layer.mixed, -1)
    u, B, C = u.unflatten(-1, (8, 6)), B.unflatten(-1, (2, 4)), C.unflatten(-1, (2, 4))
    step, A = F.softplus(dt + layer.dt_bias), layer.A_log.exp()
    S, out = torch.zeros(2, 8, 4, 6, dtype=F64), []
    for t in range(40):
        write, read = (y[:, t].repeat_interleave(4, 1) for y in (B, C))  # [2, 8, 4]
        S = (-A * step[:, t]).exp()[..., None, None] * S + write[..., None] * (step[:, t, :, None] * u[:, t])[..., None, :]
        out.append((read[..., None] * S).sum(-2) + layer.D[:, None] * u[:, t])
    o = torch.stack(out, 1).flatten(2) * F.silu(z)
    o = torch.cat([part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-5) for part in o.chunk(2, -1)], -1) * layer.norm.weight
    close(layer(x).y, layer.out(o), "output", 1e-10)
