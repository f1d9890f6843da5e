"""The reverse process, or its inversion: from a represented input to the model's idea of it without
its anomaly, or to its latent."""

from __future__ import annotations

import statistics
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .. import ops
from .schedule import ReverseStep

# A call that has not come before, and one that has come once: the last, smaller batch of a data set
# is not worth a capture.
NEW, ONCE = "new", "once"


class ReverseLoop:
    """DDIM over a table of steps (Song, Meng, Ermon 2021, eq. 12), and what stands around it.

    ``denoiser(x_t, log_sigma)`` with log_sigma (N,) float32 gives the prediction, of x_t's shape. A
    module that has ``embedding(log_sigma)`` and ``denoise(x_t, embedding)`` has all the levels
    embedded at once, in front of the loop. steps: as from :class:`NoiseSchedule`; with
    alpha_s < alpha_t they are an inversion. prediction_type, eta, clip: as in ``ops.ddim_step``.
    guidance: weight of the pull towards the input (DDAD, Mousakhan et al. 2023).
    seed: of the noise, which is the same field for every sample, so that a sample's result does
    not depend on its neighbours.

    A call is ``conclude(x, x0, x_end)`` with x0 = ``prepare(x)`` and x_end the end of the process:
    from x0 noised to the level of ``steps[0]``, or, in an inversion, from sqrt(alpha_t) x0. Without
    ``prepare`` x is x0 already, without ``conclude`` x_end is the result; results are tensors in
    tuples, lists or dicts.

    On a CUDA device a shape that comes a second time is captured as one CUDA graph, which then
    replays with a single launch: no Python in the loop, no synchronisation, no allocation. The
    last ``graphs`` of them are kept, one for each shape, dtype, layout and version of the tensors
    of ``modules`` (the denoiser's, if not given): whatever ``prepare`` and ``conclude`` read beside
    them has to stay the same. Where capture is impossible the loop runs eagerly, after a warning
    that says why; where a trial shows no gain, too. On a CPU it always runs eagerly. ``eager`` does
    so anywhere, and alone can be differentiated.
    """

    def __init__(
        self,
        denoiser: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        steps: Sequence[ReverseStep],
        *,
        seed: int = 0,
        prediction_type: str = "v_prediction",
        eta: float = 0.0,
        clip: float | None = None,
        guidance: float = 0.0,
        prepare: Callable | None = None,
        conclude: Callable | None = None,
        modules: Iterable[nn.Module] | None = None,
        graphs: int = 4,
    ):
        self.denoiser, self.steps, self.seed = denoiser, tuple(steps), seed
        self.inverts = self.steps[0].alpha_s < self.steps[0].alpha_t
        self.prediction_type, self.eta, self.clip = prediction_type, eta, clip
        self.guidance = guidance
        self.prepare, self.conclude = prepare, conclude
        if modules is None:
            modules = [denoiser] if isinstance(denoiser, nn.Module) else []
        self.modules = list(modules)
        self.graphs = graphs
        self._captured: OrderedDict[Hashable, CapturedCall | str | None] = OrderedDict()
        self._constants: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor):
        """The whole pass for a batch x (N,...)."""
        captured = self._graph(x) if x.is_cuda and self.graphs else None
        return self.eager(x) if captured is None else captured(x)

    def eager(self, x: torch.Tensor):
        """The same without a graph."""
        x0 = x if self.prepare is None else self.prepare(x)
        x_end = self._run(self._start(x0), x0)
        return x_end if self.conclude is None else self.conclude(x, x0, x_end)

    def run(self, x_t: torch.Tensor, guide: torch.Tensor | None = None) -> torch.Tensor:
        """The steps alone, from a state x_t (N,...) at the level of ``steps[0]``.

        guide: what guidance pulls towards; x_t itself must not be.
        """
        return self._run(x_t.clone(), guide)

    def _start(self, x0: torch.Tensor) -> torch.Tensor:
        """A new tensor at the level of the first step."""
        if self.inverts:
            return x0 * self.steps[0].alpha_t ** 0.5
        first = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
        return ops.q_sample(x0, first, self._noise(x0, 0), self._on(x0.device)[0])

    def _noise(self, x: torch.Tensor, step: int) -> torch.Tensor:
        return ops.philox_normal((1, *x.shape[1:]), self.seed, step=step, device=x.device)

    def _run(self, x_t: torch.Tensor, guide: torch.Tensor | None) -> torch.Tensor:
        """From x_t, which may be overwritten."""
        _, log_sigma, table = self._on(x_t.device)
        n, dtype = len(x_t), self._network_dtype(x_t)
        embeds = hasattr(self.denoiser, "embedding") and hasattr(self.denoiser, "denoise")
        levels = self.denoiser.embedding(log_sigma) if embeds else log_sigma
        denoise = self.denoiser.denoise if embeds else self.denoiser
        guide = guide if self.guidance > 0 else None
        # In one kernel a step: the state, the network's next input, and the counter moved on.
        fused = table is not None and _is_state_of_the_kernels(x_t)
        counter = torch.zeros(2, dtype=torch.int32, device=x_t.device) if fused else None
        x_in = x_t.to(dtype)
        for i, step in enumerate(self.steps):
            output = denoise(x_in, levels[i].expand(n, *levels.shape[1:]))
            if fused:
                next_input = None if x_in is x_t else x_in
                torch.ops.diffad_fast.ddim_loop_step_(
                    x_t, output, guide, table, counter, next_input, self.seed, 0, -1.0, 1.0
                )
                continue
            x_t = ops.ddim_step(
                x_t,
                output,
                step.alpha_t,
                step.alpha_s,
                prediction_type=self.prediction_type,
                eta=self.eta,
                noise=self._noise(x_t, i + 1) if self.eta > 0 else None,
                clip=self.clip,
                guidance=None if guide is None else (guide, self.guidance),
            )
            x_in = x_t.to(dtype)
        return x_t

    def _network_dtype(self, x: torch.Tensor) -> torch.dtype:
        """That of the denoiser's weights, if they are narrower than the state."""
        if isinstance(self.denoiser, nn.Module):
            for parameter in self.denoiser.parameters():
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    return parameter.dtype
        return x.dtype

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The first level, the levels' log sigma and, for CUDA's kernels, the table of steps.

        Made once a device: a capture must not copy from the host.
        """
        if device not in self._constants:
            first = torch.tensor([self.steps[0].alpha_t], dtype=torch.float64, device=device)
            log_sigma = torch.tensor([s.log_sigma for s in self.steps], device=device)
            table = None
            if device.type == "cuda" and ops.diffusion.fused_steps(device):
                table = ops.diffusion.step_table(
                    self.steps, self.prediction_type, self.eta, self.clip, self.guidance
                ).to(device)
            self._constants[device] = first, log_sigma, table
        return self._constants[device]

    # ------------------------------------------------------------- graphs

    def _graph(self, x: torch.Tensor) -> CapturedCall | None:
        """The captured call for tensors like x; None where it runs eagerly."""
        key = (x.shape, x.dtype, x.device, x.stride(), ops.dispatch.selected(), *self._versions())
        captured = self._captured.get(key, NEW)
        if captured is NEW:
            captured = ONCE
        elif captured is ONCE:
            captured = self._capture_or_warn(x)
        self._captured[key] = captured
        self._captured.move_to_end(key)
        while len(self._captured) > self.graphs:
            self._captured.popitem(last=False)
        return captured if isinstance(captured, CapturedCall) else None

    def _capture_or_warn(self, x: torch.Tensor) -> CapturedCall | None:
        try:
            captured = CapturedCall(self.eager, x)
        except Exception as error:
            warnings.warn(
                f"the reverse loop runs without a CUDA graph, its capture failed: {error}",
                RuntimeWarning,
                stacklevel=4,
            )
            return None
        return captured if self._gains(captured, x) else None

    def _gains(self, captured: CapturedCall, x: torch.Tensor) -> bool:
        """Is the graph faster than the eager loop? Both give the same bits."""
        times = {captured: [], self.eager: []}
        for _ in range(3):
            for call, found in times.items():
                found.append(elapsed(call, x))
        return statistics.median(times[captured]) < statistics.median(times[self.eager])

    def _versions(self) -> Iterable[tuple[int, int]]:
        """What changes when a weight is replaced or updated in place."""
        for module in self.modules:
            for tensor in (*module.parameters(), *module.buffers()):
                version = 0 if tensor.is_inference() else tensor._version
                yield tensor.data_ptr(), version


class CapturedCall:
    """``function(x)`` for tensors like x, captured as a CUDA graph with buffers of its own."""

    def __init__(self, function: Callable, x: torch.Tensor):
        self._input = x.clone()
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.device(x.device), torch.cuda.stream(side):
            for _ in range(2):  # libraries load their kernels and choose among them
                function(self._input)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=side):
                self._output = function(self._input)
        torch.cuda.current_stream(x.device).wait_stream(side)
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(x.device))

    def __call__(self, x: torch.Tensor):
        stream = torch.cuda.current_stream(x.device)
        # Another stream may still be in the last replay, whose buffers these are.
        stream.wait_event(self._done)
        self._input.copy_(x)
        self._graph.replay()
        result = tree_map(lambda y: y.clone() if isinstance(y, torch.Tensor) else y, self._output)
        self._done.record(stream)
        return result


def _is_state_of_the_kernels(x: torch.Tensor) -> bool:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.dtype == torch.float32 and x.numel() > 0 and (last or x.is_contiguous())


def elapsed(call: Callable, x: torch.Tensor) -> float:
    """Milliseconds of ``call(x)`` on the device."""
    with torch.cuda.device(x.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(x)
        end.record()
        end.synchronize()
    return start.elapsed_time(end)
