"""What every training has: learning rate, optimiser, budget, the best average, logs."""

import csv
import math
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training_worker as worker
from torch import nn

from diffad_fast.config import DetectorConfig, duration
from diffad_fast.errors import InputError
from diffad_fast.training import log as log_module
from diffad_fast.training import loop, trials
from diffad_fast.training.log import Log
from diffad_fast.training.loop import learning_rate
from diffad_fast.training.optimizer import Optimizer
from diffad_fast.training.state import TrainingCheckpoint


def test_learning_rate_warms_up_and_decays():
    config = DetectorConfig.create(learning_rate=0.1, warmup_steps=3)
    rates = [learning_rate(config, step, 12) for step in range(12)]
    # A tenth of 12 steps is one step of warm-up.
    expected = [0.1] + [
        0.1 * (0.01 + 0.99 * (1 + math.cos(math.pi * k / 11)) / 2) for k in range(11)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
    assert [learning_rate(config, k, 100) for k in range(3)] == pytest.approx(
        [0.1 / 3, 0.2 / 3, 0.1]
    )


# -------------------------------------------------------------------- optimiser


def network():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2), nn.Linear(2, 1))
    module[3].weight.requires_grad_(False)
    return module.to(memory_format=torch.channels_last)


def test_optimizer_is_adamw_with_clipping_and_an_average():
    """Against torch's optimiser on the single parameters and the average by its recursion."""
    config = DetectorConfig.create(weight_decay=0.1, gradient_clip=0.5, ema_decay=0.5)
    fast, plain = network(), network()
    frozen = fast[3].weight.clone()
    layouts = [p.stride() for p in fast.parameters()]
    optimizer = Optimizer(fast, config)
    reference = torch.optim.AdamW(plain.parameters(), weight_decay=0.1)
    average = [p.detach().clone() for p in plain.parameters() if p.requires_grad]
    for step in range(6):
        x = torch.randn(5, 2, 4, 4)
        optimizer.set(step, 0.01 * (step + 1))
        optimizer.gradient.zero_()
        fast(x).square().mean().backward()
        optimizer.update()

        reference.param_groups[0]["lr"] = 0.01 * (step + 1)
        reference.zero_grad()
        plain(x).square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        reference.step()
        keep = min(0.5, (1 + step) / (10 + step))
        trained = [p.detach() for p in plain.parameters() if p.requires_grad]
        average = [keep * a + (1 - keep) * p for a, p in zip(average, trained, strict=True)]
    for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    optimizer.exchange(optimizer.average)
    optimizer.release()
    found = [p for p in fast.parameters() if p.requires_grad]
    torch.testing.assert_close([p.detach() for p in found], average, rtol=1e-5, atol=1e-7)
    assert torch.equal(fast[3].weight, frozen)
    assert [p.stride() for p in fast.parameters()] == layouts
    storages = {p.untyped_storage().data_ptr() for p in fast.parameters()}
    assert len(storages) == len(list(fast.parameters()))
    assert all(p.grad is None for p in fast.parameters())


def test_parameters_of_one_kind():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(InputError, match="float32 on cpu, torch.float64 on cpu"):
        Optimizer(module, DetectorConfig.create())
    with pytest.raises(InputError, match="are none"):
        Optimizer(nn.Identity(), DetectorConfig.create())


# ------------------------------------------------------------- length and choice


