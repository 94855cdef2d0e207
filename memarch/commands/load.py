"""A model that a command names: a folder, the folder of a run, or a repository on the Hub."""

import argparse
import json
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float64")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a folder with config.json and weights, the folder of a run, or a repository on the Hub (owner/name)")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, .. (default: the GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as saved)")


def folder_of(name: str) -> str:
    """The export inside the folder of a run (which has a config.json of its own, the run's); every other name as it is."""
    inside = Path(name).expanduser() / "export"
    return str(inside) if inside.is_dir() else name


def training_data(name: str) -> dict[str, Any]:
    """data.train of the run that the model came from, if its folder is there; else empty."""
    folder = Path(name).expanduser()
    for place in (folder, folder.parent):
        if (place / "export").is_dir() and (place / "config.json").is_file():
            return (json.loads((place / "config.json").read_text()).get("data") or {}).get("train") or {}
    return {}


def load(args: argparse.Namespace) -> Any:
    import torch

    from memarch.config import ConfigError
    from memarch.hub import from_pretrained

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ConfigError(f"--device {args.device}: no such device. Take cpu, cuda, or cuda:0, cuda:1, ..") from None
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= there:
        raise ConfigError(f"--device {args.device}: this machine shows {there} CUDA devices to torch. memarch doctor says why; --device cpu always works.")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    return from_pretrained(folder_of(args.model), revision=args.revision, device=device, dtype=dtype)
