"""Trials at the start of a training, whose effect is undone: what a step costs, and whether it pays
to compile it."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..errors import BackendError, DiffadError
from .optimizer import STATE

if TYPE_CHECKING:
    from .loop import Loop

# Steps that tell what one costs; on a GPU the first ones are spent on its capture.
TRIAL_STEPS = {"cpu": 3, "cuda": 16}
# Where torch.compile is tried, and the seconds that a training must take for that: compiling takes
# about a minute, and as the vendor's convolutions stay, a step loses a third of its time at most.
COMPILED_ON, WORTH_COMPILING = ("cuda",), 180.0
SMALLEST_GAIN = 1.05  # times faster; a difference below that is noise


def chosen_step(loop: Loop) -> tuple[Callable, float | None]:
    """The step's function, compiled where that is wanted or, by a trial, pays; and the seconds of a
    step, if there was a trial."""
    wanted, budget = loop.config.train_compile, loop.config.train_budget
    if wanted is True:
        loop.history.compiled = True
        return _compiled_step(loop)[0], None
    if wanted is False or loop.device.type not in COMPILED_ON:
        return loop.step_function(), None

    def undecided(times: list[float]) -> bool:
        return len(times) < TRIAL_STEPS[loop.device.type]

    # No captured step outlives its trial: each holds the memory of all its activations.
    before = _typical(_trial(loop, loop.step_function(), undecided))
    planned = loop.total * before if budget is None else budget - loop.seconds()
    if not loop.processes.agreed(planned >= WORTH_COMPILING):
        loop.history.notes.append(
            f"not compiled: about {planned:.0f} s of training are too short for a trial"
        )
        return loop.step_function(), before
    try:
        step_of, times = _compiled_step(loop, undecided)
    except BackendError as error:
        loop.history.notes.append(f"not compiled: {error}")
        return loop.step_function(), before
    after = _typical(times)
    # The seconds of compiling are spent either way.
    compiled = loop.history.compiled = loop.processes.agreed(after * SMALLEST_GAIN <= before)
    loop.history.notes.append(
        f"{'compiled' if compiled else 'not compiled'}: {1e3 * after:.2f} ms a compiled step, "
        f"{1e3 * before:.2f} ms an eager one, "
        f"{sum(times) - after * len(times):.0f} s to compile"
    )
    return (step_of, after) if compiled else (loop.step_function(), before)


def affordable(loop: Loop, step_of: Callable, seconds: float | None) -> tuple[int, int]:
    """How many steps of so many seconds, None: of those that a trial takes, fit into the budget,
    and how many validations."""
    budget = loop.config.train_budget

    def undecided(times: list[float]) -> bool:
        wanted = len(times) < TRIAL_STEPS[loop.device.type] or sum(times) < 0.02 * budget
        return not times or (wanted and loop.seconds() < budget / 4)

    if seconds is None:
        seconds = _typical(_trial(loop, step_of, undecided))
    began = time.monotonic()
    with torch.no_grad(), loop.averaged():
        loop.validation_loss()
    validation = time.monotonic() - began
    # As many validations, and one to spare, as a quarter of the time is enough for.
    left = budget - loop.seconds()
    count = loop.validations + 1
    if count * validation > left / 4:
        count = max(1, int(left / 4 / validation))
    steps = max(1, int((left - count * validation) / seconds))
    steps, validations = loop.processes.agreed((steps, max(1, count - 1)))
    if steps < loop.config.warmup_steps and loop.processes.first:
        warnings.warn(
            f"{budget:.3g} s, the budget or this network's share of it, are enough for {steps} "
            f"steps of {seconds:.2g} s, fewer than the {loop.config.warmup_steps} in which the "
            "learning rate rises: give more, or fewer warmup_steps",
            RuntimeWarning,
            stacklevel=2,
        )
    return steps, validations


def _compiled_step(
    loop: Loop, undecided: Callable[[list[float]], bool] = lambda times: not times
) -> tuple[Callable, list[float]]:
    """The compiled step and the seconds of a trial. Raises BackendError where that fails."""
    try:
        step_of = loop.step_function(compiled=True)
        return step_of, _trial(loop, step_of, undecided)
    except (DiffadError, KeyboardInterrupt):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise BackendError(
            f"torch.compile fails on the training step ({type(error).__name__}: {reason}); "
            "train_compile=False does without"
        ) from error


def _trial(loop: Loop, step_of: Callable, undecided: Callable[[list[float]], bool]) -> list[float]:
    """Seconds of steps whose effect is undone, as long as ``undecided(seconds)``.

    The first process decides: all take part in every step.
    """
    optimizer, times = loop.optimizer, []
    before = {name: getattr(optimizer, name).detach().clone() for name in STATE}
    buffers = [b.clone() for b in loop.denoiser.buffers()]
    optimizer.set(0, 0.0)
    try:
        while loop.processes.agreed(undecided(times)):
            began = time.monotonic()
            float(step_of(*loop.inputs(len(times))))
            times.append(time.monotonic() - began)
    finally:
        optimizer.load(before, 0)
        for buffer, old in zip(loop.denoiser.buffers(), buffers, strict=True):
            buffer.copy_(old)
    return times


def _typical(seconds: list[float]) -> float:
    """Of a step: the first ones load libraries, compile and fill caches."""
    return statistics.median(seconds[len(seconds) // 2 :])
