"""Training the token MLP."""

import math

import numpy as np
import pytest
import torch
import training_worker as worker

from diffad_fast import ops
from diffad_fast.config import DetectorConfig
from diffad_fast.denoisers.token_mlp import TokenMLP
from diffad_fast.training import tokens as tokens_module
from diffad_fast.training.tokens import TokenTrainer


def test_the_loss_is_that_of_the_module_in_float64():
    """Every token's noise and level by hand, through the module's own forward pass."""
    trainer = worker.token_trainer()
    with torch.no_grad():  # it starts with an output of 0
        for p in trainer.denoiser.parameters():
            p.add_(0.1 * torch.randn_like(p))
    rows, epochs, log_sigma = trainer.inputs(7)
    assert len(rows) == 64 and len(log_sigma) == 32
    low, high = tokens_module.SIGMA_RANGE
    assert math.log(low) <= log_sigma.min() and log_sigma.max() < math.log(high)
    module = TokenMLP(6, 32, 2).double()
    module.load_state_dict(trainer.denoiser.state_dict())
    total = 0.0
    for place, (row, epoch) in enumerate(zip(rows.tolist(), epochs.tolist(), strict=True)):
        x0 = trainer.tokens[row].double()
        noise = ops.philox_normal((6,), 0, draw=row + 1, step=epoch).double()
        level = log_sigma[place // 2].double()
        sigma = level.exp()
        scale = 1 / (1 + sigma**2).sqrt()
        said = module((scale * (x0 + sigma * noise))[None], level[None])[0]
        total += float((said - scale * (noise - sigma * x0)).square().mean().detach()) / 64
    assert float(trainer.loss(rows, epochs, log_sigma).detach()) == pytest.approx(total, rel=1e-5)


def test_gradients_are_those_of_the_module():
    trainer = worker.token_trainer()
    with torch.no_grad():
        for p in trainer.denoiser.parameters():
            p.add_(0.1 * torch.randn_like(p))
    inputs = trainer.inputs(3)
    trainer.loss(*inputs).backward()
    rows, epochs, log_sigma = inputs
    module = TokenMLP(6, 32, 2).double()
    module.load_state_dict(trainer.denoiser.state_dict())
    each = log_sigma.repeat_interleave(2)
    x, target = trainer._noised(trainer.tokens[rows], rows, epochs, each)
    (module(x.double(), each.double()) - target.double()).square().mean().backward()
    for (name, p), q in zip(trainer.denoiser.named_parameters(), module.parameters(), strict=True):
        error = (p.grad.double() - q.grad).abs().max() / q.grad.abs().max().clamp(min=1e-6)
        assert error < 1e-4, (name, float(error))


def test_learns_the_best_denoiser_of_a_gaussian():
    """Of tokens from N(0, diag(s^2)) the best x0 is s^2 x/(s^2 + sigma^2) for x = x0 + sigma z, and
    the v-prediction's error at sigma is mean_j of (1 + sigma^2) s_j^2/(s_j^2 + sigma^2)."""
    torch.manual_seed(0)
    spread = torch.tensor([0.1, 0.3, 1.0, 2.0])
    bank = torch.randn(20000, 4) * spread
    config = DetectorConfig.create(
        kind="vector", train_steps=600, token_batch=512, learning_rate=3e-3, warmup_steps=20
    )
    denoiser = TokenMLP(4, 64, 2)
    device = torch.device("cpu")
    history = TokenTrainer(denoiser, bank[:18000], bank[18000:], config, device).run()
    low, high = map(math.log, tokens_module.SIGMA_RANGE)
    sigma = torch.linspace(low, high, 2001).exp().double()[:, None]
    square = spread.double() ** 2
    best = float(((1 + sigma**2) * square / (square + sigma**2)).mean())
    found = min(loss for _, loss in history.validation_loss)
    assert best * 0.98 < found < best * 1.06, (best, found)
    assert history.best_step is not None and not denoiser.training


def test_validation_does_not_depend_on_chunks_and_repeats(monkeypatch):
    trainer = worker.token_trainer()
    with torch.no_grad():
        assert trainer.validation_loss() == trainer.validation_loss()
        # More held-out tokens than evaluations: evenly from all.
        monkeypatch.setattr(tokens_module, "VALIDATION", 20)
        seen = []
        noised = trainer._noised
        monkeypatch.setattr(
            trainer, "_noised", lambda x0, *rest: (seen.append(x0), noised(x0, *rest))[1]
        )
        trainer.validation_loss()
    places = (trainer.validation[:, None] == torch.cat(seen)).all(dim=2).nonzero()[:, 0]
    np.testing.assert_array_equal(np.diff(places.sort().values.numpy()), [2, 3] * 9 + [2])


@pytest.mark.parametrize("batch, levels", [(1024, 32), (1000, 25), (7, 7), (37, 1), (4098, 6)])
def test_levels_divide_the_batch(batch, levels):
    assert worker.token_trainer(token_batch=batch).levels == levels


def test_bfloat16_keeps_float32_weights():
    trainer, plain = worker.token_trainer(train_dtype="bfloat16"), worker.token_trainer()
    history, reference = trainer.run(), plain.run()
    assert {p.dtype for p in trainer.denoiser.parameters()} == {torch.float32}
    assert history.loss != reference.loss
    assert history.loss[-1][1] == pytest.approx(reference.loss[-1][1], rel=0.05)


def test_trains_a_bank_that_is_smaller_than_a_batch():
    torch.manual_seed(0)
    config = DetectorConfig.create(kind="vector", train_steps=5, token_batch=64)
    trainer = TokenTrainer(TokenMLP(3, 16, 1), torch.randn(10, 3), torch.randn(2, 3), config, "cpu")
    rows, epochs, _ = trainer.inputs(0)
    assert np.bincount(rows.numpy()).min() >= 6 and set(epochs.tolist()) == set(range(7))
    trainer.run()
