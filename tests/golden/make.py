"""Golden exports: small models saved once, with the logits they gave. Every later memarch must load them and give the same.

    python tests/golden/make.py            makes those that `*-tiny` presets lack
    python tests/golden/make.py NAME ...   makes these

One that exists is never made again: that old files load is the promise. If a change must break it, raise FORMAT in memarch/hub.py, teach the
loader to read both, and add a golden export beside the old one.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from memarch import LM, LMConfig, decode, list_models
from memarch.models import preset

HERE = Path(__file__).parent
EXPECTED = "expected.safetensors"
LIMIT = 300_000  # bytes of one export
SHARD = "25KB"  # so that some are sharded and some are not
SMALL = {"dim": 16, "vocab_size": 32, "hidden": 32, "keys": 8, "topk": 4, "rows": 64}  # wherever a preset has these, so a file stays small


def narrow(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return [narrow(item) for item in data]
    if not isinstance(data, dict):
        return data
    if "step" in data and "rows" in data:  # a pool seen through windows
        return {**data, "rows": 96, "window": 64, "step": 32, "width": SMALL["dim"] // 4}
    return {key: SMALL[key] if key in SMALL and isinstance(value, int) else narrow(value) for key, value in data.items()}


def tokens(config: LMConfig) -> torch.Tensor:
    """Two rows, longer than every tiny window, chunk and segment."""
    generator = torch.Generator().manual_seed(2)
    if config.embed == "tokens":
        return torch.randint(config.vocab_size, (2, 100), generator=generator)
    return torch.randn(2, 100, config.inputs or 0, generator=generator)


def build(name: str) -> LM:
    """With noise, so that no parameter is without effect on the logits."""
    model = LM(decode(LMConfig, narrow(preset(name)), name), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@torch.no_grad()
def answer(model: LM, given: torch.Tensor) -> torch.Tensor:
    """In float64, so that another order of the same sums does not matter."""
    wide = model.double().eval()
    return wide(given.double() if given.is_floating_point() else given).logits


def make(name: str, root: Path = HERE) -> Path:
    folder = root / name
    if folder.exists():
        raise SystemExit(f"{folder} exists, and a golden export is never made again. Read the top of make.py.")
    model = build(name)
    try:
        model.save_pretrained(folder, card={"title": f"Golden export of {name}", "license": "apache-2.0"}, max_shard_size=SHARD)
        given = tokens(model.config)
        save_file({"given": given, "logits": answer(model, given).float()}, folder / EXPECTED)
        size = sum(file.stat().st_size for file in folder.iterdir())
        if size > LIMIT:
            raise SystemExit(f"{name} takes {size} bytes, and {LIMIT} are allowed: name what makes it large in SMALL.")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


if __name__ == "__main__":
    for name in sys.argv[1:] or [name for name in list_models("*-tiny") if not (HERE / name).exists()]:
        print(make(name))
