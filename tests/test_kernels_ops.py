"""What holds for every operator, swept over the table `memarch.kernels.OPS` and over each op's implementations.

An op enters the sweep through CASES: op -> cases, a case being the tensors of one call. `reference` in float64 is the truth.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memarch import kernels
from memarch.kernels import OPS
from memarch.kernels.neural_memory import Memory, start

LENGTHS = (1, 2, 63, 64, 65, 130)


class Case(NamedTuple):
    name: str
    inputs: dict[str, Any]  # keyword arguments; a float64 tensor gets a gradient
    defined: Tensor | None = None  # [B, T]: outputs with [B, T, ...] count only there


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ragged(T: int) -> tuple[Tensor, Tensor]:
    """Three rows: no token, some, all; and which of their outputs are defined."""
    lengths = torch.tensor([0, (T + 1) // 2, T])
    return lengths, torch.arange(T) < lengths[:, None]


def delta_rule(T: int, B: int = 3, H: int = 2, K: int = 5, V: int = 7) -> Iterator[Case]:
    full = T in (2, 65)
    for beta, g, state, lengths in [(i & 1, i & 2, i & 4, i & 8) for i in (range(16) if full else (0, 1, 2, 7, 15))]:
        inputs = {"q": draw(B, T, H, K), "k": F.normalize(draw(B, T, H, K), dim=-1), "v": draw(B, T, H, V)}
        inputs |= {"beta": draw(B, T, H).sigmoid() if beta else None, "g": -F.softplus(draw(B, T, H)) if g else None}
        inputs["state"] = draw(B, H, K, V) if state else None
        inputs["lengths"], defined = ragged(T) if lengths else (None, None)
        yield Case(f"T{T} " + " ".join(n for n, on in (("beta", beta), ("g", g), ("state", state), ("lengths", lengths)) if on), inputs, defined)


def gated_linear(T: int, B: int = 3, H: int = 2, K: int = 5, V: int = 7) -> Iterator[Case]:
    for strong, state, lengths in ((0, 0, 0), (0, 0, 1), (1, 1, 0), (0, 1, 0), (0, 1, 1)):
        inputs = {"q": draw(B, T, H, K), "k": draw(B, T, H, K), "v": draw(B, T, H, V)}
        inputs["g"] = -F.softplus(draw(B, T, H, K)) * (40 if strong else 1)
        inputs["state"] = draw(B, H, K, V) if state else None
        inputs["lengths"], defined = ragged(T) if lengths else (None, None)
        yield Case(f"T{T} " + "strong " * strong + "state " * state + "lengths" * lengths, inputs, defined)


def selective_scan(T: int, R: int = 3, E: int = 5, N: int = 4) -> Iterator[Case]:
    for D, z, state, lengths in ((0, 0, 0, 0), (1, 0, 1, 0), (0, 1, 0, 1), (1, 1, 1, 1)):
        inputs = {"x": draw(R, T, E), "dt": F.softplus(draw(R, T, E)), "A": -draw(E, N).exp(), "B": draw(R, T, N), "C": draw(R, T, N)}
        inputs |= {"D": draw(E) if D else None, "z": draw(R, T, E) if z else None, "state": draw(R, E, N) if state else None}
        inputs["lengths"], defined = ragged(T) if lengths else (None, None)
        yield Case(f"T{T} " + "D " * D + "z " * z + "state " * state + "lengths" * lengths, inputs, defined)


def short_conv(T: int, B: int = 3, D: int = 5) -> Iterator[Case]:
    for W, bias, state, lengths in ((1, 1, 1, 1), (2, 0, 0, 0), (4, 1, 0, 1), (4, 0, 1, 0), (4, 1, 1, 1), (7, 1, 1, 1)):
        inputs = {"x": draw(B, T, D), "weight": draw(D, W), "bias": draw(D) if bias else None, "state": draw(B, W - 1, D) if state else None}
        inputs["lengths"], defined = ragged(T) if lengths else (None, None)
        yield Case(f"T{T} W{W} " + "state " * state + "lengths" * lengths, inputs, defined)


def attention(T: int, B: int = 3, H: int = 4, D: int = 6, V: int = 5) -> Iterator[Case]:
    wide = {1: 3, 2: 1, 63: 16, 64: 70, 65: 200, 130: 32}[T]  # the window; 32 at 130 takes the path in blocks of 32
    for history, window, sinks, groups, pos, slopes in (
        (0, None, 0, 4, 0, 0),
        (3, None, 0, 1, 1, 1),
        (0, wide, 0, 4, 0, 0),
        (wide + 2, wide, 0, 2, 0, 1),
        (wide - 1, wide, 0, 2, 1, 0),
        (5, wide, 3, 2, 1, 0),
        (2, wide, 3, 1, 1, 1),
        (2, wide, 3, 4, 0, 0),
        (0, None, 2, 2, 0, 0),
    ):
        inputs: dict[str, Any] = {"q": draw(B, T, H, D), "k": draw(B, history + T, groups, D), "v": draw(B, history + T, groups, V)}
        inputs |= {"window": window, "pos": torch.tensor([0, min(1, history), history + 4]) if pos else None}
        inputs["sink"] = (draw(B, sinks, groups, D), draw(B, sinks, groups, V)) if sinks else None
        inputs["slopes"] = torch.rand(H, dtype=torch.float64) if slopes else None
        yield Case(f"T{T} history{history} window{window} sinks{sinks} groups{groups} pos{pos} slopes{slopes}", inputs)


def neural_memory(T: int, B: int = 3, H: int = 2, K: int = 4, V: int = 5) -> Iterator[Case]:
    """The exact linear form, which pads what it does not fill with tokens that are none; then chunks of 16, rows at different places."""
    full = T in (2, 65)
    for momentum, lengths, init, post in [(i & 1, i & 2, i & 4, "res" if i & 8 else "none") for i in (range(16) if full else (3, 15))]:
        memory = Memory((draw(H, K, K if post == "res" else V),), post=post, decay_to="init" if init else "zero")
        yield _memory_case(T, B, H, K, memory, momentum, lengths, {}, bool(init))
    for layers, momentum, lengths, post, states, more in (
        (3, 1, 0, "none", (1,), {}),
        (2, 0, 1, "res", (0,), {"clip": 0.5}),
        (2, 1, 1, "rms", (1,), {"window": 3}),
        (3, 0, 0, "ln", (0,), {"pull": draw(16).sigmoid(), "decay_to": "init"}),
        (2, 1, 1, "ln", (1,), {"pull": draw(16).sigmoid(), "decay_to": "init", "clip": 0.5, "window": 4, "activation": "silu"}),
    ):
        between = ((H, 6, 5),) if layers == 3 else ()
        widths = (H, K + 1, 6), *between, (H, (between or ((6,),))[0][-1] + 1, V if post == "none" else K)  # with a bias in the first and the last layer
        options = {n: more[n] for n in ("activation", "decay_to", "pull") if n in more} | {"post": post}
        options["gain"] = 1 + 0.1 * draw(H, K) if post in ("rms", "ln") else None
        options["bias"] = 0.1 * draw(H, K) if post == "ln" else None
        memory = Memory(tuple(0.8 * draw(*w) for w in widths), **options)
        chunks = {"grad_point": "chunk", "chunk": 16} | {n: more[n] for n in ("clip", "window") if n in more}
        for state in (0, 1) if full else states:
            yield _memory_case(T, B, H, K, memory, momentum, lengths, chunks, bool(state))
    yield _memory_case(T, B, H, K, Memory((0.5 * draw(H, K, 6), 0.5 * draw(H, 6, V)), decay_to="init"), 1, 1, {"clip": 0.5}, True)  # exact, token by token


def _memory_case(T: int, B: int, H: int, K: int, memory: Memory, momentum: int, lengths: int, options: dict[str, Any], state: bool) -> Case:
    inputs = {"q": draw(B, T, H, K), "k": F.normalize(draw(B, T, H, K), dim=-1), "v": draw(B, T, H, memory.weights[-1].shape[-1])}
    inputs |= {"log_decay": -0.1 * F.softplus(draw(B, T, H)), "log_momentum": -F.softplus(draw(B, T, H)) if momentum else None}
    inputs |= {"step": 0.02 * draw(B, T, H).sigmoid(), "memory": memory, **options}
    inputs["state"] = None
    if state:
        how = {n: x for n, x in options.items() if n != "clip"}
        at_start = start(inputs["k"], inputs["v"], memory=memory, momentum=bool(momentum), **how)
        inputs["state"] = mapped(lambda x: x + 0.1 * draw(*x.shape) if x.is_floating_point() else torch.tensor([0, 5, 15]), at_start)
    inputs["lengths"], defined = ragged(T) if lengths else (None, None)
    what = options | {"layers": len(memory.weights), "post": memory.post, "decay_to": memory.decay_to}
    return Case(f"T{T} momentum{momentum} lengths{lengths} state{int(state)} {what}", inputs, defined)


def product_key_topk(T: int) -> Iterator[Case]:
    for n, k in ((9, 4), (9, 9), (1, 1), (40, 1), (40, 33)):
        yield Case(f"T{T} n{n} k{k}", {"s1": draw(2, T, n), "s2": draw(2, T, n), "k": k})
    halves = [draw(2, T, 8).mul(2).round().div(2) for _ in range(2)]  # many equal scores, sums exact
    yield Case(f"T{T} ties", {"s1": halves[0], "s2": halves[1], "k": 5})


def taylor_attention(T: int, B: int = 3, H: int = 2, F: int = 4, V: int = 5) -> Iterator[Case]:
    for state, lengths in ((0, 0), (0, 1), (1, 0), (1, 1)):
        inputs = {"q": draw(B, T, H, F), "k": draw(B, T, H, F), "v": draw(B, T, H, V)}
        inputs["state"] = draw(B, H, 1 + F + F * (F + 1) // 2, V + 1) if state else None
        inputs["lengths"], defined = ragged(T) if lengths else (None, None)
        yield Case(f"T{T} " + "state " * state + "lengths" * lengths, inputs, defined)


def row_dot(T: int) -> Iterator[Case]:
    for R, d, dtype in ((5, 6, torch.int64), (1, 3, torch.int32)):
        yield Case(f"T{T} R{R} {dtype}", {"table": draw(11, d), "ids": torch.randint(0, 11, (2, T, R), dtype=dtype), "x": draw(2, T, d)})


def tucker_topk(T: int) -> Iterator[Case]:
    for heads, r, n, k, axis in (
        ((), 1, 9, 4, None),
        ((3,), 2, 9, 4, None),
        ((2,), 3, 6, 6, None),
        ((), 2, 1, 1, None),
        ((2, 2), 2, 20, 3, None),
        ((2,), 2, 9, 25, 5),
        ((), 4, 20, 2, 7),
    ):
        core = torch.rand(*heads, r, r, dtype=torch.float64)
        inputs = {"s1": draw(2, T, *heads, r, n), "s2": draw(2, T, *heads, r, n), "core": core}
        inputs |= dict(zip("uv", OPS["tucker_topk"].principal(core), strict=True)) | {"k": k, "axis": axis}
        yield Case(f"T{T} heads{heads} r{r} n{n} k{k} axis{axis}", inputs)


def weighted_bag(T: int, R: int = 5) -> Iterator[Case]:
    for N, d, h, groups, dtype in (
        (11, 6, None, None, torch.int64),
        (11, 6, None, None, torch.int32),
        (300, 7, 1, None, torch.int64),
        (11, 6, 3, None, torch.int64),
        (3, 6, None, 4, torch.int32),
        (11, 10, 2, 3, torch.int64),
        (1, 1, 1, 1, torch.int64),
    ):
        inputs: dict[str, Any] = {"table": draw(N, d), "ids": torch.randint(0, N, (2, T, R), dtype=dtype)}
        inputs["ids"][..., -1] = inputs["ids"][..., 0]  # twice in one bag
        inputs["weights"] = draw(2, T, R) if h is None else draw(2, T, R, h)
        inputs |= {"groups": torch.randint(0, groups, (2, T, R), dtype=dtype), "n_groups": groups} if groups else {}
        yield Case(f"T{T} N{N} d{d} h{h} groups{groups} {dtype}", inputs)


CASES: dict[str, Callable[[int], Iterator[Case]]] = {
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
FAST = [(op, impl) for op in OPS for impl in OPS[op].IMPLEMENTATIONS if impl != "reference" and not OPS[op].why_not(impl, "cpu", torch.float64)]


def test_every_op_has_cases():
    assert set(CASES) == set(OPS), "an op in memarch.kernels.OPS is tested here: give it cases in CASES"


def leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The floating point tensors by name, also those of a tuple in tuples."""
    out = {}
    for name, value in inputs.items():
        if isinstance(value, tuple):
            out |= leaves({f"{name}{i}": x for i, x in enumerate(value)})
        elif isinstance(value, Tensor) and value.is_floating_point():
            out[name] = value
    return out


