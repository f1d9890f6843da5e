"""diffusers: its DDIM scheduler with fused steps, and its U-Nets in our reverse loop.

A pipeline that was saved with :class:`FusedDDIMScheduler` names this module in its
``model_index.json``; diffusers imports no module by itself, so import this one before loading.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from .. import ops
from ..denoisers.diffusers_unet import DiffusersUNet
from ..detector import Detector
from ..diffusion import ReverseLoop, ReverseStep
from ..errors import InputError
from ..ops.diffusion import ddim_step_and_x0
from ._host import require

require("diffusers")

from diffusers.schedulers.scheduling_ddim import (  # noqa: E402
    DDIMScheduler,
    DDIMSchedulerOutput,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

# diffusers loads a component only if its base class stands in the module of the component.
__all__ = ["FusedDDIMScheduler", "SchedulerMixin", "detector_from_diffusers", "fast_sampler"]


class FusedDDIMScheduler(DDIMScheduler):
    """``diffusers.DDIMScheduler`` whose steps are two passes over memory (``ops.ddim_step``), one
    for each of the two results.

    Every argument, method and attribute is the scheduler's own, and so are the results but for
    rounding: coefficients are computed in float64 and samples in float32 at least, where the stock
    class computes half-precision samples in half precision. eta has to lie in [0, 1].

    Served by the stock code: ``prediction_type="epsilon"`` with ``rescale_betas_zero_snr``, whose
    first level divides by zero, and dynamic thresholds below 1.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step back from ``timestep``; arguments and result as in ``DDIMScheduler.step``.

        A timestep on a CUDA device is not waited for. Raises ValueError before ``set_timesteps``
        and for options out of their range.
        """
        config = self.config
        by_zero = config.rescale_betas_zero_snr and config.prediction_type == "epsilon"
        if by_zero or (config.thresholding and config.sample_max_value < 1):
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator,
                variance_noise, return_dict,
            )  # fmt: skip
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps(num_inference_steps) before step")
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("choose one of generator and variance_noise, not both")
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(
                    model_output.shape,
                    generator=generator,
                    device=model_output.device,
                    dtype=model_output.dtype,
                )
        if sample.dtype != model_output.dtype:
            sample = sample.to(torch.promote_types(sample.dtype, model_output.dtype))
        alpha_t, alpha_s = self._levels(timestep)
        previous, x0 = ddim_step_and_x0(
            sample, model_output, alpha_t, alpha_s, config.prediction_type, eta, noise,
            **_limit(config), use_clipped_model_output=use_clipped_model_output,
        )  # fmt: skip
        if not return_dict:
            return previous, x0
        return DDIMSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Noised samples at ``timesteps``, () or one a sample; as the stock class does it, which
        also serves shapes and dtypes that differ."""
        if original_samples.shape != noise.shape or original_samples.dtype != noise.dtype:
            return super().add_noise(original_samples, noise, timesteps)
        self.alphas_cumprod = self.alphas_cumprod.to(original_samples.device)
        t = timesteps.to(original_samples.device, torch.int64).reshape(-1)
        return ops.q_sample(
            original_samples, t.expand(len(original_samples)), noise, self.alphas_cumprod
        )

    def _levels(self, timestep):
        """abar at ``timestep`` and at the one that a step leads to: floats, or tensors ()."""
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            return self._levels_on_device(timestep)
        t = int(timestep)
        s = t - self.config.num_train_timesteps // self.num_inference_steps
        alphas = self._alphas()
        return alphas[t], alphas[s] if s >= 0 else float(self.final_alpha_cumprod)

    def _levels_on_device(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = t - self.config.num_train_timesteps // self.num_inference_steps
        # They stay there: a copy to the device waits for it, as does a tensor () for an index.
        self.alphas_cumprod = self.alphas_cumprod.to(t.device)
        self.final_alpha_cumprod = self.final_alpha_cumprod.to(t.device)
        level = lambda i: self.alphas_cumprod.index_select(0, i.reshape(1)).squeeze(0)  # noqa: E731
        return level(t), torch.where(s < 0, self.final_alpha_cumprod, level(s.clamp(min=0)))

    def _alphas(self) -> list[float]:
        """``alphas_cumprod`` on the host, read again whenever that tensor has changed."""
        table = self.alphas_cumprod
        if table.is_inference():  # it has no version
            return table.tolist()
        known = getattr(self, "_known", None)
        if known is None or known[0] is not table or known[1] != table._version:
            known = self._known = table, table._version, table.tolist()
        return known[2]


def fast_sampler(
    unet: nn.Module,
    scheduler,
    num_inference_steps: int | None = None,
    eta: float = 0.0,
    seed: int = 0,
    use_clipped_model_output: bool = False,
) -> ReverseLoop:
    """The DDIM loop of ``unet`` (a ``UNet2DModel`` without classes) as a :class:`ReverseLoop`.

    scheduler: a ``DDIMScheduler``, ``DDPMScheduler`` or another whose configuration the former
    can take over; its timesteps, clipping, dynamic thresholding and kind of prediction are kept.
    num_inference_steps: None takes what ``scheduler.set_timesteps`` was given. seed: of the noise
    that eta > 0 adds. eta, use_clipped_model_output: as in ``DDIMScheduler.step``.

    ``fast_sampler(...).run(noise)`` turns noise (N,C,H,W) into samples, as the pipeline's loop
    does; ``fast_sampler(...)(x0)`` noises x0 to the first level and brings it back. On a CUDA
    device a shape that comes again is one CUDA graph. Raises InputError for what the loop does
    not have: dynamic thresholds below 1, predicted variances, classes.
    """
    steps = num_inference_steps
    if steps is None:
        steps = getattr(scheduler, "num_inference_steps", None)
    if steps is None:
        raise InputError("give num_inference_steps, or call scheduler.set_timesteps first")
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"num_inference_steps is a whole number of at least 1, not {steps!r}")
    scheduler = _fused(scheduler)
    config = scheduler.config
    check_unet(unet)
    scheduler.set_timesteps(steps)
    levels = [scheduler._levels(t) for t in scheduler.timesteps.tolist()]
    if config.prediction_type == "epsilon" and levels[0][0] == 0:
        raise InputError(
            "the first level has no signal (rescale_betas_zero_snr), and no sample follows from "
            "its epsilon: use timestep_spacing='leading'"
        )
    return ReverseLoop(
        DiffusersUNet(unet, scheduler.alphas_cumprod).to(next(unet.parameters()).device),
        [ReverseStep.between(*level) for level in levels],
        seed=seed,
        prediction_type=config.prediction_type,
        eta=eta,
        use_clipped_model_output=use_clipped_model_output,
        **_limit(config),
    )


