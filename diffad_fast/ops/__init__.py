"""The operators: public functions that check their arguments and call the chosen backend.

Which one that is, :mod:`diffad_fast.ops.dispatch` decides; ``diffad_fast.reference`` has the same
functions in plain PyTorch.
"""

from .attention import wavelet_attention
from .conv import conv3x3
from .diffusion import ddim_step, q_sample
from .dispatch import select_from_environment
from .energies import band_energies
from .finish import Finish, ddim_finish
from .haar import haar_pack, haar_unpack
from .maps import anomaly_map
from .neighbours import nearest_distances
from .noise import philox_normal
from .norm import group_norm_silu
from .packet import noised_packet, standardised_packet
from .spectrogram import log_mel
from .token_loss import token_mlp_loss
from .token_mlp import PackedTokenMLP, token_mlp_loop
from .training import noised_target, weighted_mse
from .wavelet import dwt2d, idwt2d, wavedec2, waverec2

__all__ = [
    "Finish",
    "PackedTokenMLP",
    "anomaly_map",
    "band_energies",
    "conv3x3",
    "ddim_finish",
    "ddim_step",
    "dwt2d",
    "group_norm_silu",
    "haar_pack",
    "haar_unpack",
    "idwt2d",
    "log_mel",
    "nearest_distances",
    "noised_packet",
    "noised_target",
    "philox_normal",
    "q_sample",
    "standardised_packet",
    "token_mlp_loop",
    "token_mlp_loss",
    "wavedec2",
    "wavelet_attention",
    "waverec2",
    "weighted_mse",
]

select_from_environment()
