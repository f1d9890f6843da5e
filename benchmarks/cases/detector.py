"""A whole detector's score, decoded image in, map and score out on the host: how its time grows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, reduce

import torch

from diffad_fast import native, use_backend
from diffad_fast.diffusion.graphs import Graphed
from diffad_fast.ops.dispatch import OPERATORS

from ..case import OURS, REFERENCE, Case, Contender, random
from ..machine import tf32
from .attention import haar_by_product

SIDE, STEPS = 128, 3
CLIP_SECONDS, RATE = 4, 16000
COLUMNS = 32


def cases(device_type: str, quick: bool) -> Iterator[Case]:
    # Along each axis the two others stay at (1, 128, 3): a "unet-tiny".
    batches = (1, 2, 4, 8, 16, 32) if device_type == "cpu" else (1, 4, 16, 64, 256)
    sides = (64, 128, 192, 256) if device_type == "cpu" else (64, 128, 256, 512)
    steps = (1, 3, 5, 10, 20)
    dots = device_type == "cuda" or native.cpu_isa() in native.BF16_ISAS
    for kind, counts in (("image", (1, 16)), ("audio", (1, 64)), ("vector", (1, 256))):
        for dtype in ("float32", "bfloat16") if dots else ("float32",):
            for n in counts[1:] if quick else counts:
                yield preset_case(device_type, kind, n, dtype)
    if quick:
        batches, sides, steps = batches[::3], sides[:2], steps[:3:2]
    points = {(n, SIDE, STEPS): {"batch": n} for n in batches}
    for side in sides:
        points.setdefault((1, side, STEPS), {})["side"] = side
    for count in steps:
        points.setdefault((1, SIDE, count), {})["steps"] = count
    for (n, side, count), sweep in points.items():
        yield score_case(device_type, "unet-tiny", n, side, count, sweep)
    if device_type == "cpu":
        narrow = "avx512bf16" in native.cpu_features()
        for n in () if quick else (1, 16):
            yield score_case(
                device_type, "unet-small", n, 256, 5, {}, compiled=True, bfloat16=narrow
            )
        return
    for n in (1,) if quick else (1, 64):
        yield score_case(device_type, "unet-small", n, 256, 10, {}, compiled=True, bfloat16=True)
    yield score_case(
        device_type, "unet-small", 1, 256, 1, {}, mode="one_step", compiled=True, bfloat16=True
    )


def score_case(
    device_type: str,
    denoiser: str,
    n: int,
    side: int,
    steps: int,
    sweep: dict[str, int],
    *,
    mode: str = "reconstruct",
    compiled: bool = False,
    bfloat16: bool = False,
) -> Case:
    """Ours as it is used; the same weights as a researcher would run them: eager, on the reference
    operators, in contiguous tensors."""
    device = torch.device(device_type)
    detector = _detector(device, denoiser, side, steps, mode)
    images = (random(n, 1, side, side) / 8 + 0.5).clamp(0, 1)
    last = {"memory_format": "channels_last"}
    narrow = {**last, "dtype": "bfloat16", "tolerance": 5e-2}
    contenders = {
        OURS: Contender(detector.score_batch, **last),
        REFERENCE: Contender(reference(detector, contiguous)),
        f"{REFERENCE}, channels_last": Contender(reference(detector), **last),
        f"{REFERENCE}, channels_last, SDPA": Contender(
            reference(detector, attention=haar_by_product), **last
        ),
    }
    if compiled:
        contenders[f"{REFERENCE}, channels_last, denoiser by torch.compile"] = Contender(
            reference(detector, compiled_denoiser), **last
        )
    if bfloat16:
        contenders[f"{OURS}, bfloat16"] = Contender(ours(detector, in_bfloat16), **narrow)
        contenders[f"{REFERENCE}, bfloat16, channels_last"] = Contender(
            reference(detector, in_bfloat16), **narrow
        )
        if device_type == "cuda":
            contenders[f"{REFERENCE}, TF32, channels_last"] = Contender(
                tf32(torch.backends.cudnn)(reference(detector)), **{**narrow, "dtype": "float32"}
            )
            if compiled:
                contenders[f"{REFERENCE}, bfloat16, channels_last, denoiser by torch.compile"] = (
                    Contender(reference(detector, in_bfloat16, compiled_denoiser), **narrow)
                )
    return Case(
        "detector.score",
        f"{denoiser}, batch {n}, {side}×{side}, "
        + (f"{steps} steps" if mode == "reconstruct" else mode),
        lambda device: (images,),  # on the host, where decoded images are
        exact(detector),
        contenders,
        tolerance=2e-3,  # float32 through a whole reverse process
        batch=n,
        unit="image",
        host=True,
        sweep=sweep,
    )


def ours(detector, *changes: Callable) -> Callable:
    """The score by a copy of ``detector`` with these changes, one after the other."""
    return lambda x: reduce(lambda one, change: change(one), changes, detector).score_batch(x)


def reference(detector, *changes: Callable, attention: Callable | None = None) -> Callable:
    """The same eagerly and on the reference operators, or on ``attention`` in place of theirs."""
    return as_written(attention)(ours(detector, *changes))


def exact(detector) -> Callable:
    """The same in float64, from a case's inputs."""
    score = reference(detector, in_float64)
    return lambda inputs: score(inputs[0].double())


@cache
def _preset_detector(device: torch.device, kind: str):
    """The preset `balanced` of a kind, hardly trained."""
    from diffad_fast import Detector

    options = {"image_size": 256, "channels": 1} if kind == "image" else {}
    detector = Detector(
        kind=kind, train_steps=20, cross_fit=0, inference_dtype="float32", device=device, **options
    )
    normals = _samples(kind, {"image": 40, "audio": 24, "vector": 400}[kind], seed=1)
    return detector.fit([(w.numpy(), RATE) for w in normals] if kind == "audio" else normals)


