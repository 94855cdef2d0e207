"""The one backbone and the one language model.

block:     x += mixer(norm x);  x += ffn(norm x)
backbone:  blocks by pattern, branches between them, a final norm; it is a sequence mixer itself, so wrappers take it
model:     embed, backbone (wrapped or not), head

B rows   T tokens   D width   V vocabulary
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memarch import state as states
from memarch.config import ConfigError, allowed, initialise, require
from memarch.contracts import EMPTY, LMOutput, LossOutput, Mixed, Notes, SequenceMixer, State, last, under
from memarch.layers import ChannelConfig, MixerConfig, PoolConfig, ValuePool
from memarch.layers.parts import Linear, RMSNorm, normal_
from memarch.models.packing import run_packed
from memarch.wrappers import WrapperConfig

LOGITS = 2**25  # elements of logits that exist at once in the loss: 128 MiB in fp32


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    mixer: MixerConfig | None = None
    ffn: ChannelConfig | None = None

    def __post_init__(self) -> None:
        require(self.mixer is not None or self.ffn is not None, "a part needs a mixer, an ffn, or both.")


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """A channel mixer beside the blocks: it reads one block's normalised feed-forward input and is added after the same or a later block."""

    reads: int
    adds: int
    layer: ChannelConfig


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    vocab_size: int = 256
    dim: int = 128
    layers: int = 2
    pattern: str = "A"  # a letter a block; a shorter one repeats
    parts: dict[str, BlockConfig] = field(default_factory=dict)
    pools: dict[str, PoolConfig] = field(default_factory=dict)  # tables that several layers share
    branches: tuple[BranchConfig, ...] = ()
    wrap: tuple[WrapperConfig, ...] = ()  # outermost last
    tie: bool = True  # the head is the embedding
    embed: Literal["tokens", "linear"] = "tokens"
    head: Literal["tokens", "regression"] = "tokens"
    inputs: int | None = None  # width of continuous inputs, for embed "linear"
    outputs: int | None = None  # width of continuous outputs, for head "regression"
    norm_eps: float = 1e-6
    trace: bool = False  # post every block's output as the note "trace"

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "vocab_size"):
            require(getattr(self, name) > 0, f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in self.pools:
            free = name.isidentifier() and not hasattr(nn.ModuleDict, name)
            require(free, f"pool {name!r}: a pool's name is a plain word, and this one is taken or none (as keys, values, items are). Choose another.")
        for letter in self.parts:
            require(len(letter) == 1, f"a part is named by one letter, got {letter!r}.")
        for letter in self.pattern:
            require(letter in self.parts, f"pattern {self.pattern!r}: {allowed('part', letter, self.parts)}")
        size = len(self.pattern)
        require(size > 0, "pattern is empty; it needs a letter a block, or a shorter string that repeats.")
        require(
            self.layers % size == 0,
            f"pattern {self.pattern!r} has {size} letters and layers is {self.layers}: give {self.layers} letters, or a number that divides it.",
        )
        for i, branch in enumerate(self.branches):
            good = 0 <= branch.reads <= branch.adds < self.layers
            require(good, f"branches[{i}]: need 0 <= reads <= adds < layers ({self.layers}), got reads {branch.reads}, adds {branch.adds}.")
            require(self.block(branch.reads).ffn is not None, f"branches[{i}]: block {branch.reads} has no ffn, so there is nothing to read.")
        tokens = self.embed == "tokens" and self.head == "tokens"
        require(not self.tie or tokens, "tie shares the token embedding with the token head; set tie: false for continuous inputs or outputs.")
        require(self.embed == "tokens" or (self.inputs or 0) > 0, "embed 'linear' needs inputs, the width of what comes in.")
        require(self.head == "tokens" or (self.outputs or 0) > 0, "head 'regression' needs outputs, the width of what goes out.")

    def block(self, i: int) -> BlockConfig:
        return self.parts[self.pattern[i % len(self.pattern)]]

    def _count(self, active: bool) -> int:
        def size(layer: Any) -> int:
            return (layer.active_params(self.dim) if active else layer.num_params(self.dim)) if layer is not None else 0

        blocks = [self.block(i) for i in range(self.layers)]
        total = sum(size(b.mixer) + size(b.ffn) + self.dim * ((b.mixer is not None) + (b.ffn is not None)) for b in blocks)
        total += self.dim + sum(size(b.layer) for b in self.branches) + sum(w.num_params(self.dim) for w in self.wrap)
        total += 0 if active else sum(p.num_params(self.dim) for p in self.pools.values())
        total += self.vocab_size * self.dim if self.embed == "tokens" else ((self.inputs or 0) + 1) * self.dim
        if self.head == "regression":
            return total + (self.dim + 1) * (self.outputs or 0)
        return total + (0 if self.tie else self.vocab_size * self.dim)

    def num_params(self) -> int:
        return self._count(active=False)

    def active_params(self) -> int:
        """What one token touches: tables of sparse memories count by the rows read."""
        return self._count(active=True)


class Block(nn.Module):
    def __init__(self, cfg: LMConfig, i: int, pools: Mapping[str, nn.Module]):
        super().__init__()
        part = cfg.block(i)
        self.norm1: Any = RMSNorm(cfg.dim, cfg.norm_eps) if part.mixer is not None else None
        self.mixer: Any = part.mixer.make(cfg.dim, pools) if part.mixer is not None else None
        self.norm2: Any = RMSNorm(cfg.dim, cfg.norm_eps) if part.ffn is not None else None
        self.ffn: Any = part.ffn.make(cfg.dim, pools) if part.ffn is not None else None

    def init_(self, depth: int, generator: torch.Generator) -> None:
        for norm in (self.norm1, self.norm2):
            if norm is not None:
                norm.init_()
        for layer in (self.mixer, self.ffn):
            if layer is not None:
                layer.init_(depth, generator)

    def start(self, batch: int) -> State:
        return () if self.mixer is None else self.mixer.start(batch)

    def forward(self, x: Tensor, state: State | None, below: Notes, lengths: Tensor | None) -> tuple[Mixed, Tensor]:
        """The block's answer, and the normalised input of its feed-forward, which branches read."""
        mixer = self.mixer
        if mixer is None:
            return self._feed(x, Mixed(x, ()))
        h = mixer(self.norm1(x), state, below=below, lengths=lengths)
        return self._feed(x + h.y, h)

    def last(self, x: Tensor, state: State | None, below: Notes, lengths: Tensor | None) -> tuple[Mixed, Tensor]:
        """The same of each row's last token."""
        if self.mixer is None:
            return self._feed(last(x, lengths), Mixed(x, ()))
        h = self.mixer.last(self.norm1(x), state, below=below, lengths=lengths)
        return self._feed(last(x, lengths) + h.y, h)

    def _feed(self, x: Tensor, h: Mixed) -> tuple[Mixed, Tensor]:
        aux, z, ffn = under("mixer", h.aux), x, self.ffn
        if ffn is not None:
            z = self.norm2(x)
            fed = ffn(z)
            x = x + fed.y
            aux |= under("ffn", fed.aux)
        return Mixed(x, h.state, aux, h.note), z


class Backbone(SequenceMixer):
    """Blocks, branches and a final norm."""

    def __init__(self, cfg: LMConfig):
        super().__init__()
        self.cfg = cfg
        self.writes = ("trace",) if cfg.trace else ()
        pools = {name: p.make(cfg.dim) for name, p in cfg.pools.items()}
        self.pools = nn.ModuleDict(pools)
        blocks = []
        posted: set[str] = set()
        for i in range(cfg.layers):
            with _named(f"block {i} ({cfg.pattern[i % len(cfg.pattern)]!r})"):
                block = Block(cfg, i, pools)
                for name in getattr(block.mixer, "reads", ()):
                    require(name in posted, f"it reads the note {name!r}, which no block below writes (written so far: {', '.join(sorted(posted)) or 'none'}).")
                posted |= set(getattr(block.mixer, "writes", ()))
            blocks.append(block)
        self.blocks: Any = nn.ModuleList(blocks)
        self.branches = nn.ModuleList(b.layer.make(cfg.dim, pools) for b in cfg.branches)
        self.norm = RMSNorm(cfg.dim, cfg.norm_eps)
        self.recompute = False  # True: keep only block inputs and compute the rest again in the backward

    def init_(self, depth: int, generator: torch.Generator) -> None:
        # Each block draws from a generator of its own, so that changing one layer leaves the others' weights as they were.
        for module in (*self.pools.values(), *self.blocks, *self.branches):
            own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
            module.init_(own) if isinstance(module, ValuePool) else module.init_(depth, own)
        self.norm.init_()

    def grows(self) -> int | None:
        spans = [block.mixer.grows() for block in self.blocks if block.mixer is not None]
        return None if None in spans else max((s for s in spans if s is not None), default=0)

    def start(self, batch: int) -> State:
        return tuple(block.start(batch) for block in self.blocks)

    def forward(self, x: Tensor, state: State | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        return self._run(x, state, below, lengths)

    def last(self, x: Tensor, state: State | None = None, *, below: Notes = EMPTY, lengths: Tensor | None = None) -> Mixed:
        """A mixer without a state looks at one position, of x and of its notes, as a feed-forward does; so from the last mixer on that has a state each
        row goes on with one token."""
        stateful = (i for i in reversed(range(len(self.blocks))) if states.rows(self.blocks[i].start(1)) is not None)
        return self._run(x, state, below, lengths, top=next(stateful, 0))

    def _run(self, x: Tensor, state: State | None, below: Notes, lengths: Tensor | None, top: int | None = None) -> Mixed:
        """top: the last block that is asked with all tokens; None for all of them."""
        notes = dict(below)
        aux: dict[str, Tensor] = {}
        new, outputs = [], []
        pending: dict[int, list[Tensor]] = {}
        branches = list(zip(self.cfg.branches, self.branches, strict=True))
        for i, block in enumerate(self.blocks):
            given = None if state is None else state[i]
            run = block.last if i == top else block
            if self.recompute and torch.is_grad_enabled():
                h, z = checkpoint(run, x, given, notes, lengths, use_reentrant=False)
            else:
                h, z = run(x, given, notes, lengths)
            x = h.y
            for name, note in h.note.items():
                notes = {**notes, name: (*notes.get(name, ()), note)}
            if i == top:
                needed = {name for above in self.blocks[i + 1 :] for name in getattr(above.mixer, "reads", ())}
                notes = {name: tuple(note.last(lengths) for note in notes[name]) for name in needed}
                pending = {adds: [last(y, lengths) for y in ys] for adds, ys in pending.items()}
                lengths = None
            for b, (branch, layer) in enumerate(branches):
                if branch.reads == i:
                    fed = layer(z)
                    pending.setdefault(branch.adds, []).append(fed.y)
                    aux |= under(f"branches.{b}", fed.aux)
            for y in pending.pop(i, ()):
                x = x + y
            new.append(h.state)
            aux |= under(f"blocks.{i}", h.aux)
            outputs.append(x)
        return Mixed(self.norm(x), tuple(new), aux, {"trace": tuple(outputs)} if self.cfg.trace else EMPTY)


class _named:
    """Says which block a config error is about."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ConfigError):
            raise ConfigError(f"{self.where}: {error}") from None


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: init_ fills."""


class LM(nn.Module):
    """A sequence model: `model(tokens)` gives logits, state and aux; `model(tokens, state)` goes on where a call stopped.

    `LM(config)` is initialised from a seed; under `torch.device("meta")` nothing is computed, and `init_` fills it after `to_empty`."""

    def __init__(self, config: LMConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim) if config.embed == "tokens" else Linear(config.inputs or 0, config.dim, bias=True)
        backbone: SequenceMixer = Backbone(config)
        for wrapper in config.wrap:
            backbone = wrapper.wrap(backbone, config.dim)
        self.backbone = backbone
        if config.head == "regression":
            self.head: nn.Module = Linear(config.dim, config.outputs or 0, bias=True)
        else:
            self.head = Linear(config.dim, config.vocab_size)
            if config.tie:
                self.retie()
        self._like: tuple[torch.dtype, State, tuple[bool, ...]] | None = None  # what a state of this model looks like
        initialise(self, config.layers, seed)

    def retie(self) -> None:
        """One parameter for embedding and head; loading and materialising must call this again."""
        if self.config.tie:
            self.head.weight = self.embed.weight

    def init_(self, depth: int, generator: torch.Generator) -> None:
        if isinstance(self.head, Linear) and not self.config.tie:
            self.head.init_(generator)
        if isinstance(self.embed, Embedding):
            normal_(self.embed.weight, 0.02, generator)
        else:
            self.embed.init_(generator)
        self.backbone.init_(depth, generator)

    @property
    def core(self) -> Backbone:
        """The backbone inside all wrappers."""
        inner: Any = self.backbone
        while not isinstance(inner, Backbone):
            inner = inner.inner
        return inner

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def start(self, batch: int) -> State:
        return self.backbone.start(batch)

    def features(self, tokens: Tensor, state: State | None = None, *, starts: Tensor | None = None, lengths: Tensor | None = None) -> Mixed:
        """What the head reads. tokens [B, T] (or [B, T, inputs]); starts [B, T] bool: a packed document begins here; lengths [B]."""
        if not torch.compiler.is_compiling():
            self._check(tokens, state, lengths)
        x = self.embed(tokens)
        if starts is None:
            return self.backbone(x, state, lengths=lengths)
        return run_packed(self.backbone, x, state, starts, lengths)

    def forward(self, tokens: Tensor, state: State | None = None, *, starts: Tensor | None = None, lengths: Tensor | None = None) -> LMOutput:
        h = self.features(tokens, state, starts=starts, lengths=lengths)
        return LMOutput(self.head(h.y), h.state, h.aux)

    def prefill(self, tokens: Tensor, state: State | None = None, *, lengths: Tensor | None = None) -> LMOutput:
        """`forward` of a prompt: the same state, and the logits [B, 1, V] of each row's last real token (of a row without one they mean nothing). What
        lies above the last memory runs for that token alone: of SambaY and YOCO half of the blocks. No aux, which would speak of those tokens."""
        if not torch.compiler.is_compiling():
            self._check(tokens, state, lengths)
        x = self.embed(tokens)
        h = self.backbone.last(x, state, lengths=lengths)
        return LMOutput(self.head(h.y), h.state)

    def loss(self, tokens: Tensor, targets: Tensor, state: State | None = None, *, starts: Tensor | None = None, lengths: Tensor | None = None) -> LossOutput:
        """Sums over the targets that are not -100 or, in a regression, hold no NaN. Head and cross entropy run over pieces, so the logits of a long batch
        never exist at once."""
        h = self.features(tokens, state, starts=starts, lengths=lengths)
        if self.config.head == "regression":
            asked = ~targets.isnan().any(-1)  # [B, T]
            if lengths is not None:
                asked &= torch.arange(asked.shape[1], device=asked.device) < lengths[:, None]
            error = (self.head(h.y) - targets.nan_to_num()).square().mean(-1)
            return LossOutput(torch.where(asked, error, 0).sum(), error.new_zeros(()), asked.sum(), h.state, h.aux)
        y, flat = h.y.flatten(0, 1), targets.flatten()
        rows = max(256, LOGITS // self.config.vocab_size)
        pieces = list(zip(y.split(rows), flat.split(rows), strict=True))
        again = len(pieces) > 1 and torch.is_grad_enabled()
        sums = [checkpoint(self._score, a, b, use_reentrant=False) if again else self._score(a, b) for a, b in pieces]
        loss, correct = (torch.stack(part).sum() for part in zip(*sums, strict=True))
        return LossOutput(loss, correct, (flat != -100).sum(), h.state, h.aux)

    def _score(self, y: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(y)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"), (logits.detach().argmax(-1) == targets).sum()

    def _check(self, tokens: Tensor, state: State | None, lengths: Tensor | None) -> None:
        """What a user can get wrong, said before anything runs. Values are looked at on the CPU only: on a GPU that would wait for the device."""
        want = 2 if self.config.embed == "tokens" else 3
        if tokens.ndim != want or tokens.shape[1] < 1:
            raise ValueError(f"expected {'tokens [B, T]' if want == 2 else 'inputs [B, T, inputs]'} with T >= 1, got shape {list(tokens.shape)}.")
        if self.config.embed == "tokens" and tokens.device.type == "cpu" and tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"token id {bad} is out of range: this model knows 0 to {self.config.vocab_size - 1} (vocab_size {self.config.vocab_size}).")
        if (
            lengths is not None
            and lengths.device.type == "cpu"
            and (lengths.shape != tokens.shape[:1] or int(lengths.min()) < 0 or int(lengths.max()) > tokens.shape[1])
        ):
            raise ValueError(f"lengths must be {tokens.shape[0]} numbers between 0 and T = {tokens.shape[1]}, got {lengths.tolist()}.")
        if state is not None:
            if self._like is None or self._like[0] != self.embed.weight.dtype:
                with torch.no_grad():
                    like = states.to(self.start(1), "meta")
                self._like = (self.embed.weight.dtype, like, states.growing(self.backbone, self.config.dim))
            states.check(state, *self._like[1:], tokens.shape[0])

    # Doors to the Hub and to generation; the work is done there, and imported only when a door is opened.

    def save_pretrained(self, folder: Any, **kwargs: Any) -> Any:
        from memarch.hub import save_pretrained

        return save_pretrained(self, folder, **kwargs)

    @classmethod
    def from_pretrained(cls, name: Any, **kwargs: Any) -> "LM":
        from memarch.hub import from_pretrained

        return from_pretrained(name, **kwargs)

    def push_to_hub(self, repo: str, **kwargs: Any) -> Any:
        from memarch.hub import push_to_hub

        return push_to_hub(self, repo, **kwargs)

    def generate(self, prompts: Any, **kwargs: Any) -> Any:
        from memarch.generation import generate

        return generate(self, prompts, **kwargs)
