"""Adam by rows: C++ against torch, and torch against a loop; in place, for the rows that are named and no others."""

import math

import pytest
import torch

from memarch.kernels import native
from memarch.kernels.row_adam import PIECE, row_adam

HOW = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}
pytestmark = pytest.mark.usefixtures("native_library")


@pytest.fixture(params=["torch", "cpp"])
def impl(request):
    if request.param == "cpp" and native.why_not() not in (None, native.NOT_BUILT):
        pytest.skip(native.why_not())
    return request.param


def tensors(N, d, width, dtype, seed=0):
    source = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(N, w, generator=source, dtype=torch.float64) for w in (d, d, width)]
    return [drawn[0].to(dtype), drawn[1].to(dtype), drawn[2].square().to(dtype)]


@pytest.mark.parametrize("d, one", [(1, False), (7, False), (7, True), (64, False), (64, True), (100, True)])
def test_it_is_its_formula(impl, d, one):
    p, m, v = tensors(40, d, 1 if one else d, torch.float64)
    rows = torch.tensor([0, 3, 4, 20, 21, 22, 23, 24, 25, 26, 39])
    g = torch.randn(len(rows), d, dtype=torch.float64)
    found = [x.clone() for x in (p, m, v)]
    row_adam(*found, rows, g, step=3, impl=impl, **HOW)
    for i, u in enumerate(rows.tolist()):
        m[u] = 0.8 * m[u] + 0.2 * g[i]
        v[u] = 0.95 * v[u] + 0.05 * (g[i].square().mean() if one else g[i].square())
        p[u] -= 0.03 * m[u] / (1 - 0.8**3) / ((v[u] / (1 - 0.95**3)).sqrt() + 1e-6)
    for name, x, y in zip("pmv", found, (p, m, v), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14, msg=name)
        rest = torch.ones(40, dtype=torch.bool).index_fill(0, rows, False)
        assert torch.equal(x[rest], y[rest]), f"{name}: rows that were not named"


@pytest.mark.parametrize("one", [False, True])
def test_cpp_is_torch_in_float32(one):
    if native.why_not() not in (None, native.NOT_BUILT):
        pytest.skip(native.why_not())
    rows = torch.randperm(5000)[:3000].sort().values
    g = torch.randn(3000, 48)
    both = []
    for impl in ("torch", "cpp"):
        state = tensors(5000, 48, 1 if one else 48, torch.float32)
        for step in (1, 2, 3):
            row_adam(*state, rows, g * step, step=step, impl=impl, **HOW)
        both.append(state)
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nothing_to_do(impl):
    state = tensors(4, 3, 3, torch.float32)
    before = [x.clone() for x in state]
    row_adam(*state, torch.empty(0, dtype=torch.int64), torch.empty(0, 3), step=1, impl=impl, **HOW)
    assert all(map(torch.equal, state, before))


def test_autograd_sees_the_change(impl):
    p, m, v = tensors(4, 3, 3, torch.float32)
    p.requires_grad_()
    y = p.square().sum()
    with torch.no_grad():
        row_adam(p, m, v, torch.tensor([1]), torch.ones(1, 3), step=1, impl=impl, **HOW)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_narrow_tables_are_computed_wide():
    p, m, v = tensors(6, 4, 4, torch.bfloat16)
    wide = [x.float() for x in (p, m, v)]
    rows, g = torch.tensor([1, 5]), torch.randn(2, 4).bfloat16()
    row_adam(p, m, v, rows, g, step=2, **HOW)
    row_adam(*wide, rows, g.float(), step=2, impl="torch", **HOW)
    for x, y in zip((p, m, v), wide, strict=True):
        assert torch.equal(x, y.bfloat16())


def test_pieces_are_one_step():
    d = PIECE // 2  # two rows a piece
    p, m, v = tensors(5, d, 1, torch.float32)
    whole = [x.clone() for x in (p, m, v)]
    rows, g = torch.arange(5), torch.randn(5, d)
    row_adam(p, m, v, rows, g, step=1, impl="torch", **HOW)
    for i in range(5):
        row_adam(*whole, rows[i : i + 1], g[i : i + 1], step=1, impl="torch", **HOW)
    assert all(map(torch.equal, (p, m, v), whole)) and math.prod(p.shape) > PIECE
