import math

import numpy as np
import pytest
import torch

from diffad_fast import ops
from diffad_fast.config import DetectorConfig
from diffad_fast.data.images import open_images
from diffad_fast.training import loop
from diffad_fast.training.loop import Trainer


def trainer(n=10, **options):
    config = DetectorConfig.create(
        image_size=16, train_steps=12, batch_size=4, warmup_steps=3, **options
    )
    images = open_images(np.random.default_rng(0).random((n, 16, 16)), (16, 16), 1)
    images.load()
    module = torch.nn.Conv2d(1, 1, 1)
    module.forward = lambda x, level: torch.nn.Conv2d.forward(module, x)
    return Trainer(module, lambda x: x, images, range(n - 2), [n - 2, n - 1], config, "cpu")


def test_every_sample_of_a_run_has_noise_of_its_own(monkeypatch):
    drawn = []
    philox = ops.philox_normal

    def recorded(shape, seed, draw=0, step=0, device=None):
        drawn.extend(zip(draw.tolist(), step.tolist(), strict=True))
        return philox(shape, seed, draw, step, device)

    monkeypatch.setattr(ops, "philox_normal", recorded)
    one = trainer()
    one.validation = []
    one.run()
    assert len(drawn) == len(set(drawn)) == 48  # 12 steps of 4 are 6 epochs of 8 images
    assert {epoch for _, epoch in drawn} == set(range(6))
    assert all(draw >= 1 for draw, _ in drawn)  # draw 0 belongs to inference


def test_order_visits_every_image_once_an_epoch():
    one = trainer()
    order = one._order(0, 48)
    for epoch in range(6):
        assert sorted(order[8 * epoch : 8 * epoch + 8]) == [(i, epoch) for i in range(8)]
    assert one._order(20, 48) == order[20:]


def test_learning_rate_warms_up_and_decays():
    one = trainer(learning_rate=0.1)
    rates = [loop.learning_rate(one.config, step) for step in range(12)]
    # A tenth of 12 steps is one step of warm-up.
    expected = [0.1] + [
        0.1 * (0.01 + 0.99 * (1 + math.cos(math.pi * k / 11)) / 2) for k in range(11)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_loss_by_its_formula(kind):
    """Every level's weighted error of a network that says nothing, by independent formulas."""
    one = trainer(prediction_type=kind)
    torch.nn.init.zeros_(one.denoiser.weight)
    torch.nn.init.zeros_(one.denoiser.bias)
    batch = next(iter(one.images.batches(4)))
    generator = torch.Generator().manual_seed(5)
    epoch = torch.tensor([0, 0, 1, 2])
    loss = one._loss(batch.x, batch.index, epoch, generator)

    generator = torch.Generator().manual_seed(5)
    u = (torch.rand((), generator=generator) + torch.arange(4) / 4) % 1
    t = (u[torch.randperm(4, generator=generator)] * 1000).long()
    assert sorted((t // 250).tolist()) == [0, 1, 2, 3]  # one from each quarter
    total = 0.0
    for i in range(4):
        a = float(one.schedule.alphas_cumprod[t[i]])
        x = batch.x[i : i + 1]
        noise = ops.philox_normal(x.shape[1:], 0, draw=i + 1, step=int(epoch[i]))[None]
        snr = a / (1 - a)
        target, weight = {
            "epsilon": (noise, min(snr, 5) / snr),
            "sample": (x, min(snr, 5)),
            "v_prediction": (a**0.5 * noise - (1 - a) ** 0.5 * x, min(snr, 5) / (snr + 1)),
        }[kind]
        total += float(target.double().square().mean()) * weight / 4
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
