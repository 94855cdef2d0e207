"""The neural memory, token by token, to hold against the paper (Titans, arXiv 2501.00663, equations 10 to 15).

    g_t = grad 1/2 | M'(k_t) - v_t |^2      the surprise; M' is M_{t-1} (exact), or the memory at the start of the chunk of C tokens
    S_t = eta_t S_{t-1} - theta_t g_t       momentum: past surprise and momentary surprise
    M_t = a_t M_{t-1} + S_t                 forget and write;  a_t M_{t-1} + (1 - a_t) M_0 + S_t  where it decays to its start
    o_t = M_t(q_t)                          read, after the write

log_decay = log a, log_momentum = log eta, step = theta; S and M have one matrix for every layer of the memory, with the same three gates.
With a window of n (the Omega rule of Atlas, arXiv 2505.23735) g_t is the sum over the last n tokens of the chunk, all taken at M'.

    B rows   T tokens   H heads   K key width   V value width
"""

import torch
from torch import Tensor

from memarch.kernels.autocast import exact
from memarch.kernels.neural_memory.inner import Net, answer, clipped, gradient
from memarch.kernels.neural_memory.memory import Form, Memory, State, fresh

Maybe = Tensor | None


@exact
def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Maybe,
    step: Tensor,
    state: State | None,
    memory: Memory,
    form: Form,
    lengths: Maybe,
) -> tuple[Tensor, State]:
    (B, T), (chunk, window, clip, _), momentum = v.shape[:2], form, log_momentum is not None
    dtype = torch.promote_types(v.dtype, torch.float32)
    begin = fresh(memory, k, v, momentum, form) if state is None else state
    w, s, point, recent = ([x.to(dtype) for x in xs] for xs in (begin.weights, begin.momentum, begin.point, begin.recent or (k[:, :0], v[:, :0])))
    place = begin.place
    init = [x.to(dtype) for x in memory.weights] if memory.decay_to == "init" else []
    gain, bias = (None if x is None else x.to(dtype)[:, None] for x in (memory.gain, memory.bias))
    net = Net(memory.activation, memory.post, gain, bias, clip)
    outs = []
    for t in range(T):
        real = _rows(torch.ones(B, dtype=torch.bool, device=v.device) if lengths is None else t < lengths)
        qt, *now = (x[:, t : t + 1].to(dtype).masked_fill(~real, 0) for x in (q, k, v))  # [B, 1, H, .]
        a, theta = log_decay[:, t].to(dtype)[..., None, None].masked_fill(~real, 0).exp(), step[:, t].to(dtype)[..., None, None].masked_fill(~real, 0)

        last = [torch.cat(pair, 1) for pair in zip(recent, now, strict=True)]  # [B, window, H, .], this token the newest
        recent = [torch.where(real, x[:, 1:], r) for x, r in zip(last, recent, strict=True)]
        keys, values = (x.transpose(1, 2) for x in last)
        write = gradient(point if chunk else w, keys, values, net)
        d = [clipped(x, y, clip) for x, y in zip(write.x, write.d, strict=True)]
        if window > 1:
            inside = torch.arange(window - 1, -1, -1, device=v.device) <= place[:, None]  # [B, window]: of this chunk
            d = [x * inside[:, None, :, None] for x in d]
        surprise = [-theta * (x.mT @ y) for x, y in zip(write.x, d, strict=True)]

        if log_momentum is not None:
            eta = log_momentum[:, t].to(dtype)[..., None, None].masked_fill(~real, 0).exp()
            s = surprise = [eta * x + y for x, y in zip(s, surprise, strict=True)]
        kept = [a * x for x in w] if not init else [a * x + (1 - a) * x0 for x, x0 in zip(w, init, strict=True)]
        seen = w = [torch.where(real, x + y, old) for x, y, old in zip(kept, surprise, w, strict=True)]
        if memory.pull is not None:
            pull = _rows(memory.pull.to(dtype)[place])
            seen = [p + pull * (x - p) for x, p in zip(w, point, strict=True)]
        outs.append((answer(seen, qt.transpose(1, 2), net).transpose(1, 2) * real).to(v.dtype))

        if chunk:
            place = place + real.flatten()
            done = _rows(place == chunk)
            w = [torch.where(done, y, x) for x, y in zip(w, seen, strict=True)]
            point = [torch.where(done, x, p) for x, p in zip(w, point, strict=True)]
            place = place % chunk

    new = State(tuple(w), tuple(s), tuple(point), place, tuple(recent) if window > 1 else ())
    return torch.cat(outs, 1), State(*(tuple(x.clone() for x in xs) if isinstance(xs, tuple) else xs.clone() for xs in new))


def _rows(x: Tensor) -> Tensor:
    return x[:, None, None, None]
