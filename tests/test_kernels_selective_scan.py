"""The selective scan: against the reference, where one knows the answer, at its extremes; what it costs; the adapter against a stand-in."""

import itertools
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import test_kernels_ops as ops
from memarch.kernels import native
from memarch.kernels.choose import Machine
from memarch.kernels.selective_scan import FLOPS, cpp_impl, mamba_impl, pick, reference, selective_scan, torch_impl, why_not
from test_kernels_ops import draw, ragged, rms

pytestmark = pytest.mark.usefixtures("native_library")
IMPLS = ["reference", "torch", "cpp"]
poison = ops.poison


@pytest.fixture(params=IMPLS)
def impl(request):
    if request.param == "cpp" and native.why_not() not in (None, native.NOT_BUILT):
        pytest.skip(native.why_not())
    return request.param


fast = pytest.mark.parametrize("impl", IMPLS[1:], indirect=True)
OPERATORS = {"torch": torch_impl.selective_scan.operator, "cpp": cpp_impl.selective_scan.operator}


def example(T: int, R: int = 3, E: int = 5, N: int = 4, D: bool = True, z: bool = True, state: bool = True, lengths: bool = False) -> dict[str, Any]:
    x = {"x": draw(R, T, E), "dt": F.softplus(draw(R, T, E)), "A": -draw(E, N).exp(), "B": draw(R, T, N), "C": draw(R, T, N)}
    x |= {"D": draw(E) if D else None, "z": draw(R, T, E) if z else None, "state": draw(R, E, N) if state else None}
    return x | {"lengths": ragged(T)[0] if lengths else None}


def fresh(x: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {n: v.detach().to(dtype).requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in x.items()}


def run(x: dict[str, Any], impl: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """y, the new state, and the gradients of all that has one for fixed cotangents of both."""
    x = fresh(x, dtype)
    out = selective_scan(**x, impl=impl)
    seed = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=seed, dtype=torch.float64).to(v)).sum() for v in out)
    wanted = {n: v for n, v in x.items() if isinstance(v, Tensor) and v.is_floating_point()}
    grads = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True), strict=True))
    return {"y": out[0].detach(), "h": out[1].detach()} | {n: torch.zeros_like(x[n]) if g is None else g for n, g in grads.items()}


