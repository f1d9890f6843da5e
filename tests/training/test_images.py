"""Training on images: the loss, where images lie, augmentation, parts of a step."""

import gc
import io
import math
import threading
import weakref

import numpy as np
import pytest
import torch
import training_worker as worker
from PIL import Image
from scipy.ndimage import gaussian_filter
from training_worker import image_trainer, pictures

from diffad_fast import Detector, ops
from diffad_fast.config import AUGMENTATIONS
from diffad_fast.data.samples import DecodedSamples
from diffad_fast.denoisers.wavelet_unet import WaveletUNet
from diffad_fast.errors import InputError
from diffad_fast.training import augment
from diffad_fast.training import images as images_module
from diffad_fast.training.augment import augmented


class Silent(torch.nn.Module):
    """Says nothing, but with gradients."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, log_sigma):
        return self.scale * x


def test_every_sample_of_a_run_has_noise_of_its_own(monkeypatch):
    drawn = []
    philox = ops.philox_normal

    def recorded(shape, seed, draw=0, step=0, device=None):
        drawn.extend(zip(draw.tolist(), step.tolist(), strict=True))
        return philox(shape, seed, draw, step, device)

    monkeypatch.setattr(ops, "philox_normal", recorded)
    trainer = image_trainer(train_steps=24)
    trainer.run()
    training = [(d, s) for d, s in drawn if s < 2**31]
    validation = [(d, s) for d, s in drawn if s >= 2**31]
    # 24 steps of 4 are 6 epochs of 16 images; 10 or more validations with the same 64 fields.
    assert len(training) == len(set(training)) == 96
    assert {epoch for _, epoch in training} == set(range(6))
    assert all(draw >= 1 for draw, _ in drawn)  # draw 0 belongs to inference
    assert len(set(validation)) == 64 and len(validation) % 64 == 0


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_loss_by_its_formula(kind):
    """Every level's weighted error of a network that says nothing, by independent formulas."""
    trainer = image_trainer(Silent(), prediction_type=kind)
    inputs = trainer.inputs(5)
    rows, index, epoch, t = inputs
    assert sorted((t // 250).tolist()) == [0, 1, 2, 3]  # one from each quarter
    assert epoch.tolist() == [1] * 4
    total = 0.0
    for row, i, e, level in zip(*(x.tolist() for x in inputs), strict=True):
        a = float(trainer.schedule.alphas_cumprod[level])
        x = torch.tensor(pictures()[i][None] / 255.0)
        torch.testing.assert_close(trainer.resident[row].double() / 255, x)
        noise = ops.philox_normal(x.shape, 0, draw=i + 1, step=e)
        snr = a / (1 - a)
        target, weight = {
            "epsilon": (noise, min(snr, 5) / snr),
            "sample": (x, min(snr, 5)),
            "v_prediction": (a**0.5 * noise - (1 - a) ** 0.5 * x, min(snr, 5) / (snr + 1)),
        }[kind]
        total += float(target.double().square().mean()) * weight / 4
    assert float(trainer.loss(*inputs).detach()) == pytest.approx(total, rel=1e-5)


def test_validation_uses_every_image_at_levels_of_all_heights():
    trainer = image_trainer(Silent())
    with torch.no_grad():
        loss = trainer.validation_loss()
        assert loss == trainer.validation_loss()
        trainer.config = trainer.config.replace(batch_size=3)
        assert loss == pytest.approx(trainer.validation_loss(), rel=1e-6)
    # Of v = sqrt(a) noise - sqrt(1 - a) x0 the mean square is a + (1 - a) mean(x0^2).
    square = np.square(pictures()[16:] / 255.0).mean()
    a = trainer.schedule.alphas_cumprod.double()
    snr = a / (1 - a)
    expected = (snr.clamp(max=5) / (snr + 1) * (a + (1 - a) * square)).mean()
    assert loss == pytest.approx(float(expected), rel=0.05)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float", "mixed"])
def test_where_images_lie_does_not_change_the_result(kind, monkeypatch, tmp_path):
    arrays = {
        "uint8": pictures(),
        "uint16": pictures().astype(np.uint16) * 257 + 1,
        "float": np.random.default_rng(0).random((20, 16, 16), dtype=np.float32),
    }.get(kind)
    if kind == "mixed":
        arrays = pictures(80).astype(np.float32) / np.float32(255)
        arrays[70] *= 0.7
    n = len(arrays)
    resident = image_trainer(arrays=arrays, n=n, train_steps=10)
    assert (resident.resident.dtype == torch.uint8) is (kind == "uint8")
    for row, index in enumerate(resident.fit.tolist()):
        lies, given = resident.resident[row, 0], arrays[index]
        scale = np.iinfo(given.dtype).max if given.dtype.kind == "u" else 1
        lies = lies.numpy() / 255 if lies.dtype == torch.uint8 else lies.numpy()
        np.testing.assert_allclose(lies, given / scale, atol=1e-7)
    resident.run()
    monkeypatch.setattr(images_module, "HOST_BYTES", 100)
    streamed = image_trainer(arrays=arrays, n=n, train_steps=10)
    assert streamed.resident is None
    streamed.run()
    worker.assert_same(streamed.denoiser.state_dict(), resident.denoiser.state_dict())
    # Any step may be asked for at any time.
    a, b = streamed.inputs(7), streamed.inputs(7)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder, and images of it that are read again each time."""
    monkeypatch.setattr(DecodedSamples.load, "__defaults__", (100,))
    for i, picture in enumerate(pictures()):
        Image.fromarray(picture).save(tmp_path / f"{i:02}.png")
    return tmp_path


@pytest.mark.filterwarnings("ignore::diffad_fast.errors.SkippedInput")
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("lost", ["03", "17", "*"])
def test_an_image_that_can_no_longer_be_read(lost, resident, files, monkeypatch):
    """One to train on, one that is held out, and all of them."""
    if not resident:
        monkeypatch.setattr(images_module, "HOST_BYTES", 100)
    resident_images = images_module.resident_images

    def losing(*arguments):
        for path in files.glob(f"{lost}.png"):
            path.unlink()
        return resident_images(*arguments)

    monkeypatch.setattr(images_module, "resident_images", losing)
    with pytest.raises(InputError, match=r"no longer can: .*\d\d.png cannot be read \(No such"):
        image_trainer(arrays=str(files)).run()


def test_nothing_outlives_a_training(files, monkeypatch):
    """No images, and no threads that decode them."""
    monkeypatch.setattr(images_module, "HOST_BYTES", 100)
    trainer = image_trainer(arrays=str(files), train_steps=3, draw=lambda images: images[None])
    alive = weakref.ref(trainer)
    gc.disable()
    try:
        trainer.run()
        assert not [t for t in threading.enumerate() if t.name.startswith("diffad-fast-decode")]
        del trainer
        assert alive() is None
    finally:
        gc.enable()


def test_parts_of_a_step_add_up():
    """The gradient of a step in two parts is that of the whole step."""
    gradients = []
    for parts in (1, 2):
        module = torch.nn.Conv2d(1, 1, 3, padding=1)
        module.forward = lambda x, level, m=module: torch.nn.Conv2d.forward(m, x)
        torch.manual_seed(3)
        torch.nn.init.normal_(module.weight)
        torch.nn.init.zeros_(module.bias)
        trainer = image_trainer(module, accumulate=parts, gradient_clip=0)
        trainer.optimizer = images_module.Loop.__init__.__globals__["Optimizer"](
            module, trainer.config
        )
        trainer.optimizer.set(0, 0.0)
        loss = float(trainer.step_function()(*trainer.inputs(0)))
        gradients.append((loss, trainer.optimizer.gradient.clone()))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


def test_bfloat16_training_keeps_float32_weights():
    trainer, plain = image_trainer(train_dtype="bfloat16"), image_trainer()
    history, reference = trainer.run(), plain.run()
    assert {p.dtype for p in trainer.denoiser.parameters()} == {torch.float32}
    assert history.loss != reference.loss
    assert history.loss[-1][1] == pytest.approx(reference.loss[-1][1], rel=0.05)


def learn_alike(train):
    """``train(dtype)`` gives validation losses: in bfloat16 nearly those in float32, and the same
    bits within an autocast of the caller's."""
    losses = []
    for dtype, surrounded in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=surrounded):
            losses.append(np.array([loss for _, loss in train(dtype).validation_loss]))
    assert losses[0][-1] < 0.9 * losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=5e-3)
    np.testing.assert_array_equal(losses[2], losses[1])


