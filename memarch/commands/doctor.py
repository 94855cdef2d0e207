"""`memarch doctor`: what this machine is, what every operator would run on it in every dtype, and why not something else."""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from memarch.commands.screen import console, size

LIBRARIES = ("torch", "triton", "lightning", "numpy", "safetensors", "huggingface-hub", "transformers")
OPTIONAL = {"flash-attn": "flash_attn", "mamba-ssm": "mamba_ssm", "causal-conv1d": "causal_conv1d"}
WITHOUT = {
    "flash-attn": "attention uses torch's own kernels",
    "mamba-ssm": "the selective scan is memarch's own",
    "causal-conv1d": "the short convolution is memarch's own",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs, and for bug reports")


def run(args: argparse.Namespace) -> int:
    found = examine()
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(found, console())
    return 0


# ------------------------------------------------------------------------------------------------ looking


def examine() -> dict[str, Any]:
    import torch

    from memarch import __version__
    from memarch.kernels import report

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": {"memarch": __version__, "python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "optional": {name: {"version": version(name), "problem": problem(name, module)} for name, module in OPTIONAL.items()},
        "system": platform.platform(),
        "cpu": cpu(),
        "gpus": gpus(),
        "no_gpu": None if torch.cuda.is_available() else why_no_gpu(),
        "compilers": {name: compiler(words) for name, words in COMPILERS.items()},
        "known_bad": known_bad_pairs(),
        "ops": [row._asdict() for device in devices for row in report(device)],
    }


def version(name: str) -> str | None:
    if name == "torch":
        import torch

        return torch.__version__  # with the build in it
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def problem(name: str, module: str) -> str | None:
    """Why an optional package cannot be used. An installed but broken build is common, so only importing it tells."""
    if version(name) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a build for another torch, a missing library: all kinds end here
        return f"installed, but does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if module == "flash_attn":
        from memarch.kernels.attention.flash_impl import probe

        return probe().reason
    if module == "mamba_ssm":
        from memarch.kernels.selective_scan.mamba_impl import probe as probe_mamba

        return probe_mamba().reason
    return None


def cpu() -> dict[str, Any]:
    import torch

    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }


def gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        found.append({"name": about.name, "capability": [about.major, about.minor], "bytes": about.total_memory})
    return found


def why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return "this torch is a CPU build"
    return "this torch is built for GPUs, and the driver shows none" + (
        f" (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r})" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
    )


COMPILERS = {"C++ (torch.compile and C++ kernels on a CPU)": ("g++", "clang++"), "CUDA (CUDA C++ kernels)": ("nvcc",), "ninja": ("ninja",)}


def compiler(words: Iterable[str]) -> str | None:
    given = os.environ.get("CXX") if "g++" in words else None
    return next((found for word in ([given] if given else []) + list(words) if (found := shutil.which(word))), None)


def known_bad_pairs() -> list[str]:
    """Pairs of GPU and Triton that get some products wrong. memarch's kernels have none of these (kernels/launch.py), other libraries' may."""
    from memarch.kernels import known_bad

    triton = version("triton")
    reasons = (known_bad((gpu["capability"][0], gpu["capability"][1]), triton) for gpu in gpus())
    return sorted({reason for reason in reasons if reason})


# ------------------------------------------------------------------------------------------------ showing


def show(found: dict[str, Any], out: Console) -> None:
    versions, cpu = found["versions"], found["cpu"]
    out.print("  ".join(f"{name} {number or 'missing'}" for name, number in versions.items()))
    for name, about in found["optional"].items():
        out.print(f"{name}: " + (f"{about['version']} works" if about["problem"] is None else f"{about['problem']}; {WITHOUT[name]}"))
    out.print(f"cpu: {cpu['machine']}, {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}, OMP_WAIT_POLICY {cpu['wait_policy'] or 'not set'}")
    for gpu in found["gpus"]:
        out.print(f"gpu: {gpu['name']}, compute capability {'.'.join(map(str, gpu['capability']))}, {size(gpu['bytes'])}")
    if found["no_gpu"]:
        out.print(f"gpu: none; {found['no_gpu']}")
    for name, path in found["compilers"].items():
        out.print(f"{name}: {path or 'not found'}")
    out.print(operators(found["ops"]))
    for reason in found["known_bad"]:
        out.print(f"[bold yellow]known bad:[/] {reason}. memarch's own kernels have no such product and run; other libraries' may be wrong here.")


def operators(rows: list[dict[str, Any]]) -> Table:
    """One line per decision: dtypes that are decided alike stand together."""
    together: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        together.setdefault((row["op"], row["device"], row["runs"], row["reason"], tuple(row["others"].items())), []).append(row["dtype"])
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("op", "device", "dtype", "runs"):
        table.add_column(title, no_wrap=title != "dtype")
    table.add_column("why")
    table.add_column("why not")
    shown: tuple[str, str] = ("", "")
    for (op, device, runs, reason, others), dtypes in together.items():
        same = shown == (op, device)
        shown = (op, device)
        names = " ".join(dtypes).replace("float", "fp").replace("bfp", "bf")
        # `why` ends with what kept better ones away; that stands in the last column.
        why = reason.split("; ")[0]
        table.add_row("" if same else op, "" if same else device, names, runs, why, "\n".join(f"{name}: {text}" for name, text in others))
    return table
