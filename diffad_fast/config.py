"""Every option of a detector, with its default: the one place where defaults live."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InputError

KINDS = ("image", "audio", "vector")
MODES = ("reconstruct", "invert", "one_step")
SCHEDULES = ("linear", "cosine", "scaled_linear")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
DTYPES = ("auto", "float32", "bfloat16")
TRAIN_COMPILE = ("auto", True, False)
AUGMENTATIONS = (
    "flip-horizontal", "flip-vertical", "shift", "rotate", "brightness", "exposure", "blur",
    "noise", "compress",
)  # fmt: skip
STATISTICS = ("auto", "position", "scalar")
INTENSITIES = ("auto", "linear", "log")
SCALES = ("auto", "feature", "global")
SEMANTIC_OF = ("denoiser", "tokens", "features")
SEMANTICS = ("mahalanobis", "nearest")
RATES = 1000, 768_000
"""Samples a second that recordings may have, before they are resampled and after."""

# Whole recipes, by kind. `python -m benchmarks quality` measures them.
_CELLS = {
    "denoiser": "token-mlp", "token_width": 128, "token_blocks": 2, "token_batch": 512,
    "sigmas": (1.0, 2.0, 4.0),
}  # fmt: skip
PRESETS: dict[str, dict[str, dict[str, object]]] = {
    "image": {
        "fast": {**_CELLS, "sigmas": (2.0,), "cross_fit": 0},
        "balanced": _CELLS,
        "best": {**_CELLS, "token_width": 256, "token_blocks": 3, "train_steps": 1000},
    },
    # A few recordings make some hundred tokens: small batches, and no low noise levels, at which
    # the denoiser remembers single tokens.
    "audio": {
        name: {
            "denoiser": "token-mlp",
            "train_steps": steps,
            "token_batch": 256,
            "sigmas": (1.5, 2.5, 4.0),
            **options,
        }
        for name, steps, options in (
            ("fast", 300, {"cross_fit": 0}),
            ("balanced", 600, {}),
            ("best", 2000, {}),
            # The spectrogram of the DCASE challenge's Task 2 baselines.
            ("dcase", 600, {"n_mels": 128, "hop": 512, "window_frames": 64, "window_step": 16}),
        )
    },
    "vector": {
        "fast": {"denoiser": "token-mlp", "train_steps": 300, "cross_fit": 0},
        "balanced": {"denoiser": "token-mlp", "train_steps": 600},
        "best": {"denoiser": "token-mlp", "train_steps": 2000},
    },
}

# Steps of training and of the reverse process that a denoiser takes unless told otherwise.
_STEPS = {
    "token-mlp": (300, 5),
    "unet-tiny": (1500, 3),
    "unet-small": (2000, 5),
    "unet-base": (10000, 10),
}

# Samples that are read and trained on together unless told otherwise.
_BATCH = {"image": 16, "audio": 32, "vector": 4096}

# The U-Net halves the resolution twice, and its coarsest attention works on blocks of 2x2.
UNET_STRIDE = 8


@dataclass(frozen=True)
class DetectorConfig:
    """The options of a :class:`diffad_fast.Detector`; read-only, stored in its checkpoint.

    A preset replaces some of the defaults below: of the token MLP on images `token_width` is then
    128 (`best`: 256), `token_blocks` 2 (3), `token_batch` 512 and `sigmas` (1, 2, 4) (`fast`: 2
    alone), of `best` `train_steps` 1000; for audio `token_batch` is 256, `sigmas` (1.5, 2.5, 4) and
    `train_steps` 600 (`fast`: 300, `best`: 2000), for vectors `train_steps` 600 (300, 2000). Other
    denoisers take of these `sigmas` alone.

    Raises InputError for a value out of its range; :meth:`create` also for an unknown name.
    """

    kind: str = "image"
    """`image`, `audio` for recordings, or `vector` for tables and embeddings."""
    image_size: tuple[int, int] = (256, 256)
    """Height and width in pixels to which every image is resized, each a multiple of `stride`: for
    the token MLP of the short side divided by 32, which must be at least 32; for a U-Net of
    8 * 2^haar_level, 64 at 256 pixels."""
    channels: int = 1
    """1 for grey, 3 for colour."""
    overlap: float | None = None
    """None resizes images. A share from 0 to 0.9 keeps their own size and aspect: they are seen
    through windows of `image_size`, which overlap by at least this share of a side; the map has the
    size of the image, the score is that of the worst window. For the token MLP."""
    preset: str = "balanced"
    """`fast`, `balanced` or `best`; for audio also `dcase`, the spectrogram of that challenge."""
    seed: int = 0
    """Of everything random."""

    # Representation
    haar_level: int | None = None
    """Levels of the Haar packet in front of a U-Net; None: the short side becomes about 32; 0:
    pixels in [-1, 1], as pixel-space diffusion models see them."""
    tokens: tuple[str, ...] = (
        "energy-16", "cell-8", "gradient-32", "spread-2", "spread-1", "mean-2",
    )  # fmt: skip
    """What the token MLP sees of an image, one or several sources on grids of G cells along the
    short side: log energies of wavelet bands, as `energy-G` with those of neighbours, `cell-G`
    alone, `gradient-G` their differences, `spread-G` mean and deviation over a cell, `mean-G`
    the mean alone; `patch-G`, Haar packets; `features`, the feature maps of a backbone."""
    features: str | None = None
    """Whose features stand for meaning: None, the denoiser's own; a timm model by name, for audio
    `yamnet` or a file of its weights; or `custom`, a module handed over."""
    intensity: str = "auto"
    """Tokens see the intensity itself (`linear`) or its logarithm (`log`); `auto`: `fit` takes the
    one in which the contrast of normals depends less on their brightness."""
    illumination: float | None = None
    """Deviation in pixels of the Gaussian whose smooth image is taken off in front of the tokens;
    0: nothing is; None: `fit` takes a 21st of the short side where most of the smooth image differs
    from normal to normal, else 0."""
    image_scale: bool | None = None
    """Divide each image by its own deviation in front of the tokens; None: `fit` does so where most
    of what differs in contrast between normals is an image's as a whole. What `fit` found of these
    three stands in the checkpoint's configuration."""
    feature_scale: str = "auto"
    """Vectors: every feature by its own deviation (`feature`), or all by one (`global`); `auto`:
    `global` from 256 features on, as in embeddings."""

    # Audio
    sample_rate: int = 16000
    """Samples a second to which every clip is resampled."""
    n_fft: int = 1024
    """Samples in a frame of the spectrogram, even; powers of two are transformed fastest."""
    hop: int = 256
    """Samples from one frame to the next."""
    n_mels: int = 64
    """Mel bands, at most `n_fft` / 2; a multiple of 16, as 16 groups of as many bands are followed
    over time."""
    fmin: float = 0.0
    fmax: float | None = None
    """Lowest and highest frequency of the mel bands in Hz; None: half of `sample_rate`."""
    window_frames: int = 128
    """Frames in a window, the part of a clip that one token describes; a power of two."""
    window_step: int = 32
    """Frames from one window to the next; divides `window_frames`."""
    remove_level: bool = False
    """Take its mean over bands and time, in dB, off each clip: for recordings whose gain says
    nothing. Not for streams, which have no end."""

    # Denoiser and diffusion
    denoiser: str = "token-mlp"
    """`token-mlp`, `unet-tiny`, `unet-small` or `unet-base`; `custom`, a module handed over."""
    token_width: int = 256
    """Width of the token MLP."""
    token_blocks: int = 3
    """Residual blocks of the token MLP."""
    schedule: str = "cosine"
    """`linear`, `cosine` or `scaled_linear`."""
    diffusion_steps: int = 1000
    """T, the length of the schedule, at most a million."""
    prediction_type: str = "v_prediction"
    """What the denoiser says: `epsilon`, `sample` or `v_prediction`. The token MLP takes this one
    alone, and its loop has no `eta`, `clip`, `dynamic_threshold` or `guidance`."""

    # Inference
    mode: str | None = None
    """`reconstruct`: noise, go back, compare. `invert`: deterministic inversion, improbability of
    the latent. `one_step`: clean-input residual at the noise levels `sigmas`. None: `one_step` for
    the token MLP, `reconstruct` for others. Can be changed after training."""
    sigmas: tuple[float, ...] = (0.6, 1.0, 1.5, 2.5, 4.0)
    """Noise levels of `one_step`."""
    inversion_sigmas: tuple[float, float] = (0.1, 10.0)
    """First and last noise level of `invert`."""
    inversion_steps: int = 3
    """Steps of `invert`."""
    start_sigma: float = 3.0
    """Noise level (sigma = noise over signal) from which `reconstruct` goes back."""
    reverse_steps: int | None = None
    """None: 3 for unet-tiny, 10 for unet-base, 5 for others."""
    eta: float = 0.0
    """0: deterministic DDIM; 1: as noisy as DDPM."""
    clip: float | None = None
    """Clamp the predicted clean representation to this many standard deviations."""
    dynamic_threshold: tuple[float, float] | None = None
    """(ratio, max), in place of `clip`: clamp it to its own quantile `ratio` of magnitudes, within
    1 and `max`, and divide by that (Imagen's dynamic thresholding)."""
    use_clipped_model_output: bool = False
    """Compute the noise again from the clamped representation."""
    guidance: float = 0.0
    """Weight of the pull towards the input (DDAD)."""
    inference_dtype: str = "auto"
    """Of a U-Net's convolutions, or the token MLP's matrix products, when scoring. `auto` is
    settled by `fit`, and what it finds stands in the checkpoint: for the token MLP bfloat16 on a
    GPU and on a CPU with AMX or AVX-512's dot products of it; for U-Nets what a trial finds faster,
    on a GPU or a CPU with instructions for bfloat16. In bfloat16 a U-Net's scores vary in the third
    digit with the size of a batch, a recording's in the fourth. Loaded on a CPU without these
    instructions, a U-Net scores in float32, after a warning, and a token MLP as it was fitted: with
    AVX2 that takes 7 to 23% longer than in float32."""

    # Score
    map_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Weights of the pixel, feature and sub-band maps of `reconstruct` with a U-Net."""
    semantic_weight: float | None = None
    """Weight of one more map, the distance of features to those of normals; the mode's own weigh 1
    together, in `reconstruct` with a U-Net what `map_weights` add up to. None: 1 for tables
    (vectors that are scaled by feature) and for audio with `features`, 0 elsewhere."""
    semantic: str | None = None
    """That distance: `mahalanobis`, or `nearest`, the mean to the five nearest others in a sample
    of normals. None: `nearest` for vectors, `mahalanobis` elsewhere."""
    semantic_of: str | None = None
    """Features of the `denoiser`, the `tokens` themselves or, for audio, `features`. None: `tokens`
    for vectors, `features` for audio that has them, `denoiser` elsewhere."""
    feature_sigma: float = 0.1
    """Noise level at which the denoiser's features are read."""
    smoothing: float | None = None
    """Standard deviation in pixels of the map's Gaussian; None: a 64th of the short side, with the
    token MLP a 32nd."""
    top_fraction: float | None = None
    """Share of the map whose mean is the sample's score; 0: its maximum. None: 1 (the mean over
    time) for audio, else 0 for the token MLP and 0.01 for others."""
    statistics: str | None = None
    """Standardise maps per `position`, by a `scalar`, or (`auto`) by what fits held-out normals.
    None: `scalar` with the token MLP, whose tokens are standardised per position, else `auto`."""
    false_positive_rate: float = 0.05
    """Share of normal images that may be labelled anomalous."""

    contamination: float = 0.0
    """Share of anomalies that the training data hides, at most 0.49: that share of the highest
    scores of held-out samples is dropped before p-values and the threshold are computed. These hold
    where the hidden anomalies score above all normals; otherwise normals are dropped in their
    place, and of new ones up to about `false_positive_rate` + `contamination` are labelled."""

    cross_fit: int | None = None
    """0: parts of the normals are held out, by the shares below. 2 and more, for the token MLP: it
    is trained on all normals, and again without each of so many parts, whose maps and scores, by
    the model that has not seen them, give statistics and p-values; nothing validates. Training
    takes the time of one model more than that, scoring no more. None: 5 for the token MLP on images
    and recordings (not in the preset `fast`) where the shares would leave fewer than 20 groups for
    p-values, else 0."""
    validation_share: float = 0.05
    """Share of the groups of normals that is held out to choose among the weights of a training."""
    statistics_share: float = 0.10
    """Share that is held out to standardise the maps."""
    conformal_share: float = 0.15
    """Share that is held out for p-values and the threshold."""

    # Training
    train_steps: int | None = None
    """None: 1500 for unet-tiny, 10000 for unet-base, 300 for the token MLP, 2000 for others.
    0: a U-Net is taken as it is, unless there is a `train_budget`."""
    batch_size: int | str | None = None
    """Samples that are read, trained on and scored together; None: 16 images, 32 clips, 4096
    vectors. `auto`, for U-Nets on a GPU: the largest power of two, up to 256, whose step fits into
    the memory that is free when `fit` begins; elsewhere as None. What `fit` finds replaces it. A
    larger step takes longer: `auto` goes with `train_budget`."""
    token_batch: int = 1024
    """Tokens in a training step of the token MLP."""
    learning_rate: float | None = None
    """None: 2e-3 for the token MLP, 1e-3 for others; with the batch size `auto`, as the root of the
    batch: sqrt(batch_size/16) times that."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises; it falls as a cosine afterwards."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient; 0: any."""
    ema_decay: float = 0.999
    """Of the exponential average of the weights, which is what is kept."""
    snr_limit: float = 5.0
    """Limit of the signal-to-noise ratio in the min-SNR weight of a U-Net's training."""
    train_budget: float | None = None
    """Seconds, or a text such as "5min", that the training may take. It then has as many steps as
    a trial at its start finds to fit, instead of `train_steps`."""
    early_stopping: int = 0
    """Stop after so many of ten validations in a row without a lower loss; 0: never."""
    accumulate: int = 1
    """Parts of a U-Net's step whose gradients are computed one after another, to save memory."""
    train_dtype: str = "auto"
    """Of matrix products and convolutions in training: `float32`, `bfloat16`, or (`auto`) bfloat16
    on GPUs that have it."""
    train_compile: bool | str = "auto"
    """Run the training step through torch.compile. `auto`: on a GPU, in a training of minutes, the
    one that a trial at its start finds faster; never on a CPU, where the native operators and the
    vendor's convolutions do nearly all of the work and compiling takes a minute. What `fit` finds
    replaces `auto`."""
    augment: tuple[str, ...] = ()
    """What may be done to normal images in training: `flip-horizontal`, `flip-vertical`, `shift` (a
    16th of a side), `rotate` (5 degrees); what cameras do: `brightness` (a factor, 10%), `exposure`
    (an offset, 0.1), `blur` (1 pixel), `noise` (deviation 0.03), `compress` (JPEG from quality 50
    on), the last three to half of the images. The token MLP sees each image as it is and changed.
    Only what leaves a normal image normal is safe; the default is nothing."""

    def __post_init__(self):
        self._coerce()
        _check_choice("kind", self.kind, KINDS)
        self._fill_defaults()
        self._check_values()
        self._check_combinations()
        if self.kind == "audio":
            self._check_audio()
        self._check_size()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _coerce(self) -> None:
        """Lists become tuples, durations seconds, NumPy's numbers Python's; the others are what
        their annotations say."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (np.generic, np.ndarray)):
                self._set(field.name, value.tolist())
        size = self.image_size
        if isinstance(size, str) or not isinstance(size, Iterable):
            self._set("image_size", (size, size))
        for name in ("tokens", "augment"):
            if isinstance(getattr(self, name), str):
                self._set(name, (getattr(self, name),))
        for name in _LISTS:
            value = getattr(self, name)
            if value is None and _DEFAULTS[name] is None:
                continue
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise InputError(f"{name} must be a list, not {value!r}")
            self._set(name, tuple(v.item() if isinstance(v, np.generic) else v for v in value))
        if len(self.image_size) != 2 or not all(type(s) is int and s > 0 for s in self.image_size):
            raise InputError(
                f"image_size is a whole number of pixels or (height, width), not {size!r}"
            )
        if isinstance(self.train_budget, str):
            self._set("train_budget", duration(self.train_budget))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type.removesuffix(" | None")
            if kind not in _TYPES or (value is None and kind != field.type):
                continue
            types, what = _TYPES[kind]
            if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
                raise InputError(f"{field.name} must be {what}, not {value!r}")

    def _fill_defaults(self) -> None:
        """What None stands for, where that follows from other options."""
        tokens, images, vectors = self.on_tokens, self.kind == "image", self.kind == "vector"
        if self.batch_size == "auto" and tokens:
            self._set("batch_size", None)
        train_steps, reverse_steps = _STEPS.get(self.denoiser, _STEPS["unet-small"])
        # To a batch of unknown size belongs an unknown rate: see with_batch.
        rate = 2e-3 if tokens else None if self.batch_size == "auto" else 1e-3
        heard, read = self._hears_features, "tokens" if vectors else "denoiser"
        for name, value in {
            "train_steps": train_steps,
            "reverse_steps": reverse_steps,
            "mode": "one_step" if tokens else "reconstruct",
            "statistics": "scalar" if tokens else "auto",
            "top_fraction": 1.0 if self.kind == "audio" else 0.0 if tokens else 0.01,
            "learning_rate": rate,
            "batch_size": _BATCH[self.kind],
            "semantic": "nearest" if vectors else "mahalanobis",
            "semantic_of": "features" if heard else read,
            "semantic_weight": None if vectors else 1.0 if heard else 0.0,
            "smoothing": min(self.image_size) / (BASE_GRID if tokens else 64) if images else None,
            "haar_level": None if tokens else default_haar_level(self.image_size),
            "fmax": self.sample_rate / 2 if self.kind == "audio" else None,
        }.items():
            if getattr(self, name) is None:
                self._set(name, value)

    def _check_values(self) -> None:
        """Of each option for itself."""
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        _check_choice("preset", self.preset, tuple(PRESETS[self.kind]))
        for name in self.augment:
            _check_choice("augment", name, AUGMENTATIONS)
        if self.channels not in (1, 3):
            raise InputError(f"channels is 1 (grey) or 3 (colour), not {self.channels!r}")
        for name in ("sigmas", "inversion_sigmas"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: give at least one noise level")
        if not self.tokens:
            raise InputError("tokens is empty: name at least one token source")
        for name in self.tokens:
            token_source(name)
        if self.batch_size != "auto" and not isinstance(self.batch_size, int):
            raise InputError(
                f"batch_size must be a whole number or 'auto', not {self.batch_size!r}"
            )
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is None or (name, value) == ("batch_size", "auto"):
                continue
            for number in value if name in _LISTS else (value,):
                _check_range(name, number, low, high)
        if self.dynamic_threshold is not None:
            if len(self.dynamic_threshold) != 2:
                raise InputError(
                    f"dynamic_threshold is (ratio, max), not {self.dynamic_threshold!r}"
                )
            _check_range("the ratio of dynamic_threshold", self.dynamic_threshold[0], 0, 1)
            _check_range("the max of dynamic_threshold", self.dynamic_threshold[1], 1, math.inf)
        if self.cross_fit:
            _check_range("cross_fit", self.cross_fit, 2, math.inf)
        if len(self.map_weights) != 3 or max(self.map_weights) == 0:
            raise InputError(
                f"map_weights is three numbers of at least 0, not all 0; got {self.map_weights!r}"
            )
        if (
            len(self.inversion_sigmas) != 2
            or not self.inversion_sigmas[0] < self.inversion_sigmas[1]
        ):
            raise InputError(
                f"inversion_sigmas is a lower and a higher noise level, not "
                f"{self.inversion_sigmas!r}"
            )

    def _check_combinations(self) -> None:
        """What goes together."""
        images, on_tokens = self.kind == "image", self.on_tokens
        if not images and not on_tokens:
            raise InputError(
                f"denoiser {self.denoiser!r} works on grids of pixels, which {self.kind} has not: "
                f"{self.kind} needs 'token-mlp', for "
                + ("a token a window" if self.kind == "audio" else "a token a row")
            )
        if self.semantic_of == "tokens" and not on_tokens:
            raise InputError("semantic_of='tokens' is for the token MLP: U-Nets have no tokens")
        if (self.semantic_of == "features") != self._hears_features:
            raise InputError(
                f"semantic_of={self.semantic_of!r} and features={self.features!r} do not go "
                "together: audio with features reads these, and nothing else does"
            )
        if self.features is not None and self.kind == "vector":
            raise InputError("vectors are features themselves: leave out features")
        read = "features" in self.tokens
        if images and on_tokens and read != (self.features is not None):
            what = (
                "pass features=module, or the name of a timm model, for the token source 'features'"
                if read
                else "of images, only tokens=('features',) and U-Nets (denoiser='unet-small') read "
                "features: choose one of these, or leave features out"
            )
            raise InputError(
                f"tokens={self.tokens!r} and features={self.features!r} do not go together: {what}"
            )
        for name, why in _not_read(self.kind, self.denoiser).items():
            if getattr(self, name) != _DEFAULTS[name]:
                raise InputError(f"{name} is for {why}")
        if self.clip is not None and self.dynamic_threshold is not None:
            raise InputError(
                f"clip={self.clip!r} and dynamic_threshold={self.dynamic_threshold!r} limit the "
                "same: choose one"
            )
        if self.overlap is not None and not (images and on_tokens):
            instead = ", or choose denoiser='token-mlp'" if images else ""
            raise InputError(f"overlap is for images and the token MLP: leave it out{instead}")
        if self.haar_level == 0 and self.map_weights[:2] == (0, 0):
            raise InputError(
                "at haar_level=0 there are no sub-bands, and map_weights gives the other maps no "
                f"weight: {self.map_weights!r}; give the pixel or the feature map some"
            )
        if on_tokens and self.train_steps == 0:
            raise InputError(
                "train_steps=0 takes a U-Net as it is; the token MLP is nothing before it is "
                "trained: give at least 1 step"
            )
        if self.cross_fit and not on_tokens:
            raise InputError(
                "cross_fit trains a model for every fold and is for the token MLP: leave it "
                "out, or choose denoiser='token-mlp'"
            )
        held_out = self.validation_share + self.statistics_share + self.conformal_share
        if held_out > 0.9:
            raise InputError(
                f"the held-out shares add up to {held_out:.2f}; at most 0.9 is possible"
            )

    def _check_audio(self) -> None:
        _check_range("sample_rate", self.sample_rate, *RATES)
        _check_range("n_fft", self.n_fft, 32, self.sample_rate)
        _check_range("hop", self.hop, 1, self.n_fft)
        _check_range("n_mels", self.n_mels, 16, self.n_fft // 2)
        _check_range("fmax", self.fmax, 1.0, self.sample_rate / 2)
        _check_range("fmin", self.fmin, 0.0, self.fmax)
        if self.fmin == self.fmax:
            raise InputError(f"fmin and fmax are both {self.fmin:g}: give a range of frequencies")
        if self.statistics != "scalar":
            raise InputError(
                f"statistics={self.statistics!r} is for images: clips have no positions in common, "
                "so leave it out"
            )
        _check_range("window_frames", self.window_frames, 8, 1 << 16)
        _check_range("window_step", self.window_step, 1, self.window_frames)
        if self.n_fft % 2:
            raise InputError(f"n_fft is {self.n_fft}: it must be even")
        if self.n_mels % 16:
            raise InputError(
                f"n_mels is {self.n_mels}: it must be a multiple of 16, since 16 groups of as many "
                "bands are followed over time"
            )
        if self.window_frames & (self.window_frames - 1):
            raise InputError(f"window_frames is {self.window_frames}: it must be a power of two")
        if self.window_frames % self.window_step:
            raise InputError(
                f"window_step {self.window_step} does not divide window_frames "
                f"{self.window_frames}: choose a power of two"
            )

    def _check_size(self) -> None:
        """Of images, in steps of the model's stride."""
        if self.kind != "image":
            return
        if self.on_tokens and min(self.image_size) < BASE_GRID:
            raise InputError(
                f"image_size {min(self.image_size)} is too small for tokens: use at least "
                f"{BASE_GRID}"
            )
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
    def _hears_features(self) -> bool:
        """Does a backbone hear what recordings mean?"""
        return self.kind == "audio" and self.features is not None

    @property
    def window_samples(self) -> int:
        """Samples that one window of a clip takes, at `sample_rate`."""
        return (self.window_frames - 1) * self.hop + self.n_fft

    @property
    def step_samples(self) -> int:
        """Samples from the start of one window to that of the next."""
        return self.window_step * self.hop

    @property
    def on_tokens(self) -> bool:
        """Is the denoiser the token MLP?"""
        return self.denoiser == "token-mlp"

    @property
    def trains(self) -> bool:
        """Does `fit` train the denoiser, or take it as it is?"""
        return self.train_steps > 0 or self.train_budget is not None

    @property
    def stride(self) -> int:
        """Side in pixels of the square that images must consist of: one position of the U-Net's
        coarsest attention, or a cell of the tokens."""
        if self.on_tokens:
            short = min(self.image_size)
            patches = [token_source(name) for name in self.tokens]
            return max(
                [short // BASE_GRID, *(short // g for kind, g in patches if kind == "patch")]
            )
        return 2**self.haar_level * UNET_STRIDE

    @classmethod
    def create(cls, /, preset: str = "balanced", kind: str = "image", **options) -> DetectorConfig:
        """The configuration of a kind's preset, with single options overridden."""
        _check_choice("kind", kind, KINDS)
        _check_choice("preset", preset, tuple(PRESETS[kind]))
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
                raise InputError(f"unknown option {name!r}: {hint}")
        recipe = dict(PRESETS[kind][preset])
        if options.get("denoiser", recipe["denoiser"]) != recipe["denoiser"]:
            # Others take steps of their own.
            recipe = {k: v for k, v in recipe.items() if k not in ("train_steps", *_OF_TOKENS)}
        try:
            return cls(**{"kind": kind, "preset": preset, **recipe, **options})
        except TypeError as error:
            raise InputError(f"an option has a value of the wrong type: {error}") from None

    def replace(self, **options) -> DetectorConfig:
        """A copy with some options changed, and no others: what :meth:`create` has derived from the
        options as they were stays, such as ``haar_level`` and ``smoothing`` from ``image_size``.
        Not for another kind or denoiser, which read other options: raises InputError."""
        for name in ("kind", "denoiser"):
            if options.get(name, getattr(self, name)) != getattr(self, name):
                raise InputError(
                    f"a configuration of {name}={getattr(self, name)!r} does not become one of "
                    f"{options[name]!r}: create that by DetectorConfig.create"
                )
        return self.create(**{**dataclasses.asdict(self), **options})

    def with_batch(self, size: int) -> DetectorConfig:
        """A copy with `batch_size` settled and, unless it was given, the learning rate with it.

        The noise of a gradient's mean over B samples has a covariance of 1/B, and Adam divides
        gradients by their size: its path keeps its distribution if the rate grows as the root of B
        (Malladi et al. 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms"). The
        decays of Adam's averages, which the rule scales too, stay as they are.
        """
        rate = self.learning_rate
        if rate is None:
            rate = 1e-3 * math.sqrt(size / _BATCH[self.kind])
        return self.replace(batch_size=size, learning_rate=rate)

    def to_json(self) -> str:
        """The configuration as JSON, read back by :meth:`from_json`."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> DetectorConfig:
        return cls.create(**_json_object(text, "the configuration"))

    @classmethod
    def stored(cls, options: dict[str, object]) -> DetectorConfig:
        """The configuration of a file. Those of before have values of options that nothing read."""
        unread = _not_read(options.get("kind"), options.get("denoiser"))
        return cls.create(**{k: v for k, v in options.items() if k not in unread})


TOKEN_SOURCES = ("energy", "cell", "gradient", "spread", "mean", "patch")
BASE_GRID = 32
"""Cells along the short side of an image of the finest token grid."""


def token_source(name: str) -> tuple[str, int]:
    """Kind and cells along the short side of a token source: ("energy", 16) for "energy-16"."""
    kind, _, grid = str(name).partition("-")
    if name == "features":
        return kind, BASE_GRID
    smallest = 4 if kind in ("energy", "gradient") else 1  # these need neighbours
    known = kind in TOKEN_SOURCES and grid in ("1", "2", "4", "8", "16", "32")
    if not known or int(grid) < smallest:
        raise InputError(
            f"unknown token source {name!r}: choose one of {', '.join(TOKEN_SOURCES)} with a grid "
            "of 1, 2, 4, 8, 16 or 32 (from 4 on for energy and gradient), such as energy-16, or "
            "features"
        )
    return kind, int(grid)


def default_haar_level(image_size: tuple[int, int]) -> int:
    """The level that brings the short side closest to 32 positions, between 1 and 4."""
    return min(4, max(1, round(math.log2(max(min(image_size), 1) / 32))))


def duration(text: str) -> float:
    """Seconds, from "300", "300s", "5min" or "2h". Raises InputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)?", text)
    if match is None:
        raise InputError(f"{text!r} is not a duration: give seconds such as 300, or 300s, 5min, 2h")
    return float(match[1]) * {None: 1, "s": 1, "min": 60, "h": 3600}[match[2]]


