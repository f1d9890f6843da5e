"""What a training finds out before it begins: whether torch.compile pays, and which batch fits."""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training_worker as worker

import diffad_fast as daf
from diffad_fast.config import DetectorConfig
from diffad_fast.errors import BackendError, InputError
from diffad_fast.training import batch, loop, trials
from diffad_fast.training import state as training_state
from diffad_fast.training.distributed import Processes
from diffad_fast.training.state import TrainingCheckpoint

# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    for module in (loop, training_state, trials):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(trials, "COMPILED_ON", ("cpu",))
    return clock


def with_costs(trainer, clock, eager, compiled=None, to_compile=0.0):
    """Steps take that many seconds; compiled=None: torch.compile fails. Gives the list of what was
    asked for."""
    asked, real = [], trainer.step_function

    def step_function(chosen=False, *, compiled_=compiled):
        asked.append(chosen)
        step, calls = real(), []

        def run(*inputs):
            if chosen and compiled_ is None:
                raise RuntimeError("no compiler\nand a long story")
            clock.now += compiled_ if chosen else eager
            if chosen and not calls:
                clock.now += to_compile
            calls.append(1)
            return step(*inputs)

        return run

    trainer.step_function = lambda compiled=False: step_function(compiled)
    return asked


@pytest.mark.parametrize(
    "options, costs, compiled, note",
    [
        ({"train_steps": 60}, {"eager": 10.0, "compiled": 8.0, "to_compile": 50.0}, True,
         "compiled: 8000.00 ms a compiled step, 10000.00 ms an eager one, 50 s to compile"),
        ({"train_steps": 60}, {"eager": 10.0, "compiled": 9.7, "to_compile": 50.0}, False,
         "not compiled: 9700.00 ms a compiled step, 10000.00 ms an eager one, 50 s to compile"),
        ({"train_steps": 60}, {"eager": 2.9, "compiled": 0.1}, False,
         "not compiled: about 174 s of training are too short for a trial"),
        ({"train_steps": 60}, {"eager": 10.0}, False,
         "not compiled: torch.compile fails on the training step (RuntimeError: no compiler); "
         "train_compile=False does without"),
        ({"train_budget": 100.0}, {"eager": 10.0, "compiled": 8.0}, False,
         "not compiled: about 70 s of training are too short for a trial"),
        ({"train_budget": 400.0}, {"eager": 10.0, "compiled": 5.0, "to_compile": 50.0}, True,
         "compiled: 5000.00 ms a compiled step, 10000.00 ms an eager one, 50 s to compile"),
    ],
)  # fmt: skip
def test_auto_compiles_where_the_steps_ahead_are_worth_it(
    options, costs, compiled, note, clock, tmp_path
):
    trainer = worker.image_trainer(**options)
    asked = with_costs(trainer, clock, **costs)
    log = tmp_path / "log.csv"
    history = trainer.run(TrainingCheckpoint(tmp_path / "state", log=log))
    assert history.compiled is compiled and history.notes == [note]
    # The last one that was made is the one that trained.
    assert asked[-1] is compiled
    with open(log, newline="") as file:
        first = next(csv.DictReader(file))
    assert first["step"] == "0" and first["note"] == note
    if "train_budget" in options and compiled:
        # 3 eager steps of 10 s, 3 of 5 s after 50 s of compiling.
        assert trainer.total == (400 - 30 - 50 - 15) // 5
    # Trials leave no trace.
    other = worker.image_trainer(train_steps=trainer.total, train_compile=False)
    assert other.run().notes == []
    worker.assert_same(trainer.denoiser.state_dict(), other.denoiser.state_dict())


def test_what_was_chosen_holds_for_the_training_that_is_continued(clock, tmp_path):
    state = tmp_path / "state"
    kept = TrainingCheckpoint(state, seconds=0.0)
    first = worker.image_trainer(train_steps=30)
    with_costs(first, clock, eager=10.0, compiled=5.0)
    inputs = first.inputs

    def failing(step):
        if step == 20:
            raise OSError("pulled out")
        return inputs(step)

    first.inputs = failing
    with pytest.raises(OSError, match="pulled out"):
        first.run(kept)
    second = worker.image_trainer(train_steps=30)
    asked = with_costs(second, clock, eager=1.0, compiled=100.0)
    history = second.run(TrainingCheckpoint(state, resume=True))
    assert asked == [True] and history.compiled and len(history.notes) == 1


def test_a_cpu_compiles_only_on_request(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("compiled"))
    history = worker.token_trainer(train_steps=3).run()
    assert not history.compiled and history.notes == []

    def broken(function, **options):
        return lambda *inputs: {}["no such backend"]

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(BackendError, match=r"torch.compile fails .*\(KeyError: .*no such backend"):
        worker.token_trainer(train_compile=True, train_steps=3).run()
    with pytest.raises(InputError, match="unknown train_compile 'yes': choose auto, True, False"):
        DetectorConfig.create(train_compile="yes")


