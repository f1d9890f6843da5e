"""log_mel against NumPy's transform in float64, and what a frame's result depends on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from diffad_fast import ops, reference, use_backend
from diffad_fast.errors import BackendError
from diffad_fast.representations.logmel import mel_filters


def random(*shape: int, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def window_and_filters(n_fft: int, bands: int):
    """A Hann window; filters of all lengths and places: the whole spectrum, its ends, none."""
    bins = n_fft // 2 + 1
    filters = random(bands, bins, seed=1).abs()
    for band in range(1, bands):
        first = band * 7919 % bins
        filters[band, :first] = 0
        filters[band, first + 1 + band * 104729 % (bins - first) :] = 0
    if bands > 3:
        filters[2], filters[3] = 0, 0
        filters[3, -1] = 1
    return torch.hann_window(n_fft, dtype=torch.float64), filters


def by_numpy(waves, window, filters, hop) -> np.ndarray:
    waves, window, filters = (x.double().numpy() for x in (waves, window, filters))
    frames = np.lib.stride_tricks.sliding_window_view(waves, len(window), axis=1)[:, ::hop]
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    return 10 * np.log10(np.maximum(power @ filters.T, 1e-10)).transpose(0, 2, 1)


SIZES = [
    (3, 16, 1, 5, 40),  # clips, n_fft, hop, bands, samples
    (2, 32, 7, 3, 100),
    (1, 64, 64, 4, 64),  # a single frame
    (5, 128, 50, 6, 300),  # frames of several clips in a vector
    (2, 256, 300, 9, 2000),  # samples between frames that nobody hears
    (1, 512, 128, 16, 5000),
    (3, 1024, 256, 64, 9000),
    (1, 2048, 512, 17, 30_000),
    (1, 4096, 1000, 4, 10_000),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_native_values_are_numpys(cpu_isa, size, dtype):
    clips, n_fft, hop, bands, samples = size
    waves = random(clips, samples, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    window, filters = window_and_filters(n_fft, bands)
    with use_backend("cpu"):
        found = ops.log_mel(waves, window, filters, hop)
    assert found.dtype == wide and found.is_contiguous()
    expected = by_numpy(waves, window, filters, hop)
    # Of float32 the last place of the logarithm alone.
    close = 1e-10 if wide == torch.float64 else 2e-5
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=close)


@pytest.mark.parametrize("n_fft", [16, 30, 600, 1024, 1102])
def test_reference_values_are_numpys(n_fft):
    waves, (window, filters) = random(2, 5000), window_and_filters(n_fft, 5)
    found = reference.log_mel(waves, window, filters, 100)
    expected = by_numpy(waves, window, filters, 100)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-10)


def test_a_tone_is_in_its_bin(backend):
    """100 periods in 1024 samples: without a window a quarter of n_fft^2 in bin 100 alone."""
    t = torch.arange(2048, dtype=torch.float64) / 1024
    wave, bins = torch.cos(2 * torch.pi * 100 * t)[None].float(), torch.eye(513).double()
    found = ops.log_mel(wave, torch.ones_like(t[:1024]), bins, 512)[0]
    assert found.argmax(dim=0).tolist() == [100, 100, 100]
    assert found[100].tolist() == pytest.approx([10 * np.log10(1024**2 / 4)] * 3, abs=1e-4)
    assert found[:100].max() < -50 and found[101:].max() < -50
    # On both sides of the floor.
    for power, level in ((3e-10, -95.2288), (1.01e-10, -99.9568), (0.99e-10, -100.0)):
        quiet = wave * (4 * power) ** 0.5 / 1024
        found = ops.log_mel(quiet, torch.ones_like(t[:1024]), bins, 512)[0]
        assert found[100].tolist() == pytest.approx([level] * 3, abs=1e-4)


def test_silence_is_the_floor_and_no_filter_hears_nothing(backend):
    window, filters = window_and_filters(64, 5)
    silent = ops.log_mel(torch.zeros(2, 100), window, filters, 10)
    assert torch.equal(silent, torch.full((2, 5, 4), -100.0))
    noise = ops.log_mel(random(2, 100, dtype=torch.float32), window, filters, 10)
    assert (noise[:, 2] == -100).all() and (noise[:, [0, 1, 3]] > -50).all()


def test_levels_from_end_to_end(backend):
    window, filters = window_and_filters(256, 4)
    wave = random(1, 1000, dtype=torch.float32)
    found = ops.log_mel(wave, window, filters, 100)
    for factor in (1e-3, 1e3, 1e15):
        louder = ops.log_mel(factor * wave, window, filters, 100)
        change = (louder - found)[:, [0, 1, 3]]
        assert (change - 20 * np.log10(factor)).abs().max() < 1e-3
    assert (ops.log_mel(1e30 * wave, window, filters, 100)[:, 0] == float("inf")).all()


def test_not_a_number_stays_in_its_frames(backend):
    window, filters = window_and_filters(32, 1)
    wave = random(2, 400, dtype=torch.float32)
    wave[0, 100] = float("nan")
    found = ops.log_mel(wave, window, filters, 16).isnan()
    # Frames [80, 112) and [96, 128).
    assert found.nonzero()[:, [0, 2]].tolist() == [[0, 5], [0, 6]]


def test_any_strides(backend):
    base = random(6, 3000, dtype=torch.float32)
    window, filters = window_and_filters(128, 4)
    views = {
        "every second clip": base[::2],
        "a piece": base[1:4, 17:2000],
        "every second sample": base[:, ::2],
        "transposed": base[:, :600].t().contiguous().t(),
        "expanded": base[:1].expand(4, -1),
    }
    for name, x in views.items():
        expected = ops.log_mel(x.contiguous(), window, filters, 40)
        torch.testing.assert_close(ops.log_mel(x, window, filters, 40), expected, msg=name)
    wide = torch.cat([filters, filters], dim=1)[:, ::2]
    expected = ops.log_mel(base, window, wide.contiguous(), 40)
    torch.testing.assert_close(ops.log_mel(base, window, wide, 40), expected)
    expected = ops.log_mel(base, window[::2].contiguous(), filters[:, :33].contiguous(), 40)
    torch.testing.assert_close(ops.log_mel(base, window[::2], filters[:, :33], 40), expected)


@pytest.mark.native
def test_a_frame_alone_has_its_bits():
    waves, (window, filters) = random(4, 3000, dtype=torch.float32), window_and_filters(512, 6)
    together = ops.log_mel(waves, window, filters, 100)
    for frame in (0, 11, 24):
        alone = ops.log_mel(waves[2:3, frame * 100 :][:, :512], window, filters, 1)
        assert torch.equal(alone[0, :, 0], together[2, :, frame])


def test_long_clips_are_taken_in_blocks_without_a_seam(monkeypatch):
    waves, (window, filters) = random(5, 20_000), window_and_filters(256, 6)
    whole = reference.log_mel(waves, window, filters, 100)
    for largest in (100, 3000, 50_000):
        monkeypatch.setitem(reference.spectrogram.BLOCK_SAMPLES, "cpu", largest)
        found = reference.log_mel(waves, window, filters, 100)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-10)


def test_empty_tensors(backend):
    window, filters = window_and_filters(16, 3)
    assert ops.log_mel(torch.empty(0, 40), window, filters, 5).shape == (0, 3, 5)
    assert ops.log_mel(torch.zeros(2, 40), window, filters[:0], 5).shape == (2, 0, 5)


@pytest.mark.native
def test_outputs_are_fully_written(written):
    for clips, n_fft, hop, bands, samples in SIZES:
        window, filters = window_and_filters(n_fft, bands)
        waves = random(clips, samples, dtype=torch.float32)
        assert written(torch.ops.diffad_fast.log_mel(waves, window, filters, hop))


@pytest.mark.native
def test_threads_do_not_change_a_bit(by_threads):
    waves, (window, filters) = random(3, 30_000, dtype=torch.float32), window_and_filters(512, 8)
    by_threads(lambda: ops.log_mel(waves, window, filters, 100))


def test_gradients():
    waves, (window, filters) = random(2, 60).requires_grad_(), window_and_filters(16, 2)
    filters.requires_grad_()
    assert gradcheck(lambda x, f: ops.log_mel(x, window, f, 9), (waves, filters))


@pytest.mark.native
def test_what_the_native_one_refuses():
    waves, (window, filters) = random(1, 2000), window_and_filters(600, 2)
    expected = reference.log_mel(waves, window, filters, 100)
    torch.testing.assert_close(ops.log_mel(waves, window, filters, 100), expected)
    with use_backend("cpu"):
        with pytest.raises(BackendError, match="power of two from 16.*600"):
            ops.log_mel(waves, window, filters, 100)
        window, filters = window_and_filters(16, 2)
        with pytest.raises(BackendError, match="no gradients"):
            ops.log_mel(waves.requires_grad_(), window, filters, 100)


@pytest.mark.native
def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        window, filters = window_and_filters(64, 3)
        inputs = (random(2, 300, dtype=dtype), window, filters, 20)
        torch.library.opcheck(torch.ops.diffad_fast.log_mel.default, inputs)


def test_compiles_as_one_graph(backend):
    window, filters = window_and_filters(64, 3)
    call = lambda x: ops.log_mel(x + 1, window, filters, 20)  # noqa: E731
    x = random(2, 300, dtype=torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))


@pytest.mark.gpu
@pytest.mark.parametrize("n_fft", [256, 600])
def test_on_a_gpu(n_fft):
    waves, (window, filters) = random(5, 30_000, dtype=torch.float32), window_and_filters(n_fft, 7)
    found = ops.log_mel(waves.cuda(), window.cuda(), filters.cuda(), 100).cpu()
    expected = by_numpy(waves, window, filters, 100)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=2e-5)


WAVES, WINDOW = torch.zeros(1, 100), torch.ones(32, dtype=torch.float64)
FILTERS = torch.from_numpy(mel_filters(8000, 32, 4))


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((WAVES[0], WINDOW, FILTERS, 8), ValueError, r"waves.*\(100,\)"),
        ((WAVES.int(), WINDOW, FILTERS, 8), TypeError, "waves.*int32"),
        ((WAVES[:, :31], WINDOW, FILTERS, 8), ValueError, "31 samples.*frame, 32"),
        ((WAVES, WINDOW[None], FILTERS, 8), ValueError, r"window.*\(1, 32\)"),
        ((WAVES, WINDOW[:31], FILTERS, 8), ValueError, "even.*31"),
        ((WAVES, WINDOW, FILTERS[:, 1:], 8), ValueError, r"filters.*\(4, 17\).*\(4, 16\)"),
        ((WAVES, WINDOW.float(), FILTERS, 8), TypeError, "window.*float64.*float32"),
        ((WAVES, WINDOW, FILTERS.half(), 8), TypeError, "filters.*float64.*float16"),
        ((WAVES, WINDOW, FILTERS, 0), ValueError, "hop.*0"),
        ((WAVES, WINDOW, FILTERS, 8.0), TypeError, "hop.*integer"),
    ],
)
def test_bad_arguments(backend, arguments, error, words):
    with pytest.raises(error, match=words):
        ops.log_mel(*arguments)


@pytest.mark.native
@pytest.mark.parametrize(
    "arguments",
    [
        (WAVES[0], WINDOW, FILTERS, 8),
        (WAVES[:, :31], WINDOW, FILTERS, 8),
        (WAVES, WINDOW[:30], FILTERS, 8),
        (WAVES, WINDOW, FILTERS[:, 1:], 8),
        (WAVES, WINDOW.float(), FILTERS, 8),
        (WAVES, WINDOW, FILTERS, 0),
    ],
)
def test_the_bare_operator_guards_its_memory(arguments):
    with pytest.raises(RuntimeError, match="log_mel"):
        torch.ops.diffad_fast.log_mel(*arguments)
