"""What a denoiser is trained on, and its loss: all of a training step but the network itself."""

from __future__ import annotations

import torch

from .. import native, reference
from ..reference.training import min_snr_weight
from . import checks
from .diffusion import (
    PREDICTION_TYPES,
    check_forward,
    fake_step,
    keep_noising,
    noising_backward,
    refuses_learned_schedule,
)
from .dispatch import Operator, kernel


def _native_weighted_mse(forward):
    return lambda *arguments: forward(*arguments)[0]


def _native_noised_target(velocity):
    """C++ for the samples and, a second sum of the same two tensors, their velocity."""

    def noised_target(x0, t, noise, alphas_cumprod, prediction_type, snr_limit):
        if prediction_type == "v_prediction":
            return velocity(x0, t, noise, alphas_cumprod, snr_limit)
        x_t = torch.ops.diffad_fast.q_sample(x0, t, noise, alphas_cumprod)
        target = noise.expand_as(x0).to(x0.dtype) if prediction_type == "epsilon" else x0
        weight = min_snr_weight(alphas_cumprod.double()[t], prediction_type, snr_limit)
        return x_t, target, weight

    return noised_target


_noised_target = Operator(
    "noised_target",
    reference.noised_target,
    triton=kernel("q_sample", "noised_target"),
    **{k: _native_noised_target(f) for k, f in native.implementations("noised_velocity").items()},
    refuses=dict.fromkeys(("cpu", "triton", "cuda"), refuses_learned_schedule),
)
_weighted_mse = Operator(
    "weighted_mse",
    reference.weighted_mse,
    triton=kernel("loss", "weighted_mse"),
    **{k: _native_weighted_mse(f) for k, f in native.implementations("weighted_mse").items()},
)


def noised_target(x0, t, noise, alphas_cumprod, prediction_type="v_prediction", snr_limit=5.0):
    """Noised samples, what the network shall say of them, and the weights of its errors.

    x0, t, noise, alphas_cumprod: as for :func:`q_sample`. prediction_type: "epsilon", "sample" or
    "v_prediction". snr_limit: where min-SNR weighting stops following the signal-to-noise ratio,
    at least 0.001.

    Returns (x_t, target, weight): x_t as from :func:`q_sample`; target, of its shape and dtype,
    the noise, x0 (possibly the argument itself) or the velocity
    ``sqrt(abar[t]) noise - sqrt(1 - abar[t]) x0``; weight (N,) float32, by which the mean squared
    error of the prediction becomes min(SNR, snr_limit) times that of x0. x_t and target are
    differentiable in x0 and noise.

    Raises TypeError for dtypes, ValueError for shapes, devices and options. Values of ``t`` are
    not checked.
    Source: Salimans & Ho 2022 (velocity), Hang et al. 2023 (min-SNR).
    """
    check_forward(x0, t, noise, alphas_cumprod)
    snr_limit = check_target(prediction_type, snr_limit)
    return _noised_target(x0, t, noise, alphas_cumprod, prediction_type, snr_limit)


def check_target(prediction_type, snr_limit):
    """Check the options of :func:`noised_target`; returns snr_limit as Python's float."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}: choose {', '.join(PREDICTION_TYPES)}"
        )
    return checks.number("snr_limit", snr_limit, 1e-3)


def weighted_mse(prediction, target, weight):
    """Mean over samples of ``weight`` times the mean squared error, a scalar.

    prediction, target: (N,...) of one shape with N > 0 and at least one value; weight: (N,).
    Summed in and returned as float32, float64 for float64 predictions. Differentiable in all
    three, once.

    Raises TypeError for dtypes, ValueError for shapes and devices.
    """
    checks.tensor("prediction", prediction)
    if prediction.ndim == 0 or prediction.numel() == 0:
        raise ValueError(f"prediction holds no samples: shape {tuple(prediction.shape)}")
    checks.shaped("target", target, prediction.shape, prediction.device)
    checks.shaped("weight", weight, (len(prediction),), prediction.device)
    return _weighted_mse(prediction, target, weight)


def _fake(x0, t, *_):
    return fake_step(x0), fake_step(x0), x0.new_empty(len(t), dtype=torch.float32)


def fake_errors(prediction, target, weight):
    """The loss and every sample's mean squared error (N,), in float32 at least."""
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return prediction.new_empty((), dtype=dtype), prediction.new_empty(len(weight), dtype=dtype)


def keep_errors(ctx, inputs, output):
    """Of operators with the arguments of :func:`weighted_mse` and the results of
    :func:`fake_errors`."""
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def errors_backward(gradient):
    """Their backward pass; ``gradient`` computes that of the prediction from that of the loss."""

    def backward(ctx, grad, _):
        checks.differentiated_once("weighted_mse")
        if grad is None:
            return None, None, None
        prediction, target, weight, errors = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_prediction = grad_target = grad_weight = None
        if needed[0] or needed[1]:
            grad_prediction = gradient(grad, prediction, target, weight)
            grad_target = -grad_prediction.to(target.dtype) if needed[1] else None
        if needed[2]:
            grad_weight = (grad * errors / len(errors)).to(weight.dtype)
        return grad_prediction if needed[0] else None, grad_target, grad_weight

    return backward


if native.loaded():
    torch.library.register_fake("diffad_fast::noised_velocity", _fake)
    torch.library.register_autograd(
        "diffad_fast::noised_velocity", noising_backward, setup_context=keep_noising
    )
    torch.library.register_fake("diffad_fast::weighted_mse", fake_errors)
    torch.library.register_fake(
        "diffad_fast::weighted_mse_backward", lambda grad, prediction, *_: fake_step(prediction)
    )
    torch.library.register_autograd(
        "diffad_fast::weighted_mse",
        errors_backward(lambda *given: torch.ops.diffad_fast.weighted_mse_backward(*given)),
        setup_context=keep_errors,
    )
