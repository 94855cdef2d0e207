"""Operators. Each folder is one op with one public function; all implementations share its signature.

    from memarch.kernels.delta_rule import delta_rule
    o, state = delta_rule(q, k, v, beta, g, state, lengths=lengths)

    with memarch.kernels.using("reference"): ...     forces an implementation
    memarch.kernels.report()                         what would run here, and why the others would not
"""

from typing import NamedTuple

import torch

from memarch.kernels import attention, delta_rule, product_key_topk, short_conv, weighted_bag
from memarch.kernels.choose import Machine, known_bad, machine, using

OPS = {
    "attention": attention,
    "delta_rule": delta_rule,
    "product_key_topk": product_key_topk,
    "short_conv": short_conv,
    "weighted_bag": weighted_bag,
}

__all__ = ["OPS", "Machine", "Row", "known_bad", "machine", "report", "using"]


class Row(NamedTuple):
    op: str
    device: str
    dtype: str
    runs: str  # the implementation that is picked
    reason: str
    others: dict[str, str]  # implementation -> why it is not the one


def report(device: str | torch.device | None = None) -> list[Row]:
    """One row per op and dtype: what would run on `device` (default: the GPU if there is one) for common shapes."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    here = machine(kind)
    rows = []
    for op, module in OPS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            choice = module.pick(kind, dtype, here=here)
            others = {n: module.why_not(n, kind, dtype, here=here) for n in module.IMPLEMENTATIONS if n != choice.name}
            others = {n: why or "can run, but is not the first choice: force it with impl=" + repr(n) for n, why in others.items()}
            rows.append(Row(op, kind, str(dtype).removeprefix("torch."), *choice, others))
    return rows
