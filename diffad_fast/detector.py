"""The detector: fit on normal images, score new ones, say where and how surely."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import denoisers, ops
from .config import DetectorConfig
from .data.images import Images, open_images
from .denoisers import inference
from .diffusion import NoiseSchedule, ReverseLoop
from .errors import BackendError, CheckpointError, InputError
from .evaluation import evaluate
from .progress import progress
from .representations import WaveletRepresentation
from .scoring import Conformal, MapStatistics, Score, fit_statistics, split_by_group
from .training import checkpoint
from .training.loop import History, Trainer, TrainingCheckpoint

KIND = "diffad"
CUSTOM = "custom"


class Detector:
    """Anomaly detector by diffusion in the wavelet domain.

    kind: "image". image_size: side, or (height, width), in pixels to which every image is
    resized. channels: 1 (grey) or 3 (colour). preset: "fast", "balanced" or "best", a whole
    recipe. seed: of everything random. denoiser: overrides the preset's by name, or a module
    ``(x (N,C,h,w), log_sigma (N,)) -> prediction`` with a method ``features`` of the same
    arguments that gives a list of feature maps. device: "cpu", "cuda", ... or None for the best
    there is. Further options by name: see :class:`diffad_fast.DetectorConfig`.

    Raises InputError for an unknown or impossible option, BackendError for a missing device.
    """

    def __init__(
        self,
        kind: str = "image",
        image_size: int | tuple[int, int] = 256,
        channels: int = 1,
        preset: str = "balanced",
        seed: int = 0,
        denoiser: str | nn.Module | None = None,
        device: str | torch.device | None = None,
        **options,
    ):
        module = denoiser if isinstance(denoiser, nn.Module) else None
        if module is not None:
            options["denoiser"] = CUSTOM
        elif denoiser is not None:
            options["denoiser"] = denoiser
        config = DetectorConfig.create(
            kind=kind, image_size=image_size, channels=channels, preset=preset, seed=seed, **options
        )
        self._set_up(config, resolve_device(device), module)

    def _set_up(self, config: DetectorConfig, device: torch.device, module: nn.Module | None):
        self.config, self.device = config, device
        self.representation = WaveletRepresentation(config.channels, config.haar_level)
        if module is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                module = denoisers.create(config.denoiser, self.representation.channels)
        self.denoiser = module.to(device, memory_format=torch.channels_last).eval()
        self.representation.to(device)
        self.schedule = NoiseSchedule(config.schedule, config.diffusion_steps)
        self.statistics: list[MapStatistics | None] | None = None
        self.conformal: Conformal | None = None
        self.history = History()
        self._in_bfloat16: nn.Module | None = None
        if module is not None and not isinstance(module, denoisers.WaveletUNet):
            if config.inference_dtype == "bfloat16":
                raise InputError(
                    "inference_dtype='bfloat16' is for the built-in U-Nets: convert your denoiser "
                    "yourself and leave inference_dtype at 'float32'"
                )
            self.config = config.replace(inference_dtype="float32")
        self._set_mode()

    def _set_mode(self) -> None:
        start = self.schedule.timestep(self.config.start_sigma)
        self._steps = self.schedule.reverse_steps(start, self.config.reverse_steps)
        # Made at the first score and kept, with the graphs that it captures on a GPU, until what
        # they read is replaced.
        self._scoring: ReverseLoop | None = None

    def _loop(self, conclude) -> ReverseLoop:
        """From images through their reconstruction to ``conclude(images, x0, x0_hat)``."""
        config = self.config
        denoiser = self._scoring_denoiser
        return ReverseLoop(
            denoiser,
            self._steps,
            seed=config.seed,
            prediction_type=config.prediction_type,
            eta=config.eta,
            clip=config.clip,
            guidance=config.guidance,
            prepare=self.representation.encode,
            conclude=conclude,
            modules=[denoiser, self.representation],
        )

    # ---------------------------------------------------------------- fit

    def fit(
        self,
        source,
        *,
        groups: Sequence[Hashable] | None = None,
        strict: bool = False,
        training_checkpoint: TrainingCheckpoint | None = None,
    ) -> Detector:
        """Train on normal images and calibrate on held-out ones.

        source: a folder (searched through), a list of files, an array or tensor (N,C,H,W) or
        (N,H,W) of uint8, uint16 or float in [0,1], or a DataLoader of such batches.
        groups: one label for each image; images of one label never stand on both sides of a
        split. strict: raise at the first unusable file instead of leaving it out with a warning.
        training_checkpoint: keep the state of the training on disk, and continue from it.

        Returns self. Raises InputError for unusable data, KeyboardInterrupt after SIGINT or
        SIGTERM, once the state is written.
        """
        config = self.config
        images = self.open(source, strict=strict)
        usable = images.load()
        if groups is not None and len(groups) != len(images):
            raise InputError(f"groups has {len(groups)} labels for {len(images)} images")
        split = split_by_group(usable, groups, config)
        self.representation.fit(
            batch.images.to(self.device)
            for batch in images.batches(config.batch_size, indices=split.fit)
        )
        trainer = Trainer(
            self.denoiser, self.representation.encode, images, split.fit, split.validation,
            config, self.device,
        )  # fmt: skip
        self.history = trainer.run(training_checkpoint)
        self._set_inference_dtype()
        self._calibrate(images, split.statistics, split.conformal, split.conformal_groups)
        return self

    def _set_inference_dtype(self) -> None:
        """Settle "auto" once and for all, before anything is calibrated."""
        self._in_bfloat16 = None
        config = self.config
        if config.inference_dtype == "auto":
            side = [s // 2**config.haar_level for s in config.image_size]
            x = torch.zeros(4, self.representation.channels, *side, device=self.device)
            x = x.contiguous(memory_format=torch.channels_last)
            dtype = inference.faster_dtype(self.denoiser, x)
            self.config = config.replace(inference_dtype=dtype)

    @property
    def _scoring_denoiser(self) -> nn.Module:
        if self.config.inference_dtype != "bfloat16":
            return self.denoiser
        if self._in_bfloat16 is None:
            self._in_bfloat16 = inference.in_dtype(self.denoiser, "bfloat16")
        return self._in_bfloat16

    @torch.inference_mode()
    def _calibrate(
        self, images: Images, statistics: list[int], conformal: list[int], conformal_groups: int
    ) -> None:
        config = self.config
        bar = progress(None, len(statistics) + len(conformal), "calibrating", "image")

        def maps() -> Iterator[list[torch.Tensor | None]]:
            for batch in images.batches(config.batch_size, indices=statistics):
                yield self._raw_maps(batch.images)
                bar.update(len(batch.index))

        with bar:
            self.statistics = fit_statistics(maps(), config.statistics, config.smoothing)
            self._set_mode()
            scores = []
            for batch in images.batches(config.batch_size, indices=conformal):
                scores.append(self.score_images(batch.images)[1])
                bar.update(len(batch.index))
        self.conformal = Conformal(
            np.concatenate(scores), conformal_groups, config.false_positive_rate
        )

    def open(self, source, *, strict: bool = False) -> Images:
        """The images of ``source`` (as in :meth:`fit`) in this detector's size and channels."""
        if isinstance(source, Images):
            return source
        config = self.config
        return open_images(
            source, config.image_size, config.channels, strict=strict, min_side=config.stride
        )

    # -------------------------------------------------------------- score

    def score(
        self, source, *, maps: bool = True, batch_size: int | None = None, strict: bool = False
    ) -> Score:
        """Score images; ``source`` as in :meth:`fit`.

        maps=False keeps no maps: memory then does not grow with the number of images, but for a
        few numbers each. Raises InputError for unusable data or before ``fit``.
        """
        return Score.join(self.score_iter(source, maps=maps, batch_size=batch_size, strict=strict))

    def score_iter(
        self, source, *, maps: bool = True, batch_size: int | None = None, strict: bool = False
    ) -> Iterator[Score]:
        """Yield a :class:`Score` a batch, in the order of ``source``; memory stays bounded.

        Files that cannot be used are left out and named in ``skipped`` of the batch after them.
        """
        self._require_fitted()
        if self.conformal.threshold is None:
            warnings.warn(f"label is None: {self.conformal.why_no_label()}", stacklevel=2)
        images = self.open(source, strict=strict)
        return self._score_batches(images, maps, batch_size or self.config.batch_size)

    def _score_batches(self, images: Images, maps: bool, batch_size: int) -> Iterator[Score]:
        reported = 0
        with progress(None, images.length, "scoring", "image") as bar:
            for batch in images.batches(batch_size):
                map_, score = self.score_images(batch.images)
                skipped = images.skipped[reported:]
                reported += len(skipped)
                yield Score(
                    score=score,
                    map=map_ if maps else None,
                    p_value=self.conformal.p_value(score),
                    label=self.conformal.label(score),
                    paths=batch.paths,
                    index=batch.index.numpy(),
                    skipped=skipped,
                )
                bar.update(len(score))
        if len(images.skipped) > reported:
            none = np.empty(0)
            yield Score(none, none, none, none, [], none, images.skipped[reported:])

    @torch.inference_mode()
    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """The model's idea of images (N,C,H,W) in [0,1] without their anomalies."""
        loop = self._loop(lambda images, x0, x0_hat: self.representation.decode(x0_hat))
        return loop.eager(images.to(self.device)).cpu()

    def _evidence(self, images: torch.Tensor, x0: torch.Tensor, x0_hat: torch.Tensor) -> tuple:
        """The first four arguments of ``ops.anomaly_map``."""
        features: list[list[torch.Tensor]] = [[], []]
        if self.config.map_weights[1] > 0:
            sigma = self.config.feature_sigma
            alpha = 1 / (1 + sigma**2)
            level = torch.full((len(images),), float(np.log(sigma)), device=self.device)
            # The network expects inputs of the variance-preserving process at that level.
            denoiser = self._scoring_denoiser
            features = [denoiser.features(x * alpha**0.5, level) for x in (x0, x0_hat)]
        return images, self.representation.decode(x0_hat), *features

    def _levels(self, weights: Sequence[float]) -> int:
        return self.config.haar_level if weights[2] > 0 else 0

    def _raw_maps(self, images: torch.Tensor) -> list[torch.Tensor | None]:
        """Each map alone, not standardised and not smoothed; None where it has no weight."""
        x, x_hat, f, f_hat = self._loop(self._evidence).eager(images.to(self.device))
        result: list[torch.Tensor | None] = []
        for i, weight in enumerate(self.config.map_weights):
            one = [0.0, 0.0, 0.0]
            one[i] = 1.0
            features = (f, f_hat) if i == 1 else ((), ())
            result.append(
                ops.anomaly_map(x, x_hat, *features, one, self._levels(one), sigma=0.0)[0]
                if weight > 0
                else None
            )
        return result

    @torch.inference_mode()
    def score_images(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Maps (n,H,W) float32 and scores (n,) float64 of one batch (n,C,H,W) of floats in [0,1].

        The innermost call: no decoding, no checks, no calibration of p-values.
        """
        if self._scoring is None:
            self._scoring = self._loop(self._map_and_score)
        map_, score = self._scoring(images.to(self.device))
        return map_.cpu().numpy(), score.cpu().double().numpy()

    def _map_and_score(self, *reconstruction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        return ops.anomaly_map(
            *self._evidence(*reconstruction),
            weights=config.map_weights,
            levels=self._levels(config.map_weights),
            stats=self.statistics,
            sigma=config.smoothing,
            top=config.top_fraction,
        )

    def _require_fitted(self) -> None:
        if self.statistics is None:
            raise InputError("this detector is not fitted: call fit, or load a checkpoint")

    # ----------------------------------------------------------- evaluate

    def evaluate(
        self,
        root: str | os.PathLike,
        *,
        strict: bool = False,
        report: str | os.PathLike | None = None,
    ) -> dict:
        """Figures on a test set in the MVTec AD layout: root/test/*, root/ground_truth/*.

        Returns a dict that JSON can hold: image_auroc, pixel_auroc, aupro (to a false-positive
        rate of 0.3), f1_max (of images), pixel_f1_max, false_positive_rate and
        true_positive_rate of the labels, per_defect (the same figures for one kind of defect
        against all normals), latency_ms (median of single images, decoded image in, score and map
        out), n_normal, n_anomalous, and ``undefined``: why a figure is null. Pixel metrics are
        taken at each mask's own size. report: a folder for an HTML report.
        Raises InputError for a missing test folder or a mask of the wrong size.
        """
        evaluation = evaluate(self, Path(root), strict)
        if report is not None:
            from .report import write_report

            write_report(report, self, evaluation)
        return evaluation.metrics

    # --------------------------------------------------------- checkpoint

    @property
    def mode(self) -> str:
        """How scores are made from the model; can be set at any time."""
        return self.config.mode

    @mode.setter
    def mode(self, value: str) -> None:
        self.config = self.config.replace(mode=value)

    def save(self, path: str | os.PathLike) -> None:
        """Write the fitted detector as one safetensors file, atomically. Raises InputError."""
        self._require_fitted()
        tensors = {f"denoiser.{k}": v for k, v in self.denoiser.state_dict().items()}
        tensors |= {f"representation.{k}": v for k, v in self.representation.state_dict().items()}
        names = []
        for i, entry in enumerate(self.statistics):
            if entry is not None:
                tensors |= {f"statistics.{i}.{k}": v for k, v in entry._asdict().items()}
                names.append(i)
        tensors["conformal.scores"] = torch.from_numpy(self.conformal.scores)
        texts = {
            "config": self.config.to_json(),
            "statistics": json.dumps({"maps": len(self.statistics), "present": names}),
            "conformal_groups": str(self.conformal.groups),
            "history": json.dumps(dataclasses.asdict(self.history)),
        }
        checkpoint.save(path, KIND, tensors, texts)


def load(
    path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    denoiser: nn.Module | None = None,
) -> Detector:
    """Read a detector that :meth:`Detector.save` wrote.

    denoiser: a module of the architecture that was fitted, for detectors with their own.
    Raises CheckpointError for a file that is missing, damaged, newer, or of another kind.
    """
    tensors, texts = checkpoint.load(path, KIND)
    config = DetectorConfig.from_json(texts["config"])
    if config.denoiser == CUSTOM and denoiser is None:
        raise CheckpointError(f"{path} was fitted with a denoiser of its own: pass denoiser=module")
    detector = Detector.__new__(Detector)
    detector._set_up(config, resolve_device(device), denoiser)
    device = detector.device

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        detector.denoiser.load_state_dict(part("denoiser."))
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(f"{path} does not fit this denoiser: {first[0].strip()}") from None
    detector.representation.load_state_dict(part("representation."))
    names = json.loads(texts["statistics"])
    detector.statistics = [
        MapStatistics(**{k: v.to(device) for k, v in part(f"statistics.{i}.").items()})
        if i in names["present"]
        else None
        for i in range(names["maps"])
    ]
    detector.conformal = Conformal(
        tensors["conformal.scores"].numpy(),
        int(texts["conformal_groups"]),
        config.false_positive_rate,
    )
    detector.history = History(**json.loads(texts["history"]))
    return detector


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is. Raises BackendError if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = device
    try:
        device = torch.device(device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {str(name)!r}: choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device {device} was asked for, but PyTorch finds {torch.cuda.device_count()} CUDA "
            "GPU(s): use cpu"
        )
    return device


def groups_by_regex(paths: Sequence[str], pattern: str) -> list[str]:
    """The group of each file: what the first parenthesis of ``pattern`` matches in its name.

    Without a parenthesis, the whole match. Raises InputError where a file does not match.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"group regex {pattern!r} is not a regular expression: {error}") from None
    groups = []
    for path in paths:
        match = compiled.search(Path(path).name)
        if match is None:
            raise InputError(f"group regex {pattern!r} does not match {Path(path).name}")
        groups.append(match[1] if compiled.groups else match[0])
    return groups
