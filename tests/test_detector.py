"""The detector on small synthetic images: stripes; anomalies have a bright square."""

import copy
import gc
import json
import os
import pickle
import re
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import diffad_fast as daf
from diffad_fast.calibration import _HeldOut
from diffad_fast.config import MODES, DetectorConfig
from diffad_fast.data.images import open_images
from diffad_fast.data.mvtec import mvtec_test
from diffad_fast.denoisers import WaveletUNet, inference
from diffad_fast.diffusion import Graphed
from diffad_fast.errors import BackendError, CheckpointError, InputError
from diffad_fast.persistence import from_state
from diffad_fast.training import checkpoint
from diffad_fast.training.state import TrainingCheckpoint

OPTIONS = {
    "image_size": 32,
    "denoiser": "unet-tiny",
    "train_steps": 60,
    "batch_size": 8,
    "reverse_steps": 3,
    "warmup_steps": 5,
}
# Where the network has nothing to learn, or little.
COARSE = {**OPTIONS, "haar_level": 2}
SMALL = {"token_width": 32, "token_blocks": 1}


def normals(n, seed=0):
    rng = np.random.default_rng(seed)
    x = np.arange(32)
    phase, angle = rng.uniform(0, 2 * np.pi, (2, n, 1, 1))
    waves = np.sin((x * np.cos(angle) + x[:, None] * np.sin(angle)) * 0.6 + phase)
    return (0.5 + 0.2 * waves + 0.02 * rng.normal(size=(n, 32, 32))).clip(0, 1).astype(np.float32)


def with_squares(images):
    images, masks = images.copy(), np.zeros(images.shape, dtype=bool)
    masks[:, 10:18, 14:22] = True
    images[masks] = 0.95
    return images, masks


@pytest.fixture(scope="module")
def fitted():
    return daf.Detector(**OPTIONS).fit(normals(160))


def test_finds_the_squares(fitted):
    clean = normals(40, seed=1)
    broken, masks = with_squares(normals(40, seed=2))
    score = fitted.score(np.concatenate([clean, broken]))
    label = np.repeat([0, 1], 40)
    assert daf.metrics.auroc(label, score.score) > 0.95
    assert daf.metrics.auroc(masks, score.map[40:]) > 0.9
    assert score.map.shape == (80, 32, 32) and score.map.dtype == np.float32
    assert score.label[40:].mean() > 0.6 and score.label[:40].mean() < 0.25
    assert ((score.p_value > 0) & (score.p_value <= 1)).all()
    np.testing.assert_array_equal(score.index, np.arange(80))
    assert score.paths is None and score.skipped == []
    assert fitted.history.steps == 60 and daf.Detector(**OPTIONS).history.steps == 0


def test_score_does_not_depend_on_neighbours(fitted):
    images = np.concatenate([normals(10, seed=3), with_squares(normals(10, seed=4))[0]])
    together = fitted.score(images)
    alone = [fitted.score(images[i : i + 1]) for i in range(20)]
    order = np.random.default_rng(0).permutation(20)
    shuffled = fitted.score(images[order], batch_size=7)
    np.testing.assert_allclose([s.score[0] for s in alone], together.score, rtol=1e-5)
    np.testing.assert_allclose(shuffled.score, together.score[order], rtol=1e-5)


def test_score_iter_is_score(fitted):
    images = normals(11, seed=5)
    parts = list(fitted.score_iter(images, batch_size=4))
    assert [len(p) for p in parts] == [4, 4, 3]
    whole = fitted.score(images, maps=False, batch_size=4)
    assert whole.map is None
    np.testing.assert_array_equal(np.concatenate([p.score for p in parts]), whole.score)
    for batch, score in fitted.score_pairs(images, batch_size=4):
        np.testing.assert_array_equal(batch.index, score.index)
        np.testing.assert_array_equal(fitted.score_batch(batch.x)[1], score.score)


def test_bytes_are_scored_as_the_floats_they_stand_for(fitted):
    images = (normals(5, seed=5) * 255).astype(np.uint8)
    images[0].flat[:256] = range(256)
    whole = fitted.score(images, batch_size=5)
    maps, scores = fitted.score_batch(torch.from_numpy(images)[:, None])
    np.testing.assert_array_equal(scores, whole.score)
    np.testing.assert_array_equal(maps, whole.map)


def test_one_seed_one_result():
    options, images = {**COARSE, "train_steps": 6}, normals(5, seed=6)
    one, again, other = (
        daf.Detector(**options, seed=seed).fit(normals(40)).score(images).score
        for seed in (0, 0, 1)
    )
    assert np.array_equal(one, again) and not np.allclose(one, other)


