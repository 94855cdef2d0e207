"""Two branches of one width made one, each normalised first (Titans; the mean: Hymba, Dong et al. 2024)."""

from torch import Tensor, nn

from memarch.layers.parts.norm import RMSNorm


class Mix(nn.Module):
    """gate: norm(y) * sigmoid(norm(m))    mean: half of norm(y) + norm(m)"""

    def __init__(self, dim: int, how: str):
        super().__init__()
        self.how, self.first, self.second = how, RMSNorm(dim), RMSNorm(dim)

    @staticmethod
    def num_params(dim: int) -> int:
        return 2 * dim

    def init_(self, depth: int) -> None:
        """What leaves here goes into the residual stream, where 2 x depth such outputs add up."""
        self.first.weight.fill_((2 * depth) ** -0.5)
        self.second.weight.fill_(1.0 if self.how == "gate" else (2 * depth) ** -0.5)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        a, b = self.first(y), self.second(m)
        return (a * b.sigmoid() if self.how == "gate" else (a + b) / 2).to(y.dtype)
