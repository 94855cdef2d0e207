"""The selective scan: a linear memory for every channel, whose step, write and read depend on the token (Mamba, S6).

    h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t      dt_t [E] >= 0, after its softplus;   A [E, N], every entry < 0;   B_t [N], for all channels
    y_t = h_t C_t + D x_t                        C_t [N], for all channels;   D [E] or none
    y_t <- y_t SiLU(z_t)                         where there is a z

    R rows   T tokens   E channels   N states of a channel

The state is [R, E, N], and in float32 at least, as all that is computed is. The discretisation is the one that every public Mamba has: exact for
the decay, a plain Euler step for the write.
"""

from typing import Any

import torch
from torch import Tensor

from memarch.kernels import native
from memarch.kernels.choose import NO_GPU, Choice, Machine, first, machine, settle, triton_cannot
from memarch.kernels.selective_scan import cpp_impl, mamba_impl, reference, torch_impl


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from memarch.kernels.selective_scan import triton_impl

    return triton_impl.selective_scan(*args)


IMPLEMENTATIONS = {
    "reference": reference.selective_scan,
    "torch": torch_impl.selective_scan,
    "cpp": cpp_impl.selective_scan,
    "mamba": mamba_impl.selective_scan,
    "triton": _triton,
}
FLOPS = torch_impl.FLOPS | cpp_impl.FLOPS
ORDER = (
    ("triton", "a tile of channels goes through time with its states in registers; the same bits every time, from any state"),
    ("mamba", "mamba-ssm imports and its probe call worked"),
    ("cpp", "C++: decays are used where they are made, a tile of channels at a time"),
    ("torch", "in chunks, time first, with a hand-written backward: the product path without a GPU"),
)
STEP = Choice("torch", "one token is the same step in all implementations")  # and asking which can run takes as long as the step
WIDEST = 256  # states of a channel that mamba-ssm and our Triton take


def why_not(name: str, device_type: str, dtype: torch.dtype, N: int = 16, fresh: bool = True, here: Machine = NO_GPU) -> str | None:
    """`fresh`: there is no state yet."""
    if not dtype.is_floating_point:
        return f"x must be floating point, it is {dtype}"
    if name == "cpp":
        return native.cannot(device_type, dtype, here, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    if name == "triton":
        if device_type == "cuda" and (dtype == torch.float64 or N > WIDEST):
            return f"it takes up to {WIDEST} states of a channel in at most float32, not {N} in {dtype}: use torch"
        return triton_cannot(device_type, here, transposes=False)
    return _mamba_cannot(device_type, dtype, N, fresh, here) if name == "mamba" else None


def _mamba_cannot(device_type: str, dtype: torch.dtype, N: int, fresh: bool, here: Machine) -> str | None:
    if device_type != "cuda":
        return f"mamba-ssm needs a CUDA device, the tensors are on {device_type}"
    if here.mamba is not None:
        return here.mamba
    if dtype == torch.float64 or N > WIDEST:
        return f"mamba-ssm takes up to {WIDEST} states of a channel in at most float32, not {N} in {dtype}"
    return None if fresh else "mamba-ssm begins with a state of zeros"


def pick(device_type: str, dtype: torch.dtype, N: int = 16, fresh: bool = True, here: Machine = NO_GPU) -> Choice:
    """Which implementation runs for x of this dtype and N states of a channel, and why."""
    return first(ORDER, lambda name: why_not(name, device_type, dtype, N, fresh, here._replace(interpreted=False)))


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x, dt, z [R,T,E], A [E,N], B, C [R,T,N], D [E], state [R,E,N] or None (zeros), lengths [R] or None
    -> y [R,T,E] in x's dtype and the new state [R,E,N], at least float32.

    Tokens at t >= lengths[r] change nothing, and their outputs are zero."""
    _check(x, dt, A, B, C, D, z, state, lengths)
    shape = x.device.type, x.dtype, A.shape[1], state is None

    def cannot(name: str) -> str | None:
        return why_not(name, *shape, native.buildable(machine(x.device.type)))

    def choice() -> Choice:
        return STEP if x.shape[1] == 1 and x.is_floating_point() else pick(*shape, machine(x.device.type))

    name = settle("selective_scan", IMPLEMENTATIONS, impl, cannot, choice)
    return IMPLEMENTATIONS[name](x, dt, A, B, C, D, z, state, lengths)


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, state: Tensor | None, lengths: Tensor | None) -> None:
    if x.ndim != 3 or A.ndim != 2 or x.shape[2] != A.shape[0] or x.shape[1] < 1:
        raise ValueError(
            f"selective_scan wants x [R,T,E] with T >= 1 and A [E,N]; got {list(x.shape)} and {list(A.shape)}. "
            "Time comes before the channels: what mamba-ssm calls [B,D,L] is transposed here."
        )
    (R, T, E), N = x.shape, A.shape[1]
    tokens, memory = ("[R,T,E]", (R, T, E)), ("[R,T,N]", (R, T, N))
    wanted = {"dt": tokens, "B": memory, "C": memory, "D": ("[E]", (E,)), "z": tokens, "state": ("[R,E,N]", (R, E, N)), "lengths": ("[R]", (R,))}
    for (name, (letters, shape)), v in zip(wanted.items(), (dt, B, C, D, z, state, lengths), strict=True):
        if v is not None and v.shape != shape:
            raise ValueError(f"selective_scan: {name} is {letters} = {list(shape)}; got {list(v.shape)}")
