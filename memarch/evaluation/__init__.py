"""What a trained model can do: recall over length and age, copying, the needle, facts in weights, text, velocity from an inertial sensor. Every task
is a config; every answer is a Table.

    from memarch.evaluation import evaluate
    table = evaluate(model, "mqar", lengths=(64, 512), pairs=(4, 8), filler="zero")
    table.value(length=512, pairs=8)

    from memarch.evaluation.report import show, write       a terminal; JSON, CSV and a figure

Here nothing knows the command line, and nothing draws: matplotlib and rich are imported by report and plots alone.
"""

import platform
from collections.abc import Mapping
from typing import Any, Union

import torch

from memarch.config import ConfigError, allowed, decode, digest, encode
from memarch.data import MQAR, Copy, Facts, Inertial, Needle, SelectiveCopy
from memarch.data.packed import Packed
from memarch.evaluation.age import AgeTask
from memarch.evaluation.facts import FactsTask
from memarch.evaluation.fidelity import Fidelity
from memarch.evaluation.inertial import InertialTask
from memarch.evaluation.perplexity import TextTask
from memarch.evaluation.recall import CopyTask, MQARTask, NeedleTask, SelectiveCopyTask
from memarch.evaluation.table import Advance, Estimate, Table, estimate

TASKS = {
    "mqar": MQARTask,
    "copy": CopyTask,
    "selective_copy": SelectiveCopyTask,
    "needle": NeedleTask,
    "age": AgeTask,
    "facts": FactsTask,
    "inertial": InertialTask,
    "text": TextTask,
}

KINDS = TASKS | {"fidelity": Fidelity}  # `memarch inspect fidelity` asks a model for this one; in an ablation it is a metric like the others

TaskConfig: Any = Union[tuple(TASKS.values())]

__all__ = [
    "TASKS",
    "AgeTask",
    "CopyTask",
    "Estimate",
    "FactsTask",
    "InertialTask",
    "MQARTask",
    "NeedleTask",
    "SelectiveCopyTask",
    "Table",
    "TaskConfig",
    "TextTask",
    "estimate",
    "evaluate",
    "like",
    "make_task",
]


def make_task(task: Any, **fields: Any) -> Any:
    """A task from its name, from plain data with a `kind`, or as it is. Strict like every config."""
    if isinstance(task, str):
        task = {"kind": task}
    if isinstance(task, Mapping):
        kind = task.get("kind")
        if kind not in KINDS:
            raise ConfigError(allowed("task", kind, KINDS))
        return decode(KINDS[kind], {**task, **fields}, str(kind))
    return decode(type(task), {**encode(task), **fields}, task.kind) if fields else task


def evaluate(
    model: Any, task: Any = "mqar", *, batch_size: int | None = None, chunk: int | None = None, progress: Advance | None = None, **fields: Any
) -> Table:
    """Ask a model. `task` is a name, plain data or a task config, and `fields` replace fields of it.

    batch_size and chunk (tokens fed per call, the state carried between) decide speed and memory, and no number.
    progress: called with the work done since the last call, in units of `work(model, task)`."""
    task = make_task(task, **fields)
    given, asks = (model.config.embed, model.config.head), ("linear", "regression") if isinstance(task, InertialTask) else ("tokens", "tokens")
    if given != asks:
        raise ConfigError(f"this model goes from embed {given[0]!r} to head {given[1]!r}; {task.kind} asks a model from {asks[0]!r} to {asks[1]!r}.")
    table: Table = task.run(model, batch_size, chunk, progress or (lambda _: None))
    weight = next(model.parameters())
    about = {
        "task": encode(task),
        "config": digest(model.config),
        "parameters": model.config.num_params(),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else f"cpu ({platform.machine()})",
        "torch": torch.__version__,
        **table.about,
    }
    return Table(table.task, table.metric, table.axes, table.rows, table.parts, table.skipped, about)


def like(source: Any) -> Any:
    """The task that asks for what a data config trains: its settings, and up to eight times its longest length."""
    if isinstance(source, MQAR):
        longest = source.length
        lengths = sorted({length for length, _ in source.settings} | {2 * longest, 4 * longest, 8 * longest})
        pairs = sorted({pairs for _, pairs in source.settings})
        return MQARTask(lengths=tuple(lengths), pairs=tuple(pairs), vocab_size=source.vocab_size, power=source.power, filler=source.filler)
    if isinstance(source, Copy | SelectiveCopy):
        kind = CopyTask if isinstance(source, Copy) else SelectiveCopyTask
        return kind(lengths=tuple(source.length * n for n in (1, 2, 4, 8)), copies=(source.copies,), vocab_size=source.vocab_size)
    if isinstance(source, Needle):
        return NeedleTask(
            lengths=tuple(source.length * n for n in (1, 2, 4, 8)), needles=source.needles, value_len=source.value_len, vocab_size=source.vocab_size
        )
    if isinstance(source, Facts):
        return FactsTask(
            facts=source.facts, asked=source.asked, key_length=source.key_length, world=source.world, sets=source.sets, vocab_size=source.vocab_size
        )
    if isinstance(source, Inertial):
        return InertialTask(lengths=tuple(source.length * n for n in (1, 2, 4)), every=source.every, noise=source.noise)
    if isinstance(source, Packed):
        return TextTask(path=getattr(source, "path", None))
    raise ConfigError(f"no task asks for what {type(source).__name__} trains. Tasks: {', '.join(TASKS)}.")
