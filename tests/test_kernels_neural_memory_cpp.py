"""The neural memory in C++: the sweep of every other implementation, and what is its own."""

import pytest
import torch
from torch import Tensor

import test_kernels_ops as ops
from memarch.kernels import native
from memarch.kernels.neural_memory import Memory, neural_memory

pytestmark = pytest.mark.usefixtures("native_library")
poison = ops.poison


@pytest.fixture(autouse=True)
def compiler(native_library):
    if native.why_not() not in (None, native.NOT_BUILT):
        pytest.skip(native.why_not())


def test_cpp_equals_reference(poison):
    """The sweep of every other implementation."""
    ops.test_equals_reference("neural_memory", "cpp")
    ops.test_reads_nothing_it_did_not_write("neural_memory", "cpp", None)
    ops.test_outputs_own_their_memory("neural_memory", "cpp")
    ops.test_inputs_are_left_alone("neural_memory", "cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision(dtype):
    ops.test_low_precision_by_the_2x_3x_rule("neural_memory", "cpp", dtype)


def wide(K: int, hidden: int, T: int, B: int = 1, H: int = 3) -> tuple[list[Tensor], Memory]:
    """Widths of several vectors and a rest; one bias."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    k = torch.nn.functional.normalize(draw(B, T, H, K), dim=-1)
    gates = [-0.1 * draw(B, T, H).abs(), -draw(B, T, H).abs(), 0.1 * draw(B, T, H).sigmoid()]
    weights = draw(H, K, hidden) / K**0.5, draw(H, hidden + 1, K) / hidden**0.5
    memory = Memory(weights, post="ln", gain=1 + 0.1 * draw(H, K), bias=0.1 * draw(H, K), decay_to="init")
    return [draw(B, T, H, K), k, draw(B, T, H, K), *gates], memory


@pytest.mark.parametrize("K, hidden", [(32, 64), (17, 35), (8, 9), (40, 3)])
@pytest.mark.parametrize("chunk", [16, 25])
def test_any_width(K, hidden, chunk):
    """Whole tiles of a product, and what is left beside and below them."""
    xs, memory = wide(K, hidden, 70)
    found = []
    for impl in ("torch", "cpp"):
        given = [x.clone().requires_grad_() for x in (*xs, *memory.weights)]
        o, state = neural_memory(*given[:6], memory=memory._replace(weights=tuple(given[6:])), grad_point="chunk", chunk=chunk, clip=2.0, impl=impl)
        loss = o.square().sum() + sum(w.square().sum() for w in (*state.weights, *state.momentum))
        found.append([o, *state.weights, *state.momentum, *torch.autograd.grad(loss, given)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_the_activation_in_float32(activation):
    """At every size of its argument: a memory of one hidden number, never written to, answers phi(w k)."""
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e4, -1e-4, 0.0, 1e-4, 1e4])])[None, :, None, None]
    one, off = torch.ones(1, 1, 1), torch.zeros(1, x.shape[1], 1)
    o, _ = neural_memory(x, x, x, off, None, off, memory=Memory((one, one), activation=activation), grad_point="chunk", impl="cpp")
    phi = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[activation]
    torch.testing.assert_close(o.double(), phi(x.double()), rtol=2e-6, atol=5e-7)


def test_threads_do_not_matter():
    xs, memory = wide(32, 64, 70, B=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(neural_memory(*xs, memory=memory, grad_point="chunk", chunk=16, impl="cpp")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_one_token_without_gradients():
    """As decoding does it."""
    for T in (1, 65):  # of 65 the states, where the next token completes a chunk, or does not
        for case in ops.CASES["neural_memory"](T):
            given = ops.prepare(case.inputs, grad=False)
            found = []
            for impl in ("reference", "cpp"):
                inputs = dict(given)
                if T > 1:
                    inputs["state"] = neural_memory(**given, impl="reference")[1]
                    inputs |= {n: x[:, :1] for n, x in given.items() if n in ops.STATEFUL["neural_memory"] and x is not None}
                    inputs["lengths"] = None if given["lengths"] is None else torch.tensor([0, 1, 1])
                found.append(ops.flat(neural_memory(**inputs, impl=impl)))
            for a, b in zip(*found, strict=True):
                ops.close(b, a, 1e-10, case.name)
