"""philox_normal: published test vectors, the layout of the counter, and the distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from diffad_fast import ops, reference
from diffad_fast.errors import BackendError
from diffad_fast.ops.dispatch import use_backend
from diffad_fast.reference import noise as implementation

# kat_vectors of Random123, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_published_vectors(counter, key, expected):
    tensors = [torch.tensor([word] * 2) for word in words(counter)]
    got = reference.philox4x32(tensors, [torch.tensor(word) for word in words(key)])
    assert [w.tolist() for w in got] == [[word] * 2 for word in words(expected)]
    assert list(reference.philox4x32(words(counter), words(key))) == words(expected)


def by_integers(count, seed, draw, step):
    """The documented layout with Python's integers and math, element by element."""
    result = []
    for i in range(-(-count // 4)):
        counter = (i, draw % 2**32, step, draw >> 32)
        w = reference.philox4x32(counter, (seed % 2**32, seed >> 32))
        for a, b in ((w[0], w[1]), (w[2], w[3])):
            radius = math.sqrt(-2 * math.log((a + 1) / 2**32))
            angle = 2 * math.pi * b / 2**32
            result += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.float32(result[:count])


@pytest.mark.parametrize("count", [1, 2, 7, 64])
@pytest.mark.parametrize(
    "seed, draw, step",
    [(0, 0, 0), (1, 2, 3), (2**63 - 1, 2**63 - 1, 2**32 - 1), (7 << 32, 5 << 32, 0)],
)
def test_layout(backend, count, seed, draw, step):
    got = ops.philox_normal((count,), seed, draw, step)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), by_integers(count, seed, draw, step), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4, 7), (2, 1024)])
def test_cuda_is_the_reference(cuda, shape):
    """Whole and broken blocks of four; a field for all, and one for each index."""
    draws, steps = torch.arange(shape[0]) * 2**33 + 3, torch.arange(shape[0]) + 2**31
    for draw, step in ((2**40 + 1, 7), (draws, 7), (draws, steps), (0, steps)):
        got = ops.philox_normal(shape, 2**62 + 5, draw, step, device=cuda)
        expected = reference.philox_normal(shape, 2**62 + 5, draw, step)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-7)


def test_the_smallest_and_the_largest_word():
    """u1 is (0 + 1) 2^-32, not 0 whose logarithm is infinite, and 1, of which it is 0."""
    words = torch.tensor([0, 2**32 - 1])
    cosine, sine = implementation._box_muller(words, torch.tensor([0, 2**30]))
    assert cosine.tolist() == pytest.approx([math.sqrt(64 * math.log(2)), 0.0], rel=1e-7, abs=0)
    assert sine.tolist() == [0.0, 0.0]


def test_each_index_of_a_tensor_draw_is_a_field_of_its_own(backend):
    draw = torch.tensor([0, 3, 2**40 + 1])
    step = torch.tensor([9, 0, 2**32 - 1])
    for shape in [(5,), (2, 3, 3), ()]:
        batch = ops.philox_normal((3, *shape), 11, draw, step)
        for n in range(3):
            alone = ops.philox_normal(shape, 11, int(draw[n]), int(step[n]))
            assert torch.equal(batch[n], alone)
        assert torch.equal(
            ops.philox_normal((3, *shape), 11, draw)[1], ops.philox_normal(shape, 11, 3)
        )
        assert torch.equal(
            ops.philox_normal((3, *shape), 11, 4, step)[0], ops.philox_normal(shape, 11, 4, 9)
        )


def test_shapes(backend):
    flat = ops.philox_normal((24,), 5)
    assert torch.equal(ops.philox_normal((2, 3, 4), 5), flat.view(2, 3, 4))
    assert torch.equal(ops.philox_normal(torch.Size([10]), 5), flat[:10])
    assert ops.philox_normal((), 5).shape == ()
    assert ops.philox_normal((0, 4), 5).shape == (0, 4)
    assert ops.philox_normal((0, 4), 5, torch.zeros(0, dtype=torch.int64)).shape == (0, 4)
    assert ops.philox_normal((2, 0), 5, torch.zeros(2, dtype=torch.int64)).shape == (2, 0)


def test_numpy_integers_count_as_integers(backend):
    got = ops.philox_normal((np.int32(5),), np.int64(2**40 + 1), np.int64(3), np.int32(2))
    assert torch.equal(got, ops.philox_normal((5,), 2**40 + 1, 3, 2))


def test_the_backend_is_chosen_by_the_device():
    with pytest.raises(BackendError), use_backend("triton"):
        ops.philox_normal((2,), 0, device="cpu")
    assert ops.philox_normal((2,), 0, device="cpu").device.type == "cpu"


