"""What a model carries from token to token, in bytes."""

from typing import Any, NamedTuple

import torch

from memarch.state import nbytes


class StateSize(NamedTuple):
    bytes: int  # of one row: constant, or the most it can be, or (when it grows) before the first token
    per_token: int  # 0: the state is bounded; else what every further token adds


def state_size(model: Any) -> StateSize:
    """Found by feeding zeros; on the meta device that costs little. A state that grows up to a bound (the unfinished segment of a wrapper)
    is fed up to that bound."""
    mixer, dim = model.backbone, model.config.dim

    def after(tokens: int) -> int:
        x = torch.zeros(1, tokens, dim, device=model.device, dtype=model.embed.weight.dtype)
        with torch.no_grad():
            return by_letter(mixer, x, start) if mixer is model.core else nbytes(mixer(x, start).state)

    start = model.start(1)
    empty, bound = nbytes(start), mixer.grows()
    if bound == 0:
        return StateSize(empty, 0)
    one = after(mixer.every)
    if bound is None:
        return StateSize(empty, (one - empty) // mixer.every)
    return StateSize(empty if one == empty else max(one, after(max(1, bound - 1))), 0)


def by_letter(backbone: Any, x: Any, state: Any) -> int:
    """Bytes of the state after x. Blocks of one letter are alike, and a size does not depend on what is fed: each letter is run once."""
    pattern, notes, found = backbone.cfg.pattern, dict[str, Any](), dict[str, int]()
    for i, block in enumerate(backbone.blocks):
        letter = pattern[i % len(pattern)]
        if letter not in found:
            mixed, _ = block(x, state[i], notes, None)
            found[letter] = nbytes(mixed.state)
            notes |= {name: (*notes.get(name, ()), note) for name, note in mixed.note.items()}
    return sum(found[pattern[i % len(pattern)]] for i in range(len(backbone.blocks)))
