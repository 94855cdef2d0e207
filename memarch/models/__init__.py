"""Backbone, language model and named sizes."""

from memarch.models.lm import LM, Backbone, BlockConfig, BranchConfig, LMConfig
from memarch.models.presets import PRESETS, create_model, list_models, preset

__all__ = ["LM", "PRESETS", "Backbone", "BlockConfig", "BranchConfig", "LMConfig", "create_model", "list_models", "preset"]
