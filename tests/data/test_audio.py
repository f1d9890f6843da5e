from __future__ import annotations

import os
import shutil
import threading
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch

import diffad_fast as daf
from diffad_fast.data import audio as module
from diffad_fast.data import samples
from diffad_fast.data.audio import (
    groups_by_recording,
    labelled_clips,
    open_audio,
    read_audio,
    read_blocks,
    training_clips,
)
from diffad_fast.data.resampling import Resampler, resampling_delay
from diffad_fast.data.sources import training_part
from diffad_fast.errors import InputError, SkippedInput

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

RATE, WINDOW, STEP = 16000, 4000, 1000


def tone(seconds=1.0, rate=RATE, hertz=440.0, level=0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype("f4")


def save(path: Path, wave, rate=RATE, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, **options)
    return str(path)


def opened(source, **options):
    return open_audio(source, RATE, WINDOW, STEP, **options)


def waves(source, **options) -> list[np.ndarray]:
    return [x.numpy() for batch in opened(source, **options).batches(4) for x in batch.x]


# --- what becomes of a recording


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_lossless_files_keep_every_sample(tmp_path, suffix):
    wave = np.round(tone() * 32767).astype(np.int16)
    path = save(tmp_path / f"a{suffix}", wave, subtype="PCM_16")
    assert np.array_equal(read_audio(path, RATE), wave / np.float32(32768))


@pytest.mark.parametrize("suffix", [".ogg", ".mp3"])
def test_lossy_files_sound_the_same(tmp_path, suffix):
    if suffix[1:].upper() not in soundfile.available_formats():
        pytest.skip(f"this libsndfile has no {suffix}")
    found = read_audio(save(tmp_path / f"a{suffix}", tone()), RATE)
    middle = found[4000:12000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert spectrum.argmax() == 220  # 440 Hz in half a second
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000, 192000])
def test_resampling_gives_the_tone_of_the_new_rate(tmp_path, rate):
    path = save(tmp_path / "a.wav", tone(2.0, rate), rate, subtype="FLOAT")
    found, expected = read_audio(path, RATE), tone(2.0)
    assert abs(len(found) - len(expected)) <= 1
    inside = slice(2000, -2000)  # away from the edges, where a filter rings
    assert np.abs(found[: len(expected)][inside] - expected[: len(found)][inside]).max() < 1e-4


def test_resampling_takes_off_what_cannot_be_kept(tmp_path):
    high = tone(2.0, 48000, hertz=12_000)  # would alias to 4 kHz
    found = read_audio(save(tmp_path / "a.wav", high, 48000, subtype="FLOAT"), RATE)
    assert np.abs(found[2000:-2000]).max() < 1e-4
    naive = scipy.signal.decimate(high, 3, n=1, ftype="iir")
    assert np.abs(naive[2000:-2000]).max() > 0.01


def test_channels_are_averaged(tmp_path):
    parts = np.stack([tone(hertz=100 * (c + 1)) for c in range(8)], axis=1)
    found = read_audio(save(tmp_path / "a.wav", parts, subtype="FLOAT"), RATE)
    assert np.allclose(found, parts.mean(axis=1), atol=1e-6)
    for wave in (parts, parts.T):
        (clip,) = waves((wave, RATE))
        assert np.allclose(clip[: len(found)], found, atol=1e-6)


def test_arrays_pairs_and_files_are_the_same(tmp_path):
    wave = tone()
    path = save(tmp_path / "a.wav", wave, subtype="FLOAT")
    expected = waves(path)[0]
    scaled = np.round(wave * 32767).astype(np.int16)
    sources = [wave, wave[None], torch.from_numpy(wave), [wave], (wave, RATE), [(wave, RATE)]]
    sources += [scaled, (scaled.astype(np.int32) * 65536, RATE), wave.astype(np.float64)]
    for source in sources:
        assert np.allclose(waves(source)[0], expected, atol=1e-4)
    resampled = waves((tone(1.0, 48000), 48000))[0]
    assert np.abs(resampled[2000:14000] - expected[2000:14000]).max() < 1e-4


