"""An inertial sensor on a cart: fast and noisy readings, and the cart's velocity asked for at a lower rate.

The cart moves over a plane along its heading, and both its speed and its heading wander smoothly. It begins with heading 0, at any speed.

    s(t) = 1 + sum_i a_i sin(w_i t + p_i)                      speed; the mean speed is the unit
    h(t) = sum_i b_i (sin(u_i t + q_i) - sin q_i)              heading, in radians
    f(t) = F int_0^t s                                         phase of the wheels: F radians for every unit of way

On it sits a sensor with one gyroscope and two accelerometers, forward and to the left, all read in the frame of the cart at every sample t:

    forward   s'(t)      + s(t)^2 cos f(t)         + bias + noise
    left      s(t) h'(t) + s(t)^2 sin f(t)         + bias + noise
    turn      h'(t) / G  + s(t)^2 cos(f(t) + r)    + bias + noise

The wheels shake the cart, as what is out of balance does with the square of its speed; r is a phase and G the unit of turning. The velocity of a
chunk of k samples is asked for at its last sample, in the frame of the start:

    y_j = 1/k sum_{t in chunk j} s(t) (cos h(t), sin h(t))

So the turn rate must be summed up from the first sample on, through noise and shaking. The speed is in the shaking, in its strength and in its
frequency, which is F s: a few samples tell. The acceleration s' is far below noise and bias, so that summing it up adds little.

Amplitudes, periods and phases, and the biases, are drawn for each row.

    B rows   T samples   k samples in a chunk
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch

from memarch.config import require
from memarch.data.batch import Batch, Endless
from memarch.data.draw import Array, Draw

WAVES = 4  # sinusoids of the speed, and of the heading
PERIODS = (100.0, 2000.0)  # samples, of the sinusoids
SPEED, HEADING = 0.25, 0.8  # standard deviations of speed, and of heading about its mean in radians
TURNS = 0.2  # F / 2 pi
GYRO = 0.01  # G, in radians a sample
BIAS, NOISE = 0.01, 0.5  # standard deviations, of every reading
MEAN, SCALE = (0.52, 0.0), (0.56, 0.69)  # of the velocity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inertial(Endless):
    """Inputs [B, T, 6]: the three readings and their first differences (first: 0). Targets [B, T, 2] at the last sample of every chunk, NaN elsewhere;
    they have a mean of about 0 and a variance of about 1. `noise` multiplies noise and bias."""

    kind: Literal["inertial"] = "inertial"
    length: int = 1280
    every: int = 10  # k: samples of a chunk, and from one question to the next
    noise: float = 1.0

    inputs: ClassVar[int] = 6
    outputs: ClassVar[int] = 2
    vocab_size: ClassVar[int] = 0

    def __post_init__(self) -> None:
        require(self.every >= 1, f"inertial: every = {self.every}: must be at least 1.")
        require(self.length >= self.every, f"inertial: length = {self.length}: must be at least every ({self.every}), or nothing is asked.")
        require(self.noise >= 0, f"inertial: noise = {self.noise}: must not be negative.")

    def batch(self, seed: int, indices: Sequence[int]) -> Batch:
        draw, t = Draw(seed, indices), np.arange(self.length, dtype=np.float64)
        speed, rate, way = waves(draw, "speed", SPEED, t)
        heading, turn, _ = waves(draw, "heading", HEADING, t)
        speed, way, heading = 1 + speed, t + way - way[:, :1], heading - heading[:, :1]

        phase = 2 * np.pi * (TURNS * way + draw.uniform("phase", 1))
        shaking = speed**2
        apart = 2 * np.pi * draw.uniform("apart", 1)
        readings = np.stack(
            [rate + shaking * np.cos(phase), speed * turn + shaking * np.sin(phase), turn / GYRO + shaking * np.cos(phase + apart)], axis=2
        )  # [B, T, 3]
        spoilt = NOISE * normal(draw, "noise", 3 * self.length).reshape(readings.shape) + BIAS * normal(draw, "bias", 3)[:, None]
        readings += self.noise * spoilt
        steps = np.diff(readings, axis=1, prepend=readings[:, :1])

        ends = np.arange(self.every - 1, self.length, self.every)
        velocity = np.stack([speed * np.cos(heading), speed * np.sin(heading)], axis=2)
        chunks = velocity[:, : len(ends) * self.every].reshape(len(velocity), len(ends), self.every, 2).mean(2)
        targets = np.full(velocity.shape, np.nan)
        targets[:, ends] = (chunks - MEAN) / SCALE
        tokens = np.concatenate([readings, steps], axis=2)
        return Batch(torch.from_numpy(tokens.astype(np.float32)), torch.from_numpy(targets.astype(np.float32)))


def waves(draw: Draw, name: str, size: float, t: Array) -> tuple[Array, Array, Array]:
    """A smooth function with standard deviation `size`, its derivative and its integral, at t: [B, T] each."""
    low, high = np.log(PERIODS)
    w = 2 * np.pi * np.exp(-low - (high - low) * draw.uniform(f"{name} periods", WAVES))[..., None]  # [B, n, 1]
    x = w * t + 2 * np.pi * draw.uniform(f"{name} phases", WAVES)[..., None]  # [B, n, T]
    a = size * (2 / WAVES) ** 0.5
    sin, cos = a * np.sin(x), a * np.cos(x)
    return sin.sum(1), (w * cos).sum(1), -(cos / w).sum(1)


def normal(draw: Draw, name: str, n: int) -> Array:
    """[B, n] standard normal numbers (Box and Muller, 1958)."""
    radius = np.sqrt(-2 * np.log(draw.uniform(f"{name} radius", n)))
    return radius * np.cos(2 * np.pi * draw.uniform(f"{name} angle", n))
