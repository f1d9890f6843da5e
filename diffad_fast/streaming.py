"""Scores of a recording while it arrives."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .data.audio import read_blocks, what_is_missing, what_is_repeated
from .data.resampling import Resampler, resampling_delay
from .data.waves import as_mono, extended
from .errors import InputError

if TYPE_CHECKING:
    from .detector import Detector

# Windows that are scored at once, however large a chunk is.
_LARGEST_BATCH = 64


class StreamScores(NamedTuple):
    """What the windows that a chunk completed sound like.

    time (k,) float64: the end of each window, in seconds from the start of the stream; score (k,)
    float64, of which the mean (of the part ``top_fraction`` of the highest) over a clip is the
    clip's score; map (k,n_mels) float32: what each band (``Detector.frequencies``) has in it,
    adding up to the score.
    p_value (k,) float64 and label (k,) int64, 1 for an anomaly, by single windows of held-out
    normals: of new recordings like these a share ``false_positive_rate`` of the windows is labelled
    on average, of one recording more or less. label is None where the held-out recordings are too
    few for the rate (``Conformal.threshold``).
    """

    time: np.ndarray
    score: np.ndarray
    map: np.ndarray
    p_value: np.ndarray
    label: np.ndarray | None


class Stream:
    """A detector on one endless recording; made by ``Detector.stream``.

    Chunks of any size give the scores of the same windows as the whole recording would: what is
    between the chunks is kept, less than a window and a step of samples. The first score comes
    after one window, ``window`` seconds, and what the resampler holds back where the rates differ.
    From then on a sound is part of a score at most ``latency`` seconds later: the step from one
    window to the next and, again, what the resampler holds back.
    """

    def __init__(self, detector: Detector, rate: float):
        config = detector.config
        if config.remove_level:
            raise InputError(
                "a stream has no end, and remove_level takes off the level of a whole clip: fit "
                "with remove_level=False"
            )
        self._detector, self._rate = detector, config.sample_rate
        self._window, self._step = config.window_samples, config.step_samples
        self._resampler = Resampler(rate, config.sample_rate, "the stream")
        missing = what_is_missing(rate, config.fmax, "the stream")
        if missing:
            warnings.warn(missing, stacklevel=3)
        # From the start of the first window that has not been scored.
        self._buffer = np.empty(0, np.float32)
        # The step before that, which the mirrored end of a recording may need.
        self._past = np.empty(0, np.float32)
        self._scored = 0
        self._finished = False
        self._channels: int | None = None
        self.window = config.window_samples / config.sample_rate
        self.latency = config.step_samples / config.sample_rate
        self.latency += resampling_delay(rate, config.sample_rate)

    def push(self, wave) -> StreamScores:
        """Take in a chunk (samples,) or (samples, channels), always of as many channels, of floats
        in [-1, 1], int16 or int32.

        Raises InputError for NaN and for what is no wave; the stream goes on without that chunk.
        """
        self._require_open()
        shape = tuple(wave.shape) if hasattr(wave, "shape") else ()
        if 0 in shape:
            return self._complete()
        mono = as_mono(wave, "the chunk", channels_last=True)
        channels = shape[1] if len(shape) == 2 else 1
        if self._channels not in (None, channels):
            raise InputError(
                f"the chunk of shape {shape} has {channels} channels and those before had "
                f"{self._channels}: chunks have (samples,) or (samples, channels)"
            )
        self._channels = channels
        self._buffer = np.concatenate([self._buffer, self._resampler.push(mono)])
        return self._complete()

    def finish(self) -> StreamScores:
        """The end of the recording: the last windows, which its mirrored end completes; of less
        than a window, which is repeated, one, with a warning."""
        scores, repeated = self._end()
        if repeated is not None:
            text = what_is_repeated(repeated, self.window, "the stream")
            warnings.warn(text, stacklevel=2)
        return scores

    def _end(self) -> tuple[StreamScores, float | None]:
        """What ``finish`` gives, and of a recording that was repeated its seconds."""
        self._require_open()
        self._finished = True
        repeated = None
        rest = self._resampler.finish()
        self._buffer = np.concatenate([self._buffer, rest])
        parts = [self._complete()]
        size = len(self._buffer)
        if self._scored == 0 and size:
            repeated = size / self._rate
            self._buffer = extended(self._buffer, self._window, self._step)
        elif size > self._window - self._step:
            end = np.concatenate([self._past, self._buffer])
            end = np.pad(end, (0, self._window - size), mode="reflect")
            self._buffer = end[len(self._past) :]
        parts.append(self._complete())
        found = (None if c[0] is None else np.concatenate(c) for c in zip(*parts, strict=True))
        return StreamScores(*found), repeated

    def _complete(self) -> StreamScores:
        """Score every window that the buffer holds whole, and drop what no later one needs."""
        scores, maps, first = [], [], self._scored
        while len(self._buffer) >= self._window:
            count = min(_LARGEST_BATCH, (len(self._buffer) - self._window) // self._step + 1)
            windows = torch.from_numpy(self._buffer).unfold(0, self._window, self._step)[:count]
            map_, score = self._detector.score_batch(windows.contiguous())
            scores.append(score)
            maps.append(map_[:, :, 0])
            done = count * self._step
            self._past = self._buffer[done - self._step : done].copy()
            self._buffer = self._buffer[done:]
            self._scored += count
        if scores:  # once, and not in the loop: a chunk may be a recording of hours
            self._buffer = self._buffer.copy()
        number = np.arange(first, self._scored)
        score = np.concatenate([np.empty(0), *scores])
        n_mels = self._detector.config.n_mels
        normal = self._detector.calibrations[self._detector.mode].of_windows
        return StreamScores(
            (number * self._step + self._window) / self._rate,
            score,
            np.concatenate([np.empty((0, n_mels), np.float32), *maps]),
            normal.p_value(score),
            normal.label(score),
        )

    def _require_open(self) -> None:
        if self._finished:
            raise InputError("the stream is finished: make another one for the next recording")


def stream_file(detector: Detector, path: str, told: set[str]) -> Iterator[StreamScores]:
    """The windows of a recording of any length, in bounded memory.

    told: the kinds of what was warned of before, to which those of this recording are added: of
    each one recording is named. Raises InputError as ``read_blocks`` and ``Detector.stream``.
    """
    config = detector.config
    stream = detector.stream(config.sample_rate)

    def warn_once(kind: str, text: str | None) -> None:
        if text is not None and kind not in told:
            told.add(kind)
            warnings.warn(text, stacklevel=3)

    def heard(own: float, _: np.ndarray) -> None:
        warn_once("rate", what_is_missing(own, config.fmax, path))

    for block in read_blocks(path, config.sample_rate, heard=heard):
        yield stream.push(block)
    scores, repeated = stream._end()
    if repeated is not None:
        warn_once("length", what_is_repeated(repeated, stream.window, path))
    yield scores
