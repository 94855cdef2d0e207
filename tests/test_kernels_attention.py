"""Attention where one knows the answer, what it costs, and the flash-attn adapter against a stand-in. The sweep is in test_kernels_ops."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memarch import kernels
from memarch.kernels.attention import attention, flash_impl, torch_impl

IMPLS = ["reference", "torch"]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(T: int, S: int | None = None, H: int = 2, G: int = 2, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return draw(2, T, H, D), draw(2, S or T, G, D), draw(2, S or T, G, D)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window, T", [(1, 5), (3, 20), (16, 150), (40, 150), (70, 300)])
def test_the_window_counts_itself(impl, window, T):
    """A key window - 1 back is seen, one window back is not: in the gradient of one query, wherever it stands."""
    q, k, v = qkv(T)
    v.requires_grad_()
    for t in {0, window - 1, window, T // 2, T - 1} & set(range(T)):
        seen = torch.autograd.grad(attention(q, k, v, window=window, impl=impl)[:, t].sum(), v)[0].abs().sum((0, 2, 3)) > 0
        assert seen.nonzero().flatten().tolist() == list(range(max(0, t - window + 1), t + 1))


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_values_come_back(impl):
    q, k, v = qkv(150)
    sink = draw(2, 3, 2, 8), torch.ones(2, 3, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(attention(q, k, torch.ones_like(v), window=16, sink=sink, impl=impl), torch.ones_like(q))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [None, 5, 40])
def test_streaming_with_a_padded_history_equals_whole(impl, window):
    """Keys kept as the last n rows in front of the new ones, rows at different places: every cut gives what the whole sequence gives."""
    T, n = 130, 130 if window is None else window - 1
    q, k, v = qkv(T, H=4)
    whole = attention(q, k, v, window=window)
    keys, values = torch.full((2, n, 2, 8), 9.0, dtype=torch.float64), torch.full((2, n, 2, 8), 9.0, dtype=torch.float64)
    begin, outs = 0, []
    for size in (1, 2, 60, 1, 66):
        end = begin + size
        keys, values = torch.cat([keys, k[:, begin:end]], 1), torch.cat([values, v[:, begin:end]], 1)
        outs.append(attention(q[:, begin:end], keys, values, pos=torch.full((2,), begin), window=window, impl=impl))
        keys, values, begin = keys[:, size:], values[:, size:], end
    torch.testing.assert_close(torch.cat(outs, 1), whole)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("window", [16, 32, 40])
def test_sinks_continue_a_window(impl, window):
    """The first P positions stay visible for ever, and near the start, where the window still covers them, they count once."""
    T, P = 150, 3
    q, k, v = qkv(T)
    o = attention(q, k, v, window=window, sink=(k[:, :P], v[:, :P]), impl=impl)
    far = torch.arange(T)[:, None] - torch.arange(T)
    seen = (far >= 0) & ((far < window) | (torch.arange(T) < P))
    truth = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen).transpose(1, 2)
    torch.testing.assert_close(o, truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_alibi(impl):
    q, k, v = qkv(90, 100)
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    far = (torch.arange(10, 100)[:, None] - torch.arange(100)).double()
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.3 - slopes[:, None, None] * far
    truth = torch.einsum("bhts,bshv->bthv", scores.masked_fill(far < 0, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(attention(q, k, v, slopes=slopes, scale=0.3, impl=impl), truth)


def test_long_sequences_under_several_masks(monkeypatch):
    q, k, v = qkv(70, 90, H=4)
    extra = {"pos": torch.tensor([3, 20]), "slopes": torch.rand(4, dtype=torch.float64), "sink": (k[:, :2], v[:, :2])}
    for names in ((), ("pos",), ("slopes",), ("pos", "sink"), ("sink", "slopes")):
        given = {name: extra[name] for name in names}
        truth = attention(q, k, v, **given, impl="reference")
        monkeypatch.setattr(torch_impl, "ROWS", 32)
        torch.testing.assert_close(attention(q, k, v, **given), truth)


@pytest.fixture
def calls(monkeypatch):
    """What reaches scaled_dot_product_attention: (shape of q, shape of k, mask or None, is_causal)."""
    seen, real = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, is_causal=False, **options):
        seen.append((tuple(q.shape), tuple(k.shape), attn_mask, is_causal))
        return real(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return seen


def test_plain_causal_attention_builds_no_mask(calls):
    attention(*qkv(100))
    attention(*qkv(100), window=100)
    attention(*qkv(100), pos=torch.zeros(2, dtype=torch.int64))
    assert [(mask, causal) for _, _, mask, causal in calls] == [(None, True)] * 3


def test_decoding_repeats_no_key(calls):
    attention(*qkv(1, 50, H=4, G=2))
    attention(*qkv(1, 50, H=4, G=2), pos=torch.tensor([3, 70]), window=20)
    assert [(q, k, mask is None) for q, k, mask, _ in calls] == [((2, 2, 2, 8), (2, 2, 50, 8), True), ((2, 2, 2, 8), (2, 2, 20, 8), False)]


@pytest.mark.parametrize("options", [{}, {"pos": True}, {"slopes": True}, {"sink": True, "pos": True}], ids=str)
def test_a_window_costs_linear_time_and_memory(options, calls):
    """Counted, not timed: the products of queries and keys, and the largest mask."""
    pairs, masks = {}, {}
    for T in (1024, 4096):
        calls.clear()
        q, k, v = (x.float() for x in qkv(T, T + 63))
        given = {"pos": torch.tensor([0, 7]) if "pos" in options else None, "slopes": torch.ones(2) if "slopes" in options else None}
        given["sink"] = (k[:, :2], v[:, :2]) if "sink" in options else None
        attention(q, k, v, window=64, **given)
        pairs[T] = sum(q[0] * q[1] * q[2] * k[2] for q, k, _, _ in calls)
        masks[T] = max(mask.numel() for _, _, mask, _ in calls)
    assert pairs[1024] <= 2 * 2 * 1024 * 3 * 64
    assert pairs[4096] <= 4.1 * pairs[1024]
    assert masks[4096] == masks[1024]


def test_flops_of_a_window_are_linear():
    found = []
    for T in (1024, 4096):
        q, k, v = (x.float().requires_grad_() for x in qkv(T))
        with kernels.flop_counter() as counter:
            attention(q, k, v, window=64).sum().backward()
        found.append(counter.get_total_flops())
    assert 0 < found[1] <= 4.1 * found[0]


def test_gradients_of_pads_are_finite():
    """Queries behind a row's end and history that is not there: no NaN, neither forward nor backward."""
    q, k, v = (x.requires_grad_() for x in qkv(100, 115))
    for window in (None, 16):
        o = attention(q, k, v, pos=torch.tensor([0, 0]), window=window)
        grads = torch.autograd.grad(o.sum(), (q, k, v))
        assert o.isfinite().all() and all(x.isfinite().all() for x in grads)
        assert (grads[1][:, :15] == 0).all(), "history before the stream's start gets no gradient"


