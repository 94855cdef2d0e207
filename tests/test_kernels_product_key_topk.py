"""The search against all pairs: every k, ties, pruning, gradients, bad input; in torch and in C++."""

import pytest
import torch
from torch import Tensor

import test_kernels_ops as ops
from memarch.kernels import native
from memarch.kernels.product_key_topk import LONGEST, ROUNDS, cpp_impl, product_key_topk, torch_impl
from memarch.kernels.product_key_topk.torch_impl import best, best_of_ties, by_sorting, pack, ranks, unpack

DTYPES = [torch.float32, torch.float64]


pytestmark = pytest.mark.usefixtures("native_library")


interpreted = pytest.mark.parametrize("impl", ["torch", "cpp", "triton"], indirect=True)  # what the interpreter has time for


@pytest.fixture(params=["torch", "cpp"])
def impl(request):
    if request.param == "cpp" and native.why_not() not in (None, native.NOT_BUILT):
        pytest.skip(native.why_not())
    if request.param == "triton" and torch.cuda.is_available():
        pytest.skip("with a GPU the interpreter is off: tests/test_triton.py runs it there")
    return request.param


def operator(impl: str):
    if impl == "triton":
        from memarch.kernels.product_key_topk import triton_impl

        return triton_impl.product_key_topk.operator
    return {"torch": torch_impl, "cpp": cpp_impl}[impl].product_key_topk.operator


poison = ops.poison


def test_cpp_equals_reference(poison):
    """The sweep of every other implementation."""
    if native.why_not() not in (None, native.NOT_BUILT):
        pytest.skip(native.why_not())
    ops.test_equals_reference("product_key_topk", "cpp")
    ops.test_reads_nothing_it_did_not_write("product_key_topk", "cpp", None)
    ops.test_outputs_own_their_memory("product_key_topk", "cpp")
    ops.test_inputs_are_left_alone("product_key_topk", "cpp")


def brute(s1: Tensor, s2: Tensor, k: int) -> tuple[list[float], list[int]]:
    """One search by Python's sort: best score first, then the lowest id."""
    n = len(s1)
    pairs = sorted((-(s1[i] + s2[j]).item(), i * n + j) for i in range(n) for j in range(n))[:k]
    return [-score for score, _ in pairs], [id for _, id in pairs]


@interpreted
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "signed zeros", "masked", "constant"])
def test_every_k(impl, kind, dtype, monkeypatch):
    """Whatever n and k: the scores, and the ids of equal scores in order. Sums are exact here, so that equal means equal."""
    if dtype == torch.bfloat16 and impl == "cpp":
        pytest.skip("C++ takes float32 and float64")
    if dtype == torch.bfloat16 and impl == "triton":
        pytest.skip("the interpreter rounds to bfloat16 in its own way")
    for n in (1, 2, 7) if impl == "triton" else (1, 2, 7, 19):
        s1, s2 = (torch.randn(4, n).mul(16 if kind == "normal" else 1).round().div(8).to(dtype) for _ in range(2))
        if kind == "normal":
            s1, s2 = s1 + 0.5, s2 - 0.25
        if kind == "signed zeros":
            s1, s2 = (torch.where(s.abs() < 0.2, -0.0, s) for s in (s1, s2))
        if kind == "masked":
            s1, s2 = s1.masked_fill(torch.rand(4, n) < 0.7, -torch.inf), s2.masked_fill(torch.rand(4, n) < 0.3, -torch.inf)
        if kind == "constant":
            s1, s2 = torch.ones_like(s1), torch.ones_like(s2)
        for k in range(1, n + 1):
            monkeypatch.setattr(torch_impl, "FEW", 2**11 if k % 2 else 0)
            scores, ids = product_key_topk(s1, s2, k, impl=impl)
            for q in range(4):
                truth, best_ids = brute(s1[q], s2[q], k)
                assert scores[q].tolist() == truth and len(set(ids[q].tolist())) == k, (n, k, q)
                finite = sum(score > -torch.inf for score in truth)  # -inf plus anything is a tie that the axes do not know of
                assert ids[q].tolist()[:finite] == best_ids[:finite], (n, k, q)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, k", [(64, 64), (100, 1), (100, 33), (300, 16), (300, 299), (1000, 128), (257, 100), (4000, 40)])
