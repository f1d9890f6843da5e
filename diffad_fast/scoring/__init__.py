"""From an input and its reconstruction to a map, a score, a p-value and a label."""

from .conformal import SMALLEST_CALIBRATION, Conformal
from .maps import MapStatistics, fit_statistics
from .score import Score, own_part
from .semantic import FeatureDistance
from .split import Split, cross_splits, split_by_group

__all__ = [
    "SMALLEST_CALIBRATION",
    "Conformal",
    "FeatureDistance",
    "MapStatistics",
    "Score",
    "Split",
    "cross_splits",
    "fit_statistics",
    "own_part",
    "split_by_group",
]