def test_names_may_be_bytes(tmp_path):
    path = save(tmp_path / "a.wav", tone())
    for source in (os.fsencode(tmp_path), os.fsencode(path), [os.fsencode(path)]):
        assert opened(source).paths == [path]


def test_names_need_not_be_utf8(tmp_path):
    path = save(tmp_path / "a.wav", tone())
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.wav")
    shutil.copy(path, odd)
    assert np.array_equal(read_audio(odd, RATE), read_audio(path, RATE))
    assert opened(tmp_path).load() == [0, 1]


def test_lengths_are_whole_windows():
    ramp = np.arange(10_000, dtype=np.float32) / 10_000
    for length, expected in ((4000, 4000), (4001, 5000), (5000, 5000), (9999, 10_000)):
        (clip,) = waves(ramp[:length])
        assert len(clip) == expected
        assert np.array_equal(clip[:length], ramp[:length])
        added = expected - length
        assert np.array_equal(clip[length:], ramp[:length][-2 : -2 - added : -1])
    (clip,) = waves(ramp[:1500])
    assert np.array_equal(clip, np.concatenate([ramp[:1500], ramp[:1500], ramp[:1000]]))


def test_batches_keep_the_order_and_one_length():
    clips = [tone(s) for s in (0.5, 0.5, 1.0, 0.5, 0.5, 0.5)]
    batches = list(opened(clips).batches(2))
    assert [b.index.tolist() for b in batches] == [[0, 1], [2], [3, 4], [5]]
    assert [tuple(b.x.shape) for b in batches] == [(2, 8000), (1, 16000), (2, 8000), (1, 8000)]
    chosen = [b.index.tolist() for b in opened(clips).batches(4, indices=[5, 2, 0])]
    assert chosen == [[5], [2], [0]]


def test_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "_LARGEST_BATCH", 20_000)
    sizes = [len(batch.x) for batch in opened([tone(0.5)] * 5).batches(32)]
    assert sizes == [2, 2, 1]


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


# --- what is of no use


