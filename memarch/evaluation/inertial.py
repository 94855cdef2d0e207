"""How well a model tells the velocity from an inertial sensor, by the length of the stream.

nmse    the squared error over the variance of what was asked for: 1 is what the mean of all answers would get, 0 is without error

The part `position` says how the error grows along the stream, by how many samples the model has read.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from memarch.config import require
from memarch.data import Inertial, split_seed
from memarch.data.draw import Array
from memarch.evaluation.stream import CHUNK, quiet
from memarch.evaluation.table import Advance, Row, Table, estimate, octave

SAMPLES = 2**15  # of one batch, unless a batch size is asked for


@dataclass(frozen=True, kw_only=True)
class InertialTask:
    kind: Literal["inertial"] = "inertial"
    lengths: tuple[int, ...] = (1280, 2560, 5120)
    every: int = 10  # samples from one question to the next
    noise: float = 1.0
    examples: int = 64
    seed: int = 0

    metric: ClassVar[str] = "nmse"
    grid: ClassVar[dict[str, str]] = {"length": "lengths"}
    parts: ClassVar[dict[str, tuple[str, ...]]] = {"position": ("length", "position")}

    def __post_init__(self) -> None:
        require(self.examples >= 1, f"examples = {self.examples}: must be at least 1.")
        require(len(self.lengths) > 0, "lengths is empty: give at least one value.")
        for length in self.lengths:
            self.source(length)

    def source(self, length: int) -> Inertial:
        return Inertial(length=length, every=self.every, noise=self.noise)

    def work(self, model: Any) -> int:
        return len(self.lengths) * self.examples

    def run(self, model: Any, batch_size: int | None, chunk: int | None, advance: Advance) -> Table:
        config, wants = model.config, (Inertial.inputs, Inertial.outputs)
        require(
            (config.inputs, config.outputs) == wants,
            f"inertial: the sensor has {wants[0]} inputs and {wants[1]} outputs are asked for; the model has {config.inputs} and {config.outputs}.",
        )
        rows: list[Row] = []
        along: list[Row] = []
        for length in self.lengths:
            row, parts = self._cell(model, length, batch_size, chunk, advance)
            rows.append(row)
            along += parts
        return Table(self.kind, self.metric, tuple(self.grid), tuple(rows), {"position": tuple(along)})

    def _cell(self, model: Any, length: int, batch_size: int | None, chunk: int | None, advance: Advance) -> tuple[Row, list[Row]]:
        source, size = self.source(length), batch_size or max(1, SAMPLES // length)
        said, wanted = [], []
        for first in range(0, self.examples, size):
            batch = source.batch(split_seed(self.seed, "test"), range(first, min(first + size, self.examples)))
            said.append(answers(model, batch.tokens, slice(self.every - 1, None, self.every), chunk))
            wanted.append(batch.targets[:, self.every - 1 :: self.every])
            advance(len(batch.tokens))
        target = torch.cat(wanted).double()  # [examples, questions, outputs]
        error = (torch.cat(said).double() - target).square().mean(-1).numpy()
        error /= float((target - target.mean((0, 1))).square().mean())
        example = np.broadcast_to(np.arange(len(error))[:, None], error.shape)
        buckets = np.broadcast_to(octave(self.every * np.arange(1, error.shape[1] + 1)), error.shape)
        parts = []
        for low in np.unique(buckets).tolist():
            here = buckets == low
            parts.append({"position": low, "below": 2 * low, **self._row(length, error[here], example[here])})
        return self._row(length, error.ravel(), example.ravel()), parts

    def _row(self, length: int, error: Array, example: Array) -> Row:
        mean, spread, count = estimate(error, example)
        return {"length": length, self.metric: mean, "error": spread, "answers": count}


def answers(model: Any, inputs: Tensor, asked: slice, chunk: int | None) -> Tensor:
    """What the model says, [B, questions, outputs] on the CPU. The state is carried from piece to piece."""
    weight, state, said = next(model.parameters()), None, []
    with quiet(model):
        for piece in inputs.split(chunk or CHUNK, 1):
            output = model(piece.to(weight.device, weight.dtype), state)
            state = output.state
            said.append(output.logits.float().cpu())
    return torch.cat(said, 1)[:, asked]
