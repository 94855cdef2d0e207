"""The bag: its two gradients of the table, to the bit; what it costs; the C++; what it says to bad input."""

import pytest
import torch
from torch import Tensor

import test_kernels_ops as ops
from memarch import kernels
from memarch.kernels import native
from memarch.kernels.weighted_bag import cpp_impl, torch_impl, weighted_bag
from memarch.kernels.weighted_bag.operator import unique_rows

IMPLS = ["torch", "cpp"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


pytestmark = pytest.mark.usefixtures("native_library")


interpreted = pytest.mark.parametrize("impl", [*IMPLS, "triton"], indirect=True)  # what the interpreter has time for


@pytest.fixture(params=IMPLS)
def impl(request):
    if request.param == "cpp" and native.why_not() not in (None, native.NOT_BUILT):
        pytest.skip(native.why_not())
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("with a GPU the interpreter is off: tests/test_triton.py runs it there")
    return request.param


def operator(impl: str):
    if impl == "triton":
        from memarch.kernels.weighted_bag import triton_impl

        return triton_impl.weighted_bag.operator
    return {"torch": torch_impl, "cpp": cpp_impl}[impl].weighted_bag.operator


def example(N: int = 40, d: int = 12, T: int = 30, R: int = 6, h: int = 1, E: int | None = None, dtype: torch.dtype = torch.float64) -> dict:
    ids = torch.randint(0, N, (T, R))
    x = {"table": torch.randn(N, d, dtype=dtype, requires_grad=True), "ids": ids, "weights": torch.randn(T, R, h, dtype=dtype, requires_grad=True)}
    return x if E is None else x | {"groups": torch.randint(0, E, (T, R)), "n_groups": E}


def gradients(x: dict, impl: str, sparse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    y = weighted_bag(**x, sparse_grad=sparse, impl=impl)
    dy = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), *torch.autograd.grad(y, (x["table"], x["weights"]), dy)


def test_cpp_equals_reference(poison):
    """The sweep of every other implementation."""
    if native.why_not() not in (None, native.NOT_BUILT):
        pytest.skip(native.why_not())
    ops.test_equals_reference("weighted_bag", "cpp")
    ops.test_reads_nothing_it_did_not_write("weighted_bag", "cpp", None)
    ops.test_inputs_are_left_alone("weighted_bag", "cpp")


poison = ops.poison


@pytest.mark.parametrize("h, E", [(1, None), (3, None), (1, 4), (2, 3)])
def test_formula(impl, h, E):
    """The issue's sum, number by number."""
    x = example(T=4, h=h, E=E)
    found = weighted_bag(**x, impl=impl).view(4, E or 1, 12)
    truth = torch.zeros(4, E or 1, 12, dtype=torch.float64)
    for t in range(4):
        for r in range(6):
            for c in range(12):
                e = 0 if E is None else int(x["groups"][t, r])
                truth[t, e, c] += x["weights"][t, r, c // (12 // h)].item() * x["table"][x["ids"][t, r], c].item()
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("h, E", [(1, None), (2, 3)])
def test_gradcheck(impl, h, E):
    x = example(N=7, d=4, T=3, R=4, h=h, E=E)

    def call(table: Tensor, weights: Tensor) -> Tensor:
        return weighted_bag(**x | {"table": table, "weights": weights}, impl=impl)

    assert torch.autograd.gradcheck(call, (x["table"], x["weights"]))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("h, E", [(1, None), (3, None), (1, 4), (2, 3)])
def test_sparse_gradient_is_the_dense_one(impl, h, E, dtype):
    x = example(N=500, h=h, E=E, dtype=dtype)
    _, dense, dweights = gradients(x, impl)
    _, sparse, same = gradients(x, impl, sparse=True)
    assert sparse.is_sparse and sparse.is_coalesced() and sparse.dtype == dtype and torch.equal(same, dweights)
    assert torch.equal(sparse.indices()[0], x["ids"].unique()), "the rows that were read and no others, in increasing order"
    assert torch.equal(sparse.to_dense(), dense)
    torch.sparse_coo_tensor(sparse.indices(), sparse.values(), sparse.shape, is_coalesced=True, check_invariants=True)


def test_sparse_gradient_of_a_parameter(impl):
    """Autograd drops the mark `coalesced` in .grad, and joins those of two uses: unique_rows says what is in it either way."""
    x = example()
    (dense,) = torch.autograd.grad(weighted_bag(**x, impl=impl).sum(), x["table"])
    for uses in (1, 2):
        x["table"].grad = None
        for _ in range(uses):
            weighted_bag(**x, sparse_grad=True, impl=impl).sum().backward()
        rows, values = unique_rows(x["table"].grad)
        assert torch.equal(rows, x["ids"].unique())
        assert torch.equal(torch.zeros_like(dense).index_copy(0, rows, values), uses * dense)


@interpreted
@pytest.mark.parametrize("wanted", ["table", "weights"])
def test_only_one_gradient_is_wanted(impl, wanted):
    x = example(h=2, E=3)
    both = dict(zip(("table", "weights"), gradients(x, impl)[1:], strict=True))
    alone = {name: t.detach().requires_grad_(name == wanted) if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in x.items()}
    y = weighted_bag(**alone, impl=impl)
    (found,) = torch.autograd.grad(y, alone[wanted], torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))
    assert torch.equal(found, both[wanted])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_to_the_bit(impl, dtype):
    """Hot rows (half of all slots read one of three), several runs, several numbers of threads."""
    x = example(N=2000, d=40, T=300, R=16, h=2, E=2, dtype=dtype)
    x["ids"] = torch.where(torch.rand(300, 16) < 0.5, x["ids"] % 3, x["ids"])
    before, first = torch.get_num_threads(), None
    try:
        for threads in (1, 2, 1, 3, 3):
            torch.set_num_threads(threads)
            found = [*gradients(x, impl), gradients(x, impl, sparse=True)[1].values()]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True)), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