def flat(out: Any) -> list[Tensor]:
    """The tensors an op gave, states of several tensors opened."""
    return [y for x in out for y in flat(x)] if isinstance(out, tuple) else [out]


def mapped(fn: Callable[[Tensor], Tensor], x: Any) -> Any:
    """fn of every tensor in a tuple, named or not."""
    if isinstance(x, tuple):
        values = [mapped(fn, y) for y in x]
        return type(x)(*values) if hasattr(x, "_fields") else tuple(values)
    return fn(x) if isinstance(x, Tensor) else x


def prepare(inputs: dict[str, Any], dtype: torch.dtype = torch.float64, grad: bool = True) -> dict[str, Any]:
    """Fresh tensors, those of float64 in `dtype`."""

    def fresh(x: Tensor) -> Tensor:
        return x.detach().to(dtype).clone().requires_grad_(grad) if x.dtype == torch.float64 else x.clone()

    return {name: mapped(fresh, x) for name, x in inputs.items()}


def run(op: str, inputs: dict[str, Any], impl: str | None, defined: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs and, for fixed cotangents, gradients of every floating point input, by name."""
    outs = flat(getattr(OPS[op], op)(**inputs, impl=impl))
    if defined is not None:
        outs[0] = outs[0] * defined.view(*defined.shape, *[1] * (outs[0].ndim - 2)).to(outs[0])
    found = {f"output{i}": x.detach() for i, x in enumerate(outs)}
    wanted = {name: x for name, x in leaves(inputs).items() if x.requires_grad}
    if wanted:
        seed = torch.Generator().manual_seed(1)
        loss = sum((x * torch.randn(x.shape, generator=seed, dtype=torch.float64).to(x)).sum() for x in outs if x.requires_grad)
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        found |= {f"gradient of {name}": torch.zeros_like(x) if y is None else y for (name, x), y in zip(wanted.items(), grads, strict=True)}
    return found


def sweep(op: str, lengths: tuple[int, ...] = LENGTHS) -> Iterator[Case]:
    return (case for T in lengths for case in CASES[op](T))


def close(found: Tensor, truth: Tensor, tolerance: float, what: str) -> None:
    torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("op, impl", FAST)
def test_equals_reference(op, impl):
    for case in sweep(op):
        truth = run(op, prepare(case.inputs), "reference", case.defined)
        found = run(op, prepare(case.inputs), impl, case.defined)
        assert found.keys() == truth.keys()
        for name in truth:
            close(found[name], truth[name], 1e-10, f"{case.name}, {name}")


@pytest.mark.parametrize("op", ["delta_rule", "gated_linear", "neural_memory", "selective_scan", "short_conv", "taylor_attention"])
def test_a_thousand_tokens(op):
    """Many groups of chunks, the last chunk not full, rows of different length; what is carried has had time to go wrong."""
    case = list(CASES[op](1000))[-1]
    truth, found = (run(op, prepare(case.inputs), impl, case.defined) for impl in ("reference", "torch"))
    for name in truth:
        close(found[name], truth[name], 1e-9, name)


@pytest.fixture
def poison():
    """Whatever `torch.empty` gives is NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("op, impl", FAST)
def test_reads_nothing_it_did_not_write(op, impl, poison):
    for case in sweep(op, (1, 2, 65, 130)):
        for name, x in run(op, prepare(case.inputs), impl).items():
            assert x.isfinite().all(), f"{case.name}: {name}"


@pytest.mark.parametrize("op, impl", FAST)
def test_outputs_own_their_memory(op, impl):
    """A view would keep a bigger buffer alive, and safetensors refuses it. One output may be the whole of its storage in another order."""
    for case in sweep(op, (1, 2, 65, 130)):
        for grad in (False, True):
            inputs = prepare(case.inputs, grad=grad)
            out = getattr(OPS[op], op)(**inputs, impl=impl)
            given = {x.untyped_storage().data_ptr() for x in leaves(inputs).values() if x.numel()}
            for x in flat(out) if isinstance(out, tuple) else ():
                assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), case.name
                assert not x.numel() or x.untyped_storage().data_ptr() not in given, case.name


