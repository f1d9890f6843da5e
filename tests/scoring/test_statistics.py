import numpy as np
import pytest
import torch

from diffad_fast.scoring import fit_statistics

torch.manual_seed(0)


def batches(maps, size, objects=None):
    objects = range(len(maps)) if objects is None else objects
    return (([maps[i : i + size], None], objects[i : i + size]) for i in range(0, len(maps), size))


@pytest.mark.parametrize("size", [1, 3, 64])
def test_moments_do_not_depend_on_the_batches(size):
    maps = torch.rand(37, 8, 6) * 3 + torch.arange(6)
    scalar, none = fit_statistics(batches(maps, size), "scalar", 0.0)
    assert none is None
    np.testing.assert_allclose(scalar.mean, maps.double().mean(), rtol=1e-6)
    np.testing.assert_allclose(scalar.deviation, maps.double().std(correction=0), rtol=1e-6)
    position, _ = fit_statistics(batches(maps, size), "position", 0.0)
    np.testing.assert_allclose(position.mean, maps.double().mean(0), rtol=1e-6)
    np.testing.assert_allclose(position.deviation, maps.double().std(0, correction=0), rtol=1e-5)


def test_auto_takes_positions_only_where_they_differ():
    flat = torch.rand(60, 16, 16)
    bumpy = flat + 10 * torch.rand(16, 16)
    assert fit_statistics(batches(flat, 8), "auto", 0.0)[0].mean.shape == ()
    assert fit_statistics(batches(bumpy, 8), "auto", 0.0)[0].mean.shape == (16, 16)


def test_images_of_one_object_do_not_predict_one_another():
    """Ten images each of six objects: positions differ by the object, and not between objects."""
    objects = np.repeat(np.arange(6), 10)
    maps = (10 * torch.rand(6, 16, 16))[objects] + torch.rand(60, 16, 16)
    assert fit_statistics(batches(maps, 8), "auto", 0.0)[0].mean.shape == (16, 16)
    assert fit_statistics(batches(maps, 8, objects), "auto", 0.0)[0].mean.shape == ()
    one = maps[:10], 8, np.zeros(10, int)
    assert fit_statistics(batches(*one), "auto", 0.0)[0].mean.shape == ()
    assert fit_statistics(batches(*one), "position", 0.0)[0].mean.shape == (16, 16)


def test_smoothing_keeps_constants_and_total_variance():
    """A smoothed map of moments is still that of a mixture: a constant stays, a step spreads."""
    step = torch.zeros(40, 16, 16)
    step[:, :, 8:] = 1
    fitted, _ = fit_statistics(batches(step, 8), "position", 2.0)
    assert fitted.mean[0, 0] < 1e-3 and fitted.mean[0, -1] > 1 - 1e-3
    # At the step the neighbourhood holds both values: mean 1/2, deviation 1/2.
    assert 0.3 < fitted.mean[8, 8] < 0.7 and fitted.deviation[8, 8] > 0.45


def test_one_normal_and_constant_maps_stay_finite():
    fitted, _ = fit_statistics(batches(torch.rand(1, 4, 4), 8), "auto", 1.0)
    assert torch.isfinite(fitted.mean) and fitted.deviation > 0
    fitted, _ = fit_statistics(batches(torch.ones(5, 4, 4), 8), "auto", 1.0)
    assert (fitted.deviation > 0).all()


def test_misfit_is_the_gaussian_log_likelihood():
    from scipy import stats

    from diffad_fast.scoring.maps import _MapMoments, _misfit

    fitted, held_out, maps = _MapMoments(), _MapMoments(), torch.rand(30, 4, 5)
    fitted.add(torch.rand(20, 4, 5) * 2)
    held_out.add(maps)
    mean, variance = fitted.position(0.0)
    law = stats.norm(mean.numpy(), variance.sqrt().numpy())
    expected = -law.logpdf(maps.double().numpy()).mean() - 0.5 * np.log(2 * np.pi)
    assert _misfit((mean, variance), held_out) == pytest.approx(expected, rel=1e-12)
