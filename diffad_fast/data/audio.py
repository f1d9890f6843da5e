"""Recordings from anywhere, as float32 mono waves of one sampling rate.

`open_audio` takes a folder, files, arrays or (wave, rate) pairs and gives `Clips`, whose `batches`
streams them. `read_audio` alone decides what a usable recording is. `labelled_clips` knows the
layouts of data sets. Files are read by soundfile (WAV, FLAC, OGG, MP3) and resampled by soxr.
"""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..errors import BackendError, InputError
from .images import Images, check_no_test, files_below, is_path

__all__ = [
    "LAYOUTS",
    "Clips",
    "LabelledClip",
    "Resampler",
    "labelled_clips",
    "open_audio",
    "read_audio",
    "read_blocks",
    "training_clips",
]

LAYOUTS = ("auto", "folder", "urbansound8k", "dcase")
# Clips are held whole while they are scored; a longer recording goes through a stream.
LONGEST_SECONDS = 600.0
# Samples of all channels in one block of a file.
_BLOCK = 1 << 20
# As many frames stand for a length that a file does not tell.
_UNCOUNTED = 1 << 62
# Of formats whose head tells how long a file is: the numbers there that make this up, their place,
# and how many bytes they leave out.
_LENGTHS = {
    b"RIFF": ("<I", 4, 8), b"RIFX": (">I", 4, 8), b"RF64": ("<Q", 20, 8), b"riff": ("<Q", 16, 0),
    b"FORM": (">I", 4, 8), b".snd": (">II", 4, 0),
}  # fmt: skip
# Bytes: 8 kbit/s at 24 kHz, and 320 at 32 kHz, padded.
_SMALLEST_MP3_FRAME, _LARGEST_MP3_FRAME = 24, 1441
# Samples of one batch: 256 MiB.
_LARGEST_BATCH = 1 << 26
# Samples a second of recordings, the same as of `DetectorConfig.sample_rate`.
RATES = 1000, 768_000
# More columns of a two-dimensional array than this are samples, not channels.
_MOST_CHANNELS = 32
# Floats are in [-1, 1], a little more after resampling or mixing; far more is a forgotten scale.
_LARGEST_VALUE = 16.0
_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64")
_NORMAL_FOLDERS = ("good", "normal")
_DCASE_NAME = re.compile(r"section_(\d+)_(source|target)_(train|test)_(normal|anomaly)_")


class LabelledClip(NamedTuple):
    """One recording of a data set.

    `kind` names what it is: its class, its folder, "normal" or "anomaly"; `anomaly`: False for a
    normal one. `section`: the part of the test that is judged by itself, such as "00" of DCASE;
    "" where there is one. `domain`: "source" or "target" in DCASE, else "". `recording`: what the
    clip was cut from, by its number in UrbanSound8K; "" where every clip is a recording of its own.
    """

    path: str
    kind: str
    anomaly: bool
    section: str = ""
    domain: str = ""
    recording: str = ""


class Clips(Images):
    """Recordings from one source, as `Images`; made by `open_audio`.

    `batches` gives waves (n, samples); clips of different lengths stand in different batches.
    """

    unit = "clip"

    @staticmethod
    def _ahead(batch_size: int) -> int:
        return 1

    @staticmethod
    def _together(found: list[tuple[int, np.ndarray]], item: np.ndarray) -> bool:
        wave = found[0][1]
        return wave.shape == item.shape and (len(found) + 1) * item.size <= _LARGEST_BATCH