@pytest.mark.parametrize("op, impl", FAST)
def test_inputs_are_left_alone(op, impl):
    for case in sweep(op, (1, 65)):
        inputs = prepare(case.inputs)
        before = {name: x.detach().clone() for name, x in leaves(inputs).items()}
        run(op, inputs, impl)
        for name, x in leaves(inputs).items():
            assert torch.equal(x, before[name]), f"{case.name}: {name}"


LOW = [
    (op, impl) for op, impl in FAST if op in ("attention", "delta_rule", "gated_linear", "neural_memory", "selective_scan", "short_conv", "taylor_attention")
]


@pytest.mark.parametrize("op, impl", LOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_by_the_2x_3x_rule(op, impl, dtype):
    """Everyone gets the same rounded inputs; the error against float64 is at most twice (gradients: three times) the reference's own at
    that dtype. The floor allows sums of float32 in another order where the reference happens to round less."""
    for case in sweep(op, (2, 64, 130)):
        rounded = {n: mapped(lambda x: x.to(dtype).double() if x.is_floating_point() else x, x) for n, x in case.inputs.items() if n != "slopes"}
        rounded |= {n: case.inputs[n] for n in ("slopes",) if n in case.inputs}
        truth = run(op, prepare(rounded), "reference", case.defined)
        plain, fast = (run(op, prepare(rounded, dtype), name, case.defined) for name in ("reference", impl))
        for name in truth:
            error, allowed = (rms(x[name].double() - truth[name]) for x in (fast, plain))
            factor, floor = 3 if name.startswith("gradient") else 2, 16 * torch.finfo(torch.float32).eps * rms(truth[name])
            assert error <= factor * allowed + floor, f"{case.name}, {name}: {error:.2e}, the reference {allowed:.2e}"


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


COMPILED = {  # op -> the cases one graph is shown with, by index in CASES[op](T)
    "attention": ((65, 3), (65, 6), (130, 4), (1, 4)),
    "delta_rule": ((65, 15), (65, 0), (1, 4)),
    "gated_linear": ((65, 4), (65, 0), (1, 4)),
    "neural_memory": ((65, 15), (65, 0), (65, 25), (65, 22), (1, 1), (1, 6)),
    "product_key_topk": ((2, 0), (2, 5)),
    "row_dot": ((2, 0),),
    "selective_scan": ((65, 3), (65, 0), (1, 3)),
    "short_conv": ((65, 4), (1, 4)),
    "taylor_attention": ((65, 3), (65, 0), (1, 3)),
    "tucker_topk": ((2, 1), (65, 4)),
    "weighted_bag": ((2, 0), (65, 5), (2, 4)),
}


@pytest.mark.parametrize("op", OPS)
def test_one_graph_forward_and_backward(op):
    for T, index in COMPILED[op]:
        torch._dynamo.reset()
        case = list(CASES[op](T))[index]
        compiled = torch.compile(lambda inputs: getattr(OPS[op], op)(**inputs), fullgraph=True, backend="aot_eager")
        plain, graph = prepare(case.inputs), prepare(case.inputs)
        for a, b in zip(outs_and_grads(getattr(OPS[op], op)(**plain), plain), outs_and_grads(compiled(graph), graph), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def outs_and_grads(out: Any, inputs: dict[str, Any]) -> list[Tensor]:
    outs = flat(out)
    wanted = [x for x in leaves(inputs).values() if x.requires_grad]
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in outs if x.requires_grad)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*(x.detach() for x in outs), *(torch.zeros_like(x) if y is None else y for x, y in zip(wanted, grads, strict=True))]


