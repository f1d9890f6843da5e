"""Recordings from anywhere, as float32 mono waves of one sampling rate.

`open_audio` takes a folder, files, arrays or (wave, rate) pairs and gives `Clips`, whose `batches`
streams them.
"""

from __future__ import annotations

import os
import threading
import warnings
from contextlib import nullcontext

import numpy as np
import torch

from ..errors import InputError, SkippedInput
from .audio_files import LONGEST_SECONDS, audio_files, read_audio, read_blocks
from .audio_layouts import LabelledClip, groups_by_recording, labelled_clips, training_clips
from .folders import is_open_file, is_path
from .resampling import Resampler, audio_package, check_rate
from .samples import DecodedSamples, Items
from .waves import MOST_CHANNELS, as_mono, extended

__all__ = [
    "Clips",
    "LabelledClip",
    "cut_recordings",
    "groups_by_recording",
    "labelled_clips",
    "open_audio",
    "read_audio",
    "read_blocks",
    "training_clips",
]

# Samples of one batch: 256 MiB.
_LARGEST_BATCH = 1 << 26


def open_audio(
    source, rate: int, window: int, step: int, *, highest: float = 0.0, strict: bool = False
) -> Clips:
    """Open a source of recordings.

    Args:
        source: a folder (searched recursively, links to folders too, in sorted order), one file,
            an array or tensor (samples,) or (N, samples) at `rate`, a pair (wave, rate of the wave)
            whose wave may have channels (the shorter axis), or a list of files, of waves or of such
            pairs. In place of a path there may be an open binary file, such as io.BytesIO of what
            arrived at a service; one that cannot be used raises. Waves are floats in [-1, 1], int16
            or int32; they need not be copied, so leave them as they are until the last batch.
        rate: of the result, samples a second.
        highest: a warning names a recording whose own rate leaves out frequencies of this
            many Hz.
        window, step: each clip is extended to window + k step samples, k >= 0: a shorter one than
            a window is repeated, with a warning that names one, the end of a longer one is
            mirrored.
        strict: raise `InputError` at the first unusable file instead of leaving it out with a
            `SkippedInput` warning. A single file is always needed.

    Raises:
        InputError: nothing is there. Unusable waves raise while they are read.
        BackendError: soundfile or soxr is not installed.
    """
    opened_as = "audio", rate, window, step
    for item in source if isinstance(source, (list, tuple)) else [source]:
        if isinstance(item, bytearray) or (isinstance(item, bytes) and 0 in item):
            # As paths they could name any file, so bytes are never taken for a recording's content.
            raise InputError("these bytes are no path: give a file's content as io.BytesIO(...).")
    if is_open_file(source):
        source = [source]
    if is_path(source):
        paths = audio_files(os.fsdecode(source))
        strict = strict or os.path.isfile(source)
        return Clips(_FileItems(paths, rate, window, step, highest), opened_as, strict)
    if _is_pair(source):
        source = [source]
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        if source.ndim not in (1, 2):
            raise InputError(
                f"an array of clips has shape (samples,) or (N, samples), not "
                f"{tuple(source.shape)}: reshape it, or give pairs (wave, rate)."
            )
        if source.ndim == 2 and source.shape[1] <= min(MOST_CHANNELS, source.shape[0] - 1):
            raise InputError(
                f"an array of shape {tuple(source.shape)} would be {source.shape[0]} clips of "
                f"{source.shape[1]} samples: for one clip with channels give a pair (wave, rate)."
            )
        source = [source] if source.ndim == 1 else list(source)
    if not isinstance(source, (list, tuple)):
        raise InputError(
            f"clips cannot be read from a {type(source).__name__}: give a folder, files, an array, "
            "a pair (wave, rate), or a list of these."
        )
    if not source:
        raise InputError("the list of clips is empty: give at least one.")
    files = sum(is_path(item) or is_open_file(item) for item in source)
    if files == len(source):
        found = [os.fsdecode(item) if is_path(item) else item for item in source]
        items = _FileItems(found, rate, window, step, highest)
    elif files:
        raise InputError(f"the list has {files} files and {len(source) - files} waves: give one.")
    else:
        items = _WaveItems(list(source), rate, window, step, highest)
    return Clips(items, opened_as, strict)


