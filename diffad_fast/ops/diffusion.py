"""The forward process and the DDIM step."""

from __future__ import annotations

import torch

from .. import native, reference
from ..reference.diffusion import PREDICTION_TYPES
from . import checks
from .dispatch import Operator, kernel


def _native_ddim_step(
    x_t,
    model_output,
    alpha_t,
    alpha_s,
    prediction_type,
    eta,
    noise,
    clip,
    dynamic_threshold,
    use_clipped_model_output,
    guidance,
):
    """The operator: numbers and tensors apart, -1 and infinity where there is no limit."""
    alphas = [(a, 0.0) if isinstance(a, torch.Tensor) else (None, a) for a in (alpha_t, alpha_s)]
    (tensor_t, number_t), (tensor_s, number_s) = alphas
    guide, weight = guidance or (None, 0.0)
    ratio, largest = dynamic_threshold or (-1.0, 1.0)
    return torch.ops.diffad_fast.ddim_step(
        x_t,
        model_output,
        tensor_t,
        tensor_s,
        noise if eta else None,
        guide,
        number_t,
        number_s,
        PREDICTION_TYPES.index(prediction_type),
        eta,
        weight,
        float("inf") if clip is None else clip,
        ratio,
        largest,
        use_clipped_model_output,
    )


def refuses_learned_schedule(x0, t, noise, alphas_cumprod, *_):
    """Why the kernels cannot serve a call with these arguments first, or None."""
    if torch.is_grad_enabled() and alphas_cumprod.requires_grad:
        return "the kernels have no gradient for alphas_cumprod"
    return None


_q_sample = Operator(
    "q_sample",
    reference.q_sample,
    triton=kernel("q_sample", "q_sample"),
    **native.implementations("q_sample"),
    refuses=dict.fromkeys(("cpu", "triton", "cuda"), refuses_learned_schedule),
)
_ddim_step = Operator(
    "ddim_step",
    reference.ddim_step,
    **dict.fromkeys(native.implementations("ddim_step"), _native_ddim_step),
)


def q_sample(x0, t, noise, alphas_cumprod):
    """Noised samples ``sqrt(abar[t]) x0 + sqrt(1 - abar[t]) noise`` (Ho et al. 2020, eq. 4).

    x0: (N,...); t: (N,) int64, indices into the table ``alphas_cumprod`` (T,) of any floating
    dtype; noise: the shape of ``x0``, or 1 in place of N. All on one device. Returns the shape
    and dtype of ``x0``; computed in float32 at least. Differentiable in x0 and noise, and, by the
    reference, to which `auto` turns then, in alphas_cumprod.

    Raises TypeError for dtypes, ValueError for shapes and devices. Values of ``t`` are not checked.
    """
    check_forward(x0, t, noise, alphas_cumprod)
    return _q_sample(x0, t, noise, alphas_cumprod)


def check_forward(x0, t, noise, alphas_cumprod):
    """Check the arguments of the forward process; see :func:`q_sample`."""
    checks.tensor("x0", x0)
    if x0.ndim == 0:
        raise ValueError("x0 must have a leading batch dimension, got a scalar")
    check_noising(x0.shape, x0.device, t, noise, alphas_cumprod, "x0")