def close(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------------------------------ the answer


@fast
@pytest.mark.parametrize("T", [1, 2, 32, 33, 64, 65, 130])
def test_equals_reference(impl, T, poison):
    """Every option with every other; rows without tokens; chunks that are full and that are not."""
    for D, z, state, lengths in itertools.product((False, True), repeat=4):
        x = example(T, D=D, z=z, state=state, lengths=lengths)
        close(run(x, impl), run(x, "reference"))


@fast
@pytest.mark.parametrize("E, N", [(1, 1), (63, 1), (64, 16), (65, 3), (200, 2), (1100, 1), (300, 120)])
def test_any_width(impl, E, N):
    """Around one tile of channels, several tiles, more tiles than groups of them; chunks of the shortest and of the longest."""
    x = example(35, R=2, E=E, N=N)
    close(run(x, impl), run(x, "reference"))


@fast
def test_a_thousand_tokens(impl):
    x = example(1000, lengths=True)
    close(run(x, impl), run(x, "reference"), 1e-9)


def published(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """mamba-ssm's selective_scan_ref: everything discretised at once, then a loop."""
    a, u = torch.einsum("rte,en->rten", dt, A).exp(), torch.einsum("rte,rtn,rte->rten", dt, B, x)
    h, ys = torch.zeros_like(a[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + u[:, t]
        ys.append(torch.einsum("ren,rn->re", h, C[:, t]))
    return (torch.stack(ys, 1) + x * D) * F.silu(z)


def test_reference_is_the_published_algorithm():
    x = example(40)
    x.pop("lengths"), x.pop("state")
    torch.testing.assert_close(selective_scan(**x, impl="reference")[0], published(**x), rtol=1e-12, atol=1e-12)


def test_constant_steps_are_a_convolution(impl):
    """Its kernel is C e^{k dt A} dt B."""
    x = example(40, D=False, z=False, state=False)
    for name in ("dt", "B", "C"):
        x[name] = x[name][:1, :1].expand_as(x[name])
    dt, B, C = x["dt"][0, 0], x["B"][0, 0], x["C"][0, 0]
    k = torch.einsum("ken,n,n,e->ke", (torch.arange(40.0)[:, None, None] * dt[:, None] * x["A"]).exp(), C, B, dt)
    truth = torch.stack([torch.einsum("ke,rke->re", k[: t + 1].flip(0), x["x"][:, : t + 1]) for t in range(40)], 1)
    torch.testing.assert_close(selective_scan(**x, impl=impl)[0], truth, rtol=1e-12, atol=1e-12)


def test_the_state_fades_and_is_only_added(impl):
    """What the state adds to y is C e^{A sum dt} h0: linear in it, and independent of x."""
    x = example(40, z=False)
    difference = selective_scan(**x, impl=impl)[0] - selective_scan(**x | {"state": None}, impl=impl)[0]
    left = (x["dt"].cumsum(1)[..., None] * x["A"]).exp() * x["state"][:, None]
    torch.testing.assert_close(difference, torch.einsum("rten,rtn->rte", left, x["C"]), rtol=1e-10, atol=1e-12)


def test_a_step_of_zero_keeps_the_state_to_the_bit(impl):
    x = fresh(example(40), torch.float32)
    assert torch.equal(selective_scan(**x | {"dt": x["dt"] * 0}, impl=impl)[1], x["state"])


def test_no_future(impl):
    x = example(50)
    before = selective_scan(**x, impl=impl)[0]
    for name in ("x", "dt", "B", "C", "z"):
        changed = x[name].clone()
        changed[:, 25] *= 0.5
        after = selective_scan(**x | {name: changed}, impl=impl)[0]
        assert torch.equal(after[:, :25], before[:, :25]) and not torch.allclose(after[:, 25:], before[:, 25:])


def pieces(x: dict[str, Any], cuts: list[int], impl: str) -> list[Tensor]:
    x = fresh(x)
    ys, state = [], x["state"]
    for begin, end in itertools.pairwise([0, *itertools.accumulate(cuts)]):
        part = {n: x[n][:, begin:end] for n in ("x", "dt", "B", "C", "z")}
        y, state = selective_scan(**part, A=x["A"], D=x["D"], state=state, impl=impl)
        ys.append(y)
    y = torch.cat(ys, 1)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + state.square().sum()
    return [y, state, *torch.autograd.grad(loss, [v for v in x.values() if v is not None])]


def test_pieces_equal_whole_at_every_cut(impl):
    x = example(36, R=2)
    whole = pieces(x, [36], impl)
    for cuts in ([1] * 36, [1, 16, 3, 15, 1], *([cut, 36 - cut] for cut in range(1, 36))):
        for a, b in zip(whole, pieces(x, cuts, impl), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("T", [1, 40])
def test_pads_answer_zero_whatever_they_hold(impl, T):
    """Even NaN: what stands there may never have been computed. A row without tokens keeps its state."""
    x, real = example(T, lengths=True), ragged(T)[1][..., None]
    clean = run(x, impl)
    found = run({n: torch.where(real, v, torch.nan) if n in ("x", "dt", "B", "C", "z") else v for n, v in x.items()}, impl)
    close(found, clean, 0)
    assert (found["y"][~real[..., 0]] == 0).all() and torch.equal(found["h"][0], x["state"][0])
    assert all((found[n][~real[..., 0]] == 0).all() for n in ("x", "dt", "B", "C", "z"))


def test_gradients_by_finite_differences(impl):
    x = fresh(example(4, R=2, E=2, N=2))
    names = [n for n, v in x.items() if v is not None]
    assert torch.autograd.gradcheck(lambda *vs: selective_scan(**dict(zip(names, vs, strict=True)), impl=impl), [x[n] for n in names])


@fast
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "state"])
def test_only_one_gradient_is_wanted(impl, name):
    x = example(20)
    alone = {n: v if n != name else v.clone().requires_grad_() for n, v in x.items()}
    y, state = selective_scan(**alone, impl=impl)
    for used in (y, state) if name not in ("C", "D", "z") else (y,):
        (found,) = torch.autograd.grad(used.square().sum(), alone[name], retain_graph=True)
        every = fresh(x)
        truth = selective_scan(**every, impl="reference")[0 if used is y else 1]
        torch.testing.assert_close(found, torch.autograd.grad(truth.square().sum(), every[name])[0], rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------ precision


@fast
@pytest.mark.parametrize("rate", [-1e3, -1.0, -1e-6])
@pytest.mark.parametrize("step", [1e-8, 1.0, 1e4, "mixed"])
def test_extremes(impl, rate, step):
    """Nothing overflows, and in float32 even the gradients that a strong decay leaves tiny keep their relative precision."""
    x = example(40)
    x["A"] = rate * torch.rand_like(x["A"]).add(0.5)
    x["dt"] = torch.where(torch.rand_like(x["dt"]) < 0.5, 1e-6, 30.0) if step == "mixed" else step * torch.rand_like(x["dt"])
    rounded = {n: v if v is None else v.float().double() for n, v in x.items()}
    truth, exact, single, plain = (run(rounded, *how) for how in (("reference",), (impl,), (impl, torch.float32), ("reference", torch.float32)))
    close(exact, truth)
    for name, v in truth.items():
        allowed = 3 * rms(plain[name].double() - v) + 64 * torch.finfo(torch.float32).eps * rms(v) + 1e-36
        assert single[name].isfinite().all() and rms(single[name].double() - v) <= allowed, name


@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_by_the_2x_3x_rule(impl, dtype):
    """The error against float64 is at most twice (gradients: three times) the reference's own at that dtype."""
    for T, lengths in ((1, False), (2, False), (64, True), (130, False)):
        x = {n: v.to(dtype).double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in example(T, E=70, lengths=lengths).items()}
        truth, plain, found = run(x, "reference"), run(x, "reference", dtype), run(x, impl, dtype)
        for name, v in truth.items():
            error, own = rms(found[name].double() - v), rms(plain[name].double() - v)
            floor = 16 * torch.finfo(torch.float32).eps * rms(v)
            assert error <= (2 if name in "yh" else 3) * own + floor, f"T{T} {name}: {error:.2e}, the reference {own:.2e}"


def test_the_exponential_of_the_cpp_kernel():
    """Within 2 ulp of 2^x, exact where it is a power of 2, zero and infinity where they belong. A is such that dt A is -dt in powers of 2."""
    A = torch.full((1, 1), -0.69314718)
    assert (A * 1.442695).item() == -1

    def power(x: Tensor) -> Tensor:
        dt = torch.zeros(1, 2, len(x))
        dt[0, 0] = -x
        zero = torch.zeros(1, 2, 1)
        return selective_scan(dt * 0, dt, A.expand(len(x), 1), zero, zero, state=torch.ones(1, len(x), 1), impl="cpp")[1].flatten()

    x = torch.cat([-torch.rand(100_000) * 126, -torch.logspace(-9, 0, 100_000), torch.rand(10_000) * 127])
    truth = x.double().exp2()
    assert ((power(x).double() - truth).abs() / truth).max() <= 2 * torch.finfo(torch.float32).eps
    whole = torch.arange(-126.0, 128)
    assert torch.equal(power(whole), whole.exp2())
    ends = torch.tensor([-128.0, -1e6, -1e30, 128.0, 1e6, torch.nan])
    torch.testing.assert_close(power(ends), torch.tensor([0.0, 0, 0, torch.inf, torch.inf, torch.nan]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("T", [1, 40])
def test_each_input_in_its_own_dtype(impl, T):
    """As a layer has it under autocast: activations in bfloat16, steps and parameters in float32."""
    x = fresh(example(T), torch.bfloat16)
    x |= {n: x[n].detach().float().requires_grad_() for n in ("dt", "A", "D", "state")}
    y, state = selective_scan(**x, impl=impl)
    truth = selective_scan(**{n: v if v is None else v.detach().float() for n, v in x.items()}, impl="reference")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), truth[0], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(state, truth[1], rtol=1e-5, atol=1e-5)
    for v, g in zip(given := [v for v in x.values() if v is not None], torch.autograd.grad(y.float().sum() + state.sum(), given), strict=True):
        assert g.dtype == v.dtype and g.shape == v.shape


@pytest.mark.parametrize("T", [1, 40])
def test_autocast_changes_nothing(impl, T):
    x = fresh(example(T), torch.float32)
    plain = run(x, impl, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        close(run(x, impl, torch.float32), plain, 0)


# ------------------------------------------------------------------------------------------------ what it costs


@fast
def test_nothing_of_the_size_of_all_states_is_saved(impl):
    """Beside the inputs, one state for every chunk of tokens."""
    T, E, N, saved = 256, 64, 32, {}
    chunk = {"torch": torch_impl.span(1, E, N), "cpp": cpp_impl.CHUNK}[impl]

    def pack(v: Tensor) -> Tensor:
        saved[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    x = fresh(example(T, R=1, E=E, N=N), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        selective_scan(**x, impl=impl)
    given = sum(v.numel() for n, v in x.items() if v is not None and n != "state")
    assert sum(saved.values()) == 4 * (given + T // chunk * N * E)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has which is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(v.numel() for v in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(v, Tensor)), 0)
        return out


@fast
def test_nothing_of_the_size_of_all_states_is_made(impl):
    module = {"torch": torch_impl, "cpp": cpp_impl}[impl]
    x = example(2048, R=1, E=64, N=32)
    with Largest() as largest:
        y, h, states = module.scan(*x.values(), True)
        module.scan_backward(y, h, *list(x.values())[:7], states, None)
    assert states.numel() <= largest.numel <= 2048 * 64 * 32 / 16


@fast
def test_without_gradients_no_operator_is_called(impl, monkeypatch):
    """The first call of one imports dynamo. Neither is one called for a single token."""
    x = example(20)
    monkeypatch.setattr(torch._library.custom_ops.CustomOpDef, "__call__", lambda *_: pytest.fail("an operator was called"))
    selective_scan(**x, impl=impl)
    with torch.no_grad():
        selective_scan(**fresh(x), impl=impl)
    selective_scan(**fresh(example(1)), impl=impl)


@fast
def test_inputs_may_be_parts_of_a_projection(impl):
    """And are left as they were."""
    wide = draw(2, 40, 3 * 6 + 2 * 4)
    x, dt, z, B, C = wide.split([6, 6, 6, 4, 4], -1)
    x = {"x": x, "dt": dt.abs(), "A": -draw(4, 6).exp().mT, "B": B, "C": C, "D": draw(12)[::2], "z": z, "state": draw(2, 4, 6).mT}
    before = {n: v.clone() for n, v in x.items()}
    close(run(x, impl), run({n: v.contiguous() for n, v in x.items()}, "reference"))
    assert all(torch.equal(v, before[n]) for n, v in x.items())


def test_outputs_own_their_memory(impl):
    for T, N, E in ((1, 1, 1), (1, 4, 5), (40, 4, 5), (40, 1, 5), (40, 4, 1)):
        x = example(T, E=E, N=N, D=False, z=False)
        for v in selective_scan(**x, impl=impl):
            assert v.untyped_storage().nbytes() == v.numel() * 8
            assert v.untyped_storage().data_ptr() not in {u.untyped_storage().data_ptr() for u in x.values() if u is not None}


def test_same_bits_on_any_number_of_threads():
    x, found, before = example(100, R=2, E=300), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(x, "cpp", torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        close(other, found[0], 0)


@fast
def test_opcheck(impl):
    for options in ({}, {"D": False, "z": False, "state": False, "lengths": True}):
        torch.library.opcheck(OPERATORS[impl], (*fresh(example(40, **options)).values(), True))


@fast
@pytest.mark.parametrize("T", [1, 40])
def test_one_graph_forward_and_backward(impl, T):
    torch._dynamo.reset()
    x = example(T, lengths=True)
    found, truth = fresh(x), fresh(x)
    graph = torch.compile(lambda x: selective_scan(**x, impl=impl), fullgraph=True, backend="aot_eager")
    for a, b in zip(graph(found), selective_scan(**truth, impl=impl), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    sum(v.square().sum() for v in graph(found)).backward()
    sum(v.square().sum() for v in selective_scan(**truth, impl=impl)).backward()
    for name, v in truth.items():
        if v is not None and v.is_floating_point():
            torch.testing.assert_close(found[name].grad, v.grad, rtol=1e-12, atol=1e-12)


def test_flops_are_those_of_the_equations():
    x = torch.Size((2, 100, 64)), torch.Size((2, 100, 64)), torch.Size((64, 16))
    assert FLOPS["selective_scan"](*x, out_shape=None) == FLOPS["selective_scan_cpp"](*x) == 6 * 2 * 100 * 64 * 16
    assert FLOPS["selective_scan_backward"](x[0], None, *x) == 3 * FLOPS["selective_scan"](*x)


# ------------------------------------------------------------------------------------------------ what runs, and mamba-ssm


@pytest.mark.parametrize(
    "device, dtype, N, fresh, name, says",
    [
        ("cpu", torch.float32, 16, True, "cpp", "mamba-ssm needs a CUDA device"),
        ("cpu", torch.bfloat16, 16, False, "cpp", "mamba-ssm needs a CUDA device"),
        ("cuda", torch.bfloat16, 256, True, "mamba", "its probe call worked"),
        ("cuda", torch.bfloat16, 257, True, "torch", "up to 256 states"),
        ("cuda", torch.float64, 16, True, "torch", "at most float32"),
        ("cuda", torch.float32, 16, False, "torch", "begins with a state of zeros"),
    ],
)
def test_pick(device, dtype, N, fresh, name, says):
    choice = pick(device, dtype, N, fresh, Machine(mamba=None, cpp=None))
    assert choice.name == name and says in choice.reason


def test_pick_where_nothing_is_built():
    assert pick("cpu", torch.float32).name == "torch" and "memarch warmup" in pick("cpu", torch.float32).reason
    assert why_not("torch", "cpu", torch.int64) == "x must be floating point, it is torch.int64"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"x": draw(3, 5)}, r"x \[R,T,E\] with T >= 1 and A \[E,N\]; got \[3, 5\]"),
        ({"x": draw(3, 0, 5)}, "T >= 1"),
        ({"x": draw(3, 5, 7)}, "transposed here"),
        ({"dt": draw(3, 7, 1)}, r"dt is \[R,T,E\] = \[3, 7, 5\]; got \[3, 7, 1\]"),
        ({"B": draw(3, 4, 7)}, r"B is \[R,T,N\] = \[3, 7, 4\]"),
        ({"C": draw(3, 7, 5)}, r"C is \[R,T,N\]"),
        ({"D": draw(4)}, r"D is \[E\] = \[5\]; got \[4\]"),
        ({"z": draw(3, 7, 4)}, r"z is \[R,T,E\]"),
        ({"state": draw(3, 4, 5)}, r"state is \[R,E,N\] = \[3, 5, 4\]"),
        ({"lengths": torch.ones(2)}, r"lengths is \[R\] = \[3\]"),
    ],
)
def test_wrong_shapes(change, says):
    with pytest.raises(ValueError, match=says):
        selective_scan(**example(7) | change)


def test_forcing_mamba_without_a_gpu():
    with pytest.raises(ValueError, match="'mamba' cannot run here: mamba-ssm needs a CUDA device, the tensors are on cpu"):
        selective_scan(**example(7), impl="mamba")


@pytest.fixture
def mamba_ssm(monkeypatch):
    """A stand-in for the package: computes what mamba-ssm documents for these arguments, gives its final state no gradient, keeps what it was given."""
    calls: list[dict[str, Any]] = []

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        given = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z}
        calls.append(given | {"delta_bias": delta_bias, "delta_softplus": delta_softplus})
        assert all(v is None or v.is_contiguous() for v in given.values())
        assert delta.shape == u.shape and B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2]), "time last"
        assert {v.dtype for v in (delta, B, C, z) if v is not None} == {u.dtype} and A.dtype == torch.float32
        y, last = reference.selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, None if z is None else z.mT, None, None)
        intermediate = torch.stack([last, last], -1).flatten(2)[:, :, None].detach()  # [R, E, 1, 2 N], of which the state is a view
        return (y.mT.contiguous(), intermediate[:, :, -1, 1::2]) if return_last_state else y.mT.contiguous()

    package, ops, interface = (types.ModuleType(n) for n in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"))
    interface.selective_scan_fn = selective_scan_fn
    for module in (package, ops, interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.mark.parametrize("D, z, lengths", list(itertools.product((False, True), repeat=3)))
def test_mamba_adapter(mamba_ssm, D, z, lengths):
    """Same outputs and gradients, those through the final state included, whatever the kernel itself leaves out."""
    x = example(20, D=D, z=z, state=False, lengths=lengths)
    found, truth = fresh(x, torch.float32), fresh(x, torch.float32)
    outs = [mamba_impl.selective_scan(*found.values()), reference.selective_scan(*truth.values())]
    (call,) = mamba_ssm
    assert call["delta_bias"] is None and call["delta_softplus"] is False, "dt is after its softplus"
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert a.untyped_storage().nbytes() == a.numel() * 4
    for y, h in outs:
        (y.square().sum() + h.pow(3).sum()).backward()
    for name, v in truth.items():
        if v is not None and v.is_floating_point():
            torch.testing.assert_close(found[name].grad, v.grad, rtol=1e-4, atol=1e-4)


def test_mamba_adapter_keeps_steps_in_float32(mamba_ssm):
    x = fresh(example(20, state=False), torch.bfloat16)
    assert mamba_impl.selective_scan(*x.values())[0].dtype == torch.bfloat16 and mamba_ssm[-1]["u"].dtype == torch.bfloat16
    x["dt"] = x["dt"].detach().float()
    y, h = mamba_impl.selective_scan(*x.values())
    assert (y.dtype, h.dtype, mamba_ssm[-1]["u"].dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_one_token_needs_no_kernel(mamba_ssm):
    x = example(1, state=False)
    torch.testing.assert_close(mamba_impl.selective_scan(*x.values()), reference.selective_scan(*x.values()))
    assert mamba_ssm == []


def test_mamba_is_probed_once_and_its_numbers_are_looked_at(mamba_ssm, monkeypatch):
    assert mamba_impl._try("cpu") == (True, None)
    interface = sys.modules["mamba_ssm.ops.selective_scan_interface"]
    right = interface.selective_scan_fn
    monkeypatch.setattr(interface, "selective_scan_fn", lambda *a, **k: tuple(1.01 * v for v in right(*a, **k)))
    wrong = mamba_impl._try("cpu")
    assert not wrong.ok and "AssertionError" in wrong.reason
    tries = []
    monkeypatch.setattr(mamba_impl, "_probe", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mamba_impl, "_try", lambda device: tries.append(device) or mamba_impl.Probe(False, "undefined symbol"))
    assert [mamba_impl.probe().reason for _ in range(3)] == ["undefined symbol"] * 3 and tries == ["cuda"]


def test_a_broken_mamba_is_a_reason_not_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # importing it raises ImportError
    found = mamba_impl._try("cpu")
    assert not found.ok and found.reason.startswith("mamba-ssm: ModuleNotFoundError")