def test_save_and_load(fitted, tmp_path):
    fitted.save(tmp_path / "m.diffad")
    loaded = daf.load(tmp_path / "m.diffad")
    images = normals(6, seed=7)
    a, b = fitted.score(images), loaded.score(images)
    for name in ("score", "map", "p_value", "label"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert loaded.config == fitted.config


@pytest.mark.parametrize(
    "name",
    ["config", "history", "statistics", "conformal.invert", "statistics.one_step.0.deviation"],
)
def test_an_incomplete_file_is_told(fitted, tmp_path, name):
    parts = ({k: v for k, v in part.items() if k != name} for part in fitted.state())
    checkpoint.save(tmp_path / "m.diffad", "diffad", *parts)  # by another program
    with pytest.raises(CheckpointError, match=f"m.diffad is incomplete, {name} is not in it"):
        daf.load(tmp_path / "m.diffad")


@pytest.mark.parametrize(
    ("name", "junk"),
    [
        ("config", "no JSON"),
        ("config", "[1]"),
        ("settled", '{"train_steps": 3}'),
        ("history", '{"losses": []}'),
        ("history", "7"),
        ("statistics", '{"invert": 1.5}'),
        ("statistics", "{}"),
        ("most_windows_of", "{}"),
        ("columns", '"abc"'),
        ("conformal.invert", torch.zeros(3, dtype=torch.float64)),
        ("conformal.invert", torch.zeros(0)),
    ],
)
def test_a_file_of_other_content_is_told(fitted, tmp_path, name, junk):
    """Though its checksum is right."""
    parts = ({k: junk if k == name else v for k, v in part.items()} for part in fitted.state())
    checkpoint.save(tmp_path / "m.diffad", "diffad", *parts)
    with pytest.raises(CheckpointError, match=f"m.diffad is damaged, its {name} cannot be read"):
        daf.load(tmp_path / "m.diffad")


@pytest.fixture(scope="module")
def of_clips():
    waves = np.random.default_rng(0).normal(size=(24, 2000)).astype(np.float32) / 9
    return daf.Detector(
        kind="audio", sample_rate=8000, n_fft=256, hop=128, n_mels=16, window_frames=8,
        window_step=4, token_width=16, token_blocks=1, device="cpu",
    ).fit(waves, steps=2)  # fmt: skip


def test_a_file_that_scores_no_stream_is_incomplete(of_clips, tmp_path):
    parts = ({k: v for k, v in p.items() if "of_windows" not in k} for p in of_clips.state())
    checkpoint.save(tmp_path / "m.diffad", "diffad", *parts)
    with pytest.raises(CheckpointError, match="m.diffad is incomplete, of_windows.*"):
        daf.load(tmp_path / "m.diffad")


def test_a_stream_of_less_than_a_window_is_told(of_clips):
    stream = of_clips.stream(8000)
    stream.push(np.zeros(800, np.float32) + 0.1)
    with pytest.warns(UserWarning, match="the stream lasts 0.1 s, less than .* is repeated"):
        assert len(stream.finish().score) == 1


def test_reference_backend_agrees(fitted):
    images = normals(6, seed=8)
    before = fitted.score(images).score
    detector = pickle.loads(pickle.dumps(fitted))  # it has nothing prepared
    with daf.use_backend("reference"):
        expected = detector.score(images).score
    np.testing.assert_allclose(before, expected, rtol=1e-4)
    # What was prepared for a backend does not serve another.
    np.testing.assert_array_equal(detector.score(images).score, before)


class Interrupt(Exception):
    pass


def test_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    from diffad_fast.training.images import ImageTrainer

    options, normal = {**COARSE, "train_steps": 24}, normals(40)
    whole = daf.Detector(**options).fit(normal)
    inputs = ImageTrainer.inputs

    def failing(self, number):
        if number == 15:
            raise Interrupt
        return inputs(self, number)

    state = tmp_path / "m.training"
    monkeypatch.setattr(ImageTrainer, "inputs", failing)
    with pytest.raises(Interrupt):
        daf.Detector(**options).fit(
            normal, training_checkpoint=TrainingCheckpoint(state, seconds=0.0)
        )
    monkeypatch.undo()
    resumed = daf.Detector(**options).fit(
        normal, training_checkpoint=TrainingCheckpoint(state, resume=True)
    )
    for (name, a), b in zip(
        resumed.model.denoiser.state_dict().items(),
        whole.model.denoiser.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b), name
    images = normals(5, seed=9)
    np.testing.assert_array_equal(resumed.score(images).score, whole.score(images).score)
    # The loss log has no gap and no repeat.
    assert [s for s, _ in resumed.history.loss] == [s for s, _ in whole.history.loss]

    with pytest.raises(CheckpointError, match="other options or other data"):
        daf.Detector(**{**options, "learning_rate": 1e-4}).fit(
            normal, training_checkpoint=TrainingCheckpoint(state, resume=True)
        )


def test_test_data_changes_nothing(fitted):
    before = fitted.score(normals(3, seed=10)).score
    statistics = [s.mean.clone() for s in fitted.statistics]
    fitted.score(with_squares(normals(30, seed=11))[0])
    assert all(torch.equal(a, s.mean) for a, s in zip(statistics, fitted.statistics, strict=True))
    np.testing.assert_array_equal(fitted.score(normals(3, seed=10)).score, before)


def test_recalibrating_takes_p_values_of_other_normals(fitted, tmp_path):
    """A darker camera: all of its normals are anomalies, until p-values are theirs."""
    detector = pickle.loads(pickle.dumps(fitted))
    before, statistics = dict(detector.calibrations), detector.statistics
    dark = normals(120, seed=20) * 0.8
    assert detector.score(dark).label.mean() > 0.5
    assert detector.recalibrate(dark[:60]) is detector and detector.statistics is statistics
    scores, new = detector.score(dark[:60]).score, detector.score(dark[60:])
    at_least = (scores[:, None] >= new.score).sum(axis=0)
    np.testing.assert_allclose(new.p_value, (1 + at_least) / 61, rtol=0, atol=1e-12)
    assert new.label.mean() < 0.2 and detector.threshold == np.sort(scores)[-3]
    assert all(detector.calibrations[mode] is not before[mode] for mode in MODES)
    # Of one mode; an object's images count together.
    for label in (lambda i: i // 2, lambda i: f"tile {i // 2}", lambda i: (i // 2) / 10):
        groups = [label(i) for i in range(60)]
        detector.recalibrate(dark[:60], groups=groups, modes=["one_step"])
        assert detector.calibrations["one_step"].conformal.groups == 30
    assert detector.calibrations["invert"].conformal.groups == 60
    assert detector.mode == fitted.mode
    detector.save(tmp_path / "dark.diffad")
    again = daf.load(tmp_path / "dark.diffad").score(dark[60:])
    np.testing.assert_array_equal(again.p_value, new.p_value)


def test_recalibrating_needs_a_fit_normals_and_a_mode(fitted, tmp_path):
    with pytest.raises(InputError, match="not fitted"):
        daf.Detector(**OPTIONS).recalibrate(normals(20))
    with pytest.raises(InputError, match="'upwards'"):
        fitted.recalibrate(normals(20), modes=["upwards"])
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match="is not trained on what it is tested on"):
        fitted.recalibrate(tmp_path)
    table = daf.Detector(kind="vector", train_steps=2).fit(np.random.default_rng(0).random((40, 3)))
    with pytest.raises(InputError, match="labels 1 of 20 rows as anomalies"):
        table.recalibrate((np.random.default_rng(1).random((20, 3)), [0] * 19 + [1]))


def test_new_normals_are_not_contaminated(fitted):
    detector = pickle.loads(pickle.dumps(fitted))
    detector.model.config = detector.config.replace(contamination=0.2)
    detector.recalibrate(normals(50, seed=30), modes=["one_step"])
    assert len(detector.calibrations["one_step"].conformal.scores) == 50


def test_an_interrupted_recalibration_changes_nothing(fitted, monkeypatch):
    detector = pickle.loads(pickle.dumps(fitted))
    before, mode = dict(detector.calibrations), detector.mode

    def interrupted(model, *rest):
        if model.config.mode == MODES[-1]:
            raise KeyboardInterrupt
        return before[MODES[0]]

    monkeypatch.setattr("diffad_fast.detector.recalibrate_mode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detector.recalibrate(normals(20))
    assert detector.mode == mode and all(detector.calibrations[m] is before[m] for m in MODES)


def test_windows_of_a_mode_are_kept_of_that_mode(tmp_path):
    options = {"image_size": 32, "tokens": ("cell-8",), "train_steps": 2, "overlap": 0.25}
    wide = np.concatenate([normals(40), normals(40, seed=1)], axis=2)  # two windows, or three
    detector = daf.Detector(**options).fit(wide)
    many = detector.calibrations["invert"].most_windows
    detector.recalibrate(normals(20, seed=2), modes=["invert"])
    detector.save(tmp_path / "m.diffad")
    loaded = daf.load(tmp_path / "m.diffad").calibrations
    found = {mode: calibration.most_windows for mode, calibration in loaded.items()}
    assert many > 1 and found == {"reconstruct": many, "invert": 1, "one_step": many}


def test_another_false_positive_rate_moves_the_threshold(fitted, tmp_path):
    detector = pickle.loads(pickle.dumps(fitted))
    assert daf.Detector(**OPTIONS).threshold is None
    scores = detector.conformal.scores
    for rate in (0.2, 0.1, 0.3):
        detector.false_positive_rate = rate
        allowed = int(rate * (len(scores) + 1) - 1)  # of the calibration scores above it
        assert detector.threshold == scores[len(scores) - 1 - allowed]
        assert detector.config.false_positive_rate == detector.false_positive_rate == rate
    detector.save(tmp_path / "m.diffad")
    assert daf.load(tmp_path / "m.diffad").threshold == detector.threshold
    with pytest.raises(InputError, match="false_positive_rate"):
        detector.false_positive_rate = 2
    assert detector.false_positive_rate == 0.3


def test_few_normals_give_no_label_and_a_warning_where_one_scores():
    detector = daf.Detector(**{**OPTIONS, "train_steps": 2}).fit(normals(40))
    with pytest.warns(UserWarning, match="label is None: .* 20 .* 6") as caught:
        score = detector.score(normals(5, seed=1))
        next(detector.score_iter(normals(5, seed=1)))
        next(detector.score_pairs(normals(5, seed=1)))
    assert score.label is None and [w.filename for w in caught] == [__file__] * 3


class Tiny(torch.nn.Module):
    """A denoiser of one's own that has features, or a backbone."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, log_sigma=None):
        return self.conv(x)

    def features(self, x, log_sigma):
        return [self.conv(x)]


def test_a_module_of_ones_own(tmp_path):
    options = {**OPTIONS, "denoiser": Tiny(), "train_steps": 3}
    detector = daf.Detector(**options).fit(normals(40))
    detector.save(tmp_path / "m.diffad")
    with pytest.raises(CheckpointError, match="denoiser of its own"):
        daf.load(tmp_path / "m.diffad")
    loaded = daf.load(tmp_path / "m.diffad", denoiser=Tiny())
    images = normals(3, seed=1)
    with pytest.warns(UserWarning):
        np.testing.assert_array_equal(detector.score(images).score, loaded.score(images).score)


class Moody(torch.nn.Module):
    """A backbone of images, or a denoiser, whose answers depend on its mode."""

    def __init__(self, channels):
        super().__init__()
        self.convolution = torch.nn.Conv2d(channels, channels, 3, padding=1)
        self.rest = torch.nn.Sequential(torch.nn.BatchNorm2d(channels), torch.nn.Dropout(0.5))

    def forward(self, x, log_sigma=None):
        return self.rest(self.convolution(x))


@pytest.mark.parametrize(
    "role, channels, options",
    [
        ("features", 1, {"denoiser": "token-mlp", "tokens": "features", "cross_fit": 0}),
        ("features", 1, {}),
        ("denoiser", 4, {"haar_level": 1, "map_weights": (1, 0, 1)}),
    ],
)
def test_the_mode_of_ones_own_modules_is_ones_own(role, channels, options):
    """Scores do not depend on it, and each part keeps the one that it is in."""
    module = Moody(channels).train()
    module.convolution.eval()
    before = [part.training for part in module.modules()]
    options = {**OPTIONS, "train_steps": 3, "inference_dtype": "float32", **options, role: module}
    detector = daf.Detector(**options).fit(normals(30))
    assert [part.training for part in module.modules()] == before
    state = {k: v.clone() for k, v in module.state_dict().items()}
    scores = []
    for train in (True, False):
        module.train(train)
        scores.append(detector.score(normals(6, 1)).score)
        assert all(part.training is train for part in module.modules())
    np.testing.assert_array_equal(*scores)
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_colour_and_rectangles():
    images = np.stack([normals(30), normals(30, 1), normals(30, 2)], axis=1)
    images = np.concatenate([images, images], axis=3)
    options = {**OPTIONS, "image_size": (32, 64), "channels": 3, "train_steps": 2}
    with pytest.warns(UserWarning):
        score = daf.Detector(**options).fit(images).score(images[:2])
    assert score.map.shape == (2, 32, 64) and np.isfinite(score.score).all()


def test_features_are_read_at_their_noise_level(fitted, monkeypatch):
    """Clean inputs in the scale of the variance-preserving process: x / sqrt(1 + sigma^2)."""
    seen = []
    features = fitted.model.denoiser.features
    monkeypatch.setattr(
        fitted.model.denoiser,
        "features",
        lambda x, level: seen.append((x, level)) or features(x, level),
    )
    images = torch.from_numpy(normals(2, seed=1))[:, None]
    fitted.score_batch(images)
    (x, level), _ = seen
    sigma = fitted.config.feature_sigma
    expected = fitted.model.representation.encode(images) / (1 + sigma**2) ** 0.5
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(level.exp(), torch.full((2,), sigma))


def test_groups_must_match():
    with pytest.raises(InputError, match="groups has 3 labels for 40 samples"):
        daf.Detector(**OPTIONS).fit(normals(40), groups=[1, 2, 3])


def test_errors_before_and_after_fit(fitted, tmp_path):
    with pytest.raises(InputError, match="not fitted"):
        daf.Detector(**OPTIONS).score(normals(2))
    with pytest.raises(InputError, match="not fitted"):
        daf.Detector(**OPTIONS).save(tmp_path / "m.diffad")
    with pytest.raises(InputError, match="not fitted"):
        daf.Detector().calibrate(normals(20))
    with pytest.raises(InputError, match="'guess'"):
        fitted.mode = "guess"
    with pytest.raises(InputError, match="is a training.state.TrainingCheckpoint, not 'm.state'"):
        daf.Detector(**OPTIONS).fit(normals(20), training_checkpoint="m.state")
    with pytest.raises(InputError, match="cannot write"):
        fitted.save(tmp_path / "missing" / "m.diffad")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu():
    with pytest.raises(BackendError, match="cuda was asked for.* 0 CUDA"):
        daf.Detector(**OPTIONS, device="cuda")


@pytest.mark.parametrize("device", ["mps", "meta", "abacus", "cuda:x", ["cpu"]])
def test_unknown_devices(device):
    with pytest.raises(InputError, match=re.escape(f"unknown device {str(device)!r}")):
        daf.Detector(**OPTIONS, device=device)


def test_samples_of_another_detector():
    images = np.zeros((9, 1, 64, 64), np.uint8)
    opened = daf.Detector(image_size=64, preset="fast").open(images)
    with pytest.raises(InputError, match=r"as \('image', \(64, 64\), 1\) and this .* sees .*32"):
        daf.Detector(image_size=32, preset="fast").fit(opened)
    with pytest.raises(InputError, match=r"this detector sees \('vector',\): open them with it"):
        daf.Detector(kind="vector").fit(opened)
    by_hand = open_images(images, (128, 128), 1)
    with pytest.raises(InputError, match=r"opened as \('image', \(128, 128\), 1\)"):
        daf.Detector(image_size=64, preset="fast").fit(by_hand)


def test_calibrating_leaves_the_mode_and_knows_its_data(monkeypatch):
    x = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    found = daf.Detector(kind="vector", train_steps=5, **SMALL).fit(x)
    for source, modes in ((x, ("invert", "bogus")), (x[:50], ("invert",)), (x.T, ("invert",))):
        with pytest.raises(InputError):
            found.calibrate(source, modes)
        assert found.mode == "one_step"
    with pytest.raises(InputError, match="50 usable rows are not what the detector was fitted on"):
        found.calibrate(x[:50])
    for other in (x + 1, x[::-1], np.r_[x[:79], x[:1]]):  # of the same length
        with pytest.raises(InputError, match="80 usable rows are not what the detector was fitted"):
            found.calibrate(other)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(daf.detector, "calibrate_mode", interrupted)
        found.calibrate(x, ("invert",))
    assert found.mode == "one_step"
    images = normals(40)
    loader = [images[:25], images[25:]]
    found = daf.Detector(**OPTIONS | {"train_steps": 2}).fit(loader)
    before = found.conformal.scores
    found.calibrate(loader)
    assert np.array_equal(found.conformal.scores, before)


@pytest.mark.parametrize("kind, options", [
    ("vector", SMALL), ("image", COARSE),
    ("image", {"image_size": 32, "tokens": ("cell-8", "spread-2"), "cross_fit": 0, **SMALL}),
])  # fmt: skip
def test_another_semantic_weight_is_of_what_was_fitted(kind, options, tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 3)) if kind == "vector" else normals(40)
    for weight, other in ((0.7, 0.0), (0.0, 0.7)):
        found = daf.Detector(kind, **{**options, "semantic_weight": weight, "train_steps": 2})
        found.fit(x)
        before = {mode: c.conformal.scores for mode, c in found.calibrations.items()}
        found.model.config = found.config.replace(semantic_weight=other)
        if other:
            with pytest.raises(InputError, match="fit again with semantic_weight=0.7"):
                found.calibrate(x)
            found.model.config = found.config.replace(semantic_weight=weight)
        found.calibrate(x)
        for mode in MODES:
            found.mode = mode
            assert np.array_equal(found.conformal.scores, before[mode]) == (other > 0)
            names = [name for name in found.model.map_names if "semantic" in name]
            assert bool(names) == (weight > 0)
            assert len(found.model.map_names) == len(found.statistics)
        found.save(tmp_path / "m.diffad")
        loaded = daf.load(tmp_path / "m.diffad", device=found.device)
        for mode in MODES:
            found.mode = loaded.mode = mode
            assert np.array_equal(loaded.score(x[:5]).score, found.score(x[:5]).score)


def test_an_interrupted_calibration_leaves_nothing_half_fitted(monkeypatch):
    X = np.random.default_rng(0).normal(size=(60, 4))
    detector = daf.Detector("vector", token_width=32, token_blocks=1, train_steps=2)
    calibrate, calls = daf.detector.calibrate_mode, []

    def interrupted(model, *rest):
        calls.append(model.config.mode)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calibrate(model, *rest)

    monkeypatch.setattr(daf.detector, "calibrate_mode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detector.fit(X)
    assert detector.mode == "one_step"
    with pytest.raises(InputError, match="not fitted"):
        detector.score(X)
    detector.calibrate(X)  # what is missing
    assert set(detector.calibrations) == set(MODES) and len(detector.score(X)) == 60


@pytest.mark.parametrize("size", [0, -1, 2.5, "8", True])
def test_sizes_of_a_batch(fitted, size):
    for call in (fitted.score, fitted.trajectory):
        with pytest.raises(InputError, match="batch_size must be a whole number of at least 1"):
            call(normals(3), batch_size=size)


def test_what_cannot_be_reconstructed(fitted):
    image = torch.rand(1, 1, *fitted.config.image_size)
    assert fitted.reconstruct(image).shape == image.shape
    for wrong, message in (
        (image[0], r"a Tensor of shape \(1, "), (image.numpy(), "a ndarray of shape"),
        ("x.png", "not a str"), (image[..., 1:], "takes a tensor"),
        (image * 255, "floats in .0, 1."), ((image * 255).byte(), "not torch.uint8 from"),
        (image / 0 * 0, "from nan"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            fitted.reconstruct(wrong)
    with pytest.raises(InputError, match="not fitted"):
        daf.Detector(**OPTIONS).reconstruct(image)


def test_a_budget_of_hardly_any_steps_is_told():
    found = daf.Detector(**OPTIONS | {"warmup_steps": 100})
    with pytest.warns(RuntimeWarning, match="are enough for .* steps of .* fewer than the 100"):
        found.fit(normals(40), budget=0.05)


def test_a_broken_training_stops(monkeypatch):
    def overflowing(self, x, e):
        return x + self.conv_out.bias.sum() * float("inf")

    monkeypatch.setattr(WaveletUNet, "denoise", overflowing)
    with pytest.raises(InputError, match="loss became .*learning_rate"):
        daf.Detector(**OPTIONS).fit(normals(40))


def test_a_denoiser_that_answers_nan_is_told():
    class Broken(torch.nn.Module):
        def forward(self, x, log_sigma):
            return x * float("nan")

    options = {"denoiser": Broken(), "haar_level": 1, "map_weights": (1, 0, 1), "train_steps": 0}
    found = daf.Detector(**OPTIONS | options)
    with pytest.raises(InputError, match="of 6 held-out normals have no finite score .* nan: the"):
        found.fit(normals(40))
    assert not found.calibrations


def test_evaluate_on_a_folder(fitted, tmp_path):
    from PIL import Image

    def write(path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((array * 255).astype(np.uint8)).save(path)

    broken, masks = with_squares(normals(6, seed=12))
    for i, image in enumerate(normals(6, seed=13)):
        write(tmp_path / f"test/good/{i}.png", image)
    for i in range(6):
        kind = ("dent", "spot")[i % 2]
        write(tmp_path / f"test/{kind}/{i}.png", broken[i])
        write(tmp_path / f"ground_truth/{kind}/{i}_mask.png", masks[i])
    result = fitted.evaluate(tmp_path)
    json.dumps(result)
    for name in ("image_auroc", "pixel_auroc", "aupro", "f1_max", "latency_ms"):
        assert np.isfinite(result[name])
    assert set(result["per_defect"]) == {"dent", "spot"} and result["undefined"] == {}
    score = fitted.score([str(p) for p in sorted(tmp_path.glob("test/*/*.png"))])
    kinds = np.array([p.parent.name for p in sorted(tmp_path.glob("test/*/*.png"))])
    assert result["image_auroc"] == daf.metrics.auroc(kinds != "good", score.score)
    truth = [masks[int(p.stem)] & (p.parent.name != "good") for p in map(Path, score.paths)]
    assert result["aupro"] == pytest.approx(daf.metrics.aupro(truth, list(score.map)), abs=1e-6)
    dent = np.isin(kinds, ("good", "dent"))
    part = result["per_defect"]["dent"]
    assert (part["n_normal"], part["n_anomalous"]) == (6, 3)
    assert part["image_auroc"] == daf.metrics.auroc(kinds[dent] != "good", score.score[dent])
    assert result["true_positive_rate"] == score.label[kinds != "good"].mean()
    assert result["threshold"] == fitted.threshold
    listed = fitted.evaluate(mvtec_test(tmp_path)[3:])
    assert (listed["n_normal"], listed["n_anomalous"]) == (6, 3)  # without one kind of defect
    for wrong, what in (([], "a list"), (["a.png"], "a list"), (normals(3), "a ndarray")):
        with pytest.raises(InputError, match=f"cannot read {what}: .*data.mvtec.TestImage"):
            fitted.evaluate(wrong)


def test_bfloat16_convolutions(fitted, tmp_path, monkeypatch):
    # Whether this processor has instructions for it or not.
    monkeypatch.setattr("diffad_fast.persistence.has_bfloat16", lambda device: True)
    fitted.save(tmp_path / "float32.diffad")
    detector = daf.load(tmp_path / "float32.diffad")
    detector.model.config = detector.config.replace(inference_dtype="bfloat16")
    images = np.concatenate([normals(10, seed=1), with_squares(normals(10, seed=2))[0]])
    score, exact = detector.score(images), fitted.score(images)
    # Only the rounding to 8 bits in the convolutions differs.
    assert not np.array_equal(score.score, exact.score)
    assert np.corrcoef(score.score, exact.score)[0, 1] > 0.99
    assert all(p.dtype == torch.float32 for p in detector.model.denoiser.parameters())
    detector.save(tmp_path / "bfloat16.diffad")
    loaded = daf.load(tmp_path / "bfloat16.diffad")
    assert loaded.config.inference_dtype == "bfloat16"
    np.testing.assert_array_equal(loaded.score(images).score, score.score)
    # Fitted on a GPU, say, and loaded where bfloat16 is far slower than float32.
    monkeypatch.setattr("diffad_fast.persistence.has_bfloat16", lambda device: False)
    with pytest.warns(RuntimeWarning, match="bfloat16.diffad was fitted to score in bfloat16, and"):
        elsewhere = daf.load(tmp_path / "bfloat16.diffad")
    assert elsewhere.config.inference_dtype == "float32"
    np.testing.assert_array_equal(elsewhere.score(images).score, exact.score)


def test_inference_dtype_is_settled_by_fit():
    detector = daf.Detector(**{**OPTIONS, "train_steps": 2})
    assert detector.config.inference_dtype == "auto"
    detector.fit(normals(40))
    assert detector.config.inference_dtype in ("float32", "bfloat16")


@pytest.mark.parametrize("gain, chosen", [(2.0, "bfloat16"), (1.05, "float32"), (0.3, "float32")])
def test_bfloat16_only_where_it_is_faster(monkeypatch, gain, chosen):
    unet = daf.denoisers.create("unet-tiny", 16)
    x = torch.zeros(1, 16, 8, 8)
    monkeypatch.setattr(inference, "_gain", lambda *_: gain)
    monkeypatch.setattr(inference, "SMALLEST_GAIN", 1.1)
    monkeypatch.setattr(inference.native, "cpu_features", lambda: ["avx2"])
    assert inference.faster_dtype(unet, x) == "float32"
    monkeypatch.setattr(inference.native, "cpu_features", lambda: ["avx2", "avx512bf16"])
    assert inference.faster_dtype(unet, x) == chosen


def test_the_gain_of_bfloat16_is_measured():
    assert inference._gain(daf.denoisers.create("unet-tiny", 16), torch.zeros(1, 16, 8, 8)) > 0


@pytest.mark.parametrize(
    "isa, chosen", [("amx", "bfloat16"), ("avx512_bf16", "bfloat16"), ("avx512", "float32")]
)
def test_tokens_are_scored_in_bfloat16_where_there_are_units_for_it(monkeypatch, isa, chosen):
    monkeypatch.setattr(daf.native, "cpu_isa", lambda: isa)
    images = normals(40)
    options = {**OPTIONS, "denoiser": "token-mlp", "token_width": 32, "train_steps": 2}
    options["tokens"] = ("cell-8", "patch-16")
    detector = daf.Detector(**options, device="cpu").fit(images)
    assert detector.config.inference_dtype == chosen
    options["inference_dtype"] = "float32"
    exact = daf.Detector(**options, device="cpu").fit(images).score(images).score
    tolerance = 2e-2 if chosen == "bfloat16" else 0
    np.testing.assert_allclose(detector.score(images).score, exact, rtol=tolerance, atol=tolerance)


def test_own_denoisers_choose_their_dtype_themselves():
    class Own(torch.nn.Module):
        pass

    found = daf.Detector(denoiser=Own(), map_weights=(1, 0, 1))
    assert found.config.inference_dtype == "float32"
    with pytest.raises(InputError, match="bfloat16.*built-in"):
        daf.Detector(denoiser=Own(), inference_dtype="bfloat16")


@pytest.mark.parametrize("options", [
    {"denoiser": "token-mlp", "tokens": ("cell-8", "patch-16"), "token_width": 32},
    {"map_weights": (1.0, 0.0, 0.0)},
])  # fmt: skip
def test_pickles_and_copies(options):
    images = normals(40)
    detector = daf.Detector(**{**OPTIONS, **options, "train_steps": 2}, device="cpu")
    fresh = pickle.loads(pickle.dumps(detector))
    assert fresh.config == detector.config and not fresh.calibrations
    detector.fit(images)
    expected = detector.score(images[:3]).score
    for again in (pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector), fresh.fit(images)):
        np.testing.assert_array_equal(again.score(images[:3]).score, expected)


@pytest.mark.parametrize("asked", [None, "cpu"])
def test_a_pickle_goes_to_the_device_that_was_asked_for(asked, monkeypatch):
    """Where none was, to the best there is; a copy stays where it is."""
    found = []

    def resolved(device):
        found.append(device)
        return torch.device("cpu")

    options = {"train_steps": 1, "token_width": 16, "token_blocks": 1, "device": asked}
    detector = daf.Detector("vector", **options)
    detector.fit(np.random.default_rng(0).normal(size=(60, 3)))
    monkeypatch.setattr(daf.detector, "resolve_device", resolved)
    for fitted in (detector, daf.Detector("vector", device=asked)):
        pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fitted))))
        assert found[-2:] == [asked, asked]
        copied = copy.deepcopy(fitted)
        assert found[-1] == fitted.device
        pickle.loads(pickle.dumps(copied))
        assert found[-1] == asked


class Plain(torch.nn.Module):
    """A denoiser of one's own."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 1)

    def forward(self, x, log_sigma):
        return self.layer(x)


@pytest.mark.parametrize("fetched", ["resnet18", "hf-hub:somebody/something"])
def test_copies_share_no_module_and_fetch_none(fetched, monkeypatch):
    """Nor do pickles: neither the denoiser that was handed over nor a backbone by name."""
    images, made = normals(40), []
    monkeypatch.setattr(daf.detector, "_backbone", lambda config: made.append(1) or Tiny(1))
    detector = daf.Detector(
        **OPTIONS | {"denoiser": Plain(), "train_steps": 2}, haar_level=1, features=fetched
    ).fit(images)
    expected = detector.score(images[:3]).score
    for again in (copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))):
        other = again(detector)
        np.testing.assert_array_equal(other.score(images[:3]).score, expected)
        other.fit(images[:20])
        np.testing.assert_array_equal(detector.score(images[:3]).score, expected)
    assert len(made) == 1
    open_files = len(os.listdir("/proc/self/fd"))  # one for each tensor that is shared
    assert ForkingPickler.dumps(detector) and len(os.listdir("/proc/self/fd")) == open_files


