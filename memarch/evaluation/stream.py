"""A model over rows of any length: fed in chunks, the state carried, nothing kept but one hit and one loss per position.

By the first law (pieces equal the whole) the numbers are those of one call; only the memory differs, and it does not depend on the length.

    B rows   T positions   V vocabulary
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memarch import state as states

CHUNK = 2048
LOGITS = 2**25  # elements of logits that exist at once: 128 MiB in fp32


class Scores(NamedTuple):
    hit: Tensor  # bool [B, T], on the CPU: the arg max is the target
    nats: Tensor  # fp32 [B, T], on the CPU: minus the log-probability of the target; 0 where nothing is scored


@contextmanager
def quiet(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def score(model: Any, tokens: Tensor, targets: Tensor, lengths: Tensor | None = None, chunk: int | None = None) -> Scores:
    """tokens, targets [B, T], -100 unscored; lengths [B] as in the contract. A row that has ended is dropped from the batch and from the state."""
    B, T = tokens.shape
    device = next(model.parameters()).device
    if chunk is None:
        chunk = max(1, min(CHUNK, LOGITS // (B * model.config.vocab_size)))
    hit, nats = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T)
    rows, state = torch.arange(B), None  # the rows still running
    with quiet(model):
        for begin in range(0, T, chunk):
            end, left = min(begin + chunk, T), None
            if lengths is not None:
                running = lengths[rows] > begin
                if not running.any():
                    break
                if not running.all():
                    keep = running.nonzero().squeeze(1)
                    rows, state = rows[keep], None if state is None else states.take(state, keep)
                left = (lengths[rows] - begin).clamp(max=end - begin).to(device)
            output = model(tokens[rows, begin:end].to(device), state, lengths=left)
            state = output.state
            want = targets[rows, begin:end].to(device)
            asked = want != -100
            logits, want = output.logits[asked].float(), want[asked]
            where = asked.cpu()
            here, found = hit[rows, begin:end], nats[rows, begin:end]
            here[where], found[where] = (logits.argmax(-1) == want).cpu(), F.cross_entropy(logits, want, reduction="none").cpu()
            hit[rows, begin:end], nats[rows, begin:end] = here, found
    return Scores(hit, nats)
