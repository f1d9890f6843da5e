"""The U-Net as one operator: the bits of its modules, called one by one, wherever it serves."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

from diffad_fast import use_backend
from diffad_fast.denoisers import whole
from diffad_fast.denoisers.wavelet_unet import WaveletUNet
from diffad_fast.ops import dispatch

pytestmark = pytest.mark.native
LAST = torch.channels_last


def unet(channels=16, widths=(16, 48, 32), blocks=2, seed=0):
    """Every weight random: none is zero, so that every path matters."""
    torch.manual_seed(seed)
    net = WaveletUNet(channels, widths, blocks).eval().to(memory_format=LAST)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.2)
    return net


def inputs(n=2, channels=16, height=32, width=40):
    torch.manual_seed(1)
    x = torch.randn(n, channels, height, width).to(memory_format=LAST)
    return x, torch.linspace(-2, 2, n)


@pytest.fixture
def calls(monkeypatch):
    """How often the operator served, in a list of one number."""
    count, evaluation = [0], whole.evaluation

    def counted(*args, **options):
        found = evaluation(*args, **options)
        count[0] += found is not None
        return found

    monkeypatch.setattr(whole, "evaluation", counted)
    return count


def by_modules(function, *args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "evaluation", lambda *args, **options: None)
        return function(*args)


def error(got, expected):
    """Of the largest value."""
    return (got - expected).abs().amax() / expected.abs().amax()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "channels, widths, blocks, n, size",
    [
        (16, (16, 48, 32), 2, 2, (32, 40)),
        (48, (80, 128, 128), 1, 1, (32, 32)),
        (16, (32, 32, 64), 3, 3, (64, 24)),
        # The outer convolutions are PyTorch's.
        (1, (16, 16, 32), 1, 1, (32, 48)),
        (12, (16, 48, 32), 1, 2, (32, 32)),
    ],
)
@torch.no_grad()
def test_the_bits_are_those_of_the_modules(
    calls, cpu_isa, threads, channels, widths, blocks, n, size
):
    net, (x, level) = unet(channels, widths, blocks), inputs(n, channels, *size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = [net(x, level), *net.features(x, level)]
        assert calls == [2]
        modules = by_modules(net, x, level), *by_modules(net.features, x, level)
    finally:
        torch.set_num_threads(before)
    for ours, expected in zip(got, modules, strict=True):
        assert ours.stride() == expected.stride()
        if n == 1:
            assert torch.equal(ours, expected)
        else:  # PyTorch has another convolution of 1x1 for several images
            assert error(ours, expected) < 2e-6
    net.double()
    exact = by_modules(net, x.double(), level.double())
    assert error(got[0], exact) < 5e-6  # measured: 1.7e-6


@torch.no_grad()
def test_views_of_what_a_reverse_process_holds(calls):
    """A level's conditioning for all samples; images and weights within larger tensors."""
    net, (x, _) = unet(), inputs(3)
    for p in net.parameters():
        p.data = torch.cat([torch.full_like(p, torch.nan).flatten(), p.flatten()])[
            p.numel() :
        ].as_strided(p.shape, p.stride(), p.numel())
    levels = net.conditioning(torch.tensor([-1.0, 0.3, 2.0]))
    for level in levels:
        conditioning = level.expand(3, -1)
        several = torch.cat([x + torch.nan, x]).contiguous(memory_format=LAST)[3:]
        got = net.denoise(several, conditioning)
        # For a single image the bits are those of the modules.
        for i in range(3):
            expected = by_modules(net.denoise, x[i : i + 1], conditioning[:1])
            assert torch.equal(net.denoise(several[i : i + 1], conditioning[i : i + 1]), expected)
            assert error(got[i : i + 1], expected) < 2e-6
    assert calls == [12]


def served(net, x, level, calls):
    """The output, which has to be that of the modules, and whether the operator gave it."""
    calls[0] = 0
    got = net(x, level)
    assert torch.equal(got, by_modules(net, x, level))
    return got, bool(calls[0])


