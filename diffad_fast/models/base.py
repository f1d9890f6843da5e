"""What a model is: a representation, its denoiser, how both are trained and what they say."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from ..config import MODES, DetectorConfig
from ..diffusion import Graphed, NoiseSchedule, ReverseLoop, ReverseStep
from ..scoring import MapStatistics, Split
from ..surroundings import drawing_from
from ..training.history import History
from ..training.state import TrainingCheckpoint


class Model(nn.Module, ABC):
    """Scores batches in the mode of its configuration, which may be replaced: :meth:`use` then
    follows. :class:`diffad_fast.Detector` does everything else: opening data, splitting,
    calibrating, checkpoints.

    Raises InputError for steps that the schedule does not have.
    """

    statistics_smoothing: float
    """Deviation of the Gaussian for statistics per position, in positions of the raw maps."""

    def __init__(self, config: DetectorConfig, device: torch.device):
        super().__init__()
        self.config, self.device = config, device
        self.schedule = NoiseSchedule(config.schedule, config.diffusion_steps)
        for mode in MODES:
            self._steps_of(mode)  # raises
        self._scoring: Graphed | ReverseLoop | None = None

    @abstractmethod
    def learn(self, source, split: Split, kept: TrainingCheckpoint | None) -> History:
        """Fit the representation and train on the parts of ``source`` that ``split`` names; once in
        a model's life."""

    @property
    @abstractmethod
    def has_semantic(self) -> bool:
        """Is there the distance that ``semantic_weight`` weighs?"""

    @property
    @abstractmethod
    def map_names(self) -> list[str]:
        """What each of :meth:`raw_maps` is."""

    @abstractmethod
    def raw_maps(self, x: torch.Tensor) -> Sequence[torch.Tensor | None] | torch.Tensor:
        """Each map (N,h,w) of raw inputs alone, not standardised; None where it has no weight."""

    @abstractmethod
    def trajectory(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the inversion of raw inputs: mean square of the latent (N,) and, of every step, the
        mean square of the way (N,S), as the states of the variance-exploding process go. In mode
        invert only."""

    @abstractmethod
    def _scoring_pass(self) -> Graphed | ReverseLoop:
        """From a batch on the device to what :meth:`score` gives, in the configuration's mode."""

    def use(self, statistics: list[MapStatistics | None] | None) -> None:
        """Standardise the maps of the configuration's mode by ``statistics`` from now on."""
        self.statistics = statistics
        self.release()
        # Made at the first score and kept, with the graphs that it captures on a GPU, until what
        # they read is replaced.
        self._scoring = None

    def release(self) -> None:
        """Give back the memory of the graphs."""
        if self._scoring is not None:
            self._scoring.forget()

    def score(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(map, score (N,)) of raw inputs, images of uint8 among them; the map (N,H,W) of images,
        (N,n_mels,steps) of clips, (N,1,1) of vectors."""
        if self._scoring is None:
            self._scoring = self._scoring_pass()
        pinned = self.device.type == "cuda" and x.is_pinned()
        x = x.to(self.device, non_blocking=pinned)
        if x.dtype == torch.uint8 and self.config.kind == "image":
            # By a tensor: for a number CUDA would multiply by its rounded inverse.
            x = x.float() / x.new_full((), 255, dtype=torch.float32)
        return self._scoring(x)

    def _mode_names(self, of_reconstruct: Sequence[str]) -> list[str]:
        """Of the maps of the configuration's mode."""
        names = {
            "reconstruct": [*of_reconstruct],
            "invert": ["latent"],
            "one_step": [f"residual at {sigma:g}" for sigma in self.config.sigmas],
        }[self.config.mode]
        return names + (["semantic"] if self.has_semantic else [])

    def _steps_of(self, mode: str) -> list[ReverseStep]:
        config = self.config
        if mode == "one_step":
            return []
        if mode == "invert":
            return self.schedule.inversion_steps(*config.inversion_sigmas, config.inversion_steps)
        start = self.schedule.timestep(config.start_sigma)
        return self.schedule.reverse_steps(start, config.reverse_steps)

    def _at_feature_level(self, x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a denoiser's features of x0 (N,...) are read from: x0 as an input of the
        variance-preserving process at the level ``feature_sigma``, and the logarithm of that."""
        sigma = self.config.feature_sigma
        level = x0.new_full((x0.shape[0],), math.log(sigma), dtype=torch.float32)
        return x0 * (1 + sigma**2) ** -0.5, level

    def _seeded(self) -> drawing_from:
        """What is made meanwhile has the weights of the configuration's seed."""
        return drawing_from(torch.Generator().manual_seed(self.config.seed))

    # --------------------------------------------------------- checkpoint

    @staticmethod
    @abstractmethod
    def _is_of_backbone(name: str) -> bool:
        """Does a tensor belong to what was handed over, and not to the checkpoint?"""

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that :meth:`restore` needs."""
        return {k: v for k, v in self.state_dict().items() if not self._is_of_backbone(k)}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what :meth:`state` gave. Raises RuntimeError where it does not fit."""
        missing, unexpected = self.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if not self._is_of_backbone(name)]
        if missing or unexpected:
            raise RuntimeError(f"tensors {', '.join([*missing, *unexpected][:3])} do not match")
        self.use(None)


def resize_buffers(module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Give the buffers below ``module``, whose sizes come from data, the sizes in ``tensors``."""
    for name, buffer in list(module.named_buffers()):
        if prefix + name in tensors:
            parent, _, own = name.rpartition(".")
            sized = torch.empty_like(buffer, memory_format=torch.contiguous_format)
            sized = sized.new_empty(tensors[prefix + name].shape)
            setattr(module.get_submodule(parent), own, sized)
