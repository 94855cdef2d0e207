"""TensorBoard and Weights & Biases, beside metrics.csv: `Trainer(logger=logger("tensorboard", run_dir))`. Neither is imported before it is asked for."""

import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KINDS = {"tensorboard": "tensorboard", "wandb": "wandb"}  # name -> the package it needs


def logger(kind: str, run_dir: str | Path, step: int = 0) -> Any:
    """A Lightning logger that writes into the run's folder. step: where a resumed run goes on; TensorBoard hides what a killed one wrote beyond it."""
    if kind not in KINDS:
        raise ValueError(f"unknown logger {kind!r}. Allowed: {', '.join(sorted(KINDS))}; metrics.csv is always written.")
    if find_spec(KINDS[kind]) is None:
        raise ImportError(f"the {kind} logger needs a package that is not installed: pip install 'memarch[logging]'. metrics.csv is written without it.")
    run_dir = Path(run_dir)
    if kind == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        return TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=step or None)
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(save_dir=run_dir, name=run_dir.name, id=identity(run_dir), resume="allow")


def identity(run_dir: Path) -> str:
    """Kept in the folder, so that a resumed run goes on with the same page."""
    file = run_dir / "wandb-id"
    if not file.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    return file.read_text()
