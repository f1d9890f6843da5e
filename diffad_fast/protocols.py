"""What a denoiser and a feature extractor of one's own have to be, for type checkers and people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class Denoiser(Protocol):
    """A ``torch.nn.Module`` for ``Detector(denoiser=...)``.

    The network input x is a state of the variance-preserving process,
    x = (x0 + sigma epsilon) / sqrt(1 + sigma^2), where x0 are the represented images: by default
    standardised Haar coefficients (N, channels 4^level, H/2^level, W/2^level), at ``haar_level=0``
    pixels in [-1, 1]. What is predicted is the configuration's ``prediction_type``.
    """

    def __call__(self, x: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        """Prediction of the shape of x (N,C,h,w), at the levels log_sigma (N,) float32."""
        ...


@runtime_checkable
class FeatureDenoiser(Denoiser, Protocol):
    """A :class:`Denoiser` that has the features that the feature map and ``semantic_weight`` need
    (without them leave these weights at 0, or give ``features=``)."""

    def features(self, x: torch.Tensor, log_sigma: torch.Tensor) -> Sequence[torch.Tensor]:
        """Feature maps (N,C_l,h_l,w_l), fine to coarse, of the arguments of a call."""
        ...


@runtime_checkable
class ConditionedDenoiser(Denoiser, Protocol):
    """A :class:`Denoiser` that a ``ReverseLoop`` conditions on all its levels at once, in front of
    its loop."""

    def conditioning(self, log_sigma: torch.Tensor) -> torch.Tensor:
        """Of levels (S,): (S, ...), whatever :meth:`denoise` takes."""
        ...

    def denoise(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """The call, from what :meth:`conditioning` gives (N, ...)."""
        ...


@runtime_checkable
class FeatureExtractor(Protocol):
    """A frozen ``torch.nn.Module`` for ``Detector(features=...)``; a timm model's name is another
    way to give one."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor | Sequence[torch.Tensor]:
        """A feature map (N,c,h,w), or several, of images (N,C,H,W) in [0, 1].

        Row i stands over the pixels from i H/h to (i + 1) H/h, columns likewise: features whose
        middles lie elsewhere, as those of a 3x3 convolution of stride 2 and padding 1, half a pixel
        further up and to the left, move the anomaly map by as much the other way.
        """
        ...


@runtime_checkable
class AudioEncoder(Protocol):
    """A frozen ``torch.nn.Module`` for ``Detector(kind="audio", features=...)``; "yamnet", or a
    file of its weights, is another way to give one.

    Two attributes are looked at where it has them: ``samples``, the length of the waves that it
    takes, at most a window of the detector (by default just that), and ``rate``, the samples a
    second that these must have.
    """

    def __call__(self, waves: torch.Tensor) -> torch.Tensor:
        """An embedding (M,D) of each of the waves (M,samples) in [-1, 1]."""
        ...
