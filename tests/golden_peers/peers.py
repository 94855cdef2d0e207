"""Small models of other libraries with random weights and the logits those gave, so that parity is tested without the library.

python tests/golden_peers/peers.py mamba mamba2        needs transformers (memarch's extra hf)
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
MAMBA = {  # sizes that are nobody's default; 70 tokens are more than a chunk of ours
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "state_size": 5,
    "conv_kernel": 3,
    "expand": 3,
    "time_step_rank": 4,
    "use_bias": True,
    "layer_norm_epsilon": 1e-4,
    "tie_word_embeddings": True,
    "use_cache": False,
}
MAMBA2 = {  # two groups, heads that share keys, a width that is no power of two; 70 tokens are more than a chunk of theirs and two of ours
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "state_size": 8,
    "head_dim": 12,
    "num_heads": 4,
    "expand": 2,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 32,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "use_cache": False,
}


def mamba(**config):
    from transformers import MambaConfig, MambaForCausalLM

    return noisy(MambaForCausalLM, MambaConfig(**{**MAMBA, **config}))


def mamba2():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return noisy(Mamba2ForCausalLM, Mamba2Config(**MAMBA2))


def noisy(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    return model


def main(name: str) -> None:
    model = {"mamba": mamba, "mamba2": mamba2}[name]()
    tokens = torch.randint(model.config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens).logits
    tied = model.config.tie_word_embeddings
    weights = {f"weights.{name}": p.contiguous() for name, p in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file({**weights, "tokens": tokens, "logits": logits}, HERE / f"{name}.safetensors")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
