from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from ..case import Case, Contender, on, operator_case, random
from ..verify import finite


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    n = 8 if device_type == "cpu" else 64
    table = [
        ((n, 4, 32, 32, 32), 1),
        ((n // 4, 4, 64, 64, 32), 1),
        ((n // 4, 4, 64, 64, 32), 2),
        ((1, 2, 16, 16, 32), 1),
    ]
    for shape, level in table[: 1 if quick else None]:
        for gradients in (False,) if quick else (False, True):
            yield _case(shape, level, gradients)
    if device_type == "cuda":
        sizes = [(16, 64), (16, 128), (1, 64), (1, 128)]
        for batch, side in sizes[: 1 if quick else None]:
            for gradients in (False, True):
                yield _bf16_case(batch, side, gradients)


def _step(attention: Callable, gradients: bool) -> Callable:
    """``attention`` and, with gradients, its backward pass, the output being the gradient."""

    def forward_and_backward(*tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = attention(*tensors)
        # Not constant, as a gradient of ones is.
        found = torch.autograd.grad(out, tensors, out.detach(), allow_unused=True)
        return (out.detach(), *(g for g in found if g is not None))

    return forward_and_backward if gradients else attention


def _case(shape: tuple[int, ...], level: int, gradients: bool) -> Case:
    batch, heads, height, width, d = shape
    numel = batch * heads * height * width * d
    tokens = height * width // 4**level

    return operator_case(
        "wavelet_attention",
        f"level {level}, {'×'.join(map(str, shape))}" + ", forward and backward" * gradients,
        lambda device: on(device, *(random(*shape, seed=s) for s in range(3))),
        lambda functions, *qkv: _step(
            lambda q, k, v: functions.wavelet_attention(q, k, v, level=level), gradients
        )(*qkv),
        formats=False,
        peers={
            "SDPA over raw blocks": Contender(
                _step(lambda q, k, v: _over_blocks(q, k, v, level), gradients),
                note="the same values while all gains are 1; no gains",
                graph=True,
            ),
            "SDPA over pixels": Contender(
                _step(_over_pixels, gradients),
                check=finite,
                note=f"another function, {4**level}× the tokens",
                graph=True,
            ),
        },
        # Forward: q, k, v in, the output out. Backward: those and the gradient in, three out.
        bytes=4 * (12 if gradients else 4) * numel,
        # q·k and a·v; backward both logits and their gradient again, and three products.
        flops=(14 if gradients else 4) * batch * heads * tokens**2 * 4**level * d,
        batch=batch,
        gradients=gradients,
        compiled=not gradients,
    )


def _bf16_case(batch: int, side: int, gradients: bool) -> Case:
    """Level 1, 8 heads of 64, with gains, in bfloat16."""
    shape = (batch, 8, side, side, 64)
    numel = batch * 8 * side**2 * 64

    def inputs(device):
        # Views of one channels_last projection, as the denoiser has them.
        qkv = random(batch, side, side, 3, 8, 64, device=device).to(torch.bfloat16)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
        gains = (1 + 0.1 * random(8, 4, seed=s).to(device) for s in (1, 2))
        return (q, k, v, *gains)

    two_bytes = {"dtype": "bfloat16", "compiled": not gradients, "graph": True}
    tokens, passes = side**2 // 4, 3.5 if gradients else 1  # backward: five products for two
    case = operator_case(
        "wavelet_attention",
        f"level 1, {'×'.join(map(str, shape))}, bf16{', forward + backward' if gradients else ''}",
        inputs,
        lambda functions, *given: _step(functions.wavelet_attention, gradients)(*given),
        dtype="bfloat16",
        formats=False,
        compiled=not gradients,
        peers={
            "SDPA over pixels": Contender(
                lambda q, k, v, *_: _step(_over_pixels, gradients)(q, k, v),
                check=finite,
                dtype="bfloat16",
                note="another function, 4× the tokens",
                graph=True,
            ),
            "pack + SDPA + unpack": Contender(
                lambda *given: _step(_packed, gradients)(*given),
                note="the same function",
                **two_bytes,
            ),
        },
        bytes=2 * 4 * numel * (3 if gradients else 1),
        flops=int(4 * batch * 8 * tokens**2 * 4 * 64 * passes),
        tolerance=2e-2,
        batch=batch,
        gradients=gradients,
    )

    def exact(given):
        # Image after image: the scores of all of them in float64 are 17 GB.
        from diffad_fast import reference

        q, k, v, *gains = given
        gains = [gain.double() for gain in gains]
        run = _step(reference.wavelet_attention, gradients)
        images = [run(*(x[i : i + 1].double() for x in (q, k, v)), *gains) for i in range(batch)]
        if not gradients:
            return torch.cat(images)
        columns = list(zip(*images, strict=True))
        return (*map(torch.cat, columns[:4]), *(sum(c) for c in columns[4:]))

    return replace(case, exact=exact)


def haar_by_product(q, k, v, logit_gain=None, value_gain=None, level=1, scale=None):
    """The reference's function at level 1, as one writes it who is in a hurry: the Haar transform
    of a block as one 4×4 product on each side of SDPA."""
    from diffad_fast.reference.attention import _per_coefficient

    if level != 1:
        raise ValueError(f"level {level}: blocks of 2×2 alone")
    n, heads, height, width, d = q.shape
    signs = [[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]  # its own inverse
    haar = torch.tensor(signs, dtype=q.dtype, device=q.device) / 2

    def tokens(x):
        x = x.reshape(n, heads, height // 2, 2, width // 2, 2, d).transpose(3, 4)
        return (haar @ x.reshape(n, heads, -1, 4, d)).flatten(3)

    q, k, v = tokens(q), tokens(k), tokens(v)
    if logit_gain is not None:
        q = q * _per_coefficient(logit_gain.to(q.dtype), 1, d)
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)
    if value_gain is not None:
        y = y * _per_coefficient(value_gain.to(q.dtype), 1, d)
    y = (haar @ y.unflatten(3, (4, d))).reshape(n, heads, height // 2, width // 2, 2, 2, d)
    return y.transpose(3, 4).reshape(n, heads, height, width, d)


def _packed(q, k, v, logit_gain, value_gain):
    """The reference's function: sub-bands in memory, flash attention between them."""
    from diffad_fast.reference.attention import _per_coefficient, _pixels, _tokens

    height, width, d = q.shape[2:]
    q, k, v = (_tokens(x, 1) for x in (q, k, v))
    q = q * _per_coefficient(logit_gain.to(q.dtype), 1, d)
    y = F.scaled_dot_product_attention(q, k, v)
    return _pixels(y * _per_coefficient(value_gain.to(q.dtype), 1, d), 1, height, width)


def _over_blocks(q, k, v, level):
    side = 2**level
    n, heads, h, w, d = q.shape

    def tokens(x):
        x = x.reshape(n, heads, h // side, side, w // side, side, d)
        return x.transpose(3, 4).reshape(n, heads, -1, side * side * d)

    y = F.scaled_dot_product_attention(tokens(q), tokens(k), tokens(v))
    y = y.reshape(n, heads, h // side, w // side, side, side, d)
    return y.transpose(3, 4).reshape(q.shape)


def _over_pixels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    y = F.scaled_dot_product_attention(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3))
    return y.reshape(q.shape)