def test_forcing_is_seen_inside_a_graph():
    torch._dynamo.reset()
    inputs = prepare(next(CASES["delta_rule"](2)).inputs, grad=False)
    compiled = torch.compile(lambda: kernels.delta_rule.delta_rule(**inputs)[0], fullgraph=True, backend="eager")
    free = compiled()
    with kernels.using("reference"):
        assert torch.equal(compiled(), kernels.delta_rule.delta_rule(**inputs, impl="reference")[0])
    assert torch.equal(compiled(), free)


@pytest.mark.parametrize("op", ["delta_rule", "gated_linear", "neural_memory", "short_conv"])
def test_gradients_by_finite_differences(op):
    tiny = {"delta_rule": _tiny_delta(12), "gated_linear": _tiny_gated(12), "neural_memory": _tiny_memory(7), "short_conv": _tiny_conv(5)}
    for case in tiny[op]:
        inputs = prepare(case.inputs)

        def call(*xs: Tensor, inputs: dict[str, Any] = inputs) -> Any:
            given = {id(x): y for x, y in zip(leaves(inputs).values(), xs, strict=True)}
            out = flat(getattr(OPS[op], op)(**{n: mapped(lambda x: given.get(id(x), x), x) for n, x in inputs.items()}))
            return tuple(x for x in out if x.is_floating_point())

        assert torch.autograd.gradcheck(call, tuple(leaves(inputs).values()))


