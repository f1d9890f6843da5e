"""A residual MLP on single tokens: the denoiser of vectors and of token grids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..diffusion.schedule import ReverseStep
from ..ops import PackedTokenMLP
from ..ops.token_mlp import laid_out
from ..reference.token_mlp import LAYER_NORM_EPS
from .wavelet_unet import NoiseLevelEmbedding, zero_init


class TokenMLP(nn.Module):
    """Denoiser of tokens (M,dim), one by one; ``blocks`` residual blocks of ``width`` units.

    h = W_in x + b_in; each block h <- h + W2 SiLU(W1 LN(h) + b1 + e(log sigma)) + b2; the
    prediction is W_out SiLU(LN(h)) + b_out. It is a v-prediction, which for tokens of unit
    variance equals the preconditioning of Karras et al. (2022) with sigma_data = 1.

    ``ops.token_mlp_loop`` runs whole loops of it on the weights of :meth:`pack` and the biases of
    :meth:`step_bias`.
    """

    def __init__(self, dim: int, width: int = 256, blocks: int = 3):
        super().__init__()
        self.dim, self.width = dim, width
        self.linear_in = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(TokenBlock(width) for _ in range(blocks))
        self.embedding = NoiseLevelEmbedding(width)
        self.modulation = nn.Linear(width, blocks * width)
        self.linear_out = zero_init(nn.Linear(width, dim))

    def forward(self, x: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        """Prediction (M,dim) for network inputs x (M,dim) at levels log_sigma (M,)."""
        return self.linear_out(F.silu(self._hidden(x, self._levels(log_sigma))))

    def features(self, x: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        """The normalised hidden state (M,width) in front of the last layer."""
        return self._hidden(x, self._levels(log_sigma))

    def _hidden(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        h = self.linear_in(x)
        for block, bias in zip(self.blocks, e.unbind(dim=1), strict=True):
            h = block(h, bias)
        return F.layer_norm(h, (self.width,), eps=LAYER_NORM_EPS)

    def _levels(self, log_sigma: torch.Tensor) -> torch.Tensor:
        """(M,blocks,width): what each block adds for the level."""
        return self.modulation(self.embedding(log_sigma)).unflatten(1, (-1, self.width))

    def pack(self, dtype: torch.dtype | None = None) -> PackedTokenMLP:
        """The weights for ``ops.token_mlp_loop``, in ``dtype`` (that of the module), laid out."""
        return laid_out(self._packed(dtype)[0])

    def step_bias(self, log_sigma: torch.Tensor) -> torch.Tensor:
        """(S,blocks,width) for the levels log_sigma (S,), for ``ops.token_mlp_loop``."""
        return self.packed(log_sigma)[1]

    def packed(
        self, log_sigma: torch.Tensor, dtype: torch.dtype | None = None
    ) -> tuple[PackedTokenMLP, torch.Tensor]:
        """Weights and :meth:`step_bias` together, for ``ops.token_mlp_loss``."""
        weights, extra = self._packed(dtype)
        return weights, self._levels(log_sigma) + extra

    def _packed(self, dtype: torch.dtype | None) -> tuple[PackedTokenMLP, torch.Tensor]:
        def stacked(layer: str, name: str) -> torch.Tensor:
            return torch.stack([getattr(getattr(b, layer), name) for b in self.blocks])

        return PackedTokenMLP.pack(
            self.linear_in.weight, self.linear_in.bias,
            stacked("norm", "weight"), stacked("norm", "bias"),
            stacked("linear1", "weight"), stacked("linear1", "bias"),
            stacked("linear2", "weight"), stacked("linear2", "bias"),
            self.linear_out.weight, self.linear_out.bias, dtype=dtype,
        )  # fmt: skip


class TokenBlock(nn.Module):
    """x + linear(SiLU(linear(LayerNorm(x)) + level))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.linear1 = nn.Linear(width, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, h: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return h + self.linear2(F.silu(self.linear1(self.norm(h)) + level))


def residual_row(sigma: float) -> tuple[float, float, float, float, float]:
    """The row (c_in, A, Bm, p, q) of ``ops.token_mlp_loop`` for the clean-input residual.

    D(x, sigma) is the clean estimate for the network input c x, c = 1/sqrt(1 + sigma^2): with the
    prediction v it is c (c x) - sigma c v, so D - x = (c^2 - 1) x - sigma c v. x itself stays.
    """
    c = (1 + sigma**2) ** -0.5
    return c, 1.0, 0.0, c * c - 1, -sigma * c


def ddim_row(step: ReverseStep) -> tuple[float, float, float, float, float]:
    """The row of a deterministic DDIM step, whose statistic is the length of the way it goes.

    With a = sqrt(alpha), b = sqrt(1 - alpha) at t and s, the estimates are x0 = a_t x - b_t v and
    eps = b_t x + a_t v, so x_s = (a_s a_t + b_s b_t) x + (b_s a_t - a_s b_t) v. The way is that of
    x / a, the state of the variance-exploding process.
    """
    a_t, b_t = step.alpha_t**0.5, (1 - step.alpha_t) ** 0.5
    a_s, b_s = step.alpha_s**0.5, (1 - step.alpha_s) ** 0.5
    scale, shift = a_s * a_t + b_s * b_t, b_s * a_t - a_s * b_t
    return 1.0, scale, shift, scale / a_s - 1 / a_t, shift / a_s