@interpreted
@pytest.mark.parametrize("table, weights", [(a, b) for a in DTYPES for b in DTYPES])
def test_dtypes(impl, table, weights):
    """The output has the wider dtype; sums are float32 at least: what is rounded to a lower precision is rounded once."""
    if impl == "triton" and {table, weights} == {torch.bfloat16, torch.float64}:
        pytest.skip("the interpreter cannot round float64 to bfloat16")
    x = example(T=3, d=20, R=70, h=2, E=3) if impl == "triton" else example(d=64, R=200, h=2, E=3)
    x = x | {"table": x["table"].detach().to(table).requires_grad_(), "weights": x["weights"].detach().to(weights).requires_grad_()}
    found = gradients(x, impl)
    out = torch.promote_types(table, weights)
    assert [t.dtype for t in found] == [out, table, weights]
    dy = torch.linspace(-1, 2, found[0].numel(), dtype=out).double().view_as(found[0])
    exact = {name: t.detach().double().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for name, t in x.items()}
    y = weighted_bag(**exact, impl="reference")
    truth = [y.detach(), *torch.autograd.grad(y, (exact["table"], exact["weights"]), dy)]
    for a, b, dtype in zip(found, truth, (out, table, weights), strict=True):
        allowed = torch.finfo(dtype).eps + 16 * torch.finfo(torch.promote_types(out, torch.float32)).eps
        assert ops.rms(a.double() - b) <= allowed * ops.rms(b)


def test_float16():
    """C++ leaves it to torch."""
    x = example(d=64, R=50, h=2, E=3, dtype=torch.float16)
    with pytest.raises(ValueError, match="float32, bfloat16, float64, not float16: use torch"):
        weighted_bag(**x, impl="cpp")
    for a, b in zip(gradients(x, "torch"), gradients(x, "reference"), strict=True):
        assert ops.rms((a - b).double()) <= 2e-3 * ops.rms(b.double())


def test_int32_ids_are_int64_ids(impl):
    x = example(h=2, E=3)
    narrow = x | {"ids": x["ids"].int(), "groups": x["groups"].int()}
    assert all(torch.equal(a, b) for a, b in zip(gradients(x, impl), gradients(narrow, impl), strict=True))


@interpreted
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (), (2, 0, 3)])
def test_nothing_to_read(impl, shape):
    ids = torch.zeros(*shape, 5, dtype=torch.int64)
    weights = torch.ones(ids.shape, requires_grad=True)
    table = torch.ones(4, 6, requires_grad=True)
    for sparse in (False, True):
        y = weighted_bag(table, ids, weights, sparse_grad=sparse, impl=impl)
        assert y.shape == (*ids.shape[:-1], 6)
        table.grad = None
        y.sum().backward()
        assert (table.grad.to_dense() if sparse else table.grad).sum() == 6 * ids.numel()
    none = torch.zeros(*shape, 0, dtype=torch.int64)
    assert torch.equal(weighted_bag(table, none, none.float(), impl=impl), torch.zeros(*shape, 6))


