"""Taylor attention where one knows the answer, its three forms, and mixed precision. More of the sweep is in test_kernels_ops."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memarch.kernels import flop_counter
from memarch.kernels.chunks import GROUP
from memarch.kernels.taylor_attention import features, taylor_attention, torch_impl
from memarch.kernels.taylor_attention.torch_impl import CHUNK, QUADRATIC, chunk, packed, rows

IMPLS = ["reference", "torch"]
LENGTHS = (1, 2, 63, 64, 65, 130)
FORMS = ["quadratic", "chunks", "recurrent"]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def inputs(T: int, B: int = 2, H: int = 2, F: int = 4, V: int = 3) -> list[Tensor]:
    """q, k, v and a state that some tokens have left, so that its normaliser is one."""
    past = taylor_attention(draw(B, 5, H, F), draw(B, 5, H, F), draw(B, 5, H, V), impl="reference")[2]
    return [draw(B, T, H, F), draw(B, T, H, F), draw(B, T, H, V), past]


def loop(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token, through the recurrent form."""
    outs = []
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        *out, state = taylor_attention(q[:, now], k[:, now], v[:, now], state, lengths=None if lengths is None else (lengths - t).clamp(0, 1))
        outs.append(out)
    return torch.cat([o[0] for o in outs], 1), torch.cat([o[1] for o in outs], 1), state


def gradients(run, xs: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of the given tensors; every output and the final state take part."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    outs = run(*xs)
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in outs)
    return [*(x.detach() for x in outs), *torch.autograd.grad(loss, xs)]


