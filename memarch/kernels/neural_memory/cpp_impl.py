"""As torch_impl, but the dual form goes through its chunks in C++ (cpu.cpp), and so does one token of a memory of several layers, without gradients."""

from functools import partial

import torch
from torch import Tensor

from memarch.kernels.neural_memory import cpp, dual, torch_impl
from memarch.kernels.neural_memory.memory import Form, Memory, State, fresh

Maybe = Tensor | None
ENGINES = torch_impl.Engines(dual=partial(dual.run, native=True))


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    log_momentum: Maybe,
    step: Tensor,
    state: State | None,
    memory: Memory,
    form: Form,
    lengths: Maybe,
) -> tuple[Tensor, State]:
    begun = fresh(memory, k, v, log_momentum is not None, form) if state is None else state
    tensors = [x for x in (q, k, v, log_decay, log_momentum, step, memory.gain, memory.bias, *memory.weights, *begun.weights) if x is not None]
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    several = len(memory.weights) > 1  # a matrix is through before the call is made
    if q.shape[1] > 1 or not several or form.window > 1 or memory.pull is not None or learning or torch.compiler.is_compiling():
        return torch_impl.neural_memory(q, k, v, log_decay, log_momentum, step, state, memory, form, lengths, ENGINES)
    return cpp.one_token(q, k, v, log_decay, log_momentum, step, begun, memory, form, lengths)
