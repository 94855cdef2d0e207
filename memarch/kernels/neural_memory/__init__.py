"""Neural memory: weights that learn by gradient steps while they read. One op for Titans, TTT and the Omega rule.

    g_t = grad 1/2 | M'(k_t) - v_t |^2         M' = M_{t-1} (grad_point "exact"), or the memory at the start of its chunk ("chunk")
    S_t = e^{log_momentum_t} S_{t-1} - step_t g_t
    M_t = e^{log_decay_t} M_{t-1} + S_t
    o_t = M_t(q_t)                             neither q nor k is normalised here

    B rows   T tokens   H heads   K key width   V value width

`Memory` says what M is, `State` where its stream stands: a stream may be cut anywhere, also inside a chunk, and continues exactly.

    Titans, linear   Memory()                                                       grad_point="exact"
    Titans, MLP      Memory((W1, W2), post="ln", gain=g, bias=b)                    grad_point="chunk"
    TTT-Linear, MLP  the same with biases in the weights, log_decay 0, log_momentum None, and, as in its code, pull 1, 1/2, .. 1/chunk
    Omega rule       window=n: each step follows the gradients of the last n tokens of the chunk

Gradients at a chunk's start overshoot where keys are alike, for all of them mend the same error: one repeated key diverges at steps that the
exact form bears. `clip` bounds every write by clip step, and so S by clip step / (1 - eta), however large the error has grown.
"""

from typing import Any

import torch
from torch import Tensor

from memarch.kernels import native
from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle, triton_cannot
from memarch.kernels.neural_memory import cpp_impl, reference, torch_impl
from memarch.kernels.neural_memory.memory import ACTIVATIONS, DECAYS, POSTS, Form, Memory, State, fresh, is_linear, shapes, whole
from memarch.kernels.neural_memory.rest import push, read

__all__ = ["Memory", "State", "neural_memory", "push", "read", "start"]


def _triton(*args: Any) -> tuple[Tensor, State]:
    from memarch.kernels.neural_memory import triton_impl

    return triton_impl.neural_memory(*args)


IMPLEMENTATIONS = {"reference": reference.neural_memory, "torch": torch_impl.neural_memory, "cpp": cpp_impl.neural_memory, "triton": _triton}
FLOPS = torch_impl.FLOPS
ORDER = (
    ("triton", "in chunks, with the products and the inner gradients in the kernels; only what a memory carries goes one chunk after the other"),
    ("cpp", "as torch, but an MLP goes through its chunks in C++, a head at a time and out of the cache"),
    ("torch", "a linear memory by a triangular solve, an MLP in dual form, with hand-written backwards"),
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LINEAR, EXACT = Memory(), Form(None)


def why_not(
    name: str, device_type: str, dtype: torch.dtype, K: int = 64, V: int = 64, memory: Memory = LINEAR, form: Form = EXACT, here: Machine = NO_GPU
) -> str | None:
    if not dtype.is_floating_point:
        return f"q, k and v must be floating point, they are {dtype}"
    if name == "cpp":
        return native.cannot(device_type, dtype, here, DTYPES)
    if name != "triton":
        return None
    if device_type == "cuda" and dtype == torch.float64:
        return "it takes at most float32: use torch"
    if (why := triton_cannot(device_type, here, transposes=False)) is not None:
        return why
    from memarch.kernels.neural_memory import triton_impl

    return triton_impl.why_not(K, V, memory, form)


def pick(device_type: str, dtype: torch.dtype, K: int = 64, V: int = 64, memory: Memory = LINEAR, form: Form = EXACT, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for q, k [.., K] and v [.., V] of this dtype, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, K, V, memory, form, here._replace(interpreted=False)))


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Tensor | None,
    step: Tensor,
    state: State | None = None,
    *,
    memory: Memory = LINEAR,
    grad_point: str = "exact",
    chunk: int = 64,
    window: int = 1,
    clip: float | None = None,
    lengths: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, State]:
    """q, k [B,T,H,K], v [B,T,H,V]; log_decay and log_momentum (<= 0) and step [B,T,H], log_momentum None: no momentum; state None: the memory's
    start, at a chunk's start; lengths [B] or None -> o [B,T,H,V] in v's dtype and the new state, at least float32.

    chunk     tokens that take their gradients at the same weights, counted from the start of the stream; of no meaning to "exact"
    window    a step follows the gradients of so many last tokens, of this chunk
    clip      no token's gradient of a layer is longer than this; not for the exact form of a linear memory

    Tokens at t >= lengths[b] change nothing, and their outputs are zero."""
    form = Form(chunk if grad_point == "chunk" else None, window, clip, aligned=state is None or len(state.point) == 0)
    _check(q, k, v, {"log_decay": log_decay, "log_momentum": log_momentum, "step": step}, lengths)
    _check_memory(k, v, memory, grad_point, chunk, form)
    if state is not None:
        state = whole(state, v, form)
        _check_state(state, shapes(memory, k, v, log_momentum is not None, form))
    here, kind = machine(v.device.type), (v.device.type, v.dtype, k.shape[-1], v.shape[-1], memory, form)
    name = settle("neural_memory", IMPLEMENTATIONS, impl, lambda n: why_not(n, *kind, native.buildable(here)), lambda: pick(*kind, here))
    return IMPLEMENTATIONS[name](q, k, v, log_decay, log_momentum, step, state, memory, form, lengths)


