"""What a detector sees of a source: its samples in the detector's shape, and those to train on."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..config import DetectorConfig
from ..errors import InputError
from .audio import Clips, open_audio
from .audio_layouts import groups_by_recording, training_clips
from .folders import is_path
from .image_layouts import training_images
from .images import Images, open_images
from .samples import Samples
from .vectors import Vectors, open_vectors


def open_source(source, config: DetectorConfig, strict: bool) -> Images | Clips | Vectors:
    """The samples of ``source``, as in :meth:`diffad_fast.Detector.fit`: images in the size of
    ``config``, clips at its sampling rate. Raises InputError, also for samples that were opened in
    another shape."""
    shape = ()
    if config.kind == "image":
        size, smallest = config.image_size, (config.stride, config.stride)
        if config.overlap is not None:
            size, smallest = None, config.image_size
        shape = size, config.channels
    elif config.kind == "audio":
        shape = config.sample_rate, config.window_samples, config.step_samples
    if isinstance(source, Samples):
        if source.opened_as != (config.kind, *shape):
            raise InputError(
                f"these samples were opened as {source.opened_as} and this detector sees "
                f"{(config.kind, *shape)}: open them with it"
            )
        return source
    if config.kind == "vector":
        return open_vectors(source)
    if config.kind == "audio":
        return open_audio(source, *shape, highest=config.fmax, strict=strict)
    return open_images(source, *shape, strict=strict, smallest=smallest)


def training_part(
    kind: str,
    source,
    layout: str = "auto",
    normal: str | None = None,
    folds: Sequence[int] | None = None,
) -> tuple[object, list[str] | None]:
    """(source, groups) of what to train on: of a folder what is not there to be tested on, with the
    groups that its layout tells.

    layout: of images as in ``data.image_layouts.training_images``; layout, normal, folds: of
    recordings as in ``data.audio.training_clips``. This raises their errors: without a normal class
    the root of an UrbanSound8K is refused.
    """
    check_layout(kind, source, layout, normal, folds)
    if kind == "image" and is_path(source):
        return training_images(source, layout), None
    asked = layout != "auto" or normal is not None or folds is not None
    if kind == "audio" and is_path(source) and (asked or os.path.isdir(source)):
        clips = training_clips(source, layout, normal, folds)
        return [clip.path for clip in clips], groups_by_recording(clips)
    return source, None


def check_layout(
    kind: str, source, layout: str, normal: str | None, folds: Sequence[int] | None
) -> None:
    """Raise InputError for options of another kind of samples, or of folders beside another
    source."""
    if kind != "audio" and (normal is not None or folds is not None):
        raise InputError(f"normal and folds are for audio: leave them out for {kind}s")
    if kind == "vector" and layout != "auto":
        raise InputError("layout is for images and audio: leave it out for vectors")
    if not is_path(source) and (layout != "auto" or normal is not None or folds is not None):
        raise InputError(
            "layout, normal and folds tell how a folder is read, and the data is a "
            f"{type(source).__name__}: leave them out"
        )