def test_a_compiled_step_is_the_eager_one(monkeypatch):
    """Noising, network, loss and the backward pass in one graph, here without code generation."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: real(f, backend="aot_eager", **k))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled, eager = (worker.image_trainer(train_compile=c, train_steps=6) for c in (True, False))
    history, expected = compiled.run(), eager.run()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert history.compiled and history.loss == expected.loss
    worker.assert_same(compiled.denoiser.state_dict(), eager.denoiser.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "token"])
def test_generated_code_trains_the_same(kind):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    create = worker.TRAINERS[kind]
    compiled, eager = (create(train_compile=c, train_steps=6) for c in (True, False))
    history, expected = compiled.run(), eager.run()
    assert history.compiled and counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    np.testing.assert_allclose(history.loss, expected.loss, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["image", "token"])
def test_a_trial_on_a_gpu(kind, monkeypatch):
    """Both kinds of step are captured and timed; whichever is taken trains as the eager one."""
    monkeypatch.setattr(trials, "WORTH_COMPILING", 0.0)
    tried, eager = (
        worker.TRAINERS[kind](device="cuda", train_dtype="float32", train_compile=c)
        for c in ("auto", False)
    )
    history, expected = tried.run(), eager.run()
    assert len(history.notes) == 1 and " s to compile" in history.notes[0]
    np.testing.assert_allclose(history.loss, expected.loss, rtol=1e-3)


def test_a_detector_keeps_what_was_found():
    pictures = (np.random.default_rng(0).random((24, 32, 32)) * 255).astype(np.uint8)
    detector = daf.Detector(
        image_size=32, tokens=("energy-8", "energy-16"), token_width=32, token_blocks=1,
        device="cpu",
    ).fit(pictures, steps=2)  # fmt: skip
    assert detector.config.train_compile is False


# ------------------------------------------------------------------- batch size


@pytest.mark.parametrize(
    "free, most, expected",
    [(1000 + 64 * 10, 256, 64), (1000 + 64 * 10 - 1, 256, 32), (10**9, 256, 256),
     (10**9, 100, 64), (10, 256, 1), (10**9, 1, 1)],
)  # fmt: skip
def test_the_largest_power_of_two_that_fits(free, most, expected):
    """A step takes 1000 bytes and 10 an image."""
    peaks = [1000 + 10 * n for n in batch.MEASURED]
    assert batch.largest(peaks, free, most) == expected


def settled(monkeypatch, free, n=5000, count=1, **options):
    """The configuration for a GPU with so many free bytes and a step of 1000 + 10 n bytes, the
    first one of 500 more."""
    kept = [0, 500]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(
        batch, "step_memory", lambda *a: 1000 + 10 * a[-1] + (kept.pop() if kept[1:] else 0)
    )
    monkeypatch.setattr(batch, "processes", lambda: Alone(0, count))
    config = DetectorConfig.create(denoiser="unet-tiny", batch_size="auto", **options)
    assert config.batch_size == "auto"
    return batch.with_auto_batch(None, None, None, range(n), config, torch.device("cuda"))


class Alone(Processes):
    def gathered(self, value):
        return [value, value // 2][: self.count]  # the second one has less memory


def test_batch_and_learning_rate_follow_the_memory(monkeypatch):
    # Half of the memory is the step's: 1640 bytes are 64 images.
    config = settled(monkeypatch, 3280)
    assert config.batch_size == 64
    assert config.learning_rate == pytest.approx(1e-3 * math.sqrt(64 / 16))
    assert settled(monkeypatch, 3278).batch_size == 32
    assert settled(monkeypatch, 10**9).batch_size == 256
    assert settled(monkeypatch, 10**9, n=100).batch_size == 64
    given = settled(monkeypatch, 3280, learning_rate=3e-4)
    assert (given.batch_size, given.learning_rate) == (64, 3e-4)
    # A part of a step has what fits; of two processes the smaller one decides.
    assert settled(monkeypatch, 3280, accumulate=2).batch_size == 128
    assert settled(monkeypatch, 3280, count=2).batch_size == 2 * 32


def test_without_a_gpu_auto_is_the_usual_batch():
    pictures = (np.random.default_rng(0).random((30, 32, 32)) * 255).astype(np.uint8)
    detector = daf.Detector(image_size=32, denoiser="unet-tiny", batch_size="auto", device="cpu")
    assert detector.config.batch_size == "auto"
    detector.fit(pictures, steps=1)
    plain = DetectorConfig.create(denoiser="unet-tiny")
    assert detector.config.batch_size == plain.batch_size == 16
    assert detector.config.learning_rate == plain.learning_rate == 1e-3
    assert DetectorConfig.create(batch_size="auto").batch_size == 16  # tokens have token_batch
    with pytest.raises(InputError, match="batch_size must be a whole number or 'auto'"):
        DetectorConfig.create(batch_size="all")


def test_a_continued_training_keeps_its_batch(tmp_path, monkeypatch):
    """The memory that is free may be another one now."""
    pictures = (np.random.default_rng(0).random((30, 32, 32)) * 255).astype(np.uint8)
    options = {"image_size": 32, "denoiser": "unet-tiny", "batch_size": "auto", "device": "cpu"}
    kept = TrainingCheckpoint(tmp_path / "state")
    monkeypatch.setattr(batch, "with_auto_batch", lambda *a: a[4].with_batch(4))
    daf.Detector(**options).fit(pictures, steps=2, training_checkpoint=kept)
    monkeypatch.setattr(batch, "with_auto_batch", lambda *a: pytest.fail("settled again"))
    kept.resume = True
    detector = daf.Detector(**options).fit(pictures, steps=2, training_checkpoint=kept)
    assert detector.config.batch_size == 4
    assert detector.config.learning_rate == pytest.approx(1e-3 * math.sqrt(4 / 16))


@pytest.mark.gpu
def test_the_memory_of_a_step_is_foretold():
    """What 4 and 8 images take tells what 32 take, within a tenth."""
    detector = daf.Detector(image_size=64, denoiser="unet-tiny", device="cuda", batch_size="auto")
    source = detector.open((np.random.default_rng(0).random((64, 64, 64)) * 255).astype(np.uint8))
    source.load()
    model = detector.model
    _, four, eight, many = (
        batch.step_memory(
            model.denoiser, model.representation, source, range(64), model.config,
            model.device, n,
        )
        for n in (4, 4, 8, 32)  # in the first one libraries take memory that they keep
    )  # fmt: skip
    assert many == pytest.approx(four + 28 * (eight - four) / 4, rel=0.1)
