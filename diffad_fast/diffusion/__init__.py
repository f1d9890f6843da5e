"""The diffusion process on represented inputs: schedules and the reverse process."""

from .reverse import reconstruct
from .schedule import NoiseSchedule, ReverseStep

__all__ = [
    "NoiseSchedule",
    "ReverseStep",
    "reconstruct",
]
