"""YAMNet against its PyTorch port and ONNX Runtime. Their weights are drawn here: the net that has
the pretrained ones is away."""

from __future__ import annotations

import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

import diffad_fast as daf
from diffad_fast import cli
from diffad_fast.errors import InputError
from diffad_fast.integrations.yamnet import LAYERS, YAMNet


@pytest.fixture(scope="module")
def port():
    """The network of torch_vggish_yamnet, whose module wants torchaudio for a spectrogram that is
    not used here, with weights and statistics that keep every layer alive."""
    with pytest.MonkeyPatch.context() as patch:
        transforms = types.ModuleType("torchaudio.transforms")
        transforms.MelSpectrogram = torch.nn.Module
        patch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
        patch.setitem(sys.modules, "torchaudio.transforms", transforms)
        network = pytest.importorskip("torch_vggish_yamnet.yamnet").yamnet(pretrained=False)
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def state(port, tmp_path_factory):
    path = tmp_path_factory.mktemp("yamnet") / "yamnet.pth"
    torch.save(port.state_dict(), path)
    return path


def test_equals_its_port(port, state):
    network, waves = YAMNet(state), 0.1 * torch.randn(5, YAMNet.samples)
    with torch.inference_mode():
        expected = port(network.spectrogram(waves)[:, None])[0].flatten(1)
        found = network(waves)
    assert found.shape == (5, 1024) and expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_equals_onnx_runtime(port, state, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Convolutions(torch.nn.Module):
        """The port with its normalisations folded by PyTorch."""

        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleList()
            for layer in (getattr(port, name) for name in port.layer_names):
                self.parts += [fuse_conv_bn_eval(part.conv, part.bn) for part in layer.children()]

        def forward(self, x):
            for part in self.parts:
                # Its convolutions call the ones that they were copied from.
                part.forward_func = lambda x, padding, part=part: torch.nn.functional.conv2d(
                    x, part.weight, part.bias, part.stride, padding, groups=part.groups
                )
                x = part(x).relu()
            return x.mean(dim=(2, 3))

    path, network = tmp_path / "yamnet.onnx", YAMNet(state)
    x = network.spectrogram(0.1 * torch.randn(1, YAMNet.samples))[:, None]
    torch.onnx.export(Convolutions().eval(), (x,), path, dynamo=True, external_data=False)
    session = onnxruntime.InferenceSession(path)
    (expected,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    read = YAMNet(path)
    with torch.inference_mode():
        found = read.layers(x).mean(dim=(2, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_quantised_weights_are_numbers(state, tmp_path):
    """One convolution's weight as 8-bit integers, one as what is quantised and back."""
    onnx = pytest.importorskip("onnx")
    make, network = onnx.helper, YAMNet(state)
    layers = [c for c in network.layers if isinstance(c, torch.nn.Conv2d)]
    nodes, constants, expected = [], [], []
    for i, layer in enumerate(layers):
        weight, names = layer.weight.numpy().copy(), (f"w{i}", f"b{i}")
        if i == 0:
            scale = np.abs(weight).max(axis=(1, 2, 3)) / 127
            whole = np.rint(weight / scale[:, None, None, None]).astype(np.int8)
            weight = whole * scale[:, None, None, None].astype(np.float32)
            zero = np.zeros(len(scale), np.int8)
            values = {"q0": whole, "s0": scale.astype(np.float32), "z0": zero}
            constants += [onnx.numpy_helper.from_array(v, k) for k, v in values.items()]
            nodes.append(make.make_node("DequantizeLinear", ["q0", "s0", "z0"], ["w0"], axis=0))
        elif i == 1:
            values = {"f1": weight, "s1": np.float32(0.1), "z1": np.int8(0)}
            constants += [onnx.numpy_helper.from_array(np.array(v), k) for k, v in values.items()]
            nodes.append(make.make_node("QuantizeLinear", ["f1", "s1", "z1"], ["q1"]))
            nodes.append(make.make_node("DequantizeLinear", ["q1", "s1", "z1"], ["w1"]))
        else:
            constants.append(onnx.numpy_helper.from_array(weight, names[0]))
        constants.append(onnx.numpy_helper.from_array(layer.bias.numpy(), names[1]))
        nodes.append(make.make_node("Conv", [f"x{i}", *names], [f"x{i + 1}"]))
        expected.append(torch.from_numpy(weight))
    onnx.save(make.make_model(make.make_graph(nodes, "g", [], [], constants)), tmp_path / "q.onnx")
    found = [c.weight for c in YAMNet(tmp_path / "q.onnx").layers if isinstance(c, torch.nn.Conv2d)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_the_spectrogram_against_float64(state):
    wave = np.random.default_rng(0).normal(size=YAMNet.samples) * 0.1
    found = YAMNet(state).spectrogram(torch.from_numpy(wave).float()[None])[0]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([wave[160 * k : 160 * k + 400] * hann for k in range(96)])
    magnitude = abs(np.fft.rfft(frames, 512))
    mels = 1127 * np.log1p(np.arange(257) * 16000 / 512 / 700)
    low, high = (1127 * np.log1p(f / 700) for f in (125, 7500))
    width = (high - low) / 65
    expected = np.empty((96, 64))
    for band in range(64):
        # A triangle is 1 less the distance to its middle in units of its half width.
        weight = np.clip(1 - abs(mels - low - (band + 1) * width) / width, 0, None)
        expected[:, band] = np.log(magnitude @ weight + 0.001)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_in_a_detector(state, tmp_path, monkeypatch):
    """By name, with the weights in PyTorch Hub's folder."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "yamnet.pth").write_bytes(state.read_bytes())
    rng = np.random.default_rng(0)
    waves = [rng.normal(size=48000).astype(np.float32) * 0.1 for _ in range(12)]
    detector = daf.Detector(kind="audio", features="yamnet", preset="fast", train_steps=3)
    found = detector.fit(waves).score(waves[:2])
    assert np.isfinite(found.score).all()
    assert "audio: semantic" in detector.model.map_names
    detector.save(tmp_path / "d.diffad")
    again = daf.load(tmp_path / "d.diffad").score(waves[:2])
    np.testing.assert_array_equal(again.score, found.score)


def test_a_file_of_weights_in_place_of_the_name(tmp_path, capsys):
    """Also from a shell; a detector's file names it, and is read where it is."""
    soundfile = pytest.importorskip("soundfile")
    rng, weights, before = np.random.default_rng(0), tmp_path / "y:amnet.pth", 1
    state = {}
    for i, (width, _) in enumerate(LAYERS, 1):
        own = {"depthwise_conv": (before, 1, 3), "pointwise_conv": (width, before, 1)}
        for name, (out, into, side) in (own if i > 1 else {"fused": (width, 1, 3)}).items():
            kernel = torch.randn(out, into, side, side) / (into * side * side) ** 0.5
            state[f"layer{i}.{name}.conv.weight"] = kernel
            for part, value in (("weight", 1.4), ("bias", 0.1), ("running_mean", 0.0)):
                state[f"layer{i}.{name}.bn.{part}"] = torch.full((out,), value)
            state[f"layer{i}.{name}.bn.running_var"] = torch.ones(out)
        before = width
    torch.save(state, weights)
    for i in range(8):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(17_600), 16000)
    (tmp_path / "c.json").write_text('{"window_frames": 64, "window_step": 64, "train_steps": 2}')
    model, out = str(tmp_path / "m.diffad"), str(tmp_path / "out")
    fit = ["fit", str(tmp_path), "--kind", "audio", "--preset", "fast"]
    fit += ["--config", str(tmp_path / "c.json"), "--features", str(weights), "--out", model]
    assert cli.main(fit) == 0
    assert cli.main(["score", model, str(tmp_path / "0.wav"), "--out", out, "--no-maps"]) == 0
    detector = daf.load(model)
    assert isinstance(detector.model.embedding.backbone, YAMNet)
    other = daf.Detector(kind="audio", features=weights).model.embedding.backbone
    assert torch.equal(other.layers[-2].weight[0], 1.4 / 1.0001**0.5 * kernel[0])
    backbone = YAMNet(weights)
    weights.unlink()
    assert cli.main(["score", model, str(tmp_path / "0.wav"), "--out", out, "--no-maps"]) == 2
    assert "'yamnet' or a file of its weights, which must be there" in capsys.readouterr().err
    again = daf.load(model, features=backbone)
    np.testing.assert_array_equal(
        again.score(str(tmp_path / "1.wav")).score, detector.score(str(tmp_path / "1.wav")).score
    )


def test_weights_that_cannot_be_used(state, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="there is no file of YAMNet's weights at"):
        YAMNet(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="text.pth is not a state of YAMNet"):
        YAMNet(tmp_path / "text.pth")
    other = torch.load(state)
    other["layer3.pointwise_conv.conv.weight"] = torch.zeros(100, 64, 1, 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        other[f"layer3.pointwise_conv.bn.{name}"] = torch.zeros(100)
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(InputError, match="holds another network than YAMNet: its 27 convolutions"):
        YAMNet(tmp_path / "other.pth")

    def away(*args, **options):
        raise urllib.error.URLError("no net")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", away)
    with pytest.raises(InputError, match="YAMNet's weights cannot be fetched .*no net.*put http"):
        daf.Detector(kind="audio", features="yamnet")


def test_graphs_that_are_no_yamnet(tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(InputError, match="text.onnx is not an ONNX graph"):
        YAMNet(tmp_path / "text.onnx")
    weight = onnx.numpy_helper.from_array(np.zeros((32, 1, 3, 3), np.float32), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [], [weight])
    path = tmp_path / "plain.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(InputError, match="convolutions without a bias: fold the batch norm"):
        YAMNet(path)
    node = onnx.helper.make_node("Conv", ["x", "v", "w"], ["y"])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], [weight])), path)
    with pytest.raises(InputError, match="convolutions whose weights are no constants"):
        YAMNet(path)
