"""Operators. Each folder is one op with one public function; all its implementations share that signature.

    from memarch.kernels.delta_rule import delta_rule
    o, state = delta_rule(q, k, v, beta, g, state, lengths=lengths)

    with memarch.kernels.using("reference"): ...             forces an implementation
    memarch.kernels.report()                                 what would run here, and why the others would not
    with memarch.kernels.flop_counter() as counter: ...      counts what happens inside operators, too

Inside `memarch.kernels` the name of an op is its module: take the function from there.
"""

from typing import Any, NamedTuple

import torch

from memarch.kernels import (
    attention,
    delta_rule,
    flops,
    gated_linear,
    neural_memory,
    product_key_topk,
    row_dot,
    selective_scan,
    short_conv,
    taylor_attention,
    tucker_topk,
    weighted_bag,
)
from memarch.kernels.choose import Machine, known_bad, machine, using

OPS = {
    "attention": attention,
    "delta_rule": delta_rule,
    "gated_linear": gated_linear,
    "neural_memory": neural_memory,
    "product_key_topk": product_key_topk,
    "row_dot": row_dot,
    "selective_scan": selective_scan,
    "short_conv": short_conv,
    "taylor_attention": taylor_attention,
    "tucker_topk": tucker_topk,
    "weighted_bag": weighted_bag,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

__all__ = ["OPS", "Machine", "Row", "flop_counter", "known_bad", "machine", "report", "using"]


class Row(NamedTuple):
    op: str
    device: str
    dtype: str
    runs: str  # the implementation that is picked
    reason: str
    others: dict[str, str]  # implementation -> why it does not run


def report(device: str | torch.device | None = None) -> list[Row]:
    """What would run on `device` (the GPU if there is one) for common shapes, one row for every op and dtype."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    here = machine(kind)
    rows = []
    for op, module in OPS.items():
        for dtype in DTYPES:
            runs, reason = module.pick(kind, dtype, here=here)
            others = {name: module.why_not(name, kind, dtype, here=here) or "" for name in module.IMPLEMENTATIONS if name != runs}
            others = {name: why or f"can run when forced: impl={name!r}" for name, why in others.items()}
            rows.append(Row(op, kind, str(dtype).removeprefix("torch."), runs, reason, others))
    return rows


def _formulas() -> dict[str, Any]:
    return {name: formula for module in OPS.values() for name, formula in getattr(module, "FLOPS", {}).items()}


def flop_counter(**options: Any) -> Any:
    """torch's FlopCounterMode, knowing our operators."""
    return flops.flop_counter(_formulas(), **options)


flops.file_if_light(_formulas())
