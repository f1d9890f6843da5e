"""Pictures of held-out normals while a denoiser is trained."""

import errno
import math
import os

import numpy as np
import pytest
import torch
import training_worker as worker
from PIL import Image

import diffad_fast as daf
from diffad_fast import ops
from diffad_fast.errors import InputError
from diffad_fast.models import coefficients
from diffad_fast.training import checkpoint
from diffad_fast.training.philox_steps import PICTURE_STEPS
from diffad_fast.training.state import TrainingCheckpoint


def drawing(images):
    """The images, their negatives, and nothing."""
    return torch.stack([images, 1 - images, torch.zeros_like(images)])


def trainer(**options):
    return worker.image_trainer(draw=drawing, **options)


def kept(folder, **options):
    return TrainingCheckpoint(folder / "m.training", log=folder / "m.diffad.csv", **options)


def pictures(folder):
    return sorted(p.name for p in (folder / "m.diffad.pictures").iterdir())


def test_every_k_steps_and_at_the_end(tmp_path):
    whole = trainer()
    whole.run(kept(tmp_path, pictures_every=10))
    assert pictures(tmp_path) == [f"step-{k:07d}.png" for k in (10, 20, 24)]
    found = np.asarray(Image.open(tmp_path / "m.diffad.pictures" / "step-0000020.png"))
    assert found.shape == (3 * 18, 4 * 18, 3) and found.dtype == np.uint8
    normals = worker.pictures()[16:]  # the four that are held out
    for i, normal in enumerate(normals):
        left = 18 * i
        for row, expected in enumerate((normal, 255 - normal, 0 * normal)):
            tile = found[18 * row : 18 * row + 16, left : left + 16]
            np.testing.assert_array_equal(tile, expected[..., None].repeat(3, axis=2))
    assert (found[16:18] == 255).all() and (found[:, 16:18] == 255).all()
    # Nothing else changes by it.
    other = trainer()
    other.run()
    worker.assert_same(whole.denoiser.state_dict(), other.denoiser.state_dict())


def test_they_are_drawn_by_the_averaged_weights_as_they_are_used(tmp_path):
    seen = []

    def draws(images):
        seen.append((made.denoiser.training, [p.clone() for p in made.denoiser.parameters()]))
        return drawing(images)

    made = worker.image_trainer(draw=draws)
    losses = iter([3.0, 2.0, 1.0, *[4.0] * 20])
    made.validation_loss = lambda: next(losses)  # the average after the third of twelve is kept
    made.run(kept(tmp_path, pictures_every=6))
    assert [training for training, _ in seen] == [False] * 4
    for p, q in zip(made.denoiser.parameters(), seen[0][1], strict=True):
        assert torch.equal(p, q)