def test_bad_files_are_named(tmp_path):
    good = save(tmp_path / "good.flac", np.random.default_rng(0).uniform(-1, 1, 160_000))
    content = Path(good).read_bytes()
    cases = {
        "cut.flac": (content[: len(content) // 2], r"cut\.flac is damaged or cut off"),
        "picture.wav": (b"\xff\xd8\xff\xe0" + bytes(2000), "picture.wav is not a recording"),
        "empty.wav": (b"", "empty.wav is not a recording"),
        "head.flac": (content[:20], "head.flac"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            read_audio(str(tmp_path / name), RATE)
    save(tmp_path / "none.wav", np.empty(0, np.float32))
    with pytest.raises(InputError, match=r"none\.wav holds no samples"):
        read_audio(str(tmp_path / "none.wav"), RATE)
    for value in (np.nan, np.inf):
        wave = tone()
        wave[100] = value
        save(tmp_path / "nan.wav", wave, subtype="FLOAT")
        with pytest.raises(InputError, match=r"nan\.wav has NaN or infinite"):
            read_audio(str(tmp_path / "nan.wav"), RATE)
    with pytest.raises(InputError, match=r"absent\.wav cannot be read \(No such file"):
        read_audio(str(tmp_path / "absent.wav"), RATE)
    with pytest.raises(InputError, match="cannot be read"):
        read_audio(str(tmp_path), RATE)


def test_a_bad_file_among_good_ones_is_left_out(tmp_path):
    for i in range(3):
        save(tmp_path / "clips" / f"{i}.wav", tone(hertz=100 * (i + 1)))
    (tmp_path / "clips" / "1.wav").write_bytes(b"nothing")
    (tmp_path / "clips" / "notes.txt").write_text("no audio")
    (tmp_path / "clips" / ".hidden.wav").write_bytes(b"nothing")
    clips = opened(tmp_path / "clips")
    with pytest.warns(SkippedInput, match=r"1\.wav"):
        assert clips.load() == [0, 2]
    assert [os.path.basename(path) for path, _ in clips.skipped] == ["1.wav"]
    with pytest.raises(InputError, match=r"1\.wav"):
        opened(tmp_path / "clips", strict=True).load()


def test_silence_and_clipping_are_recordings():
    silent, clipped = np.zeros(8000, np.float32), np.clip(tone(level=4.0), -1, 1)
    found = waves([silent, clipped])
    assert np.array_equal(found[0], silent) and np.array_equal(found[1], clipped)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 3, 100), np.float32), r"shape \(samples,\) or \(N, samples\), not"),
        (np.zeros(100, np.uint8), "dtype uint8"),
        (np.full(100, 3000.0), "up to 3000"),
        (np.array([0.0, np.nan]), "NaN"),
        (np.zeros(0, np.float32), "holds no samples"),
        ((tone(), 0), "rate 0: give samples a second, 1,000 to 768,000"),
        ((tone(), float("nan")), "rate nan"),
        ((tone(), float("inf")), "rate inf"),
        ((tone(), 0.5), "rate 0.5"),
        ((tone(), True), "rate True"),
        ((tone(), "16000"), "rate '16000'"),
        (np.zeros((4000, 2), np.float32), "4000 clips of 2 samples: for one clip with channels"),
        ([], "list of clips is empty"),
        (["a.wav", tone()], "1 paths and 1 waves"),
        ([3, tone()], "clip 0 is a int"),
        (7, "cannot be read from a int"),
        ("/no/such/folder", "no file or folder"),
        ((np.zeros(601 * 1000, np.float32), 1000), "601 s long and clips may have 600 s"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(InputError, match=message):
        waves(source)


def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match="holds no recordings"):
        opened(tmp_path)


# --- layouts


@pytest.fixture
def urban(tmp_path) -> str:
    lines = ["slice_file_name,fsID,fold,classID,class"]
    for fold, name, number in ((1, "siren", 8), (1, "drilling", 4), (2, "siren", 8), (2, "dog", 3)):
        path = save(tmp_path / "audio" / f"fold{fold}" / f"{fold}-{number}-0-0.wav", tone(0.1))
        lines.append(f"{os.path.basename(path)},{fold},{fold},{number},{name}")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "UrbanSound8K.csv").write_text("\n".join(lines) + "\n")
    return str(tmp_path)


def test_urbansound8k(urban):
    for normal in ("siren", "8", 8):
        clips = labelled_clips(urban, normal=normal, folds=[2])
        assert [(c.kind, c.anomaly) for c in clips] == [("siren", False), ("dog", True)]
        assert all(os.path.isfile(clip.path) for clip in clips)
    assert len(labelled_clips(urban, "urbansound8k", "siren")) == 4
    (clip,) = training_clips(urban, normal="siren", folds=[1])
    assert clip.path.endswith(os.path.join("fold1", "1-8-0-0.wav"))
    assert clip.recording == "1" and not clip.anomaly
    for options, message in (
        ({}, "normal class is None: choose one of dog, drilling, siren, .*--normal"),
        ({"normal": "cat"}, "normal class is 'cat'"),
        ({"normal": "siren", "folds": [3]}, "no fold 3"),
        ({"normal": "siren", "layout": "mp3"}, "unknown layout 'mp3'"),
    ):
        with pytest.raises(InputError, match=message):
            labelled_clips(urban, **options)
    Path(urban, "metadata", "UrbanSound8K.csv").write_text("name\nx\n")
    with pytest.raises(InputError, match="lacks one of the columns"):
        labelled_clips(urban, normal="siren")


def test_no_class_of_urbansound8k_is_normal_unless_named(urban):
    detector = daf.Detector(kind="audio")
    with pytest.raises(InputError, match="UrbanSound8K layout .* --layout urbansound8k --normal"):
        detector.fit(urban)
    with pytest.raises(InputError, match="1 usable"):  # more are needed, and it counts them
        detector.fit([c.path for c in training_clips(urban, normal="siren", folds=[1])])


def test_clips_of_one_recording_are_one_group(urban):
    clips = labelled_clips(urban, normal="siren")
    assert groups_by_recording(clips) == ["1", "1", "2", "2"]
    assert groups_by_recording(clips[::2]) is None  # one of each