def check_noising(shape, device, t, noise, alphas_cumprod, name):
    """Check what is to noise a tensor ``name`` of ``shape``; see :func:`q_sample`."""
    if not isinstance(t, torch.Tensor) or t.dtype != torch.int64:
        raise TypeError(f"t must be an int64 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if tuple(t.shape) != (shape[0],):
        raise ValueError(f"t must have shape ({shape[0]},), one a sample, got {tuple(t.shape)}")
    checks.on_device("t", t, device)
    _check_noise(noise, shape, device, name)
    checks.tensor("alphas_cumprod", alphas_cumprod, 1)
    checks.on_device("alphas_cumprod", alphas_cumprod, device)


def ddim_step(
    x_t,
    model_output,
    alpha_t,
    alpha_s,
    prediction_type="epsilon",
    eta=0.0,
    noise=None,
    clip=None,
    dynamic_threshold=None,
    use_clipped_model_output=False,
    guidance=None,
):
    """One step of DDIM from the level of ``x_t`` to another (Song, Meng, Ermon 2021, eq. 12).

    x_t, model_output: (N,...). alpha_t, alpha_s: cumulative products of 1 - beta at the source
    and at the target, floats or tensors (N,) or () in (0, 1]. alpha_s > alpha_t denoises,
    alpha_s = 1 ends the process, alpha_s < alpha_t inverts it (eta = 0 only). alpha_t = 1 is
    allowed only where nothing is divided by sqrt(1 - alpha_t): with "epsilon" and "v_prediction",
    without ``use_clipped_model_output``, at eta = 0; alpha_t = 0, a level without signal, where
    nothing is divided by sqrt(alpha_t): with "sample" and "v_prediction", without guidance.

    prediction_type: "epsilon", "sample" or "v_prediction", what ``model_output`` is.
    eta: in [0, 1]; 0 is deterministic, 1 ancestral sampling. eta > 0 needs ``noise``, standard
    normal of the shape of ``x_t`` or with 1 in place of N.
    clip: limits the predicted x0 to [-clip, clip].
    dynamic_threshold: (ratio, max): s = the quantile ``ratio`` of |x0| over a sample, within
    [1, max]; x0 is limited to [-s, s] and divided by s (Saharia et al. 2022). Not with ``clip``.
    use_clipped_model_output: epsilon is computed again from the limited x0.
    guidance: (y, w): pulls towards y, of the shape of ``x_t``, with weight w (DDAD, Mousakhan et
    al. 2023), before limiting.

    Returns x_s in the shape and dtype of ``x_t``; computed in float32 at least. The equations
    are in ``reference.ddim_step``. Differentiable in the tensors.

    Raises TypeError for dtypes, ValueError for shapes, devices and options. Values of tensors
    are not checked.
    """
    given = (
        x_t, model_output, alpha_t, alpha_s, prediction_type, eta, noise, clip, dynamic_threshold,
        use_clipped_model_output, guidance,
    )  # fmt: skip
    _check_ddim_step(*given)
    return _ddim_step(*given)


def ddim_step_and_x0(
    x_t, model_output, alpha_t, alpha_s, prediction_type, eta, noise, clip, dynamic_threshold,
    use_clipped_model_output,
):  # fmt: skip
    """(x_s, x0): :func:`ddim_step` and the limited x0 that it aims at, checked once."""
    limits = clip, dynamic_threshold
    given = (
        x_t, model_output, alpha_t, alpha_s, prediction_type, eta, noise, *limits,
        use_clipped_model_output, None,
    )  # fmt: skip
    _check_ddim_step(*given)
    # At abar_s = 1 the step's target is the limited x0 alone.
    target = (x_t, model_output, alpha_t, 1.0, prediction_type, 0.0, None, *limits, False, None)
    return _ddim_step(*given), _ddim_step(*target)


def _check_ddim_step(
    x_t, model_output, alpha_t, alpha_s, prediction_type, eta, noise, clip, dynamic_threshold,
    again, guidance,
):  # fmt: skip
    check_step(x_t, model_output, alpha_t, alpha_s, prediction_type, clip, guidance)
    _check_options(alpha_t, alpha_s, prediction_type, eta, clip, dynamic_threshold, again)
    if noise is not None:
        _check_noise(noise, x_t.shape, x_t.device, "x_t")
    elif eta > 0:
        raise ValueError(f"eta = {eta} needs noise: pass noise=, for example philox_normal")


def check_loop(
    steps, prediction_type, eta, clip, dynamic_threshold, use_clipped_model_output, guidance
):
    """Check the numbers of a whole loop; as of :func:`ddim_step`, guidance being the weight."""
    checks.number("guidance", guidance, -float("inf"))
    for alpha_t, alpha_s, *_ in steps:
        _check_numbers(alpha_t, alpha_s, prediction_type, clip, guidance != 0)
        _check_options(
            alpha_t, alpha_s, prediction_type, eta, clip, dynamic_threshold,
            use_clipped_model_output,
        )  # fmt: skip


def _check_options(alpha_t, alpha_s, prediction_type, eta, clip, dynamic_threshold, again):
    """What a step has and its fused end has not."""
    checks.number("eta", eta, 0.0, 1.0)
    divides_by_noise = prediction_type == "sample" or again or eta > 0
    if divides_by_noise and not isinstance(alpha_t, torch.Tensor) and alpha_t == 1:
        raise ValueError(
            "alpha_t must be below 1 for prediction_type 'sample', use_clipped_model_output and "
            f"eta > 0, got {alpha_t}: no noise is left to divide by"
        )
    if eta > 0:
        floats = not isinstance(alpha_t, torch.Tensor) and not isinstance(alpha_s, torch.Tensor)
        if floats and not alpha_t <= alpha_s:
            raise ValueError(
                f"eta = {eta} with alpha_s = {alpha_s} below alpha_t = {alpha_t}: inversion is "
                f"deterministic, use eta=0"
            )
    if dynamic_threshold is not None:
        if clip is not None:
            raise ValueError(f"choose one of clip = {clip} and dynamic_threshold, not both")
        if len(dynamic_threshold) != 2:
            raise ValueError(f"dynamic_threshold must be (ratio, max), got {dynamic_threshold!r}")
        checks.number("the ratio of dynamic_threshold", dynamic_threshold[0], 0.0, 1.0)
        checks.number("the maximum of dynamic_threshold", dynamic_threshold[1], 1.0)


def check_step(x_t, model_output, alpha_t, alpha_s, prediction_type, clip, guidance):
    """Check what the step and its fused end have in common; see :func:`ddim_step`."""
    checks.tensor("x_t", x_t)
    if x_t.ndim == 0:
        raise ValueError("x_t must have a leading batch dimension, got a scalar")
    checks.shaped("model_output", model_output, x_t.shape, x_t.device)
    for name, alpha in (("alpha_t", alpha_t), ("alpha_s", alpha_s)):
        if isinstance(alpha, torch.Tensor):
            if alpha.ndim:
                checks.shaped(name, alpha, (x_t.shape[0],), x_t.device)
            else:
                checks.tensor(name, alpha)
                if not alpha.is_cpu:
                    checks.on_device(name, alpha, x_t.device)
    _check_numbers(alpha_t, alpha_s, prediction_type, clip, guidance is not None)
    if guidance is not None:
        if not isinstance(guidance, (tuple, list)) or len(guidance) != 2:
            raise ValueError(f"guidance must be (y, w), got {type(guidance).__name__}")
        checks.shaped("the y of guidance", guidance[0], x_t.shape, x_t.device)
        checks.number("the w of guidance", guidance[1], -float("inf"))


def _check_numbers(alpha_t, alpha_s, prediction_type, clip, guided):
    """What a step and its fused end have in common beside tensors."""
    divides_by_signal = prediction_type == "epsilon" or guided
    for name, alpha in (("alpha_t", alpha_t), ("alpha_s", alpha_s)):
        if not isinstance(alpha, torch.Tensor):
            checks.number(name, alpha, 0.0, 1.0)
            if alpha == 0 and (name == "alpha_s" or divides_by_signal):
                raise ValueError(f"{name} must be above 0, got 0: nothing is left of the signal")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}: choose {', '.join(PREDICTION_TYPES)}"
        )
    if clip is not None:
        checks.number("clip", clip, 0.0)


