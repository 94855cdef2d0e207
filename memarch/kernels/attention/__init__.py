"""Banded causal softmax attention: full or windowed, with history, grouped heads, sinks and ALiBi.

    o_t = sum_j softmax_j(scale q_t . k_j - slope_h (i - p_j)) v_j      over the keys j that query t, at position i, sees

The last T rows of k and v belong to the queries, the S - T before them are history, newest last. Key row j is seen by query t iff
j <= t + (S-T), t + (S-T) - j < window, and the row is real: pos[b] is the position of query 0, so row j stands at pos - (S-T) + j, which must
be >= 0. The first P positions of the stream can be given as sinks: slot s is seen iff s <= pos + t, and band rows at positions < P are
hidden so that nothing counts twice.

    B rows   T queries   S keys   H query heads   G key heads (head h reads h // (H/G))   D key width   V value width   P sinks
"""

import torch
from torch import Tensor

from memarch.kernels.attention import flash_impl, reference, torch_impl
from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle

IMPLEMENTATIONS = {"reference": reference.attention, "torch": torch_impl.attention, "flash": flash_impl.attention}
ORDER = (("flash", "flash-attn imports and its probe call worked"), ("torch", "scaled_dot_product_attention, in blocks for a window"))
FLASH_MAX_WIDTH = 256
Sink = tuple[Tensor, Tensor] | None


def why_not(name: str, device_type: str, dtype: torch.dtype, D: int = 64, V: int = 64, rows: bool = False, here: Machine = NO_GPU) -> str | None:
    """`rows`: pos or sinks are given, so that what is visible differs from row to row."""
    if not dtype.is_floating_point:
        return f"q, k and v must be floating point, they are {dtype}"
    if name != "flash":
        return None
    if device_type != "cuda":
        return f"flash-attn needs a CUDA device, the tensors are on {device_type}"
    if here.flash is not None:
        return here.flash
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if D > FLASH_MAX_WIDTH or D != V:
        return f"flash-attn wants keys and values of one width <= {FLASH_MAX_WIDTH}, got {D} and {V}"
    return "flash-attn has no per-row positions and no sinks" if rows else None


def pick(device_type: str, dtype: torch.dtype, D: int = 64, V: int = 64, rows: bool = False, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for keys of width D and values of width V of this dtype, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, D, V, rows, here))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pos: Tensor | None = None,
    window: int | None = None,
    sink: Sink = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """q [B,T,H,D], k [B,S,G,D], v [B,S,G,V], pos [B] int64 or None (every row is real), window >= 1 or None (all), sink = (sk [B,P,G,D],
    sv [B,P,G,V]) or None, slopes [H] or None, scale (default D**-0.5) -> o [B,T,H,V]."""
    _check(q, k, v, pos, window, sink, slopes)
    q, k, v, sink = _autocast(q, k, v, sink)
    rows = pos is not None or sink is not None
    here, shape = machine(q.device.type), (q.device.type, q.dtype, q.shape[-1], v.shape[-1], rows)
    name = settle("attention", IMPLEMENTATIONS, impl, lambda n: why_not(n, *shape, here), lambda: pick(*shape, here))
    return IMPLEMENTATIONS[name](q, k, v, pos, window, sink, slopes, q.shape[-1] ** -0.5 if scale is None else scale)


def _autocast(q: Tensor, k: Tensor, v: Tensor, sink: Sink) -> tuple[Tensor, Tensor, Tensor, Sink]:
    """What autocast does at scaled_dot_product_attention, done before choosing: flash-attn takes no float32."""
    kind = q.device.type
    if q.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return q, k, v, sink
    low = torch.get_autocast_dtype(kind)
    return q.to(low), k.to(low), v.to(low), None if sink is None else (sink[0].to(low), sink[1].to(low))


def _check(q: Tensor, k: Tensor, v: Tensor, pos: Tensor | None, window: int | None, sink: Sink, slopes: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention wants q [B,T,H,D], k [B,S,G,D] and v [B,S,G,V]; got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    (B, T, H, D), (S, G) = q.shape, k.shape[1:3]
    if T < 1 or S < T:
        raise ValueError(f"attention: the last T rows of k are the queries' own, so S >= T >= 1; got S = {S}, T = {T}")
    if H % G:
        raise ValueError(f"attention: {G} key heads do not divide {H} query heads")
    if window is not None and window < 1:
        raise ValueError(f"attention: window counts the keys a query sees, itself included, so it is >= 1; got {window}")
    if pos is not None and pos.shape != (B,):
        raise ValueError(f"attention: pos is the position of the first query of each row, [B] = [{B}]; got {list(pos.shape)}")
    if slopes is not None and slopes.shape != (H,):
        raise ValueError(f"attention: slopes is one number per query head, [H] = [{H}]; got {list(slopes.shape)}")
    if sink is not None and ((sink[0].shape[0], sink[0].shape[2]) != (B, G) or sink[0].shape[3] != D or sink[1].shape[:3] != sink[0].shape[:3]):
        raise ValueError(f"attention: sinks are (sk [B,P,G,D], sv [B,P,G,V]); got {list(sink[0].shape)} and {list(sink[1].shape)}")
