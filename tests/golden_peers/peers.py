"""Small models of other libraries with random weights and the logits those gave, so that parity is tested without the library.

python tests/golden_peers/peers.py        needs transformers (memarch's extra hf)
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
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


def mamba2():
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**MAMBA2)).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    return model


def main() -> None:
    model = mamba2()
    tokens = torch.randint(MAMBA2["vocab_size"], (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens).logits
    weights = {f"weights.{name}": p.contiguous() for name, p in model.state_dict().items()}
    save_file({**weights, "tokens": tokens, "logits": logits}, HERE / "mamba2.safetensors")


if __name__ == "__main__":
    main()