def test_contamination_corrects_the_threshold():
    """8% of the training rows are anomalies, three times as wide as normals: as they are in the
    calibration too, hardly anything exceeds its threshold of 5%."""
    rng = np.random.default_rng(0)
    train = np.concatenate([rng.standard_normal((920, 6)), 3 * rng.standard_normal((80, 6))])
    test = np.concatenate([rng.standard_normal((400, 6)), 3 * rng.standard_normal((200, 6))])
    options = {"train_steps": 150, "token_width": 64, "token_blocks": 1, "device": "cpu"}
    hits, alarms = {}, {}
    for share in (0.0, 0.08):
        detector = daf.Detector("vector", contamination=share, **options).fit(train)
        label = detector.score(test).label
        alarms[share], hits[share] = label[:400].mean(), label[400:].mean()
        assert len(detector.conformal.scores) == 150 - int(150 * share)
    assert hits[0.0] < 0.7 and hits[0.08] > 0.85, hits
    assert alarms[0.08] < 0.1, alarms


def test_rounding_keeps_no_anomaly_in_the_calibration():
    """Of a hundred with 29% of contamination 71 stay, though 0.29 * 100 < 29."""
    held_out = _HeldOut(DetectorConfig.create(kind="vector"), contamination=0.29)
    held_out.add(SimpleNamespace(score=lambda x: (None, x[:, 0])), torch.rand(100, 1), range(100))
    assert len(held_out.calibration([]).conformal.scores) == 71


