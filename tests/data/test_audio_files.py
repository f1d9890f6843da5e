from __future__ import annotations

import io
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
from recordings import RATE, save, soundfile, tone

from diffad_fast.data.audio import read_audio, read_blocks
from diffad_fast.errors import InputError


def test_blocks_of_a_long_file_take_bounded_memory(tmp_path):
    path = str(tmp_path / "long.wav")
    with soundfile.SoundFile(path, "w", 48000, 2, subtype="PCM_16") as file:
        for _ in range(40):
            file.write(np.zeros((480_000, 2), np.int16))  # 400 s, 150 MB as floats
    tracemalloc.start()
    samples = sum(len(block) for block in read_blocks(path, RATE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert abs(samples - 400 * RATE) <= 1
    assert peak < 40e6
    with pytest.raises(InputError, match=r"long\.wav is 400 s long and clips may have 300 s"):
        list(read_blocks(path, RATE, 300))


def test_a_wav_file_that_was_cut_off(tmp_path):
    whole = Path(save(tmp_path / "whole.wav", tone())).read_bytes()
    (tmp_path / "unpadded.wav").write_bytes(whole[:-1])  # as where a last, even byte was left out
    assert len(read_audio(str(tmp_path / "unpadded.wav"), RATE)) >= RATE - 1
    for length in (44, len(whole) // 2, len(whole) - 2):
        (tmp_path / "cut.wav").write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"cut off: it has {length} of {len(whole)}") as caught:
            read_audio(str(tmp_path / "cut.wav"), RATE)
        assert "read again" not in str(caught.value)


def test_a_recording_of_less_than_a_sample(tmp_path):
    path = save(tmp_path / "a.wav", np.zeros(1), 768_000)
    for source, name in ((path, None), (io.BytesIO(Path(path).read_bytes()), "clip 3")):
        with pytest.raises(InputError, match=f"{name or path} is shorter than one sample"):
            read_audio(source, 1000, name=name)


def test_the_chunk_of_the_sound_says_how_long_a_wav_file_is(tmp_path):
    path = tmp_path / "a.wav"
    whole = Path(save(path, tone())).read_bytes()
    expected, end, after = read_audio(str(path), RATE), len(whole), b"LIST\x1a\0\0\0INFOISFT"

    def file(of_all: int, of_sound: int = end - 44, content: bytes = whole) -> str:
        sizes = [number.to_bytes(4, "little") for number in (of_all, of_sound)]
        path.write_bytes(content[:4] + sizes[0] + content[8:40] + sizes[1] + content[44:])
        return str(path)

    nothing, unknown, sox = 0, 0xFFFF_FFFF, 0x7FFF_F000
    for of_all in (nothing, 1000, end - 8, 2 * end, sox, unknown):
        for content in (whole, whole + after):  # of which the end was lost, and no sound
            assert np.array_equal(read_audio(file(of_all, content=content), RATE), expected)
        for cut in (file(of_all, content=whole[: end // 2]), file(of_all, 2 * end)):
            with pytest.raises(InputError, match=r"a\.wav is cut off: it has \d+ of \d+ bytes"):
                read_audio(cut, RATE)
        # What writers to a pipe put there, which do not know the length.
        for of_sound in (sox, unknown):
            assert np.array_equal(read_audio(file(of_all, of_sound), RATE), expected)
        with pytest.raises(InputError, match=r"a\.wav does not tell its length"):
            read_audio(file(of_all, nothing), RATE)
        with pytest.raises(InputError, match=r"a\.wav holds no samples"):
            read_audio(file(of_all, nothing, whole[:44] + after), RATE)


def test_a_chunk_longer_than_any_file(tmp_path):
    path = Path(save(tmp_path / "a", tone(), format="W64"))
    content = bytearray(path.read_bytes())
    content[56:64] = b"\xff" * 8  # of the first
    path.write_bytes(content)
    with pytest.raises(InputError, match="a is not a recording that libsndfile can read"):
        read_audio(str(path), RATE)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("AIFF", {}), ("AU", {}), ("W64", {}), ("RF64", {}), ("WAV", {"endian": "BIG"}),
        ("AIFF", {"subtype": "PCM_U8"}), ("W64", {"subtype": "PCM_24"}),
    ],
)  # fmt: skip
def test_other_files_that_were_cut_off(tmp_path, form, options):
    wave = tone()[:-3]  # an odd number of bytes, of 8 bits each
    path = Path(save(tmp_path / "whole", wave, format=form, **options))
    assert len(read_audio(str(path), RATE)) - len(wave) in (0, 1)  # libsndfile hears AIFF's padding
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"cut off: it has {length} of {len(whole)}"):
            read_audio(str(path), RATE)


def test_an_aiff_file_from_a_pipe_is_read(tmp_path):
    path = Path(save(tmp_path / "piped.aiff", tone(), subtype="PCM_16"))
    content, most = bytearray(path.read_bytes()), 0x7F00_0000  # what SoX puts there
    frames, sound = content.index(b"COMM") + 10, content.index(b"SSND") + 4
    for place, value in ((4, most + 46), (frames, most // 2), (sound, most + 8)):
        content[place : place + 4] = value.to_bytes(4, "big")
    path.write_bytes(content)
    assert len(read_audio(str(path), RATE)) == RATE


@pytest.mark.parametrize("rate_of_bits", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("louder", [slice(0, 10), slice(10, 20)])
def test_an_mp3_file_without_a_count_is_read_to_its_end(tmp_path, rate_of_bits, louder):
    wave = 1e-3 * np.random.default_rng(0).standard_normal((20, RATE))
    wave[louder] *= 300
    whole = Path(
        save(tmp_path / "a.mp3", wave.ravel(), bitrate_mode=rate_of_bits, compression_level=0.3)
    )
    content = whole.read_bytes()
    first = content.find(content[:2], 60)  # after the frame that holds the count
    assert b"Xing" in content[:first] or b"Info" in content[:first]
    tag = b"ID3\x03\0\0\0\0\x10\0" + bytes(2048)
    for number, before in enumerate((b"", tag)):
        path = tmp_path / f"{number}.mp3"
        path.write_bytes(before + content[first:])
        found = read_audio(str(path), RATE)
        # Its first frames are those of the encoder's delay, which nothing tells now.
        assert 0 < len(found) - wave.size < 3000
        second = read_audio(str(whole), RATE)[:RATE]
        lag = np.argmax(scipy.signal.correlate(found[: 4 * RATE], second, "valid"))
        assert 0 < lag < 3000
        blocks = read_blocks(str(path), RATE)
        next(blocks)
        blocks.close()
        with pytest.raises(InputError, match=r"\.mp3 is 20 s long and clips may have 10 s"):
            list(read_blocks(str(path), RATE, 10))
    for thread in threading.enumerate():  # what fed the blocks ends with them
        if thread.name == "diffad-fast-feed":
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("WAV", {}), ("AIFF", {}), ("AU", {}), ("W64", {}), ("RF64", {}),
        ("OGG", {"subtype": "VORBIS"}), ("OGG", {"subtype": "OPUS"}),
        ("MP3", {"bitrate_mode": "CONSTANT"}), ("MP3", {"bitrate_mode": "VARIABLE"}),
    ],
)  # fmt: skip
def test_files_joined_end_to_end_are_named(tmp_path, form, options):
    """libsndfile reads the first."""
    path = Path(save(tmp_path / "joined", tone(seconds=3), format=form, **options))
    whole, tags = path.read_bytes(), [b""]
    if form == "MP3":
        ape = b"APETAGEX" + (2000).to_bytes(4, "little") + (5032).to_bytes(4, "little") + bytes(16)
        foot = b"ID3\x04\0\x10\0\0\x10\0" + bytes(2048 + 10)
        tags += [b"ID3\x03\0\0\0\0\x10\0" + bytes(2048), b"TAG" + bytes(125), ape + bytes(5032)]
        tags.append(foot)
        tags.append(tags[3] + tags[2] + tags[1])
    for tag in (*tags, bytes(8000)):  # what stands after an end otherwise
        path.write_bytes(whole + tag)
        assert len(read_audio(str(path), RATE)) >= 3 * RATE
    for between in tags:
        path.write_bytes(whole + between + whole)
        with pytest.raises(InputError, match="joined goes on after its end, as files that were jo"):
            read_audio(str(path), RATE)


def test_an_mp3_file_whose_count_leaves_a_frame_out_is_read(tmp_path):
    path = Path(save(tmp_path / "a.mp3", tone(seconds=3), bitrate_mode="CONSTANT"))
    content = bytearray(path.read_bytes())
    count = max(content.find(b"Xing"), content.find(b"Info"))
    assert content[count + 7] & 3 == 3
    assert int.from_bytes(content[count + 12 : count + 16], "big") == len(content)
    last = content.rfind(content[:2])
    content[count + 12 : count + 16] = last.to_bytes(4, "big")
    for tag in (b"", b"TAG" + bytes(125), b"APETAGEX" + bytes(8000), bytes(8000)):
        path.write_bytes(content + tag)
        assert len(read_audio(str(path), RATE)) >= 3 * RATE
    path.write_bytes(content + content)
    with pytest.raises(InputError, match="goes on after its end"):
        read_audio(str(path), RATE)


def test_an_mp3_file_cut_off_in_its_count_is_named(tmp_path):
    path = Path(save(tmp_path / "a.mp3", tone(seconds=2), bitrate_mode="VARIABLE"))
    content = path.read_bytes()
    count = max(content.find(b"Xing"), content.find(b"Info"))
    for length in range(count, count + 20):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"a\.mp3"):
            read_audio(str(path), RATE)


def test_an_ogg_file_of_two_streams_at_once_is_read(tmp_path):
    """Both begin before either goes on, so the file is no chain."""
    pages = []
    for seconds in (1, 2):
        path = Path(save(tmp_path / "a.ogg", tone(seconds=seconds)))
        content = path.read_bytes()
        second = content.index(b"OggS", 4)
        pages += [content[:second], content[second:]]
    path.write_bytes(pages[0] + pages[2] + pages[1] + pages[3])
    assert len(read_audio(str(path), RATE)) in (RATE, 2 * RATE)


def test_a_flac_file_without_a_length_is_named(tmp_path):
    path = Path(save(tmp_path / "piped.flac", tone()))
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the number of samples: 36 bits, and 0 where it is not known
    content[22:26] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"piped\.flac does not tell its length"):
        read_audio(str(path), RATE)
