"""The neural memory for a GPU: a matrix in its exact form (triton_linear.py), all others in dual form (triton_dual.py). One token is torch's."""

from collections.abc import Iterator
from functools import partial

from memarch.kernels.launch import Check
from memarch.kernels.neural_memory import torch_impl, triton_dual, triton_linear
from memarch.kernels.neural_memory.memory import Form, Memory, is_linear

neural_memory = partial(torch_impl.neural_memory, engines=torch_impl.Engines(triton_linear.run, triton_dual.run))


def why_not(K: int, V: int, memory: Memory, form: Form) -> str | None:
    if form.chunk is None and is_linear(memory):
        return triton_linear.why_not(memory.weights[0].shape[-2] if memory.weights else K)
    return triton_dual.why_not([(w.shape[-2], w.shape[-1]) for w in memory.weights] or [(K, V)], form.chunk or 1)


def checks() -> Iterator[Check]:
    yield from triton_linear.checks()
    yield from triton_dual.checks()
