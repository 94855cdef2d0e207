"""Published memory mechanisms for sequence models, as parts with one contract."""

from memarch import state
from memarch.config import ConfigError, decode, encode
from memarch.contracts import ChannelMixer, Fed, LMOutput, LossOutput, Mixed, SequenceMixer
from memarch.models import LM, LMConfig, create_model, list_models

__version__ = "0.1.0"

__all__ = [
    "LM",
    "ChannelMixer",
    "ConfigError",
    "Fed",
    "LMConfig",
    "LMOutput",
    "LossOutput",
    "Mixed",
    "SequenceMixer",
    "create_model",
    "decode",
    "encode",
    "from_pretrained",
    "list_models",
    "state",
]


def from_pretrained(name, **kwargs):  # type: ignore[no-untyped-def]
    """A saved model from a folder or the Hub: see memarch.hub.from_pretrained."""
    from memarch.hub import from_pretrained as load

    return load(name, **kwargs)
