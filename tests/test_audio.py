"""The detector on audio: scores, maps, streams, figures, report and command line."""

from __future__ import annotations

import csv
import json
import re
from itertools import groupby
from statistics import harmonic_mean

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import diffad_fast as daf
from diffad_fast import cli
from diffad_fast.config import MODES, DetectorConfig
from diffad_fast.data import audio_files
from diffad_fast.data.audio import LabelledClip
from diffad_fast.errors import CheckpointError, InputError
from diffad_fast.evaluation import evaluate_audio
from diffad_fast.report.audio import ACROSS, CURVE, MAP, SPECTROGRAM, _hertz, clip_picture
from diffad_fast.representations import AudioTokens
from diffad_fast.scoring import Score

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

RATE = 8000
OPTIONS = {
    "sample_rate": RATE, "n_fft": 256, "hop": 128, "n_mels": 16, "window_frames": 32,
    "window_step": 8, "train_steps": 80, "token_width": 64, "token_blocks": 1,
    "conformal_share": 0.35,
}  # fmt: skip


def hum(seed: int, seconds=1.5, extra=0.0) -> np.ndarray:
    """A machine: noise below a varying hum; ``extra`` adds a tone at 3 kHz in the middle third."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    wave = 0.05 * rng.standard_normal(len(t))
    wave += 0.2 * rng.uniform(0.7, 1.3) * np.sin(2 * np.pi * rng.uniform(190, 210) * t)
    middle = (t > seconds / 3) & (t < seconds * 2 / 3)
    return (wave + extra * middle * np.sin(2 * np.pi * 3000 * t)).astype(np.float32)


@pytest.fixture(scope="module")
def detector() -> daf.Detector:
    return daf.Detector(kind="audio", **OPTIONS).fit([hum(i) for i in range(60)])


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[LabelledClip]:
    """Test clips on disk, in the layout of plain folders."""
    root, found = tmp_path_factory.mktemp("machine"), []
    for kind, extra in (("normal", 0.0), ("whistle", 0.2)):
        for i in range(4):
            path = root / "test" / kind / f"{i}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, hum(100 + i, extra=extra), RATE, subtype="FLOAT")
            found.append(LabelledClip(str(path), kind, extra > 0))
    return found


def test_finds_what_normals_have_not_where_it_is(detector):
    normal = detector.score([hum(200 + i, 3.0) for i in range(8)])
    strange = detector.score([hum(200 + i, 3.0, extra=0.2) for i in range(8)])
    assert strange.score.min() > normal.score.max()
    assert strange.label.all() and (strange.p_value == strange.p_value.min()).all()
    map_ = strange.map.mean(axis=0)
    band = map_.sum(axis=1).argmax()
    assert abs(detector.frequencies - 3000).argmin() == band
    # The tone sounds in the middle third; half a second of window blurs its edges.
    time = detector.times(strange.map)
    assert 1 < time[map_[band].argmax()] < 2
    other = np.repeat(hum(200, 3.0, extra=0.2), 3)  # of another rate
    found = detector.score((other, 3 * RATE))
    np.testing.assert_array_equal(detector.times(found.map[0]), time)
    assert found.map[0, band].argmax() == strange.map[0, band].argmax()


@pytest.mark.parametrize("mode", ["one_step", "invert", "reconstruct"])
def test_columns_of_the_map_add_up_to_the_score(detector, mode):
    detector.mode = mode
    try:
        # One window: every column is that window.
        wave = hum(300, extra=0.1)[: detector.config.window_samples]
        out = detector.score(wave)
        assert out.map.shape == (1, 16, 4)
        assert np.allclose(out.map.sum(axis=1), out.score[:, None], rtol=1e-3, atol=1e-3)
        # Against the definition: standardised numbers of the kernel that calibrated them.
        x = torch.from_numpy(wave)[None]
        with torch.inference_mode():
            maps = detector.model.raw_maps(x)
        z = [(m - s.mean) / s.deviation for m, s in zip(maps, detector.statistics, strict=True)]
        assert out.score[0] == pytest.approx(float(sum(z).mean() / len(z)), rel=1e-3, abs=1e-3)
    finally:
        detector.mode = "one_step"


def test_top_fraction_is_of_windows(detector):
    wave = hum(301, 3.0, extra=0.2)
    windows = detector.stream(RATE)
    scores = np.concatenate([windows.push(wave).score, windows.finish().score])
    before = detector.model.config
    try:
        for fraction, count in ((0.0, 1), (0.2, round(0.2 * len(scores))), (1.0, len(scores))):
            detector.model.config = before.replace(top_fraction=fraction)
            expected = np.sort(scores)[-count:].mean()
            assert detector.score(wave).score[0] == pytest.approx(expected, abs=1e-4)
    finally:
        detector.model.config = before


def test_clips_of_any_length_in_one_call(detector):
    waves = [hum(i, seconds) for i, seconds in enumerate((1.5, 0.1, 3.0, 1.5))]
    out = detector.score(waves)
    single = [detector.score(wave) for wave in waves]
    assert np.allclose(out.score, [s.score[0] for s in single], atol=1e-5)
    for row, alone in zip(out.map, single, strict=True):
        width = alone.map.shape[2]
        assert np.allclose(row[:, :width], alone.map[0], atol=1e-5)
        assert np.isnan(row[:, width:]).all()
    assert detector.score(waves, maps=False).map is None


@pytest.mark.parametrize("rate", [RATE, 22050])
@pytest.mark.parametrize("mode", ["one_step", "reconstruct"])
def test_stream_equals_offline(detector, rate, mode):
    detector.mode = mode
    try:
        wave = np.resize(hum(5, 4.0, extra=0.1), int(3.3 * rate))
        rng, start, parts = np.random.default_rng(0), 0, []
        stream = detector.stream(rate)
        step = 8 * 128 / RATE
        assert stream.window == detector.config.window_samples / RATE
        assert stream.latency == step if rate == RATE else step < stream.latency < step + 0.2
        while start < len(wave):
            size = int(rng.choice([0, 1, 77, 1000, 9000]))
            parts.append(stream.push(wave[start : start + size]))
            start += size
        heard = sum(len(part.score) for part in parts)
        parts.append(stream.finish())
        score = np.concatenate([part.score for part in parts])
        time = np.concatenate([part.time for part in parts])
        maps = np.concatenate([part.map for part in parts])
        out = detector.score((wave, rate))
        windows = out.map.shape[2] - 3
        assert len(score) == windows and windows - 1 <= heard <= windows
        assert out.score[0] == pytest.approx(score.mean(), abs=1e-4)
        assert np.allclose(maps.sum(axis=1), score, atol=1e-3)
        assert np.allclose(maps[0], out.map[0, :, 0], atol=1e-4)
        config = detector.config
        ends = (config.window_samples + config.step_samples * np.arange(windows)) / RATE
        assert np.allclose(time, ends)
        assert np.allclose(detector.times(out.map)[:windows], time - stream.window)
        with pytest.raises(InputError, match="finished"):
            stream.push(wave)
    finally:
        detector.mode = "one_step"


@pytest.mark.parametrize("more", [1, 400, 3000])
def test_a_stream_of_windows_that_do_not_overlap_ends_as_the_clip(more):
    options = OPTIONS | {"window_step": 32}
    found = daf.Detector(kind="audio", **options).fit([hum(i) for i in range(60)])
    wave = hum(70, 3.0)[: 2 * found.config.step_samples + found.config.window_samples + more]
    stream = found.stream(RATE)
    score = np.concatenate([part.score for part in (stream.push(wave), stream.finish())])
    assert len(score) == 4
    assert found.score(wave).score[0] == pytest.approx(score.mean(), abs=1e-4)


def test_windows_of_a_stream_have_p_values_of_windows(detector, tmp_path):
    """Against windows cut by hand of the clips that were held out, each clip counting once."""
    config, (part,) = detector.config, detector.parts
    window, step = config.window_samples, config.step_samples
    clips = [next(detector.open([hum(i)]).batches(1)).x[0] for i in part.split.conformal]
    known = [detector.score_batch(clip.unfold(0, window, step))[1] for clip in clips]
    of_windows = detector.calibrations["one_step"].of_windows
    assert of_windows.groups == len(known)
    np.testing.assert_allclose(of_windows.scores, np.sort(np.concatenate(known)), rtol=0, atol=1e-4)
    stream = detector.stream(RATE)
    parts = [stream.push(hum(300, 6.0)), stream.push(hum(301, 6.0, extra=0.2)), stream.finish()]
    score, p_value, label = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("score", "p_value", "label")
    )
    shares = [[(scores >= s).mean() for scores in known] for s in score]
    expected = (1 + np.sum(shares, axis=1)) / (len(known) + 1)
    np.testing.assert_allclose(p_value, expected, rtol=0, atol=0.01)
    end = parts[0].time[-1]
    time = np.concatenate([part.time for part in parts])
    whistle = (time > end + 3) & (time < end + 4)
    assert label[whistle].all() and label[time <= end].mean() < 0.2
    detector.save(tmp_path / "a.diffad")
    loaded = daf.load(tmp_path / "a.diffad")
    again = loaded.stream(RATE).push(hum(300, 6.0))
    np.testing.assert_array_equal(again.p_value, parts[0].p_value)
    loaded.false_positive_rate = 0.5
    assert loaded.stream(RATE).push(hum(300, 6.0)).label.mean() > 0.2
    loaded.recalibrate([hum(400 + i, 3.0, extra=0.2) for i in range(30)])
    again = loaded.stream(RATE).push(hum(301, 6.0, extra=0.2))
    assert np.median(again.p_value) > 0.2


def test_calibrating_hears_every_clip_once(detector, monkeypatch):
    """A clip's score is that of its windows, to the bit."""
    clips, ((_, split),) = [hum(i) for i in range(60)], detector.parts
    heard, encode = [], AudioTokens.encode
    try:
        for mode in MODES:
            with monkeypatch.context() as patch:
                patch.setattr(
                    AudioTokens, "encode", lambda self, x: heard.append(len(x)) or encode(self, x)
                )
                detector.calibrate(clips, [mode])
            assert sum(heard) == len(split.statistics) + len(split.conformal)
            heard.clear()
            detector.mode = mode
            scores = detector.score([clips[i] for i in split.conformal]).score
            np.testing.assert_array_equal(detector.conformal.scores, np.sort(scores))
    finally:
        detector.mode = "one_step"


