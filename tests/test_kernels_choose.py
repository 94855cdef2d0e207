"""Which implementation runs: pure, forced or picked, never by trial and error; and a light import."""

import subprocess
import sys

import pytest
import torch

from memarch import kernels
from memarch.kernels import OPS
from memarch.kernels.choose import Machine, first, triton_cannot, version

HOPPER, WORKS = (9, 0), Machine(triton="3.7.1", capability=(9, 0), flash=None)
HALF, FULL = torch.bfloat16, torch.float32


def test_import_is_light():
    heavy = "triton", "flash_attn", "mamba_ssm", "causal_conv1d", "lightning", "transformers", "torch._dynamo", "torch._inductor"
    code = f"import memarch.kernels, sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "capability, triton, bad",
    [
        (HOPPER, "3.3.1", False),
        (HOPPER, "3.4.0", True),
        (HOPPER, "3.6.0", True),
        (HOPPER, "3.7.0", True),
        (HOPPER, "3.7.0+git1a2b", True),
        (HOPPER, "3.7.1", False),
        (HOPPER, "4.0", False),
        ((8, 0), "3.6.0", False),
        ((10, 0), "3.6.0", False),
        (None, "3.6.0", False),
        (HOPPER, None, False),
    ],
)
def test_known_bad(capability, triton, bad):
    reason = kernels.known_bad(capability, triton)
    assert (reason is not None) == bad
    if bad:
        assert triton in reason and "983" in reason and "984" in reason and "3.7.1" in reason


@pytest.mark.parametrize("text, parts", [("3.7.1", (3, 7, 1)), ("3.7", (3, 7)), ("3.8.0+cu130", (3, 8, 0)), ("3.7.0rc1", (3, 7, 0)), ("3.8.dev2", (3, 8))])
def test_version(text, parts):
    assert version(text) == parts


def test_what_keeps_triton_away():
    assert "no GPU" in triton_cannot("cpu", WORKS)
    assert "not installed" in triton_cannot("cuda", WORKS._replace(triton=None))
    assert "983" in triton_cannot("cuda", WORKS._replace(triton="3.6.0"))
    assert triton_cannot("cuda", WORKS) is None


@pytest.mark.parametrize(
    "device, dtype, here, rows, name",
    [
        ("cuda", HALF, WORKS, False, "flash"),
        ("cuda", torch.float16, WORKS, False, "flash"),
        ("cuda", FULL, WORKS, False, "torch"),
        ("cuda", HALF, WORKS, True, "torch"),
        ("cuda", HALF, WORKS._replace(flash="broken build"), False, "torch"),
        ("cpu", HALF, WORKS, False, "torch"),
    ],
)
def test_pick_attention(device, dtype, here, rows, name):
    choice = OPS["attention"].pick(device, dtype, 64, 64, rows, here)
    assert choice.name == name
    assert choice == OPS["attention"].pick(device, dtype, 64, 64, rows, here)
    if name == "torch":
        assert "flash" in choice.reason, "the reason says what kept the better one away"


@pytest.mark.parametrize(
    "op, shape, name",
    [
        ("product_key_topk", {"n": 4096, "k": 128}, "triton"),
        ("product_key_topk", {"n": 4097, "k": 1}, "torch"),
        ("product_key_topk", {"n": 512, "k": 129}, "torch"),
        ("tucker_topk", {"n": 528, "k": 768, "axis": 128}, "triton"),
        ("tucker_topk", {"n": 528, "k": 64, "axis": 129}, "torch"),
        ("weighted_bag", {"d": 7, "R": 1}, "triton"),
        ("row_dot", {"d": 4096, "R": 512}, "triton"),
    ],
)
def test_pick_by_shape(op, shape, name):
    choice = OPS[op].pick("cuda", HALF, **shape, here=WORKS)
    assert choice.name == name
    if name == "torch":
        assert "triton: it takes up to" in choice.reason


