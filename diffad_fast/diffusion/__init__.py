"""The diffusion process on represented inputs: schedules, forward, reverse."""

from .forward import min_snr_weight, training_target, velocity
from .loop import ReverseLoop
from .schedule import NoiseSchedule, ReverseStep

__all__ = [
    "NoiseSchedule",
    "ReverseLoop",
    "ReverseStep",
    "min_snr_weight",
    "training_target",
    "velocity",
]