# ------------------------------------------------------------------- found by attacking it


def test_groups_of_any_kind_keep_objects_together():
    """A tensor's elements compare by identity, a Series is found by its index: values count."""
    pandas = pytest.importorskip("pandas")
    objects = np.repeat(np.arange(12), 5)
    images, options = normals(60), {"image_size": 32, "train_steps": 5}
    shuffled = pandas.Series(objects, index=np.random.default_rng(0).permutation(60))
    for groups in (objects, list(objects), torch.tensor(objects), shuffled,
                   [torch.tensor(o) for o in objects]):  # fmt: skip
        found = daf.Detector(**options).fit(images, groups=groups)
        assert found.conformal.groups == 12
        for part in found.parts:
            assert not {objects[i] for i in part.split.fit} & {
                objects[i] for i in part.split.conformal
            }
    with pytest.raises(InputError, match="groups has the label .*give a number or a text"):
        daf.Detector(**options).fit(images, groups=np.zeros((60, 2)))


def test_what_is_infinitely_far_away_is_an_anomaly():
    rng = np.random.default_rng(0)
    found = daf.Detector(kind="vector", train_steps=50, **SMALL).fit(rng.normal(size=(300, 10)))
    x = rng.normal(size=(5, 10))
    x[0, 3], x[1, 3], x[2, 3] = np.finfo(np.float32).max, 1e20, -1e30
    for mode in ("one_step", "invert", "reconstruct"):
        found.mode = mode
        out = found.score(x)
        assert np.isfinite(out.score).all()
        assert out.label[:3].all() and (out.p_value[:3] == out.p_value.min()).all()
        assert out.score[:3].min() > out.score[3:].max()


