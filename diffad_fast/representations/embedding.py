"""What a pretrained network hears in the windows of a clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..config import DetectorConfig
from ..errors import InputError

# Pieces that a backbone is given at once, however long a clip is.
LARGEST_BATCH = 128


class WindowEmbedding(nn.Module):
    """Waves (N,samples) to the embedding of every window (N,windows,D), of length 1.

    backbone: see :class:`diffad_fast.protocols.AudioEncoder`. Where it hears less than a window at
    once, it hears the pieces that begin at every step of the windows, and a window has the mean of
    those inside it. Only directions count, as in the cosine similarity by which embeddings are
    compared: their length goes mostly with loudness.

    Raises InputError for a backbone that takes more than a window, for one whose attribute ``rate``
    is not the sample rate, and, when used, for an answer of another shape or of whole numbers.
    """

    def __init__(self, backbone: nn.Module, config: DetectorConfig):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.window, self.step = config.window_samples, config.step_samples
        self.samples = getattr(backbone, "samples", self.window)
        rate = getattr(backbone, "rate", config.sample_rate)
        if rate != config.sample_rate:
            raise InputError(
                f"the backbone hears {rate} samples a second and sample_rate is "
                f"{config.sample_rate}: choose sample_rate={rate}"
            )
        if not isinstance(self.samples, int):
            raise InputError(
                f"the backbone's attribute samples is {self.samples!r}: make it the whole number "
                "that it hears at once"
            )
        if not 0 < self.samples <= self.window:
            raise InputError(
                f"the backbone hears {self.samples} samples at once and a window has "
                f"{self.window}: choose a larger window_frames or hop"
            )

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        windows = (waves.shape[1] - self.window) // self.step + 1
        inside = (self.window - self.samples) // self.step + 1
        pieces = waves.unfold(1, self.samples, self.step)[:, : windows + inside - 1]
        # Pieces overlap: of long clips only those of one are copied at once.
        clips = max(1, LARGEST_BATCH // pieces.shape[1])
        rows = torch.cat([
            self._heard(part)
            for some in pieces.split(clips)
            for part in some.flatten(0, 1).split(LARGEST_BATCH)
        ])  # fmt: skip
        found = rows.unflatten(0, pieces.shape[:2]).unfold(1, inside, 1).mean(dim=3)
        return F.normalize(found, dim=2)

    def of_normals(self, waves: torch.Tensor) -> torch.Tensor:
        """The same of what is learnt from. Raises InputError for what is not finite, which scoring
        leaves alone: to look at numbers makes the host wait, and no graph can be captured."""
        found = self(waves)
        if not found.isfinite().all():
            raise InputError(
                "the backbone answered normal clips with NaN or infinite numbers: mend it, or "
                "leave features out"
            )
        return found

    def _heard(self, pieces: torch.Tensor) -> torch.Tensor:
        found = self.backbone(pieces)
        shape = getattr(found, "shape", ())
        if len(shape) != 2 or shape[0] != len(pieces):
            raise InputError(
                f"the backbone answered {len(pieces)} waves with {tuple(shape) or type(found)}: "
                "it must give one embedding (D,) for each"
            )
        if not isinstance(found, torch.Tensor) or not found.is_floating_point():
            kind = getattr(found, "dtype", type(found))
            raise InputError(f"the backbone answered with {kind}: it must give floating tensors")
        return found.float()
