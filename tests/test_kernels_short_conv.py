"""The short convolution against torch's own, and its state. The sweep against `reference` is in test_kernels_ops."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memarch.kernels.short_conv import short_conv

IMPLS = ["reference", "torch"]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [1, 3, 50])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_is_torchs_causal_convolution(impl, T, W):
    x, weight, bias = draw(2, T, 5), draw(5, W), draw(5)
    truth = F.conv1d(F.pad(x.mT, (W - 1, 0)), weight[:, None], bias, groups=5).mT
    torch.testing.assert_close(short_conv(x, weight, bias, impl=impl)[0], truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_tap_is_the_newest_token(impl):
    x, weight = draw(1, 6, 2), torch.zeros(2, 3, dtype=torch.float64)
    weight[:, -1] = 1
    torch.testing.assert_close(short_conv(x, weight, impl=impl)[0], x)
    torch.testing.assert_close(short_conv(x, weight.flip(1), impl=impl)[0], F.pad(x, (0, 0, 2, 0))[:, :6])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [1, 2, 9])
def test_the_state_is_the_last_real_inputs(impl, T):
    W, x, state = 4, draw(T + 1, T, 2), draw(T + 1, 3, 2)
    lengths = torch.arange(T + 1)
    _, tail = short_conv(x, draw(2, W), state=state, lengths=lengths, impl=impl)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(tail[b], torch.cat([state[b], x[b, :n]])[-(W - 1) :], rtol=0, atol=0)
    assert tail.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("T", [1, 9])
def test_dtypes(impl, T):
    """y and the state in x's dtype, whatever the weights'; sums in float32."""
    x, weight, state = draw(2, T, 3).bfloat16(), draw(3, 4).float(), draw(2, 3, 3).bfloat16()
    y, tail = short_conv(x, weight, None, state, impl=impl)
    assert (y.dtype, tail.dtype) == (torch.bfloat16, torch.bfloat16)
    truth = short_conv(x.double(), weight.double(), None, state.double(), impl="reference")[0]
    torch.testing.assert_close(y, truth.bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    "args, message",
    [
        ((draw(2, 3, 4), draw(4, 1, 3)), r"squeeze\(1\)"),
        ((draw(2, 0, 4), draw(4, 3)), "T >= 1"),
        ((draw(2, 3, 4), draw(4, 3), draw(3)), r"bias is \[D\] = \[4\]"),
        ((draw(2, 3, 4), draw(4, 3), None, draw(2, 3, 4)), "the last W-1 inputs"),
    ],
)
def test_errors_teach(args, message):
    with pytest.raises(ValueError, match=message):
        short_conv(*args)