def cut_recordings(
    source, rate: int, seconds: float, *, highest: float = 0.0, strict: bool = False
) -> tuple[list[np.ndarray], list[int]]:
    """Cut recordings of any length into clips, to fit on them.

    Args:
        source: a folder (searched as in `open_audio`), a file, or a list of files; in place of a
            path there may be an open binary file, as in `open_audio`.
        rate: of the result, samples a second: the detector's `sample_rate`.
        seconds: of every clip. What a recording has beyond whole clips is left out; of one that is
            shorter the whole is a clip.
        highest: a warning names a recording whose own rate leaves out frequencies of this
            many Hz: the detector's `fmax`.
        strict: raise `InputError` at the first unusable file instead of leaving it out with a
            `SkippedInput` warning. A single file is always needed.

    Returns:
        The clips, (samples,) float32 each, and of each the number of its recording: the `groups` of
        ``Detector.fit``, so that what is held out is of other recordings. All are in memory: at
        16,000 Hz 0.23 GB an hour.

    Raises:
        InputError: nothing is there or usable, or clips would be longer than 10 minutes.
    """
    if not 1 <= rate * seconds <= rate * LONGEST_SECONDS:
        raise InputError(
            f"clips of {seconds:g} s cannot be cut: give some seconds, at most {LONGEST_SECONDS:g}."
        )
    size, strict = round(rate * seconds), strict or (is_path(source) and os.path.isfile(source))
    if is_path(source):
        files = audio_files(os.fsdecode(source))
    else:
        files = [source] if is_open_file(source) else list(source)
    clips: list[np.ndarray] = []
    recordings: list[int] = []
    rates: list[int] = []
    told = False
    for number, file in enumerate(files):
        name = os.fsdecode(file) if is_path(file) else f"recording {number}"
        try:
            blocks = read_blocks(file, rate, heard=lambda own, _: rates.append(own), name=name)
            wave = np.concatenate(list(blocks))
        except InputError as error:
            if strict or not is_path(file):
                raise
            warnings.warn(f"left out: {error}", SkippedInput, stacklevel=2)
            continue
        missing = what_is_missing(rates[-1], highest, name)
        if missing and not told:
            told = True
            warnings.warn(missing, stacklevel=2)
        count = len(wave) // size
        found = [wave] if count == 0 else list(wave[: count * size].reshape(count, size))
        clips += found
        recordings += [number] * len(found)
    if not clips:
        raise InputError(f"none of the {len(files)} files is a usable recording: give others.")
    return clips, recordings


class Clips(DecodedSamples):
    """Recordings from one source; made by `open_audio`.

    `batches` gives waves (n, samples); clips of different lengths stand in different batches.
    """

    unit = "clip"

    def check_normal(self) -> None:
        """Warn of clips that hold one value throughout: they can be scored, and are hardly meant to
        be learnt."""
        constant = self._items.constant
        if constant:
            first = min(constant)
            warnings.warn(
                f"{len(constant)} of {len(self)} clips hold one value throughout, as of a "
                f"dead microphone, such as {self.paths[first] if self.paths else f'clip {first}'}: "
                "that is taken for normal; leave them out if it is not",
                stacklevel=3,
            )

    @staticmethod
    def _ahead(batch_size: int) -> int:
        return 1

    @staticmethod
    def _together(found: list[tuple[int, np.ndarray]], item: np.ndarray) -> bool:
        wave = found[0][1]
        return wave.shape == item.shape and (len(found) + 1) * item.size <= _LARGEST_BATCH


def what_is_missing(own: float, highest: float, name: str) -> str | None:
    """The warning for a recording of the rate `own` in which a part of what a detector listens to,
    up to `highest` Hz, is missing."""
    # Between what a filter leaves and half of the rate nothing sounds different.
    if own / 2 >= 0.9 * highest:
        return None
    return (
        f"{name} was sampled {own:g} times a second and holds nothing above {own / 2:g} Hz, and "
        f"the detector listens up to {highest:g} Hz: such recordings sound anomalous to one fitted "
        f"on others; fit with fmax={own / 2:g}"
    )


