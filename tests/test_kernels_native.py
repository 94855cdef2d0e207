"""The C++ library: never compiled by surprise, keyed by what it is made of, and clear about why it is not there."""

import json
import subprocess
import sys

import pytest
import torch

from memarch import kernels
from memarch.kernels import native
from memarch.kernels.choose import Machine, machine
from memarch.kernels.weighted_bag import pick, weighted_bag, why_not


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A cache folder without a library."""
    monkeypatch.setenv("MEMARCH_CACHE", str(tmp_path))
    native._state.cache_clear()
    yield tmp_path
    native._state.cache_clear()


@pytest.fixture
def compiler(empty):
    if native.why_not() != native.NOT_BUILT:
        pytest.skip(native.why_not())


def call(impl=None) -> torch.Tensor:
    return weighted_bag(torch.ones(3, 4), torch.tensor([[0, 2]]), torch.ones(1, 2), impl=impl)


def test_picked_only_when_built(empty, compiler, capfd):
    assert call().eq(2).all() and not list(empty.iterdir()), "nothing compiles by surprise"
    assert machine("cpu").cpp == "not built: run memarch warmup" == why_not("cpp", "cpu", torch.float32, here=machine("cpu"))
    row = next(row for row in kernels.report("cpu") if row.op == "weighted_bag")
    assert row.runs == "torch" and "cpp: not built: run memarch warmup" in row.reason
    assert capfd.readouterr().err == ""
    path = native.build()
    assert path.parent == empty and path == native.library()
    assert capfd.readouterr().err.count("\n") == 1, "one line says that it compiles"
    assert machine("cpu").cpp is None and pick("cpu", torch.float32, here=machine("cpu")).name == "cpp"
    assert native.build() == path and capfd.readouterr().err == ""
    assert list(empty.iterdir()) == [path]


def test_forcing_builds(empty, compiler, capfd):
    with kernels.using(weighted_bag="cpp"):
        assert weighted_bag(torch.ones(3, 4).double(), torch.tensor([[0, 2]]), torch.ones(1, 2).double()).eq(2).all()
    assert "compiling the C++ kernels" in capfd.readouterr().err and native.library().exists()


def test_without_a_compiler(empty, monkeypatch):
    monkeypatch.setattr(native, "compiler", lambda: None)
    assert "no C++ compiler: " in native.why_not() and "memarch warmup" in native.why_not()
    assert pick("cpu", torch.float32, here=machine("cpu")).name == "torch"
    with pytest.raises(ValueError, match=r"implementation 'cpp' cannot run here: no C\+\+ compiler"):
        call("cpp")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        native.build()


def test_elsewhere_than_linux(empty, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux only, not on darwin" in native.why_not()


def test_a_compiler_error_is_shown(empty, compiler, monkeypatch):
    bad = empty / "bad.cpp"
    bad.write_text("int f( {")
    monkeypatch.setattr(native, "sources", lambda: [bad])
    with pytest.raises(RuntimeError, match=r"(?s)could not compile .*bad\.cpp.*error"):
        native.build()
    assert not native.library().exists()


@pytest.mark.parametrize(
    "device, dtype, here, says",
    [
        ("cpu", torch.float16, Machine(cpp=None), "not float16: use torch"),
        ("cuda", torch.float32, Machine(cpp=None), "the tensors are on cuda"),
        ("cpu", torch.float32, Machine(cpp="no C++ compiler"), "no C++ compiler"),
        ("cpu", torch.float32, Machine(cpp=None), None),
    ],
)
def test_why_not(device, dtype, here, says):
    found = why_not("cpp", device, dtype, here=here)
    assert found is None if says is None else says in found
    assert pick(device, dtype, here=here).name == ("cpp" if says is None else "torch")


def test_the_key_knows_source_flags_and_cpu(monkeypatch, tmp_path):
    source = tmp_path / "cpu.cpp"
    source.write_text("int x;")
    monkeypatch.setattr(native, "sources", lambda: [source])
    keys = []
    for change in (lambda: None, lambda: source.write_text("int y;"), lambda: monkeypatch.setattr(native, "FLAGS", ("-O1",))):
        change()
        keys.append(native._key.__wrapped__())
    monkeypatch.setattr(native, "_cpu", lambda: "another one")
    keys.append(native._key.__wrapped__())
    assert len(set(keys)) == 4


def test_nothing_is_loaded_at_import(empty):
    code = "import memarch.kernels, json; from memarch.kernels import native; print(json.dumps([len(native._loaded), native._key.cache_info().currsize]))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == [0, 0]
