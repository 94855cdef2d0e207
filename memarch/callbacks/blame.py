"""Which layer first said NaN: the last step is run again, and every module is watched."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memarch.callbacks.rehearsal import loss_of, rehearsal
from memarch.callbacks.together import everyone, several


def blame(trainer: Trainer, module: LightningModule, batches: Sequence[tuple[Any, int]], carried: Any) -> str:
    """A sentence that names the first bad weight, else the layer, else the gradient."""
    for name, parameter in module.named_parameters():
        if not finite(parameter):
            return f"The weight {short(name)} itself is not finite: {sick(parameter)}. It was so before the step, from a checkpoint or its initialisation."
    with rehearsal(trainer, module), torch.enable_grad():
        if hasattr(module, "carried"):
            module.carried = carried
        found = [first_fault(module, batch, index) for batch, index in batches]  # all of them: processes must do the same steps
    for process, told in enumerate(everyone(next(filter(None, found), None))):
        if told:
            return told + (f" (On process {process}.)" if several() else "")
    return "Run again, the same batch is finite everywhere: the fault does not repeat, as with dropout, a race between kernels, or failing hardware."


def first_fault(module: LightningModule, batch: Any, index: int) -> str | None:
    found: list[str] = []

    def watch_output(name: str, layer: nn.Module) -> Any:
        """Modules finish from the inside out, so the first to turn finite inputs into a bad output is the innermost one at fault."""

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not found and not healthy(output) and healthy((args, kwargs)):
                found.append(f"The first bad value comes out of {short(name)} ({type(layer).__name__}), from finite inputs: {sick(output)}.")

        return layer.register_forward_hook(hook, with_kwargs=True)

    def watch_gradient(name: str, parameter: nn.Parameter) -> Any:
        """The backward runs from the loss down, so the first parameter with a bad gradient stands where it began."""

        def hook(grad: Tensor) -> None:
            grad = grad.detach()._values() if grad.is_sparse else grad  # of a value table: the rows that were read
            if not found and not finite(grad):
                found.append(f"The forward is finite; the first bad gradient is that of {short(name)}: {sick(grad)}.")

        return parameter.register_hook(hook)

    hooks = [watch_output(name, layer) for name, layer in module.named_modules() if layer is not module]
    hooks += [watch_gradient(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    try:
        loss = loss_of(module.training_step(batch, index))
        if not found and not finite(loss):
            return f"Every layer's output is finite, and the loss made of them is {loss.item():g}: look at the loss and at auxiliary losses."
        if not found:
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def healthy(values: Any) -> bool:
    """What a layer hands on must be finite. What it keeps may hold infinities (a running maximum starts at minus infinity), but no NaN."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]
    return all(finite(x) if i == 0 else not bool(x.isnan().any()) for i, x in enumerate(tensors))


def finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach()).all())


def sick(values: Any) -> str:
    """How many numbers of a tensor are NaN and how many infinite."""
    tensors = [x.detach() for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]
    bad = next(x for x in tensors if not finite(x))
    return f"{int(bad.isnan().sum())} NaN and {int(bad.isinf().sum())} infinite among {bad.numel()}"


def short(name: str) -> str:
    """As the model names it: `model` is what every task calls its model."""
    return name.removeprefix("model.")
