"""Two processes on gloo against one; a process that is killed; scores gathered in order."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import training_worker as worker
from PIL import Image

import diffad_fast as daf
from diffad_fast.errors import InputError
from diffad_fast.training import checkpoint
from diffad_fast.training.distributed import Processes, processes, torchrun_group
from diffad_fast.training.state import KIND, TrainingCheckpoint

ROOT = Path(daf.__file__).parents[1]


def result(path):
    error = Path(f"{path}.error")
    assert path.exists(), error.read_text() if error.exists() else "no result"
    return torch.load(path)


def together(count, kind, state, folder, options):
    folder.mkdir()
    running = worker.start_joined(count, kind, state, folder, options)
    for process in running:
        process.join(60)
    return [result(folder / str(rank)) for rank in range(count)]


@pytest.mark.parametrize("kind", ["image", "token"])
def test_two_processes_train_what_one_does(kind, tmp_path):
    """The same global batch: equal up to the order of sums."""
    options = {"train_steps": 15}
    if kind == "image":
        options |= {"normalisation": False}
    weights, history = worker.finished(kind, None, tmp_path / "one", options)
    (first, logged), (second, _) = together(2, kind, None, tmp_path / "two", options)
    worker.assert_same(first, second)
    for name, value in weights.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(logged["validation_loss"], history["validation_loss"], strict=True):
        assert a[0] == b[0] and a[1] == pytest.approx(b[1], rel=1e-4)
    assert logged["loss"][-1][1] == pytest.approx(history["loss"][-1][1], rel=1e-4)
    # They do not agree by chance: other samples give other weights.
    other, _ = worker.finished(kind, None, tmp_path / "other", options | {"seed": 1})
    assert any(not torch.allclose(other[n], first[n], rtol=1e-3, atol=1e-4) for n in other)


def test_processes_hold_one_denoiser(tmp_path):
    """Whatever each of them began with, and has seen of the samples."""
    begun = worker.unseeded_trainer().denoiser.state_dict()
    (first, logged), (second, other) = together(2, "unseeded", None, tmp_path / "two", {})
    worker.assert_same(first, second)
    assert logged["validation_loss"] == other["validation_loss"]
    assert torch.equal(first["layers.3.bias"], begun["layers.3.bias"])


def test_two_processes_share_a_budget(tmp_path):
    """They agree on the steps that it buys, and on the moment when it is used up."""
    results = together(2, "token", None, tmp_path / "two", {"train_budget": 0.5})
    (first, logged), (second, other) = results
    worker.assert_same(first, second)
    assert logged["loss"] == other["loss"] and logged["best_step"] == other["best_step"]


def test_a_killed_process_ends_the_job_and_leaves_a_state(tmp_path):
    state, options = tmp_path / "state", {"train_steps": 10**6}
    running = worker.start_joined(2, "token", state, tmp_path, options)
    worker.wait_for(state, running[1])
    os.kill(running[1].pid, signal.SIGKILL)
    running[0].join(60)
    message = (tmp_path / "0.error").read_text()
    assert message.startswith("ProcessError: process 0 of 2 lost contact with the others")
    assert str(state) in message and "\n" not in message
    _, texts = checkpoint.load(state, KIND)
    steps = int(texts["step"])
    assert f"after {steps} steps" in message
    resumed = worker.token_trainer(train_steps=10**6)
    resumed.inputs = stopping(resumed.inputs, steps + 3)
    with pytest.raises(Stopped):
        resumed.run(TrainingCheckpoint(state, resume=True))
    assert resumed.optimizer._count == steps + 3


class Stopped(Exception):
    pass


def stopping(inputs, at):
    def wrapped(step):
        if step == at:
            raise Stopped
        return inputs(step)

    return wrapped


def test_sigterm_to_one_stops_all_at_the_same_step(tmp_path):
    state, options = tmp_path / "state", {"train_steps": 10**6}
    running = worker.start_joined(2, "token", state, tmp_path, options)
    worker.wait_for(state, running[1])
    os.kill(running[1].pid, signal.SIGTERM)
    for rank, name in enumerate(("KeyboardInterrupt", "Terminated")):
        running[rank].join(60)
        assert (tmp_path / f"{rank}.error").read_text().startswith(name)
    checkpoint.load(state, KIND)


@pytest.fixture(scope="module")
def hums(tmp_path_factory):
    """A detector of clips, and a data set with seven that can be read."""
    soundfile = pytest.importorskip("soundfile")
    folder, rate = tmp_path_factory.mktemp("hums"), 8000
    rng, time = np.random.default_rng(0), np.arange(rate // 2) / rate

    def hum(whistle=0.0):
        tones = np.sin(1257 * time) / 5 + whistle * np.sin(18850 * time)
        return (tones + rng.normal(0, 0.05, len(time))).astype(np.float32)

    detector = daf.Detector(
        "audio", sample_rate=rate, n_fft=256, hop=128, n_mels=16, window_frames=16, window_step=8,
        train_steps=2, token_width=16, token_blocks=1, cross_fit=0, batch_size=2,
        device="cpu",
    )  # fmt: skip
    detector.fit([hum() for _ in range(12)]).save(folder / "hum.diffad")
    for kind, whistle, count in (("normal", 0.0, 4), ("whistle", 0.2, 3)):
        (folder / "data" / "test" / kind).mkdir(parents=True)
        for i in range(count):
            path = folder / "data" / "test" / kind / f"{i}.wav"
            soundfile.write(path, hum(whistle), rate)
    (folder / "data" / "test" / "normal" / "bad.wav").write_bytes(b"no sound")
    return folder


def test_a_report_of_clips_is_written_by_the_first(hums, tmp_path):
    """In batches of which each process has several; it tells what was left out."""
    options = {"scored": hums / "hum.diffad", "data": hums / "data", "report": tmp_path / "report"}
    (first, second) = together(2, "evaluated", None, tmp_path / "two", options)
    detector = daf.load(hums / "hum.diffad", device="cpu")
    with pytest.warns(UserWarning):
        figures = detector.evaluate(hums / "data")
        score = detector.score(hums / "data" / "test")
    for name in set(figures) - {"latency_ms", "real_time"}:
        assert first[0][name] == second[0][name] == figures[name], name
    page = (tmp_path / "report" / "index.html").read_text()
    assert "1 unusable clip" in page and page.count("<figure>") == 7
    for _, scores, index, skipped, _ in (first, second):
        np.testing.assert_allclose(scores, score.score, rtol=1e-5)
        assert index == score.index.tolist() and skipped == score.skipped
    assert first[-1] is None and second[-1] == score.map.shape


def test_processes_that_have_other_samples_are_told(hums, tmp_path):
    folders = [hums / "data" / "test" / kind for kind in ("normal", "whistle")]
    options = {"scored": hums / "hum.diffad", "folders": folders}
    first, second = together(2, "different samples", None, tmp_path / "two", options)
    assert first == second
    rows, last, same = first[:3]
    assert first[3:6] == first[:3] and same == ""
    assert "rank 0 has 60, rank 1 has 40" in rows and "same rows" in rows
    assert "rank 1 differ from rank 0's (rank 0 has 60, rank 1 has 60)" in last
    assert "same clips" in first[6] and "rank 0 has 5, rank 1 has 3" in first[6]


def test_shares():
    assert Processes(1, 2).share_of(8) == slice(4, 8)
    assert processes() == (0, 1) and processes().first
    assert processes().agreed(3) == 3 and processes().gathered(3) == [3]
    with torchrun_group("cpu") as device:
        assert device == "cpu"


def test_processes_that_have_not_joined_are_told(monkeypatch):
    detector = daf.Detector(kind="vector", train_steps=1, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="WORLD_SIZE is 2, .*torchrun_group") as caught:
        detector.fit(np.random.default_rng(0).normal(size=(200, 3)))
    (told,) = [w for w in caught if "WORLD_SIZE" in str(w.message)]
    assert told.filename == __file__


def test_a_batch_that_cannot_be_shared(monkeypatch):
    monkeypatch.setattr("diffad_fast.training.loop.processes", lambda: Processes(0, 3))
    with pytest.raises(InputError, match="64 tokens.*multiple of 1 parts in each of 3"):
        worker.token_trainer()


@pytest.mark.slow
def test_torchrun_fits_scores_and_evaluates(tmp_path):
    """The command line under torchrun: the same files as without, each of them once."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    for part, count in (("train/good", 40), ("test/good", 5), ("test/hole", 4)):
        (tmp_path / "data" / part).mkdir(parents=True)
        for i in range(count):
            picture = 128 + 60 * np.sin(x / 3 + rng.uniform(0, 6)) + rng.normal(0, 4, (32, 32))
            if part == "test/hole":
                picture[8:16, 8:16] = 0
            picture = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
            picture.save(tmp_path / "data" / part / f"{i}.png")
    masks = tmp_path / "data" / "ground_truth" / "hole"
    masks.mkdir(parents=True)
    for i in range(4):
        mask = np.zeros((32, 32), np.uint8)
        mask[8:16, 8:16] = 255
        Image.fromarray(mask).save(masks / f"{i}_mask.png")
    (tmp_path / "data" / "test" / "good" / "2.png").write_bytes(b"no image")

    def run(count, *arguments):
        launcher = [sys.executable, "-m"]
        if count > 1:
            launcher += ["torch.distributed.run", "--nproc-per-node", str(count), "-m"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launcher, "diffad_fast", *map(str, arguments)],
            capture_output=True, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    scores, figures = [], []
    for count in (1, 2):
        out = tmp_path / str(count)
        out.mkdir()
        model = out / "m.diffad"
        run(
            count, "fit", tmp_path / "data", "--out", model, "--image-size", 32, "--steps", 6,
            "--denoiser", "unet-tiny", "--batch-size", 4, "--device", "cpu",
        )  # fmt: skip
        assert sorted(p.name for p in out.iterdir()) == ["m.diffad", "m.diffad.csv"]
        run(
            count, "score", model, tmp_path / "data" / "test", "--out", out / "s", "--batch-size", 2
        )
        scores.append((out / "s" / "scores.csv").read_text().splitlines())
        assert len(list((out / "s" / "heatmaps").rglob("*.png"))) == 8
        figures.append(json.loads(run(count, "evaluate", model, tmp_path / "data", "--json")))
    one, two = ([line.split(",")[0] for line in lines] for lines in scores)
    unusable = next(path for path in one if path.endswith("2.png") and "good" in path)
    assert unusable in two and len(one) == len(two) == 10
    assert [p for p in one if p != unusable] == [p for p in two if p != unusable]
    for name in ("image_auroc", "n_normal", "n_anomalous"):
        assert figures[0][name] == pytest.approx(figures[1][name])
