from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..case import ONE_THREAD, Case, Contender, operator_case


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    n = 8 if device_type == "cpu" else 256
    for shape in ((n, 16, 32, 32), (1, 64, 32, 32))[: 1 if quick else None]:
        numel = math.prod(shape)

        def call(functions, device, shape=shape):
            return functions.philox_normal(shape, 1234, device=device)

        def by_numpy(device, shape=shape):
            import numpy as np

            generator = np.random.Generator(np.random.Philox(1234))
            return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

        yield operator_case(
            "philox_normal",
            "×".join(map(str, shape)),
            lambda device: (device,),
            call,
            formats=False,
            compiled=device_type == "cpu",  # nor can the CPU's numbers be captured
            graph=False,
            # The float64 reference draws on the CPU in any case.
            tolerance=1e-6,
            peers={
                "torch.randn": Contender(
                    lambda device, shape=shape: torch.randn(shape, device=device),
                    check=_normal,
                    note="another generator, whose numbers depend on what was drawn before",
                ),
                "NumPy Philox": Contender(
                    by_numpy,
                    cpu_only=True,
                    check=_normal,
                    note=f"another method (ziggurat), {ONE_THREAD}",
                ),
            },
            bytes=4 * numel,
            # Ten rounds of 2 products and 8 bit operations for four values, and Box-Muller.
            flops=40 * numel,
            rate=None,
            batch=shape[0],
        )


def _normal(x: torch.Tensor) -> str | None:
    """Mean and variance within six standard errors."""
    x, n = x.double(), x.numel()
    if abs(float(x.mean())) > 6 / n**0.5 or abs(float(x.var()) - 1) > 6 * (2 / n) ** 0.5:
        return f"mean {float(x.mean()):.4f} and variance {float(x.var()):.4f}, not 0 and 1"
    return None