def test_windows_of_clips_that_were_cut_count_for_nothing():
    """Clips of two lengths; a tenth may be anomalies, which drop out with their windows."""
    clips = [hum(i, 1.5 + i % 2, extra=0.2 * (i % 12 == 0)) for i in range(96)]
    found = daf.Detector(kind="audio", **OPTIONS, contamination=0.1).fit(clips)
    calibration = found.calibrations["one_step"]
    kept = {int(group) for group in calibration.conformal.group}
    assert {int(group) for group in calibration.of_windows.group} == kept
    (part,) = found.parts
    assert calibration.conformal.groups == len(part.split.conformal) * 9 // 10 + (
        len(part.split.conformal) % 10 > 0
    )
    level = daf.Detector(kind="audio", **OPTIONS, remove_level=True).fit(clips)
    assert level.calibrations["one_step"].of_windows is None


def test_a_stream_without_high_frequencies_is_told(detector, recwarn):
    detector.stream(RATE)
    assert not recwarn
    with pytest.warns(UserWarning, match="the stream was sampled 4000 times .* fmax=2000"):
        detector.stream(4000)


def test_stream_of_less_than_a_window_and_of_nothing(detector):
    stream = detector.stream(RATE)
    assert len(stream.push(hum(1)[:900]).score) == 0
    assert stream.finish().score == pytest.approx(detector.score(hum(1)[:900]).score, abs=1e-5)
    assert len(detector.stream(RATE).finish().score) == 0
    with pytest.raises(InputError, match="NaN"):
        detector.stream(RATE).push(np.array([np.nan]))