def test_a_score_that_is_no_number_is_an_anomaly():
    conformal = daf.scoring.Conformal(np.arange(40.0), None, 0.05)
    assert conformal.label(np.array([np.nan, np.inf, 0.0])).tolist() == [1, 1, 0]
    assert conformal.p_value(np.array([np.nan]))[0] == 1 / 41


def test_few_normals_leave_no_map_alone():
    """Of a map with one position, one or two held-out normals tell next to nothing."""
    rng = np.random.default_rng(0)
    texture = rng.uniform(0.3, 0.7, (60, 64, 64)).astype(np.float32)
    broken = texture[40:].copy()
    broken[:, 20:28, 30:38] = 0.95
    found = daf.Detector(image_size=64, preset="fast", train_steps=30, **SMALL).fit(texture[:12])
    clean, bad = found.score(texture[20:40]), found.score(broken)
    assert daf.metrics.auroc(np.repeat([0, 1], 20), np.r_[clean.score, bad.score]) > 0.8
    assert bad.map.std(axis=(1, 2)).min() > 1e-2 * np.abs(bad.map).max()


@pytest.mark.parametrize("options", [{"tokens": ("cell-8",)}, {"denoiser": "unet-tiny"}])
def test_the_memory_of_graphs_is_given_back_at_once(options):
    """Not when Python collects cycles: it does not know how much of a GPU's they hold."""

    def graphs(detector):
        detector.score(images)
        scoring = detector.model._scoring
        found = getattr(scoring, "graphed", scoring)
        found._captured["a shape"] = "a graph", 0
        return found

    images = torch.rand(30, 1, 32, 32)
    detector = daf.Detector(image_size=32, train_steps=1, cross_fit=0, device="cpu", **options)
    detector.fit(images)
    for mode in ("reconstruct", "invert", "one_step"):
        before = graphs(detector)
        detector.mode = mode
        assert not before._captured
    before = graphs(detector)
    detector.fit(images)
    assert not before._captured
    before = graphs(detector)
    gc.disable()
    del detector
    gc.enable()
    assert not before._captured


