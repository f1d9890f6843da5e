"""Trainings that are killed, stopped or out of disk, and what is left of them."""

import copy
import errno
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
import training_worker as worker

import diffad_fast as daf
from diffad_fast.errors import CheckpointError, InputError, ProcessError, Terminated
from diffad_fast.training import checkpoint
from diffad_fast.training.state import KIND, TrainingCheckpoint
from diffad_fast.training.tokens import TokenTrainer

OPTIONS = {"image": {"train_steps": 80}, "token": {"train_steps": 160}}


@pytest.mark.parametrize("kind", ["image", "token"])
def test_killed_at_random_moments(kind, tmp_path):
    """After each kill -9 the state on disk loads, and the last run ends with the weights, and the
    losses, of one that was never interrupted."""
    whole, history = worker.finished(kind, None, tmp_path / "whole", OPTIONS[kind])
    state, out = tmp_path / "state", tmp_path / "out"
    rng = random.Random(0)
    steps, kills = [], 0
    while kills < 10:
        process = worker.start(kind, state, out, OPTIONS[kind])
        # From before the first write on; progress of a few dozen steps at the most.
        before = state.stat().st_mtime_ns if state.exists() else 0
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.is_alive():
            if state.exists() and state.stat().st_mtime_ns != before:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        _, texts = checkpoint.load(state, KIND)
        steps.append(int(texts["step"]))
        if steps[-1] > 0.8 * OPTIONS[kind]["train_steps"]:
            state.unlink()
    assert all(a <= b or b < a / 2 for a, b in zip(steps, steps[1:], strict=False))
    weights, resumed = worker.finished(kind, state, out, OPTIONS[kind])
    worker.assert_same(weights, whole)
    for name in ("loss", "validation_loss"):
        assert [tuple(x) for x in resumed[name]] == history[name]
    assert resumed["best_step"] == history["best_step"]
    # What the killed writers had begun is gone.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "state", "whole"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_process_keeps_the_state(number, tmp_path):
    state = tmp_path / "state"
    options = {"train_steps": 10**6}
    process = worker.start("token", state, tmp_path / "out", options)
    worker.wait_for(state, process)
    os.kill(process.pid, number)
    process.join(30)
    process.kill()  # which nothing else would end, had it not heard
    assert (tmp_path / "out.error").read_text().startswith("Terminated")
    _, texts = checkpoint.load(state, KIND)
    assert int(texts["step"]) > 0


def test_a_full_disk_costs_a_warning_and_not_the_previous_state(tmp_path, monkeypatch):
    state = tmp_path / "state"
    write, calls = checkpoint.write_atomically, []

    def full_after_three(path, content):
        calls.append(path)
        if len(calls) <= 3:
            return write(path, content)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: no_space())
            return write(path, content)

    def no_space():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", full_after_three)
    trainer = worker.token_trainer(train_steps=6)
    with pytest.warns(RuntimeWarning, match="goes on without .*No space left"):
        trainer.run(TrainingCheckpoint(state, seconds=0.0))
    assert len(calls) == 7 and os.listdir(tmp_path) == ["state"]
    assert checkpoint.load(state, KIND)[1]["step"] == "3"
    monkeypatch.undo()
    resumed = worker.token_trainer(train_steps=6)
    resumed.run(TrainingCheckpoint(state, resume=True))
    worker.assert_same(resumed.denoiser.state_dict(), trainer.denoiser.state_dict())