def test_silence_is_an_anomaly_with_a_finite_score(detector):
    out = detector.score(np.zeros(RATE, np.float32))
    assert np.isfinite(out.score).all() and out.label[0] == 1


def test_checkpoint(detector, tmp_path):
    detector.save(tmp_path / "m.diffad")
    again = daf.load(tmp_path / "m.diffad")
    waves = [hum(i, extra=0.05) for i in range(3)]
    for mode in ("one_step", "invert"):
        detector.mode = again.mode = mode
        assert np.array_equal(detector.score(waves).score, again.score(waves).score)
        assert np.array_equal(detector.score(waves).map, again.score(waves).map)
    detector.mode = "one_step"


class Ear(torch.nn.Module):
    """Embeddings of a quarter of a second: energies of eight bands of the spectrum."""

    rate, samples = RATE, RATE // 4

    def forward(self, waves):
        power = torch.view_as_real(torch.fft.rfft(waves)).square().sum(dim=2)
        return power[:, :1000].unflatten(1, (8, -1)).mean(dim=2).sqrt()


@pytest.fixture(scope="module")
def with_ear() -> daf.Detector:
    return daf.Detector(kind="audio", features=Ear(), **OPTIONS).fit([hum(i) for i in range(60)])


@pytest.mark.parametrize("mode", ["one_step", "reconstruct"])
def test_a_backbone_gives_the_semantic_discrepancy(with_ear, mode):
    with_ear.mode = mode
    try:
        waves = torch.from_numpy(np.stack([hum(400 + i, extra=0.1 * i) for i in range(3)]))
        waves = waves[:, : with_ear.config.window_samples]
        with torch.inference_mode():
            *residuals, semantic = with_ear.model.raw_maps(waves)
        # The distance against NumPy, of what the training clips' windows sound like.
        (part,), step = with_ear.parts, with_ear.config.step_samples
        (clips,) = with_ear.open([hum(i) for i in range(60)]).batches(60)
        size, window = RATE // 4, with_ear.config.window_samples

        def heard(wave):
            rows = [wave[k : k + size] for k in range(0, window - size + 1, step)]
            bands = abs(np.fft.rfft(rows))[:, :1000] ** 2
            mean = np.sqrt(bands.reshape(len(rows), 8, -1).mean(axis=2)).mean(axis=0)
            return mean / np.linalg.norm(mean)

        known = np.array([
            heard(wave[k : k + window])
            for wave in clips.x[part.split.fit].double().numpy()
            for k in range(0, len(wave) - window + 1, step)
        ])  # fmt: skip
        values, directions = np.linalg.eigh(np.cov(known.T, bias=True))
        deviation = np.sqrt(np.maximum(values, 1e-3 * values[-1]))
        new = np.array([heard(wave) for wave in waves.double().numpy()]) - known.mean(axis=0)
        expected = np.log(((new @ directions / deviation) ** 2).mean(axis=1))
        np.testing.assert_allclose(semantic.flatten(), expected, atol=1e-3)
        # Of the weights 1, for the mode's own numbers together, and 1.
        *own, last = (
            (m - s.mean) / s.deviation
            for m, s in zip([*residuals, semantic], with_ear.statistics, strict=True)
        )
        z = (sum(own) / len(own) + last).flatten() / 2
        out = with_ear.score(list(waves.numpy()))
        np.testing.assert_allclose(out.score, z, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(out.map.sum(axis=1)[:, 0], out.score, rtol=1e-3, atol=1e-3)
    finally:
        with_ear.mode = "one_step"


def test_a_backbone_in_streams_and_checkpoints(with_ear, tmp_path):
    wave = hum(5, 3.3, extra=0.1)
    stream = with_ear.stream(RATE)
    parts = [stream.push(wave[:9000]), stream.push(wave[9000:]), stream.finish()]
    score = np.concatenate([part.score for part in parts])
    assert with_ear.score(wave).score[0] == pytest.approx(score.mean(), abs=1e-4)
    with_ear.save(tmp_path / "m.diffad")
    with pytest.raises(CheckpointError, match="pass features=module"):
        daf.load(tmp_path / "m.diffad")
    other = Ear()
    other.samples = RATE // 2
    with pytest.raises(CheckpointError, match="hear 2000 samples at once, and these hear 4000"):
        daf.load(tmp_path / "m.diffad", features=other)
    again = daf.load(tmp_path / "m.diffad", features=Ear())
    assert np.array_equal(again.score(wave).score, with_ear.score(wave).score)


def test_clips_of_one_recording_stand_on_one_side_of_a_split(tmp_path):
    """Where the layout of a data set tells of what recording they are; and it is asked for once."""
    lines = ["slice_file_name,fsID,fold,classID,class"]
    (tmp_path / "audio" / "fold1").mkdir(parents=True)
    for i in range(48):
        lines.append(f"{i}.wav,{100 + i // 2},1,{i % 4 // 2},{('hum', 'horn')[i % 4 // 2]}")
        soundfile.write(tmp_path / "audio" / "fold1" / f"{i}.wav", hum(i), RATE, subtype="FLOAT")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "UrbanSound8K.csv").write_text("\n".join(lines) + "\n")
    options = {**OPTIONS, "train_steps": 2, "cross_fit": 0}
    found, folds = daf.Detector(kind="audio", **options), [1]
    found.fit(str(tmp_path), normal="hum", folds=folds)
    folds[0] = 2
    found.calibrate(str(tmp_path))
    sides = [{i // 2 for i in side} for side in found.parts[0].split[:4]]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 12  # of 24 clips
    found.recalibrate(str(tmp_path), normal="horn")
    assert found.conformal.groups == 12 and len(found.conformal.scores) == 24


def test_figures(detector, clips, monkeypatch):
    score, maps = daf.Detector.score, []
    with monkeypatch.context() as patch:
        patch.setattr(
            daf.Detector, "score", lambda *a, **kw: (maps.append(kw["maps"]), score(*a, **kw))[1]
        )
        found = detector.evaluate(clips)
    assert maps == [False]  # nobody would see them
    score = detector.score([clip.path for clip in clips]).score
    label = [clip.anomaly for clip in clips]
    assert found["auroc"] == pytest.approx(roc_auc_score(label, score))
    assert found["pauc"] == pytest.approx(roc_auc_score(label, score, max_fpr=0.1))
    assert (found["n_normal"], found["n_anomalous"]) == (4, 4)
    assert found["per_kind"]["whistle"]["auroc"] == found["auroc"]
    assert found["real_time"] > 0 and "sections" not in found
    json.dumps(found, allow_nan=False)


def test_figures_of_dcase(monkeypatch):
    """Two sections, known scores: source normals 1, 3; target normals 2, 6; anomalies 4, 5."""
    names = [
        ("00", "source", 1.0, False), ("00", "source", 3.0, False), ("00", "target", 2.0, False),
        ("00", "target", 6.0, False), ("00", "source", 4.0, True), ("00", "target", 5.0, True),
        ("01", "source", 1.0, False), ("01", "target", 1.0, True),
    ]  # fmt: skip
    clips = [
        LabelledClip(f"{i}", "anomaly" if bad else "normal", bad, section, domain)
        for i, (section, domain, _, bad) in enumerate(names)
    ]
    values = np.array([score for _, _, score, _ in names])

    class Fake:
        config = DetectorConfig.create(kind="audio")
        threshold = None

        def open(self, paths, strict):
            return self

        def load(self):
            return list(range(len(values)))

        def batches(self, size):
            return iter([type("B", (), {"x": torch.zeros(1, 16000)})])

        def score(self, source, maps):
            index = np.arange(len(values))
            return Score(values, None, values, None, None, index)

        def score_batch(self, x):
            return None

    found = evaluate_audio(Fake(), clips, False, maps=False).metrics
    first, second = found["sections"]["00"], found["sections"]["01"]
    assert first["auroc_source"] == 1.0 and first["auroc_target"] == 0.5
    expected = roc_auc_score([0, 0, 0, 0, 1, 1], values[:6], max_fpr=0.1)
    assert first["pauc"] == pytest.approx(expected)
    assert second["auroc_source"] == 0.5 and second["auroc_target"] is None
    assert found["harmonic_mean"] is None
    found = evaluate_audio(
        Fake(), [c._replace(section="00") for c in clips], False, maps=False
    ).metrics
    only = found["sections"]["00"]
    assert found["harmonic_mean"] == pytest.approx(
        harmonic_mean([only["auroc_source"], only["auroc_target"], only["pauc"]])
    )


def panel(shown, which):
    left, right = ACROSS
    return shown[slice(*which), left:right].astype(int)


def test_a_picture_has_the_map_and_its_curve_on_one_axis(detector):
    wave = hum(1)
    map_ = detector.score([wave, hum(2, 3.0)]).map[0]  # filled up to the longer clip
    columns = detector.score(wave).map.shape[2]
    assert columns < map_.shape[1]
    map_[:, :columns] = 0
    for loud in (0, 7, columns - 1):
        one = map_.copy()
        one[3, loud] = 1e3
        shown = clip_picture(detector, wave, one)
        bright = panel(shown, MAP).sum(axis=2) > 600
        across, down = (np.flatnonzero(bright.any(axis=axis)) for axis in (0, 1))
        height, width = bright.shape
        assert (across[0], across[-1]) == pytest.approx(
            (loud / columns * width, (loud + 1) / columns * width), abs=1.5
        )
        assert (height - 1 - down[-1]) / height == pytest.approx(3 / 16, abs=0.01)
        curve = (panel(shown, CURVE) == (0, 0x72, 0xB2)).all(axis=2)
        assert curve.any(axis=0).all()  # from the map's first pixel to its last
        high = np.flatnonzero(curve[: len(curve) // 2].any(axis=0))
        assert (high[0], high[-1]) == pytest.approx((across[0], across[-1]), abs=2)


def test_bands_of_a_picture_have_their_frequencies(detector, monkeypatch):
    """A tone lies beside the number of its frequency; in few Hz there are other round numbers."""
    from PIL import ImageDraw

    texts, draw = {}, ImageDraw.ImageDraw.text

    def kept(self, xy, text, *args, **options):
        texts.setdefault(text, xy)  # of the spectrogram, which is drawn first
        draw(self, xy, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", kept)
    wave = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE).astype(np.float32)
    shown = clip_picture(detector, wave, detector.score(wave).map[0])
    assert texts.keys() >= {"500", "1000", "2000"} and texts["1000"][0] < ACROSS[0]
    bright = panel(shown, SPECTROGRAM).sum(axis=2).mean(axis=1).argmax()
    height = (SPECTROGRAM[1] - SPECTROGRAM[0]) / 16
    assert texts["1000"][1] - SPECTROGRAM[0] == pytest.approx(bright + height / 2, abs=height)
    assert list(_hertz(np.array([940.0, 980.0, 1020.0, 1060.0])))[::2] == ["1050", "1000", "950"]


def test_what_is_short_stays_visible_in_a_picture(detector):
    wave, map_ = hum(1, 300.0), np.zeros((16, 2344), np.float32)
    map_[3, 1001] = 1e3
    assert map_.shape[1] > 3 * (ACROSS[1] - ACROSS[0])
    assert (panel(clip_picture(detector, wave, map_), MAP).sum(axis=2) > 600).any()


def test_silence_is_dark(detector):
    for wave, dark in ((np.zeros(12000, np.float32), True), (hum(1), False)):
        shown = panel(clip_picture(detector, wave, detector.score(wave).map[0]), SPECTROGRAM)
        assert (shown.max() < 16) == dark


def test_report(detector, clips, tmp_path):
    detector.evaluate(clips[2:6], report=tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<audio controls") == page.count("spectrogram, anomaly map and score") == 4
    assert "data:audio/wav;base64,UklGR" in page and "whistle/0.wav" in page
    assert "http" not in page


def test_one_of_many_short_clips_is_named_and_pictures_name_none(detector, tmp_path, capsys):
    (tmp_path / "test" / "normal").mkdir(parents=True)
    for i in range(4):
        soundfile.write(tmp_path / "test" / "normal" / f"{i}.wav", hum(i, 0.2), RATE)
    detector.save(tmp_path / "m.diffad")
    for command in (
        ["score", str(tmp_path / "m.diffad"), str(tmp_path / "test"), "--out", str(tmp_path / "o")],
        ["evaluate", str(tmp_path / "m.diffad"), str(tmp_path), "--report", str(tmp_path / "r")],
    ):
        assert cli.main(command) == 0
        assert capsys.readouterr().err.count("is repeated to fill it") == 1
    assert len(list((tmp_path / "o" / "heatmaps").rglob("*.png"))) == 4


def test_command_line(clips, tmp_path, capsys):
    from pathlib import Path

    root = Path(clips[0].path).parents[2]
    for i in range(12):
        (root / "train" / "normal").mkdir(parents=True, exist_ok=True)
        soundfile.write(root / "train" / "normal" / f"{i}.flac", hum(i), RATE)
    (tmp_path / "c.json").write_text(json.dumps({**OPTIONS, "train_steps": 3}))
    model, out = str(tmp_path / "m.diffad"), tmp_path / "out"
    fit = ["fit", str(root), "--kind", "audio", "--config", str(tmp_path / "c.json")]
    assert cli.main([*fit, "--out", model]) == 0
    assert "trained on all 12 clips" in capsys.readouterr().err
    assert (
        cli.main(
            ["score", model, str(root / "test" / "whistle"), "--out", str(out), "--batch-size", "3"]
        )
        == 0
    )
    assert len((out / "scores.csv").read_text().splitlines()) == 5
    assert (out / "heatmaps" / "0.wav.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert cli.main(["evaluate", model, str(root), "--layout", "folder", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_anomalous"] == 4
    assert cli.main(["evaluate", model, str(root)]) == 0
    assert "times real time" in capsys.readouterr().out
    for bad, message in (
        (["--normal", "siren"], "urbansound8k"),
        (["--layout", "urbansound8k"], "metadata"),
    ):
        assert cli.main(["evaluate", model, str(root), *bad]) == 2
        assert message in capsys.readouterr().err
    for bad, message in (
        (["--folds", "1"], "are for audio"),
        (["--kind", "audio", "--features", "mfcc"], "unknown features 'mfcc' for audio"),
    ):
        assert cli.main(["fit", str(root), "--out", model, *bad]) == 2
        assert message in capsys.readouterr().err


def read_rows(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("fraction", [1.0, 0.2])
def test_windows_of_recordings_that_are_too_long(detector, tmp_path, monkeypatch, capsys, fraction):
    """Offline scores of the same files, which a lower limit takes for long ones then."""
    data, out, model = tmp_path / "data", tmp_path / "out", str(tmp_path / "m.diffad")
    data.mkdir()
    waves = {"long": (hum(1, 9.0, 0.2), RATE), "other": (np.repeat(hum(2, 5.0), 2), 2 * RATE)}
    for i in range(2):
        waves[f"short{i}"] = hum(3 + i, 0.2), RATE // 2
    for name, (wave, rate) in waves.items():
        soundfile.write(data / f"{name}.wav", wave, rate, subtype="FLOAT")
    soundfile.write(data / "cut.flac", np.resize(hum(5), 200_000), RATE)
    with open(data / "cut.flac", "r+b") as file:
        file.truncate(3 * (data / "cut.flac").stat().st_size // 4)
    before = detector.model.config
    try:
        detector.model.config = before.replace(top_fraction=fraction)
        detector.save(model)
    finally:
        detector.model.config = before
    with pytest.warns(UserWarning, match="cut.flac is damaged"):
        offline = daf.load(model).score(str(data))
    monkeypatch.setattr(audio_files, "LONGEST_SECONDS", 2.0)
    monkeypatch.setattr(audio_files, "_BLOCK", 10_000)
    score = ["score", model, str(data / "long.wav"), "--out", str(out)]
    assert cli.main(score) == 2
    assert "may have 2 s: fit on it by data.audio.cut_recordings" in capsys.readouterr().err
    score[2] = str(data)
    assert cli.main([*score, "--windows"]) == 0
    told = capsys.readouterr().err
    assert told.count("is repeated to fill it") == told.count("was sampled 4000 times") == 1
    assert told.count("left out: ") == 1
    assert told.count("windows and the normals behind the p-values had") == (fraction < 1)
    left_out, *found = read_rows(out / "scores.csv")
    assert left_out["path"] == str(data / "cut.flac") and "damaged" in left_out["left_out"]
    assert [row["path"] for row in found] == offline.paths
    for name in ("score", "p_value", "label"):
        values = [float(row[name]) for row in found]
        np.testing.assert_allclose(values, getattr(offline, name), rtol=0, atol=1e-4)
    rows = read_rows(out / "windows.csv")
    assert [name for name, _ in groupby(row["path"] for row in rows)] == offline.paths
    rows = [row for row in rows if row["path"].endswith("long.wav")]
    stream = detector.stream(RATE)
    parts = [stream.push(waves["long"][0]), stream.finish()]
    for name in ("score", "p_value", "label"):
        expected = np.concatenate([getattr(part, name) for part in parts])
        values = [float(row[name]) for row in rows]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-4)
    start, end = ([float(row[name]) for row in rows] for name in ("start", "end"))
    np.testing.assert_allclose(end, np.concatenate([part.time for part in parts]), atol=1e-3)
    np.testing.assert_allclose(np.subtract(end, start), stream.window, atol=2e-3)
    # The whistle, which sounds from 3 to 6 s.
    loud = [i for i in range(len(rows)) if start[i] > 3 and end[i] < 6]
    band = detector.frequencies[abs(detector.frequencies - 3000).argmin()]
    assert {float(rows[i]["frequency"]) for i in loud} == {round(band, 1)}
    assert {rows[i]["label"] for i in loud} == {"1"}
    if fraction < 1:
        return
    # No heatmaps, and no windows of an earlier run beside other scores.
    assert sorted(path.name for path in out.iterdir()) == ["scores.csv", "windows.csv"]
    assert cli.main(score) == 0
    assert sorted(path.name for path in out.iterdir()) == ["heatmaps", "scores.csv"]
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.wav").write_text("no sound")
    for argv, message in (
        ([str(data), "--strict"], "error: .*cut.flac is damaged"),
        ([str(data / "cut.flac")], "error: .*cut.flac is damaged"),
        ([str(tmp_path / "none")], "error: none of the 1 clip files can be used, the first"),
    ):
        assert cli.main([*score[:2], *argv, *score[3:], "--windows"]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in out.iterdir()) == ["heatmaps", "scores.csv"]


def test_windows_are_of_recordings(tmp_path, capsys):
    vectors = daf.Detector(kind="vector", train_steps=2, cross_fit=0)
    vectors.fit(np.random.default_rng(0).standard_normal((40, 3))).save(tmp_path / "v.diffad")
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    argv = ["score", str(tmp_path / "v.diffad"), str(tmp_path / "x.npy"), "--out", str(tmp_path)]
    assert cli.main([*argv, "--windows"]) == 2
    assert "--windows is for recordings: leave it out for vectors" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--batch-size", "3"], ["--no-maps"]])
def test_windows_are_scored_one_way(detector, tmp_path, capsys, more):
    detector.save(tmp_path / "m.diffad")
    soundfile.write(tmp_path / "a.wav", hum(1), RATE)
    argv = ["score", str(tmp_path / "m.diffad"), str(tmp_path / "a.wav"), "--out", str(tmp_path)]
    assert cli.main([*argv, "--windows", *more]) == 2
    assert "draws no maps: leave out --batch-size, --no-maps" in capsys.readouterr().err


def test_the_command_holds_out_whole_recordings(tmp_path, monkeypatch, capsys):
    lines = ["slice_file_name,fsID,fold,classID,class"]
    for recording in range(5):
        for piece in range(2):
            name = f"{recording}-8-0-{piece}.wav"
            file = tmp_path / "audio" / "fold1" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, np.zeros(800), 8000)
            lines.append(f"{name},{recording},1,8,siren")
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "UrbanSound8K.csv").write_text("\n".join(lines) + "\n")
    found = []

    class Stop(Exception):
        pass

    def fit(self, images, groups, **_):
        found.append(groups)
        raise Stop

    monkeypatch.setattr(daf.Detector, "fit", fit)
    argv = ["fit", str(tmp_path), "--kind", "audio", "--normal", "siren", "--out", "m.diffad"]
    monkeypatch.chdir(tmp_path)
    regex = ["--group-regex", r"(\d)\.wav"]
    for more in ([], regex, ["--clip-seconds", "0.04"], [*regex, "--clip-seconds", "0.04"]):
        with pytest.raises(Stop):
            cli.main([*argv, *more])
    # Of 0.1 s two clips each.
    assert found == [
        list("0011223344"), list("01" * 5), list("00001111222233334444"), list("0011" * 5)
    ]  # fmt: skip
    assert "was sampled 8000 times" in capsys.readouterr().err
    single = ["fit", str(file), "--kind", "audio", "--out", "m.diffad", "--clip-seconds", "0.04"]
    with pytest.raises(Stop):
        cli.main(single)
    assert found[-1] == [str(file)] * 2
    assert cli.main([*single[:2], *single[4:]]) == 2
    assert "--clip-seconds is for recordings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_mels": 40}, "multiple of 16, since 16 groups of as many bands"),
        ({"n_fft": 1025}, "n_fft is 1025.*even"),
        ({"n_fft": 30, "hop": 8}, "n_fft must be a number from 32"),
        ({"window_frames": 100}, "power of two"),
        ({"window_frames": 64, "window_step": 24}, "does not divide"),
        ({"denoiser": "unet-tiny"}, "pixels, which audio has not: audio needs 'token-mlp', for a"),
        ({"fmax": 9000.0}, "fmax must be a number from 1 to 8000"),
        ({"hop": 2.5}, "hop must be a whole number"),
        ({"preset": "huge"}, "choose fast, balanced, best, dcase"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        daf.Detector(kind="audio", **options)


def test_other_kinds_have_no_stream():
    vectors = daf.Detector(kind="vector", train_steps=2)
    vectors.fit(np.random.default_rng(0).standard_normal((40, 3)))
    with pytest.raises(InputError, match="kind is 'vector'"):
        vectors.stream(RATE)
    with pytest.raises(InputError, match="times are of audio: this detector's kind is 'vector'"):
        vectors.times(np.zeros((3, 4)))
    assert vectors.frequencies is None
    with pytest.raises(InputError, match="layout is for images and audio: leave it out"):
        vectors.evaluate((np.zeros((2, 3)), [0, 1]), layout="dcase")


def test_the_dcase_preset_is_its_spectrogram():
    config = daf.Detector(kind="audio", preset="dcase").config
    assert (config.n_mels, config.n_fft, config.hop) == (128, 1024, 512)


@pytest.mark.slow
def test_urbansound8k(data_dir):
    """Sirens of recordings that were not trained on, against the other classes of fold 1."""
    root = data_dir / "urbansound8k"
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    from diffad_fast.data.audio import labelled_clips

    clips = labelled_clips(root, normal="siren", folds=[1])
    normal = [clip for clip in clips if not clip.anomaly]
    sources = sorted({clip.path.rsplit("/", 1)[1].split("-")[0] for clip in normal})
    held_out = tuple(sources[::4])
    test = [c for c in clips if c.anomaly or c.path.rsplit("/", 1)[1].startswith(held_out)]
    train = [c.path for c in normal if not c.path.rsplit("/", 1)[1].startswith(held_out)]
    found = daf.Detector(kind="audio", preset="fast").fit(train).evaluate(test)
    assert found["auroc"] > 0.75


def test_a_stream_of_several_channels(detector):
    """Chunks that are shorter than they have channels are still (samples, channels)."""
    wave = np.stack([hum(1, 2.0), hum(2, 2.0), hum(3, 2.0)], axis=1)
    expected = detector.score((wave, RATE)).score[0]
    stream, found, start = detector.stream(RATE), [], 0
    for size in (1, 2, 3, 5000, 2, len(wave)):
        found.append(stream.push(wave[start : start + size]).score)
        start += size
    found.append(stream.finish().score)
    assert np.concatenate(found).mean() == pytest.approx(expected, abs=1e-4)


def test_what_a_stream_refuses(detector):
    for rate in (0, 0.5, float("nan"), float("inf"), "16000", None, True):
        with pytest.raises(InputError, match="the stream has the rate"):
            detector.stream(rate)
    stream = detector.stream(RATE)
    with pytest.raises(InputError, match="would have 512 channels"):
        stream.push(np.zeros((2, 512), np.float32))
    stream.push(np.zeros((512, 2), np.float32))
    with pytest.raises(InputError, match="has 1 channels and those before had 2"):
        stream.push(np.zeros(512, np.float32))
    with pytest.raises(InputError, match=r"the chunk is a tuple: give an array or a tensor\."):
        stream.push((np.zeros(512, np.float32), RATE))


def test_the_level_is_taken_off():
    """Of a whole clip: its gain says nothing then, and a stream, which has no end, refuses."""
    options = OPTIONS | {"train_steps": 20, "cross_fit": 0}
    waves = [hum(i, 1.5) for i in range(12)]
    loud = [0.1 * w for w in waves[:3]]
    for remove in (False, True):
        found = daf.Detector(kind="audio", remove_level=remove, **options).fit(waves)
        moved = np.abs(found.score(loud).score - found.score(waves[:3]).score).max()
        assert moved < 1e-2 if remove else moved > 0.1
        if remove:
            with pytest.raises(InputError, match="fit with remove_level=False"):
                found.stream(RATE)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fmin": 100.0, "fmax": 100.0}, "fmin and fmax are both 100"),
        ({"fmin": 100.0, "fmax": 101.0}, "64 of 64 mel bands lie between two bins"),
        ({"statistics": "position"}, "clips have no positions in common"),
        ({"overlap": 0.5}, "leave it out$"),
        ({"features": "resnet18"}, "unknown features 'resnet18' for audio: choose 'yamnet'"),
        ({"features": Ear()}, "hears 8000 samples a second and sample_rate is 16000"),
        ({"semantic_of": "features"}, "semantic_of='features' and features=None do not go"),
        ({"features": "yamnet", "semantic_of": "tokens"}, "audio with features reads these"),
    ],
)
def test_options_that_make_no_sense_for_clips(options, message):
    with pytest.raises(InputError, match=message):
        daf.Detector(kind="audio", **options)


@pytest.mark.parametrize("data", [["a.wav"], np.zeros(100), None, []])
def test_what_evaluate_refuses(detector, data):
    with pytest.raises(InputError, match=f"evaluate cannot read a {type(data).__name__}"):
        detector.evaluate(data)
