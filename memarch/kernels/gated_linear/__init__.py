"""Linear attention whose memory forgets by the key channel: GLA and its kin.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T      g_t [K], every entry <= 0
    o_t = S_t^T q_t                              scale 1; neither q nor k is normalised here

    B rows   T tokens   H heads   K key width   V value width

The state is held keys first, [K, V], and in float32 at least. With one decay for a whole head `delta_rule` without beta is the faster op.
"""

from typing import Any

import torch
from torch import Tensor

from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle, triton_cannot
from memarch.kernels.gated_linear import reference, torch_impl


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from memarch.kernels.gated_linear import triton_impl

    return triton_impl.gated_linear(*args)


IMPLEMENTATIONS = {"reference": reference.gated_linear, "torch": torch_impl.gated_linear, "triton": _triton}
FLOPS = torch_impl.FLOPS
ORDER = (
    ("triton", "in chunks, each kernel parallel over all of them but for the pass that carries the memory"),
    ("torch", "chunked by halves, with a hand-written backward: the product path without a GPU"),
)


def why_not(name: str, device_type: str, dtype: torch.dtype, K: int = 64, V: int = 64, here: Machine = NO_GPU) -> str | None:
    if not dtype.is_floating_point:
        return f"q, k and v must be floating point, they are {dtype}"
    if name != "triton":
        return None
    if device_type == "cuda" and dtype == torch.float64:
        return "on a GPU it takes at most float32: use torch for float64"
    return triton_cannot(device_type, here, transposes=False)


def pick(device_type: str, dtype: torch.dtype, K: int = 64, V: int = 64, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for q, k [.., K] and v [.., V] of this dtype, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, K, V, here._replace(interpreted=False)))


def gated_linear(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None = None, *, lengths: Tensor | None = None, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """q, k [B,T,H,K], v [B,T,H,V], g [B,T,H,K] (log decay, <= 0), state [B,H,K,V] or None (zeros), lengths [B] or None
    -> o [B,T,H,V] in v's dtype and the new state [B,H,K,V], at least float32.

    Tokens at t >= lengths[b] change nothing, and their outputs are zero."""
    _check(q, k, v, g, state, lengths)
    here, shape = machine(v.device.type), (v.device.type, v.dtype, k.shape[-1], v.shape[-1])
    name = settle("gated_linear", IMPLEMENTATIONS, impl, lambda n: why_not(n, *shape, here), lambda: pick(*shape, here))
    return IMPLEMENTATIONS[name](q, k, v, g, state, lengths)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, lengths: Tensor | None) -> None:
    if q.ndim != 4 or not q.shape == k.shape == g.shape or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"gated_linear wants q, k, g [B,T,H,K] and v [B,T,H,V] with the same B, T, H; got {', '.join(str(list(x.shape)) for x in (q, k, g, v))}. "
            "One decay for a whole head, g [B,T,H], is what delta_rule takes."
        )
    if q.shape[1] < 1:
        raise ValueError("gated_linear needs at least one token (T >= 1); use lengths for rows without tokens")
    (B, _, H, K), V = k.shape, v.shape[-1]
    if state is not None and state.shape != (B, H, K, V):
        raise ValueError(f"gated_linear: state is [B,H,K,V] = {[B, H, K, V]} (keys first); got {list(state.shape)}")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"gated_linear: lengths counts the real tokens of each row, [B] = [{B}]; got {list(lengths.shape)}")