@pytest.mark.parametrize("op", OPS)
def test_pick_asks_nobody(op, monkeypatch):
    """Pure: device, dtype and shape in, answer out. It may neither look at the machine nor remember anything."""

    def caught(*args, **kwargs):
        raise AssertionError("pick looked at the machine")

    for name in ("is_available", "get_device_capability", "device_count", "current_device"):
        monkeypatch.setattr(torch.cuda, name, caught)
    monkeypatch.setattr("importlib.util.find_spec", caught)
    for device in ("cpu", "cuda"):
        for dtype in (FULL, HALF, torch.float64):
            choice = OPS[op].pick(device, dtype)
            assert choice.name in OPS[op].IMPLEMENTATIONS and choice.reason
            assert OPS[op].why_not(choice.name, device, dtype) is None


def test_first_says_all_when_nothing_can_run():
    with pytest.raises(ValueError, match=r"a: too wide; b: no GPU"):
        first((("a", ""), ("b", "")), {"a": "too wide", "b": "no GPU"}.get)


def example(op: str) -> tuple:
    x = torch.randn(1, 3, 2, 4)
    return {
        "attention": (x, x, x),
        "delta_rule": (x, x, x, None, None),
        "gated_linear": (x, x, x, -x.abs()),
        "neural_memory": (x, x, x, -x[..., 0].abs(), None, x[..., 1].sigmoid()),
        "row_dot": (torch.randn(5, 2), torch.zeros(3, 4, dtype=torch.int64), torch.randn(3, 2)),
        "selective_scan": (x[:, :, 0], x[:, :, 1].abs(), -torch.rand(4, 2), x[:, :, 0, :2], x[:, :, 1, :2]),
        "short_conv": (x[:, :, 0], torch.randn(4, 3)),
        "product_key_topk": (x, x, 2),
        "taylor_attention": (x, x, x),
        "tucker_topk": (x, x, torch.ones(2, 2), torch.ones(2), torch.ones(2), 2),
        "weighted_bag": (torch.randn(5, 2), torch.zeros(3, 2, dtype=torch.int64), torch.randn(3, 2)),
    }[op]


@pytest.mark.parametrize("op", OPS)
def test_forcing(op, monkeypatch):
    """By argument, for one op, for every op; the argument wins, then the op's own."""
    calls, call, args = [], getattr(OPS[op], op), example(op)
    for name, fn in OPS[op].IMPLEMENTATIONS.items():
        monkeypatch.setitem(OPS[op].IMPLEMENTATIONS, name, lambda *a, name=name, fn=fn: (calls.append(name), fn(*a))[1])
    call(*args)
    with kernels.using("reference"):
        call(*args)
        call(*args, impl="torch")
        with kernels.using(**{op: "torch"}):
            call(*args)
        call(*args)
    with kernels.using(**{op: "reference"}):
        call(*args)
    call(*args)
    assert calls == ["torch", "reference", "torch", "torch", "reference", "reference", "torch"]


@pytest.mark.parametrize("op", OPS)
def test_forcing_what_is_unknown(op):
    with pytest.raises(ValueError, match=f"{op} has no implementation 'trition'; known: .*reference.*torch"):
        getattr(OPS[op], op)(*example(op), impl="trition")
    with kernels.using("trition"), pytest.raises(ValueError, match="known:"):
        getattr(OPS[op], op)(*example(op))


def test_forcing_what_cannot_run():
    with pytest.raises(ValueError, match=r"attention: implementation 'flash' cannot run here: flash-attn needs a CUDA device, the tensors are on cpu"):
        kernels.attention.attention(*example("attention"), impl="flash")


def test_using_is_undone_by_an_error():
    with pytest.raises(RuntimeError), kernels.using("reference"):
        raise RuntimeError
    assert kernels.choose._forced == {}


def test_report():
    rows = kernels.report("cpu")
    assert {(r.op, r.dtype) for r in rows} == {(op, d) for op in OPS for d in ("float32", "bfloat16", "float16", "float64")}
    for row in rows:
        assert row.device == "cpu" and row.runs == "torch" and row.reason
        assert set(row.others) == set(OPS[row.op].IMPLEMENTATIONS) - {row.runs}
        assert all(row.others.values())
    flash = next(r for r in rows if r.op == "attention").others["flash"]
    assert "CUDA" in flash


def test_integers_are_refused():
    x = torch.ones(1, 3, 2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="floating point"):
        kernels.delta_rule.delta_rule(x, x, x, None, None)
