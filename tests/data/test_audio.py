from __future__ import annotations

import io
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import torch
from recordings import RATE, save, soundfile, tone

import diffad_fast as daf
from diffad_fast.data import audio as module
from diffad_fast.data import samples
from diffad_fast.data.audio import labelled_clips, open_audio, read_audio
from diffad_fast.data.sources import training_part
from diffad_fast.data.waves import extended
from diffad_fast.errors import InputError, SkippedInput

WINDOW, STEP = 4000, 1000


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


def test_open_files_are_what_their_paths_are(tmp_path):
    """As a service has them, from their beginning each time; also one several times, and beside
    paths."""
    forms = [".wav", ".flac", ".ogg"] + [".mp3"] * ("MP3" in soundfile.available_formats())
    paths = [save(tmp_path / f"a{form}", tone(1.1)) for form in forms]
    data = [Path(path).read_bytes() for path in paths]
    if ".mp3" in forms:  # one without a count of its frames
        data.append(data[-1][data[-1].find(data[-1][:2], 60) :])
        paths.append(str(tmp_path / "b.mp3"))
        Path(paths[-1]).write_bytes(data[-1])
    expected = waves(paths)
    files = [io.BytesIO(content) for content in data]
    files[0].read()
    files[1] = paths[1]
    found = opened([*files, files[0]])
    assert found.paths is None and len(found) == len(paths) + 1
    for _ in range(2):
        wave = [x.numpy() for batch in found.batches(4) for x in batch.x]
        for a, b in zip(wave, [*expected, expected[0]], strict=True):
            np.testing.assert_array_equal(a, b)
    with open(paths[0], "rb") as file:
        np.testing.assert_array_equal(waves(file)[0], expected[0])
        np.testing.assert_array_equal(read_audio(file, RATE), read_audio(paths[0], RATE))


def test_one_open_file_many_times_in_a_list():
    """Threads read it one after the other: it has one place."""
    file, wave = io.BytesIO(), np.random.default_rng(0).uniform(-1, 1, 40 * RATE).astype("f4")
    soundfile.write(file, wave, RATE, "FLOAT", format="WAV")
    found = waves([file] * 8)
    assert len(found) == 8 and all(np.array_equal(x[: len(wave)], wave) for x in found)


def test_unusable_open_files_are_told_by_their_place(tmp_path):
    good = Path(save(tmp_path / "a.wav", tone())).read_bytes()
    pipe, end = os.pipe()
    os.close(end)
    closed = io.BytesIO(good)
    closed.close()
    with os.fdopen(pipe, "rb") as once, open(__file__, encoding="utf-8") as text:
        for bad, message in (
            (io.BytesIO(b"no recording"), "is not a recording"),
            (io.BytesIO(), "is not a recording"),
            (io.BytesIO(good[:-200]), "is cut off"),
            (io.BytesIO(good + good), "goes on after its"),
            (once, "is a file that cannot be read again"),
            (closed, ".*read again.*closed file"),
            (text, "is open as text: open it with the mode 'rb'"),
        ):
            for source, number in (([io.BytesIO(good), bad], 1), (bad, 0)):
                with pytest.raises(InputError, match=f"clip {number} {message}"):
                    waves(source)
    for content in (good, bytearray(good), [good], [str(tmp_path), good]):
        with pytest.raises(InputError, match="bytes are no path.*io.BytesIO"):
            opened(content)
    with pytest.raises(InputError, match="has 1 files and 1 waves"):
        opened([io.BytesIO(good), tone()])


