"""The diffusion process on represented inputs: schedules, forward, reverse."""

from .forward import min_snr_weight, training_target, velocity
from .reverse import reconstruct
from .schedule import NoiseSchedule, ReverseStep

__all__ = [
    "NoiseSchedule",
    "ReverseStep",
    "min_snr_weight",
    "reconstruct",
    "training_target",
    "velocity",
]
