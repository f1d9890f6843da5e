"""What is computed again in the backward pass, and that nothing else changes."""

import gc
import weakref

import pytest
import torch

from diffad_fast import denoisers, use_backend
from diffad_fast.denoisers import wavelet_unet
from diffad_fast.denoisers.recompute import recomputed


def gradients(network, x, log_sigma, target):
    network.zero_grad()
    (network(x, log_sigma) - target).square().mean().backward()
    return [p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_are_those_of_what_is_kept(backend, products, mixed, monkeypatch):
    torch.manual_seed(0)
    if products:  # as on a GPU: the layer keeps a view of its input
        monkeypatch.setattr(wavelet_unet.Conv1x1, "forward", wavelet_unet.Conv1x1.product)
    network = denoisers.create("unet-tiny", 4).to(memory_format=torch.channels_last)
    for p in network.parameters():  # no branch that is zero
        torch.nn.init.normal_(p, std=0.1)
    x, target = torch.randn(2, 2, 4, 16, 16).unbind()
    x = x.contiguous(memory_format=torch.channels_last)
    log_sigma = torch.tensor([-1.0, 1.0])
    again = []

    def counted(consumer, function, *inputs):
        return recomputed(consumer, lambda *t: (again.append(1), function(*t))[1], *inputs)

    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        monkeypatch.setattr(wavelet_unet, "recomputed", counted)
        found = gradients(network, x, log_sigma, target)
        calls = len(again)
        monkeypatch.setattr(wavelet_unet, "recomputed", lambda then, first, *t: then(first(*t)))
        expected = gradients(network, x, log_sigma, target)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    norms = sum(isinstance(m, wavelet_unet.NormSiLU) for m in network.modules())
    # Once forward; once more in the backward pass, unless the convolution has cast it.
    assert calls == 2 * norms or (mixed and calls >= norms)


def test_the_output_is_not_kept():
    conv = torch.nn.Conv2d(3, 3, 3)
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    made = []

    def function(t):
        y = torch.sin(t)
        made.append(weakref.ref(y))
        return y

    out = recomputed(conv, function, x)
    gc.collect()
    assert made[0]() is None
    out.sum().backward()
    assert len(made) == 2
    plain = torch.randn(1, 3, 8, 8).copy_(x.detach()).requires_grad_()
    conv(torch.sin(plain)).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=0, atol=0)


@pytest.mark.parametrize("changed", ["weight", "input"])
def test_what_is_changed_in_between_is_told(changed):
    """As autograd tells it; each of these would give another gradient in silence."""
    conv, x = torch.nn.Conv2d(3, 3, 3), torch.randn(1, 3, 8, 8)
    out = recomputed(conv, torch.sin, x.requires_grad_())
    with torch.no_grad():
        (conv.weight if changed == "weight" else x).mul_(3)
    with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
        out.sum().backward()


def test_nothing_is_computed_again_without_gradients():
    calls = []

    def function(t):
        calls.append(1)
        return t

    with torch.no_grad():
        recomputed(torch.nn.Conv2d(3, 3, 3), function, torch.randn(1, 3, 8, 8))
    assert calls == [1]
