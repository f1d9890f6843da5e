from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch

from .. import peers
from ..case import (
    ONE_THREAD,
    Case,
    Contender,
    map_tensors,
    numpy_inputs,
    on,
    operator_case,
    random,
)


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    n, many = (16, 64) if device_type == "cpu" else (256, 256)
    # Images at the input, features inside the U-Net, one large image, one small one where only the
    # overhead of a call counts.
    shapes = [(n, 3, 256, 256), (many, 64, 64, 64), (1, 3, 2048, 2048), (1, 1, 64, 64)]
    wavelets = [
        ("db4", "symmetric", 8),
        ("haar", "periodization", 2),
        ("sym8", "symmetric", 16),
        ("bior4.4", "symmetric", 10),
    ]
    table = [(shape, *wavelet) for wavelet in wavelets for shape in shapes]
    for shape, wavelet, mode, length in table[: 1 if quick else None]:
        numel = math.prod(shape)
        # Both axes: one multiplication and addition a filter tap and sample, for each half of the
        # coefficients.
        costs = {"bytes": 8 * numel, "flops": 4 * numel * length, "rate": None, "batch": shape[0]}
        name = f"{wavelet}, {mode}, {'×'.join(map(str, shape))}"
        yield operator_case(
            "dwt2d",
            name,
            lambda device, shape=shape: on(device, random(*shape)),
            lambda functions, x, w=wavelet, m=mode: functions.dwt2d(x, w, m),
            peers=_forward_peers(wavelet, mode),
            **costs,
        )
        yield operator_case(
            "idwt2d",
            name,
            lambda device, s=shape, w=wavelet, m=mode: on(device, *_bands(s, w, m)),
            lambda functions, *bands, w=wavelet, m=mode: functions.idwt2d(bands, w, m),
            peers=_inverse_peers(wavelet, mode),
            **costs,
        )


def _bands(shape, wavelet, mode):
    from diffad_fast import reference

    return reference.dwt2d(random(*shape), wavelet, mode)


def _forward_peers(wavelet: str, mode: str) -> dict[str, Contender]:
    result = {}
    if peers.get("pywt"):

        def by_pywavelets(x):
            import pywt

            low, high = pywt.dwt2(x, wavelet, mode=mode)
            return tuple(torch.from_numpy(band) for band in (low, *high))

        result["PyWavelets"] = numpy_inputs(by_pywavelets, ONE_THREAD)
    if ptwt := peers.get("ptwt"):
        # ptwt has no periodization; at even sizes Haar filters never reach over a border.
        border = "zero" if mode == "periodization" else mode

        def by_ptwt(x):
            low, high = ptwt.wavedec2(x, wavelet, mode=border, level=1)
            return (low, *high)

        result["ptwt"] = Contender(by_ptwt)
    if pytorch_wavelets := peers.get("pytorch_wavelets"):

        def by_pytorch_wavelets(x, transform):
            low, (high,) = transform(x)
            return (low, *high.unbind(2))

        result["pytorch_wavelets"] = Contender(
            by_pytorch_wavelets,
            lambda inputs: (
                *inputs,
                _module(
                    pytorch_wavelets.DWTForward, inputs[0].device, wave=wavelet, mode=mode, J=1
                ),
            ),
            # Its padding of other modes copies indices from the host.
            graph=mode == "periodization",
        )
    return result


def _inverse_peers(wavelet: str, mode: str) -> dict[str, Contender]:
    result = {}
    if peers.get("pywt"):

        def by_pywavelets(*bands):
            import pywt

            return torch.from_numpy(pywt.idwt2((bands[0], bands[1:]), wavelet, mode=mode))

        result["PyWavelets"] = numpy_inputs(by_pywavelets, ONE_THREAD)
    if ptwt := peers.get("ptwt"):
        result["ptwt"] = Contender(lambda low, *high: ptwt.waverec2((low, tuple(high)), wavelet))
    if pytorch_wavelets := peers.get("pytorch_wavelets"):

        def prepare(inputs):
            low, *high = map_tensors(torch.clone, inputs)
            module = _module(pytorch_wavelets.DWTInverse, low.device, wave=wavelet, mode=mode)
            return low, torch.stack(high, dim=2), module

        result["pytorch_wavelets"] = Contender(
            lambda low, high, transform: transform((low, [high])), prepare,
            graph=mode == "periodization",
        )
    return result


def _module(kind, device, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its constructor uses a deprecated tensor conversion
        return kind(**options).to(device)