def test_chunks_do_not_show(monkeypatch):
    draw = torch.tensor([1, 2, 3])
    whole = reference.philox_normal((3, 11), 3, draw)
    monkeypatch.setattr(implementation, "CHUNK", 2)
    assert torch.equal(reference.philox_normal((3, 11), 3, draw), whole)


def test_every_argument_matters(backend):
    base = ops.philox_normal((8,), 1, 1, 1)
    for other in [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1 + 2**32, 1, 1), (1, 1 + 2**32, 1)]:
        assert not torch.isclose(ops.philox_normal((8,), *other), base).any()


def test_distribution(backend):
    """At these sizes a right generator fails each bound with probability below 1e-5."""
    n = 1 << 18
    x = ops.philox_normal((n,), 2024).double().numpy()
    assert abs(x.mean()) < 4.5 / math.sqrt(n)
    assert abs(x.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4.5 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4.5 * math.sqrt(96 / n)
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-5
    # Neighbours, the two of one Box-Muller pair included, and fields of neighbouring keys.
    y = ops.philox_normal((n,), 2024, draw=1).double().numpy()
    z = ops.philox_normal((n,), 2025).double().numpy()
    for a, b in [(x[:-1], x[1:]), (x[0::2], x[1::2]), (x, y), (x, z)]:
        assert abs(np.mean(a * b)) < 4.5 / math.sqrt(len(a))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (((2,), -1), ValueError, "seed must be in"),
        (((2,), 2**63), ValueError, "seed must be in"),
        (((2,), 1.0), TypeError, "seed must be an integer, got 1.0"),
        (((2, -1), 0), ValueError, "entry of shape must be in"),
        (((2,), 0, -3), ValueError, "draw must be in"),
        (((2,), 0, 0, 2**32), ValueError, "step must be in"),
        (((2,), 0, torch.zeros(2)), TypeError, "draw must be an integer or an int64 tensor"),
        (((2,), 0, torch.zeros(3, dtype=torch.int64)), ValueError, r"draw has shape \(3,\)"),
        (((), 0, torch.tensor(0)), ValueError, r"draw has shape \(\)"),
        (((2**20, 2**20), 0), ValueError, "more than 2\\^34 elements"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.philox_normal(*arguments)


def test_native_is_the_reference_to_rounding(cpu_isa):
    """Four units in the last place, of 2^20 numbers; the reference's are rounded from float64."""
    for shape, arguments in [
        ((2**20,), (3,)),
        ((5, 4099), (2**62 + 1, torch.tensor([0, 1, 2**32, 2**40, 2**63 - 1]), 7)),
        ((5, 17), (2**62 + 1, 4, torch.tensor([0, 1, 2**31, 2**32 - 1, 5]))),
    ]:
        with use_backend("cpu"):
            got = ops.philox_normal(shape, *arguments).numpy()
        expected = reference.philox_normal(shape, *arguments).numpy()
        assert np.abs(got - expected).max() < 2e-6  # |z| < 6.7
        assert (np.abs(got - expected) <= 4 * np.spacing(np.abs(expected))).all()


@pytest.mark.native
def test_sizes_and_threads_do_not_change_a_bit(by_threads):
    sizes, draws = (1, 31, 33, 8191, 8193, 70001), torch.arange(9)
    *parts, whole, _ = by_threads(
        lambda: [
            *(ops.philox_normal((n,), 5) for n in sizes),
            ops.philox_normal((9, 8191), 5, draws),
        ]
    )
    for part in parts:
        assert torch.equal(part, whole[: len(part)])


def test_outputs_are_fully_written(cpu_isa, written):
    for n in (1, 3, 31, 32, 33, 8191, 8193):
        assert written(ops.philox_normal((n,), 0))
        assert written(ops.philox_normal((3, n), 0, torch.arange(3)))


@pytest.mark.native
def test_the_bare_operator():
    fill = torch.ops.diffad_fast.philox_normal_
    torch.library.opcheck(fill.default, (torch.empty(3, 5), 1, 2, 3, None, torch.arange(3)))
    key = torch.arange(3)
    for out, draws in [
        (torch.empty(3, 5).t(), None),
        (torch.empty(3).double(), None),
        (torch.empty(4), key),
        (torch.empty(()), key),
        (torch.empty(3), key.int()),
        (torch.empty(3), key[None]),
    ]:
        with pytest.raises(RuntimeError):
            fill(out, 0, 0, 0, draws, None)


@pytest.mark.parametrize("device", ["cpu", None])
def test_compiles_as_one_graph(backend, device):
    def draw(t):
        if device is None:
            return ops.philox_normal((3, 7), 1, 5) * 2
        return ops.philox_normal((3, 7), 1, t, device=device) * 2

    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    t = torch.tensor([1, 2, 3])
    torch.testing.assert_close(compiled(t), draw(t))