def _tiny_delta(T: int) -> Iterator[Case]:
    for beta, g in ((1, 1), (0, 1), (1, 0), (0, 0)):
        inputs = {"q": draw(1, T, 1, 2), "k": F.normalize(draw(1, T, 1, 2), dim=-1), "v": draw(1, T, 1, 3), "state": draw(1, 1, 2, 3)}
        yield Case("", inputs | {"beta": draw(1, T, 1).sigmoid() if beta else None, "g": -draw(1, T, 1).exp() if g else None})


def _tiny_gated(T: int) -> Iterator[Case]:
    inputs = {"q": draw(1, T, 1, 2), "k": draw(1, T, 1, 2), "v": draw(1, T, 1, 3), "g": -draw(1, T, 1, 2).exp(), "state": draw(1, 1, 2, 3)}
    yield Case("", inputs)


def _tiny_memory(T: int) -> Iterator[Case]:
    linear = Memory((draw(1, 3, 2),), decay_to="init", post="res")
    mlp = Memory((draw(1, 3, 3), draw(1, 3, 2)), "gelu", "ln", draw(1, 2), draw(1, 2), "init", draw(3).sigmoid())
    yield _memory_case(T, 3, 1, 2, linear, 1, 1, {}, True)
    for momentum in (0, 1):
        yield _memory_case(T, 1, 1, 2, mlp, momentum, 0, {"grad_point": "chunk", "chunk": 3, "window": 2, "clip": 1.0}, False)