def start(k: Tensor, v: Tensor, *, memory: Memory = LINEAR, momentum: bool = True, grad_point: str = "exact", chunk: int = 64, window: int = 1) -> State:
    """The state before the first token. Of k [B,T,H,K] and v [B,T,H,V] only shape, dtype and device matter; the rest is as for `neural_memory`."""
    form = Form(chunk if grad_point == "chunk" else None, window)
    _check_memory(k, v, memory, grad_point, chunk, form)
    return fresh(memory, k, v, momentum, form)


def _check(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor | None], lengths: Tensor | None) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"neural_memory wants q, k [B,T,H,K] and v [B,T,H,V] with the same B, T, H; got {', '.join(str(list(x.shape)) for x in (q, k, v))}")
    if q.shape[1] < 1:
        raise ValueError("neural_memory needs at least one token (T >= 1); use lengths for rows without tokens")
    for name, x in gates.items():
        if x is not None and x.shape != v.shape[:3]:
            raise ValueError(f"neural_memory: {name} is one number per token and head, [B,T,H] = {list(v.shape[:3])}; got {list(x.shape)}")
    if lengths is not None and lengths.shape != v.shape[:1]:
        raise ValueError(f"neural_memory: lengths counts the real tokens of each row, [B] = {list(v.shape[:1])}; got {list(lengths.shape)}")


def _check_memory(k: Tensor, v: Tensor, memory: Memory, grad_point: str, chunk: int, form: Form) -> None:
    only = "with grad_point='chunk' only"
    for name, known in (("activation", ACTIVATIONS), ("post", POSTS), ("decay_to", DECAYS)):
        if getattr(memory, name) not in known:
            raise ValueError(f"neural_memory: {name} is one of {', '.join(known)}; got {getattr(memory, name)!r}")
    if grad_point not in ("exact", "chunk"):
        raise ValueError(f"neural_memory: grad_point is one of exact, chunk; got {grad_point!r}")
    if chunk < 1 or form.window < 1 or (form.clip is not None and form.clip <= 0):
        raise ValueError(f"neural_memory: chunk and window are at least 1, clip is positive or None; got {chunk}, {form.window}, {form.clip}")
    if form.chunk is None and form.window > 1:
        raise ValueError(f"neural_memory: a window takes the gradients of many tokens at one memory, {only}")
    if form.chunk is None and form.clip is not None and is_linear(memory):
        raise ValueError(f"neural_memory: the exact form of a linear memory solves a linear system, which a clip is not part of: {only}")
    if memory.pull is not None and memory.pull.shape != (form.chunk,):
        raise ValueError(f"neural_memory: pull is one number for every place in a chunk, [{form.chunk}], {only}; got {list(memory.pull.shape)}")

    (H, K), V = k.shape[2:], v.shape[-1]
    width = K
    for l, W in enumerate(memory.weights):
        if W.ndim != 3 or W.shape[0] != H or W.shape[1] - width not in (0, 1):
            raise ValueError(f"neural_memory: weights[{l}] is [H, {width}, out], or [H, {width + 1}, out] with a bias, and H = {H}; got {list(W.shape)}")
        width = W.shape[2]
    if width != V and memory.weights:
        raise ValueError(f"neural_memory: the last layer's answers are {width} wide, the values are {V}")
    if memory.post != "none" and K != V:
        raise ValueError(f"neural_memory: post {memory.post!r} adds the key to the answer, so keys and values must be of one width, not {K} and {V}")
    for name, x, posts in (("gain", memory.gain, ("rms", "ln")), ("bias", memory.bias, ("ln",))):
        if x is not None and (memory.post not in posts or x.shape != (H, V)):
            raise ValueError(f"neural_memory: {name} is [H,V] = {[H, V]} and goes with post {' or '.join(posts)}; got {list(x.shape)} with {memory.post}")


def _check_state(state: State, wanted: tuple[list[tuple[int, ...]], ...]) -> None:
    got = tuple([tuple(x.shape) for x in (field if isinstance(field, tuple) else (field,))] for field in state)
    if got != wanted:
        told = ", ".join(f"{name} {x}" for name, x in zip(State._fields, wanted, strict=True))
        raise ValueError(f"neural_memory: the state of this memory has {told}; got {got}. `start` makes one for the same options.")