@torch.no_grad()
def test_it_follows_what_is_done_to_the_network(calls):
    net, (x, level) = unet(), inputs(1)

    def changed(before):
        now, by_operator = served(net, x, level, calls)
        assert by_operator and not torch.equal(now, before)
        return now

    y, by_operator = served(net, x, level, calls)
    assert by_operator
    known = whole._known[net]
    net(x, level)
    assert whole._known[net] is known  # not made anew for each call
    net.middle.residual.conv1.weight.mul_(1.5)
    y = changed(y)
    net.conv_out.bias.data = torch.ones(16)
    y = changed(y)
    net.encoder[0][0].residual.norm1.weight = nn.Parameter(torch.full((16,), 0.5))
    y = changed(y)
    net.decoder[0] = copy.deepcopy(unet(seed=5).decoder[0])
    y = changed(y)
    net.load_state_dict(unet(seed=6).state_dict())
    y = changed(y)
    net.load_state_dict(unet(seed=7).state_dict(), assign=True)
    y = changed(y)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(net.parameters(), lr=0.1, fused=True).step()  # without a new version
    y = changed(y)
    twin = copy.deepcopy(net)
    twin.conv_out.bias.add_(1)
    assert torch.equal(net(x, level), y)
    torch.testing.assert_close(twin(x, level), y + 1)


def _or_error(net, x, level):
    try:
        return net(x, level)
    except Exception as error:  # of the modules, whatever it is
        return str(error)


@torch.no_grad()
def test_modules_are_called_where_they_may_do_something_else(calls):
    net, (x, level) = unet(), inputs(1)
    assert served(net, x, level, calls)[1]
    seen = []
    hook = net.middle.residual.conv1.register_forward_hook(lambda *_: seen.append(1))
    assert not served(net, x, level, calls)[1] and len(seen) == 2
    hook.remove()
    assert served(net, x, level, calls)[1]
    hook = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        assert not served(net, x, level, calls)[1]
    finally:
        hook.remove()

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(net.conv_in, "weight", Doubled())
    assert not served(net, x, level, calls)[1]
    parametrize.remove_parametrizations(net.conv_in, "weight", leave_parametrized=False)

    class Other(type(net.conv_out)):
        pass

    net.conv_out = Other(16, 16)
    assert not served(net, x, level, calls)[1]
    for change in (
        lambda net: setattr(net.conv_in, "forward", lambda x: x),
        lambda net: setattr(net.middle, "attention", nn.Identity()),
        lambda net: net.encoder[0].append(copy.deepcopy(net.encoder[0][1])),
        lambda net: setattr(net.norm_out, "bias", None),
    ):
        net = unet()
        change(net)
        calls[0] = 0
        got = _or_error(net, x, level)
        assert calls == [0]
        expected = by_modules(_or_error, net, x, level)
        assert got == expected if isinstance(got, str) else torch.equal(got, expected)


def test_where_it_does_not_serve(calls):
    net, (x, level) = unet(), inputs(1)
    assert net(x, level).requires_grad and calls == [0]
    with torch.no_grad():
        net(x.contiguous(), level)
        with torch.autocast("cpu", torch.bfloat16):
            net(x, level)
        with use_backend("reference"):
            net(x, level)
        net(x[:, :, :16, :16].contiguous(memory_format=LAST), level)  # tiles too few
        net(x[:0], level[:0])
        assert not torch.func.vmap(lambda y: y * dispatch.takes_cpp(y))(x).any()
        copy.deepcopy(net).double()(x.double(), level.double())
        torch.compile(net, fullgraph=True, backend="eager")(x, level)
        assert calls == [0]
        with use_backend("cpu"):
            net(x, level)
        assert calls == [1]
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = net(torch.empty(1, 16, 32, 40).to(memory_format=LAST), torch.empty(1))
        assert fake.shape == x.shape and calls == [1]
        assert torch.equal(by_modules(net, x, level), net(x, level))  # nothing of it was kept
        assert calls == [2]
    with torch.inference_mode():
        made_here = unet()  # no versions
        made_here(x, level)
    assert calls == [2]


@torch.no_grad()
def test_opcheck_and_what_the_bare_operator_refuses():
    net, (x, level) = unet(), inputs(2)
    known = whole.WholeUNet(net)
    op = torch.ops.diffad_fast.wavelet_unet.default
    conditioning = net.conditioning(level)
    arguments = x, conditioning, known.weights, known.groups, net.widths, net.blocks
    for features in (False, True):
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(op, (*arguments, features), test_utils=tests)
    wrong = {
        0: [x.double(), x.contiguous(), x[0], x[:, :15].contiguous(memory_format=LAST)],
        1: [conditioning[:1], conditioning[:, :-1], conditioning.double()],
        2: [known.weights[:-1], [w.double() for w in known.weights], known.weights[1:]],
        3: [known.groups[:-1], [7] * len(known.groups)],
        4: [(16, 48, 48), ()],
        5: [3, 0],
    }
    for place, values in wrong.items():
        for value in values:
            given = [value if i == place else a for i, a in enumerate(arguments)]
            with pytest.raises(RuntimeError):
                op(*given, False)
