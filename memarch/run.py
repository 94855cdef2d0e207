"""The folder of one run: what was asked, with what it was run, and where its results go.

runs/<name>/<time>/   config.yaml config.json   everything resolved, every default written out
                      versions.json             Python, libraries, machine, and the state of the git checkout
                      metrics.csv  checkpoints/  export/
"""

import itertools
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from memarch.config import require

FOLDER = "MEMARCH_RUN_FOLDER"  # for the processes that Lightning starts by running the command again
LIBRARIES = ("memarch", "torch", "triton", "lightning", "jsonargparse", "numpy", "safetensors")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run is kept, and what it does besides learning.

    Args:
        name: the folder below root; null: the name of the config file
        root: where runs are kept
        folder: exactly this folder instead of root/name/time; when it holds a checkpoint, the run goes on from there
        stop_at: end the run when val/accuracy has reached this; null: never
        save_every: a checkpoint every so many steps; null: none by steps
        save_minutes: and at least so often; null: none by time
        keep: the newest checkpoints that stay
        patience: steps in a row with a loss or gradient that is not finite that end the run
        flops: measure the FLOPs of a step, once per shape of batch
        bar: show progress
        logger: beside metrics.csv
        export: write the trained model to export/ at the end, ready for the Hub
        threads: of torch on the CPU; null: as torch decides
    """

    name: str | None = None
    root: str = "runs"
    folder: str | None = None
    stop_at: float | None = None
    save_every: int | None = 1000
    save_minutes: float | None = 10.0
    keep: int = 2
    patience: int = 5
    flops: bool = True
    bar: bool = True
    logger: Literal["tensorboard", "wandb"] | None = None
    export: bool = True
    threads: int | None = None

    def __post_init__(self) -> None:
        require(self.stop_at is None or 0 < self.stop_at <= 1, f"run.stop_at is an accuracy, above 0 and at most 1, got {self.stop_at}.")
        require(self.threads is None or self.threads > 0, f"run.threads must be at least 1, or null to let torch decide, got {self.threads}.")


def claim(said: RunConfig, name: str) -> Path:
    """The folder of a run that begins or goes on. The first process makes it; those it starts find it in the environment."""
    if getattr(rank_zero_only, "rank", 0):
        return Path(os.environ.get(FOLDER) or said.folder or Path(said.root) / (said.name or name))
    if said.folder is None:
        folder = new_folder(said.root, said.name or name)
    else:
        folder = Path(said.folder)
        folder.mkdir(parents=True, exist_ok=True)
    os.environ[FOLDER] = str(folder.resolve())
    return folder


def new_folder(root: str, name: str) -> Path:
    """Named by the time. Nobody else gets the same one, even in the same second."""
    base = Path(root) / name / datetime.now().strftime("%Y%m%d-%H%M%S")
    for i in itertools.count():
        folder = base if i == 0 else base.with_name(f"{base.name}-{i}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def named_after(file: str) -> str:
    """configs/recall/hybrid.yaml is recall-hybrid."""
    path = Path(file)
    return f"{path.resolve().parent.name}-{path.stem}"


def describe(folder: Path, config: Mapping[str, Any]) -> None:
    """Everything that says what this run is. A resumed run writes config and versions again: they are those of the last start."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")


def versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with the CUDA build in it
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {**found, "threads": torch.get_num_threads(), "git": git()}


def processor() -> str:
    about = Path("/proc/cpuinfo")
    named = (line.partition(":")[2].strip() for line in about.read_text().splitlines() if line.startswith("model name")) if about.is_file() else iter(())
    return next(named, platform.processor() or platform.machine())


def git() -> dict[str, Any] | None:
    """The checkout this package runs from; None when it runs from an installed copy or without git."""
    here = Path(__file__).resolve().parent

    def ask(*words: str) -> str | None:
        try:
            answer = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.rstrip() if answer.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    changed = ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": ask("rev-parse", "HEAD"), "branch": ask("branch", "--show-current"), "changed": changed.splitlines() if changed else []}