def test_models_of_folds_keep_no_graphs(monkeypatch):
    used = []

    def call(graphed, x):
        graphed._captured["a shape"] = "a graph", 0
        used.append(graphed)
        return graphed.function(x)

    monkeypatch.setattr(Graphed, "__call__", torch.inference_mode()(call))
    images = torch.rand(40, 1, 32, 32)
    detector = daf.Detector(
        image_size=32, tokens=("cell-8",), train_steps=1, cross_fit=2, device="cpu"
    ).fit(images)
    models = [part.model for part in detector.parts]
    assert len(models) == 2 and detector.model not in models
    of_folds = [model._scoring for model in models]
    assert all(any(g is u for u in used) for g in of_folds)
    assert not any(graphed._captured for graphed in of_folds)
    detector.score(images)
    assert detector.model._scoring._captured


def test_one_row_for_statistics():
    x = np.random.default_rng(0).normal(size=(8, 4))
    found = daf.Detector(kind="vector", train_steps=20, **SMALL).fit(x)
    assert len(found.parts[0].split.statistics) == 1
    near, far = found.score(np.r_[x, 20 + x]).score.reshape(2, 8)
    assert near.max() < far.min() < 100 and abs(near).max() < 100


def test_a_second_fit_begins_anew():
    options = COARSE | {"train_steps": 3, "reverse_steps": 1}
    once = daf.Detector(**options).fit(normals(20))
    twice = daf.Detector(**options).fit(normals(20, seed=5)).fit(normals(20))
    assert np.array_equal(once.score(normals(4)).score, twice.score(normals(4)).score)