def test_large(impl, n, k, dtype):
    """Long axes, which C++ looks through for a threshold, against all pairs; heavy tails make that hard."""
    if impl == "triton" and (k > 100 or dtype == torch.float64):
        pytest.skip("minutes under the interpreter, or beyond what it takes")
    for scale in (lambda s: s, lambda s: s**9, torch.exp, lambda s: s.round(), lambda s: s.clamp(max=0.1)):
        s1, s2 = (scale(torch.randn(3, n, dtype=dtype)) for _ in range(2))
        scores, ids = product_key_topk(s1, s2, k, impl=impl)
        truth = (s1[:, :, None] + s2[:, None]).flatten(1)
        assert torch.equal(scores, truth.topk(k).values)
        assert torch.equal(truth.gather(1, ids), scores) and all(len(set(row)) == k for row in ids.tolist())
        tied = scores[:, 1:] == scores[:, :-1]
        assert (ids[:, 1:] > ids[:, :-1])[tied].all()


@pytest.mark.parametrize("k", [1, 2, 16, 32, 64, 128])
def test_pruned_pairs(k):
    """As many as the spec counts, and each is needed: some scores make it win."""
    a, b = ranks(k)
    assert len(a) == {1: 1, 2: 3, 16: 50, 32: 119, 64: 280, 128: 645}[k]
    for x, y in zip(a.tolist()[:40], b.tolist()[:40], strict=True):
        s1, s2 = -torch.arange(k).double(), -torch.arange(k).double()
        s1[: x + 1], s2[: y + 1] = 100 - torch.arange(x + 1) / 1000, 100 - torch.arange(y + 1) / 1000
        assert x * k + y in product_key_topk(s1, s2, k)[1].tolist()


