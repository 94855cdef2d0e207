"""The data as Lightning wants it. Which batch a step gets is decided in order.py; here it is only put into loaders."""

import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from memarch.config import require
from memarch.data import DATA, DataConfig, Steps, split_seed
from memarch.data.batch import Batch

# A command line that sets one more field of what a file named (`--data.train.length 80`) must stay with the file's kind and keep its other
# fields. For plain dataclasses in a union jsonargparse does neither, and says nothing: it takes the first member that has such a field.
set_parsing_settings(subclasses_enabled=list(DATA.values()))


class TokenData(LightningDataModule):
    """Training without end (the length of a run is trainer.max_steps) and a validation that is the same every time.

    train: what to train on. val: what to validate on; None: the held-out split of the same.
    batch_size: rows of one micro-batch over all processes together, so a run means the same on any number of them.
    val_batch_size: None: batch_size. val_batches: how many batches a validation takes, at most what the split holds.
    workers: processes that make training batches ahead of time; the batches and their order are those of 0 workers.
    seed: which samples, and in which order. Splits never share any.

    `start_step` is the micro-batch the next training loader begins at. A run that resumes sets it, before fit asks for the loader, to the
    number of micro-batches already consumed; nothing is replayed. The dataset is iterable, so Lightning puts no sampler of its own in
    front of it, whatever use_distributed_sampler says; it also has no length, so trainer.val_check_interval must be a whole number of
    batches with check_val_every_n_epoch null."""

    def __init__(
        self,
        train: DataConfig,
        val: DataConfig | None = None,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        val_batches: int = 16,
        workers: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.train, self.val = train, train if val is None else val
        self.batch_size, self.val_batch_size = batch_size, batch_size if val_batch_size is None else val_batch_size
        for name, size in (("batch_size", batch_size), ("val_batch_size", self.val_batch_size)):
            require(size >= 1, f"data: {name} = {size}: must be at least 1.")
        require(val_batches >= 0, f"data: val_batches = {val_batches}: must be 0 or more; 0 validates nothing.")
        require(workers >= 0, f"data: workers = {workers}: must be 0 (batches are made in the training process) or more.")
        self.val_batches, self.workers, self.seed = val_batches, workers, seed
        self.start_step = 0
        split_seed(seed, "train")  # says what is wrong with a bad seed before any model is built

    @property
    def vocab_size(self) -> int:
        return self.train.vocab_size

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train, "train", self.batch_size, start_step=self.start_step, workers=self.workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._held_out("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._held_out("test")

    def _held_out(self, split: str) -> DataLoader[Batch]:
        """No workers: to start them takes longer than these batches do."""
        held = self.val.rows(split_seed(self.seed, split))
        steps = self.val_batches if held is None else min(self.val_batches, max(1, held // self.val_batch_size))
        return self._loader(self.val, split, self.val_batch_size, steps=steps)

    def _loader(self, source: DataConfig, split: str, size: int, start_step: int = 0, steps: int | None = None, workers: int = 0) -> DataLoader[Batch]:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        order = Steps(source, split_seed(self.seed, split), size, start_step, rank, world, steps)
        # Its own generator: a loader otherwise takes a number from torch's global one each time it starts, and dropout would notice.
        own = torch.Generator().manual_seed(self.seed)
        return DataLoader(order, batch_size=None, num_workers=workers, generator=own, pin_memory=torch.cuda.is_available())