def fused_steps(device):
    """Do the CUDA kernels serve the steps of a loop on ``device`` now?"""
    return _ddim_step.backend(device.type) == "cuda"


def step_table(
    steps, prediction_type, eta=0.0, clip=None, guidance=0.0, use_clipped_model_output=False
):
    """The coefficients of a loop's steps for the CUDA kernels: (S, 9) float32, on the CPU.

    steps: (alpha_t, alpha_s, ...) each; the other arguments as in :func:`ddim_step`, guidance being
    the weight alone. For steps with a dynamic threshold, which the kernel puts in the place of the
    clip, any clip does. Columns: csrc/common/diffusion.h.
    """
    return torch.ops.diffad_fast.ddim_table(
        torch.tensor([step[:2] for step in steps], dtype=torch.float64, device="cpu"),
        PREDICTION_TYPES.index(prediction_type),
        eta,
        guidance,
        float("inf") if clip is None else clip,
        use_clipped_model_output,
    )


def _check_noise(noise, shape, device, name):
    checks.tensor("noise", noise)
    if tuple(noise.shape) not in (tuple(shape), (1, *shape[1:])):
        raise ValueError(
            f"noise must have the shape of {name}, {tuple(shape)}, or 1 in place of its first "
            f"entry, got {tuple(noise.shape)}"
        )
    checks.on_device("noise", noise, device)