def test_bfloat16_training_learns_as_float32_does(monkeypatch):
    """No weight that autocast has cast is used again once it has changed."""
    monkeypatch.setattr(images_module, "VALIDATION", 16)

    def train(dtype):
        torch.manual_seed(0)
        net = WaveletUNet(1, (16, 16, 16), 1)
        return image_trainer(net, train_dtype=dtype, train_steps=20).run()

    learn_alike(train)


@pytest.mark.slow
def test_a_detector_learns_in_bfloat16_as_in_float32():
    """The same of a network of the library's own sizes, on a wavelet transform."""
    images = pictures(40).repeat(2, axis=1).repeat(2, axis=2)
    options = {
        "image_size": 32, "denoiser": "unet-tiny", "haar_level": 2, "train_steps": 30,
        "batch_size": 4, "map_weights": (1, 0, 1),
    }  # fmt: skip
    learn_alike(
        lambda dtype: Detector(**options, train_dtype=dtype, device="cpu").fit(images).history
    )


# ----------------------------------------------------------------- augmentation


def some(n=6, h=24, w=16):
    return torch.rand(n, 2, h, w), torch.arange(n), torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_depends_on_the_sample_and_not_on_its_batch(name):
    x, index, epoch = some()
    whole = augmented(x, (name,), 0, index, epoch)
    assert whole.shape == x.shape and whole.min() >= 0 and whole.max() <= 1
    assert not torch.equal(whole, x)
    for i in range(len(x)):
        alone = augmented(x[i : i + 1], (name,), 0, index[i : i + 1], epoch[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-6)
    assert not torch.equal(whole, augmented(x, (name,), 0, index, epoch + 1))
    assert not torch.equal(whole, augmented(x, (name,), 1, index, epoch))


def test_what_augments_is_drawn_apart_from_what_noises(monkeypatch):
    """Training counts its noise from 0 up, validation in the last 2^20 of the 2^32 steps."""
    steps, philox = [], ops.philox_normal

    def recorded(shape, seed, draw=0, step=0, device=None):
        steps.append(set(step.tolist()))
        return philox(shape, seed, draw, step, device)

    monkeypatch.setattr(ops, "philox_normal", recorded)
    epoch = torch.tensor([0, 5])
    augmented(torch.rand(2, 1, 16, 16), ("shift", "noise"), 0, torch.arange(2), epoch)
    image, pixels = steps
    assert image == {2**31, 2**31 + 5} and pixels == {3 * 2**30, 3 * 2**30 + 5}


def test_no_augmentation_is_the_default():
    x, index, epoch = some()
    assert augmented(x, (), 0, index, epoch) is x
    assert image_trainer().config.augment == ()


@pytest.mark.parametrize("name, axis", [("flip-horizontal", 3), ("flip-vertical", 2)])
def test_flips(name, axis):
    x, index, epoch = some(200, 4, 4)
    flipped = augmented(x, (name,), 0, index, epoch)
    changed = (flipped != x).flatten(1).any(dim=1)
    assert torch.equal(flipped[changed], x[changed].flip(axis))
    assert 70 < int(changed.sum()) < 130  # binomial(200, 1/2), five deviations


def test_shift_and_rotation_stay_within_their_limits():
    """Where a point of light goes: at most a 16th of a side, or by 5 degrees around the centre."""
    n, h, w = 200, 96, 64
    _, index, epoch = some(n)
    yy, xx = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    spot = torch.exp(-((xx - 44) ** 2 + (yy - 57) ** 2) / 8).expand(n, 1, h, w)

    def centres(x):
        mass = x.sum(dim=(1, 2, 3))
        return (x * xx).sum(dim=(1, 2, 3)) / mass, (x * yy).sum(dim=(1, 2, 3)) / mass

    cx, cy = centres(augmented(spot, ("shift",), 0, index, epoch))
    for moved, side in ((cx - 44, w), (cy - 57, h)):
        assert moved.abs().max() <= side / 16 + 0.05 and moved.abs().max() > 0.8 * side / 16
        assert abs(float(moved.mean())) < 5 * side / 16 / (3 * n) ** 0.5
    cx, cy = centres(augmented(spot, ("rotate",), 0, index, epoch))
    # 12 to the right of the centre and 9 below: the distance stays, the angle is uniform.
    torch.testing.assert_close(
        torch.hypot(cx - 32, cy - 48), torch.full((n,), 15.0), rtol=3e-3, atol=0
    )
    angle = torch.rad2deg(torch.atan2(cy - 48, cx - 32) - math.atan2(9, 12))
    assert 4.5 < angle.max() <= 5.05 and -5.05 <= angle.min() < -4.5


def test_brightness_is_a_factor():
    x, index, epoch = some(100)
    factor = augmented(x / 2, ("brightness",), 0, index, epoch) / (x / 2)
    flat = factor.flatten(1)
    torch.testing.assert_close(flat, flat[:, :1].expand_as(flat), rtol=1e-4, atol=0)
    assert 0.9 <= flat.min() < 0.92 and 1.08 < flat.max() <= 1.1001


def test_exposure_is_an_offset():
    x, index, epoch = some(100)
    offset = (augmented(0.5 + x / 4, ("exposure",), 0, index, epoch) - 0.5 - x / 4).flatten(1)
    torch.testing.assert_close(offset, offset[:, :1].expand_as(offset), rtol=0, atol=1e-6)
    assert -0.1 <= offset.min() < -0.08 and 0.08 < offset.max() <= 0.1001


def test_noise_is_white_and_of_each_images_own_deviation():
    _, index, epoch = some(200)
    grey = torch.full((200, 1, 32, 32), 0.5)
    noise = augmented(grey, ("noise",), 0, index, epoch) - 0.5
    deviation = noise.flatten(1).std(dim=1)
    # Half of the images have none, the others uniformly up to 0.03: their mean is 0.0075.
    assert 70 < int((deviation == 0).sum()) < 130
    assert 0.027 < deviation.max() < 0.032
    assert abs(float(deviation.mean()) - 0.0075) < 5 * 0.01 / 200**0.5
    some_noise = noise[deviation > 0] / deviation[deviation > 0][:, None, None, None]
    n = some_noise.numel() ** 0.5
    assert abs(float(some_noise.mean())) < 5 / n
    assert abs(float((some_noise[..., 1:] * some_noise[..., :-1]).mean())) < 5 / n
    assert abs(float((some_noise[1:] * some_noise[:-1]).mean())) < 5 / n
    again = augmented(grey, ("noise",), 0, index, epoch + 1) - 0.5
    assert abs(float((noise * again).mean())) < 5 * 0.03**2 / n


def test_blur_is_scipys():
    x = torch.rand(5, 2, 24, 16, dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    for image, s, blurred in zip(x, sigma.tolist(), augment._blurred(x, sigma), strict=True):
        expected = image.numpy()
        if s:
            expected = gaussian_filter(expected, (0, s, s), mode="mirror", truncate=4 / s)
        assert np.abs(blurred.numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("quality", [50, 75])
def test_compression_is_that_of_libjpeg(quality):
    """But for the rounding of its integer transform: a coefficient at a half may go either way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 1, 45, 61, generator=generator)  # sides that 8 does not divide
    x = (torch.nn.functional.avg_pool2d(x, 5, 1, 2) * 255).round() / 255
    compressed = augment._compressed(x, torch.full((4,), float(quality)))
    expected = torch.empty_like(x)
    for image, out in zip(x, expected, strict=True):
        stream = io.BytesIO()
        pixels = (image[0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(stream, "jpeg", quality=quality)
        out[0] = torch.from_numpy(np.array(Image.open(stream)) / np.float32(255))
    loss = float((expected - x).abs().mean())
    error = float((compressed - expected).abs().mean())
    assert error < 0.1 * loss, (error, loss)
    assert loss > 1e-3
