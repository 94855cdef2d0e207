"""Adapter for flash-attn (Dao-AILab/flash-attention), used when it imports and a probe call works."""

from typing import NamedTuple

import torch
from torch import Tensor


class Probe(NamedTuple):
    ok: bool
    reason: str | None  # why it cannot be used


_probe: Probe | None = None


def probe() -> Probe:
    """Whether flash-attn works here, found out once. An installed but broken build is common, so one small call is made."""
    global _probe
    if _probe is None:
        _probe = _try()
    return _probe


def _try() -> Probe:
    if not torch.cuda.is_available():
        return Probe(False, "flash-attn needs a CUDA device")
    try:
        from flash_attn import flash_attn_func

        x = torch.zeros(1, 8, 1, 32, dtype=torch.float16, device="cuda")
        flash_attn_func(x, x, x, causal=True, window_size=(3, 0), softmax_scale=1.0)
        torch.cuda.synchronize()
    except Exception as error:  # a missing package, a build for another torch, an unsupported GPU: all end here, once
        return Probe(False, f"flash-attn: {type(error).__name__}: {error}")
    return Probe(True, None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor | None,
    window: int | None,
    sink: tuple[Tensor, Tensor] | None,
    slopes: Tensor | None,
    scale: float,
) -> Tensor:
    from flash_attn import flash_attn_func

    assert pos is None and sink is None, "why_not lets neither through"
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale=scale,
        causal=True,  # aligned to the last key, as ours
        window_size=(-1, -1) if window is None else (window - 1, 0),
        alibi_slopes=None if slopes is None else slopes.float(),
    )
