"""When a step is run, captured and replayed, with a stand-in for CUDA that records."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import training_worker as worker

from diffad_fast.diffusion import graphs
from diffad_fast.training import step as step_module
from diffad_fast.training.step import WARM_UP, CapturedStep


class Stream:
    def __init__(self, device=None):
        self.device, self.waited_for = device, []

    def wait_stream(self, other):
        self.waited_for.append(other)


@pytest.fixture(autouse=True)
def _streams_of_its_own():
    """Not those of the stand-in of another test."""
    step_module._stream.cache_clear()
    yield
    step_module._stream.cache_clear()


def test_runs_eagerly_then_replays_on_the_newest_inputs(monkeypatch):
    events, current = [], Stream()

    class Graph:
        def replay(self):
            events.append(("replay", captured._inputs[0].tolist()))

    @contextmanager
    def graph(recorded, pool, stream, capture_error_mode):
        assert isinstance(recorded, Graph) and stream is captured._stream
        assert capture_error_mode == "thread_local" and pool == (0, 1)
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
            CUDAGraph=Graph, graph_pool_handle=lambda: (0, 1),
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


@pytest.mark.parametrize("error", [RuntimeError("synchronises"), torch.OutOfMemoryError("full")])
def test_a_capture_that_fails(error, monkeypatch):
    """Once, with a warning, and eagerly from there on; where memory is short, an error."""
    streams, recovered, captures = [], [], []

    @contextmanager
    def graph(recorded, pool, stream, capture_error_mode):
        captures.append(list(streams))
        yield
        raise error

    @contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(
        step_module.torch, "cuda",
        SimpleNamespace(
            Stream=Stream, current_stream=lambda device: Stream(), stream=on, graph=graph,
            CUDAGraph=object, graph_pool_handle=lambda: (0, 1),
        ),
    )  # fmt: skip
    monkeypatch.setattr(graphs, "_recover", lambda graph, *of: recovered.append(of))
    captured = CapturedStep(lambda x: 2 * x, torch.device("cpu"))
    x = torch.ones(2)
    for _ in range(WARM_UP):
        captured(x)
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            captured(x)
    else:
        with pytest.warns(RuntimeWarning, match="without a CUDA graph.* failed: synchronises"):
            assert torch.equal(captured(x), 2 * x)
        assert torch.equal(captured(3 * x), 6 * x)
    # Within a block that puts the stream back, which a failed capture does not.
    assert captures == [[captured._stream]] and recovered == [((0, 1), torch.device("cpu"))]


@pytest.mark.gpu
def test_a_network_that_reads_its_own_numbers_trains():
    class Reads(torch.nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * (1.0 if x.sum().item() > 0 else 0.9)

    convolution = Reads(1, 1, 3, padding=1, device="cuda")

    def loss(x):
        return convolution(x.cuda()).square().mean().detach()

    step = CapturedStep(loss, torch.device("cuda"))
    x = torch.ones(1, 1, 4, 4)
    first = [float(step(x)) for _ in range(WARM_UP)]
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        assert float(step(x)) == pytest.approx(first[0])
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.randn(9, device="cuda").isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["image", "token"])
def test_captured_training_is_eager_training(kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    captured, eager = (worker.TRAINERS[kind](device="cuda", train_dtype="float32") for _ in "ab")
    captured.run()
    monkeypatch.setattr("diffad_fast.training.loop.CapturedStep", lambda step, device: step)
    eager.run()
    for a, b in zip(captured.denoiser.parameters(), eager.denoiser.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