def allocated(call) -> int:
    """The largest single allocation, in bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_row_sparse_cost_does_not_know_the_table(impl):
    sizes = []
    for N in (2**10, 2**21):
        table, ids, weights = torch.zeros(N, 64, requires_grad=True), torch.randint(0, 2**10, (64, 8)), torch.randn(64, 8, requires_grad=True)

        def step(table=table, ids=ids, weights=weights) -> None:
            weighted_bag(table, ids, weights, sparse_grad=True, impl=impl).sum().backward()

        step()
        sizes.append(allocated(step))
    assert sizes[1] <= 1.1 * sizes[0] <= 2**20, sizes


def available() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.slow
def test_beyond_int32(impl):
    """A bfloat16 table of more than 2^31 numbers: its last rows, forward and both gradients of it."""
    N, d = 2**31 // 1000 + 5000, 1000
    if available() < 14 * 2**30:
        pytest.skip("needs 14 GiB: the table and its dense gradient have 4.3 GB each")
    table = torch.empty(N, d, dtype=torch.bfloat16)
    table[-1], table[-2], table[0] = 3, 5, 7
    table.requires_grad_()
    ids, weights = torch.tensor([[N - 1, N - 2], [N - 1, 0]]), torch.ones(2, 2, dtype=torch.bfloat16)
    y = weighted_bag(table, ids, weights, impl=impl)
    assert torch.equal(y, torch.tensor([[8.0], [10.0]]).expand(2, d).bfloat16())
    y = weighted_bag(table, ids, weights, sparse_grad=True, impl=impl)
    (sparse,) = torch.autograd.grad(y.sum(), table)
    assert sparse.indices()[0].tolist() == [0, N - 2, N - 1] and sparse.values()[:, 0].tolist() == [1, 1, 2]
    (dense,) = torch.autograd.grad(weighted_bag(table, ids, weights, impl=impl).sum(), table)
    assert dense[-1].eq(2).all() and dense[-2].eq(1).all() and dense[0].eq(1).all() and dense[1:-2:10000].eq(0).all()


@interpreted
def test_opcheck(impl):
    for h, E in ((1, None), (2, 3)):
        x = example(h=h, E=E)
        torch.library.opcheck(operator(impl), (x["table"], x["ids"], x["weights"], x.get("groups"), E or 1, False))


@interpreted
def test_one_graph(impl):
    """Also with the sparse gradient."""
    torch._dynamo.reset()
    for sparse in (False, True):
        x = example(h=2, E=3)
        compiled = torch.compile(lambda sparse=sparse, **x: weighted_bag(**x, sparse_grad=sparse, impl=impl), fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(**x).square().sum(), (x["table"], x["weights"]))
        truth = torch.autograd.grad(weighted_bag(**x, impl="reference").square().sum(), (x["table"], x["weights"]))
        assert found[0].is_sparse == sparse
        for a, b in zip(found, truth, strict=True):
            torch.testing.assert_close(a.to_dense(), b, rtol=1e-10, atol=1e-10)


@interpreted
@pytest.mark.parametrize("sparse", [False, True])
def test_flops_are_counted(impl, sparse):
    x = example(h=2, E=3)
    with kernels.flop_counter() as counter:
        weighted_bag(**x, sparse_grad=sparse, impl=impl).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 30 * 6 * 12


BAD = [
    ({"ids": torch.tensor([[0, 40]])}, "id 40 lies outside 0 .. 39: the table has 40 rows"),
    ({"ids": torch.tensor([[-1, 3]])}, "id -1 lies outside"),
    ({"groups": torch.tensor([[0, 3]]), "n_groups": 3}, "group 3 lies outside 0 .. 2: there are 3 groups"),
    ({"groups": torch.tensor([[0, -2]]), "n_groups": 3}, "group -2 lies outside"),
    ({"groups": torch.tensor([0, 1]), "n_groups": 3}, "groups gives every slot a whole number"),
    ({"n_groups": 3}, "pass groups"),
    ({"weights": torch.ones(1, 2, 5)}, "5 slices of equal width need a table whose width 5 divides; it is 12 wide"),
    ({"weights": torch.ones(1, 2, 0)}, "0 slices"),
    ({"weights": torch.ones(2, 2)}, r"wants table \[N, d\]"),
    ({"weights": torch.ones(1, 2, 1, 1)}, r"wants table \[N, d\]"),
    ({"weights": torch.ones(1, 2, dtype=torch.int64)}, "weights must be floating point"),
    ({"ids": torch.ones(1, 2)}, "ids int64 or int32"),
    ({"table": torch.ones(12, 40).mT}, "contiguous"),
    ({"table": torch.ones(40, 12, dtype=torch.int64)}, "floating point"),
]


@pytest.mark.parametrize("bad, says", BAD, ids=[says[:25] for _, says in BAD])
@pytest.mark.parametrize("impl", ["reference", *IMPLS, "triton"])
def test_bad_input(impl, bad, says):
    x = {"table": torch.ones(40, 12), "ids": torch.tensor([[0, 1]]), "weights": torch.ones(1, 2)} | bad
    with pytest.raises(ValueError, match=says):
        weighted_bag(**x, impl=impl)
