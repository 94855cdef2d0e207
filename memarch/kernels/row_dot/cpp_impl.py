"""The bag's C++ with the roles exchanged."""

from memarch.kernels.row_dot.operator import adjoint
from memarch.kernels.weighted_bag import cpp_impl

row_dot = adjoint("row_dot_cpp", cpp_impl.bag, cpp_impl.backward)
