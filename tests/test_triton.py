"""Triton kernels without a GPU: under Triton's interpreter against `reference`, and compiled for sm_90. With a GPU: the same sweep on it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import test_kernels_ops as ops
from memarch import kernels
from memarch.kernels import OPS
from test_kernels_ops import CASES, close, prepare, rms, run

TRITON = [op for op in OPS if "triton" in OPS[op].IMPLEMENTATIONS]
LENGTHS = (1, 2, 17, 65, 130)
APART = ("product_key_topk", "row_dot", "tucker_topk", "weighted_bag")  # T is how many times they do one thing: a few are enough
FEW = dict.fromkeys(APART, (1, 2, 17)) | {"neural_memory": (1, 5), "selective_scan": (1, 2, 17)}  # the longer ones have files of their own
REFUSED = {"neural_memory": "memories of one layer or two"}  # what an op does not take, and says so
SHARED = 232448  # bytes of shared memory one block can have on Hopper


def answers(op: str, cases: Iterable[ops.Case], dtype: torch.dtype = torch.float64) -> Iterator[tuple[ops.Case, dict[str, torch.Tensor]]]:
    """What Triton makes of the cases that it takes: most of them."""
    refused = taken = 0
    for case in cases:
        try:
            found = run(op, prepare(case.inputs, dtype), "triton", case.defined)
        except ValueError as why:
            if REFUSED.get(op, "nothing") not in str(why):
                raise
            refused += 1
        else:
            taken += 1
            yield case, found
    assert taken > refused


@pytest.mark.parametrize("op, T", [(op, T) for op in TRITON for T in FEW.get(op, LENGTHS)])
def test_interpreted_equals_reference(op, T):
    """In float64, so that nothing hides in a tolerance: outputs, states and every gradient."""
    assert not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1"
    for case, found in answers(op, CASES[op](T)):
        truth = run(op, prepare(case.inputs), "reference", case.defined)
        assert found.keys() == truth.keys()
        for name in truth:
            close(found[name], truth[name], 1e-10, f"{case.name}, {name}")


def rounded(inputs: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    """The same as numbers of `dtype`."""
    return {n: ops.mapped(lambda y: y.to(device, dtype).double() if y.is_floating_point() else y.to(device), x) for n, x in inputs.items()}


def bound(name: str, allowed: float, size: float, dtype: torch.dtype) -> float:
    """Twice the reference's error, three times for a gradient; and what the rounding of factors leaves. Matrix units multiply in the dtype of
    the inputs, which a float32 output or state has to show, while the reference multiplies in float32."""
    floor = 16 * torch.finfo(torch.float32).eps if dtype == torch.float32 else torch.finfo(dtype).eps
    return (3 if name.startswith("gradient") else 2) * allowed + floor * size


@pytest.mark.parametrize("op", TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_interpreted_low_precision(op, dtype):
    for case in list(CASES[op](max(FEW.get(op, (65,)))))[-2:]:
        inputs = rounded(case.inputs, dtype)
        truth = run(op, prepare(inputs), "reference", case.defined)
        plain, fast = (run(op, prepare(inputs, dtype), name, case.defined) for name in ("reference", "triton"))
        for name in (name for name, x in truth.items() if x.is_floating_point()):
            error, allowed = (rms(x[name].double() - truth[name]) for x in (fast, plain))
            assert error <= bound(name, allowed, rms(truth[name]), dtype), f"{case.name}, {name}: {error:.2e}, the reference {allowed:.2e}"


WIDE = {  # several tiles across, none of them full
    "delta_rule": lambda: list(ops.delta_rule(70, B=1, H=1, K=100, V=70))[3:4],
    "gated_linear": lambda: list(ops.gated_linear(70, B=1, H=1, K=100, V=70))[3:4],
    "short_conv": lambda: [c for c in ops.short_conv(70, B=1, D=130) if c.inputs["lengths"] is None][1:2],
    "taylor_attention": lambda: list(ops.taylor_attention(150, B=1, H=1, F=5, V=70))[2:3],
    "neural_memory": lambda: [memory((70, 70)), memory((70, 150), (150, 70))],
    "product_key_topk": lambda: [ops.Case("n1100 k70", {"s1": ops.draw(2, 1100), "s2": ops.draw(2, 1100), "k": 70})],
    "row_dot": lambda: [wide_bag("x", 3, 90, 300)],
    "selective_scan": lambda: list(ops.selective_scan(5, R=3, E=70, N=18))[3:4],
    "tucker_topk": lambda: [tucker(2, 90, 30, 40), tucker(2, 40, 300, 20)],
    "weighted_bag": lambda: [wide_bag("weights", 5, 60, 70, h=2, groups=3), wide_bag("weights", 3, 90, 70)],
}


def memory(*widths: tuple[int, int]) -> ops.Case:
    how = {} if len(widths) == 1 else {"grad_point": "chunk", "chunk": 16, "clip": 0.5}
    return ops._memory_case(40, 1, 1, 70, OPS["neural_memory"].Memory(tuple(0.2 * ops.draw(1, *w) for w in widths)), 1, 0, how, False)


def wide_bag(what: str, T: int, R: int, d: int, h: int | None = None, groups: int | None = None) -> ops.Case:
    """A row that most slots read, whose segment takes whole chunks, and rows that are read once."""
    ids = torch.where(torch.rand(T, R) < 0.7, 250, torch.randint(0, 500, (T, R)))
    inputs = {"table": ops.draw(500, d), "ids": ids, what: ops.draw(T, d) if what == "x" else ops.draw(T, R, *([h] if h else []))}
    return ops.Case("a hot row", inputs | ({"groups": torch.randint(0, groups, (T, R)), "n_groups": groups} if groups else {}))


def tucker(Q: int, n: int, k: int, axis: int) -> ops.Case:
    s1, s2, core = ops.draw(Q, 3, 2, n), ops.draw(Q, 3, 2, n), ops.draw(3, 2, 2)
    u, v = OPS["tucker_topk"].principal(core)
    return ops.Case(f"n{n} k{k} axis{axis}", {"s1": s1, "s2": s2, "core": core, "u": u, "v": v, "k": k, "axis": axis})


poison = ops.poison  # nor may anything be read that was not written


@pytest.mark.parametrize("op", TRITON)
def test_interpreted_wide(op, poison):
    for case in WIDE[op]():
        truth, found = (run(op, prepare(case.inputs), name, case.defined) for name in ("reference", "triton"))
        for name in truth:
            close(found[name], truth[name], 1e-10, f"{case.name}, {name}")


@pytest.mark.parametrize("op", TRITON)
def test_only_forced_without_a_gpu(op):
    assert OPS[op].pick("cpu", torch.float32).name != "triton"
    assert OPS[op].pick("cpu", torch.float32, here=kernels.Machine(interpreted=True)).name != "triton"
    assert OPS[op].pick("cuda", torch.bfloat16, here=kernels.Machine("3.7.1", (9, 0))).name == "triton"
    assert "no GPU" in OPS[op].why_not("triton", "cpu", torch.float32)


@pytest.mark.parametrize("op", TRITON)
def test_compiles_for_hopper(op):
    """Without the interpreter, so in another process: fits the shared memory, spills no registers, uses the matrix units where it says so, and
    transposes nothing (kernels/launch.py says why)."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, Path(__file__).parent / "triton_compile.py", op], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, "checks() of the op's triton_impl names what to compile"
    for row in rows:
        assert row["shared"] <= SHARED, row
        assert row["stack"] == 0, row
        assert row["wgmma"] or not row["wants_wgmma"], row
        assert not row["transposes"], row


@pytest.mark.gpu
@pytest.mark.parametrize("op", [*APART, "neural_memory", "selective_scan"])
def test_same_to_the_bit_on_a_gpu(op):
    for case in WIDE[op]():
        inputs = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in case.inputs.items()}
        first, *others = (run(op, prepare(inputs, torch.float32), "triton") for _ in range(5))
        assert all(torch.equal(again[name], first[name]) for again in others for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("op", TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(op, dtype):
    """Against `reference` on the same rounded inputs: twice its error for outputs, three times for gradients."""
    for T in (1, 2, 63, 64, 65, 130, 1000):
        cases = [ops.Case(c.name, rounded(c.inputs, dtype, "cuda"), None if c.defined is None else c.defined.cuda()) for c in CASES[op](T)]
        for case, fast in answers(op, cases, dtype):
            truth, plain = (run(op, prepare(case.inputs, kind), "reference", case.defined) for kind in (torch.float64, dtype))
            for name in (name for name, x in truth.items() if x.is_floating_point()):
                error, allowed = (rms(x[name].double() - truth[name]) for x in (fast, plain))
                assert error <= bound(name, allowed, rms(truth[name]), dtype), f"{case.name}, {name}: {error:.2e}, the reference {allowed:.2e}"