def what_is_repeated(seconds: float, window: float, name: str) -> str:
    """The warning for a recording of fewer seconds than a detector's window."""
    return (
        f"{name} lasts {seconds:.3g} s, less than the detector's window of {window:.3g} s, and is "
        "repeated to fill it: that can be heard, so such recordings sound anomalous to a detector "
        "fitted on longer ones; fit with a smaller window_frames"
    )


class _ClipItems(Items):
    def __init__(self, rate: int, window: int, step: int, highest: float):
        self._rate, self._shape, self._highest = rate, (window, step), highest
        self._warned: dict[str, object] = {}
        self.constant: set[int] = set()
        """Those that hold one value throughout, before they are resampled, as they are read."""

    def _warn_once(self, what: str, text: str) -> None:
        """Of each kind of recording one is named; threads read them, so not always the first."""
        token = object()
        if self._warned.setdefault(what, token) is token:
            warnings.warn(text, stacklevel=3)

    def _hear(self, own: float, name: str) -> None:
        missing = what_is_missing(own, self._highest, name)
        if missing:
            self._warn_once("rate", missing)

    def _extended(self, wave: np.ndarray, name: str) -> np.ndarray:
        """The wave at the length of whole windows; warn of those that are repeated for that."""
        window = self._shape[0]
        if len(wave) < window:
            seconds = len(wave) / self._rate, window / self._rate
            self._warn_once("length", what_is_repeated(*seconds, name))
        return extended(wave, *self._shape)


class _FileItems(_ClipItems):
    """Paths, and open files, among which all go by their places."""

    def __init__(self, files: list, *shape):
        audio_package("soundfile")
        super().__init__(*shape)
        self._files = files
        # One that comes twice in a list has one position, for all threads.
        self._turns = {id(f): threading.Lock() for f in files if is_open_file(f)}
        self.paths = None if self._turns else files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> np.ndarray:
        file = self._files[index]
        name = f"clip {index}" if self.paths is None else file
        values: set[float] = set()

        def heard(own: int, block: np.ndarray) -> None:
            self._hear(own, name)
            values.update((float(block.min()), float(block.max())))

        with self._turns.get(id(file)) or nullcontext():
            wave = read_audio(file, self._rate, heard, name)
        if len(values) == 1:
            self.constant.add(index)
        return self._extended(wave, name)


class _WaveItems(_ClipItems):
    """Waves, or pairs (wave, rate), each checked when it is read."""

    def __init__(self, waves: list, *shape):
        super().__init__(*shape)
        self._waves = waves
        self.quick = not any(_is_pair(wave) and wave[1] != self._rate for wave in waves)

    def __len__(self) -> int:
        return len(self._waves)

    def read(self, index: int) -> np.ndarray:
        name, wave, own = f"clip {index}", self._waves[index], self._rate
        if _is_pair(wave):
            wave, own = wave
        check_rate(own, name)
        self._hear(own, name)
        wave = as_mono(wave, name)
        constant = wave[0] == wave[-1] and wave.min() == wave.max()
        wave = self._extended(_resampled(wave, own, self._rate, name), name)
        if constant:
            self.constant.add(index)
        return wave


def _resampled(wave: np.ndarray, own: float, rate: int, name: str) -> np.ndarray:
    if len(wave) > LONGEST_SECONDS * own:
        raise InputError(
            f"{name} is {len(wave) / own:.0f} s long and clips may have {LONGEST_SECONDS:g} s: cut "
            "it, or pass it to Detector.stream in blocks."
        )
    if own == rate:
        return wave
    resampler = Resampler(own, rate, name)
    wave = np.concatenate([resampler.push(wave), resampler.finish()])
    if not len(wave):
        raise InputError(f"{name} is shorter than one sample at {rate} Hz: leave it out.")
    return wave


def _is_pair(value) -> bool:
    """(wave, rate)?"""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], (np.ndarray, torch.Tensor))
        and getattr(value[1], "ndim", 0) == 0  # two waves otherwise
    )
