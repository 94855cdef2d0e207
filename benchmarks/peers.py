"""What others publish for the same computation, wherever it is installed: pip install -r benchmarks/requirements.txt. A peer that is absent is
named and left out; a row without any is a row against plain torch."""

import importlib
import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memarch.convert import save_transformers
from memarch.models import LM

Call = Callable[..., Tensor]
Build = Callable[[], nn.Module]
absent: set[str] = set()


def fla(module: str, name: str, call: Callable[[Callable], Call]) -> dict[str, Call]:
    """A reference form of flash-linear-attention, called as our op is: {} where the package is absent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that a CPU has no Triton
            found = getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)
    except ImportError:
        absent.add("flash-linear-attention")
        return {}
    return {f"fla {importlib.metadata.version('fla-core')} {name}": call(found)}


def heads_first(*xs: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in xs]


def layer(package: str, module: str, name: str) -> Callable[..., nn.Module] | None:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        absent.add(package)
        return None


def both(package: str, build: Build) -> dict[str, Build]:
    """A layer with its dense gradient, as it comes, and with torch's sparse one, made unique by rows as an optimiser needs it."""

    def sparse() -> nn.Module:
        built = build()
        for module in built.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = True
                module.weight.register_hook(lambda grad: grad.coalesce())
        return built

    name = f"{package} {importlib.metadata.version(package)}"
    return {name: build, f"{name}, sparse": sparse}


def peer(ours: Build) -> dict[str, Build]:
    """PEER-pytorch with the paper's rule and our weights."""
    found = layer("PEER-pytorch", "PEER_pytorch.PEER", "PEER")

    @torch.no_grad()
    def build() -> nn.Module:
        mine = ours()
        D, (_, H, n, side) = mine.query.weight.shape[1], mine.keys.shape
        theirs = found(D, heads=H, num_experts=n * n, num_experts_per_head=mine.topk, dim_key=side, non_competing_scores=False)
        theirs.to_queries[0].weight.copy_(sides_first(mine.query.weight, H, side))
        theirs.keys.copy_(mine.keys.movedim(0, 2))
        theirs.weight_down_embed.weight.copy_(mine.experts.table[0::2])
        theirs.weight_up_embed.weight.copy_(mine.experts.table[1::2])
        return theirs

    return both("PEER-pytorch", build) if found else {}


def pkm(ours: Build) -> dict[str, Build]:
    """product-key-memory with our weights, without its norm of queries."""
    found = layer("product-key-memory", "product_key_memory", "PKM")

    @torch.no_grad()
    def build() -> nn.Module:
        mine = ours()
        D, (_, H, n, side) = mine.query.weight.shape[1], mine.keys.shape
        theirs = found(D, heads=H, num_keys=n, topk=mine.topk, dim_head=side)
        theirs.norm = nn.Identity()
        theirs.to_queries.weight.copy_(sides_first(mine.query.weight, H, side))
        theirs.keys.copy_(mine.keys.movedim(0, 2))
        theirs.values.weight.copy_(mine.values.table)
        return theirs

    return both("product-key-memory", build) if found else {}


def titans(D: int, H: int = 4) -> dict[str, Build]:
    """NeuralMemory of titans-pytorch with heads as ours and its MLP x4: as it comes, with the gradients of a whole call at the weights it began with, and
    with gradients anew every 64 tokens, as ours are. Its weights change every 64 tokens in both."""
    found = layer("titans-pytorch", "titans_pytorch", "NeuralMemory")

    def build(batch: int | None = None) -> nn.Module:
        return found(dim=D, heads=H, dim_head=D // H, chunk_size=64, batch_size=batch, qk_rmsnorm=True)

    name = f"titans-pytorch {importlib.metadata.version('titans-pytorch')}" if found else ""
    return {f"{name} NeuralMemory": build, f"{name} NeuralMemory, batch_size 64": lambda: build(64)} if found else {}


def pscan() -> dict[str, Call]:
    """mambapy's parallel scan, which has a state for every token, and what is read from them."""
    found = layer("mambapy", "mambapy.pscan", "pscan")

    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return (found((dt[..., None] * A).exp(), (dt * x)[..., None] * B[:, :, None]) @ C[..., None]).squeeze(-1)

    return {f"mambapy {importlib.metadata.version('mambapy')} pscan": scan} if found else {}


class Embedded(nn.Module):
    """A model of transformers from embeddings on: without a cache in training, with one when there is no gradient."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        out = self.model(inputs_embeds=x, cache_params=cache, use_cache=not torch.is_grad_enabled())
        return out.last_hidden_state, out.cache_params


def mamba(ours: Callable[[], LM], path: str) -> dict[str, Build]:
    """MambaModel of transformers with our weights and without kernels: its "loop" over tokens, or the scan of "mambapy"."""
    found = layer("transformers", "transformers", "MambaModel")
    if path == "mambapy" and not layer("mambapy", "mambapy.pscan", "pscan"):
        return {}

    def build() -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            save_transformers(ours(), folder)
            return Embedded(found.from_pretrained(folder, use_mambapy=path == "mambapy"))

    return {f"transformers {importlib.metadata.version('transformers')}, {path}": build} if found else {}


def sides_first(weight: Tensor, H: int, side: int) -> Tensor:
    """Of a map to queries: heads of two halves -> two halves of all heads."""
    return weight.view(H, 2, side, -1).transpose(0, 1).flatten(0, 2)