def test_dcase(tmp_path):
    for part, name in (
        ("train", "section_00_source_train_normal_0000_x.wav"),
        ("test", "section_00_source_test_normal_0000.wav"),
        ("test", "section_00_target_test_anomaly_0001.wav"),
        ("test", "section_01_target_test_normal_0002.wav"),
    ):
        save(tmp_path / part / name, tone(0.1))
    (tmp_path / "test" / "readme.wav").write_bytes(b"")
    found = [clip[1:5] for clip in labelled_clips(tmp_path)]
    assert found == [
        ("normal", False, "00", "source"),
        ("anomaly", True, "00", "target"),
        ("normal", False, "01", "target"),
    ]
    assert [os.path.basename(c.path) for c in training_clips(tmp_path)] == [
        "section_00_source_train_normal_0000_x.wav"
    ]
    with pytest.raises(InputError, match="this is dcase"):
        training_clips(tmp_path, normal="fan")


def test_plain_folders(tmp_path):
    for name in ("train/normal/0", "test/normal/1", "test/knock/2", "test/hiss/3"):
        save(tmp_path / f"{name}.wav", tone(0.1))
    found = [(clip.kind, clip.anomaly) for clip in labelled_clips(tmp_path)]
    assert found == [("hiss", True), ("knock", True), ("normal", False)]
    for folder, name in (("", "train/normal/0.wav"), ("test/hiss", "test/hiss/3.wav")):
        clips = training_clips(tmp_path / folder)
        assert [clip.path for clip in clips] == [str(tmp_path / name)]
        assert groups_by_recording(clips) is None
    with pytest.raises(InputError, match="has no folder test"):
        labelled_clips(tmp_path / "train")
    with pytest.raises(InputError, match="is not a folder"):
        labelled_clips(tmp_path / "absent")


# ---------------------------------------------------------------- rates, lengths, folders


def test_a_rate_too_low_for_the_detector_is_named_once():
    low = [(tone(rate=4000), 4000)] * 2 + [(tone(), RATE)]
    message = "clip [01] was sampled 4000 times a .* above 2000 Hz, .* up to 4000 .*fmax=2000"
    with pytest.warns(UserWarning, match=message) as found:
        list(open_audio(low, RATE, WINDOW, STEP, highest=4000.0).batches(1))
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(open_audio(low, RATE, WINDOW, STEP, highest=2000.0).batches(1))


