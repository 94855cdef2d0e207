"""The exact linear memory in Triton: under the interpreter against torch and the reference, and compiled for sm_90."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memarch import kernels
from memarch.kernels.neural_memory import Memory, State, linear, neural_memory, triton_linear
from test_kernels_ops import close, draw, poison, ragged, rms
from test_triton import bound

__all__ = ["poison"]  # nothing may be read that was not written
INPUTS = ("q", "k", "v", "log_decay", "log_momentum", "step", "state")


def case(
    T: int, B: int = 2, H: int = 2, K: int = 5, V: int = 7, momentum: bool = True, state: bool = True, lengths: Tensor | None = None
) -> dict[str, Tensor | None]:
    x: dict[str, Tensor | None] = {"q": draw(B, T, H, K), "k": F.normalize(draw(B, T, H, K), dim=-1), "v": draw(B, T, H, V)}
    x |= {"log_decay": -0.1 * F.softplus(draw(B, T, H)), "log_momentum": -F.softplus(draw(B, T, H)) if momentum else None}
    x |= {"step": 0.3 * draw(B, T, H).sigmoid(), "state": draw(B, H, (1 + momentum) * K, V) if state else None, "lengths": lengths}
    return x


def reference(q, k, v, log_decay, log_momentum, step, state, lengths):
    """What an empty stack of layers stands for: one linear layer that starts at zero."""
    K, given = k.shape[-1], None
    if state is not None:
        given = State((state[:, :, :K],), (state[:, :, K:],) if log_momentum is not None else (), (), (), ())
    o, new = neural_memory(q, k, v, log_decay, log_momentum, step, given, memory=Memory(), lengths=lengths, impl="reference")
    return o, torch.cat([*new.weights, *new.momentum], 2)


def results(call, x: dict[str, Tensor | None], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Outputs, final state and all gradients. Padding is asked for gradients as well; the state stays in float32."""
    leaf = {n: x[n].to(torch.promote_types(dtype, torch.float32) if n == "state" else dtype).requires_grad_() for n in INPUTS if x[n] is not None}
    o, state = call(*(leaf.get(n) for n in INPUTS), x["lengths"])
    generator = torch.Generator().manual_seed(1)
    weigh = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in (o, state)]
    grads = torch.autograd.grad(sum((y.double() * w).sum() for y, w in zip((o, state), weigh, strict=True)), list(leaf.values()))
    return {"o": o, "state": state} | {f"gradient {n}": g for n, g in zip(leaf, grads, strict=True)}


def agree(x: dict[str, Tensor | None]) -> None:
    found = results(triton_linear.run, x)
    for name, call in (("torch", linear.run), ("reference", reference)):
        truth = results(call, x)
        assert found.keys() == truth.keys()
        for n in truth:
            close(found[n], truth[n], 1e-10, f"{n} against {name}")


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("T", [1, 5, 64, 65, 130])
def test_equals_torch_and_reference(T, momentum, poison):
    agree(case(T, H=2 if T < 65 else 1, momentum=momentum, state=T != 65))


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("T", [2, 70])
def test_rows_that_end(T, momentum, poison):
    agree(case(T, B=3, H=1, momentum=momentum, state=T == 2, lengths=ragged(T)[0]))


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("K, V", [(1, 1), (37, 70), (100, 20)])
def test_widths(K, V, momentum, poison):
    """Several tiles, none of them full."""
    agree(case(70, B=1, H=1, K=K, V=V, momentum=momentum))


@pytest.mark.parametrize("momentum", [True, False])
def test_gates_at_their_ends(momentum):
    """Forgetting at once and never, for whole stretches and in turn; steps of zero, after which an error cannot be had from what was written."""
    ends = torch.tensor([0.0, -20.0], dtype=torch.float64)
    x = case(100, B=1, H=4, momentum=momentum)
    for name in ("log_decay", "log_momentum") if momentum else ("log_decay",):
        x[name] = ends[torch.randint(0, 2, (1, 100, 4))]
        x[name][:, 20:60, 0], x[name][:, 20:60, 1] = ends
    x["step"] = torch.where(torch.rand(1, 100, 4) < 0.3, 0, 0.05 * x["step"])
    agree(x)


def test_strong_decay_keeps_what_is_small():
    """After a token that forgets all, single precision still knows small decays: they are sums of their own, not differences of large ones."""
    x = case(36, B=1, momentum=True)
    x["log_decay"], x["log_momentum"] = (1e-4 * n for n in (x["log_decay"], x["log_momentum"]))
    x["log_decay"][:, ::8], x["log_momentum"][:, ::8] = -1e4, -1e4
    x["step"] *= 0.05
    truth, found = results(linear.run, x), results(triton_linear.run, x, torch.float32)
    for n in truth:
        assert rms(found[n] - truth[n]) <= 3e-6 * rms(truth[n]), n


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("cuts", [[1, 69], [33, 1, 30, 6]], ids=str)
def test_pieces_equal_the_whole(cuts, momentum):
    x = case(70, B=1, H=1, momentum=momentum)

    def pieces(*xs):
        *tokens, state, _ = xs
        outs = []
        for at, n in zip((sum(cuts[:i]) for i in range(len(cuts))), cuts, strict=True):
            o, state = triton_linear.run(*(y if y is None else y[:, at : at + n] for y in tokens), state, None)
            outs.append(o)
        return torch.cat(outs, 1), state

    whole, cut = results(triton_linear.run, x), results(pieces, x)
    for n in whole:
        close(cut[n], whole[n], 1e-10, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_low_precision(dtype):
    """The interpreter cuts bfloat16 off where a GPU rounds."""
    for momentum in (True, False):
        x = case(70, H=1, K=20, momentum=momentum, lengths=torch.tensor([37, 70]))
        x = {n: y.to(dtype).double() if y is not None and y.is_floating_point() and n != "state" else y for n, y in x.items()}
        truth, plain, fast = results(linear.run, x), results(reference, x, dtype), results(triton_linear.run, x, dtype)
        for n in truth:
            assert fast[n].dtype == plain[n].dtype
            error, allowed = (rms(y[n].double() - truth[n]) for y in (fast, plain))
            assert error <= bound(n, allowed, rms(truth[n]), dtype), f"{n}: {error:.2e}, the reference {allowed:.2e}, of {rms(truth[n]):.2e}"


def test_what_is_asked_for():
    """Without a gradient the operator is not called; a gradient of one output alone is right; counting sees both ways."""
    x = case(5)
    q, k, v, *rest = (x[n] for n in INPUTS)
    assert not triton_linear.run(q, k, v, *rest, None)[0].requires_grad
    v.requires_grad_()
    for which in (0, 1):
        found, truth = (torch.autograd.grad(call(q, k, v, *rest, None)[which].square().sum(), v)[0] for call in (triton_linear.run, linear.run))
        close(found, truth, 1e-10, f"output {which}")
    with kernels.flop_counter() as counter:
        triton_linear.run(q, k, v, *rest, None)[0].sum().backward()
    assert {f"memarch.neural_memory_linear_triton{s}" for s in ("", "_backward")} <= {str(op) for op in counter.get_flop_counts()["Global"]}


def test_the_operator_is_one():
    x = case(5, lengths=torch.tensor([2, 5]))
    xs = [x[n] if x[n] is None else x[n].requires_grad_() for n in INPUTS]
    torch.library.opcheck(triton_linear.operator, (*xs, x["lengths"]), test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_says_what_it_refuses():
    assert triton_linear.why_not(triton_linear.WIDEST) is None
    assert str(triton_linear.WIDEST) in triton_linear.why_not(triton_linear.WIDEST + 1)
