"""How many floating-point operations a step takes, and how many the device could do.

Counted on a real batch by torch's own counter: matrix products, convolutions, attention, and the operators of memarch, which register
their formulas. What is computed a second time (activation checkpointing) is not counted, so utilisation is that of the model's own work.
"""

import re
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.flop_counter import FlopCounterMode

from memarch import kernels
from memarch.callbacks.rehearsal import loss_of, rehearsal

# Dense TFLOP/s as the makers publish them: (bf16 tensor cores with fp32 sums, tf32, fp32). "With sparsity" figures are halved. A name that no
# pattern matches, a slice of a device (MIG) among them, has no peak here, and then no utilisation is shown. Lightning's own table
# (fabric.utilities.throughput) was not taken: its figures for the H200 and the H100 NVL are those with sparsity.
PEAKS: tuple[tuple[str, float | None, float | None, float], ...] = (
    (r"\bB200\b", 2250, 1125, 75),  # NVIDIA DGX/HGX B200 datasheet, an eighth of the system
    (r"\bH200 NVL\b", 835.5, 417.5, 60),  # NVIDIA H200 datasheet
    (r"\b(H200|GH200)\b", 989.4, 494.7, 66.9),  # NVIDIA H200 datasheet; GH200 Grace Hopper datasheet
    (r"\bH100 NVL\b", 835.5, 417.5, 60),  # NVIDIA H100 datasheet
    (r"\bH100 PCIe\b", 756, 378, 51.2),  # NVIDIA H100 datasheet
    (r"\bH100\b.*HBM3", 989.4, 494.7, 66.9),  # NVIDIA H100 architecture whitepaper, SXM5
    (r"\b(A100|A800)\b", 312, 156, 19.5),  # NVIDIA A100 datasheet; SXM and PCIe alike
    (r"\bA30\b", 165, 82, 10.3),  # NVIDIA A30 datasheet
    (r"\bA40\b", 149.7, 74.8, 37.4),  # NVIDIA A40 datasheet
    (r"\bA10\b", 125, 62.5, 31.2),  # NVIDIA A10 datasheet
    (r"\bL40S\b", 362, 183, 91.6),  # NVIDIA L40S datasheet
    (r"\bL40\b", 181, 90.5, 90.5),  # NVIDIA L40 datasheet
    (r"\bL4\b", 121, 60, 30.3),  # NVIDIA L4 datasheet
    (r"\bRTX A6000\b", 154.8, 77.4, 38.7),  # NVIDIA GA102 architecture whitepaper
    (r"\bRTX 6000 Ada\b", 364.2, 182.1, 91.1),  # NVIDIA Ada (professional) architecture whitepaper
    (r"\bRTX 4090$", 165.2, 82.6, 82.6),  # NVIDIA Ada architecture whitepaper
    (r"\bRTX 4080$", 97.5, 48.7, 48.7),  # NVIDIA Ada architecture whitepaper
    (r"\bRTX 3090$", 71, 35.6, 35.6),  # NVIDIA GA102 architecture whitepaper
    (r"\bV100-SXM2\b", None, None, 15.7),  # NVIDIA V100 datasheet; no bf16
    (r"\bT4\b", None, None, 8.1),  # NVIDIA T4 datasheet; no bf16
    (r"\bMI300X\b", 1307.4, 653.7, 163.4),  # AMD Instinct MI300X datasheet
)


def peak(name: str, precision: str, tf32: bool) -> float | None:
    """FLOP/s that a device of this name can do at the trainer's precision; None where nobody has written it down."""
    if "MIG" in name:
        return None
    for pattern, half, tensor, single in PEAKS:
        if re.search(pattern, name):
            found = half if precision.startswith("bf16") else (tensor if tf32 else single) if precision.startswith("32") else None
            return found and found * 1e12
    return None


def device_peak(trainer: Trainer) -> float | None:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    return peak(torch.cuda.get_device_name(device), str(trainer.precision), torch.get_float32_matmul_precision() != "highest")


def count(trainer: Trainer, module: LightningModule, batch: Any, index: int) -> int | None:
    """FLOPs of forward and backward on this process's batch. One more step's time, once per shape of batch; training does not notice.

    None when it cannot be had: uncompiled, the step may need more memory than there is."""
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    counter = Counter()
    try:
        with rehearsal(trainer, module), counter, torch.enable_grad():
            loss = loss_of(module.training_step(batch, index))
            counter.backward = True
            torch.autograd.grad(loss, weights, allow_unused=True)  # unlike backward(), touches no .grad and wakes no gradient reduction
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return counter.get_total_flops()


class Counter(FlopCounterMode):
    """torch's counter, without what the backward computes again."""

    def __init__(self) -> None:
        kernels.flop_counter()  # files the formulas of our operators, and of attention on a CPU, which torch has not
        super().__init__(display=False)
        self.mod_tracker: Any = Whole()
        self.backward = False

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        # A backward formula runs with gradients off; only recomputed forward operators run with them on.
        again = self.backward and torch.is_grad_enabled()
        return out if again else super()._count_flops(func_packet, out, args, kwargs)


class Whole:
    """In place of torch's tracker, which sorts the count by module and fails where a module is called with a parameter, as a layer with learned tokens does."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...
