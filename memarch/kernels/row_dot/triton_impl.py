"""The bag's Triton kernels with the roles exchanged."""

from memarch.kernels import flops
from memarch.kernels.row_dot import operator
from memarch.kernels.row_dot.operator import adjoint
from memarch.kernels.weighted_bag import triton_impl

row_dot = adjoint("row_dot_triton", triton_impl.bag, triton_impl.backward)
flops.file(operator.flops("row_dot_triton"))
checks = triton_impl.checks
