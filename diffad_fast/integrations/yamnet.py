"""YAMNet, for ``Detector(kind="audio", features="yamnet")`` or with a file of its weights: what a
sound means.

A MobileNet (Howard et al. 2017, arXiv:1704.04861) that Google trained to tell the 521 classes of
AudioSet (Gemmeke et al. 2017) in the sound of 2 million videos; Apache-2.0. Its architecture, its
spectrogram and its constants are those of tensorflow/models, research/audioset/yamnet.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from ._host import require

# The weights as a state of PyTorch: 4 million numbers.
URL = "https://github.com/w-hc/torch_audioset/releases/download/v0.1/yamnet.pth"
# Channels and stride of each layer: a convolution, then pairs of a depthwise and a pointwise one.
LAYERS = (
    (32, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    *[(512, 1)] * 5, (1024, 2), (1024, 1),
)  # fmt: skip
BATCH_NORM_EPSILON = 1e-4
RATE, FRAME, HOP, N_FFT, FRAMES = 16000, 400, 160, 512, 96
N_MELS, FMIN, FMAX, LOG_OFFSET = 64, 125.0, 7500.0, 1e-3


class YAMNet(nn.Module):
    """Waves (N,15600) in [-1,1] at 16 kHz, 0.975 seconds, to embeddings (N,1024), at least 0.

    weights: a file of them. ``.pth``: the state of torch_audioset's port (:data:`URL`); ``.onnx``:
    a graph of the network alone, from the spectrogram on, quantised or not.
    Raises InputError for a file that is not there or holds another network.
    """

    rate, samples = RATE, (FRAMES - 1) * HOP + FRAME

    def __init__(self, weights: str | os.PathLike):
        super().__init__()
        path, before = Path(weights), 1
        layers: list[nn.Module] = []
        for i, (width, stride) in enumerate(LAYERS):
            # TensorFlow's "same" padding of an even side: all of it at the far end.
            layers += [nn.ZeroPad2d((0, 1, 0, 1))] if stride == 2 else []
            padding = 0 if stride == 2 else 1
            if i == 0:
                layers.append(nn.Conv2d(1, width, 3, stride, padding))
            else:
                layers += [
                    nn.Conv2d(before, before, 3, stride, padding, groups=before),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(before, width, 1),
                ]
            layers.append(nn.ReLU(inplace=True))
            before = width
        self.layers = nn.Sequential(*layers)
        filters = torch.from_numpy(_mel_filters()).float()
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(FRAME), persistent=False)
        if not path.is_file():
            raise InputError(f"there is no file of YAMNet's weights at {path}")
        pairs = _from_onnx(path) if path.suffix == ".onnx" else _from_state(path)
        convolutions = [layer for layer in self.layers if isinstance(layer, nn.Conv2d)]
        if [weight.shape for weight, _ in pairs] != [c.weight.shape for c in convolutions]:
            raise InputError(
                f"{path} holds another network than YAMNet: its {len(pairs)} convolutions differ"
            )
        for convolution, (weight, bias) in zip(convolutions, pairs, strict=True):
            convolution.weight.data, convolution.bias.data = weight, bias
        self.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    @classmethod
    def pretrained(cls) -> YAMNet:
        """With the weights of :data:`URL`, from PyTorch Hub's folder or, the first time, the net.

        Raises InputError where they are in neither.
        """
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        path = folder / "yamnet.pth"
        if not path.is_file():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL, str(path), progress=False)
            except (URLError, OSError) as error:
                raise InputError(
                    f"YAMNet's weights cannot be fetched ({error}): put {URL} into {folder}, or "
                    "give a file of them as features"
                ) from None
        return cls(path)

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        # From here on the convolutions stay in channels_last.
        x = self.spectrogram(waves)[:, None].contiguous(memory_format=torch.channels_last)
        return self.layers(x).mean(dim=(2, 3))

    def spectrogram(self, waves: torch.Tensor) -> torch.Tensor:
        """(N,samples) to (N,frames,64): the logarithm of the magnitude's mel bands."""
        # stft puts its window in the middle of n_fft samples.
        margin = (N_FFT - FRAME) // 2
        spectrum = torch.stft(
            F.pad(waves, (margin, margin)), N_FFT, HOP, FRAME, self.window, center=False,
            return_complex=True,
        )  # fmt: skip
        return (spectrum.abs().transpose(1, 2) @ self.filters.T + LOG_OFFSET).log()


def _mel_filters() -> np.ndarray:
    """(64,257): triangles on the mel scale 1127 ln(1 + f/700), whose sides are straight in mels."""

    def mel(hertz):
        return 1127 * np.log(1 + np.asarray(hertz) / 700)

    corners = np.linspace(mel(FMIN), mel(FMAX), N_MELS + 2)
    lower, centre, upper = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = mel(np.linspace(0, RATE / 2, N_FFT // 2 + 1))
    rising, falling = (bins - lower) / (centre - lower), (upper - bins) / (upper - centre)
    return np.maximum(0, np.minimum(rising, falling))


def _from_state(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of every convolution, with the batch normalisation after it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        pairs = []
        for i in range(len(LAYERS)):
            for part in ("fused",) if i == 0 else ("depthwise_conv", "pointwise_conv"):
                name = f"layer{i + 1}.{part}"
                variance = state[f"{name}.bn.running_var"]
                scale = state[f"{name}.bn.weight"] / (variance + BATCH_NORM_EPSILON).sqrt()
                bias = state[f"{name}.bn.bias"] - state[f"{name}.bn.running_mean"] * scale
                weight = state[f"{name}.conv.weight"] * scale[:, None, None, None]
                pairs.append((weight, bias))
    except Exception as error:
        # Whatever the unpickler meets, and what is missing in a state.
        raise InputError(
            f"{path} is not a state of YAMNet: {type(error).__name__} {error}"
        ) from None
    return pairs


def _from_onnx(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of every convolution of a graph, in its order; quantised ones as numbers."""
    onnx = require("onnx")
    try:
        graph = onnx.load(path).graph
    except Exception as error:
        raise InputError(f"{path} is not an ONNX graph: {error}") from None
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}

    def constant(name: str) -> np.ndarray:
        if name in constants:
            return constants[name]
        node = makers[name]
        value = constant(node.input[0])
        if node.op_type == "DequantizeLinear" and value.dtype != np.float32:
            scale, *zero = (constants[name] for name in node.input[1:])
            shape = (-1,) + (1,) * (value.ndim - 1) if scale.ndim else ()
            value = value.astype(np.float32)
            for offset in zero:
                value = value - offset.reshape(shape)
            value = value * scale.reshape(shape)
        return value

    pairs = []
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        if len(node.input) < 3:
            raise InputError(
                f"{path} has convolutions without a bias: fold the batch normalisation after them "
                "into them"
            )
        try:
            weight, bias = (torch.tensor(constant(name)).float() for name in node.input[1:3])
        except (KeyError, IndexError):
            raise InputError(f"{path} has convolutions whose weights are no constants") from None
        pairs.append((weight, bias))
    return pairs
