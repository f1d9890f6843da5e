import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from diffad_fast.denoisers import UNET_SIZES, create
from diffad_fast.denoisers.wavelet_unet import Conv1x1, WaveletAttention, WaveletUNet
from diffad_fast.errors import InputError


def randomised(name, channels):
    """A network whose zero-initialised parts are not zero, so that every path matters."""
    torch.manual_seed(0)
    model = create(name, channels).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model


@pytest.mark.parametrize("name, millions", [("unet-tiny", 1), ("unet-small", 6), ("unet-base", 30)])
def test_sizes(name, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in create(name, 64).parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.05)


def test_shapes_and_features():
    model = randomised("unet-tiny", 16)
    x, level = torch.randn(2, 16, 16, 24), torch.tensor([0.0, 1.0])
    assert model(x, level).shape == x.shape
    widths = UNET_SIZES["unet-tiny"]["widths"]
    shapes = [tuple(f.shape) for f in model.features(x, level)]
    assert shapes == [(2, widths[0], 16, 24), (2, widths[1], 8, 12), (2, widths[2], 4, 6)]


def test_starts_at_zero_and_every_parameter_is_trained():
    model = create("unet-small", 4)
    x = torch.randn(2, 4, 16, 16)
    assert not model(x, torch.zeros(2)).any()
    model = randomised("unet-small", 4)
    model(x, torch.zeros(2)).square().mean().backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_the_noise_level_matters_and_samples_do_not_mix():
    model = randomised("unet-tiny", 4)
    x, level = torch.randn(3, 4, 16, 16), torch.tensor([-2.0, 0.5, 3.0])
    with torch.inference_mode():
        together = model(x, level)
        for i in range(3):
            torch.testing.assert_close(model(x[i : i + 1], level[i : i + 1])[0], together[i])
        assert not torch.allclose(model(x, level + 0.5), together, rtol=1e-2)


def test_channels_last_and_float64_agree():
    model = randomised("unet-tiny", 4)
    x, level = torch.randn(2, 4, 16, 16), torch.tensor([-1.0, 1.0])
    exact = model.double()(x.double(), level.double())
    model.float()
    plain = model(x, level)
    model.to(memory_format=torch.channels_last)
    last = model(x.contiguous(memory_format=torch.channels_last), level)
    assert last.is_contiguous(memory_format=torch.channels_last)
    for output in (plain, last):
        torch.testing.assert_close(output.double(), exact, rtol=1e-4, atol=1e-5)


def test_features_are_the_last_block_of_each_resolution():
    model = randomised("unet-small", 4)
    seen = {}
    for level, stage in enumerate(model.encoder):
        stage[-1].register_forward_hook(lambda m, i, o, level=level: seen.update({level: o}))
    model.middle.register_forward_hook(lambda m, i, o: seen.update(middle=o))
    features = model.features(torch.randn(1, 4, 16, 16), torch.zeros(1))
    for feature, key in zip(features, (0, 1, "middle"), strict=True):
        assert torch.equal(feature, seen[key])


def test_attention_is_attention_between_blocks():
    """With all gains 1 the transform cancels: PyTorch's attention over 2x2 blocks of pixels."""
    torch.manual_seed(0)
    model = WaveletAttention(64).double()
    torch.nn.init.normal_(model.projection.weight)
    x = torch.randn(2, 64, 6, 10, dtype=torch.float64)
    qkv = model.qkv(torch.nn.functional.group_norm(x, model.norm.groups))
    heads, d = model.heads, 64 // model.heads
    tokens = torch.nn.functional.pixel_unshuffle(qkv.unflatten(1, (3 * heads, d)), 2)
    q, k, v = tokens.flatten(3).mT.chunk(3, dim=1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = torch.nn.functional.pixel_shuffle(out.mT.unflatten(3, (3, 5)), 2).flatten(1, 2)
    torch.testing.assert_close(model(x), x + model.projection(out))


def test_unknown_name():
    with pytest.raises(InputError, match="'unet-huge'.*unet-tiny"):
        create("unet-huge", 4)


def test_a_1x1_convolution_is_a_product_of_matrices():
    torch.manual_seed(0)
    layer = Conv1x1(12, 20).to(memory_format=torch.channels_last)
    x = torch.randn(2, 12, 5, 7).contiguous(memory_format=torch.channels_last)
    y = layer.product(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, layer.weight, layer.bias))


def test_a_single_image_is_a_product_on_a_cpu_but_not_while_a_program_is_traced(monkeypatch):
    layer, products = Conv1x1(12, 20).to(memory_format=torch.channels_last), []
    product = Conv1x1.product
    monkeypatch.setattr(Conv1x1, "product", lambda *x: (products.append(1), product(*x))[1])
    x = torch.randn(3, 12, 5, 7).contiguous(memory_format=torch.channels_last)
    batch = layer(x)
    assert not products
    torch.testing.assert_close(layer(x[1:2]), batch[1:2])
    assert len(products) == 1
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(layer, (x,), dynamic_shapes=dynamic).module()
    assert len(products) == 1
    torch.testing.assert_close(program(x[:1]), batch[:1])


def test_transforms_of_torch_func():
    """Per-sample gradients, tangents and ensembles, against a loop and finite differences."""
    torch.manual_seed(0)
    net = WaveletUNet(4, (32, 48, 48), 1).double()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, tangent = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)
    level = torch.zeros(3, dtype=torch.float64)
    weights = dict(net.named_parameters())

    def of_one(weights, x, level):
        return functional_call(net, weights, (x[None], level[None]))[0]

    with torch.no_grad():
        torch.testing.assert_close(vmap(of_one, (None, 0, 0))(weights, x, level), net(x, level))
        both, _ = stack_module_state([net, net])
        stacked = vmap(lambda w: functional_call(net, w, (x, level)))(both)
        torch.testing.assert_close(stacked[1], net(x, level))
    each = vmap(grad(lambda *a: of_one(*a).square().sum()), (None, 0, 0))(weights, x, level)
    net(x, level).square().sum().backward()
    for name, p in net.named_parameters():
        difference = (each[name].sum(0) - p.grad).abs().max()
        assert difference <= 1e-11 * (1 + p.grad.abs().max()), name

    _, along = jvp(lambda x: net(x, level), (x,), (tangent,))
    with torch.no_grad():
        step = 1e-5 * tangent
        expected = (net(x + step, level) - net(x - step, level)) / 2e-5
    torch.testing.assert_close(along, expected, rtol=0, atol=1e-9)  # of values of some 0.01


def test_one_product_conditions_all_blocks():
    """As every block's own layer would have it."""
    model = randomised("unet-tiny", 4)
    level = torch.tensor([-1.0, 0.5])
    together = list(model._of_stages(model.conditioning(level)))
    e = model.embedding(level)
    stages = list(model._stages())
    assert len(together) == len(stages)
    for found, stage in zip(together, stages, strict=True):
        torch.testing.assert_close(found, stage.residual.modulation(e))