@pytest.mark.parametrize("kind", ["image", "token"])
def test_a_state_belongs_to_its_options_data_and_network(kind, tmp_path):
    state = tmp_path / "state"
    create = worker.TRAINERS[kind]
    create().run(TrainingCheckpoint(state, seconds=0.0))

    others = [create(learning_rate=1e-4), create(), create()]
    if kind == "image":
        others[1].fit = others[1].fit.flip(0)
        others[2].denoiser.layers[0] = torch.nn.Conv2d(1, 8, 5, padding=2)
    else:
        others[1].tokens[3, 2] += 1
        others[2].denoiser = worker.TokenMLP(6, 48, 2)
    for other in others:
        with pytest.raises(CheckpointError, match="other options or other data"):
            other.run(TrainingCheckpoint(state, resume=True))


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The parts of the state of a training that was not interrupted."""
    state = tmp_path_factory.mktemp("complete") / "m.training"
    worker.image_trainer().run(TrainingCheckpoint(state))
    return checkpoint.load(state, KIND)


@pytest.mark.parametrize(
    ("name", "junk"),
    [
        *((name, None) for name in ("fingerprint", "config", "step", "history", "first")),
        *(("history", junk) for junk in ("no JSON", "[7]", '{"losses": []}', '{"loss": []}')),
        *((name, junk) for name in ("step", "total", "validations") for junk in ("x", "-1", "1.5")),
        *((name, torch.zeros(1)) for name in ("values", "best", "buffer.layers.1.running_var")),
        ("average", torch.zeros(3, dtype=torch.float64)),
        ("best_buffer.layers.1.running_var", torch.zeros(3)),
    ],
)
def test_junk_in_a_state_is_told(name, junk, complete, tmp_path):
    """Though its checksum is right."""
    state, parts = tmp_path / "m.training", [dict(part) for part in complete]
    assert any(name in part for part in parts)
    for part in parts:
        if name in part:
            part[name] = junk
        if junk is None:
            part.pop(name, None)
    checkpoint.save(state, KIND, *parts)
    kept, resumed = TrainingCheckpoint(state, resume=True), worker.image_trainer()
    if name == "config":
        with pytest.raises(CheckpointError, match="m.training is incomplete, config is not in it"):
            kept.config()
    else:
        with pytest.raises(CheckpointError, match=f"m.training is .*{name}.*, or fit anew"):
            resumed.run(kept)


def test_an_interrupted_run_that_cannot_be_kept_says_so(tmp_path, monkeypatch):
    trainer = worker.token_trainer()
    monkeypatch.setattr(trainer, "inputs", interrupting(trainer.inputs))
    with pytest.raises(InputError, match="cannot write"):
        trainer.run(TrainingCheckpoint(tmp_path / "no" / "state"))


def test_where_and_how_often_a_state_is_kept(tmp_path):
    path = tmp_path / "state"
    assert TrainingCheckpoint(path, "5min") == TrainingCheckpoint(path, 300.0)
    for seconds in (-1, float("nan"), None, "soon"):
        with pytest.raises(InputError, match=f"{seconds}"):
            TrainingCheckpoint(path, seconds)
    with pytest.raises(InputError, match="it is a folder; give a file name"):
        TrainingCheckpoint(tmp_path)


@pytest.mark.parametrize("at", [4, 58])
def test_an_interrupted_step_is_validated(at, tmp_path, monkeypatch):
    """The signal of one step ends the next, which here is validated, and at last the last one."""
    whole = worker.token_trainer()
    expected = whole.run()
    trainer = worker.token_trainer()
    monkeypatch.setattr(trainer, "inputs", interrupting(trainer.inputs, at))
    with pytest.raises(KeyboardInterrupt):
        trainer.run(TrainingCheckpoint(tmp_path / "state"))
    resumed = worker.token_trainer()
    found = resumed.run(TrainingCheckpoint(tmp_path / "state", resume=True))
    assert at + 1 in [step for step, _ in expected.validation_loss]
    assert [tuple(entry) for entry in found.validation_loss] == expected.validation_loss
    worker.assert_same(resumed.denoiser.state_dict(), whole.denoiser.state_dict())


@pytest.mark.parametrize("when", ["last step", "last validation"])
def test_an_interruption_at_the_very_end_is_heard(when, tmp_path, monkeypatch):
    whole, trainer, kept = worker.token_trainer(), worker.token_trainer(), tmp_path / "state"
    whole.run()
    validation_loss = trainer.validation_loss

    def judged():
        if trainer.done == 60:
            os.kill(os.getpid(), signal.SIGTERM)
        return validation_loss()

    if when == "last step":
        monkeypatch.setattr(trainer, "inputs", interrupting(trainer.inputs, 59))
    else:
        monkeypatch.setattr(trainer, "validation_loss", judged)
    expected = KeyboardInterrupt if when == "last step" else Terminated
    with pytest.raises(expected):
        trainer.run(TrainingCheckpoint(kept))
    resumed = worker.token_trainer()
    monkeypatch.setattr(resumed, "inputs", lambda step: pytest.fail("a step was taken"))
    resumed.run(TrainingCheckpoint(kept, resume=True))
    worker.assert_same(resumed.denoiser.state_dict(), whole.denoiser.state_dict())


def test_an_ignored_signal_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        trainer = worker.token_trainer()
        monkeypatch.setattr(trainer, "inputs", interrupting(trainer.inputs))
        assert trainer.run().steps == 60
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_validation_in_which_a_process_ends_is_made_up_for(tmp_path, monkeypatch):
    options = {"learning_rate": 0.05}
    whole = worker.token_trainer(**options)
    expected = whole.run()
    trainer = worker.token_trainer(**options)
    validation_loss = trainer.validation_loss

    def failing():
        if trainer.done == expected.best_step + 1:
            raise ProcessError("process 0 of 2 lost contact with the others")
        return validation_loss()

    monkeypatch.setattr(trainer, "validation_loss", failing)
    with pytest.raises(ProcessError, match=f"kept in .* after {expected.best_step + 1} steps"):
        trainer.run(TrainingCheckpoint(tmp_path / "state"))
    resumed = worker.token_trainer(**options)
    found = resumed.run(TrainingCheckpoint(tmp_path / "state", resume=True))
    assert [tuple(entry) for entry in found.validation_loss] == expected.validation_loss
    worker.assert_same(resumed.denoiser.state_dict(), whole.denoiser.state_dict())


def test_an_interruption_where_training_stops_early(tmp_path, monkeypatch):
    losses = [3.0, 2.0, 4.0, 1.0]
    whole, trainer, resumed = (worker.token_trainer(early_stopping=1) for _ in range(3))
    monkeypatch.setattr(whole, "validation_loss", iter(losses).__next__)
    expected = whole.run()
    assert expected.steps == 18
    monkeypatch.setattr(trainer, "inputs", interrupting(trainer.inputs, 16))
    monkeypatch.setattr(trainer, "validation_loss", iter(losses).__next__)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(TrainingCheckpoint(tmp_path / "state"))
    monkeypatch.setattr(resumed, "validation_loss", lambda: pytest.fail("the training went on"))
    found = resumed.run(TrainingCheckpoint(tmp_path / "state", resume=True))
    assert [tuple(entry) for entry in found.loss] == expected.loss and found.steps == 18
    worker.assert_same(resumed.denoiser.state_dict(), whole.denoiser.state_dict())


@pytest.mark.parametrize("old", [False, True])
def test_the_best_weights_are_kept_with_their_buffers(old, tmp_path, monkeypatch):
    """Also in a state; those of an earlier version are without."""
    losses = [3.0, 2.0, 1.0, *[4.0] * 20]
    whole, trainer, resumed = (worker.image_trainer() for _ in range(3))
    seen, left = [], iter(losses)

    def judged():
        seen.append(copy.deepcopy(whole.denoiser.state_dict()))
        return next(left)

    monkeypatch.setattr(whole, "validation_loss", judged)
    whole.run()
    assert not torch.equal(seen[2]["layers.1.running_var"], seen[-1]["layers.1.running_var"])
    worker.assert_same(whole.denoiser.state_dict(), seen[2])
    state = tmp_path / "state"
    monkeypatch.setattr(trainer, "inputs", interrupting(trainer.inputs, 14))
    monkeypatch.setattr(trainer, "validation_loss", iter(losses).__next__)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(TrainingCheckpoint(state))
    if old:
        tensors, texts = checkpoint.load(state, KIND)
        tensors = {n: t for n, t in tensors.items() if not n.startswith("best_buffer.")}
        checkpoint.save(state, KIND, tensors, texts)
    monkeypatch.setattr(resumed, "validation_loss", lambda: 4.0)
    resumed.run(TrainingCheckpoint(state, resume=True))
    expected = seen[2]
    if old:
        expected = expected | {n: seen[-1][n] for n, _ in whole.denoiser.named_buffers()}
    worker.assert_same(resumed.denoiser.state_dict(), expected)


def interrupting(inputs, at=5):
    def wrapped(step):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return inputs(step)

    return wrapped


class Pulled(Exception):
    pass


@pytest.mark.parametrize("stopped_in", [0, 1, 4])
def test_a_detector_of_several_networks_resumes(stopped_in, tmp_path, monkeypatch):
    """Interrupted in one of six networks, each with a state of its own: two sources of tokens, for
    the detector and for each of two folds."""
    images = (np.random.default_rng(0).random((24, 32, 32)) * 255).astype(np.uint8)
    options = {
        "image_size": 32, "denoiser": "token-mlp", "tokens": ("energy-8", "energy-16"),
        "token_width": 32, "token_blocks": 1, "token_batch": 64, "device": "cpu", "cross_fit": 2,
    }  # fmt: skip
    state = tmp_path / "state"
    inputs, calls = TokenTrainer.inputs, []

    def failing(self, step):
        calls.append(step)
        if step == 11 and calls.count(0) == stopped_in + 1:
            raise Pulled
        return inputs(self, step)

    whole = daf.Detector(**options).fit(images, steps=20)
    monkeypatch.setattr(TokenTrainer, "inputs", failing)
    with pytest.raises(Pulled):
        daf.Detector(**options).fit(
            images, steps=20, training_checkpoint=TrainingCheckpoint(state, seconds=0.0)
        )
    calls.clear()
    monkeypatch.setattr(TokenTrainer, "inputs", lambda *a: (calls.append(a[1]), inputs(*a))[1])
    kept = TrainingCheckpoint(state, resume=True)
    resumed = daf.Detector(**options).fit(images, steps=20, training_checkpoint=kept)
    # Nothing is computed twice.
    assert calls == [*range(11, 20), *list(range(20)) * (5 - stopped_in)]
    worker.assert_same(resumed.model.state_dict(), whole.model.state_dict())
    np.testing.assert_array_equal(resumed.score(images).score, whole.score(images).score)
    states = ["", ".1", ".1-fold", ".1-fold.1", ".2-fold", ".2-fold.1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"state{name}" for name in states]
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_steps_and_budget_exclude_each_other():
    with pytest.raises(InputError, match="steps=3 and budget='1s' exclude each other"):
        daf.Detector(image_size=32, device="cpu").fit(worker.pictures(), steps=3, budget="1s")


def test_states_of_several_networks(tmp_path):
    kept = TrainingCheckpoint(tmp_path / "m.training", log=tmp_path / "m.csv")
    assert kept.part(0) is kept
    assert kept.part(2).path == str(tmp_path / "m.training.2")
    assert kept.part(2).log.name == "m.2.csv"
    for k in range(3):
        open(kept.part(k).path, "w").close()
    open(kept.fold(1).path, "w").close()
    open(kept.fold(1).part(2).path, "w").close()
    others = ["m.training.2026-mine", "m.training.3.bak", "m.training.diffad"]
    for name in others:
        (tmp_path / name).touch()
    kept.remove()
    assert sorted(p.name for p in tmp_path.iterdir()) == others


def test_a_training_that_begins_anew_removes_the_states_of_an_older_one(tmp_path, monkeypatch):
    kept = TrainingCheckpoint(tmp_path / "state")
    worker.token_trainer(train_steps=6).run(kept)
    worker.token_trainer(train_steps=6).run(kept.fold(1))
    trainer = worker.token_trainer()
    monkeypatch.setattr(trainer, "inputs", interrupting(trainer.inputs))
    with pytest.raises(KeyboardInterrupt):
        trainer.run(kept)
    assert os.listdir(tmp_path) == ["state"]


def test_a_finished_training_resumes_to_itself(tmp_path):
    kept = TrainingCheckpoint(tmp_path / "state", resume=True)
    first, second = worker.token_trainer(), worker.token_trainer()
    first.run(kept)
    reference = copy.deepcopy(first.denoiser.state_dict())
    assert vars(second.run(kept))["loss"] == [list(x) for x in first.history.loss]
    worker.assert_same(second.denoiser.state_dict(), reference)
