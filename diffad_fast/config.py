"""Every option of a detector, with its default: the one place where defaults live."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

KINDS = ("image",)
MODES = ("reconstruct",)
SCHEDULES = ("linear", "cosine", "scaled_linear")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
INFERENCE_DTYPES = ("auto", "float32", "bfloat16")
STATISTICS = ("auto", "position", "scalar")

# Whole recipes. `python -m benchmarks end-to-end` measures fast and balanced; best is unmeasured.
PRESETS: dict[str, dict[str, object]] = {
    "fast": {"denoiser": "unet-tiny", "train_steps": 1500, "reverse_steps": 3},
    "balanced": {"denoiser": "unet-small", "train_steps": 2000, "reverse_steps": 5},
    "best": {"denoiser": "unet-base", "train_steps": 10000, "reverse_steps": 10},
}

# The U-Net halves the resolution twice, and its coarsest attention works on blocks of 2x2.
UNET_STRIDE = 8


@dataclass(frozen=True)
class DetectorConfig:
    """The options of a :class:`diffad_fast.Detector`; read-only, stored in its checkpoint.

    Raises InputError for a value out of its range; :meth:`create` also for an unknown name.
    """

    kind: str = "image"
    image_size: tuple[int, int] = (256, 256)
    """Height and width in pixels to which every image is resized."""
    channels: int = 1
    """1 for grey, 3 for colour."""
    preset: str = "balanced"
    seed: int = 0

    # Representation
    haar_level: int | None = None
    """Levels of the Haar packet in front of the denoiser; None: the short side becomes about 32."""

    # Denoiser and diffusion
    denoiser: str = "unet-small"
    schedule: str = "cosine"
    diffusion_steps: int = 1000
    """T, the length of the schedule."""
    prediction_type: str = "v_prediction"

    # Inference
    mode: str = "reconstruct"
    start_sigma: float = 3.0
    """Noise level (sigma = noise over signal) from which `reconstruct` goes back."""
    reverse_steps: int = 5
    eta: float = 0.0
    """0: deterministic DDIM; 1: as noisy as DDPM."""
    clip: float | None = None
    """Clamp the predicted clean representation to this many standard deviations."""
    guidance: float = 0.0
    """Weight of the pull towards the input (DDAD)."""
    inference_dtype: str = "auto"
    """Of the denoiser's convolutions when scoring. `auto`: `fit` tries on a CPU with bfloat16
    instructions whether that is faster, and what it finds replaces `auto` in the checkpoint."""

    # Score
    map_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of the pixel, feature and sub-band maps."""
    feature_sigma: float = 0.1
    """Noise level at which the denoiser's features are read."""
    smoothing: float | None = None
    """Standard deviation in pixels of the map's Gaussian; None: a 64th of the short side."""
    top_fraction: float = 0.01
    """Share of the map whose mean is the image's score; 0: its maximum."""
    statistics: str = "auto"
    """Standardise maps per `position`, by a `scalar`, or (`auto`) by what fits held-out normals."""
    false_positive_rate: float = 0.05
    """Share of normal images that may be labelled anomalous."""

    # Held-out normals, as shares of the groups; the rest is fitted
    validation_share: float = 0.05
    statistics_share: float = 0.10
    conformal_share: float = 0.15

    # Training
    train_steps: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-4
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    snr_limit: float = 5.0
    """Limit of the signal-to-noise ratio in the min-SNR weight."""

    def __post_init__(self):
        size = self.image_size
        if isinstance(size, int):
            size = (size, size)
        object.__setattr__(self, "image_size", tuple(size))
        object.__setattr__(self, "map_weights", tuple(self.map_weights))
        _choice("kind", self.kind, KINDS)
        _choice("mode", self.mode, MODES)
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("prediction_type", self.prediction_type, PREDICTIONS)
        _choice("statistics", self.statistics, STATISTICS)
        _choice("inference_dtype", self.inference_dtype, INFERENCE_DTYPES)
        _choice("preset", self.preset, tuple(PRESETS))
        if len(self.image_size) != 2 or not all(isinstance(s, int) for s in self.image_size):
            raise InputError(f"image_size is one integer or (height, width), not {size!r}")
        if self.channels not in (1, 3):
            raise InputError(f"channels is 1 (grey) or 3 (colour), not {self.channels!r}")
        if len(self.map_weights) != 3 or min(self.map_weights) < 0 or max(self.map_weights) == 0:
            raise InputError(
                f"map_weights is three numbers of at least 0, not all 0; got {self.map_weights!r}"
            )
        for name in ("train_steps", "batch_size", "reverse_steps", "diffusion_steps"):
            _range(name, getattr(self, name), 1, math.inf)
        for name in ("seed", "warmup_steps"):
            _range(name, getattr(self, name), 0, 2**63 - 1)
        _range("start_sigma", self.start_sigma, 0.01, 100.0)
        _range("feature_sigma", self.feature_sigma, 0.01, 100.0)
        _range("eta", self.eta, 0.0, 1.0)
        _range("guidance", self.guidance, 0.0, math.inf)
        _range("top_fraction", self.top_fraction, 0.0, 1.0)
        _range("false_positive_rate", self.false_positive_rate, 1e-6, 1 - 1e-6)
        _range("learning_rate", self.learning_rate, 1e-9, 1.0)
        _range("ema_decay", self.ema_decay, 0.0, 1.0)
        for name in ("validation_share", "statistics_share", "conformal_share"):
            _range(name, getattr(self, name), 0.01, 0.9)
        held_out = self.validation_share + self.statistics_share + self.conformal_share
        if held_out > 0.9:
            raise InputError(
                f"the held-out shares add up to {held_out:.2f}; at most 0.9 is possible"
            )
        if self.clip is not None:
            _range("clip", self.clip, 1e-3, math.inf)
        if self.smoothing is None:
            object.__setattr__(self, "smoothing", min(self.image_size) / 64)
        _range("smoothing", self.smoothing, 0.0, math.inf)
        if self.haar_level is None:
            object.__setattr__(self, "haar_level", default_haar_level(self.image_size))
        _range("haar_level", self.haar_level, 1, 4)
        stride = self.stride
        for side in self.image_size:
            if side < stride:
                raise InputError(
                    f"image_size {side} is smaller than the model's stride of {stride}: use at "
                    f"least {stride}"
                )
            if side % stride:
                raise InputError(
                    f"image_size {side} is not a multiple of the model's stride of {stride}: use "
                    f"{side // stride * stride} or {-(-side // stride) * stride}"
                )

    @property
    def stride(self) -> int:
        """Side in pixels of the square that becomes one position of the coarsest attention."""
        return 2**self.haar_level * UNET_STRIDE

    @classmethod
    def create(cls, preset: str = "balanced", **options) -> DetectorConfig:
        """The configuration of a preset, with single options overridden."""
        _choice("preset", preset, tuple(PRESETS))
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise InputError(f"unknown option {name!r}: {hint}")
        try:
            return cls(**{"preset": preset, **PRESETS[preset], **options})
        except TypeError as error:
            raise InputError(f"an option has a value of the wrong type: {error}") from None

    def replace(self, **options) -> DetectorConfig:
        """A copy with some options changed."""
        return self.create(**{**dataclasses.asdict(self), **options})

    def to_json(self) -> str:
        """The configuration as JSON, read back by :meth:`from_json`."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DetectorConfig:
        return cls.create(**json.loads(text))


def default_haar_level(image_size: tuple[int, int]) -> int:
    """The level that brings the short side closest to 32 positions, between 1 and 4."""
    return min(4, max(1, round(math.log2(max(min(image_size), 1) / 32))))


def read_options(path: str) -> dict[str, object]:
    """Options from a JSON file that holds one object. Raises InputError naming the file."""
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no configuration file {path}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise InputError(
            f"{path} must hold one JSON object of options, not {type(options).__name__}"
        )
    return options


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}: choose {', '.join(choices)}")


def _range(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
