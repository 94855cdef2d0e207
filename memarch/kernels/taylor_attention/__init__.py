"""Linear attention whose weights are the Taylor expansion of exp, as in Based (Arora et al. 2024, arXiv 2402.18668).

    w_tj = 1 + a + a^2/2                   a = q_t . k_j exactly: the caller scales
    numerator_t = sum_{j<=t} w_tj v_j      denominator_t = sum_{j<=t} w_tj      the caller divides; w >= 1/2 always

w is a product of features, w_tj = read(q_t) . write(k_j), so a state of constant size holds the past:

    write(k) = [1, k_i, k_i k_j for i <= j]      read(q) = [1, q_i, q_i q_j for i < j and q_i^2 / 2 for i = j, in the same order]
    S = sum_j write(k_j) [v_j, 1]^T              the last column is the normaliser

    B rows   T tokens   H heads   F key width   V value width   E = 1 + F + F (F + 1) / 2 features (153 for F = 16)
"""

from typing import Any

import torch
from torch import Tensor

from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle, triton_cannot
from memarch.kernels.taylor_attention import reference, torch_impl


def _triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from memarch.kernels.taylor_attention import triton_impl

    return triton_impl.taylor_attention(*args)


IMPLEMENTATIONS = {"reference": reference.taylor_attention, "torch": torch_impl.taylor_attention, "triton": _triton}
FLOPS = torch_impl.FLOPS
ORDER = (
    ("triton", "fused, parallel over tokens, on the matrix units"),
    ("torch", "one token, one square or chunks, with a hand-written backward: the product path without a GPU"),
)


def why_not(name: str, device_type: str, dtype: torch.dtype, F: int = 16, V: int = 64, here: Machine = NO_GPU) -> str | None:
    if not dtype.is_floating_point:
        return f"q, k and v must be floating point, they are {dtype}"
    if name != "triton":
        return None
    if device_type == "cuda" and dtype == torch.float64:
        return "it has no products in float64: use torch"
    return triton_cannot(device_type, here, transposes=False)


def pick(device_type: str, dtype: torch.dtype, F: int = 16, V: int = 64, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for q, k [.., F] and v [.., V] of this dtype, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, F, V, here._replace(interpreted=False)))


def features(F: int) -> int:
    """How many numbers a key of width F is stored under."""
    return 1 + F + F * (F + 1) // 2


def taylor_attention(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *, lengths: Tensor | None = None, impl: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B,T,H,F], v [B,T,H,V], state [B,H,E,V+1] or None (zeros), lengths [B] or None
    -> numerator [B,T,H,V], denominator [B,T,H] and the new state [B,H,E,V+1], all in float32 at least.

    Tokens at t >= lengths[b] change nothing, and their outputs are zero, the denominator too."""
    _check(q, k, v, state, lengths)
    here, shape = machine(v.device.type), (v.device.type, v.dtype, k.shape[-1], v.shape[-1])
    name = settle("taylor_attention", IMPLEMENTATIONS, impl, lambda n: why_not(n, *shape, here), lambda: pick(*shape, here))
    return IMPLEMENTATIONS[name](q, k, v, state, lengths)


def _check(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, lengths: Tensor | None) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"taylor_attention wants q, k [B,T,H,F] and v [B,T,H,V] with the same B, T, H; got {', '.join(str(list(x.shape)) for x in (q, k, v))}. "
            "Repeat shared heads before the call, e.g. with k.expand."
        )
    if q.shape[1] < 1:
        raise ValueError("taylor_attention needs at least one token (T >= 1); use lengths for rows without tokens")
    (B, _, H, F), V = k.shape, v.shape[-1]
    if state is not None and state.shape != (B, H, features(F), V + 1):
        raise ValueError(f"taylor_attention: state is [B,H,E,V+1] = {[B, H, features(F), V + 1]} (features first); got {list(state.shape)}")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"taylor_attention: lengths counts the real tokens of each row, [B] = [{B}]; got {list(lengths.shape)}")