def test_a_clip_shorter_than_a_window_is_named_once(tmp_path):
    short = [tone()[:WINDOW], tone()[: WINDOW // 2], tone()[: WINDOW // 3]]
    message = r"clip (1 lasts 0.125|2 lasts 0.0833) s, less than .* 0.25 s"
    with pytest.warns(UserWarning, match=message) as found:
        list(open_audio(short, RATE, WINDOW, STEP).batches(1))
    assert len(found) == 1
    path = save(tmp_path / "short.wav", short[1], RATE)
    with pytest.warns(UserWarning, match="short.wav lasts"):
        list(open_audio([path], RATE, WINDOW, STEP).batches(1))


@pytest.mark.parametrize("own", [1000, 2000, 4000, 8000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("size", [97, 1001])
def test_the_delay_of_resampling_is_the_largest(own, size):
    delay, resampler = resampling_delay(own, 16000), Resampler(own, 16000, "x")
    assert resampling_delay(own, own) == 0
    given, found, longest = 0, 0, 0.0
    while given < 9 * own:
        given += size
        found += len(resampler.push(np.zeros(size, np.float32)))
        longest = max(longest, given / own - found / 16000)
    assert longest <= delay < 1.1 * longest + size / own


def test_a_file_of_a_low_rate_is_named(tmp_path):
    path = save(tmp_path / "low.wav", tone(rate=4000), 4000)
    with pytest.warns(UserWarning, match="low.wav was sampled 4000 times"):
        list(open_audio([path], RATE, WINDOW, STEP, highest=4000.0).batches(1))


def test_a_wav_file_that_was_cut_off(tmp_path):
    whole = Path(save(tmp_path / "whole.wav", tone())).read_bytes()
    (tmp_path / "unpadded.wav").write_bytes(whole[:-1])  # as where a last, even byte was left out
    assert len(read_audio(str(tmp_path / "unpadded.wav"), RATE)) >= RATE - 1
    for length in (44, len(whole) // 2, len(whole) - 2):
        (tmp_path / "cut.wav").write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"cut off: it has {length} of {len(whole)} bytes"):
            read_audio(str(tmp_path / "cut.wav"), RATE)
    # What a writer to a pipe puts there, which does not know the length.
    piped = whole[:4] + b"\xff" * 4 + whole[8:40] + b"\xff" * 4 + whole[44:]
    (tmp_path / "piped.wav").write_bytes(piped)
    assert np.array_equal(
        read_audio(str(tmp_path / "piped.wav"), RATE), read_audio(str(tmp_path / "whole.wav"), RATE)
    )


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


def test_training_never_takes_a_test_folder(tmp_path):
    root = tmp_path / "machine"
    for name in ("test/anomaly_1.wav", "train/normal_1.wav", "train/deep/normal_2.wav"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        save(root / name, tone())
    names = [os.path.relpath(clip.path, root) for clip in training_clips(root)]
    assert names == ["train/deep/normal_2.wav", "train/normal_1.wav"]
    shutil.rmtree(root / "train")
    for folder in (root, tmp_path):
        with pytest.raises(InputError, match="test lies in .*: give the folder of normal rec"):
            training_clips(folder)


def test_fit_takes_what_is_normal_of_a_folder(tmp_path):
    for name in ("test/knock/1.wav", "train/good/0.wav", "train/bad/2.wav"):
        save(tmp_path / "plain" / name, tone(0.1))
    for part, name in (
        ("train", "section_00_source_train_normal_0000_x.wav"),
        ("train", "section_00_source_train_anomaly_0001_x.wav"),
        ("test", "section_00_source_test_anomaly_0000.wav"),
    ):
        save(tmp_path / "fan" / part / name, tone(0.1))
    for folder, names in (
        ("plain", ["train/good/0.wav"]),
        ("plain/test", ["knock/1.wav"]),
        ("fan", ["train/section_00_source_train_normal_0000_x.wav"]),
    ):
        found, _ = training_part("audio", os.fsencode(tmp_path / folder))
        assert found == [str(tmp_path / folder / name) for name in names]
        # More are needed, and the message counts them.
        with pytest.raises(InputError, match=f"{len(names)} usable"):
            daf.Detector(kind="audio").fit(tmp_path / folder)
    with pytest.raises(InputError, match="fan/test lies in"):
        daf.Detector(kind="audio").fit(tmp_path)


def test_waves_at_the_rate_start_no_threads(monkeypatch):
    started = []
    monkeypatch.setattr(
        samples, "ThreadPoolExecutor",
        lambda *a, **k: (started.append(a), ThreadPoolExecutor(*a, **k))[1],
    )  # fmt: skip
    slow = tone(0.5, 8000), 8000
    for source, threads in (
        ([tone(0.5)] * 3, 0), ([(tone(0.5), RATE)] * 2, 0), ([tone(0.5), slow], 1), (slow, 0),
    ):  # fmt: skip
        started.clear()
        assert [len(w) for w in waves(source)] == [8000] * (1 if source is slow else len(source))
        assert len(started) == threads


def test_bad_metadata_is_named(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "audio").mkdir()
    table = tmp_path / "metadata" / "a.csv"
    head = "slice_file_name,fsID,fold,classID,class\n"
    table.write_bytes(head.encode() + "a.wav,1,1,0,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(InputError, match="a.csv is not in UTF-8"):
        labelled_clips(tmp_path, normal="0")
    table.write_text(head + "a.wav,1,1,0,horn\nb.wav,2,1\n")
    with pytest.raises(InputError, match="row 2 of .*a.csv is too short"):
        labelled_clips(tmp_path, normal="horn")
    table.write_text(head + "a.wav,1,1,0,horn\nb.wav,2,2,1,dog\n")
    with pytest.raises(InputError, match="no clip of dog in fold 1"):
        training_clips(tmp_path, normal="dog", folds=[1])
