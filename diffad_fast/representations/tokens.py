"""Images as grids of tokens: energies of wavelet bands, Haar packets, a backbone's features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..config import BASE_GRID, token_source
from ..errors import InputError
from ..reference.maps import gaussian_blur
from .moments import JointMoments
from .smoothing import GaussianSmoothing
from .whitening import Whitening

# Under an energy in front of its logarithm: of intensities in [0,1], an amplitude of a thousandth,
# less than rounding to 8 bits leaves.
SMALLEST_ENERGY = 1e-6
# Deviation in cells of the Gaussian over energies: a cell's own edges should not matter.
SOFTENING = 0.7
# Added to an intensity in front of its logarithm: black has a finite one, and noise in the dark is
# not blown up.
LOG_OFFSET = 0.05
# Side in pixels of the cells by which preprocessing is chosen.
CELL = 16
# The short side over the deviation of the Gaussian that stands for illumination.
ILLUMINATION_SHARE = 21


class Preprocessing(nn.Module):
    """Images (N,C,H,W) in [0,1] as tokens see them: without what the camera and lamp add.

    intensity: "log" takes the logarithm, under which brightness is an offset. illumination: the
    deviation in pixels of the Gaussian whose smooth image is taken off; 0 takes none. scale: divide
    by the image's own deviation. What is "auto" or None is chosen by ``fit``; ``choices`` tells
    what is in use.
    """

    def __init__(self, intensity: str, illumination: float | None, scale: bool | None):
        super().__init__()
        self.intensity, self.illumination, self.scale = intensity, illumination, scale
        self._smoothed = GaussianSmoothing()

    @property
    def choices(self) -> dict[str, object]:
        """The options of :class:`~diffad_fast.DetectorConfig` that say what is in use."""
        return {
            "intensity": self.intensity,
            "illumination": self.illumination,
            "image_scale": self.scale,
        }

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor]) -> None:
        """Choose what was left open, from batches of normal images, by what these share.

        All three rules rest on cells of 16 pixels, their means (the slow image) and the logarithms
        of their deviations (the contrast):

        - Where light multiplies, contrast grows with brightness: over all cells, the contrast then
          rises with the logarithm of the mean by a slope of 1, and the logarithm of the image makes
          the two independent. Where noise and texture are added the slope is 0. The nearer one
          decides (Bartlett 1947).
        - The slow image is what the object looks like, as far as all normals share it, and the
          lamp's doing, as far as it differs between them at the same place. It is taken off where
          these differences make up more than half of its variance.
        - The contrast, less its mean at each place, is the whole image's as far as all cells of an
          image share it. Images are scaled where this makes up more than half of its variance (the
          intraclass correlation; Fisher 1925).
        """
        if self.intensity != "auto" and None not in (self.illumination, self.scale):
            return
        cells: list[list[torch.Tensor]] = [[], [], [], []]
        for images in batches:
            side = min(images.shape[2:])
            for i, x in enumerate((images, (images + LOG_OFFSET).log())):
                mean = F.avg_pool2d(x, CELL, ceil_mode=True)
                square = F.avg_pool2d(x**2, CELL, ceil_mode=True)
                cells[2 * i].append(mean)
                cells[2 * i + 1].append((square - mean**2).clamp(min=1e-8).sqrt().log())
        mean, contrast, log_mean, log_contrast = (torch.cat(part).double() for part in cells)
        if self.intensity == "auto":
            pair = torch.stack([(mean + LOG_OFFSET).log().flatten(), contrast.flatten()])
            covariance = torch.cov(pair)
            slope = covariance[0, 1] / covariance[0, 0].clamp(min=1e-12)
            self.intensity = "log" if slope > 0.5 else "linear"
        if self.intensity == "log":
            mean, contrast = log_mean, log_contrast
        if self.illumination is None:
            differs = mean.var(dim=0).mean() > 0.5 * mean.var()
            self.illumination = float(round(side / ILLUMINATION_SHARE)) if differs else 0.0
        if self.scale is None:
            contrast = contrast - contrast.mean(dim=0)
            self.scale = bool(contrast.flatten(1).mean(dim=1).var() > 0.5 * contrast.var())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.intensity == "log":
            x = (x + LOG_OFFSET).log()
        if self.illumination:
            x = x - self._smoothed(x, self.illumination)
        if self.scale:
            deviation = x.flatten(1).std(dim=1, correction=0).clamp(min=1e-6)
            x = x / deviation[:, None, None, None]
        return x


class ImageTokens(nn.Module):
    """Images (N,C,H,W) to one grid of whitened tokens (N,h,w,dim) for each of several sources.

    names: token sources, see :class:`~diffad_fast.DetectorConfig`; a square image has G x G tokens
    of the source "kind-G". What they are made of is computed once for all: the preprocessed image,
    and of its undecimated Haar transform the mean square and the maximum of every band on the cells
    of a grid of 32 along the short side.
    """

    def __init__(
        self,
        names: Sequence[str],
        image_size: tuple[int, int],
        preprocessing: Preprocessing,
        backbone: nn.Module | None,
    ):
        super().__init__()
        self.preprocessing = preprocessing
        self.energies = BandEnergies(min(image_size))
        self.sources = nn.ModuleList()
        for name in names:
            kind, grid = token_source(name)
            if kind == "features":
                source = BackboneFeatures(backbone)
            elif kind == "patch":
                source = HaarPatches(min(image_size) // grid)
            else:
                source = EnergySource(kind, grid, self.energies.levels)
            self.sources.append(source)
        self.whitenings = nn.ModuleList(Whitening() for _ in names)

    @property
    def dims(self) -> list[int]:
        """The size of each source's tokens, after ``fit``."""
        return [whitening.dim for whitening in self.whitenings]

    @property
    def offset(self) -> float:
        """Pixels by which tokens lie below and to the right of what they see: the half of
        ``ops.band_energies`` in those sources that are made of them, on average over all."""
        return 0.5 * sum(isinstance(s, EnergySource) for s in self.sources) / len(self.sources)

    @torch.no_grad()
    def fit(
        self,
        batches: Callable[[], Iterable[torch.Tensor]],
        plain: Callable[[], Iterable[torch.Tensor]] | None = None,
    ) -> None:
        """Set everything from normal images; ``batches()`` iterates over them anew each time.

        plain: the same without augmentation, whose noise would blur what ties the contrast to the
        brightness: by these the preprocessing is chosen.
        """
        self.preprocessing.fit((plain or batches)())
        # The statistics of a step rest on the steps before it: several passes, over the energies
        # where these are enough, a thirtieth of an image.
        energies = None
        if any(isinstance(source, EnergySource) for source in self.sources):
            energies = [self.energies(self.preprocessing(x)) for x in batches()]
        for source, whitening in zip(self.sources, self.whitenings, strict=True):
            moments = JointMoments()
            if isinstance(source, EnergySource):
                source.fit(energies)
                for batch in energies:
                    moments.add(source(batch).permute(0, 2, 3, 1).flatten(0, 2))
            else:
                for x in batches():
                    moments.add(self._raw(source, x).permute(0, 2, 3, 1).flatten(0, 2))
            whitening.fit(moments)

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The token grids of images."""
        prepared = self.preprocessing(x)
        energies = None
        result = []
        for source, whitening in zip(self.sources, self.whitenings, strict=True):
            if isinstance(source, EnergySource):
                energies = self.energies(prepared) if energies is None else energies
                raw = source(energies)
            else:
                raw = self._raw(source, x, prepared)
            result.append(whitening(raw.permute(0, 2, 3, 1)))
        return result

    def _raw(self, source: nn.Module, x: torch.Tensor, prepared=None) -> torch.Tensor:
        """(N,D,h,w) of a source that sees the image: a backbone as it is, patches prepared."""
        if isinstance(source, BackboneFeatures):
            return source(x)
        return source(self.preprocessing(x) if prepared is None else prepared)


class BandEnergies(nn.Module):
    """Images (N,C,H,W) to (N,(2K+1)C,h,w): on cells a 32nd of ``side`` wide, the mean squares and
    maximum squares of K = 3 levels bands, and the mean of the image: ``ops.band_energies``."""

    def __init__(self, side: int):
        super().__init__()
        self.cell = side // BASE_GRID
        # Bands up to a sixteenth of the side; what is larger is left to the coarse sources.
        self.levels = min(6, max(1, round(math.log2(side / BASE_GRID)) + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.band_energies(x, self.cell, self.levels)


class EnergySource(nn.Module):
    """What :class:`BandEnergies` gives to features (N,D,h,w) of one kind on one grid.

    Energies are averaged to the grid, softened and taken the logarithm of; every feature is
    standardised per position, since normal objects have edges and textures in known places. Then
    ``energy`` puts the features of every other cell in a window of 5 x 5 beside those of a cell,
    ``cell`` takes them as they are, ``gradient`` takes differences of neighbours, ``spread`` means
    and deviations over large blocks, ``mean`` means alone, and these three are standardised again.
    """

    def __init__(self, kind: str, grid: int, levels: int):
        super().__init__()
        self.kind, self.grid, self.levels = kind, grid, levels
        self._smoothed = GaussianSmoothing()
        self.first = PositionStandardiser()
        self.second = None if kind in ("energy", "cell") else PositionStandardiser()

    def fit(self, energies: Sequence[torch.Tensor]) -> None:
        """Set the statistics from batches of energies of normal images."""
        self.first.fit(lambda: (self._features(x) for x in energies))
        if self.second is not None:
            self.second.fit(lambda: (self._derived(x) for x in energies))

    def forward(self, energies: torch.Tensor) -> torch.Tensor:
        derived = self._derived(energies)
        return derived if self.second is None else self.second(derived)

    def _features(self, energies: torch.Tensor) -> torch.Tensor:
        by_block = self.kind in ("spread", "mean")
        x = energies if by_block else _pooled(energies, self.grid)
        channels = x.shape[1] // (6 * self.levels + 1)
        powers, mean = x[:, :-channels], x[:, -channels:]
        if not by_block:
            powers = self._smoothed(powers, SOFTENING)
        return torch.cat([(powers + SMALLEST_ENERGY).log(), mean], dim=1)

    def _derived(self, energies: torch.Tensor) -> torch.Tensor:
        x = self.first(self._features(energies))
        if self.kind == "cell":
            return x
        if self.kind == "energy":
            h, w = x.shape[2:]
            x = F.pad(x, (2, 2, 2, 2), mode="reflect")
            return F.unfold(x, 3, dilation=2).unflatten(2, (h, w))
        if self.kind == "gradient":
            x = F.pad(x, (1, 1, 1, 1), mode="reflect")
            rows = x[..., 2:, 1:-1] - x[..., :-2, 1:-1]
            return torch.cat([rows, x[..., 1:-1, 2:] - x[..., 1:-1, :-2]], dim=1)
        mean = _pooled(x, self.grid)
        if self.kind == "mean":
            return mean
        variance = _pooled(x.square(), self.grid) - mean.square()
        return torch.cat([mean, variance.clamp(min=1e-4).sqrt()], dim=1)


def _pooled(x: torch.Tensor, grid: int) -> torch.Tensor:
    """(N,D,h,w) averaged to ``grid`` cells along its short side."""
    short = min(x.shape[2:])
    if grid >= short:
        return x
    return F.adaptive_avg_pool2d(x, [max(1, round(grid * side / short)) for side in x.shape[2:]])


class PositionStandardiser(nn.Module):
    """(x - mean) / deviation at every position, both smoothed over neighbouring ones."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(0, 0, 0))
        self.register_buffer("deviation", torch.zeros(0, 0, 0))

    def fit(self, batches: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Set both from (n,D,h,w); ``batches()`` iterates anew each time."""
        count, total = 0, 0.0
        for x in batches():
            total, count = total + x.double().sum(dim=0), count + len(x)
        mean, squares = total / count, 0.0
        for x in batches():
            squares = squares + (x.double() - mean).square().sum(dim=0)
        variance = squares / count
        if min(mean.shape[1:]) > SMALLEST_SMOOTHED:
            mean, variance = gaussian_blur(mean, 1.0), gaussian_blur(variance, 1.0)
        deviation = variance.sqrt()
        floor = deviation.mean().clamp(min=1e-6) * 1e-3
        self.mean, self.deviation = mean.float(), deviation.clamp(min=floor).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.deviation


# Grids up to this many cells a side are not smoothed: their cells have little to do with another.
SMALLEST_SMOOTHED = 4


class HaarPatches(nn.Module):
    """Images (N,C,H,W) to the Haar packets of their cells, (N,C cell^2,H/cell,W/cell)."""

    def __init__(self, cell: int):
        super().__init__()
        self.level = int(math.log2(max(1, cell)))
        if not 1 <= self.level <= 4 or 2**self.level != cell:
            raise InputError(
                f"patches would be {cell} pixels wide: choose image_size and the grid of 'patch-G' "
                "so that they are 2, 4, 8 or 16"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.haar_pack(x, self.level)


def feature_maps(backbone: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """What a backbone, a :class:`diffad_fast.protocols.FeatureExtractor`, says of images (N,C,H,W).

    Raises InputError for an answer of another kind or shape.
    """
    found = backbone(images)
    maps = found if isinstance(found, (list, tuple)) else [found]
    for map_ in maps:
        is_tensor = isinstance(map_, torch.Tensor)
        # Not by len(), which would tie a traced program to one size of batch.
        if not is_tensor or map_.ndim != 4 or map_.shape[0] != images.shape[0]:
            raise InputError(
                f"the backbone answered {images.shape[0]} images with "
                f"{tuple(map_.shape) if is_tensor else type(map_).__name__}: it must give a "
                "feature map (N,c,h,w), or a list of them"
            )
    return list(maps)


class BackboneFeatures(nn.Module):
    """Feature maps of a frozen backbone, brought to the grid of the finest and put together.

    backbone: a module that maps images (N,C,H,W) in [0,1] to a tensor (N,c,h,w) or a list of them.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = feature_maps(self.backbone, x)
        size = max((m.shape[2:] for m in maps), key=lambda s: s[0] * s[1])
        return torch.cat(
            [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps], dim=1
        )