@interpreted
def test_implementations_agree_where_sums_are_rounded(impl):
    """Float32 sums tie by rounding once in a thousand searches: the implementations order even these alike."""
    many = 200 if impl == "triton" else 4000
    for s1, s2 in ((torch.randn(many, 64), torch.randn(many, 64)), (torch.randn(many // 8, 64) * 1e6, torch.randn(many // 8, 64))):
        scores, ids = product_key_topk(s1, s2, 32, impl=impl)
        (t1, i), (t2, j) = (best_of_ties(s, torch.arange(64).expand_as(s), 32) for s in (s1, s2))
        a, b = ranks(32)
        truth = best_of_ties(t1[:, a] + t2[:, b], i[:, a] * 64 + j[:, b], 32)
        assert torch.equal(scores, truth[0]) and torch.equal(ids, truth[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packing(dtype):
    """A key keeps the score and the id, and keys are ordered as scores, then by falling ids."""
    scores = torch.cat([torch.randn(200) * 10.0 ** torch.randint(-30, 30, (200,)), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-44])]).to(dtype)
    ids = torch.randint(0, 2**32, (205,))
    back, same = unpack(pack(scores, ids), dtype)
    assert torch.equal(back, scores) and torch.equal(same, ids)
    assert (scores[pack(scores, ids).argsort()].diff() >= 0)[scores.sort().values.diff().isfinite()].all()
    equal = pack(torch.zeros(3, dtype=dtype), torch.tensor([0, 5, 2**32 - 1]))
    assert equal.argsort(descending=True).tolist() == [0, 1, 2] and (pack(torch.tensor([-0.0]), torch.tensor([5])) == equal[1]).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_all_ways_of_searching_agree(dtype):
    """What a CPU does, what a GPU does, and what is done for few."""
    for scores in (torch.randn(80, 40), torch.randn(80, 40).round(), torch.zeros(80, 40)):
        ids = torch.rand(80, 40).argsort(1)
        for k in (1, 7, 40):
            for way in (best_of_ties, by_sorting):
                for a, b in zip(best(scores.to(dtype), ids, k), way(scores.to(dtype), ids, k), strict=True):
                    assert torch.equal(a, b)


def test_gradient_reaches_the_selected_only(impl):
    s1, s2 = (torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: product_key_topk(a, b, 4, impl=impl)[0], (s1, s2))
    scores, ids = product_key_topk(s1, s2, 4, impl=impl)
    assert not ids.requires_grad and ids.shape == (3, 2, 4)
    g1, g2 = torch.autograd.grad(scores.sum(), (s1, s2))
    count = torch.nn.functional.one_hot(ids // 10, 10).sum(-2), torch.nn.functional.one_hot(ids % 10, 10).sum(-2)
    assert torch.equal(g1, count[0].double()) and torch.equal(g2, count[1].double())


def test_low_precision_gradient_is_summed_in_float32():
    s1 = torch.zeros(1, 600, dtype=torch.bfloat16, requires_grad=True)
    (g,) = torch.autograd.grad(product_key_topk(s1, torch.zeros_like(s1).detach(), 600)[0].sum(), s1)
    assert g[0, 0] == 600, "all 600 best pairs are in row 0; in bfloat16 the sum would stop at 256"


def test_same_to_the_bit(impl):
    s1, s2 = (torch.randn(200, 50, requires_grad=True) for _ in range(2))
    before, first = torch.get_num_threads(), None
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            scores, ids = product_key_topk(s1, s2, 20, impl=impl)
            found = scores.detach(), ids, *torch.autograd.grad(scores.square().sum(), (s1, s2))
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    finally:
        torch.set_num_threads(before)


@interpreted
def test_shapes(impl):
    for shape in ((), (0,), (3, 0, 2), (1,)):
        s = torch.randn(*shape, 5)
        scores, ids = product_key_topk(s, s, 3, impl=impl)
        assert scores.shape == ids.shape == (*shape, 3)
    s = torch.randn(5, 6, 4).transpose(0, 2)  # not contiguous
    assert torch.equal(product_key_topk(s, s, 3, impl=impl)[1], product_key_topk(s.contiguous(), s.contiguous(), 3, impl=impl)[1])


def test_ids_beyond_int32(impl):
    """50,000 sub-keys an axis are 2.5e9 pairs."""
    n = 50_000
    s1, s2 = torch.randn(2, n), torch.randn(2, n)
    s1[0, n - 1], s2[0, n - 1] = 100, 100
    scores, ids = product_key_topk(s1, s2, 4, impl=impl)
    assert ids[0, 0] == n * n - 1 and scores[0, 0] == 200
    assert torch.equal(s1.gather(1, ids // n) + s2.gather(1, ids % n), scores)


def test_more_sub_keys_than_keys_have_bits_for():
    n = 2**16 + 1
    s1, s2 = torch.zeros(1, n), torch.zeros(1, n)
    s1[0, -1] = s2[0, -1] = 1
    assert product_key_topk(s1, s2, 2)[1].tolist() == [[n * n - 1, n - 1]]
    with pytest.raises(ValueError, match="65536 sub-keys"):
        product_key_topk(s1, s2, 2, impl="cpp")
    with pytest.raises(ValueError, match=f"up to {LONGEST} sub-keys an axis and k up to {ROUNDS}, not 65537 and 2: use torch"):
        product_key_topk(s1, s2, 2, impl="triton")


@interpreted
def test_opcheck(impl):
    s1, s2 = (torch.randn(3, 10, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(operator(impl), (s1, s2, 4))


@interpreted
def test_one_graph(impl):
    torch._dynamo.reset()
    s1, s2 = (torch.randn(3, 10, requires_grad=True) for _ in range(2))
    compiled = torch.compile(lambda a, b: product_key_topk(a, b, 4, impl=impl), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(s1, s2), product_key_topk(s1, s2, 4, impl="reference"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["reference", "torch", "cpp", "triton"])
def test_bad_input(impl):
    s = torch.randn(3, 40)
    for k in (0, -1, 41):
        with pytest.raises(ValueError, match=f"k is {k}, but with 40 sub-keys an axis the search is exact for 1 <= k <= 40"):
            product_key_topk(s, s, k, impl=impl)
    with pytest.raises(ValueError, match=r"of one shape and dtype; got \[3, 40\] torch.float32, \[3, 39\]"):
        product_key_topk(s, s[:, :39], 2, impl=impl)
    with pytest.raises(ValueError, match="one shape and dtype"):
        product_key_topk(s, s.double(), 2, impl=impl)
    with pytest.raises(ValueError, match="floating point"):
        product_key_topk(s.long(), s.long(), 2, impl=impl)
    for at, nan in ((3, torch.nan), (39, -torch.tensor(torch.nan))):
        for pair in (0, 1):
            bad = [s.clone(), s.clone()]
            bad[pair][2, at] = nan
            with pytest.raises(ValueError, match="NaN among the scores"):
                product_key_topk(*bad, 2, impl=impl)
