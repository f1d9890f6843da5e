"""DiffADFast in anomalib's Engine, on a small tree in the layout of MVTec AD."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("anomalib")

from anomalib.data import Folder  # noqa: E402
from anomalib.deploy import ExportType  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from anomalib.models import get_model  # noqa: E402

from diffad_fast.errors import CheckpointError, InputError  # noqa: E402
from diffad_fast.integrations.anomalib import DiffADFast  # noqa: E402

SIDE = 32
QUICK = {
    "preset": "fast", "image_size": SIDE, "channels": 1, "denoiser": "token-mlp", "train_steps": 30,
    "options": {"tokens": ("cell-8", "patch-16"), "token_width": 32},
}  # fmt: skip


def stripes(rng, broken):
    x = np.arange(SIDE)
    waves = np.sin(x * 0.8 + rng.uniform(0, 6))[None] * np.ones((SIDE, 1))
    image = 128 + 40 * waves + rng.normal(0, 4, (SIDE, SIDE))
    mask = np.zeros((SIDE, SIDE), np.uint8)
    if broken:
        i, j = rng.integers(4, SIDE - 12, 2)
        mask[i : i + 8, j : j + 8] = 255
        image[mask > 0] = rng.choice([20, 230], size=64)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("tree"), np.random.default_rng(0)
    for part, n in (("train/good", 60), ("test/good", 12), ("test/hole", 12)):
        for i in range(n):
            image, mask = stripes(rng, part == "test/hole")
            (root / part).mkdir(parents=True, exist_ok=True)
            image.save(root / part / f"{i:03d}.png")
            if part == "test/hole":
                (root / "ground_truth/hole").mkdir(parents=True, exist_ok=True)
                mask.save(root / "ground_truth/hole" / f"{i:03d}.png")
    return root


def datamodule(tree):
    return Folder(
        name="stripes", root=tree, normal_dir="train/good", abnormal_dir="test/hole",
        normal_test_dir="test/good", mask_dir="ground_truth/hole", train_batch_size=16,
        eval_batch_size=8, num_workers=0, val_split_mode="same_as_test",
    )  # fmt: skip


def engine(folder, **options):
    return Engine(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        barebones=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    model, runner = DiffADFast(**QUICK, visualizer=False), engine(folder)
    runner.fit(model, datamodule=datamodule(tree))
    return model, runner


def answers(model, tree):
    from diffad_fast.data.images import open_images

    paths = sorted(str(p) for p in (tree / "test").rglob("*.png"))
    x = next(open_images(paths, (SIDE, SIDE), 3).batches(64)).x
    with torch.inference_mode():
        return model.eval()(x), x


def test_fit_test_and_predict(fitted, tree):
    model, runner = fitted
    assert model.model.detector.history.loss and model.model.gathered == []
    figures = runner.test(model, datamodule=datamodule(tree))[0]
    assert figures["image_AUROC"] > 0.95 and figures["pixel_AUROC"] > 0.8
    figures = runner.validate(model, datamodule=datamodule(tree))
    batches = runner.predict(model, datamodule=datamodule(tree))
    batch = batches[0]
    assert batch.anomaly_map.shape[-2:] == (SIDE, SIDE) and batch.pred_label is not None
    score = torch.cat([b.pred_score.flatten() for b in batches])
    assert 0 <= float(score.min()) and float(score.max()) <= 1  # their post-processor's scale


def test_a_limit_of_steps_leaves_out_no_training_image(tree, tmp_path, monkeypatch):
    seen, model = [], DiffADFast(**{**QUICK, "train_steps": 2}, visualizer=False)
    assert model.trainer_arguments["max_steps"] == -1
    monkeypatch.setattr(
        type(model.model), "fit", lambda self, device: seen.append(len(torch.cat(self.gathered)))
    )
    engine(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=datamodule(tree))
    assert seen == [60]


def test_a_fit_begins_anew(tree, tmp_path, monkeypatch):
    """Not with the images of an interrupted one, nor with the detector of an earlier one."""
    seen, model = [], DiffADFast(**{**QUICK, "train_steps": 2}, visualizer=False)
    model.model(torch.zeros(7, 3, SIDE, SIDE))  # an interrupted fit
    monkeypatch.setattr(
        type(model.model), "fit", lambda self, device: seen.append(len(torch.cat(self.gathered)))
    )
    for _ in range(2):
        engine(tmp_path, limit_val_batches=0).fit(model, datamodule=datamodule(tree))
    assert seen == [60, 60]


class Own(torch.nn.Module):
    """A denoiser of one's own, or a backbone."""

    def __init__(self, channels):
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, x, log_sigma=None):
        return self.layer(x)