def _tiny_conv(T: int) -> Iterator[Case]:
    yield Case("", {"x": draw(2, T, 2), "weight": draw(2, 3), "bias": draw(2), "state": draw(2, 2, 2), "lengths": torch.tensor([1, T])})


STATEFUL = {
    "delta_rule": ("q", "k", "v", "beta", "g"),
    "gated_linear": ("q", "k", "v", "g"),
    "neural_memory": ("q", "k", "v", "log_decay", "log_momentum", "step"),
    "selective_scan": ("x", "dt", "B", "C", "z"),
    "short_conv": ("x",),
    "taylor_attention": ("q", "k", "v"),
}


@pytest.mark.parametrize("op", STATEFUL)
@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("cuts", [[1] * 70, [35, 35], [1, 33, 3, 32, 1], [64, 6]], ids=["single", "halves", "ragged", "64+6"])
def test_pieces_equal_whole(op, impl, cuts):
    case = {
        "delta_rule": lambda: list(delta_rule(70))[3],
        "gated_linear": lambda: list(gated_linear(70))[3],
        "neural_memory": lambda: list(neural_memory(70))[6],
        "selective_scan": lambda: list(selective_scan(70))[3],
        "short_conv": lambda: list(short_conv(70))[3],
        "taylor_attention": lambda: list(taylor_attention(70))[3],
    }[op]()
    inputs = prepare({**case.inputs, "lengths": None})
    whole = outs_and_grads(getattr(OPS[op], op)(**inputs, impl=impl), inputs)
    inputs, outs = prepare({**case.inputs, "lengths": None}), []
    state, begin = inputs["state"], 0
    for n in cuts:
        piece = {name: x[:, begin : begin + n] if name in STATEFUL[op] and x is not None else x for name, x in inputs.items()}
        *out, state = getattr(OPS[op], op)(**{**piece, "state": state}, impl=impl)
        outs.append(out)
        begin += n
    for a, b in zip(whole, outs_and_grads((*(torch.cat(out, 1) for out in zip(*outs, strict=True)), state), inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", STATEFUL)
@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("T", [1, 65])
def test_pads_are_invisible(op, impl, T):
    """Whatever stands behind a row's end: same outputs, same state, no gradient there. A row without tokens keeps its state."""
    case = list(CASES[op](T))[-1]
    other = dict(case.inputs)
    for name in STATEFUL[op]:
        x = case.inputs[name]
        mask = case.defined.view(3, T, *[1] * (x.ndim - 2))
        other[name] = torch.where(mask, x, -7.0 * torch.ones_like(x))
    a, b = (run(op, prepare(inputs), impl, case.defined) for inputs in (case.inputs, other))
    for name in a:
        close(a[name], b[name], 1e-12, name)
    for name in STATEFUL[op]:
        assert (b[f"gradient of {name}"][~case.defined] == 0).all(), name
    kept = flat(case.inputs["state"])
    state = [x for name, x in a.items() if name.startswith("output")][-len(kept) :]
    assert all(torch.equal(x[0], y[0]) for x, y in zip(state, kept, strict=True))


@pytest.mark.parametrize("op", STATEFUL)
def test_only_some_inputs_need_a_gradient(op):
    case = list(CASES[op](65))[-1]
    everything = run(op, prepare(case.inputs), "torch", case.defined)
    for name in leaves(case.inputs):
        inputs = prepare(case.inputs, grad=False)
        leaves(inputs)[name].requires_grad_()
        alone = run(op, inputs, "torch", case.defined)
        torch.testing.assert_close(alone[f"gradient of {name}"], everything[f"gradient of {name}"], rtol=0, atol=0)


@pytest.mark.parametrize("op", STATEFUL)
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_output_is_used(op, used):
    case = list(CASES[op](65))[-2]
    found = []
    for impl in ("reference", "torch"):
        inputs = prepare(case.inputs)
        out = getattr(OPS[op], op)(**inputs, impl=impl)[used]
        if case.defined is not None and not used:
            out = out * case.defined.view(*case.defined.shape, *[1] * (out.ndim - 2))
        loss = sum(x.square().sum() for x in flat(out) if x.requires_grad)
        grads = torch.autograd.grad(loss, list(leaves(inputs).values()), allow_unused=True)
        found.append([torch.zeros_like(x) if y is None else y for x, y in zip(leaves(inputs).values(), grads, strict=True)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


def test_opcheck():
    from memarch.kernels.delta_rule import torch_impl as delta
    from memarch.kernels.gated_linear import torch_impl as gated
    from memarch.kernels.short_conv import torch_impl as conv

    for case in (list(delta_rule(65))[i] for i in (0, 7)):
        x = prepare(case.inputs)
        torch.library.opcheck(delta.operator, (*(x[n] for n in ("q", "k", "v", "beta", "g", "state", "lengths")), True))
    x = prepare(list(gated_linear(65))[3].inputs)
    torch.library.opcheck(gated.operator, (*(x[n] for n in ("q", "k", "v", "g", "state", "lengths")), True))
    for case in (list(short_conv(7))[i] for i in (1, 4)):
        x = prepare(case.inputs)
        torch.library.opcheck(conv.operator, tuple(x[n] for n in ("x", "weight", "bias", "state", "lengths")))


@pytest.mark.parametrize("op", ["delta_rule", "gated_linear", "selective_scan", "short_conv", "taylor_attention"])
def test_flops_are_counted(op):
    """Inside the operators, forward and backward; without a graph the matrix products are counted one by one, which must agree."""
    T = 128
    cases = {"delta_rule": list(delta_rule(T, B=2, K=16, V=16))[3], "gated_linear": next(gated_linear(T, K=16, V=16))}
    cases |= {"selective_scan": list(selective_scan(T))[1], "short_conv": list(short_conv(T))[4], "taylor_attention": list(taylor_attention(T))[2]}
    inputs = prepare(cases[op].inputs)
    with kernels.flop_counter() as counter:
        outs_and_grads(getattr(OPS[op], op)(**inputs), inputs)
    count = {str(name).rsplit(".", 1)[-1]: n for name, n in counter.get_flop_counts()["Global"].items()}
    assert count[op] > 0
    assert 1.5 <= count[f"{op}_backward"] / count[op] <= 4
    if op not in ("selective_scan", "short_conv"):  # no matrix products, or not only
        with kernels.flop_counter() as counter, torch.no_grad():
            getattr(OPS[op], op)(**inputs)
        assert math.isclose(counter.get_total_flops(), count[op], rel_tol=0.1)