def read_options(path: str) -> dict[str, object]:
    """Options from a JSON file that holds one object. Raises InputError naming the file."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no configuration file {path}") from None
    return _json_object(text, path)


def _json_object(text: str | bytes, name: str) -> dict[str, object]:
    try:
        options = json.loads(text)
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise InputError(
            f"{name} must hold one JSON object of options, not {type(options).__name__}"
        )
    return options


_LISTS = (
    "image_size", "map_weights", "tokens", "sigmas", "inversion_sigmas", "augment",
    "dynamic_threshold",
)  # fmt: skip

_CHOICES = {
    "mode": MODES,
    "schedule": SCHEDULES,
    "prediction_type": PREDICTIONS,
    "statistics": STATISTICS,
    "inference_dtype": DTYPES,
    "intensity": INTENSITIES,
    "feature_scale": SCALES,
    "semantic": SEMANTICS,
    "semantic_of": SEMANTIC_OF,
    "train_dtype": DTYPES,
    "train_compile": TRAIN_COMPILE,
}

# Of a number, or of each in a list.
_RANGES = {
    "train_budget": (1e-3, 1e8),
    "early_stopping": (0, math.inf),
    "accumulate": (1, math.inf),
    "overlap": (0, 0.9),
    "map_weights": (0, 1e6),
    "train_steps": (0, math.inf),
    "batch_size": (1, math.inf),
    "token_batch": (1, math.inf),
    "reverse_steps": (1, math.inf),
    "diffusion_steps": (1, 10**6),
    "inversion_steps": (1, math.inf),
    "token_width": (1, math.inf),
    "token_blocks": (1, math.inf),
    "sigmas": (0.01, 100),
    "inversion_sigmas": (0.01, 100),
    "seed": (0, 2**63 - 1),
    "warmup_steps": (0, 2**63 - 1),
    "start_sigma": (0.01, 100),
    "feature_sigma": (0.01, 100),
    "eta": (0, 1),
    "guidance": (0, 1e6),
    "semantic_weight": (0, 1e6),
    "illumination": (0, 1e5),
    "top_fraction": (0, 1),
    "false_positive_rate": (1e-6, 1 - 1e-6),
    "contamination": (0, 0.49),
    "learning_rate": (1e-9, 1),
    "ema_decay": (0, 1),
    "weight_decay": (0, 1e6),
    "gradient_clip": (0, math.inf),
    "snr_limit": (1e-3, math.inf),
    "validation_share": (0.01, 0.9),
    "statistics_share": (0.01, 0.9),
    "conformal_share": (0.01, 0.9),
    "clip": (1e-3, math.inf),
    "smoothing": (0, 1e5),
    "haar_level": (0, 4),
}

# What only this kind reads.
_OF_ONE_KIND = {
    "image": (
        "image_size", "channels", "tokens", "intensity", "illumination", "image_scale", "smoothing",
        "augment",
    ),
    "audio": (
        "sample_rate", "n_fft", "hop", "n_mels", "fmin", "fmax", "window_frames", "window_step",
        "remove_level",
    ),
    "vector": ("feature_scale",),
}  # fmt: skip
# What the token MLP does not read.
_OF_UNETS = (
    "haar_level", "prediction_type", "eta", "clip", "dynamic_threshold",
    "use_clipped_model_output", "guidance", "map_weights", "snr_limit", "accumulate",
)  # fmt: skip
# What no other denoiser reads.
_OF_TOKENS = (
    "tokens", "token_width", "token_blocks", "token_batch", "intensity", "illumination",
    "image_scale",
)  # fmt: skip


def _not_read(kind: object, denoiser: object) -> dict[str, str]:
    """The options that such a detector does not read, each with what it is for."""
    found = {
        name: f"kind={other!r}: leave it out for {kind!r}"
        for other, names in _OF_ONE_KIND.items()
        for name in (names if other != kind else ())
    }
    tokens = denoiser == "token-mlp"
    why = "the token MLP: leave it out, or choose denoiser='token-mlp'"
    if tokens:
        why = "U-Nets, and the token MLP has no such choice: leave it out"
        why += ", or choose denoiser='unet-small'" if kind == "image" else ""
    return dict.fromkeys(_OF_UNETS if tokens else _OF_TOKENS, why) | found


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(DetectorConfig)}

# By annotation, without "| None".
_TYPES = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
}


def _check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}: choose {', '.join(map(str, choices))}")


def _check_range(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
