"""Files of recordings: read by soundfile (WAV, FLAC, OGG, MP3), and checked for what libsndfile
would leave out without a word.

`read_audio` alone decides what a usable recording is.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress

import numpy as np

from ..errors import InputError
from .folders import check_regular, files_below, is_open_file
from .resampling import Resampler, audio_package
from .waves import mono

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
# Of those that are made of chunks: the head of one, where the first begins, to what their lengths
# are filled up, and what the chunk of the sound is called.
_CHUNKS = {
    b"RIFF": ("<4sI", 12, 2, b"data"), b"RIFX": (">4sI", 12, 2, b"data"),
    b"RF64": ("<4sI", 12, 2, b"data"), b"riff": ("<16sQ", 40, 8, b"data"),
    b"FORM": (">4sI", 12, 2, b"SSND"),
}  # fmt: skip
# Bytes: 8 kbit/s at 24 kHz, and 320 at 32 kHz, padded.
_SMALLEST_MP3_FRAME, _LARGEST_MP3_FRAME = 24, 1441
_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".w64")


def read_audio(
    source, rate: int, heard: Callable[[int, np.ndarray], None] | None = None,
    name: str | None = None,
) -> np.ndarray:  # fmt: skip
    """Read one recording of at most 10 minutes: (samples,) float32 mono at `rate`.

    Channels are averaged. `source`, `heard` and `name` are those of `read_blocks`.

    Raises:
        InputError: missing, no audio, damaged, empty, too long, NaN or far beyond [-1, 1]; cut off,
            where the file tells its length (OGG does not, nor does MP3 without a Xing header); a
            rate outside 1,000 to 768,000; files joined end to end to one, of which libsndfile would
            read the first (but FLAC); an open file that has no way back to its beginning. The file
            is named.
    """
    blocks = read_blocks(source, rate, LONGEST_SECONDS, heard, name)
    return np.concatenate([np.empty(0, np.float32), *blocks])


def read_blocks(
    source,
    rate: int,
    longest_seconds: float | None = None,
    heard: Callable[[int, np.ndarray], None] | None = None,
    name: str | None = None,
) -> Iterator[np.ndarray]:
    """Blocks (samples,) float32 mono at `rate` of a recording of any length, in bounded memory.

    Args:
        source: the file's path, or an open binary file, which is read from its beginning.
        rate: samples a second of the result.
        longest_seconds: raise `InputError` for a longer recording.
        heard: called with the file's own rate and each block at that rate.
        name: what errors call a file that has no path.

    Raises:
        InputError: as `read_audio`.
    """
    soundfile = audio_package("soundfile")
    path = source if name is None else name
    try:
        with _opened(source, path) as file:
            _check_length(file, path)  # libsndfile's message tells no reason for an unreadable file
            pipe = _uncounted_mp3(file, source, path)
            if is_open_file(source):
                file.seek(0)
    except InputError:
        raise
    except ValueError as error:  # of an open file: closed, or of what comes once
        raise InputError(
            f"{path} is a file that cannot be read again ({error}): give io.BytesIO of its content."
        ) from None
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error
    if pipe is not None:
        opened = pipe
    else:  # a path as bytes: soundfile takes no name that is not UTF-8 otherwise
        opened = source if is_open_file(source) else os.fsencode(source)
    fault = "is not a recording that libsndfile can read"
    try:
        with soundfile.SoundFile(opened) as file:
            fault = "is damaged or cut off"
            own, channels, frames = file.samplerate, file.channels, file.frames
            counted, read, given = frames < _UNCOUNTED, 0, 0
            if not counted and pipe is None:
                raise _uncounted(path)
            longest = math.inf if longest_seconds is None else longest_seconds * own
            resampler = Resampler(own, rate, path)
            while read < frames:
                block = file.read(max(1, _BLOCK // channels), dtype="float32", always_2d=True)
                if not len(block):
                    break
                read += len(block)
                if (found := frames if counted else read) > longest:
                    raise InputError(
                        f"{path} is {found / own:.0f} s long and clips may have "
                        f"{longest_seconds:g} s: fit on it by data.audio.cut_recordings, in a "
                        "shell --clip-seconds, and score its windows by Detector.stream of "
                        "data.audio.read_blocks, in a shell --windows."
                    )
                wave = mono(block, path)
                if heard is not None:
                    heard(own, wave)
                wave = resampler.push(wave)
                given += len(wave)
                yield wave
            if not read:
                raise InputError(f"{path} holds no samples: replace or remove it.")
            if counted and read < frames:
                raise InputError(
                    f"{path} is cut off after {read / own:.3g} of {frames / own:.3g} s: "
                    "replace or remove it."
                )
            wave = resampler.finish()
            if not given + len(wave):
                raise InputError(f"{path} is shorter than one sample: remove it.")
            yield wave
    except soundfile.LibsndfileError as error:
        why = error.error_string
        if "does not exist" in why:  # libsndfile's reason for what no decoder of MP3 knows
            why = "Format not recognised."
        raise InputError(f"{path} {fault} ({why}): convert, replace or remove it.") from None


def audio_files(source: str) -> list[str]:
    found = files_below(source, is_audio)
    if not found:
        raise InputError(
            f"{source} holds no recordings: give a folder with files {', '.join(_SUFFIXES)} in it."
        )
    return found


def is_audio(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(_SUFFIXES)


def _opened(source, path: str):
    """A context with the open file, at any place."""
    if not is_open_file(source):
        check_regular(source)
        return open(source, "rb")
    if isinstance(source.read(0), str):
        raise InputError(f"{path} is open as text: open it with the mode 'rb'.")
    return nullcontext(source)


def _check_length(file, path: str) -> None:
    """Raise InputError for a file whose sound says it is longer, or in which another one follows:
    libsndfile takes what is there, and no more than the first."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(0)
    head = file.read(36)
    if head[:4] == b"OggS" and _is_chained(file):
        raise _joined(path)
    form, place, outside = _LENGTHS.get(head[:4], (None, 0, 0))
    if form is None or len(head) < place + struct.calcsize(form):
        return
    said = sum(struct.unpack_from(form, head, place)) + outside
    begin, length = _sound(file, head, size)
    # Who writes to a pipe does not know the length, and puts 0 or the largest number there, some
    # with a sign. Others count a last byte that makes the length even, and leave it out. What is
    # said of the whole file is wrong more often, and without harm.
    largest = 0x7F00_0000 if form[-1] == "I" else 1 << 62
    if length < largest and size + 1 < begin + length:
        raise InputError(
            f"{path} is cut off: it has {size} of {begin + length} bytes; replace or remove it."
        )
    file.seek(begin)
    if not length and not file.read(4).decode("latin-1").isprintable():  # no further chunk
        raise _uncounted(path)
    if len(head) < said < size:
        file.seek(said)
        if head[:4] in file.read(5):  # a last byte that was left out may stand before it
            raise _joined(path)


