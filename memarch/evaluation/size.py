"""What a model carries from token to token, in bytes."""

from typing import Any, NamedTuple

import torch

from memarch.state import nbytes


class StateSize(NamedTuple):
    bytes: int  # of one row: constant, or the most it can be, or (when it grows) before the first token
    per_token: int  # 0: the state is bounded; else what every further token adds


def state_size(model: Any) -> StateSize:
    """Found by feeding zeros; on the meta device that costs little. A state that grows up to a bound (the unfinished segment of a wrapper)
    is fed up to that bound. Blocks of one letter are alike, and a size does not depend on what is fed: each letter is run once."""
    mixer, x = model.backbone, torch.zeros(1, 1, model.config.dim, device=model.device, dtype=model.embed.weight.dtype)
    with torch.no_grad():
        if mixer is model.core:
            blocks, pattern = mixer.blocks, mixer.cfg.pattern
            letters = {letter: pattern.index(letter) for letter in pattern}
            many = {letter: len(blocks) // len(pattern) * pattern.count(letter) for letter in letters}
            start = {letter: blocks[i].start(1) for letter, i in letters.items()}
            empty = sum(many[letter] * nbytes(state) for letter, state in start.items())
        else:
            start = mixer.start(1)
            empty = nbytes(start)

        def after(tokens: int) -> int:
            wide = x.expand(-1, tokens, -1)
            if mixer is not model.core:
                return nbytes(mixer(wide, start).state)
            size, notes = 0, dict[str, Any]()
            for letter, i in letters.items():
                mixed, _ = blocks[i](wide, start[letter], notes, None)
                size += many[letter] * nbytes(mixed.state)
                notes |= {name: (*notes.get(name, ()), note) for name, note in mixed.note.items()}
            return size

        bound = mixer.grows()
        if bound == 0:
            return StateSize(empty, 0)
        one = after(mixer.every)
        if bound is None:
            return StateSize(empty, (one - empty) // mixer.every)
        return StateSize(empty if one == empty else max(one, after(max(1, bound - 1))), 0)
