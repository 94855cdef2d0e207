"""The (gated) delta rule: one op for Gated DeltaNet, DeltaNet, RetNet, Mamba-2's recurrence and linear attention.

    S_t = e^{g_t} S_{t-1} + k_t u_t^T      u_t = beta_t (v_t - e^{g_t} S_{t-1}^T k_t),  or v_t without beta
    o_t = S_t^T q_t                        scale 1; neither q nor k is normalised here

    B rows   T tokens   H heads   K key width   V value width

The state is held keys first, [K, V], and in float32 at least.
"""

from typing import Any

import torch
from torch import Tensor

from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle, triton_cannot
from memarch.kernels.delta_rule import reference, torch_impl


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from memarch.kernels.delta_rule import triton_impl

    return triton_impl.delta_rule(*args)


IMPLEMENTATIONS = {"reference": reference.delta_rule, "torch": torch_impl.delta_rule, "triton": _triton}
FLOPS = torch_impl.FLOPS
ORDER = (
    ("triton", "in chunks, each kernel parallel over all of them but for the two passes that carry the memory"),
    ("torch", "chunked, with a hand-written backward: the product path without a GPU"),
)


def why_not(name: str, device_type: str, dtype: torch.dtype, K: int = 64, V: int = 64, here: Machine = NO_GPU) -> str | None:
    if not dtype.is_floating_point:
        return f"q, k and v must be floating point, they are {dtype}"
    if name != "triton":
        return None
    if device_type == "cuda" and (dtype == torch.float64 or K > 256):
        return f"it takes keys of up to 256 numbers in at most float32, not {K} in {dtype}: use torch"
    return triton_cannot(device_type, here, transposes=False)


def pick(device_type: str, dtype: torch.dtype, K: int = 64, V: int = 64, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for q, k [.., K] and v [.., V] of this dtype, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, K, V, here._replace(interpreted=False)))


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k [B,T,H,K], v [B,T,H,V], beta [B,T,H] or None (nothing is erased), g [B,T,H] (log decay, <= 0) or None (no decay),
    state [B,H,K,V] or None (zeros), lengths [B] or None -> o [B,T,H,V] in v's dtype and the new state [B,H,K,V], at least float32.

    Tokens at t >= lengths[b] change nothing, and their outputs are zero."""
    _check(q, k, v, beta, g, state, lengths)
    here, shape = machine(v.device.type), (v.device.type, v.dtype, k.shape[-1], v.shape[-1])
    name = settle("delta_rule", IMPLEMENTATIONS, impl, lambda n: why_not(n, *shape, here), lambda: pick(*shape, here))
    return IMPLEMENTATIONS[name](q, k, v, beta, g, state, lengths)


def _check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, state: Tensor | None, lengths: Tensor | None) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"delta_rule wants q, k [B,T,H,K] and v [B,T,H,V] with the same B, T, H; got {_shapes(q, k, v)}. "
            "Repeat shared heads before the call, e.g. with k.expand."
        )
    if q.shape[1] < 1:
        raise ValueError("delta_rule needs at least one token (T >= 1); use lengths for rows without tokens")
    B, T, H, K = k.shape
    for name, x in (("beta", beta), ("g", g)):
        if x is not None and x.shape != (B, T, H):
            raise ValueError(f"delta_rule: {name} is one number per token and head, [B,T,H] = {[B, T, H]}; got {list(x.shape)}")
    if state is not None and state.shape != (B, H, K, v.shape[-1]):
        raise ValueError(f"delta_rule: state is [B,H,K,V] = {[B, H, K, v.shape[-1]]} (keys first); got {list(state.shape)}")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"delta_rule: lengths counts the real tokens of each row, [B] = [{B}]; got {list(lengths.shape)}")


def _shapes(*xs: Tensor) -> str:
    return ", ".join(str(list(x.shape)) for x in xs)
