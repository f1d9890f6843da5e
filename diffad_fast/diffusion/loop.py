"""The reverse process, or its inversion: from a represented input to the model's idea of it without
its anomaly, or to its latent."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import nn

from .. import ops
from ..protocols import ConditionedDenoiser
from .graphs import Graphed
from .noise import NoiseFields
from .schedule import ReverseStep


class ReverseLoop:
    """DDIM over a table of steps (Song, Meng, Ermon 2021, eq. 12), and what stands around it.

    ``denoiser(x_t, log_sigma)`` with log_sigma (N,) float32 gives the prediction, of x_t's shape. A
    module that has ``conditioning(log_sigma)`` and ``denoise(x_t, conditioning)`` is conditioned on
    all the levels at once, in front of the loop. steps: as from :class:`NoiseSchedule`; with
    alpha_s < alpha_t they are an inversion. prediction_type, eta, clip, dynamic_threshold,
    use_clipped_model_output: as in ``ops.ddim_step``. guidance: weight of the pull towards the
    input (DDAD, Mousakhan et al. 2023).
    seed: of the noise, which is the same field for every sample, so that a sample's result does
    not depend on its neighbours.

    A call is ``conclude(x, x0, x_end)`` with x0 = ``prepare(x)`` and x_end the end of the process:
    from x0 noised to the level of ``steps[0]``, or, in an inversion, from sqrt(alpha_t) x0. Without
    ``prepare`` x is x0 already, without ``conclude`` x_end is the result; results are tensors in
    tuples, lists or dicts. ``finish(x, x_t, model_output, alpha_t, prediction_type=, clip=,
    guidance=)``, as of a representation, takes the place of the last step, which must end at abar =
    1, and gives x_end; ``run`` leaves it out. It knows no dynamic threshold: with one, the last
    step is taken before, and finish is given its end, as a prediction of itself.

    On a CUDA device the call is :class:`Graphed`, with the tensors of ``modules`` (the denoiser's,
    if not given). ``eager`` is the same without graphs, and alone can be differentiated.

    A call runs in inference mode: a denoiser that takes gradients needs ``eager`` or ``run``.

    Raises ValueError and TypeError as ``ops.ddim_step`` for options and levels, ValueError where
    there are no steps.
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
        dynamic_threshold: tuple[float, float] | None = None,
        use_clipped_model_output: bool = False,
        guidance: float = 0.0,
        prepare: Callable | None = None,
        conclude: Callable | None = None,
        finish: Callable | None = None,
        modules: Iterable[nn.Module] | None = None,
        graphs: int = 4,
    ):
        self.denoiser, self.steps, self.seed = denoiser, tuple(steps), seed
        self._noise = NoiseFields(seed)
        if not self.steps:
            raise ValueError("steps must hold at least one ReverseStep, got none")
        self.inverts = self.steps[0].alpha_s < self.steps[0].alpha_t
        self.prediction_type, self.eta, self.clip = prediction_type, eta, clip
        self.dynamic_threshold = dynamic_threshold
        self.use_clipped_model_output = use_clipped_model_output
        self.guidance = guidance
        ops.diffusion.check_loop(
            self.steps, prediction_type, eta, clip, dynamic_threshold, use_clipped_model_output,
            guidance,
        )  # fmt: skip
        self.prepare, self.conclude, self.finish = prepare, conclude, finish
        if finish is not None and self.steps[-1].alpha_s != 1:
            raise ValueError(
                f"finish ends at abar = 1, the last step at {self.steps[-1].alpha_s}: leave finish "
                "out, or take steps down to the clean end"
            )
        if modules is None:
            modules = [denoiser] if isinstance(denoiser, nn.Module) else []
        self.graphed = Graphed(self.eager, modules, graphs)
        self._constants: dict[Hashable, tuple[torch.Tensor, ...]] = {}

    def __call__(self, x: torch.Tensor):
        """The whole pass for a batch x (N,...), in inference mode."""
        return self.graphed(x)

    def forget(self) -> None:
        """Give back the memory of the graphs."""
        self.graphed.forget()

    def eager(self, x: torch.Tensor):
        """The same without a graph."""
        x0 = x if self.prepare is None else self.prepare(x)
        x_end = self._run(self._start(x0), x0, x)
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
        first = torch.zeros(x0.shape[0], dtype=torch.int64, device=x0.device)
        return ops.q_sample(x0, first, self._field(x0, 0), self._on(x0.device)[0])

    def _field(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """(1,...): the noise of a step, the same for every batch."""
        return self._noise((1, *x.shape[1:]), x.device, step)

    def _run(self, x_t: torch.Tensor, guide: torch.Tensor | None, x: torch.Tensor | None = None):
        """From x_t, which may be overwritten; to the end of ``finish``, if there is one and x."""
        _, log_sigma, table = self._on(x_t.device)
        n, dtype = x_t.shape[0], network_dtype(self.denoiser) or x_t.dtype
        apart = isinstance(self.denoiser, ConditionedDenoiser)
        levels = self.denoiser.conditioning(log_sigma) if apart else log_sigma
        denoise = self.denoiser.denoise if apart else self.denoiser
        guide = guide if self.guidance else None
        pull = None if guide is None else (guide, self.guidance)
        # In one kernel a step: the state, the network's next input, and the counter moved on, which
        # kernels read without a check: its first number has to be that of a row of the table.
        # It writes in place, which autograd does not see, and the guidance is in the table.
        fused = table is not None and not torch.is_grad_enabled() and _is_state_of_the_kernels(x_t)
        fused = fused and (pull is not None or not self.guidance)
        counter = torch.zeros(2, dtype=torch.int32, device=x_t.device) if fused else None
        x_in, threshold = x_t.to(dtype), self.dynamic_threshold
        finish = self.finish if x is not None else None
        for i, step in enumerate(self.steps):
            output = denoise(x_in, levels[i].expand(n, *levels.shape[1:]))
            if output.dtype == torch.float64:
                output = output.to(x_t.dtype)
            if i + 1 == len(self.steps) and finish is not None and threshold is None:
                return finish(
                    x, x_t, output, step.alpha_t,
                    prediction_type=self.prediction_type, clip=self.clip, guidance=pull,
                )  # fmt: skip
            if fused:
                # The kernel writes it in the dtype of the output.
                next_input = None if x_in is x_t or x_in.dtype != output.dtype else x_in
                torch.ops.diffad_fast.ddim_loop_step_(
                    x_t, output, guide, table, counter, next_input, self.seed, 0,
                    *(threshold or (-1.0, 1.0)),
                )  # fmt: skip
                x_in = x_t.to(dtype) if next_input is None else next_input
                continue
            x_t = ops.ddim_step(
                x_t,
                output,
                step.alpha_t,
                step.alpha_s,
                prediction_type=self.prediction_type,
                eta=self.eta,
                noise=self._field(x_t, i + 1) if self.eta > 0 else None,
                clip=self.clip,
                dynamic_threshold=threshold,
                use_clipped_model_output=self.use_clipped_model_output,
                guidance=pull,
            )
            x_in = x_t.to(dtype)
        if finish is not None:
            return finish(
                x, x_t, x_t, step.alpha_t, prediction_type="sample", clip=None, guidance=None
            )
        return x_t

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The first level, the levels' log sigma and, for CUDA's kernels, the table of steps.

        Made once a device and backend: a capture must not copy from the host.
        """
        # Which kernels take the steps is the backend's choice.
        key = device, ops.dispatch.selected()
        if key not in self._constants:
            with torch.inference_mode(False):  # `eager` may be differentiated later
                self._constants[key] = self._made_on(device)
        return self._constants[key]

    def _made_on(self, device: torch.device):
        first = torch.tensor([self.steps[0].alpha_t], dtype=torch.float64, device=device)
        log_sigma = torch.tensor([s.log_sigma for s in self.steps], device=device)
        table = None
        if ops.diffusion.fused_steps(device):
            table = ops.diffusion.step_table(
                self.steps, self.prediction_type, self.eta,
                self.clip if self.dynamic_threshold is None else 1.0,
                self.guidance, self.use_clipped_model_output,
            ).to(device)  # fmt: skip
        return first, log_sigma, table


def network_dtype(denoiser) -> torch.dtype | None:
    """Of the inputs that a denoiser takes, where some of its weights are not in float32."""
    for parameter in denoiser.parameters() if isinstance(denoiser, nn.Module) else ():
        if parameter.dtype in (torch.bfloat16, torch.float16, torch.float64):
            return parameter.dtype
    return None


def _is_state_of_the_kernels(x: torch.Tensor) -> bool:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.dtype == torch.float32 and x.numel() > 0 and (last or x.is_contiguous())