def _sound(file, head: bytes, size: int) -> tuple[int, int]:
    """Where the sound begins and how many bytes it says it has, of a file of `size` bytes that
    begins with `head`; its end and none if there is no sound in it."""
    if head[:4] == b".snd":
        return struct.unpack_from(">II", head, 4)
    form, place, unit, sound = _CHUNKS[head[:4]]
    outside = struct.calcsize(form)
    while place + outside <= size:
        file.seek(place)
        name, length = struct.unpack(form, file.read(outside))
        if not name.strip(b"\0"):  # zeros, as in place of what was never written
            break
        if unit == 8:  # its own head counts, too
            length = max(0, length - outside)
        if name[:4] == sound:
            if head[:4] == b"RF64" and length == 0xFFFF_FFFF and len(head) == 36:
                (length,) = struct.unpack_from("<Q", head, 28)
            return place + outside, length
        place += outside + -(-length // unit) * unit
    return size, 0


def _uncounted(path: str) -> InputError:
    return InputError(
        f"{path} does not tell its length, as files that were written to a pipe: encode it anew "
        "into a file."
    )


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


def _uncounted_mp3(file, source, path: str) -> int | None:
    """A pipe with what an MP3 file holds after its tags, if it has no count of its frames (a Xing
    header); None for other files.

    Of such a file libsndfile would guess the length by its first frame, and read no further: of a
    variable bit rate a part, or less than there seems to be. In a pipe it looks for the end.
    """
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
    file.seek(start)
    content = io.BytesIO(file.read()) if is_open_file(source) else None
    reading, writing = os.pipe()

    def feed() -> None:
        with open(writing, "wb") as pipe, suppress(BrokenPipeError):
            if content is not None:  # a file has one place, and is not the thread's
                shutil.copyfileobj(content, pipe)
                return
            with open(source, "rb") as own:
                own.seek(start)
                shutil.copyfileobj(own, pipe)

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