def test_a_budget_trains_what_would_be_taken_as_it_is():
    options = COARSE | {"train_steps": 0, "reverse_steps": 1}
    found = daf.Detector(**options)
    with pytest.warns(RuntimeWarning, match="enough for"):
        assert found.fit(normals(20), budget=1e-3).history.steps == 1
        trained = copy.deepcopy(found.model.denoiser.state_dict())
        found.fit(normals(20), budget=1e-3)  # anew
    for name, value in found.model.denoiser.state_dict().items():
        assert torch.equal(value, trained[name]), name
    with pytest.raises(InputError, match="training needs float32"):
        daf.Detector(**options | {"denoiser": Plain().half(), "train_budget": 1.0})


def test_what_a_fit_has_settled_is_open_to_the_next(tmp_path):
    """In the process and from a file; what was changed since stays."""
    rng = np.random.default_rng(0)
    texture = rng.uniform(0.3, 0.7, (1, 64, 64))
    lamp = np.linspace(-1, 1, 64) * rng.uniform(-0.25, 0.25, (60, 1, 1))
    lit = (texture + lamp).astype(np.float32)
    even = (texture + rng.normal(0, 0.02, (60, 64, 64))).astype(np.float32)
    options = {
        "image_size": 64, "preset": "fast", "train_steps": 5, "tokens": "energy-8",
        "token_width": 32, "token_blocks": 1,
    }  # fmt: skip
    first = daf.Detector(**options).fit(lit)
    assert first.config.illumination > 0 and first.config.inference_dtype != "auto"
    first.save(tmp_path / "m.diffad")
    fresh = daf.Detector(**options).fit(even)
    assert fresh.config.illumination == 0
    for again in (first, daf.load(tmp_path / "m.diffad"), copy.deepcopy(first)):
        again.fit(even)
        assert again.config == fresh.config
        assert np.array_equal(again.score(lit).score, fresh.score(lit).score)
    first.model.config = first.config.replace(illumination=5.0)
    assert first.fit(even).config == fresh.config.replace(illumination=5.0)