def open_audio(
    source, rate: int, window: int, step: int, *, highest: float = 0.0, strict: bool = False
) -> Clips:
    """Open a source of recordings.

    Args:
        source: a folder (searched recursively, links to folders too, in sorted order), one file,
            an array or tensor (samples,) or (N, samples) at `rate`, a pair (wave, rate of the wave)
            whose wave may have channels (the shorter axis), or a list of files, of waves or of such
            pairs. Waves are floats in [-1, 1], int16 or int32.
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
    if is_path(source):
        paths = _audio_files(os.fsdecode(source))
        strict = strict or os.path.isfile(source)
        return Clips(_FileItems(paths, rate, window, step, highest), None, strict, opened_as)
    if _is_pair(source):
        source = [source]
    elif isinstance(source, (np.ndarray, torch.Tensor)):
        if source.ndim not in (1, 2):
            raise InputError(
                f"an array of clips has shape (samples,) or (N, samples), not "
                f"{tuple(source.shape)}: reshape it, or give pairs (wave, rate)."
            )
        if source.ndim == 2 and source.shape[1] <= min(_MOST_CHANNELS, source.shape[0] - 1):
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
    files = sum(map(is_path, source))
    if files == len(source):
        items = _FileItems([os.fsdecode(path) for path in source], rate, window, step, highest)
    elif files:
        raise InputError(f"the list has {files} paths and {len(source) - files} waves: give one.")
    else:
        items = _WaveItems(list(source), rate, window, step, highest)
    return Clips(items, None, strict, opened_as)


def read_audio(path: str, rate: int, opened: Callable[[int], None] | None = None) -> np.ndarray:
    """Read one recording of at most 10 minutes: (samples,) float32 mono at `rate`.

    Channels are averaged. `opened` is called with the file's own rate.

    Raises:
        InputError: missing, no audio, damaged, empty, too long, NaN or far beyond [-1, 1]; cut off,
            where the file tells its length (OGG does not, nor does MP3 without a Xing header); a
            rate outside 1,000 to 768,000; files joined end to end to one, of which libsndfile would
            read the first (but FLAC). The file is named.
    """
    blocks = read_blocks(path, rate, LONGEST_SECONDS, opened)
    return np.concatenate([np.empty(0, np.float32), *blocks])


def read_blocks(
    path: str,
    rate: int,
    longest_seconds: float | None = None,
    opened: Callable[[int], None] | None = None,
) -> Iterator[np.ndarray]:
    """Blocks (samples,) float32 mono at `rate` of a recording of any length, in bounded memory.

    Args:
        path: the file.
        rate: samples a second of the result.
        longest_seconds: raise `InputError` for a longer recording.
        opened: called with the file's own rate.

    Raises:
        InputError: as `read_audio`.
    """
    soundfile = _package("soundfile")
    try:
        _check_length(path)  # and libsndfile's own message tells no reason why a file is unreadable
        source = _uncounted_mp3(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error
    fault = "is not a recording that libsndfile can read"
    try:
        # As bytes: soundfile takes no name that is not UTF-8 otherwise.
        with soundfile.SoundFile(os.fsencode(path) if source is None else source) as file:
            fault = "is damaged or cut off"
            own, channels, frames = file.samplerate, file.channels, file.frames
            counted, read = frames < _UNCOUNTED, 0
            if not counted and source is None:
                raise InputError(
                    f"{path} does not tell its length, as FLAC that was written to a pipe: encode "
                    "it anew into a file."
                )
            longest = math.inf if longest_seconds is None else longest_seconds * own
            resampler = Resampler(own, rate, path)
            if opened is not None:
                opened(own)
            while read < frames:
                block = file.read(max(1, _BLOCK // channels), dtype="float32", always_2d=True)
                if not len(block):
                    break
                read += len(block)
                if (found := frames if counted else read) > longest:
                    raise InputError(
                        f"{path} is {found / own:.0f} s long and clips may have "
                        f"{longest_seconds:g} s: cut it, or pass its blocks "
                        "(data.audio.read_blocks) to Detector.stream."
                    )
                yield resampler.push(_mono(block, path))
            if not read:
                raise InputError(f"{path} holds no samples: replace or remove it.")
            if counted and read < frames:
                raise InputError(
                    f"{path} is cut off after {read / own:.3g} of {frames / own:.3g} s: "
                    "replace or remove it."
                )
            yield resampler.finish()
    except soundfile.LibsndfileError as error:
        why = error.error_string
        if "does not exist" in why:  # libsndfile's reason for what no decoder of MP3 knows
            why = "Format not recognised."
        raise InputError(f"{path} {fault} ({why}): convert, replace or remove it.") from None


def _check_length(path: str) -> None:
    """Raise InputError for a file that says it is longer, or in which another one follows:
    libsndfile takes what is there, and no more than the first."""
    with open(path, "rb") as file:
        head = file.read(28)
        size = os.fstat(file.fileno()).st_size
        if head[:4] == b"OggS" and _is_chained(file):
            raise _joined(path)
        form, place, outside = _LENGTHS.get(head[:4], (None, 0, 0))
        if form is None or len(head) < place + struct.calcsize(form):
            return
        said = sum(struct.unpack_from(form, head, place)) + outside
        # Who writes to a pipe does not know the length, and puts 0 or the largest number there,
        # some with a sign. Others count a last byte that makes the length even, and leave it out.
        largest = 0x7F00_0000 if form[-1] == "I" else 1 << 62
        if size + 1 < said < largest:
            raise InputError(
                f"{path} is cut off: it has {size} of {said} bytes; replace or remove it."
            )
        if len(head) < said < size:
            file.seek(said)
            if head[:4] in file.read(5):  # a last byte that was left out may stand before it
                raise _joined(path)


def _joined(path: str) -> InputError:
    return InputError(
        f"{path} goes on after its end, as files that were joined do, and only the first would be "
        "heard: write them as one recording, or as several files."
    )


def _is_chained(file) -> bool:
    """Does a stream of this OGG file begin after another one? (RFC 3533: those of one link of a
    chain all begin before any goes on.)"""
    file.seek(0)
    gone_on = False
    while len(page := file.read(27)) == 27 and page[:4] == b"OggS":
        begins = page[5] & 2
        if begins and gone_on:
            return True
        gone_on |= not begins
        file.seek(sum(file.read(page[26])), os.SEEK_CUR)
    return False


def _uncounted_mp3(path: str) -> int | None:
    """A pipe with what an MP3 file holds after its tags, if it has no count of its frames (a Xing
    header); None for other files.

    Of such a file libsndfile would guess the length by its first frame, and read no further: of a
    variable bit rate a part, or less than there seems to be. In a pipe it looks for the end.
    """
    with open(path, "rb") as file:
        start, frame = _mp3_frame(file, 0)
        count = max(frame.find(name, 0, 64) for name in (b"Xing", b"Info"))
        if count >= 0:
            # Flags; if the first is set the number of frames, if the second is that of bytes.
            flags = int.from_bytes(frame[count + 4 : count + 8], "big")
            place = count + 8 + 4 * (flags & 1)
            said = int.from_bytes(frame[place : place + 4], "big") if flags & 2 else 0
            # Some leave out the frame with the count: then one more follows, and perhaps a tag.
            after = _mp3_frame(file, start + said)[1] if said else b""
            layer_3 = after[1:2] and after[1] & 6 == 2
            if layer_3 and after.find(after[:2], _SMALLEST_MP3_FRAME) > 0:
                raise _joined(path)
    if not frame or count >= 0:
        return None
    reading, writing = os.pipe()

    def feed() -> None:
        with open(writing, "wb") as pipe, open(path, "rb") as file, suppress(BrokenPipeError):
            file.seek(start)
            shutil.copyfileobj(file, pipe)

    threading.Thread(target=feed, name="diffad-fast-feed", daemon=True).start()
    return reading


def _mp3_frame(file, place: int) -> tuple[int, bytes]:
    """Where a frame of MP3 begins, at ``place`` or after the tags there, and what the file holds
    from there, a little more than one frame at most; nothing if no frame begins."""
    for _ in range(64):  # more tags are none
        file.seek(place)
        found = file.read(_LARGEST_MP3_FRAME + 64)
        if found[:3] == b"ID3":  # its length in 7 bits of each byte, and a foot by a flag
            place += 10 + sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(found[6:10]))
            place += 10 if found[5:6] and found[5] & 16 else 0
        elif found[:3] == b"TAG":  # of ID3's first version
            place += 128
        elif found[:8] == b"APETAGEX":
            place += 32 + int.from_bytes(found[12:16], "little")
        elif found[:1] == b"\xff" and found[1:2] >= b"\xe0":
            return place, found
        else:
            break
    return place, b""


def check_rate(rate, name: str) -> None:
    """Raise InputError unless `rate` is a number of samples a second within RATES."""
    number = isinstance(rate, (int, float, np.number)) and not isinstance(rate, (bool, np.bool_))
    if not number or not RATES[0] <= rate <= RATES[1]:
        raise InputError(
            f"{name} has the rate {rate!r}: give samples a second, {RATES[0]:,} to {RATES[1]:,}."
        )


class Resampler:
    """Blocks of a wave at one rate to blocks at another, without seams.

    Raises InputError, naming `name`, for a source_rate outside RATES, and BackendError where the
    rates differ and soxr is not installed.
    """

    def __init__(self, source_rate: float, rate: int, name: str):
        check_rate(source_rate, name)
        self._stream = None
        if source_rate != rate:
            soxr = _package("soxr")
            self._stream = soxr.ResampleStream(source_rate, rate, 1, dtype="float32")

    def push(self, wave: np.ndarray) -> np.ndarray:
        """What can be given after one more block (samples,) float32."""
        return wave if self._stream is None else self._stream.resample_chunk(wave)

    def finish(self) -> np.ndarray:
        """The rest."""
        none = np.empty(0, np.float32)
        return none if self._stream is None else self._stream.resample_chunk(none, last=True)


def resampling_delay(source_rate: float, rate: int) -> float:
    """Seconds by which a `Resampler` lags behind at most, whatever the size of the chunks."""
    if source_rate == rate:
        return 0.0
    # soxr does not tell it, so it is measured. Its filters take up to 1.4 s, and its blocks drift
    # against the samples for some seconds more.
    resampler, longest, given, found = Resampler(source_rate, rate, "the delay"), 0.0, 0, 0
    block = np.zeros(math.ceil(source_rate / 1000), np.float32)
    while given < 10 * source_rate:
        given += len(block)
        # Before the block's last sample is there, when none of its results are.
        longest = max(longest, given / source_rate - found / rate)
        found += len(resampler.push(block))
    return longest


def extended(wave: np.ndarray, window: int, step: int) -> np.ndarray:
    """The wave (samples,) at a length of window + k step: repeated up to a window, or its end
    mirrored."""
    short = len(wave)
    target = window + max(0, -(-(short - window) // step)) * step
    if short == target:
        return wave
    if short < window:
        return np.resize(wave, window)
    return np.pad(wave, (0, target - short), mode="reflect")


class _Items:
    def __init__(self, rate: int, window: int, step: int, highest: float):
        self._rate, self._shape, self._highest = rate, (window, step), highest
        self._warned: dict[str, object] = {}

    def _warn_once(self, what: str, text: str) -> None:
        """Of each kind of recording one is named; threads read them, so not always the first."""
        token = object()
        if self._warned.setdefault(what, token) is token:
            warnings.warn(text, stacklevel=3)

    def _hear(self, own: float, name: str) -> None:
        """Warn of recordings in which a part of what the detector listens to is missing."""
        # Between what a filter leaves and half of the rate nothing sounds different.
        if own / 2 < 0.9 * self._highest:
            self._warn_once(
                "rate",
                f"{name} was sampled {own:g} times a second and holds nothing above {own / 2:g} "
                f"Hz, and the detector listens up to {self._highest:g} Hz: such recordings sound "
                f"anomalous to one fitted on others; fit with fmax={own / 2:g}",
            )

    def _extended(self, wave: np.ndarray, name: str) -> np.ndarray:
        """The wave at the length of whole windows; warn of those that are repeated for that."""
        window = self._shape[0]
        if len(wave) < window:
            self._warn_once(
                "length",
                f"{name} lasts {len(wave) / self._rate:.3g} s, less than the detector's window of "
                f"{window / self._rate:.3g} s, and is repeated to fill it: that can be heard, so "
                "such clips sound anomalous to a detector fitted on longer ones; fit with a "
                "smaller window_frames",
            )
        return extended(wave, *self._shape)


class _FileItems(_Items):
    quick = False

    def __init__(self, paths: list[str], *shape):
        _package("soundfile")
        super().__init__(*shape)
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> np.ndarray:
        path = self.paths[index]
        wave = read_audio(path, self._rate, lambda own: self._hear(own, path))
        if not len(wave):
            raise InputError(f"{path} is shorter than one sample: remove it.")
        return self._extended(wave, path)


class _WaveItems(_Items):
    """Waves, or pairs (wave, rate), each checked when it is read."""

    def __init__(self, waves: list, *shape):
        super().__init__(*shape)
        self._waves = waves
        self.quick = not any(_is_pair(wave) and wave[1] != self._rate for wave in waves)
        """Whether nothing is resampled: a wave is read sooner than a thread is started."""

    def __len__(self) -> int:
        return len(self._waves)

    def read(self, index: int) -> np.ndarray:
        name, wave, own = f"clip {index}", self._waves[index], self._rate
        if _is_pair(wave):
            wave, own = wave
        check_rate(own, name)
        self._hear(own, name)
        return self._extended(_resampled(as_mono(wave, name), own, self._rate, name), name)


def _resampled(wave: np.ndarray, own: float, rate: int, name: str) -> np.ndarray:
    if len(wave) > LONGEST_SECONDS * own:
        raise InputError(
            f"{name} is {len(wave) / own:.0f} s long and clips may have {LONGEST_SECONDS:g} s: cut "
            "it, or pass it to Detector.stream in blocks."
        )
    resampler = Resampler(own, rate, name)
    wave = np.concatenate([resampler.push(wave), resampler.finish()])
    if not len(wave):
        raise InputError(f"{name} is shorter than one sample at {rate} Hz: leave it out.")
    return wave


def as_mono(wave, name: str, *, channels_last: bool = False) -> np.ndarray:
    """A wave as (samples,) float32; channels are averaged. Of two axes these are the shorter one,
    or always the last, where a wave may be shorter than it has channels.

    Raises InputError for another shape or dtype, no samples, NaN, or values far beyond [-1, 1].
    """
    if isinstance(wave, torch.Tensor):
        wave = wave.detach().cpu()
        wave = (wave.float() if wave.dtype == torch.bfloat16 else wave).numpy()
    if not isinstance(wave, np.ndarray):
        raise InputError(
            f"{name} is a {type(wave).__name__}: give an array or a tensor"
            + ("." if channels_last else ", or a pair (wave, rate).")
        )
    if wave.ndim not in (1, 2):
        raise InputError(f"{name} has shape {wave.shape}: a wave has (samples,) or channels too.")
    if 0 in wave.shape:
        raise InputError(f"{name} of shape {wave.shape} holds no samples: leave it out.")
    if wave.dtype.kind == "i" and wave.dtype.itemsize in (2, 4):
        wave = wave / np.float32(-float(np.iinfo(wave.dtype).min))
    elif wave.dtype.kind != "f":
        raise InputError(
            f"{name} has dtype {wave.dtype}: convert it to floats in [-1, 1], int16 or int32."
        )
    if channels_last and wave.ndim == 2 and wave.shape[1] > _MOST_CHANNELS:
        raise InputError(
            f"{name} of shape {wave.shape} would have {wave.shape[1]} channels, more than "
            f"{_MOST_CHANNELS}: transpose it, or mix it down."
        )
    if not channels_last and wave.ndim == 2 and wave.shape[0] < wave.shape[1]:
        wave = wave.T
    return _mono(wave[:, None] if wave.ndim == 1 else wave, name)


def _mono(wave: np.ndarray, name: str) -> np.ndarray:
    """(samples, channels) of floats to (samples,) float32, unless they are of no use."""
    wave = wave[:, 0] if wave.shape[1] == 1 else wave.mean(axis=1)
    wave = np.ascontiguousarray(wave, dtype=np.float32)
    peak = np.abs(wave).max(initial=0)
    if not np.isfinite(peak):
        raise InputError(f"{name} has NaN or infinite samples: replace them or leave it out.")
    if peak > _LARGEST_VALUE:
        raise InputError(
            f"{name} has samples up to {peak:.6g}: floats must lie in [-1, 1], so rescale them."
        )
    return wave


# ---------------------------------------------------------------- layouts


def training_clips(
    root: str, layout: str = "auto", normal: str | None = None, folds: Sequence[int] | None = None
) -> list[LabelledClip]:
    """The normal clips to train on; arguments and errors as in `labelled_clips`.

    A plain folder gives root/train/good or root/train/normal, all of root/train, or all that it
    holds. Raises `InputError` where a folder test or ground_truth lies anywhere below that.
    """
    root = os.fsdecode(root)
    layout = _layout(root, layout)
    if layout == "urbansound8k":
        clips = [c for c in _urbansound8k(root, normal, folds) if not c.anomaly]
        if not clips:
            where = ", ".join(map(str, folds))
            raise InputError(f"there is no clip of {normal} in fold {where} of {root}.")
        return clips
    _check_plain(layout, normal, folds)
    if layout == "dcase":
        return [c for c in _dcase(root, "train") if not c.anomaly]
    parts = [os.path.join(root, "train", name) for name in (*_NORMAL_FOLDERS, "")]
    folder = next(filter(os.path.isdir, parts), root)
    check_no_test(folder, "recordings")
    return [LabelledClip(path, "normal", False) for path in _audio_files(folder)]


def groups_by_recording(clips: Sequence[LabelledClip]) -> list[str] | None:
    """The ``groups`` of ``Detector.fit``: clips cut from one recording resemble each other, and are
    to be held out together. None where every clip is a recording of its own."""
    groups = [clip.recording or clip.path for clip in clips]
    return groups if len(set(groups)) < len(groups) else None


def labelled_clips(
    root: str, layout: str = "auto", normal: str | None = None, folds: Sequence[int] | None = None
) -> list[LabelledClip]:
    """The labelled test recordings of a data set.

    Args:
        root: its folder.
        layout: "urbansound8k": audio/foldN and metadata/*.csv. "dcase", of one machine type in Task
            2: test/section_00_source_test_normal_*.wav and train/. "folder": test/good or
            test/normal, and test/<kind> for each kind of anomaly. "auto": what is found.
        normal: the class that is normal in UrbanSound8K, by name or number; all others are
            anomalous. Only for that layout.
        folds: its folds, by number; None: all. Only for that layout.

    Raises:
        InputError: the layout, the class or the folds are not there.
    """
    root = os.fsdecode(root)
    layout = _layout(root, layout)
    if layout == "urbansound8k":
        return _urbansound8k(root, normal, folds)
    _check_plain(layout, normal, folds)
    return _dcase(root, "test") if layout == "dcase" else _folders(root)


def _layout(root: str, layout: str) -> str:
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}: choose {', '.join(LAYOUTS)}")
    if not os.path.isdir(root):
        raise InputError(f"{root} is not a folder: give the root of a data set.")
    if layout != "auto":
        return layout
    if os.path.isdir(os.path.join(root, "metadata")) and os.path.isdir(os.path.join(root, "audio")):
        return "urbansound8k"
    for part in ("train", "test"):
        folder = os.path.join(root, part)
        if os.path.isdir(folder) and any(map(_DCASE_NAME.match, os.listdir(folder))):
            return "dcase"
    return "folder"


def _check_plain(layout: str, normal: str | None, folds: Sequence[int] | None) -> None:
    if normal is not None or folds is not None:
        raise InputError(
            f"a normal class and folds are for the layout urbansound8k, and this is {layout}: "
            "leave them out."
        )


def _urbansound8k(root: str, normal: str | None, folds: Sequence[int] | None) -> list[LabelledClip]:
    tables = sorted(Path(root, "metadata").glob("*.csv"))
    if not tables:
        raise InputError(f"{root} has no metadata/*.csv: it is not in the UrbanSound8K layout.")
    try:
        with open(tables[0], newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except UnicodeDecodeError:
        raise InputError(f"{tables[0]} is not in UTF-8: convert it.") from None
    needed = {"slice_file_name", "fsID", "fold", "classID", "class"}
    if not rows or not needed <= set(rows[0]):
        raise InputError(f"{tables[0]} lacks one of the columns {', '.join(sorted(needed))}.")
    for number, row in enumerate(rows, 1):
        if any(row[name] is None for name in needed):
            raise InputError(f"row {number} of {tables[0]} is too short: complete or remove it.")
    names = {row["classID"]: row["class"] for row in rows}
    normal = names.get(str(normal), normal)
    if normal not in names.values():
        raise InputError(
            f"{root} is in the UrbanSound8K layout and its normal class is {normal!r}: choose one "
            f"of {', '.join(sorted(names.values()))}, from a shell by --layout urbansound8k "
            "--normal CLASS, in evaluate by normal=, for fit by the paths of "
            "data.audio.training_clips(root, normal=CLASS)."
        )
    known = {row["fold"] for row in rows}
    wanted = known if folds is None else {str(fold) for fold in folds}
    if not wanted <= known:
        raise InputError(
            f"there is no fold {', '.join(sorted(wanted - known))}: {root} has {len(known)} folds."
        )
    return [
        LabelledClip(
            os.path.join(root, "audio", f"fold{row['fold']}", row["slice_file_name"]),
            row["class"],
            row["class"] != normal,
            recording=row["fsID"],
        )
        for row in rows
        if row["fold"] in wanted
    ]


def _dcase(root: str, part: str) -> list[LabelledClip]:
    folder = os.path.join(root, part)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = [(name, match) for name in names if (match := _DCASE_NAME.match(name))]
    if not found:
        raise InputError(
            f"{folder} holds no section_NN_source_{part}_normal_*: it is not in the layout of "
            "DCASE Task 2."
        )
    return [
        LabelledClip(
            os.path.join(folder, name), match[4], match[4] == "anomaly", *match.group(1, 2)
        )
        for name, match in found
    ]


def _folders(root: str) -> list[LabelledClip]:
    test = os.path.join(root, "test")
    if not os.path.isdir(test):
        raise InputError(
            f"{root} has no folder test: evaluation needs test/good or test/normal, and "
            "test/<kind> for each kind of anomaly."
        )
    found = []
    for kind in sorted(os.listdir(test)):
        folder = os.path.join(test, kind)
        if kind.startswith(".") or not os.path.isdir(folder):
            continue
        for path in sorted(os.path.join(folder, n) for n in os.listdir(folder) if _is_audio(n)):
            found.append(LabelledClip(path, kind, kind not in _NORMAL_FOLDERS))
    if not found:
        raise InputError(
            f"{test} holds no recordings: it needs folders of them, such as test/good."
        )
    return found


def _audio_files(source: str) -> list[str]:
    found = files_below(source, _is_audio)
    if not found:
        raise InputError(
            f"{source} holds no recordings: give a folder with files {', '.join(_SUFFIXES)} in it."
        )
    return found


def _is_audio(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(_SUFFIXES)


def _is_pair(value) -> bool:
    """(wave, rate)?"""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], (np.ndarray, torch.Tensor))
        and getattr(value[1], "ndim", 0) == 0  # two waves otherwise
    )


@cache
def _package(name: str):
    try:
        return __import__(name)
    except ImportError as error:
        raise BackendError(
            f"audio needs the package {name} ({error}): pip install 'diffad_fast[audio]'"
        ) from None