class Clock:
    """Time that passes when somebody says so."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def costs(self, seconds, function):
        def wrapped(*arguments):
            self.now += seconds
            return function(*arguments)

        return wrapped


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (loop, trials):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.mark.parametrize("kind", ["image", "token"])
def test_a_budget_buys_steps_and_leaves_no_trace_of_its_trial(kind, clock):
    trainer = worker.TRAINERS[kind](train_budget=100.0)
    trainer.inputs = clock.costs(1.0, trainer.inputs)
    trainer.validation_loss = clock.costs(2.0, trainer.validation_loss)
    history = trainer.run()
    # Three steps and a validation tell what they cost; eleven validations are set aside.
    assert trainer.total == 100 - 3 - 2 - 11 * 2
    assert history.loss[-1][0] == trainer.total - 1 and history.seconds <= 100
    other = worker.TRAINERS[kind](train_steps=trainer.total)
    other.run()
    worker.assert_same(trainer.denoiser.state_dict(), other.denoiser.state_dict())


def test_losses_are_read_now_and_then():
    """In between the host waits for nothing: a loss that is read is a step that is waited for."""
    trainer, read = worker.token_trainer(train_steps=60), []

    class Loss:
        def __init__(self, step):
            self.step = step

        def __float__(self):
            read.append(self.step)
            return 1.0

    steps = iter(range(60))
    trainer.step_function = lambda: lambda *inputs: Loss(next(steps))
    history = trainer.run()
    assert read == [step for step, _ in history.loss] == [0, 20, 40, 59]


def test_training_ends_when_the_budget_is_used_up(clock):
    """The machine becomes slower than it was in the trial."""
    trainer = worker.token_trainer(train_budget=100.0)
    costs = iter([1.0] * 13 + [5.0] * 100)
    inputs = trainer.inputs

    def slower(step):
        clock.now += next(costs)
        return inputs(step)

    trainer.inputs = slower
    history = trainer.run()
    assert trainer.total == 97 and 100 <= history.seconds < 111  # a step late
    # Its weights were judged after the last step.
    assert history.validation_loss[-1][0] == history.loss[-1][0] == history.steps - 1 == 28


@pytest.mark.parametrize(
    "budget, steps, validated",
    # A trial takes 5 seconds, a validation 2: of 15 seconds 15 / 4 are enough for one, of 55 for 6,
    # one of them to spare.
    [(20.0, 13, [12]), (60.0, 43, [7, 15, 23, 31, 39, 42])],
)
def test_validations_take_a_quarter_of_a_short_budget_at_most(clock, budget, steps, validated):
    trainer = worker.token_trainer(train_budget=budget)
    trainer.inputs = clock.costs(1.0, trainer.inputs)
    trainer.validation_loss = clock.costs(2.0, trainer.validation_loss)
    history = trainer.run()
    assert trainer.total == steps and [s for s, _ in history.validation_loss] == validated
    assert history.seconds <= budget


def test_the_smallest_budget_buys_one_step():
    history = worker.token_trainer(train_budget=1e-3).run()
    assert [step for step, _ in history.loss] == [0] and history.best_step == 0


def test_the_best_average_is_kept(monkeypatch):
    """A validation loss that is made up: lowest after the third of ten validations."""
    losses = iter([3.0, 2.0, 1.0, 5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])
    trainer = worker.token_trainer(train_steps=60)
    seen = []

    def validation_loss():
        seen.append([p.detach().clone() for p in trainer.denoiser.parameters()])
        return next(losses)

    monkeypatch.setattr(trainer, "validation_loss", validation_loss)
    history = trainer.run()
    assert history.best_step == 17 and len(seen) == 10
    for p, q in zip(trainer.denoiser.parameters(), seen[2], strict=True):
        assert torch.equal(p, q)
    assert not any(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))


def test_early_stopping(monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.4, 2.3, 1.0])
    trainer = worker.token_trainer(train_steps=60, early_stopping=3)
    monkeypatch.setattr(trainer, "validation_loss", lambda: next(losses))
    history = trainer.run()
    assert [step for step, _ in history.validation_loss] == [5, 11, 17, 23, 29]
    assert history.best_step == 11 and history.kept_loss == 2.0
    assert history.steps == 30 and history.loss[-1][0] == 29


def test_without_held_out_samples_the_last_average_is_kept():
    trainer = worker.token_trainer()
    trainer.validation = trainer.validation[:0]
    history = trainer.run()
    assert history.validation_loss == [] and history.best_step is None
    assert torch.isfinite(trainer.denoiser.linear_out.weight).all()


def test_a_loss_that_is_not_finite_stops_and_is_not_kept(tmp_path):
    trainer = worker.token_trainer()
    trainer.tokens[:] = torch.inf
    with pytest.raises(InputError, match="infinite or NaN by step 0: lower learning_rate"):
        trainer.run(TrainingCheckpoint(tmp_path / "state", seconds=0.0))
    assert not list(tmp_path.iterdir())


def test_options():
    assert [duration(t) for t in ("300", "1.5 s", "5min", "2h")] == [300, 1.5, 300, 7200]
    assert DetectorConfig.create(train_budget="5min").train_budget == 300
    assert DetectorConfig.create(augment="shift").augment == ("shift",)
    for options, message in (
        ({"train_budget": "soon"}, "'soon' is not a duration"),
        ({"train_budget": 0}, "train_budget must be"),
        ({"augment": ("zoom",)}, "unknown augment 'zoom'"),
        ({"augment": "shift", "kind": "vector"}, "augment is for kind='image': leave it out for"),
        ({"n_mels": 32}, "n_mels is for kind='audio': leave it out for 'image'"),
        ({"train_dtype": "int8"}, "unknown train_dtype"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"early_stopping": -1}, "early_stopping must be"),
    ):
        with pytest.raises(InputError, match=message):
            DetectorConfig.create(**options)
    with pytest.raises(InputError, match="4 images.*multiple of 3 parts"):
        worker.image_trainer(accumulate=3)


# -------------------------------------------------------------------------- log


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_log_is_that_of_an_uninterrupted_run(tmp_path, monkeypatch):
    state, log, whole = tmp_path / "state", tmp_path / "log.csv", tmp_path / "whole.csv"
    worker.token_trainer().run(TrainingCheckpoint(tmp_path / "other", log=whole))
    first = worker.token_trainer()
    inputs = first.inputs

    def failing(step):
        if step == 43:
            raise OSError("pulled out")
        return inputs(step)

    monkeypatch.setattr(first, "inputs", failing)
    saved = iter([False] * 30 + [True] + [False] * 100)
    monkeypatch.setattr("diffad_fast.training.state.TrainingState.due", lambda *_: next(saved))
    with pytest.raises(OSError, match="pulled out"):
        first.run(TrainingCheckpoint(state, log=log))
    monkeypatch.undo()
    worker.token_trainer().run(TrainingCheckpoint(state, log=log, resume=True))
    kept = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(log)]
    assert kept == [{k: v for k, v in row.items() if k != "seconds"} for row in rows(whole)]
    assert [row["step"] for row in kept if row["loss"]] == ["0", "20", "40", "59"]
    assert sum(bool(row["validation_loss"]) for row in kept) == 10


def test_tensorboard_gets_the_same_numbers_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    board = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    with Log(tmp_path / "m.csv", start=20) as log:
        log.write(20, seconds=3.0, loss=0.5)
        log.write(29, seconds=4.0, validation_loss=0.25)
    assert written == [
        (str(tmp_path / "m.tensorboard"), 20),
        ("loss", 0.5, 20),
        ("validation_loss", 0.25, 29),
        "closed",
    ]


def test_tensorboard_itself_reads_them(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Log(tmp_path / "m.csv") as log:
        log.note(0, "not compiled")
        log.write(20, seconds=3.0, loss=0.5)
        log.picture(20, np.full((6, 4, 3), 255, np.uint8))
    found = EventAccumulator(str(tmp_path / "m.tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(20, 0.5)]
    (image,) = found.Images("pictures")
    assert (image.step, image.width, image.height) == (20, 4, 6)
    (note,) = found.Tensors("note/text_summary")
    assert note.tensor_proto.string_val[0] == b"not compiled"


def test_a_log_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="cannot write .*log.csv"):
        Log(tmp_path / "no" / "log.csv")
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="table.csv is there and is no log"):
        Log(table)
    assert table.read_text() == "a,b\n1,2\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full disk of Linux")
def test_a_full_disk_costs_the_log_and_not_the_training(tmp_path, monkeypatch):
    path = tmp_path / "m.csv"
    with Log(path) as log:
        with open("/dev/full", "w") as full:
            os.dup2(full.fileno(), log._file.fileno())
        with pytest.warns(RuntimeWarning, match="without its log: .*m.csv: No space left") as told:
            log.note(0, "not compiled")
            log.write(20, seconds=3.0, loss=0.5)
    assert len(told) == 1

    def full_disk(file, mode="rb", **options):
        return open("/dev/full" if mode == "w" else file, mode, **options)

    monkeypatch.setattr(log_module, "open", full_disk, raising=False)
    with pytest.raises(InputError, match="cannot write .*m.csv: No space left"):
        Log(path)


def test_a_new_log_removes_those_of_networks_that_are_no_more(tmp_path):
    kept = TrainingCheckpoint(tmp_path / "m.training", log=tmp_path / "m.csv")
    stale = [kept.part(2), *(kept.fold(k).part(n) for k in (1, 12) for n in (0, 1))]
    apart = [tmp_path / name for name in ("m.3.csv", "m.old.csv", "m.fold.csv", "mm.1.csv")]
    for log in [*(part.log for part in stale), *apart]:
        Log(log).__exit__()
    (tmp_path / "m.4.csv").write_text("a,b\n1,2\n")
    (tmp_path / "m.3").touch()  # a detector, whose log that is
    everything = set(tmp_path.iterdir())
    Log(kept.log, start=20).__exit__()
    assert set(tmp_path.iterdir()) == everything | {kept.log}
    Log(kept.log).__exit__()
    assert everything - set(tmp_path.iterdir()) == {part.log for part in stale}


def test_handlers_that_python_has_not_made_are_left_alone(monkeypatch):
    """Python answers None for them, and cannot put them back."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("a handler was taken over"))
    with loop._deferred_signals() as received:
        assert received == []
    from diffad_fast import cli

    with cli._terminable():
        pass
