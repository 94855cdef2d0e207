"""The selective scan in Triton: under the interpreter with every option and around every tile, its buffers, and compiled for sm_90."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import test_kernels_ops as ops
from memarch.kernels import flop_counter
from memarch.kernels.selective_scan import reference, torch_impl, triton_impl
from test_kernels_ops import ragged, rms
from test_kernels_selective_scan import Largest, close, example, fresh
from test_triton import bound

poison = ops.poison  # nor may anything be read that was not written


@pytest.fixture
def short(monkeypatch):
    """Chunks of four tokens, two groups of the backward: a few tokens have several."""
    monkeypatch.setattr(triton_impl, "SPAN", 4)


def run(scan: Callable[..., tuple[Tensor, Tensor]], x: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """y, the new state, and the gradients of all that has one for fixed cotangents of both."""
    x = fresh(x, dtype)
    y, h = scan(*x.values())
    seed = torch.Generator().manual_seed(1)
    loss = sum((v * torch.randn(v.shape, generator=seed, dtype=torch.float64).to(v)).sum() for v in (y, h))
    wanted = {n: v for n, v in x.items() if v is not None and v.is_floating_point()}
    grads = torch.autograd.grad(loss, list(wanted.values()))
    return {"y": y.detach(), "h": h.detach()} | {f"gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}


def same(x: dict[str, Any], tolerance: float = 1e-10) -> None:
    close(run(triton_impl.selective_scan, x), run(reference.selective_scan, x), tolerance)


def test_every_option_with_every_other(short, poison):
    for D, z, state, lengths in itertools.product((False, True), repeat=4):
        same(example(7, D=D, z=z, state=state, lengths=lengths))


@pytest.mark.parametrize("E, N", [(1, 1), (32, 16), (65, 3), (64, 17), (33, 64), (17, 130), (20, 256)])
def test_any_width(E, N, poison):
    """Tiles that are full and that are not, several tiles, every number of warps."""
    same(example(3, R=2, E=E, N=N))


def test_several_whole_chunks(poison):
    same(example(triton_impl.SPAN + 6, R=1, E=3, N=2))


def test_pads_answer_zero_whatever_they_hold(short):
    x, real = example(7, lengths=True), ragged(7)[1][..., None]
    clean = run(triton_impl.selective_scan, x)
    found = run(triton_impl.selective_scan, {n: torch.where(real, v, torch.nan) if n in ("x", "dt", "B", "C", "z") else v for n, v in x.items()})
    close(found, clean, 0)
    assert (found["y"][~real[..., 0]] == 0).all() and torch.equal(found["h"][0], x["state"][0])
    assert all((found[f"gradient of {n}"][~real[..., 0]] == 0).all() for n in ("x", "dt", "B", "C", "z"))


def test_lengths_beyond_the_tokens_are_all_of_them(short):
    x = example(6)
    close(run(triton_impl.selective_scan, x | {"lengths": torch.tensor([6, 7, 100])}), run(triton_impl.selective_scan, x), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_low_precision(dtype, short):
    x = example(13, E=40, N=16, lengths=True)
    x = {n: v.to(dtype).double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in x.items()}
    truth, plain, fast = run(reference.selective_scan, x), run(reference.selective_scan, x, dtype), run(triton_impl.selective_scan, x, dtype)
    for name, v in truth.items():
        error, allowed = rms(fast[name].double() - v), rms(plain[name].double() - v)
        assert error <= bound(name, allowed, rms(v), dtype), f"{name}: {error:.2e}, the reference {allowed:.2e}"


def test_strong_decays_keep_their_relative_precision(short):
    x = example(7)
    x["A"], x["dt"] = x["A"] * 1e3, torch.where(torch.rand_like(x["dt"]) < 0.5, 1e-6, 30.0)
    x = {n: v if v is None else v.float().double() for n, v in x.items()}
    same(x)
    truth, plain, fast = run(reference.selective_scan, x), *(run(scan, x, torch.float32) for scan in (reference.selective_scan, triton_impl.selective_scan))
    for name, v in truth.items():
        assert rms(fast[name].double() - v) <= 3 * rms(plain[name].double() - v) + 64 * torch.finfo(torch.float32).eps * rms(v), name


def test_each_input_in_its_own_dtype(short):
    """As a layer has it under autocast: activations in 16 bits, steps and parameters in float32. (The interpreter rounds bfloat16 towards zero.)"""
    x = fresh(example(7), torch.float16)
    x |= {n: x[n].detach().float().requires_grad_() for n in ("dt", "A", "D", "state")}
    y, state = triton_impl.selective_scan(*x.values())
    truth = reference.selective_scan(*(v if v is None else v.detach().float() for v in x.values()))
    assert (y.dtype, state.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(y.float(), truth[0], rtol=2**-10, atol=1e-5)
    torch.testing.assert_close(state, truth[1], rtol=1e-5, atol=1e-5)
    given = [v for v in x.values() if v is not None]
    for v, g in zip(given, torch.autograd.grad(y.float().sum() + state.sum(), given), strict=True):
        assert (g.dtype, g.shape) == (v.dtype, v.shape)


def test_inputs_that_are_parts_of_something_wider(short):
    """As projections leave them."""
    x = example(6, R=2, N=5)
    x["x"], x["z"] = torch.cat((x["x"], x["z"]), -1).chunk(2, -1)
    x["B"], x["C"] = torch.cat((x["B"], x["C"]), -1).chunk(2, -1)
    y, h = triton_impl.selective_scan(*x.values())
    for found, truth in zip((y, h), reference.selective_scan(*x.values()), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


def test_nothing_of_the_size_of_all_states_is_made(monkeypatch):
    monkeypatch.setattr(triton_impl, "launch", lambda *_, **__: None)
    T, E = 2048, 1536
    for N in (16, 64):
        x, A, B = (torch.empty(n, dtype=torch.float32, device="meta") for n in ((1, T, E), (E, N), (1, T, N)))
        with Largest() as largest:
            y, h, states = triton_impl.scan(x, x, A, B, B, A[:, 0], x, None, None, True)
            triton_impl.scan_backward(y, h, x, x, A, B, B, A[:, 0], x, states, None)
        assert states.numel() == T // triton_impl.SPAN * E * N and largest.numel <= T * E * N / 16


def test_inference_keeps_no_states(short):
    x = example(6)
    y, h, states = triton_impl.scan(*x.values(), False)
    assert states.numel() == 0
    close(dict(enumerate((y, h))), dict(enumerate(reference.selective_scan(*x.values()))))


def test_operators_say_what_they_return(short):
    inputs = tuple(example(6, lengths=True).values())
    torch.library.opcheck(triton_impl.selective_scan.operator, (*inputs, True), test_utils="test_faketensor")


def test_counts_like_torch(short):
    counts = []
    for scan in (torch_impl.selective_scan, triton_impl.selective_scan):
        with flop_counter() as counter:
            run(scan, example(6))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