def same(found: list[Tensor], truth: list[Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(found, truth, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("start", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_the_forms_agree(form, T, start, ragged, monkeypatch):
    monkeypatch.setattr(torch_impl, "QUADRATIC", 0 if form == "chunks" else 10**6)
    monkeypatch.setattr(torch_impl, "CHUNK", 16)
    xs = inputs(T, B=3)[: 4 if start else 3]
    lengths = torch.tensor([0, (T + 1) // 2, T]) if ragged else None

    def run(impl):
        return lambda q, k, v, state=None: taylor_attention(q, k, v, state, lengths=lengths, impl=impl)

    fast = (lambda q, k, v, state=None: loop(q, k, v, state, lengths)) if form == "recurrent" else run("torch")
    same(gradients(fast, xs), gradients(run("reference"), xs))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cuts", [[1] * 40, [20, 20], [1, 33, 3, 2, 1]], ids=["single", "halves", "ragged"])
def test_pieces_equal_whole(impl, cuts, monkeypatch):
    monkeypatch.setattr(torch_impl, "QUADRATIC", 8)
    monkeypatch.setattr(torch_impl, "CHUNK", 8)

    def pieces(q, k, v, state):
        outs = []
        for a, b, c in zip(*(x.split(cuts, 1) for x in (q, k, v)), strict=True):
            *out, state = taylor_attention(a, b, c, state, impl=impl)
            outs.append(out)
        return torch.cat([o[0] for o in outs], 1), torch.cat([o[1] for o in outs], 1), state

    xs = inputs(sum(cuts))
    same(gradients(pieces, xs), gradients(lambda *x: taylor_attention(*x, impl=impl), xs))


@pytest.mark.parametrize("T", [1, 70, QUADRATIC + 1])
def test_it_is_the_normalised_weighted_mean(T):
    """Weights at least 1/2; the rows of the normalised matrix sum to 1; a constant value comes back; each output is where the formula says."""
    q, k, v, _ = inputs(T)
    a = torch.einsum("bthf,bshf->bhts", q, k)
    w = (1 + a + a.square() / 2).tril()
    assert w.masked_select(torch.ones(T, T).tril().bool()).min() >= 0.5
    top, bottom, _ = taylor_attention(q, k, v)
    assert (bottom >= torch.arange(1, T + 1)[:, None] / 2).all()
    same([top, bottom.movedim(2, 1)], [torch.einsum("bhts,bshv->bthv", w, v), w.sum(-1)])
    identity = torch.eye(T, dtype=v.dtype)[None, :, None].expand(2, T, 2, T)  # the values that read the matrix out
    top, bottom, _ = taylor_attention(q, k, identity)
    matrix = (top / bottom[..., None]).movedim(2, 1)
    same([matrix, matrix.sum(-1)], [w / w.sum(-1, keepdim=True), torch.ones_like(matrix[..., 0])])
    top, bottom, _ = taylor_attention(q, k, v[:, :1].expand_as(v))
    same([top / bottom[..., None]], [v[:, :1].expand_as(v)])


def test_the_weight_is_near_exp():
    q, k, v, _ = inputs(1)
    a = (q * k).sum(-1)
    _, w, _ = taylor_attention(q, k, v)
    assert ((w - a.exp()).abs() <= a.abs() ** 3 / 6 * a.abs().exp()).all()


def test_packed_features_equal_the_full_map():
    """E = 1 + F + F (F + 1) / 2 in place of 1 + F + F^2, for the same kernel."""
    q, k = draw(7, 16), draw(9, 16)

    def full(x):
        return torch.cat([torch.ones_like(x[:, :1]), x, (x[:, :, None] * x[:, None]).flatten(1) / 2**0.5], 1)

    assert packed(q, 0.5).shape[1] == features(16) == 153
    same([packed(q, 0.5) @ packed(k, 1.0).mT], [full(q) @ full(k).mT])
    for square in (0.5, 1.0):
        same([rows(q.mT[None].contiguous(), square)[0]], [packed(q, square).mT], 0)


def test_the_rule_of_the_forms():
    assert chunk(QUADRATIC) == QUADRATIC and chunk(2) == 2
    assert chunk(QUADRATIC + 1) <= CHUNK and chunk(1024) == CHUNK
    assert chunk(QUADRATIC + CHUNK + 1) * (-(-(QUADRATIC + CHUNK + 1) // CHUNK)) < QUADRATIC + CHUNK + 1 + CHUNK


def test_many_groups_of_chunks():
    T, B, H = 400, 3, 4
    C = chunk(T)
    assert B * H * C < GROUP < B * H * T and T % C
    xs = inputs(T, B, H)
    same(gradients(lambda *x: taylor_attention(*x), xs), gradients(lambda *x: taylor_attention(*x, impl="reference"), xs))


@pytest.mark.parametrize("T", [100, QUADRATIC + 44])
def test_no_future(T):
    q, k, v, _ = inputs(T)
    before = taylor_attention(q, k, v)
    for i in range(3):
        changed = [x.clone() for x in (q, k, v)]
        changed[i][:, 50] += 1
        after = taylor_attention(*changed)
        for a, b in zip(after[:2], before[:2], strict=True):
            torch.testing.assert_close(a[:, :50], b[:, :50], rtol=0, atol=0)
        assert not torch.allclose(after[0][:, 50:], before[0][:, 50:])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [1, 70, QUADRATIC + 1])
def test_pads_answer_zero_whatever_they_hold(impl, T):
    """Even NaN: what stands there may never have been computed."""
    real = (torch.arange(T) < torch.tensor([0, T])[:, None])[..., None, None]
    *xs, start = inputs(T)
    xs = [torch.where(real, x, torch.nan).requires_grad_() for x in xs]
    top, bottom, state = taylor_attention(*xs, start, lengths=torch.tensor([0, T]), impl=impl)
    assert (top[0] == 0).all() and (bottom[0] == 0).all() and torch.equal(state[0], start[0])
    assert top.isfinite().all() and bottom.isfinite().all() and state.isfinite().all()
    for x in torch.autograd.grad(top.sum() + bottom.sum() + state.sum(), xs):
        assert (x[0] == 0).all() and x.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [1, 70])
def test_dtypes(impl, T):
    """Sums are float32 at least, whatever came in; gradients have the dtype of what they are for."""
    xs = inputs(T)
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        low = [x.to(dtype).requires_grad_() for x in xs]
        outs = taylor_attention(*low, impl=impl)
        assert [x.dtype for x in outs] == [kept] * 3
        for x, y in zip(low, torch.autograd.grad(sum(o.sum() for o in outs), low), strict=True):
            assert x.dtype == y.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [130, QUADRATIC + 44])
def test_low_precision_by_the_2x_3x_rule(dtype, T):
    """The error against float64 on the same rounded inputs is at most twice (gradients: three times) the reference's own; the floor allows
    sums of float32 in another order."""
    xs = [x.to(dtype) for x in inputs(T)]
    truth = gradients(lambda *x: taylor_attention(*x, impl="reference"), [x.double() for x in xs])
    plain, fast = (gradients(lambda *x, i=impl: taylor_attention(*x, impl=i), xs) for impl in IMPLS)
    for i, (exact, a, b) in enumerate(zip(truth, plain, fast, strict=True)):
        allowed, error, size = (x.double().square().mean().sqrt() for x in (a.double() - exact, b.double() - exact, exact))
        assert error <= (2 if i < 3 else 3) * allowed + 16 * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [1, 70])
def test_autocast_does_not_reach_inside(impl, T):
    def run(on: bool):
        def call(*xs: Tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                return taylor_attention(*xs, impl=impl)

        return call

    xs = [x.float() for x in inputs(T)]
    same(gradients(run(True), xs), gradients(run(False), xs), 0)


@pytest.mark.parametrize("T", [QUADRATIC, 1024])
def test_the_backward_keeps_the_inputs_and_nothing_else(T):
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    xs = [x.requires_grad_() for x in inputs(T, 1, 1, 16, 16)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        taylor_attention(*xs)
    assert kept == sum(x.numel() for x in xs)


def test_gradients_by_finite_differences(monkeypatch):
    xs = [x.requires_grad_() for x in inputs(9, 1, 1, 2, 2)]
    assert torch.autograd.gradcheck(taylor_attention, xs)
    monkeypatch.setattr(torch_impl, "QUADRATIC", 0)
    monkeypatch.setattr(torch_impl, "CHUNK", 4)
    assert torch.autograd.gradcheck(taylor_attention, xs)


@pytest.mark.parametrize("T, C", [(20, 20), (20, 7)])
@pytest.mark.parametrize("start, ragged", [(False, False), (True, True)])
def test_opcheck(T, C, start, ragged):
    q, k, v, state = (x.requires_grad_() for x in inputs(T))
    lengths = torch.tensor([0, T - 3]) if ragged else None
    torch.library.opcheck(torch_impl.operator, (q, k, v, state if start else None, lengths, C))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v, s: (q[..., :3], k, v, s), "same B, T, H"),
        (lambda q, k, v, s: (q, k, v[:, :2], s), "same B, T, H"),
        (lambda q, k, v, s: (q[:, :0], k[:, :0], v[:, :0], s), "at least one token"),
        (lambda q, k, v, s: (q, k, v, s.mT), "features first"),
    ],
)
def test_errors_teach(change, message):
    with pytest.raises(ValueError, match=message):
        taylor_attention(*change(*inputs(4)))


def test_lengths_are_one_per_row():
    with pytest.raises(ValueError, match="real tokens of each row"):
        taylor_attention(*inputs(4), lengths=torch.tensor([1, 2, 3]))


class Products(TorchDispatchMode):
    """Counts batched matrix products, also those in place, which torch's counter does not see."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "bmm" in str(func):
            a, b = args[-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("T, start, final", [(100, False, False), (100, False, True), (100, True, False), (300, False, False)])
def test_flops_are_those_of_the_products(T, start, final):
    xs = [x.requires_grad_() for x in inputs(T)][: 4 if start else 3]
    with flop_counter() as said:
        top, bottom, state = taylor_attention(*xs)
        torch.autograd.grad(sum(x.sum() for x in ((top, bottom, state) if final else (top, bottom))), xs)
    given = [x.detach() for x in (top, bottom, state, *xs)]
    with Products() as counted, torch.no_grad():
        taylor_attention(*xs)
        torch_impl.chunked_backward._init_fn(*given[:2], given[2] if final else None, *given[3:6], given[6] if start else None, None, chunk(T))
    assert said.get_total_flops() == counted.flops


def test_second_derivatives_are_refused_aloud():
    xs = [x.requires_grad_() for x in inputs(70)]
    (grad,) = torch.autograd.grad(taylor_attention(*xs)[0].square().sum(), xs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.square().sum().backward()
