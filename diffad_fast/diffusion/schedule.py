"""Noise schedules and the tables of steps that are derived from them, in float64."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..config import SCHEDULES
from ..errors import InputError

if TYPE_CHECKING:
    from ..config import DetectorConfig


class ReverseStep(NamedTuple):
    """One step from a noise level to another, as Python floats."""

    alpha_t: float
    """Cumulative alpha at the source level, where the network is evaluated."""
    alpha_s: float
    """Cumulative alpha at the target level; 1 is clean."""
    log_sigma: float
    """log of the source level's sigma, on which the network is conditioned."""

    @classmethod
    def between(cls, alpha_t: float, alpha_s: float) -> ReverseStep:
        """The step from one cumulative alpha to another; without signal sigma is infinite."""
        level = 0.5 * math.log((1 - alpha_t) / alpha_t) if alpha_t > 0 else math.inf
        return cls(alpha_t, alpha_s, level)


def log_sigma(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """log of sigma = sqrt((1 - alpha)/alpha), of float64."""
    return 0.5 * (torch.log1p(-alphas_cumprod) - torch.log(alphas_cumprod))


class NoiseSchedule:
    """Cumulative products of a variance schedule of T steps.

    ``linear``: beta from 1e-4 to 0.02 (Ho et al. 2020). ``cosine``: f(u) = cos^2((u + .008)/1.008
    pi/2), beta_i = min(1 - f((i+1)/T)/f(i/T), 0.999) (Nichol & Dhariwal 2021).
    ``scaled_linear``: beta = linspace(sqrt(0.00085), sqrt(0.012))^2 (latent diffusion).
    Raises InputError for another name.
    """

    def __init__(self, name: str = "cosine", steps: int = 1000):
        kind = {"dtype": torch.float64, "device": "cpu"}
        if name == "linear":
            betas = torch.linspace(1e-4, 0.02, steps, **kind)
        elif name == "scaled_linear":
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, steps, **kind) ** 2
        elif name == "cosine":
            u = torch.arange(steps + 1, **kind) / steps
            f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise InputError(f"unknown schedule {name!r}: choose {', '.join(SCHEDULES)}")
        self.name = name
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        """(T,) float64, on the CPU."""

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def log_sigma(self) -> torch.Tensor:
        """(T,) float64, increasing with t."""
        return log_sigma(self.alphas_cumprod)

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest sigma."""
        return tuple(self.log_sigma[[0, -1]].exp().tolist())

    def timestep(self, sigma: float) -> int:
        """The t whose noise level is nearest to ``sigma`` on the logarithmic scale.

        Raises InputError for a level beyond those of the schedule by more than a tenth of itself.
        """
        low, high = self.range
        if not low / 1.1 <= sigma <= high * 1.1:
            raise InputError(
                f"the schedule {self.name!r} of {len(self)} steps has noise levels from {low:.3g} "
                f"to {high:.3g}, not {sigma:g}: choose start_sigma among these, or another schedule"
            )
        return int((self.log_sigma - math.log(sigma)).abs().argmin())

    @staticmethod
    def warn_untrained(config: DetectorConfig, low: float, high: float) -> None:
        """Warn of noise levels that scores evaluate a denoiser at which is trained from ``low`` to
        ``high``."""
        inversion = NoiseSchedule.inversion_steps(*config.inversion_sigmas, config.inversion_steps)
        for name, levels in (
            ("sigmas", config.sigmas),
            ("inversion_sigmas", [math.exp(step.log_sigma) for step in inversion]),
            ("start_sigma", [config.start_sigma]),
        ):
            beyond = [f"{s:.3g}" for s in levels if not low / 1.1 <= s <= high * 1.1]
            if beyond:
                warnings.warn(
                    f"{name} asks the denoiser at the noise levels {', '.join(beyond)}, and it is "
                    f"trained on those from {low:.3g} to {high:.3g}: such scores say little",
                    stacklevel=2,
                )

    def reverse_steps(self, start: int, steps: int) -> list[ReverseStep]:
        """``steps`` steps from timestep ``start`` to the clean end, uniform in t.

        Step i goes from t_i = round((start + 1)(1 - i/steps)) - 1 to t_{i+1}; the level t = -1
        beyond the schedule's first is the clean one, alpha = 1. Raises InputError if there are
        more steps than timesteps.
        """
        if not 1 <= steps <= start + 1:
            raise InputError(
                f"reverse_steps must be from 1 to {start + 1}, the number of timesteps up to "
                f"start_sigma; got {steps}"
            )
        times = [round((start + 1) * (1 - i / steps)) - 1 for i in range(steps + 1)]
        alphas = [1.0 if t < 0 else float(self.alphas_cumprod[t]) for t in times]
        return [ReverseStep.between(*step) for step in pairwise(alphas)]

    @staticmethod
    def inversion_steps(sigma_min: float, sigma_max: float, steps: int) -> list[ReverseStep]:
        """``steps`` steps from the level ``sigma_min`` up to ``sigma_max``, uniform in log sigma.

        Levels are named by sigma, whatever the schedule: alpha = 1 / (1 + sigma^2). The first one
        is above 0, as the network is evaluated at each step's source. Raises InputError unless
        0 < sigma_min < sigma_max and steps >= 1.
        """
        if not (0 < sigma_min < sigma_max < math.inf and steps >= 1):
            raise InputError(
                f"an inversion needs 0 < sigma_min < sigma_max and at least one step; got "
                f"{sigma_min}, {sigma_max} and {steps}"
            )
        first, last = math.log(sigma_min), math.log(sigma_max)
        levels = [first + (last - first) * i / steps for i in range(steps + 1)]
        alphas = [1 / (1 + math.exp(2 * level)) for level in levels]
        return [ReverseStep(*step) for step in zip(alphas, alphas[1:], levels, strict=False)]
