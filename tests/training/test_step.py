"""When a step is run, captured and replayed, with a stand-in for CUDA that records."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import training_worker as worker

from diffad_fast.training import step as step_module
from diffad_fast.training.step import WARM_UP, CapturedStep


class Stream:
    def __init__(self, device=None):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


def test_runs_eagerly_then_replays_on_the_newest_inputs(monkeypatch):
    events, current = [], Stream()

    class Graph:
        def replay(self):
            events.append(("replay", captured._inputs[0].tolist()))

    @contextmanager
    def graph(recorded, stream, capture_error_mode):
        assert isinstance(recorded, Graph) and stream is captured._stream
        assert capture_error_mode == "thread_local"
        events.append("capture")
        yield

    @contextmanager
    def on(stream):
        assert stream is captured._stream
        yield

    monkeypatch.setattr(
        step_module.torch, "cuda",
        SimpleNamespace(
            Stream=Stream, current_stream=lambda device: current, stream=on, graph=graph,
            CUDAGraph=Graph,
        ),
    )  # fmt: skip
    captured = CapturedStep(lambda x: (events.append("step"), x)[1], torch.device("cpu"))
    inputs = [torch.full((2,), float(k)) for k in range(WARM_UP + 2)]
    results = [captured(x) for x in inputs]
    # Capture goes through the step once without computing; each later call is a replay.
    assert events[:WARM_UP] == ["step"] * WARM_UP
    assert events[WARM_UP:] == ["capture", "step", ("replay", [3.0] * 2), ("replay", [4.0] * 2)]
    assert all(a is b for a, b in zip(results[:WARM_UP], inputs, strict=False))
    assert results[-1] is captured._result and results[-1] is not inputs[-1]
    # Both streams wait for each other around every eager step.
    assert captured._stream.waited_for == [current] * WARM_UP
    assert current.waited_for == [captured._stream] * WARM_UP


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["image", "token"])
def test_captured_training_is_eager_training(kind, monkeypatch):
    captured, eager = (worker.TRAINERS[kind](device="cuda", train_dtype="float32") for _ in "ab")
    captured.run()
    monkeypatch.setattr("diffad_fast.training.loop.CapturedStep", lambda step, device: step)
    eager.run()
    for a, b in zip(captured.denoiser.parameters(), eager.denoiser.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