def test_recordings_are_cut_into_clips(tmp_path, monkeypatch):
    """Also those that are too long to be clips; what is left at their ends belongs to none."""
    monkeypatch.setattr("diffad_fast.data.audio_files.LONGEST_SECONDS", 1.0)
    whole = [np.random.default_rng(i).uniform(-1, 1, n).astype("f4") for i, n in
             enumerate((40_000, 12_000, 100, 24_000))]  # fmt: skip
    paths = [save(tmp_path / f"{i}.wav", w, subtype="FLOAT") for i, w in enumerate(whole)]
    (tmp_path / "2.wav").write_text("no recording")
    with pytest.warns(SkippedInput, match="left out: .*2.wav is not a recording"):
        clips, recordings = module.cut_recordings(tmp_path, RATE, 0.75)
    assert recordings == [0, 0, 0, 1, 3, 3]
    expected = [whole[0][:12_000], whole[0][12_000:24_000], whole[0][24_000:36_000], whole[1],
                whole[3][:12_000], whole[3][12_000:]]  # fmt: skip
    for clip, part in zip(clips, expected, strict=True):
        np.testing.assert_array_equal(clip, part)
    (clip,), (number,) = module.cut_recordings(paths[1:2], RATE, 5)
    assert number == 0 and np.array_equal(clip, whole[1])
    for source, seconds, message in (
        (paths[2], 1, "2.wav is not a recording"), (paths[:1], 0, "clips of 0 s cannot be cut"),
        (paths[:1], 601, "at most 600"), (paths[:1], float("nan"), "clips of nan s"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            module.cut_recordings(source, RATE, seconds)
    with pytest.warns(SkippedInput), pytest.raises(InputError, match="none of the 1 files is a us"):
        module.cut_recordings(paths[2:3], RATE, 1)


def test_open_files_are_cut_into_clips(tmp_path):
    path = save(tmp_path / "a.wav", tone())
    content = Path(path).read_bytes()
    expected, _ = module.cut_recordings(path, RATE, 0.4)
    for source in (io.BytesIO(content), [io.BytesIO(content)]):
        clips, recordings = module.cut_recordings(source, RATE, 0.4)
        assert recordings == [0, 0] and np.array_equal(clips, expected)
    for source in (io.BytesIO(b"no sound"), [io.BytesIO(b"no sound")]):
        with pytest.raises(InputError, match="recording 0 is not a recording"):
            module.cut_recordings(source, RATE, 0.4)


def test_cut_recordings_tell_missing_frequencies_once(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.wav", tone(rate=RATE // 2), RATE // 2)
    with pytest.warns(UserWarning, match="0.wav was sampled 8000 times.*up to 8000 Hz") as caught:
        module.cut_recordings(tmp_path, RATE, 0.4, highest=8000.0)
    assert [Path(each.filename).name for each in caught] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.cut_recordings(tmp_path, RATE, 0.4, highest=4000.0)


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_in_a_list_is_left_out_and_in_no_test(tmp_path):
    good, pipe = save(tmp_path / "test" / "good" / "0.wav", tone()), tmp_path / "test/good/1.wav"
    os.mkfifo(pipe)
    with pytest.warns(SkippedInput, match=r"1\.wav is a pipe or a device: give a file"):
        assert opened([good, str(pipe)]).load() == [0]
    assert [clip.path for clip in labelled_clips(tmp_path)] == [good]


def test_silence_and_clipping_are_recordings():
    silent, clipped = np.zeros(8000, np.float32), np.clip(tone(level=4.0), -1, 1)
    found = waves([silent, clipped])
    assert np.array_equal(found[0], silent) and np.array_equal(found[1], clipped)


def test_dead_microphones_among_normals_are_told(tmp_path, recwarn):
    silent = np.zeros(8000, np.float32)
    paths = [save(tmp_path / f"{i}.wav", x) for i, x in enumerate((tone(), silent, silent + 0.25))]
    slower = [save(tmp_path / f"s{i}.wav", x, 8000) for i, x in enumerate((silent, silent + 0.25))]
    alive = opened(paths[:1])
    alive.load()
    alive.check_normal()
    assert not recwarn
    waves = [tone(), silent, (silent + 0.25, 8000)]  # whose ends are not 0.25 at another rate
    for source, name in (
        (paths, "1.wav: that"), (waves, "clip 1: that"), ([paths[0], *slower], "s0.wav: that")
    ):  # fmt: skip
        clips = opened(source)
        assert clips.load() == [0, 1, 2]
        with pytest.warns(UserWarning, match=f"2 of 3 clips hold one value .*{name}"):
            clips.check_normal()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 3, 100), np.float32), r"shape \(samples,\) or \(N, samples\), not"),
        (np.zeros(100, np.uint8), "dtype uint8"),
        (np.full(100, 3000.0), "up to 3000"),
        (np.array([0.0, np.nan]), "NaN"),
        (np.zeros(0, np.float32), "holds no samples"),
        ((np.ma.masked_greater(tone(), 0.1), RATE), "clip 0 has masked values: fill them"),
        ((tone(), 0), "rate 0: give samples a second, 1,000 to 768,000"),
        ((tone(), float("nan")), "rate nan"),
        ((tone(), float("inf")), "rate inf"),
        ((tone(), 0.5), "rate 0.5"),
        ((tone(), True), "rate True"),
        ((tone(), "16000"), "rate '16000'"),
        (np.zeros((4000, 2), np.float32), "4000 clips of 2 samples: for one clip with channels"),
        ([], "list of clips is empty"),
        (["a.wav", tone()], "1 files and 1 waves"),
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


def test_a_file_of_a_low_rate_is_named(tmp_path):
    path = save(tmp_path / "low.wav", tone(rate=4000), 4000)
    with pytest.warns(UserWarning, match="low.wav was sampled 4000 times"):
        list(open_audio([path], RATE, WINDOW, STEP, highest=4000.0).batches(1))


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


@pytest.mark.parametrize("count", [100, 101, 150, 199])
@pytest.mark.parametrize("window, step", [(100, 7), (100, 100), (100, 1000)])
def test_ends_are_mirrored_as_numpy_mirrors_them(count, window, step):
    wave = np.random.default_rng(count).random(count, dtype=np.float32)
    found = extended(wave, window, step)
    more = -(-(count - window) // step) * step + window - count
    assert np.array_equal(found, np.pad(wave, (0, more), mode="reflect"))
