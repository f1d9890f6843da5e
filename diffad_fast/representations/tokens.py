"""Images as grids of tokens: sub-band energies, Haar-packet patches, a backbone's features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..reference.maps import gaussian_blur
from .whitening import Moments, Whitening

# Under a sub-band's mean square in front of its logarithm. Images are divided by their deviation,
# so this is a hundredth of it: what is fainter is rounding and noise.
SMALLEST_ENERGY = 1e-4
# Added to an intensity in front of its logarithm: black has a finite one, and noise in the dark is
# not blown up.
LOG_OFFSET = 0.05


class Preprocessing(nn.Module):
    """Images (N,C,H,W) in [0,1] as tokens see them: without what the camera and lamp add.

    intensity: "log" takes the logarithm, under which brightness is an offset; "auto" lets ``fit``
    choose. illumination: the deviation in pixels of the Gaussian whose smooth image is taken off;
    0 takes none. scale: divide by the image's own deviation.
    """

    def __init__(self, intensity: str, illumination: float, scale: bool):
        super().__init__()
        self.intensity, self.illumination, self.scale = intensity, illumination, scale
        self.register_buffer("log", torch.tensor(intensity == "log"))
        self._blur: dict[tuple[int, torch.device], torch.Tensor] = {}

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor]) -> None:
        """Choose the intensity, from batches of normal images.

        Where light multiplies, contrast grows with brightness: over all cells, the logarithm of the
        deviation then rises with that of the mean by a slope of 1, and the logarithm of the image
        makes the two independent. Where noise and texture are added the slope is 0. The nearer one
        decides (Bartlett 1947).
        """
        if self.intensity != "auto":
            return
        moments = Moments()
        for images in batches:
            cells = F.avg_pool2d(images, 16, ceil_mode=True)
            squares = F.avg_pool2d(images**2, 16, ceil_mode=True)
            deviation = (squares - cells**2).clamp(min=1e-8).sqrt()
            pair = torch.stack([(cells + LOG_OFFSET).log(), deviation.log()], dim=-1)
            moments.add(pair.reshape(-1, 2))
        covariance = moments.covariance
        slope = covariance[0, 1] / covariance[0, 0].clamp(min=1e-12)
        self.log.fill_(bool(slope > 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.where(self.log, (x + LOG_OFFSET).log(), x)
        if self.illumination > 0:
            rows, columns = (self._matrix(side, x.device) for side in x.shape[2:])
            x = x - rows @ x @ columns.T
        if self.scale:
            deviation = x.flatten(1).std(dim=1, correction=0).clamp(min=1e-6)
            x = x / deviation[:, None, None, None]
        return x

    def _matrix(self, side: int, device: torch.device) -> torch.Tensor:
        """(side,side): the Gaussian along one axis, borders reflected. As a matrix product it is
        several times faster than a convolution with as long a kernel."""
        key = side, device
        if key not in self._blur:
            unit = torch.eye(side, device=device)[:, :, None]
            self._blur[key] = gaussian_blur(unit, self.illumination)[:, :, 0].T.contiguous()
        return self._blur[key]


class ImageTokens(nn.Module):
    """Images (N,C,H,W) to whitened tokens (N,H/cell,W/cell,dim).

    ``raw`` maps preprocessed images to feature maps (N,D,H/cell,W/cell); each token is those of a
    position and, with ``neighbours``, of the eight around it (reflected at borders), whitened by
    principal components on normal data.
    """

    def __init__(
        self,
        raw: Callable[[torch.Tensor], torch.Tensor],
        cell: int,
        preprocessing: Preprocessing | None,
        neighbours: bool,
    ):
        super().__init__()
        self.raw, self.cell, self.neighbours = raw, cell, neighbours
        self.preprocessing = preprocessing
        self.whitening = Whitening()

    @property
    def dim(self) -> int:
        return self.whitening.dim

    @torch.no_grad()
    def fit(self, batches: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Set everything from normal images; ``batches()`` iterates over them anew each time."""
        if self.preprocessing is not None:
            self.preprocessing.fit(batches())
        moments = Moments()
        for images in batches():
            moments.add(self._tokens(images).flatten(0, 2))
        self.whitening.fit(moments)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.whitening(self._tokens(x))

    def _tokens(self, images: torch.Tensor) -> torch.Tensor:
        """(N,h,w,D), not whitened."""
        x = images if self.preprocessing is None else self.preprocessing(images)
        x = self.raw(x)
        if self.neighbours:
            n, _, h, w = x.shape
            x = F.pad(x, (1, 1, 1, 1), mode="replicate")
            x = F.unfold(x, 3).unflatten(2, (h, w))
        return x.permute(0, 2, 3, 1)


def sub_band_energies(x: torch.Tensor, cell: int) -> torch.Tensor:
    """Images (N,C,H,W) to (N,C(3 levels+1),H/cell,W/cell), levels = log2 of the cell.

    The logarithm of the mean square of each Haar sub-band over a cell, and the mean of the cell.
    """
    levels, parts = int(math.log2(cell)), []
    channels = x.shape[1]
    for level in range(1, levels + 1):
        bands = ops.haar_pack(x)
        x, detail = bands[:, :channels], bands[:, channels:]
        energy = F.avg_pool2d(detail.square(), cell >> level)
        parts.append((energy + SMALLEST_ENERGY).log())
    return torch.cat([*parts, x / 2**levels], dim=1)


def haar_patches(x: torch.Tensor, cell: int) -> torch.Tensor:
    """Images (N,C,H,W) to the Haar packets of their cells, (N,C cell^2,H/cell,W/cell)."""
    return ops.haar_pack(x, int(math.log2(cell)))


class BackboneFeatures(nn.Module):
    """Feature maps of a frozen backbone, brought to the grid of the finest and put together.

    backbone: a module that maps images (N,C,H,W) in [0,1] to a tensor (N,c,h,w) or a list of them.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.backbone(x)
        maps = [maps] if isinstance(maps, torch.Tensor) else list(maps)
        size = max((m.shape[2:] for m in maps), key=lambda s: s[0] * s[1])
        return torch.cat(
            [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps], dim=1
        )