def test_a_continued_training_draws_the_rest(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir(), part.mkdir()
    trainer().run(kept(whole, pictures_every=5))
    first = trainer()
    inputs = first.inputs

    def failing(step):
        if step == 17:
            raise OSError("pulled out")
        return inputs(step)

    first.inputs = failing
    with pytest.raises(OSError, match="pulled out"):
        first.run(kept(part, pictures_every=5, seconds=0.0))
    later = part / "m.diffad.pictures" / "step-0000019.png"  # of a training that got further
    later.write_bytes(b"old")
    trainer().run(kept(part, pictures_every=5, resume=True))
    assert pictures(part) == pictures(whole) == [f"step-{k:07d}.png" for k in (5, 10, 15, 20, 24)]
    for name in pictures(whole):
        one, two = (f / "m.diffad.pictures" / name for f in (whole, part))
        assert one.read_bytes() == two.read_bytes()
    # A new training begins without those of the one before.
    trainer(train_steps=4).run(kept(part, pictures_every=4))
    assert pictures(part) == ["step-0000004.png"]


def test_a_full_disk_costs_a_warning(tmp_path, monkeypatch):
    def no_space(path, content):
        raise InputError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr("diffad_fast.training.log.write_atomically", no_space)
    with pytest.warns(RuntimeWarning, match="goes on without a picture: .*No space left"):
        history = trainer().run(kept(tmp_path, pictures_every=20))
    assert history.loss[-1][0] == 23
    assert checkpoint.load(tmp_path / "m.training", "diffad-training")[1]["step"] == "24"


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(InputError, match="of images by a U-Net, not of tokens: leave pictures_ev"):
        worker.token_trainer().run(kept(tmp_path, pictures_every=5))
    with pytest.raises(InputError, match="pictures lie beside the log: give log"):
        TrainingCheckpoint(tmp_path / "state", pictures_every=5)
    for value in (0, 2.5):
        with pytest.raises(InputError, match=f"pictures_every is .* not {value}"):
            kept(tmp_path, pictures_every=value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_are_normals_reconstructions_and_samples(channels):
    """Against a closed form: a network that has not learnt says v = 0, which is right for
    coefficients of unit variance, and a step of DDIM then only scales: with alpha = cos^2 a it
    takes x to cos(a_t - a_s) x."""
    detector = daf.Detector(
        image_size=32,
        channels=channels,
        denoiser="unet-tiny",
        device="cpu",
        reverse_steps=4,
        seed=5,
    )
    model, images = detector.model, torch.rand(3, channels, 32, 32)
    model.representation.mean.fill_(0.5)
    model.representation.deviation.fill_(0.2)
    rows = model._pictures(images)
    assert rows.shape == (3, 3, channels, 32, 32)

    def scale(steps):
        a = [math.acos(math.sqrt(s.alpha_t)) for s in steps]
        return math.prod(math.cos(x - y) for x, y in zip(a, [*a[1:], 0.0], strict=True))

    x0 = model.representation.encode(images)
    back = model._steps_of("reconstruct")
    noise = ops.philox_normal((1, *x0.shape[1:]), 5)
    x_t = math.sqrt(back[0].alpha_t) * x0 + math.sqrt(1 - back[0].alpha_t) * noise
    schedule = model.schedule
    steps = schedule.reverse_steps(schedule.timestep(20.0), coefficients.SAMPLE_STEPS)
    fields = [ops.philox_normal((1, *x0.shape[1:]), 5, k, PICTURE_STEPS.start) for k in (1, 2, 3)]
    for row, expected in zip(
        rows,
        (
            images,
            model.representation.decode(scale(back) * x_t),
            model.representation.decode(scale(steps) * torch.cat(fields)),
        ),
        strict=True,
    ):
        torch.testing.assert_close(row, expected.clamp(0, 1), rtol=0, atol=2e-5)


def test_of_a_schedule_with_few_steps():
    """Fewer than a sample takes elsewhere, and none as noisy as where it begins."""
    detector = daf.Detector(
        image_size=32, denoiser="unet-tiny", schedule="linear", diffusion_steps=15,
        start_sigma=0.3, reverse_steps=3, device="cpu",
    )  # fmt: skip
    rows = detector.model._pictures(torch.rand(2, 1, 32, 32))
    assert rows.shape == (3, 2, 1, 32, 32) and rows.isfinite().all()


def test_on_the_command_line(tmp_path, monkeypatch):
    from diffad_fast.cli import main

    (tmp_path / "normal").mkdir()
    for i, picture in enumerate(worker.pictures(24)):
        Image.fromarray(picture.repeat(2, 0).repeat(2, 1)).save(tmp_path / "normal" / f"{i}.png")
    arguments = ["fit", str(tmp_path / "normal"), "--out", str(tmp_path / "m.diffad"), "--steps",
                 "2", "--image-size", "32", "--pictures-every", "1", "--device", "cpu"]  # fmt: skip
    assert main(arguments) == 2  # tokens
    assert main([*arguments, "--denoiser", "unet-tiny", "--batch-size", "auto"]) == 0
    assert pictures(tmp_path) == ["step-0000001.png", "step-0000002.png"]
    assert daf.load(str(tmp_path / "m.diffad"), device="cpu").config.batch_size == 16