def has_dense_samples(x):
    """Do the elements of each sample fill a run of memory, and the samples follow each other?

    The same rule as in csrc/common/diffusion_tensor.h.
    """
    run = 1
    for size, stride in sorted(zip(x.shape[1:], x.stride()[1:], strict=True), key=lambda a: a[1]):
        if size > 1 and stride != run:
            return False
        run *= size
    return len(x) == 1 or x.stride(0) == run


def fake_step(x, *_):
    """Of what has the strides of ``x`` where its samples are dense."""
    if x.numel() == 0 or has_dense_samples(x):
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def keep_noising(ctx, inputs, output):
    """Of operators with the arguments of :func:`q_sample` first."""
    x0, t, noise, alphas_cumprod, *options = inputs
    ctx.save_for_backward(t, alphas_cumprod)
    if isinstance(output, tuple) and len(output) == 3:
        ctx.mark_non_differentiable(output[2])  # the weight
    ctx.x0, ctx.noise = x0.dtype, (noise.dtype, len(noise) < len(x0))
    ctx.options = len(options)


def noising_backward(ctx, grad, grad_velocity=None, _=None):
    """x_t and the velocity are linear in x0 and noise, with the factors of the forward pass."""
    t, alphas_cumprod = ctx.saved_tensors
    compute = torch.promote_types(grad.dtype, torch.float32)
    alpha = alphas_cumprod.double()[t].reshape(-1, *[1] * (grad.ndim - 1))
    signal, spread = alpha.sqrt().to(compute), (1 - alpha).sqrt().to(compute)
    grad = grad.to(compute)
    grad_x0 = grad_noise = None
    if ctx.needs_input_grad[0]:
        grad_x0 = signal * grad
        if grad_velocity is not None:
            grad_x0 = grad_x0 - spread * grad_velocity.to(compute)
        grad_x0 = grad_x0.to(ctx.x0)
    if ctx.needs_input_grad[2]:
        dtype, shared = ctx.noise
        grad_noise = spread * grad
        if grad_velocity is not None:
            grad_noise = grad_noise + signal * grad_velocity.to(compute)
        grad_noise = (grad_noise.sum(0, keepdim=True) if shared else grad_noise).to(dtype)
    return grad_x0, None, grad_noise, None, *[None] * ctx.options


def _keep_ddim_step(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def _ddim_step_backward(ctx, grad):
    """Through the reference, which also gives the derivatives in alpha and of a quantile, and those
    of a gradient that is to be differentiated itself.

    Nothing but the inputs is kept between the passes. A step is rarely differentiated: training
    needs q_sample alone.
    """
    number_t, number_s, prediction, eta, weight, clip, ratio, largest, recompute = ctx.numbers
    again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[:6]
    # Aliases: of the tensors themselves one may be computed from another, as the network's output
    # is from x_t, and its gradient would take that way, which autograd takes afterwards, too.
    inputs = [
        x if x is None else x.view_as(x) if again else x.detach().requires_grad_(need)
        for x, need in zip(ctx.saved_tensors, needed, strict=True)
    ]
    x_t, model_output, alpha_t, alpha_s, noise, guide = inputs
    with torch.enable_grad():
        x_s = reference.ddim_step(
            x_t,
            model_output,
            number_t if alpha_t is None else alpha_t,
            number_s if alpha_s is None else alpha_s,
            PREDICTION_TYPES[prediction],
            eta,
            noise,
            None if clip == float("inf") else clip,
            None if ratio < 0 else (ratio, largest),
            recompute,
            None if guide is None else (guide, weight),
        )
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(x_s, wanted, grad, create_graph=again, allow_unused=True))
    grads = [next(found) if need else None for need in needed]
    return *grads, *[None] * len(ctx.numbers)


if native.loaded():
    for _name, _backward, _setup in (
        ("diffad_fast::q_sample", noising_backward, keep_noising),
        ("diffad_fast::ddim_step", _ddim_step_backward, _keep_ddim_step),
    ):
        torch.library.register_fake(_name, fake_step)
        torch.library.register_autograd(_name, _backward, setup_context=_setup)
