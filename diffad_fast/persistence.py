"""Detectors on disk and in pickles: one checkpoint of tensors and texts."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings

import torch
from torch import nn

from .calibration import Calibration
from .config import DetectorConfig
from .denoisers.inference import has_bfloat16
from .detector import CUSTOM, Detector
from .errors import CheckpointError
from .scoring import Conformal, MapStatistics
from .surroundings import resolve_device, undisturbed
from .training import checkpoint
from .training.history import History, is_history

KIND = "diffad"


def load(
    path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    denoiser: nn.Module | None = None,
    features: nn.Module | None = None,
) -> Detector:
    """Read a detector that :meth:`Detector.save` wrote.

    denoiser: a module of the architecture that was fitted, for a detector with its own. features:
    the module that was given to the fit, with its weights, which are not in the file; also for
    backbones that timm would fetch from elsewhere ("hf-hub:..."). Both are used as they are, not
    copied: the denoiser takes the weights in the file.
    Raises CheckpointError for a file that is missing, damaged, of another version, or of another
    kind, and where the module that was fitted is not handed over, or another one is.
    """
    tensors, texts = checkpoint.load(path, KIND)
    return from_state(tensors, texts, path, device=device, denoiser=denoiser, features=features)


def state(detector: Detector) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Of a fitted detector what a checkpoint holds; :func:`from_state` reads it."""
    tensors = {f"model.{k}": v for k, v in detector.model.state().items()}
    for mode, calibration in detector.calibrations.items():
        for i, entry in enumerate(calibration.statistics):
            if entry is not None:
                prefix = f"statistics.{mode}.{i}"
                tensors |= {f"{prefix}.{k}": v for k, v in entry._asdict().items()}
        for name in ("conformal", "of_windows"):
            conformal = getattr(calibration, name)
            if conformal is not None:
                tensors[f"{name}.{mode}"] = torch.from_numpy(conformal.scores)
                tensors[f"{name}_groups.{mode}"] = torch.from_numpy(conformal.group)
    texts = {
        "config": detector.config.to_json(),
        "statistics": json.dumps({m: len(c.statistics) for m, c in detector.calibrations.items()}),
        "features": _digest(detector._features),
        "features_samples": json.dumps(_samples(detector)),
        "settled": json.dumps(detector._settled),
        "most_windows_of": json.dumps(
            {m: c.most_windows for m, c in detector.calibrations.items()}
        ),
        "columns": json.dumps(detector.columns),
        "history": json.dumps(dataclasses.asdict(detector.history)),
    }
    return tensors, texts


@undisturbed
def from_state(
    tensors: dict[str, torch.Tensor],
    texts: dict[str, str],
    path: str | os.PathLike,
    *,
    device: str | torch.device | None = None,
    denoiser: nn.Module | None = None,
    features: nn.Module | None = None,
) -> Detector:
    """:func:`load` from what :meth:`Detector.state` gave; ``path`` is for its messages."""
    tensors, texts = checkpoint.Content(tensors, path), checkpoint.Content(texts, path)
    config = texts.config()
    found = resolve_device(device)
    for name, module in (("denoiser", denoiser), ("features", features)):
        if getattr(config, name) == CUSTOM and module is None:
            raise CheckpointError(f"{path} was fitted with {name} of its own: pass {name}=module")
    if features is None and config.kind == "image" and ":" in (config.features or ""):
        raise CheckpointError(
            f"{path} names the backbone {config.features!r}, weights that anybody may have made "
            f"and that are not fetched unasked: pass features=integrations.timm.TimmFeatures("
            f"{config.features!r}, {config.channels})"
        )
    if config.inference_dtype == "bfloat16" and not config.on_tokens and not has_bfloat16(found):
        warnings.warn(
            f"{path} was fitted to score in bfloat16, and {found.type} has no instructions for it "
            "here: it scores in float32, which changes scores in the third digit",
            RuntimeWarning,
            stacklevel=3,
        )
        config = config.replace(inference_dtype="float32")
    detector = Detector._of_config(config, device, denoiser, features)
    if texts["features"] != _digest(detector._features):
        raise CheckpointError(
            f"{path} was fitted with other weights of its features, which files do not hold: pass "
            "features=module with those of the fit"
        )
    # Not among the weights; an older file does not tell it.
    heard, hears = texts.get("features_samples"), json.dumps(_samples(detector))
    if heard not in (None, hears):
        raise CheckpointError(
            f"{path} was fitted with features that hear {heard} samples at once, and these hear "
            f"{hears}: pass features=module with samples={heard}"
        )

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    try:
        detector.model.restore(part("model."))
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(f"{path} does not fit this denoiser: {first[0].strip()}") from None

    def conformal(name: str, mode: str) -> Conformal:
        scores, group = (tensors[f"{name}{suffix}.{mode}"] for suffix in ("", "_groups"))
        kinds = (scores.dtype, group.dtype) == (torch.float64, torch.int64)
        if not kinds or scores.shape != (group.numel(),) or group.ndim != 1 or not len(group):
            raise tensors.damaged(f"{name}.{mode}")
        return Conformal(scores.numpy(), group.numpy(), config.false_positive_rate)

    counts = texts.json("statistics", lambda found: _are_counts(found) and config.mode in found)
    most_windows = texts.json(
        "most_windows_of", lambda found: _are_counts(found) and found.keys() == counts.keys()
    )
    # None of clips without their level, of which no stream is scored.
    streams = config.kind == "audio" and not config.remove_level
    for mode, count in counts.items():
        prefixes = [f"statistics.{mode}.{i}." for i in range(count)]
        statistics = [
            MapStatistics(*(tensors[prefix + k].to(detector.device) for k in MapStatistics._fields))
            if part(prefix)
            else None
            for prefix in prefixes
        ]
        detector.calibrations[mode] = Calibration(
            statistics,
            conformal("conformal", mode),
            most_windows[mode],
            conformal("of_windows", mode) if streams else None,
        )
    detector.mode = config.mode
    detector._settled = texts.json("settled", _are_settled)
    detector.columns = texts.json("columns", _are_columns)
    detector.history = History(**texts.json("history", is_history))
    return detector


def _are_counts(found) -> bool:
    """Of modes."""
    return isinstance(found, dict) and all(type(n) is int and n >= 0 for n in found.values())


def _are_settled(found) -> bool:
    """Pairs of what was asked for and what was settled, by options."""
    options = {field.name for field in dataclasses.fields(DetectorConfig)}
    return isinstance(found, dict) and all(
        name in options and isinstance(pair, list) and len(pair) == 2
        for name, pair in found.items()
    )


def _are_columns(found) -> bool:
    return found is None or isinstance(found, list) and all(isinstance(c, str) for c in found)


def _digest(features: nn.Module | None) -> str:
    """Of a backbone's weights; "" without one."""
    if features is None:
        return ""
    tensors = {k: v for k, v in features.state_dict().items() if isinstance(v, torch.Tensor)}
    return checkpoint.checksum({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {})


def _samples(detector: Detector) -> int | None:
    """How many a backbone hears at once; None of images and without one."""
    embedding = getattr(detector.model, "embedding", None)
    return None if embedding is None else embedding.samples
