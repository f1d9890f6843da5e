"""What each of the 2^32 steps of ``ops.philox_normal`` is for, in training.

In training ``draw`` is a sample's number plus 1: draw 0 belongs to inference, which counts its own
steps. Of one sample and seed, fields are independent as long as their steps differ.
"""

EPOCH_STEPS = range(2**31)
"""The noise of the forward process, by epoch."""
AUGMENTATION_STEPS = range(2**31, 2**31 + 2**30)
"""What decides how an image is changed, by epoch."""
PIXEL_STEPS = range(2**31 + 2**30, 2**32 - 2**20)
"""The noise that augmentation adds to pixels, by epoch."""
VALIDATION_STEPS = range(2**32 - 2**20, 2**32 - 2**19)
"""The noise of the forward process on held-out samples, by how often each is evaluated."""
PICTURE_STEPS = range(2**32 - 2**19, 2**32)
"""Where the samples in pictures of a training start."""