def test_autocast_is_done_before_choosing():
    q, k, v = (x.float() for x in qkv(40))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16
        assert attention(q.double(), k.double(), v.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "change, message",
    [
        ({"window": 0}, ">= 1"),
        ({"k": draw(2, 3, 2, 8), "v": draw(2, 3, 2, 8)}, "S >= T"),
        ({"k": draw(2, 5, 3, 8), "v": draw(2, 5, 3, 8)}, "3 key heads do not divide 2 query heads"),
        ({"k": draw(2, 5, 2, 7)}, "attention wants"),
        ({"pos": torch.zeros(3, dtype=torch.int64)}, r"\[B\] = \[2\]"),
        ({"slopes": draw(3)}, r"\[H\] = \[2\]"),
        ({"sink": (draw(2, 3, 1, 8), draw(2, 3, 1, 8))}, "sinks are"),
    ],
)
def test_errors_teach(change, message):
    q, k, v = qkv(5)
    with pytest.raises(ValueError, match=message):
        attention(**{"q": q, "k": k, "v": v} | change)


# ------------------------------------------------------------------------------------------------ flash-attn


@pytest.fixture
def flash(monkeypatch):
    """A stand-in for the package, which computes what flash-attn documents for these arguments and keeps what it was given."""
    given = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, **rest):
        given.append({"q": q, "k": k, "v": v, "scale": softmax_scale, "causal": causal, "window": window_size, "slopes": alibi_slopes, "rest": rest})
        T, S = q.shape[1], k.shape[1]
        far = torch.arange(S - T, S)[:, None] - torch.arange(S)  # "aligned to the bottom right corner"
        left, right = window_size
        seen = torch.ones_like(far, dtype=torch.bool)
        seen &= far <= left if left >= 0 else True
        seen &= far >= -right if right >= 0 else True
        seen &= far >= 0 if causal else True
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        scores = softmax_scale * torch.einsum("bthd,bshd->bhts", q.float(), k.float())
        if alibi_slopes is not None:
            scores = scores - alibi_slopes[:, None, None] * far.abs()
        return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v.float()).to(q.dtype)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return given


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("history", [0, 5])
@pytest.mark.parametrize("alibi", [False, True])
def test_flash_adapter(flash, window, history, alibi):
    q, k, v = (x.bfloat16() for x in qkv(30, 30 + history, H=4))
    slopes = torch.rand(4, dtype=torch.float64) if alibi else None
    o = flash_impl.attention(q, k, v, None, window, None, slopes, 0.25)
    (call,) = flash
    assert call["q"] is q and call["k"] is k and call["v"] is v, "the layout is ours: [B, T, H, D], nothing is copied"
    assert call["causal"] is True and call["scale"] == 0.25 and call["rest"] == {}
    assert call["window"] == ((-1, -1) if window is None else (window - 1, 0))
    assert call["slopes"] is None if slopes is None else call["slopes"].dtype == torch.float32
    truth = attention(q.double(), k.double(), v.double(), window=window, slopes=slopes, scale=0.25, impl="reference")
    torch.testing.assert_close(o.double(), truth, rtol=2e-2, atol=2e-2)


def test_flash_is_probed_once(flash, monkeypatch):
    monkeypatch.setattr(flash_impl, "_probe", None)
    assert flash_impl.probe() == (False, "flash-attn needs a CUDA device") and flash == []
    tries = []
    monkeypatch.setattr(flash_impl, "_probe", None)
    monkeypatch.setattr(flash_impl, "_try", lambda: tries.append(1) or flash_impl.Probe(False, "undefined symbol"))
    assert [flash_impl.probe().reason for _ in range(3)] == ["undefined symbol"] * 3
    assert tries == [1]


def test_a_broken_flash_attn_is_a_reason_not_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises ImportError
    found = flash_impl._try()
    assert not found.ok and "flash" in found.reason
