"""The diffusion process on represented inputs: schedules, forward, reverse."""

from .loop import ReverseLoop
from .schedule import NoiseSchedule, ReverseStep

__all__ = [
    "NoiseSchedule",
    "ReverseLoop",
    "ReverseStep",
]
