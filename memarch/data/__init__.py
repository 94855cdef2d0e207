"""Data: recall generators, random facts, text, token shards. Every sample is a pure function of (config, seed, index); no model is known here.

`memarch.data.module.TokenData` is the Lightning side and is imported by whoever trains; this package needs torch and numpy only.
"""

from memarch.data.batch import Batch, Source
from memarch.data.copying import Copy
from memarch.data.draw import SPLITS, split_of, split_seed
from memarch.data.facts import Facts
from memarch.data.inertial import Inertial
from memarch.data.mqar import MQAR
from memarch.data.needle import Needle
from memarch.data.order import Steps, share
from memarch.data.selective_copy import SelectiveCopy
from memarch.data.shards import Shards
from memarch.data.text import Text

DataConfig = MQAR | Copy | SelectiveCopy | Needle | Facts | Inertial | Text | Shards

DATA: dict[str, type] = {
    "mqar": MQAR,
    "copy": Copy,
    "selective_copy": SelectiveCopy,
    "needle": Needle,
    "facts": Facts,
    "inertial": Inertial,
    "text": Text,
    "shards": Shards,
}

__all__ = [
    "DATA",
    "MQAR",
    "SPLITS",
    "Batch",
    "Copy",
    "DataConfig",
    "Facts",
    "Inertial",
    "Needle",
    "SelectiveCopy",
    "Shards",
    "Source",
    "Steps",
    "Text",
    "share",
    "split_of",
    "split_seed",
]
