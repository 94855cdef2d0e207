"""The dual form of the neural memory in Triton: under its interpreter against the dual form in torch, and compiled for sm_90."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memarch.kernels.neural_memory import dual, triton_dual
from test_kernels_ops import close, draw, rms
from test_triton import bound
from test_triton import poison as poison  # a fixture

NAMES = ("q", "k", "v", "log_decay", "log_momentum", "step", "weights", "momentum", "point", "init", "gain", "bias", "pull", "place", "lengths")
OPTIONS = ("activation", "post", "chunk", "window", "clip")


def problem(
    T: int = 10, B: int = 2, H: int = 1, K: int = 5, V: int = 5, hidden: int | None = 7, biases: bool = False, momentum: bool = True, given: bool = False,
    init: bool = False, pull: bool = False, place: list[int] | None = None, lengths: list[int] | None = None, activation: str = "gelu",
    post: str = "none", chunk: int = 4, window: int = 1, clip: float | None = None,
) -> dict:  # fmt: skip
    """The arguments of `dual.run`; given: a chunk has begun, which goes with a place."""
    widths = [(K + biases, V)] if hidden is None else [(K + biases, hidden), (hidden + biases, V)]

    def layers(on: bool, size: float) -> list[Tensor]:
        return [size * draw(B, H, *w) for w in widths] if on else []

    x = {"q": draw(B, T, H, K), "k": F.normalize(draw(B, T, H, K), dim=-1), "v": draw(B, T, H, V), "log_decay": -0.1 * F.softplus(draw(B, T, H))}
    x |= {"log_momentum": -F.softplus(draw(B, T, H)) if momentum else None, "step": 0.2 * draw(B, T, H).sigmoid()}
    x |= {"weights": layers(True, 0.7), "momentum": layers(momentum, 0.1), "point": layers(given, 0.7), "init": layers(init, 0.7)}
    x |= {"gain": 1 + 0.1 * draw(B, H, V) if post in ("rms", "ln") else None, "bias": 0.1 * draw(B, H, V) if post == "ln" else None}
    x |= {"pull": draw(chunk).sigmoid() if pull else None}
    x |= {"place": None if place is None else torch.tensor(place), "lengths": None if lengths is None else torch.tensor(lengths)}
    return x | {"activation": activation, "post": post, "chunk": chunk, "window": window, "clip": clip}


PLACED = {"given": True, "place": [1, 3]}
PROBLEMS = {
    "depth 1": {"hidden": None, "K": 6},
    "depth 1 without momentum, to its start, biases": {"hidden": None, "momentum": False, "init": True, "biases": True, "post": "ln"},
    "depth 1 rms clip": {"hidden": None, "post": "rms", "clip": 0.3, "init": True, **PLACED},
    "none": {"V": 6, "T": 12},
    "none without momentum": {"momentum": False, "activation": "silu", "lengths": [0, 7]},
    "res silu": {"post": "res", "activation": "silu", "init": True},
    "rms clip": {"post": "rms", "clip": 0.3, **PLACED, "lengths": [9, 0]},
    "ln clip window": {"post": "ln", "clip": 0.3, "window": 3, "activation": "silu"},
    "ln window, cut inside a chunk": {"post": "ln", "window": 3, "given": True, "place": [-1, 1], "lengths": [11, 6], "init": True},
    "biases": {"biases": True, "post": "ln"},
    "pull": {"biases": True, "post": "ln", "pull": True, "momentum": False, "clip": 0.3},
    "pull, cut inside a chunk": {"post": "res", "pull": True, "init": True, **PLACED, "lengths": [1, 10]},
    "within a chunk": {"T": 3, "post": "ln", "chunk": 5},
    "chunks of one": {"T": 3, "H": 2, "chunk": 1},
}  # fmt: skip


def outcome(run, x: dict, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Outputs, the final state and all gradients of one call."""
    low = {"q", "k", "v", "log_decay", "log_momentum", "step"}

    def leaf(name: str, y):
        if isinstance(y, list):
            return [leaf(name, z) for z in y]
        if not isinstance(y, Tensor) or not y.is_floating_point():
            return y
        return y.detach().to(dtype if name in low or dtype == torch.float64 else torch.float32).requires_grad_()

    x = {name: leaf(name, y) for name, y in x.items()}
    o, new = run(*(x[name] for name in (*NAMES, *OPTIONS)))
    found = {"o": o} | {f"new[{i}]": y for i, y in enumerate(new)}
    generator = torch.Generator().manual_seed(1)
    sum((y.double() * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum() for y in found.values()).backward()
    found = {name: y.detach() for name, y in found.items()}
    for name, y in x.items():
        for i, z in enumerate(y if isinstance(y, list) else [y]):
            if isinstance(z, Tensor) and z.requires_grad:
                found[f"gradient of {name}[{i}]"] = z.grad
    return found


@pytest.mark.parametrize("name", PROBLEMS)
def test_interpreted_equals_torch(name, poison, monkeypatch):
    """In float64, so that nothing hides in a tolerance; two chunks at a time, so that what goes from part to part is seen."""
    monkeypatch.setattr(triton_dual, "PROGRAMS", 4)
    x = problem(**PROBLEMS[name])
    truth, found = outcome(dual.run, x), outcome(triton_dual.run, x)
    for what in truth:
        close(found[what], truth[what], 1e-10, what)


def test_clip_bites():
    """Else the sweep above says nothing of it."""
    x = problem(**PROBLEMS["rms clip"])
    assert not torch.allclose(*(dual.run(*(y[name] for name in (*NAMES, *OPTIONS)))[0] for y in (x, x | {"clip": None})))
    wide = x | {"clip": 1e9}
    torch.testing.assert_close(*(triton_dual.run(*(y[name] for name in (*NAMES, *OPTIONS)))[0] for y in (wide, wide | {"clip": None})))


def test_wide(poison):
    """Several tiles across, the last of them ragged, biases in both layers."""
    x = problem(T=20, B=1, K=70, V=70, hidden=150, biases=True, post="ln", chunk=17, clip=0.3, init=True)
    truth, found = outcome(dual.run, x), outcome(triton_dual.run, x)
    for what in truth:
        close(found[what], truth[what], 1e-10, what)


def test_inference_keeps_no_states_and_no_graph():
    x = problem(**PROBLEMS["ln window, cut inside a chunk"])
    with torch.no_grad():
        found, truth = (run(*(x[name] for name in (*NAMES, *OPTIONS))) for run in (triton_dual.run, dual.run))
    close(found[0], truth[0], 1e-10, "o")
    for i, (a, b) in enumerate(zip(found[1], truth[1], strict=True)):
        close(a, b, 1e-10, f"new[{i}]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["depth 1 rms clip", "ln clip window"])
def test_interpreted_low_precision(name, dtype):
    x = problem(**PROBLEMS[name] | {"T": 21, "chunk": 16, "K": 16, "V": 16})
    x = {n: y.to(dtype).double() if isinstance(y, Tensor) and n in NAMES[:6] else y for n, y in x.items()}
    truth, plain, fast = outcome(dual.run, x), outcome(dual.run, x, dtype), outcome(triton_dual.run, x, dtype)
    for what in truth:
        error, allowed = (rms(y[what].double() - truth[what]) for y in (fast, plain))
        assert error <= bound(what, allowed, rms(truth[what]), dtype), f"{what}: {error:.2e}, torch {allowed:.2e}"


def test_counts_like_torch():
    """The same products, so the same count."""
    from memarch.kernels import flop_counter

    counts = []
    for run in (dual.run, triton_dual.run):
        with flop_counter() as counter:
            outcome(run, problem(T=4, init=True))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_operators_say_what_they_return():
    x = problem(T=3, B=1, given=True, place=[2], init=True, post="ln")
    inputs = [x[name] for name in (*NAMES, *OPTIONS)]
    torch.library.opcheck(triton_dual.operator, (*inputs, True), test_utils="test_faketensor")
    o, new, states = triton_dual.operator(*inputs, True)
    back = (o, new, *inputs[:6], states, *inputs[8:])
    torch.library.opcheck(triton_dual.operator_backward, back, test_utils="test_faketensor")


def test_refusals():
    assert triton_dual.why_not([(64, 256), (256, 64)], 64) is None
    assert triton_dual.why_not([(128, 512), (512, 128)], 128) is None
    assert "two" in triton_dual.why_not([(8, 8)] * 3, 64)
    assert "128" in triton_dual.why_not([(64, 256), (256, 64)], 129)
    assert "128" in triton_dual.why_not([(192, 256), (256, 64)], 64)
