"""Compiles every Triton kernel for sm_90, without a GPU, in a process of its own: python tests/triton_compile.py OP. One JSON line a kernel."""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def main(op: str) -> None:
    for check in importlib.import_module(f"memarch.kernels.{op}.triton_impl").checks():
        print(json.dumps(compile_one(check)), flush=True)


def compile_one(check) -> dict:
    names = check.kernel.arg_names
    missing = [n for n in names if n not in check.types and n not in check.constants]
    assert not missing, f"{check.kernel.__name__}: no type and no constant for {missing}"
    signature = {n: check.types.get(n, "constexpr") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(fn=check.kernel, signature=signature, constexprs=check.constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": check.warps, "num_stages": check.stages})
    return {
        "kernel": check.kernel.__name__,
        "constants": {n: str(c) for n, c in check.constants.items()},
        "shared": built.metadata.shared,
        "stack": stack(built.asm["cubin"]),
        "wgmma": "wgmma" in built.asm["ptx"],
        "wants_wgmma": check.wgmma,
        "transposes": "tt.trans" in built.asm["ttir"],
    }


def stack(cubin: bytes) -> int:
    """Bytes of stack a thread needs: more than 0 means that registers spill."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", said))


if __name__ == "__main__":
    main(sys.argv[1])