def _samples(kind: str, n: int, seed: int) -> torch.Tensor:
    """Noise: images, waves or rows."""
    if kind == "image":
        return (0.5 + 0.1 * random(n, 1, 256, 256, seed=seed)).clamp(0, 1)
    if kind == "audio":
        return 0.1 * random(n, CLIP_SECONDS * RATE, seed=seed)
    return random(n, COLUMNS, seed=seed)


def preset_case(device_type: str, kind: str, n: int, dtype: str = "float32") -> Case:
    """The detector that a user gets who asks for no other: the token MLP on a kind's tokens. dtype:
    of its matrix products; ``fit`` takes bfloat16 where there are units for it."""
    changes = (in_bfloat16,) if dtype == "bfloat16" else ()

    def fitted(use: Callable, *changes: Callable) -> Callable:
        """``use(detector, *changes)`` at its first call: a case that is not run fits nothing."""
        made = cache(lambda: use(_preset_detector(torch.device(device_type), kind), *changes))
        return lambda x: made()(x)

    def inputs(device: torch.device) -> tuple:
        # With something that no normal has: of a score near 0 no error is a small share.
        x = _samples(kind, n, seed=100)
        if kind == "image":
            x[:, :, 96:128, 96:128] = 1.0
        elif kind == "audio":
            x += 0.05 * torch.sin(2 * math.pi * 440 / RATE * torch.arange(x.shape[1]))
        else:
            x += 1.0
        return (x,)

    contenders = {
        OURS: Contender(fitted(ours, *changes), dtype=dtype),
        REFERENCE: Contender(fitted(reference, *changes), dtype=dtype),
    }
    if changes:
        contenders[f"{REFERENCE}, float32"] = Contender(fitted(reference))
    what, unit = {
        "image": ("256×256", "image"),
        "audio": (f"clips of {CLIP_SECONDS} s", "clip"),
        "vector": (f"{COLUMNS} columns", "row"),
    }[kind]
    return Case(
        f"detector.score {kind}",
        f"batch {n}, {what}, one_step" + (f", {dtype}" if changes else ""),
        inputs,
        fitted(exact),
        contenders,
        tolerance=5e-2 if changes else 2e-4,
        batch=n,
        unit=unit,
        host=True,
    )


@contextmanager
def as_written(attention: Callable | None = None):
    """Eagerly and on the reference operators, or on ``attention`` in place of theirs.

    Entered in every call of a contender, within its time: nothing here may take longer than it
    has to, as imports and what patches in tests do.
    """
    served = OPERATORS["wavelet_attention"].implementations
    usual = Graphed._graph, served["reference"]
    Graphed._graph = _no_graph
    served["reference"] = attention or usual[1]
    try:
        with use_backend("reference"):
            yield
    finally:
        Graphed._graph, served["reference"] = usual


def _no_graph(self, x):
    return None


def _detector(device: torch.device, denoiser: str, side: int, steps: int, mode: str):
    """Not fitted: the time of a score does not depend on the weights' values."""
    from diffad_fast import Detector
    from diffad_fast.scoring import MapStatistics

    detector = Detector(
        image_size=side, channels=1, denoiser=denoiser, reverse_steps=steps, mode=mode,
        device=device,
    )  # fmt: skip
    zero = torch.zeros((), device=device)
    model = detector.model
    model.use([MapStatistics(zero, zero + 1) for _ in model.map_names])
    return fill_zeros(detector)


def fill_zeros(detector):
    """Random numbers in the place of parameters that start at zero, behind which a wrong result
    could hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in detector.model.denoiser.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return detector


_variants: dict[tuple[int, str], tuple] = {}


def _variant(detector, kind: str, make):
    """``make`` applied once to a copy; the detector is kept too, so that its id stays its own."""
    key = (id(detector), kind)
    if key not in _variants:
        copied = copy.deepcopy(detector)
        # The copy of one that was not fitted is a new one.
        copied.model.load_state_dict(detector.model.state_dict())
        copied.model.use(detector.model.statistics)
        _variants[key] = (detector, make(copied))
    return _variants[key][1]


def contiguous(detector):
    def make(copied):
        copied.model.denoiser.to(memory_format=torch.contiguous_format)
        encode = copied.model.representation.encode
        copied.model.representation.encode = lambda images: encode(images).contiguous()
        return copied

    return _variant(detector, "contiguous", make)


def compiled_denoiser(detector):
    def make(copied):
        denoiser = copied.model.scoring_denoiser
        graphs = next(denoiser.parameters()).is_cuda
        options = {"dynamic": False, "mode": "reduce-overhead" if graphs else None}
        denoiser.compile(**options)
        # What a reverse process calls.
        denoiser.denoise = torch.compile(denoiser.denoise, **options)
        features = torch.compile(denoiser.features, **options)
        # A replay overwrites what the one before it gave, and both images' features are needed.
        denoiser.features = lambda *x: [f.clone() if graphs else f for f in features(*x)]
        return copied

    return _variant(detector, "compiled", make)


def in_bfloat16(detector):
    def make(copied):
        model = copied.model
        model.config = model.config.replace(inference_dtype="bfloat16")
        model.use(model.statistics)
        return copied

    return _variant(detector, "bfloat16", make)


def in_float64(detector):
    def make(copied):
        copied.model.double()
        copied.model.use(copied.model.statistics)
        return copied

    return _variant(detector, "float64", make)
