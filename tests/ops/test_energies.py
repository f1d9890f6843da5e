"""band_energies against PyWavelets' stationary transform, and the native one against float64."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from torch.autograd import gradcheck

from diffad_fast import native, ops, reference, use_backend


def random(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def by_pywavelets(image: np.ndarray, cell: int, levels: int) -> np.ndarray:
    """(H,W) -> (6 levels + 1,H/cell,W/cell), by the stationary transform of the mirrored image.

    That is periodic: enough is mirrored around the image that the period is not seen. With
    ``norm`` its coefficients have our size; that at k stands over the 2^l pixels from k on, ours
    over those around it.
    """
    multiple = 2**levels
    # More than the bands reach, up to a size that PyWavelets takes.
    before = 2**levels
    after = [-(side + 2 * before) % multiple + before for side in image.shape]
    large = np.pad(image, [(before, a) for a in after], mode="reflect")
    found = pywt.swt2(large, "haar", levels, trim_approx=True, norm=True)
    bands = [band for level in reversed(found[1:]) for band in level]
    h, w = image.shape
    squares = []
    for number, band in enumerate(bands):
        start = before - 2 ** (number // 3)
        squares.append(band[start : start + h, start : start + w] ** 2)
    cells = [
        s.reshape(h // cell, cell, w // cell, cell).transpose(0, 2, 1, 3).reshape(
            h // cell, w // cell, -1
        )
        for s in [*squares, image]
    ]  # fmt: skip
    means = [c.mean(axis=2) for c in cells]
    return np.stack([*means[:-1], *(c.max(axis=2) for c in cells[:-1]), means[-1]])


@pytest.mark.parametrize(
    "size, cell, levels",
    [((32, 32), 1, 1), ((24, 36), 3, 2), ((48, 20), 4, 3), ((40, 72), 8, 4), ((35, 49), 7, 5)],
)
def test_values_are_pywavelets(backend, size, cell, levels):
    x = random(2, 3, *size)
    found = ops.band_energies(x, cell, levels)
    assert found.shape == (2, (6 * levels + 1) * 3, size[0] // cell, size[1] // cell)
    for n in range(2):
        for c in range(3):
            expected = by_pywavelets(x[n, c].numpy(), cell, levels)
            np.testing.assert_allclose(found[n, c::3].numpy(), expected, rtol=1e-11, atol=1e-13)


def test_a_step_has_energy_in_one_band_alone(backend):
    """Columns of 0 and then 1: differences along x, near the step alone."""
    x = torch.zeros(1, 1, 32, 64)
    x[..., 32:] = 1
    found = ops.band_energies(x, 8, 3)[0].unflatten(0, (-1, 1))[:, 0]
    energies, peaks, mean = found[:9], found[9:18], found[18]
    assert mean.tolist() == [[0.0] * 4 + [1.0] * 4] * 4
    for level in (1, 2, 3):
        along_y, along_x, both = energies[3 * level - 3 : 3 * level]
        assert not along_y.any() and not both.any()
        # 2^l coefficients see the step, their differences rising to 1 of 2^l columns and falling.
        rise = np.minimum(np.arange(2**level + 1), 2**level - np.arange(2**level + 1))
        squares = (rise[1:-1] * 2**level / 4**level) ** 2
        assert along_x.sum(dim=1).numpy() == pytest.approx(np.full(4, squares.sum() / 8), rel=1e-6)
        seen = (along_x > 0).any(dim=0).nonzero().flatten().tolist()
        assert seen == ([4] if level == 1 else [3, 4])
        assert peaks[3 * level - 2].max() == squares.max()


SIZES = [
    (2, 1, 256, 256, 8, 4),  # two blocks a plane
    (1, 3, 64, 96, 2, 2),
    (1, 1, 224, 448, 7, 4),  # an odd cell
    (1, 2, 96, 84, 12, 6),  # even, then odd
    (3, 1, 33, 35, 1, 5),  # no whole vectors
    (1, 1, 300, 10, 10, 1),  # fewer columns than lanes
    (1, 1, 512, 512, 512, 3),  # a single cell
    (1, 1, 2, 2, 1, 1),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_native_agrees_with_the_reference_in_float64(cpu_isa, size, dtype):
    *shape, cell, levels = size
    x = random(*shape, dtype=dtype)
    with use_backend("cpu"):
        found = ops.band_energies(x, cell, levels)
    assert found.dtype == torch.promote_types(dtype, torch.float32) and found.is_contiguous()
    exact = reference.band_energies(x.double(), cell, levels)
    close = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found.double(), exact, rtol=close, atol=close * exact.max().item())


@pytest.mark.native
def test_instruction_sets_give_the_same_bits(request):
    x = random(1, 2, 96, 84, dtype=torch.float32)
    before = native.cpu_isa()
    found = []
    try:
        for isa in native.CPU_ISAS[: native.CPU_ISAS.index(before) + 1]:
            native.select_cpu_isa(isa)
            found.append(ops.band_energies(x, 12, 5))
    finally:
        native.select_cpu_isa(before)
    assert all(torch.equal(f, found[0]) for f in found)


def test_any_strides(backend):
    base = random(2, 4, 48, 48, dtype=torch.float32)
    views = {
        "transposed": base.transpose(2, 3),
        "channels_last": base.to(memory_format=torch.channels_last),
        "every second column": base[..., ::2],
        "rows backwards in memory": base[:, :, 8:40],
        "expanded": base[:1, :1, :1, :].expand(2, 3, 16, 48),
        "batch and channels swapped": base.transpose(0, 1),
    }
    for name, x in views.items():
        found = ops.band_energies(x, 8, 3)
        expected = ops.band_energies(x.contiguous(), 8, 3)
        torch.testing.assert_close(found, expected, msg=name)


def test_a_sample_alone_has_its_bits(backend):
    x = random(4, 3, 64, 64, dtype=torch.float32)
    together = ops.band_energies(x, 4, 3)
    assert torch.equal(ops.band_energies(x[2:3], 4, 3), together[2:3])


def test_not_a_number_stays_in_its_cells(backend):
    x = random(1, 1, 32, 32, dtype=torch.float32)
    x[0, 0, 9, 9] = float("nan")
    found = ops.band_energies(x, 8, 1)[0].isnan()
    # Of the coefficients at 9 and 10; the cell from 8 to 15 has both.
    assert found[:, 1, 1].all() and int(found.sum()) == 7


def test_empty_tensors(backend):
    assert ops.band_energies(torch.empty(0, 3, 8, 8), 2, 2).shape == (0, 39, 4, 4)


@pytest.mark.native
def test_outputs_are_fully_written(written):
    for *shape, cell, levels in SIZES:
        assert written(ops.band_energies(random(*shape, dtype=torch.float32), cell, levels))


@pytest.mark.native
def test_threads_do_not_change_a_bit(by_threads):
    x = random(1, 1, 512, 256, dtype=torch.float32)
    by_threads(lambda: torch.ops.diffad_fast.band_energies(x, 16, 5))


def test_gradients(backend):
    x = random(1, 2, 8, 12).requires_grad_()
    assert gradcheck(lambda x: ops.band_energies(x, 4, 2), x, fast_mode=True)


@pytest.mark.native
def test_opcheck():
    # Gradients come from the reference, outside the operator: nothing to check there.
    for x in (random(1, 2, 16, 24, dtype=torch.float32), random(2, 1, 8, 8, dtype=torch.bfloat16)):
        torch.library.opcheck(torch.ops.diffad_fast.band_energies.default, (x, 4, 2))


def test_compiles_as_one_graph(backend):
    call = lambda x: ops.band_energies(x + 1, 4, 2)  # noqa: E731
    x = random(1, 1, 16, 24, dtype=torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: ops.band_energies(torch.zeros(1, 1, 12, 8), 8, 1), ValueError, "12 x 8.*cell, 8"),
        (lambda: ops.band_energies(torch.zeros(1, 1, 8, 12), 8, 1), ValueError, "8 x 12.*cell, 8"),
        (lambda: ops.band_energies(torch.zeros(1, 1, 8, 4), 4, 3), ValueError, "larger than 4"),
        (lambda: ops.band_energies(torch.zeros(1, 1, 8, 8), 0, 1), ValueError, "cell.* 0"),
        (lambda: ops.band_energies(torch.zeros(1, 1, 8, 8), 4, 0), ValueError, r"levels.*\[1, 12"),
        (lambda: ops.band_energies(torch.zeros(1, 1, 8, 8), 4, 13), ValueError, "levels.*13"),
        (lambda: ops.band_energies(torch.zeros(1, 1, 8, 8), 4.0, 1), TypeError, "cell.*integer"),
        (lambda: ops.band_energies(torch.zeros(1, 8, 8), 4, 1), ValueError, r"\(1, 8, 8\)"),
        (lambda: ops.band_energies(torch.zeros(1, 1, 8, 8).int(), 4, 1), TypeError, "int32"),
    ],
)
def test_bad_arguments(backend, call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.native
@pytest.mark.parametrize(
    "shape, cell, levels",
    [((1, 6, 8), 2, 1), ((1, 1, 6, 8), 4, 1), ((1, 1, 8, 4), 4, 3), ((1, 1, 8, 8), 0, 1)],
)
def test_the_bare_operator_guards_its_memory(shape, cell, levels):
    with pytest.raises(RuntimeError, match="band_energies"):
        torch.ops.diffad_fast.band_energies(torch.zeros(shape), cell, levels)
