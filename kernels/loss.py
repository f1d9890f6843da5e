"""The training loss, mean over samples of weight times mean squared error.

Forward: every program sums the squares of a chunk of a sample; a second kernel adds the chunks'
sums, always in the same order, so that runs are bit-identical. Prediction and target are read
once. Backward reads them once more and writes once::

    dloss / dprediction = 2 weight / (N M) (prediction - target) = - dloss / dtarget

for N samples of M values.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.training import errors_backward, fake_errors, keep_errors
from .registration import cdiv, dense, launch, operator, source, widened

# Chunks a sample: a constant, so that a sample's sum does not depend on its neighbours.
SPLITS = 64
TILE = 2048


@triton.jit
def _square_sums(prediction, target, sums, samples: tl.int64, size: tl.int64, chunk: tl.int64,
                 SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Sum of (prediction - target)^2 over a chunk of each of BLOCK_N samples -> (N, SPLITS)."""
    program = tl.program_id(0)
    splits = tl.cdiv(size, chunk)
    row, split = program // splits, program % splits
    n = row.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = split.to(tl.int64) * chunk
    last = tl.minimum(first + chunk, size)
    total = widened(tl.zeros((BLOCK_N, BLOCK_M), prediction.dtype.element_ty))
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (n < samples)[:, None] & (m < last)[None, :]
        place = n[:, None] * size + m[None, :]
        error = widened(tl.load(prediction + place, mask, 0.0))
        error -= widened(tl.load(target + place, mask, 0.0)).to(error.dtype)
        total += error * error
    tl.store(sums + n * SPLITS + split, tl.sum(total, 1), n < samples)


@triton.jit
def _merge(sums, weight, errors, loss, samples: tl.int64, size: tl.int64, splits,
           SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Mean squared error of every sample and the weighted mean of these; one program."""
    samples = tl.cast(samples, tl.int64)
    s = tl.arange(0, SPLITS)[None, :]
    total = tl.zeros((BLOCK_N,), sums.dtype.element_ty)
    for start in range(0, samples, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        real = n < samples
        mask = real[:, None] & (s < splits)
        error = tl.sum(tl.load(sums + n[:, None] * SPLITS + s, mask, 0.0), 1)
        error /= tl.cast(size, error.dtype)
        tl.store(errors + n, error, real)
        total += error * tl.load(weight + n, real, 0.0).to(error.dtype)
    tl.store(loss, tl.sum(total, 0) / tl.cast(samples, total.dtype))


@triton.jit
def _gradient(prediction, target, weight, grad, result, samples: tl.int64, size: tl.int64,
              BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """2 grad weight / (N M) (prediction - target), grad being the loss's own gradient."""
    program = tl.program_id(0)
    blocks = tl.cdiv(size, BLOCK_M)
    row, block = program // blocks, program % blocks
    n = row.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (n < samples)[:, None] & (m < size)[None, :]
    place = n[:, None] * size + m[None, :]
    error = widened(tl.load(prediction + place, mask, 0.0))
    error -= widened(tl.load(target + place, mask, 0.0)).to(error.dtype)
    factor = 2.0 * tl.load(grad).to(error.dtype)
    factor /= tl.cast(samples, error.dtype) * tl.cast(size, error.dtype)
    factor *= tl.load(weight + n, n < samples, 0.0).to(error.dtype)
    tl.store(result + place, (factor[:, None] * error).to(result.dtype.element_ty), mask)


def _configs(size: int) -> list[triton.Config]:
    block = min(triton.next_power_of_2(size), TILE)
    return [triton.Config({"BLOCK_N": TILE // block, "BLOCK_M": block}, num_warps=4)]


_MERGE_CONFIGS = [triton.Config({"BLOCK_N": 64}, num_warps=4)]


@operator(fake_errors)
def weighted_mse_forward(
    prediction: Tensor, target: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss and every sample's mean squared error (N,), both in float32 at least."""
    loss, errors = fake_errors(prediction, target, weight)
    prediction, target = dense(prediction, prediction), dense(target, prediction)
    n, size = len(prediction), prediction[0].numel()
    configs = _configs(size)
    block = configs[0].kwargs["BLOCK_M"]
    chunk = cdiv(cdiv(size, block), SPLITS) * block
    splits = cdiv(size, chunk)
    sums = prediction.new_empty((n, SPLITS), dtype=loss.dtype)
    launch(
        _square_sums, configs, lambda meta: (cdiv(n, meta["BLOCK_N"]) * splits,),
        prediction, target, sums, n, size, chunk, SPLITS=SPLITS,
    )  # fmt: skip
    launch(
        _merge, _MERGE_CONFIGS, lambda meta: (1,),
        sums, weight.contiguous(), errors, loss, n, size, splits, SPLITS=SPLITS,
    )  # fmt: skip
    return loss, errors


def _fake_backward(grad, prediction, target, weight):
    return torch.empty_like(dense(prediction, prediction))


@operator(_fake_backward)
def weighted_mse_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, weight: Tensor
) -> Tensor:
    """Gradient of the prediction."""
    result = _fake_backward(grad, prediction, target, weight)
    prediction, target = dense(prediction, prediction), dense(target, prediction)
    n, size = len(prediction), prediction[0].numel()
    launch(
        _gradient, _configs(size),
        lambda meta: (cdiv(n, meta["BLOCK_N"]) * cdiv(size, meta["BLOCK_M"]),),
        prediction, target, weight.contiguous(), grad, result, n, size,
    )  # fmt: skip
    return result


weighted_mse_forward.register_autograd(
    errors_backward(weighted_mse_backward), setup_context=keep_errors
)


def weighted_mse(prediction, target, weight):
    """See ``ops.weighted_mse``."""
    return weighted_mse_forward(prediction, target, weight)[0]


def _variant(kernel, configs, capability: int):
    """For a bfloat16 prediction and a float32 target."""
    types = {p.name: "*fp32" for p in kernel.params if not p.is_constexpr}
    special = {"prediction": "*bf16", "result": "*bf16", "splits": "i32"}
    special |= dict.fromkeys(("samples", "size", "chunk"), "i64")
    types |= {name: kind for name, kind in special.items() if name in types}
    constants = {"SPLITS": SPLITS} if kernel is not _gradient else {}
    return source(kernel, configs[0], types, **constants)


COMPILE = {
    kernel.__name__[1:]: functools.partial(_variant, kernel, configs)
    for kernel, configs in (
        (_square_sums, _configs(TILE)), (_merge, _MERGE_CONFIGS), (_gradient, _configs(TILE)),
    )
}  # fmt: skip
