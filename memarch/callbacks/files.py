"""Checkpoint files: whole or not there at all, and nothing in them but tensors and plain values.

A checkpoint is written beside its place, forced to disk, and renamed into it. A process killed while writing leaves a `.tmp` that nobody
reads. Lightning's own writer builds the whole file in memory first, and does not force it to disk before the rename.
"""

import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

FOLDER, PREFIX, SUFFIX = "checkpoints", "step-", ".ckpt"


class AtomicIO(TorchCheckpointIO):
    """A Lightning CheckpointIO plugin. check: looks at what was read before anything is restored from it."""

    def __init__(self, check: Callable[[Mapping[str, Any]], None] | None = None):
        self.check = check

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        sync(path.parent)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors and plain values only, whatever the caller says: a checkpoint from elsewhere must not be able to run code."""
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} holds more than tensors and plain values, and is not read: {str(error).splitlines()[0]}") from None
        if self.check:
            self.check(checkpoint)
        return checkpoint


def place(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / FOLDER / f"{PREFIX}{step:08d}{SUFFIX}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX).removesuffix(SUFFIX))


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Oldest first, whole or not."""
    found = (Path(run_dir) / FOLDER).glob(f"{PREFIX}*{SUFFIX}")
    return sorted((path for path in found if path.name.removeprefix(PREFIX).removesuffix(SUFFIX).isdigit()), key=step_of)


def latest(run_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None: what `trainer.fit(ckpt_path=...)` goes on from."""
    return next((path for path in reversed(checkpoints(run_dir)) if whole(path)), None)


def whole(path: Path) -> bool:
    """A zip archive ends with its table of contents, so one that was cut off has none. It is read, not unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def keep(run_dir: str | Path, newest: int) -> None:
    for path in checkpoints(run_dir)[:-newest]:
        path.unlink(missing_ok=True)


def sweep(run_dir: str | Path) -> None:
    """What killed processes had begun to write."""
    for path in (Path(run_dir) / FOLDER).glob(f".{PREFIX}*.tmp"):
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """A rename is safe once the folder itself is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