def test_modules_and_a_device_among_the_options(tree, tmp_path):
    denoiser, features = Own(4), Own(1)
    options = {"device": "cpu", "haar_level": 1, "denoiser": denoiser, "features": features}
    given = {**QUICK, "denoiser": None, "train_steps": 2, "options": options}
    model, runner = DiffADFast(**given, visualizer=False), engine(tmp_path)
    before = denoiser.layer.weight.detach().clone()
    runner.fit(model, datamodule=datamodule(tree))
    assert torch.equal(denoiser.layer.weight, before)
    expected = answers(model, tree)[0]
    path = tmp_path / "model.ckpt"
    runner.trainer.save_checkpoint(path)
    again = DiffADFast.load_from_checkpoint(path, options=options)
    torch.testing.assert_close(answers(again, tree)[0].anomaly_map, expected.anomaly_map)
    assert torch.equal(denoiser.layer.weight, before)
    with pytest.raises(CheckpointError, match="denoiser of its own: pass denoiser=module"):
        DiffADFast.load_from_checkpoint(path, options={"denoiser": "unet-tiny", "haar_level": 1})


def test_scores_are_those_of_the_detector(fitted, tree):
    model, _ = fitted
    _, x = answers(model, tree)
    with torch.inference_mode():
        raw = model.model.eval()(x)
    expected = model.model.detector.score(x.mean(dim=1, keepdim=True))
    np.testing.assert_allclose(raw.pred_score.numpy(), expected.score, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(raw.anomaly_map[:, 0].numpy(), expected.map, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_loads_with_weights_only(fitted, tree, tmp_path):
    model, runner = fitted
    path = tmp_path / "model.ckpt"
    runner.trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    again = DiffADFast.load_from_checkpoint(path, map_location="cpu")
    expected, got = answers(model, tree)[0], answers(again, tree)[0]
    torch.testing.assert_close(got.pred_score, expected.pred_score)
    torch.testing.assert_close(got.anomaly_map, expected.anomaly_map)
    other = DiffADFast(**QUICK, visualizer=False)
    figures = engine(tmp_path).test(other, datamodule=datamodule(tree), ckpt_path=path)[0]
    assert figures["image_AUROC"] > 0.95


def test_torch_export(fitted, tree, tmp_path, monkeypatch):
    from anomalib.deploy import TorchInferencer

    model, runner = fitted
    path = runner.export(model, ExportType.TORCH, export_root=tmp_path)
    assert path.exists()
    image = min((tree / "test/hole").glob("*.png"))
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # they unpickle a module
    prediction = TorchInferencer(path, device="cpu").predict(image)
    expected = answers(model, tree)[0].pred_score[12]  # behind the twelve of test/good
    assert float(prediction.pred_score) == pytest.approx(float(expected), abs=1e-4)


def test_onnx_export(fitted, tree, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model, runner = fitted
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    # Loaded again, as from the command line: an export is then what it does first.
    again = DiffADFast.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu")
    path = runner.export(again, ExportType.ONNX, export_root=tmp_path, input_size=(SIDE, SIDE))
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    expected, x = answers(model, tree)
    for n in (1, 5):
        got = dict(zip(names, session.run(None, {"input": x[:n].numpy()}), strict=True))
        for name in ("pred_score", "anomaly_map"):
            np.testing.assert_allclose(
                got[name], getattr(expected, name)[:n].numpy(), rtol=1e-4, atol=1e-4
            )


def test_by_name_and_what_is_wrong(tree):
    model = get_model("diffad_fast", **QUICK)
    assert type(model) is DiffADFast and model.trainer_arguments["max_epochs"] == 1
    assert model.input_size == (SIDE, SIDE)
    with pytest.raises(InputError, match="not fitted: call Engine"):
        model.eval()(torch.zeros(1, 3, SIDE, SIDE))
    with pytest.raises(InputError, match="unknown preset 'quick'"):
        DiffADFast(preset="quick")
    with pytest.raises(InputError, match="no training images"):
        DiffADFast(**QUICK).fit()


@pytest.mark.slow
def test_from_the_command_line(tree, tmp_path):
    code = (
        "import sys, torch\n"
        "if torch.version.cuda is None:\n"
        "    lib = torch.library.Library('torchvision', 'DEF')\n"
        "    for name in ('nms', 'qnms'):\n"
        "        lib.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "from anomalib.cli.cli import main\n"
        "main()"
    )
    options = [
        "--model", "diffad_fast.integrations.anomalib.DiffADFast", "--model.preset", "fast",
        "--model.image_size", str(SIDE), "--model.denoiser", "token-mlp",
        "--model.train_steps", "5", "--data", "anomalib.data.Folder", "--data.name", "stripes",
        "--data.root", str(tree), "--data.normal_dir", "train/good",
        "--data.abnormal_dir", "test/hole", "--data.mask_dir", "ground_truth/hole",
        "--data.num_workers", "0", "--trainer.accelerator", "cpu",
        "--default_root_dir", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "fit", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.rglob("*.ckpt"))
