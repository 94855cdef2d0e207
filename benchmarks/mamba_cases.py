"""The selective scan and Mamba against loops, mambapy and transformers; MemMamba against Mamba."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.cases import Case, Sized, draw
from benchmarks.memory_cases import trained
from benchmarks.titans_cases import Decoder, without_cpp
from memarch.kernels.selective_scan import selective_scan
from memarch.layers import MambaConfig, MemMambaConfig
from memarch.models import LM, BlockConfig, LMConfig

DIM = 256


def discretised(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """mamba-ssm's selective_scan_ref: every decay and every write at once, then a loop."""
    a, u = torch.einsum("rte,en->rten", dt, A).exp(), torch.einsum("rte,rtn,rte->rten", dt, B, x)
    h, ys = torch.zeros_like(a[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + u[:, t]
        ys.append(torch.einsum("ren,rn->re", h, C[:, t]))
    return torch.stack(ys, 1)


def scan(T: int, mode: str, E: int = 1024, N: int = 16) -> Case:
    def by(impl: str | None) -> Callable[..., Tensor]:
        return lambda *x: selective_scan(*x, impl=impl)[0]

    providers = {"ours": by(None), "ours without C++": by("torch"), "loop over tokens": by("reference"), "mamba-ssm's reference": discretised, **peers.pscan()}
    steps, rates = F.softplus(draw(1, T, E, seed=1) - 4), -torch.arange(1.0, N + 1).repeat(E, 1)
    inputs = [draw(1, T, E), steps, rates, draw(1, T, N), draw(1, T, N, seed=1)]
    return Case("selective_scan", f"B=1 T={T} E={E} N={N} fp32", inputs, providers, modes=(mode,))


@cache
def two_layers() -> LM:
    return LM(LMConfig(vocab_size=2, dim=DIM, parts={"A": BlockConfig(mixer=MambaConfig())}, norm_eps=1e-5)).eval()


def backbone() -> nn.Module:
    return two_layers().backbone


def model(T: int, path: str, rounds: int | None = None) -> Case:
    """From embeddings to the final norm, all with the same weights."""
    ours = trained(backbone)
    providers = {"ours": ours, "ours without C++": without_cpp(ours)}
    providers |= {name: trained(build) for name, build in peers.mamba(two_layers, path).items()}
    return Case("mamba, 2 layers", f"B=1 T={T} D={DIM} fp32", [draw(1, T, DIM)], providers, rounds=rounds)


def decode(tokens: int = 64) -> Case:
    def ours(layer: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = layer(x, state)
        return out.y, out.state

    def theirs(layer: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return layer(x, state)

    providers = {"ours": Decoder(backbone, ours, 1024), "ours after 65536": Decoder(backbone, ours, 65536)}
    providers |= {name: Decoder(build, theirs, 1024) for name, build in peers.mamba(two_layers, "loop").items()}
    return Case("mamba, 2 layers", f"{tokens} tokens one by one after 1024, B=1 D={DIM} fp32", [draw(1, tokens, DIM)], providers, same=False, modes=("fwd",))


def notes(T: int, D: int = 768) -> Case:
    """What MemMamba's notes cost."""
    configs = {"ours": MemMambaConfig(), "a mamba layer": MambaConfig()}
    providers = {name: trained(lambda config=config: config.build(D)) for name, config in configs.items()}
    return Case("memmamba layer", f"attn=256 B=1 T={T} D={D} fp32", [draw(1, T, D)], providers, same=False)


def family() -> dict[str, nn.Module]:
    """Layers whose time is taken over growing lengths and contexts."""
    return {config.kind: config.build(DIM) for config in (MambaConfig(), MemMambaConfig())}


def scaling() -> dict[str, Sized]:
    def at(layer: nn.Module) -> Sized:
        call = trained(lambda: layer)
        return lambda T: (f"B=1 D={DIM} fp32", call, [draw(1, T, DIM)])

    return {f"{name} layer": at(layer) for name, layer in family().items()}


def cases() -> Iterator[Case]:
    yield scan(2048, "fwd")
    yield scan(512, "fwd+bwd")
    yield model(1024, "mambapy")
    yield model(1024, "loop", rounds=1)
    yield decode()
    yield notes(4096)
