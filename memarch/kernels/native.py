"""The C++ of this library for CPUs: every kernels/<op>/cpu.cpp in one shared library, compiled on the user's machine.

    memarch.kernels.native.build()      compiles it once, some seconds; what `memarch warmup` does
    native.call("bag_forward", ...)     calls a function of it; tensors as pointers, ints as int64

Nothing compiles by surprise: without the library the torch implementations run, and only impl="cpp" builds it on the spot. The
functions take pointers and sizes and know nothing of torch, so one compilation takes seconds and serves every version of torch; the
`*_impl.py` beside each cpu.cpp makes torch operators of them. The file's name says what it was built from: sources, flags, compiler and
CPU, for -march=native code must not run on another one.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memarch.kernels.choose import NOT_BUILT, Machine

FLAGS = ("-std=c++17", "-O3", "-march=native", "-mtune=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
_loaded: dict[Path, ctypes.CDLL] = {}


def sources() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*/cpu.cpp"))


@functools.cache
def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def _key() -> str:
    """Of what the library is made and for which CPU."""
    text = sorted({*sources(), *Path(__file__).parent.glob("*/*.h")})
    made_of = [" ".join(FLAGS), str(compiler()), platform.machine(), _cpu(), *(path.read_text() for path in text)]
    return hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU ")))


def library() -> Path:
    """Where the library is, or would be: MEMARCH_CACHE, or memarch in the user's cache folder."""
    return _path(os.environ.get("MEMARCH_CACHE"), os.environ.get("XDG_CACHE_HOME"), _key())


@functools.cache
def _path(cache: str | None, home: str | None, key: str) -> Path:
    return Path(cache or Path(home or Path.home() / ".cache") / "memarch") / f"native-{key}.so"


def why_not() -> str | None:
    """Why the library cannot be used now, or None when it is built. Asked at every call of an op, so the answer is kept until `build`."""
    return _state()


why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in choose.py


@functools.cache
def _state() -> str | None:
    if library().exists():
        return None
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only, not on {sys.platform}"
    if compiler() is None:
        return f"no C++ compiler: {os.environ.get('CXX', 'g++')} is not on the PATH; install g++ (Debian: apt install g++) and run memarch warmup"
    return NOT_BUILT


def cannot(device_type: str, dtype: torch.dtype, here: Machine, dtypes: Collection[torch.dtype]) -> str | None:
    """What keeps a C++ implementation for these dtypes from running."""
    if device_type != "cpu":
        return f"it runs on a CPU, the tensors are on {device_type}"
    if dtype not in dtypes:
        return f"it takes {', '.join(str(x).removeprefix('torch.') for x in dtypes)}, not {str(dtype).removeprefix('torch.')}: use torch"
    return here.cpp


def buildable(here: Machine) -> Machine:
    """The machine as a forced implementation sees it: what is only not built yet will be built."""
    return here._replace(cpp=None) if here.cpp == NOT_BUILT else here


def build() -> Path:
    """Compile the library unless it is there -> its path."""
    _state.cache_clear()
    path, why = library(), why_not()
    if why is None:
        return path
    if why != NOT_BUILT:
        raise RuntimeError(f"memarch cannot build its C++ kernels: {why}")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"memarch: compiling the C++ kernels to {path}, once", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "native.so"
        command = [str(compiler()), *FLAGS, *map(str, sources()), "-o", str(made)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"memarch could not compile its C++ kernels with\n  {' '.join(command)}\n{result.stderr[-4000:]}")
        os.replace(made, path)  # another process may have been faster: either file is right
    _state.cache_clear()
    return path


def call(name: str, *args: Tensor | int | None) -> int:
    """`name`(*args, threads) of the library, which is built if it is not there."""
    path = library()
    if path not in _loaded:
        _loaded[path] = ctypes.CDLL(str(build()))
    function: Any = getattr(_loaded[path], name)
    if function.argtypes is None:  # said once: to wrap every argument of every call takes twice as long as the call
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64 if isinstance(x, int) else ctypes.c_void_p for x in (*args, 0)]
    return function(*map(_argument, args), torch.get_num_threads())


def _argument(x: Tensor | int | None) -> int | None:
    if isinstance(x, Tensor):
        assert x.is_contiguous() and x.is_cpu
        return x.data_ptr()
    return x
