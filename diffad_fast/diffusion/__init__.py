"""The diffusion process on represented inputs: schedules, forward, reverse."""

from .graphs import Graphed
from .loop import ReverseLoop
from .noise import NoiseFields
from .schedule import NoiseSchedule, ReverseStep

__all__ = [
    "Graphed",
    "NoiseFields",
    "NoiseSchedule",
    "ReverseLoop",
    "ReverseStep",
]
