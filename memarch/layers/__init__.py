"""Every layer, one published idea per file. Adding one is a new file and a line here; being here is being tested."""

from typing import Any, Union

from memarch.layers.attention import Attention, AttentionConfig
from memarch.layers.base_conv import BaseConv, BaseConvConfig
from memarch.layers.base_conv_mqar import BaseConvMQAR, BaseConvMQARConfig
from memarch.layers.based import Based, BasedConfig
from memarch.layers.cross_attention import CrossAttention, CrossAttentionConfig
from memarch.layers.delta_net import DeltaNet, DeltaNetConfig
from memarch.layers.gated_delta import GatedDelta, GatedDeltaConfig
from memarch.layers.gla import GLA, GLAConfig
from memarch.layers.gmu import GMU, GMUConfig
from memarch.layers.linear_attention import LinearAttention, LinearAttentionConfig
from memarch.layers.mamba import Mamba, MambaConfig
from memarch.layers.mamba2 import Mamba2, Mamba2Config
from memarch.layers.memmamba import MemMamba, MemMambaConfig
from memarch.layers.memory_former import MemoryFormer, MemoryFormerConfig
from memarch.layers.memory_plus import MemoryPlus, MemoryPlusConfig
from memarch.layers.moe import MoE, MoEConfig
from memarch.layers.mom import MoM, MoMConfig
from memarch.layers.parts.pool import PoolConfig, ValuePool
from memarch.layers.peer import PEER, PEERConfig
from memarch.layers.product_key import PKM, PKMConfig
from memarch.layers.retnet import RetNet, RetNetConfig
from memarch.layers.short_conv import ShortConvConfig, ShortConvMixer
from memarch.layers.swiglu import SwiGLU, SwiGLUConfig
from memarch.layers.titans_lmm import TitansLMM, TitansLMMConfig
from memarch.layers.titans_mac import TitansMAC, TitansMACConfig
from memarch.layers.titans_mag import TitansMAG, TitansMAGConfig
from memarch.layers.titans_mal import TitansMAL, TitansMALConfig
from memarch.layers.ultramem import UltraMem, UltraMemConfig
from memarch.layers.ultramem_v2 import UltraMemV2, UltraMemV2Config

MIXERS = {
    "attention": AttentionConfig,
    "base_conv": BaseConvConfig,
    "base_conv_mqar": BaseConvMQARConfig,
    "based": BasedConfig,
    "cross_attention": CrossAttentionConfig,
    "delta_net": DeltaNetConfig,
    "gated_delta": GatedDeltaConfig,
    "gla": GLAConfig,
    "gmu": GMUConfig,
    "linear_attention": LinearAttentionConfig,
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "memmamba": MemMambaConfig,
    "mom": MoMConfig,
    "retnet": RetNetConfig,
    "short_conv": ShortConvConfig,
    "titans_lmm": TitansLMMConfig,
    "titans_mac": TitansMACConfig,
    "titans_mag": TitansMAGConfig,
    "titans_mal": TitansMALConfig,
}

CHANNELS = {
    "memory_former": MemoryFormerConfig,
    "memory_plus": MemoryPlusConfig,
    "moe": MoEConfig,
    "peer": PEERConfig,
    "pkm": PKMConfig,
    "swiglu": SwiGLUConfig,
    "ultramem": UltraMemConfig,
    "ultramem_v2": UltraMemV2Config,
}

MixerConfig: Any = Union[tuple(MIXERS.values())]
ChannelConfig: Any = Union[tuple(CHANNELS.values())]

__all__ = [
    "CHANNELS",
    "GLA",
    "GMU",
    "MIXERS",
    "PEER",
    "PKM",
    "Attention",
    "AttentionConfig",
    "BaseConv",
    "BaseConvConfig",
    "BaseConvMQAR",
    "BaseConvMQARConfig",
    "Based",
    "BasedConfig",
    "ChannelConfig",
    "CrossAttention",
    "CrossAttentionConfig",
    "DeltaNet",
    "DeltaNetConfig",
    "GLAConfig",
    "GMUConfig",
    "GatedDelta",
    "GatedDeltaConfig",
    "LinearAttention",
    "LinearAttentionConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "MemMamba",
    "MemMambaConfig",
    "MemoryFormer",
    "MemoryFormerConfig",
    "MemoryPlus",
    "MemoryPlusConfig",
    "MixerConfig",
    "MoE",
    "MoEConfig",
    "MoM",
    "MoMConfig",
    "PEERConfig",
    "PKMConfig",
    "PoolConfig",
    "RetNet",
    "RetNetConfig",
    "ShortConvConfig",
    "ShortConvMixer",
    "SwiGLU",
    "SwiGLUConfig",
    "TitansLMM",
    "TitansLMMConfig",
    "TitansMAC",
    "TitansMACConfig",
    "TitansMAG",
    "TitansMAGConfig",
    "TitansMAL",
    "TitansMALConfig",
    "UltraMem",
    "UltraMemConfig",
    "UltraMemV2",
    "UltraMemV2Config",
    "ValuePool",
]