def detector_from_diffusers(pipeline, **options) -> Detector:
    """See :meth:`diffad_fast.Detector.from_diffusers`."""
    if isinstance(pipeline, (str, os.PathLike)):
        # Here: models are a heavy import that schedulers do not need.
        from diffusers import DiffusionPipeline

        path = os.fspath(pipeline)
        try:
            pipeline = DiffusionPipeline.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise InputError(f"diffusers cannot load a pipeline from {path}: {error}") from None
    unet, scheduler = (getattr(pipeline, name, None) for name in ("unet", "scheduler"))
    if unet is None or scheduler is None or hasattr(pipeline, "vae"):
        raise InputError(
            f"{type(pipeline).__name__} is not an unconditional pipeline on pixels, of unet and "
            "scheduler: DDPMPipeline and DDIMPipeline are"
        )
    check_unet(unet)
    scheduler = _fused(scheduler)
    config, size = scheduler.config, unet.config.sample_size
    if size is None and "image_size" not in options:
        raise InputError("the U-Net's configuration has no sample_size: give image_size")
    found = {
        "image_size": size if isinstance(size, int) else tuple(size or ()),
        "channels": unet.config.in_channels,
        "haar_level": 0,
        "schedule": {"squaredcos_cap_v2": "cosine"}.get(config.beta_schedule, config.beta_schedule),
        "diffusion_steps": config.num_train_timesteps,
        "prediction_type": config.prediction_type,
        **_limit(config),
        # No sub-bands at level 0; and nothing is trained: the normals are there to calibrate.
        "map_weights": (1.0, 1.0, 0.0),
        "train_steps": 0,
        "validation_share": 0.01,
        "statistics_share": 0.35,
        "conformal_share": 0.5,
    }
    return Detector(denoiser=DiffusersUNet(unet, scheduler.alphas_cumprod), **{**found, **options})


def _fused(scheduler) -> FusedDDIMScheduler:
    """``scheduler`` as a DDIM one. Raises InputError for what a :class:`ReverseLoop` has not."""
    try:
        fused = FusedDDIMScheduler.from_config(scheduler.config)
    except NotImplementedError as error:
        raise InputError(
            f"a DDIM scheduler cannot take over this {type(scheduler).__name__}: {error}"
        ) from None
    if fused.config.thresholding and fused.config.sample_max_value < 1:
        raise InputError(
            f"sample_max_value={fused.config.sample_max_value} with thresholding=True is below 1, "
            "which neither fast_sampler nor detectors have: use FusedDDIMScheduler in the "
            "pipeline's own loop"
        )
    return fused


def _limit(config) -> dict:
    """``clip`` and ``dynamic_threshold`` of ``ops.ddim_step`` as a scheduler's options say."""
    if config.thresholding:
        threshold = config.dynamic_thresholding_ratio, config.sample_max_value
        return {"clip": None, "dynamic_threshold": threshold}
    clip = config.clip_sample_range if config.clip_sample else None
    return {"clip": clip, "dynamic_threshold": None}


def check_unet(unet: nn.Module) -> None:
    """Raise InputError unless ``unet(x, t)`` gives a prediction of the shape of x alone."""
    config = unet.config
    if config.in_channels != config.out_channels:
        raise InputError(
            f"the U-Net has {config.in_channels} input and {config.out_channels} output channels: "
            "predicted variances and conditioning by concatenation are not supported"
        )
    if getattr(config, "num_class_embeds", None) or getattr(config, "class_embed_type", None):
        raise InputError("the U-Net is conditioned on classes: only unconditional ones are used")
