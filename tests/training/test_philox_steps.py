"""The steps of philox_normal are shared out."""

from itertools import pairwise

from diffad_fast.ops.noise import LARGEST_STEP
from diffad_fast.training import philox_steps


def test_every_step_has_one_purpose():
    found = [v for v in vars(philox_steps).values() if isinstance(v, range)]
    found.sort(key=lambda steps: steps.start)
    assert len(found) == 5
    assert found[0].start == 0 and found[-1].stop == LARGEST_STEP + 1
    assert all(before.stop == after.start for before, after in pairwise(found))
    assert all(steps.step == 1 and len(steps) >= 2**19 for steps in found)


def test_noise_stays_what_it_was():
    starts = {k: v.start for k, v in vars(philox_steps).items() if isinstance(v, range)}
    assert starts == {
        "EPOCH_STEPS": 0,
        "AUGMENTATION_STEPS": 2**31,
        "PIXEL_STEPS": 3 * 2**30,
        "VALIDATION_STEPS": 2**32 - 2**20,
        "PICTURE_STEPS": 2**32 - 2**19,
    }