def test_a_second_fit_may_have_another_width():
    rng = np.random.default_rng(0)
    options = {"kind": "vector", "train_steps": 5, **SMALL}
    found = daf.Detector(**options).fit(rng.normal(size=(60, 10)))
    assert found.config.semantic_weight == 1.0
    wide = rng.normal(size=(60, 300))
    found.fit(wide)
    fresh = daf.Detector(**options).fit(wide)
    assert found.config == fresh.config
    assert np.array_equal(found.score(wide).score, fresh.score(wide).score)
    with pytest.raises(InputError, match="10 features and the detector was fitted on 300"):
        found.score(rng.normal(size=(5, 10)))


def test_anomalies_with_labels_are_not_trained_on():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 5)), np.r_[np.zeros(70), np.ones(10)]
    with pytest.raises(InputError, match="labels 10 of 80 rows as anomalies"):
        daf.Detector(kind="vector", train_steps=20, **SMALL).fit((x, y))
    daf.Detector(kind="vector", train_steps=20, **SMALL).fit((x[:70], y[:70]))


def test_resuming_on_other_images_is_refused(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    options = COARSE | {"train_steps": 20}
    kept = TrainingCheckpoint(tmp_path / "state", seconds=0.0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        seen = []
        from diffad_fast.training import images

        step = images.ImageTrainer._loss
        patch.setattr(
            images.ImageTrainer, "_loss",
            lambda *a: stop() if len(seen) > 8 else (seen.append(0), step(*a))[1],
        )  # fmt: skip
        daf.Detector(**options).fit(normals(40), training_checkpoint=kept)
    again = TrainingCheckpoint(tmp_path / "state", resume=True)
    with pytest.raises(CheckpointError):
        daf.Detector(**options).fit(normals(40, seed=7), training_checkpoint=again)
    daf.Detector(**options).fit(normals(40), training_checkpoint=again)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_steps": 100.5}, "train_steps must be a whole number, not 100.5"),
        ({"token_width": 64.0}, "token_width must be a whole number"),
        ({"seed": 1.0}, "seed must be a whole number"),
        ({"cross_fit": 2.5}, "cross_fit must be a whole number"),
        ({"reverse_steps": True}, "reverse_steps must be a whole number, not True"),
        ({"weight_decay": "a"}, "weight_decay must be a number"),
        ({"gradient_clip": -1.0}, "gradient_clip must be a number from 0"),
        ({"image_scale": "yes"}, "image_scale must be true or false"),
    ],
)
def test_options_of_the_wrong_type(options, message):
    with pytest.raises(InputError, match=message):
        daf.Detector(**options)


def test_options_may_be_numbers_of_numpy():
    found = daf.Detector(seed=np.int64(3), train_steps=np.int32(7), eta=np.float32(0.0))
    assert found.config == daf.Detector(seed=3, train_steps=7, eta=0.0).config


def test_windows_that_are_not_square():
    images = np.random.default_rng(0).uniform(size=(12, 64, 96)).astype(np.float32)
    options = {"image_size": (64, 96), "overlap": 0.0, "train_steps": 2, "cross_fit": 0}
    found = daf.Detector(**options).fit(images)
    assert found.score(images[:2]).map.shape == (2, 64, 96)
    with pytest.raises(InputError, match="64x96 pixels and the detector needs at least 96x64"):
        found.score(images[:2].transpose(0, 2, 1))


def test_a_file_fetches_nothing_from_anybody(fitted):
    tensors, texts = fitted.state()
    config = json.loads(texts["config"]) | {"features": "hf-hub:somebody/something"}
    with pytest.raises(CheckpointError, match="'hf-hub:somebody/something', weights that anybody"):
        from_state(tensors, texts | {"config": json.dumps(config)}, "m.diffad")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_denoisers_in_other_dtypes(dtype):
    """Scored as they are, in every mode; trained in float32 alone."""
    torch.manual_seed(0)
    images, given = torch.rand(24, 1, 32, 32), Tiny()
    options = {"image_size": 32, "haar_level": 1, "train_steps": 0, "semantic_weight": 1.0}
    plain = daf.Detector(denoiser=given, **options).fit(images)
    other = daf.Detector(denoiser=copy.deepcopy(given).to(dtype), **options).fit(images)
    for mode in ("reconstruct", "invert", "one_step"):
        plain.mode = other.mode = mode
        expected, found = plain.score(images[:8]), other.score(images[:8])
        assert found.map.dtype == np.float32
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-3
        np.testing.assert_allclose(found.score, expected.score, rtol=tolerance, atol=tolerance)
    with pytest.raises(InputError, match="training needs float32: pass denoiser.float()"):
        daf.Detector(denoiser=Tiny().to(dtype), image_size=32, train_steps=3)
