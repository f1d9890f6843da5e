"""The Triton wavelet transforms against the reference in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import diffad_fast as daf
from diffad_fast import ops, reference
from diffad_fast.errors import BackendError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("zero", "constant", "symmetric", "periodic", "periodization", "reflect", "antisymmetric")
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small_shares(monkeypatch):
    """A program takes 16 rows or more and as many steps where an image has fewer. In the
    interpreter it takes 4, as for haar everywhere: small images have several programs."""
    if DEVICE == "cpu":
        from diffad_fast.kernels import dwt2d

        monkeypatch.setattr(dwt2d, "_smallest_share", lambda length: 4)


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def close(got, expected, tolerance=1e-12):
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance)


def forward(x, wavelet, mode, tolerance=1e-12):
    """dwt2d and its gradient by both; returns the coefficients."""
    results = []
    for backend, leaf in (("triton", x), ("reference", x.double())):
        leaf = leaf.detach().requires_grad_()
        with daf.use_backend(backend):
            bands = ops.dwt2d(leaf, wavelet, mode)
        upstream = [random(*b.shape, seed=9 + i, dtype=b.dtype) for i, b in enumerate(bands)]
        results.append((*bands, *torch.autograd.grad(bands, leaf, upstream)))
    for a, b in zip(*results, strict=True):
        close(a, b, tolerance)
    assert all(y.dtype == x.dtype for y in results[0])
    return [y.detach() for y in results[0][:4]]


def inverse(bands, wavelet, mode, output_size=None, tolerance=1e-12):
    results = []
    for backend, wide in (("triton", False), ("reference", True)):
        leaves = [b if b is None else (b.double() if wide else b).detach().requires_grad_()
                  for b in bands]  # fmt: skip
        with daf.use_backend(backend):
            x = ops.idwt2d(leaves, wavelet, mode, output_size)
        upstream = random(*x.shape, seed=5, dtype=x.dtype)
        given = [b for b in leaves if b is not None]
        results.append((x, *torch.autograd.grad(x, given, upstream)))
    for a, b in zip(*results, strict=True):
        close(a, b, tolerance)
    return results[0][0].detach()


@pytest.mark.parametrize(
    "wavelet, mode, shape",
    [
        # An odd side far shorter than the filter, which wraps more than once, and an even one.
        *(("db3", mode, (2, 2, 3, 8)) for mode in MODES),
        ("db2", "periodization", (1, 2, 4, 6)),  # nothing to fold
        *(pytest.param("db4", mode, (1, 1, 3, 2), marks=slow) for mode in MODES),
        *(pytest.param("db2", mode, (1, 2, 4, 7), marks=slow) for mode in MODES),
        *(pytest.param("haar", mode, (2, 1, 5, 7), marks=slow) for mode in MODES),
        *(pytest.param("haar", mode, (1, 2, 4, 6), marks=slow) for mode in MODES),
    ],
)
def test_modes(wavelet, mode, shape):
    bands = forward(random(*shape), wavelet, mode)
    inverse(bands, wavelet, mode, shape[2:])


@pytest.mark.parametrize(
    "share, wavelet, mode, shape",
    [
        (2, "db4", "symmetric", (1, 1, 5, 4)),  # fewer than a program reads before its own
        (2, "db2", "periodization", (1, 1, 5, 4)),
        (6, "db2", "symmetric", (1, 2, 13, 5)),
        *(
            pytest.param(share, "db4", mode, (1, 2 if share == 6 else 1, 13, 7), marks=slow)
            for share in (2, 6, 14)
            for mode in ("symmetric", "periodization")
        ),
    ],
)
def test_shares_of_rows(share, wavelet, mode, shape, monkeypatch):
    """A GPU has as many as it runs programs at once."""
    from diffad_fast.kernels import dwt2d

    monkeypatch.setattr(dwt2d, "_smallest_share", lambda length: share)
    monkeypatch.setattr(dwt2d, "shared_rows", lambda *_: share)
    bands = forward(random(*shape), wavelet, mode)
    inverse(bands, wavelet, mode, shape[2:])


def test_shares_as_they_are(monkeypatch):
    monkeypatch.undo()
    forward(random(1, 1, 31, 3), "db2", "symmetric")  # 17 rows of coefficients, 36 to fold


def test_programs_that_run_at_once():
    from diffad_fast.kernels.dwt2d import shared_rows

    assert shared_rows(192, 131, 3, 16, 132) == 34  # 768 of 792 at once, each about a fourth
    assert shared_rows(192, 131, 3, 16, 1 << 20) == 16  # all at once, however many
    assert shared_rows(792, 131, 3, 16, 132) == 132  # not a row twice: one for each column
    assert shared_rows(192, 128, 0, 4, 132) == 4  # no row twice anyway
    assert shared_rows(40, 9, 3, 16, 132) == 16  # more than there are


@pytest.mark.parametrize(
    "wavelet, mode, size",
    [
        ("bior2.4", "symmetric", (4, 3)),
        ("sym8", "periodization", (4, 6)),
        *(
            pytest.param(wavelet, mode, (18, 17), marks=slow)
            for wavelet in ("bior2.6", "sym8")
            for mode in ("symmetric", "periodization")
        ),
    ],
)
def test_lengths(wavelet, mode, size):
    x = random(1, 1, *size)
    got = inverse(forward(x, wavelet, mode), wavelet, mode, size)
    close(got, x, 1e-9)


# The last one's columns fill one program and a part of another, in the middle of a channel.
SHAPES = [(1, 1, 1, 1), (3, 2, 1, 7), (1, 1, 11, 3), (1, 2, 2, 127)]
LARGER = [pytest.param(s, marks=slow) for s in ((1, 1, 37, 3), (1, 1, 2, 263))]


@pytest.mark.parametrize("shape", SHAPES + LARGER)
def test_odd_shapes(shape):
    inverse(forward(random(*shape), "db2", "symmetric"), "db2", "symmetric")
    inverse(forward(random(*shape), "haar", "periodization"), "haar", "periodization")


# Where a value lies does not depend on its dtype: each dtype has some of the layouts.
@pytest.mark.parametrize(
    "dtype, tolerance, layouts",
    [
        (torch.float32, 3e-6, (0, 1, 2, 3)),
        (torch.float16, 8e-3, (0, 1)),
        (torch.bfloat16, 6e-2, (0, 2)),
        pytest.param(torch.float16, 8e-3, (2, 3), marks=slow),
        pytest.param(torch.bfloat16, 6e-2, (1, 3), marks=slow),
    ],
)
def test_dtypes_and_layouts(dtype, tolerance, layouts):
    x = random(1, 3, 5, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    views = (x, x[:, 1:], x[:, :, ::2, 1::3], x[:, :1, :1].expand(1, 2, 3, 8))
    for view in (views[i] for i in layouts):
        bands = forward(view, "db2", "reflect", tolerance)
        assert bands[0].is_contiguous(memory_format=torch.channels_last) or view is not x
        inverse(bands, "db2", "reflect", tolerance=tolerance)
    mixed = [bands[0].contiguous(), *bands[1:]]
    inverse(mixed, "db2", "reflect", tolerance=tolerance)


def test_missing_bands_and_crops():
    bands = [random(1, 2, 5, 5, seed=seed) for seed in range(4)]
    inverse([bands[0], None, None, bands[3]], "db2", "zero", (5, 8))  # of 8 x 8
    inverse([None, *bands[1:]], "db2", "periodization", (6, 9))  # of 10 x 10


def test_levels():
    x = random(1, 1, 12, 13)
    with daf.use_backend("triton"):
        bands = ops.wavedec2(x, "db2", 2, "symmetric")
        close(ops.waverec2(bands, "db2", "symmetric")[..., :13], x)
    expected = reference.wavedec2(x, "db2", 2, "symmetric")
    close(bands[0], expected[0])
    for a, b in zip(bands[1:], expected[1:], strict=True):
        for got, band in zip(a, b, strict=True):
            close(got, band)


def test_stride_zero_gradients():
    """Of one band, that of another is dense."""
    x = random(1, 1, 6, 5).requires_grad_()
    grads = []
    for backend in ("triton", "reference"):
        with daf.use_backend(backend):
            a, _, _, d = ops.dwt2d(x, "db2", "symmetric")
        loss = a.sum() + (d * random(*d.shape)).sum()
        grads.append(torch.autograd.grad(loss, x)[0])
    close(*grads)


def test_autocast_changes_nothing():
    """What lies beyond the borders is added by a product."""
    x = random(1, 1, 6, 5, dtype=torch.float32).requires_grad_()
    grads = []
    for mixed in (False, True):
        with daf.use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
            bands = ops.dwt2d(x, "db2", "symmetric")
            upstream = [random(*b.shape, seed=i, dtype=b.dtype) for i, b in enumerate(bands)]
            grads += torch.autograd.grad(bands, x, upstream)
    assert torch.equal(*grads)


def test_empty_batch():
    with daf.use_backend("triton"):
        bands = ops.dwt2d(random(0, 2, 6, 6), "db2", "symmetric")
        assert bands[0].shape == (0, 2, 4, 4)
        assert ops.idwt2d(bands, "db2", "symmetric").shape == (0, 2, 6, 6)


@pytest.mark.parametrize("wavelet, mode, message", [("db9", "zero", "up to 16, not 18"),
    ("db2", "smooth", "'smooth'"), ("db2", "antireflect", "'antireflect'")])  # fmt: skip
def test_refused_calls_raise_by_name(wavelet, mode, message):
    x = random(1, 1, 8, 8)
    bands = reference.dwt2d(x, wavelet, mode)
    with daf.use_backend("triton"):
        with pytest.raises(BackendError, match=message):
            ops.dwt2d(x, wavelet, mode)
        with pytest.raises(BackendError, match=message):
            ops.idwt2d(bands, wavelet, mode)


def test_opcheck():
    x = random(1, 1, 3, 4).requires_grad_()
    filters = random(2, 4)
    namespace = torch.ops.diffad_fast_triton
    torch.library.opcheck(namespace.dwt2d, (x, filters, 2, 3, 3))
    bands = [random(1, 1, 3, 3).requires_grad_() for _ in range(4)]
    torch.library.opcheck(namespace.idwt2d, (*bands, filters, 2, 3, 4))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("wavelet", ["haar", "db4", "sym8"])
def test_on_a_gpu(wavelet):
    x = random(4, 3, 255, 130, dtype=torch.float32)
    first = forward(x, wavelet, "symmetric", 1e-5)

    def function(x):
        return ops.dwt2d(x, wavelet, "symmetric")

    with daf.use_backend("triton"):
        for again in (function(x), torch.compile(function, fullgraph=True)(x)):
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = function(x)
        captured[0].zero_()
        graph.replay()
        assert torch.equal(captured[0], first[0])
