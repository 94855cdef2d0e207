"""Titans' memory as a whole layer, against titans-pytorch and attention of the same width: a training step over growing lengths, and decoding.

`python -m benchmarks.titans_cases` says how much memory a training step takes."""

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.cases import Case, Sized, draw
from benchmarks.memory_cases import trained
from memarch import kernels
from memarch.layers import AttentionConfig, TitansLMMConfig, TitansMACConfig, TitansMAGConfig, TitansMALConfig

DIM = 256
LMM = {"matrix": TitansLMMConfig(depth=1), "MLP": TitansLMMConfig()}


def layers(memory: str) -> dict[str, peers.Build]:
    return {"ours": lambda: LMM[memory].build(DIM), **peers.titans(DIM), "our attention, SDPA": lambda: AttentionConfig().build(DIM)}


def without_cpp(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def called(x: Tensor) -> Tensor:
        with kernels.using("torch"):
            return call(x)

    return called


def lmm(memory: str, T: int) -> Case:
    providers = {name: trained(build) for name, build in layers(memory).items()}
    if memory == "MLP":
        providers["ours without C++"] = without_cpp(trained(layers(memory)["ours"]))
    return Case("titans_lmm layer", f"{memory} B=1 T={T} D={DIM} H=4 fp32", [draw(1, T, DIM)], providers, same=False)


class Decoder:
    """As a provider: the tokens of x one by one, after so many others."""

    def __init__(self, build: peers.Build, call: Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]], context: int):
        self.build, self.call, self.context = build, call, context

    @cached_property
    def begun(self) -> tuple[nn.Module, Any]:
        layer, state = self.build().eval(), None
        for piece in draw(1, self.context, DIM).split(1024, 1):
            state = self.call(layer, piece, state)[1]
        return layer, state

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        (layer, state), outs = self.begun, []
        for token in x.split(1, 1):
            y, state = self.call(layer, token, state)
            outs.append(y)
        return torch.cat(outs, 1)


def decode(memory: str, tokens: int = 64) -> Case:
    """A whole chunk, for titans-pytorch learns at its end."""

    def ours(layer: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = layer(x, state)
        return out.y, out.state

    def theirs(layer: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return layer(x, state=state)

    build = layers(memory)["ours"]
    providers = {"ours": Decoder(build, ours, 1024), "ours after 65536": Decoder(build, ours, 65536)}
    providers |= {name: Decoder(build, theirs, 1024) for name, build in peers.titans(DIM).items()}
    shape = f"{memory}, {tokens} tokens one by one after 1024, B=1 D={DIM} H=4 fp32"
    return Case("titans_lmm layer", shape, [draw(1, tokens, DIM)], providers, same=False, modes=("fwd",))


def cases() -> Iterator[Case]:
    for memory in LMM:
        yield from (lmm(memory, T) for T in (1024, 2048, 4096))
        yield decode(memory)


def family() -> dict[str, nn.Module]:
    """Layers whose time is taken over growing lengths and contexts."""
    configs = {f"titans_lmm {name}": config for name, config in LMM.items()}
    configs |= {config.kind: config for config in (TitansMACConfig(), TitansMAGConfig(), TitansMALConfig())}
    return {name: config.build(DIM) for name, config in configs.items()}


def scaling() -> dict[str, Sized]:
    def at(call: Callable[[Tensor], Tensor]) -> Sized:
        return lambda T: (f"B=1 D={DIM} H=4 fp32", call, [draw(1, T, DIM)])

    return {f"{name} layer": at(trained(lambda layer=layer: layer)) for name, layer in family().items()}


def main() -> None:
    """How far the most a process holds rises in three training steps, each layer in a process of its own."""
    for memory in LMM:
        for name in layers(memory):
            code = f"from benchmarks.titans_cases import peak; print(peak({memory!r}, {name!r}))"
            print(f"{memory:8}{name:48} {subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()} MiB")


def peak(memory: str, name: str, T: int = 4096) -> str:
    torch.set_num_threads(1)
    call, before = trained(cache(layers(memory)[name])), 0
    for tokens in (64, T, T, T):
        call(draw(1, tokens, DIM).requires_grad_()).sum().backward()
        before = before or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10:.0f}"


if __name__ == "__main__":
    main()
