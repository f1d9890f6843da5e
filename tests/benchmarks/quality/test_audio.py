"""`python -m benchmarks audio` on a tree in the layout of UrbanSound8K, made up here."""

from __future__ import annotations

import csv
import itertools
import json
import re
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import results, stats
from benchmarks.quality import audio, controls
from diffad_fast import Detector, metrics
from diffad_fast.data.audio import LabelledClip, labelled_clips
from diffad_fast.errors import InputError
from diffad_fast.evaluation import evaluate_audio

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

RATE = 8000
PITCH = {"siren": 900.0, "drilling": 300.0, "street_music": 2200.0}
CLIPS = 2  # of a class in a fold, cut from one recording
TINY = {
    "sample_rate": RATE, "n_fft": 256, "hop": 128, "n_mels": 16, "window_frames": 16,
    "window_step": 8, "train_steps": 3, "token_width": 16, "token_blocks": 1, "cross_fit": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("UrbanSound8K")
    rng = np.random.default_rng(0)
    (root / "metadata").mkdir()
    with open(root / "metadata" / "UrbanSound8K.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["slice_file_name", "fsID", "fold", "classID", "class"])
        for fold in range(1, 11):
            (root / "audio" / f"fold{fold}").mkdir(parents=True)
            for number, (name, pitch) in enumerate(PITCH.items()):
                for i in range(CLIPS):
                    source = 1000 * fold + 10 * number
                    file_name = f"{source}-{number}-0-{i}.wav"
                    t = np.arange(RATE // 2) / RATE
                    wave = 0.2 * np.sin(2 * np.pi * pitch * rng.uniform(0.9, 1.1) * t)
                    wave += 0.05 * rng.standard_normal(len(t))
                    soundfile.write(root / "audio" / f"fold{fold}" / file_name, wave, RATE)
                    table.writerow([file_name, source, fold, number, name])
    return root


@pytest.fixture(autouse=True)
def _tiny(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(audio, "speed", lambda detector: {"batch_1": 100.0})


class Spy(Detector):
    """Detectors of few parameters, which note what they are given."""

    seen: list = []

    def __init__(self, preset, **options):
        super().__init__(**options, **TINY)

    def fit(self, source, groups):
        # Clips of one recording are held out together.
        assert groups == [re.search(r"(\d+)-\d+-0-", path)[1] for path in source]
        self.trained = source
        return super().fit(source, groups=groups)


def evaluated(detector, clips, strict, maps):
    Spy.seen.append((detector.trained, clips))
    return evaluate_audio(detector, clips, strict, maps)


def fold_of(path):
    return int(re.search(r"fold(\d+)", path)[1])


def test_ten_folds_as_their_authors_made_them(root, tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "Detector", Spy)
    monkeypatch.setattr(audio, "evaluate_audio", evaluated)
    monkeypatch.setattr(Spy, "seen", [])
    monkeypatch.setattr(stats, "GROUP_RESAMPLES", 20)  # of intervals, which another test looks at
    names = ["siren", "drilling"]
    options = ["--normal", *names, "--ten-fold", "--seeds", "0", "--name", "ten"]
    assert audio.main(["--data", str(root), *options]) == 0
    assert len(Spy.seen) == 10 * len(names)
    for number, (trained, tested) in enumerate(Spy.seen):
        fold, name = 1 + number // 2, names[number % 2]
        assert {fold_of(clip.path) for clip in tested} == {fold}
        assert sorted(map(fold_of, trained)) == [f for f in range(1, 11) if f != fold for _ in "ab"]
        assert len(tested) == CLIPS * len(PITCH)  # all of the fold
        assert {clip.kind for clip in tested if not clip.anomaly} == {name}
        assert all(f"-{list(PITCH).index(name)}-0-" in path for path in trained)

    result = json.loads((tmp_path / "ten.json").read_text())
    found = {(r["normal"], r["test_folds"][0]): 100 * r["auroc"] for r in result["runs"]}
    assert len(found) == len(result["nearest"]) == len(result["lof"]) == 20
    table = (tmp_path / "ten.md").read_text()
    for name in names:
        values = [found[name, fold] for fold in range(1, 11)]
        expected = f"| {name} | {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} ("
        assert expected in table
    means = [statistics.mean(found[name, fold] for name in names) for fold in range(1, 11)]
    assert f"| mean | {statistics.mean(means):.1f} ± {statistics.stdev(means):.1f} (" in table
    for fold, mean in enumerate(means, 1):
        cells = " | ".join(f"{found[name, fold]:.1f}" for name in names)
        assert f"\n| {fold} | {cells} | {mean:.1f} |\n" in table
    assert "1 seeds: mean and standard deviation over the 10 test folds" in table


def test_one_fold_has_the_deviation_of_its_seeds(root, tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "Detector", Spy)
    options = ["--normal", "siren", "--train-folds", "1", "2", "3", "4", "5", "--name", "one"]
    assert audio.main(["--data", str(root), *options, "--test-folds", "6", "7"]) == 0
    runs = json.loads((tmp_path / "one.json").read_text())["runs"]
    values = [100 * one["auroc"] for one in runs]
    assert [one["seed"] for one in runs] == [0, 1, 2] and len(runs[0]["test_folds"]) == 2
    table = (tmp_path / "one.md").read_text()
    assert f"| siren | {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} (" in table
    assert "fold |" not in table


def test_choices_hear_one_fold(root, tmp_path, monkeypatch):
    def told(folder, normal, folds):
        """Every clip five times, as if of five recordings."""
        return [
            clip._replace(recording=f"{clip.recording}{i}")
            for clip in labelled_clips(folder, normal=normal, folds=folds)
            for i in range(5)
        ]

    seen = []

    class Listener(Detector):
        def __init__(self, preset, **options):
            super().__init__(**options, **TINY)

        def fit(self, source, groups):
            self.groups = set(groups)
            return super().fit(source, groups=groups)

        def score(self, source, **options):
            seen.append((self.groups, source))
            return super().score(source, **options)

    monkeypatch.setattr(audio, "labelled_clips", told)
    monkeypatch.setattr(audio, "Detector", Listener)
    options = ["--normal", "siren", "drilling", "--within", "3", "--seeds", "0", "1"]
    assert audio.main(["--data", str(root), *options]) == 0
    assert len(seen) == 2 * audio.PARTS * 2
    for number, name in enumerate(("siren", "drilling")):
        own = {clip.recording for clip in told(str(root), name, [3]) if clip.kind == name}
        parts = [own - groups for groups, _ in seen[10 * number : 10 * number + 10 : 2]]
        assert len(own) == 5 and sorted(map(len, parts)) == [1] * 5 and set.union(*parts) == own
    for _, tested in seen:
        assert {fold_of(path) for path in tested} == {3}
        assert len(tested) == CLIPS + 2 * 5 * CLIPS

    result = json.loads((tmp_path / "audio-fold3.json").read_text())
    whose = ("auroc", "nearest", "lof")
    rows = [
        [name, *(100 * statistics.mean(one[k] for one in found) for k in whose)]
        for name, found in result["aurocs"].items()
    ]
    rows.append(["mean", *(statistics.mean(row[i] for row in rows) for i in (1, 2, 3))])
    table = (tmp_path / "audio-fold3.md").read_text()
    assert "| normal class | AUROC | nearest neighbours, AUROC | local outlier factor, AUROC |" in (
        table
    )
    for name, *figures in rows:
        assert f"| {name} | {' | '.join(f'{value:.1f}' for value in figures)} |" in table
    assert audio.headlines(result) == []
    # As those of fold 1 were recorded.
    for found in result["aurocs"].values():
        for one in found:
            del one["lof"]
    table = audio.development_table(result)
    assert "| normal class | AUROC | nearest neighbours, AUROC |\n" in table
    for name, ours, control, _ in rows:
        assert f"| {name} | {ours:.1f} | {control:.1f} |\n" in table


def test_features_stand_beside_the_preset(root, tmp_path, monkeypatch):
    class Ear(torch.nn.Module):
        def forward(self, waves):
            return waves.unflatten(1, (4, -1)).std(dim=2)

    monkeypatch.setattr(audio, "Detector", Spy)
    monkeypatch.setattr(audio, "YAMNet", lambda path: Ear())
    options = ["--normal", "siren", "--seeds", "0", "--features", "weights.onnx"]
    options += ["--train-folds", "1", "2", "3", "4", "5", "--test-folds", "6"]
    assert audio.main(["--data", str(root), *options]) == 0
    result = json.loads((tmp_path / "audio-yamnet.json").read_text())
    assert "Preset balanced with the features of YAMNet, 1 seeds" in result["summary"]
    assert audio.headlines(result)[0][0] == "UrbanSound8K, mean of 1 classes, features of YAMNet"
    # The control hears the same: of each test clip the cosines to the nearest of what was trained.
    (control,) = result["nearest"]
    heard = {True: [], False: []}
    test = labelled_clips(str(root), normal="siren", folds=[6])
    train = labelled_clips(str(root), normal="siren", folds=range(1, 6))
    for clip in [*test, *(clip for clip in train if not clip.anomaly)]:
        wave = soundfile.read(clip.path, dtype="float32")[0]
        wave = np.pad(wave, (0, 2176 + 2 * 1024 - len(wave)), mode="reflect")
        windows = [wave[k : k + 2176].reshape(4, -1) for k in (0, 1024, 2048)]
        mean = np.mean([_unit(window.std(axis=1, ddof=1)) for window in windows], axis=0)
        heard[clip in test].append(_unit(mean))
    distance = np.sort(1 - np.array(heard[True]) @ np.array(heard[False]).T, axis=1)
    label = [clip.anomaly for clip in test]
    expected = metrics.auroc(label, distance[:, : controls.NEIGHBOURS].mean(axis=1))
    assert control["auroc"] == pytest.approx(expected)


def _unit(v):
    return v / np.linalg.norm(v)


def clips_of(recordings):
    """Clips of (class, recording, how many)."""
    return [
        LabelledClip(f"{recording}-{i}.wav", kind, kind != "siren", recording=recording)
        for kind, recording, count in recordings
        for i in range(count)
    ]


def test_intervals_draw_recordings_and_not_clips():
    """Many clips of few recordings say little: with one recording of two wrong, it can be 0."""
    clips = clips_of([("siren", "a", 20), ("siren", "b", 20), ("dog", "c", 20), ("dog", "d", 20)])
    score = np.array([0.0] * 20 + [2.0] * 20 + [1.0] * 40)
    beside = {"nearest": -score, "lof": 2 * score}
    observed, drawn = audio.drawn(clips, {"siren": [score, score]}, {"siren": beside})
    assert observed["siren", "auroc"] == observed["mean", "nearest"] == 0.5
    assert set(drawn) == {(n, w) for n in ("siren", "mean") for w in ("auroc", "nearest", "lof")}
    values = drawn["siren", "auroc"]
    # Of the draws of four recordings with both kinds among them, by enumeration.
    expected = [
        np.mean([recording == "a" for recording in some if recording in "ab"])
        for some in itertools.product("abcd", repeat=4)
        if {"a", "b"} & set(some) and {"c", "d"} & set(some)
    ]
    assert set(values.round(9)) == set(np.round(expected, 9))
    tolerance = 4 * np.std(expected) / stats.GROUP_RESAMPLES**0.5
    assert abs(values.mean() - np.mean(expected)) < tolerance
    np.testing.assert_allclose(drawn["siren", "nearest"], 1 - values, atol=1e-12)
    np.testing.assert_allclose(drawn["siren", "lof"], values, atol=1e-12)
    other = {key: np.random.default_rng(1).permutation(found) for key, found in drawn.items()}
    observed["mean", "auroc"] = 0.6  # is told as it is, whatever the mean of the draws
    both = [(observed, drawn), (observed, other)]
    one, two = audio.intervals(both[:1])["mean"], audio.intervals(both)["mean"]
    assert one["auroc"] == np.quantile(values, [0.025, 0.975]).tolist() == [0.0, 1.0]
    both = (values + other["siren", "auroc"]) / 2
    assert two["auroc"] == np.quantile(both, [0.025, 0.975]).tolist()
    assert one["difference_nearest"] == pytest.approx([0.1, -1.0, 1.0])
    assert one["difference_lof"] == pytest.approx([0.1, 0.0, 0.0])


def test_controls_are_standardised_by_the_training_clips(monkeypatch):
    """In the place of log-mel spectrograms: clips of four numbers, two bands of two frames, one of
    which varies a thousand times as much as the other, and more so in the test."""
    rng = np.random.default_rng(0)
    known = rng.standard_normal((30, 2, 2)) * [[1.0], [1000.0]]
    new = rng.standard_normal((8, 2, 2)) * [[3.0], [5000.0]] + 1
    waves = torch.from_numpy(np.concatenate([known, new]))

    def open_(paths):
        batch = SimpleNamespace(x=waves[[int(path) for path in paths]])
        return SimpleNamespace(batches=lambda n: [batch])

    monkeypatch.setattr(audio, "LogMel", lambda *sizes: lambda x: x)
    config = SimpleNamespace(sample_rate=1, n_fft=2, hop=1, n_mels=2)
    detector = SimpleNamespace(config=config, model=SimpleNamespace(embedding=None), open=open_)
    clips = [LabelledClip(str(i), "siren", False) for i in range(38)]
    found = audio.controls(detector, clips[:30], clips[30:])

    features = np.concatenate([waves.mean(dim=2), waves.std(dim=2)], axis=1)
    features = (features - features[:30].mean(axis=0)) / features[:30].std(axis=0)
    distance = np.linalg.norm(features[:, None] - features[None, :30], axis=2)
    nearest = np.sort(distance[30:], axis=1)[:, :5].mean(axis=1)
    np.testing.assert_allclose(found["nearest"], nearest, rtol=1e-9)
    # Breunig et al. 2000, with 20 neighbours; nobody is his own.
    itself = distance[:30] + np.diag(np.full(30, np.inf))
    reach = np.sort(itself, axis=1)[:, 19]

    def density(rows):
        chosen = np.argsort(rows, axis=1)[:, :20]
        return chosen, 1 / np.maximum(reach[chosen], np.take_along_axis(rows, chosen, 1)).mean(1)

    (_, inside), (chosen, outside) = density(itself), density(distance[30:])
    np.testing.assert_allclose(found["lof"], inside[chosen].mean(axis=1) / outside, rtol=1e-6)


def test_the_best_control_that_was_run_is_told():
    runs = [{"normal": "siren", "test_folds": [2], "seed": s, "auroc": 0.8} for s in range(2)]
    where = {"normal": "siren", "test_folds": [2]}
    bounds = {"auroc": [0.7, 0.9], "nearest": [0.6, 0.8], "lof": [0.5, 0.95]}
    result = {
        "features": None, "runs": runs, "repeats": [], "intervals": {"mean": bounds},
        "nearest": [{**where, "auroc": 0.75}], "lof": [{**where, "auroc": 0.82}],
    }  # fmt: skip
    ours = ["UrbanSound8K, mean of 1 classes", "AUROC 80.0 ± 0.0 (70.0–90.0)"]
    best = "local outlier factor: AUROC 82.0 (50.0–95.0)"
    assert audio.headlines(result) == [[*ours, best]]
    result["lof"][0]["auroc"] = 0.7
    best = "nearest neighbours: AUROC 75.0 (60.0–80.0)"
    assert audio.headlines(result) == [[*ours, best]]


def test_a_fold_needs_normal_clips_and_others(root):
    clips = labelled_clips(str(root), normal="siren", folds=[3])
    assert audio.both_kinds(clips, "siren", [3]) is clips
    for some in ([c for c in clips if c.anomaly], [c for c in clips if not c.anomaly], []):
        with pytest.raises(InputError, match=rf"folds \[3\] hold {len(some)} clips, normal ones"):
            audio.both_kinds(some, "siren", [3])


def test_what_is_missing_is_said_before_any_training(root, tmp_path, monkeypatch, capsys):
    few = ["--data", str(root), "--normal", "siren", "--test-folds", "11"]
    for wrong, message in (
        (few, "there is no fold 11"),
        ([*few[:3], "whistle", *few[4:5], "2"], "its normal class is 'whistle'"),
        ([*few[:1], str(tmp_path / "nowhere")], "is not a folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            audio.main(wrong)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "yamnet.onnx").touch()
    for fold in ([], ["--within", "1"]):
        with pytest.raises(SystemExit):
            audio.main(["--data", str(root), "--features", str(tmp_path / "yamnet.onnx"), *fold])
        assert "this integration needs onnx" in capsys.readouterr().err


def test_repeats():
    rng = np.random.default_rng(0)
    rate = audio.REPEATS_RATE
    noise = rng.standard_normal(4 * rate).astype(np.float32)
    assert not audio.repeats(noise) and not audio.repeats(noise[: rate // 3])
    for seconds in (0.3, 1.0, 2.9, 3.7):
        repeated = np.resize(noise[: int(seconds * rate)], 4 * rate)
        assert audio.repeats(repeated)
        assert audio.repeats(repeated + 0.05 * rng.standard_normal(4 * rate))
        assert not audio.repeats(repeated + 0.2 * rng.standard_normal(4 * rate))
    assert not audio.repeats(np.resize(noise[: int(3.8 * rate)], 4 * rate))  # 0.2 s of it
    assert not audio.repeats(np.zeros(4 * rate))


def test_the_auroc_without_repeats():
    clips = clips_of([("siren", "a", 2), ("dog", "b", 2)])
    scores, once = np.array([0.0, 3.0, 1.0, 2.0]), np.array([True, False, True, True])
    assert audio.without_repeats(clips, scores, once) == 1.0
    assert audio.without_repeats(clips, scores, once[[2, 2, 1, 1]]) is None
