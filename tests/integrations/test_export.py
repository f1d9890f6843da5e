"""Exported programs against the detector that they came from, and folders for model hubs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import numpy as np
import pytest
import torch
from safetensors import safe_open

import diffad_fast as daf
from diffad_fast import ops
from diffad_fast.errors import CheckpointError, InputError
from diffad_fast.integrations import export as exporting

MODES = ["one_step", "invert", "reconstruct"]
VECTORS = {"kind": "vector", "train_steps": 20, "token_width": 32, "token_blocks": 2}
IMAGES = {
    "tokens": {
        "denoiser": "token-mlp",
        "token_width": 32,
        "tokens": ("energy-8", "spread-2", "patch-16"),
    },
    "unet": {"denoiser": "unet-tiny", "channels": 3, "reverse_steps": 2, "semantic_weight": 0.5},
}


def rows(n, seed):
    return np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)


def images(n, channels, seed):
    shape = (n, channels, 32, 32)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def fitted():
    return daf.Detector(device="cpu", **VECTORS).fit(rows(200, 0))


@pytest.fixture(scope="module", params=IMAGES)
def on_images(request):
    options = IMAGES[request.param]
    detector = daf.Detector(
        image_size=32, preset="fast", train_steps=2, device="cpu", **options
    ).fit(images(140, options.get("channels", 1), 0))  # fmt: skip
    return detector


def compare(got, expected, maps):
    """All the answer; p-values to one rank, should a score lie on one of a held-out sample."""
    np.testing.assert_allclose(got["score"], expected.score, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got["p_value"], expected.p_value, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got["label"], expected.label)
    assert ("map" in got) == maps
    if maps:
        np.testing.assert_allclose(got["map"], expected.map, rtol=1e-4, atol=1e-4)


# One mode of one kind in every run: a trace takes seconds. make test-plugins runs all.
REST = [pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[1:]]


@pytest.mark.parametrize("mode", [MODES[0], *REST])
def test_vectors_in_every_mode(fitted, mode, tmp_path):
    path, before = tmp_path / "model.pt2", fitted.mode
    fitted.export(path, mode=mode)
    assert fitted.mode == before
    program = torch.export.load(path).module()
    fitted.mode = mode
    try:
        for n in (1, 2, 9):  # it was traced with 3
            X = rows(n, n)
            compare(program(torch.from_numpy(X)), fitted.score(X), maps=False)
    finally:
        fitted.mode = before
    far = program(torch.full((1, 5), 50.0))
    assert far["label"].item() == 1 and far["p_value"].item() == pytest.approx(1 / 31)


def test_others_score_meanwhile(fitted, tmp_path, monkeypatch):
    """In their mode, and by the operators of before."""
    X, mode, seen = rows(3, 0), MODES[1], []
    expected, original = fitted.score(X).score, exporting._torch

    def written(*arguments):
        found = fitted.score(X).score
        seen.append((fitted.mode, np.array_equal(found, expected)))
        return original(*arguments)

    trace = torch.export.export

    def traced(*arguments, **options):
        with ThreadPoolExecutor(1) as other:
            seen.append(other.submit(ops.dispatch.selected).result())
        return trace(*arguments, **options)

    monkeypatch.setitem(exporting._WRITERS, "torch", written)
    monkeypatch.setattr(torch.export, "export", traced)
    before = fitted.mode
    fitted.export(tmp_path / "model.pt2", mode=mode)
    assert seen == ["auto", (before, True)]


def test_a_score_that_is_no_number_is_an_anomaly(fitted, monkeypatch):
    program, scores = exporting.ScoringProgram(fitted), torch.tensor([float("nan"), -1e9])
    monkeypatch.setattr(program.model, "score", lambda x: (None, scores))
    assert program(torch.zeros(2, 5))["label"].tolist() == [1, 0]
    assert fitted.conformal.label(scores.numpy()).tolist() == [1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_images_as_bytes(on_images, mode, tmp_path):
    path, before = tmp_path / "model.pt2", on_images.mode
    on_images.export(path, mode=mode, uint8=True)
    program = torch.export.load(path).module()
    on_images.mode = mode
    try:
        for n in (1, 4):
            x = images(n, on_images.config.channels, n)
            compare(program(torch.from_numpy(x)), on_images.score(x), maps=True)
    finally:
        on_images.mode = before


def test_the_program_needs_no_library(fitted, tmp_path):
    path = tmp_path / "model.pt2"
    fitted.export(path)
    code = (
        "import sys, torch, json\n"
        "files = {'diffad_fast.json': ''}\n"
        f"program = torch.export.load({str(path)!r}, extra_files=files).module()\n"
        "print(program(torch.zeros(2, 5))['score'].tolist())\n"
        "print(json.loads(files['diffad_fast.json'])['config'])\n"
        "assert not any(m.startswith('diffad_fast') for m in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    np.testing.assert_allclose(
        json.loads(out[0]), fitted.score(np.zeros((2, 5))).score, rtol=1e-4, atol=1e-4
    )
    assert json.loads(out[1])["kind"] == "vector"


@pytest.mark.slow
def test_compiled_ahead_of_time(fitted, tmp_path):
    path = tmp_path / "model.pt2"
    fitted.export(path, "aoti")
    program = torch._inductor.aoti_load_package(str(path))
    for n in (1, 7):
        X = rows(n, n)
        compare(program(torch.from_numpy(X)), fitted.score(X), maps=False)
    assert json.loads(program.get_metadata()["config"])["kind"] == "vector"


def onnx_session(path):
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("mode", [MODES[0], *REST])
def test_onnx_of_vectors(fitted, mode, tmp_path):
    pytest.importorskip("onnxscript")
    path, before = tmp_path / "model.onnx", fitted.mode
    fitted.export(path, "onnx", mode=mode)
    session = onnx_session(path)
    names = [output.name for output in session.get_outputs()]
    fitted.mode = mode
    try:
        for n in (1, 9):
            X = rows(n, n)
            got = dict(zip(names, session.run(None, {"x": X}), strict=True))
            compare(got, fitted.score(X), maps=False)
    finally:
        fitted.mode = before
    assert json.loads(session.get_modelmeta().custom_metadata_map["config"])["kind"] == "vector"
    assert b"diffad_fast/" not in path.read_bytes()  # no source paths of the exporting machine


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_onnx_of_images(on_images, mode, tmp_path):
    pytest.importorskip("onnxscript")
    path, before = tmp_path / "model.onnx", on_images.mode
    on_images.export(path, "onnx", mode=mode, uint8=True)
    session = onnx_session(path)
    names = [output.name for output in session.get_outputs()]
    on_images.mode = mode
    try:
        for n in (1, 4):
            x = images(n, on_images.config.channels, n)
            got = dict(zip(names, session.run(None, {"x": x}), strict=True))
            compare(got, on_images.score(x), maps=True)
    finally:
        on_images.mode = before


def test_groups_count_once_in_a_program_too():
    grouped = daf.Detector(device="cpu", conformal_share=0.4, **VECTORS)
    grouped.fit(rows(240, 0), groups=[min(i // 2, 60) for i in range(240)])
    assert 20 <= grouped.conformal.groups < len(grouped.conformal.scores)
    X = rows(50, 1)
    with torch.no_grad():
        program = exporting.ScoringProgram(grouped)
        compare(program(torch.from_numpy(X)), grouped.score(X), maps=False)


def test_without_a_threshold_there_is_no_label(fitted):
    few = daf.Detector(device="cpu", **VECTORS).fit(rows(40, 0))
    program = exporting.ScoringProgram(few)
    with torch.no_grad():
        assert set(program(torch.zeros(2, 5))) == {"score", "p_value"}


def test_errors(fitted, tmp_path, monkeypatch):
    audio = daf.Detector(kind="audio", device="cpu")
    monkeypatch.setattr(audio, "_require_fitted", lambda: None)
    with pytest.raises(InputError, match="kind 'audio' are not exported: what decodes"):
        audio.export(tmp_path / "model.pt2")
    with pytest.raises(InputError, match="not fitted"):
        daf.Detector(device="cpu", **VECTORS).export(tmp_path / "model.pt2")
    with pytest.raises(InputError, match="unknown format 'tflite': choose torch, aoti, onnx"):
        fitted.export(tmp_path / "model.pt2", "tflite")
    with pytest.raises(InputError, match="does not end in .pt2"):
        fitted.export(tmp_path / "model.bin")
    with pytest.raises(InputError, match="unknown mode 'two_step'"):
        fitted.export(tmp_path / "model.pt2", mode="two_step")
    with pytest.raises(InputError, match="uint8 is for images"):
        fitted.export(tmp_path / "model.pt2", uint8=True)
    with pytest.raises(InputError, match="cannot write"):
        fitted.export(tmp_path / "nowhere" / "model.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="needs onnxscript: .*diffad_fast.plugins"):
        fitted.export(tmp_path / "model.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_features_of_a_module(tmp_path):
    class Backbone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = torch.nn.Conv2d(1, 4, 3, stride=4, padding=1)

        def forward(self, x):
            return self.convolution(x)

    options = {"image_size": 32, "train_steps": 1, "tokens": ("features",), "device": "cpu"}
    detector = daf.Detector(**options, features=Backbone()).fit(images(140, 1, 0))
    detector.export(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    for n in (1, 5):
        x = images(n, 1, n)
        compare(program(torch.from_numpy(x).float() / 255), detector.score(x), maps=True)


def test_a_denoiser_for_batches_of_one_length(tmp_path):
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, log_sigma):
            return torch.stack([self.scale * image for image in x])

    options = {"image_size": 32, "train_steps": 1, "map_weights": (1, 0, 1), "device": "cpu"}
    detector = daf.Detector(**options, denoiser=Fixed()).fit(images(140, 1, 0))
    with pytest.raises(InputError, match="cannot be traced for batches of any length"):
        detector.export(tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_scores_differently_is_not_written(fitted, tmp_path, monkeypatch):
    real = exporting.ScoringProgram.forward

    def wrong(self, x):
        result = real(self, x)
        return {**result, "score": result["score"] + 1e-2}

    monkeypatch.setattr(exporting.ScoringProgram, "forward", wrong)
    with pytest.raises(RuntimeError, match="differ by 0.01"):
        fitted.export(tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------- hubs


def test_a_folder_for_a_hub(fitted, tmp_path):
    folder = tmp_path / "new" / "model"
    fitted.save_pretrained(folder, data="200 rows of white noise.")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["library_name"] == "diffad_fast" and config["token_width"] == 32
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffad_fast\n")
    assert "200 rows of white noise." in card
    assert f"| one_step (default) | 30 | 30 | {fitted.conformal.threshold:.4g} | 0.05 |" in card
    again = daf.Detector.from_pretrained(folder, device="cpu")
    np.testing.assert_array_equal(again.score(rows(5, 1)).score, fitted.score(rows(5, 1)).score)


def test_an_edited_card_stays_and_another_one_is_written_anew(fitted, tmp_path, recwarn):
    card = tmp_path / "README.md"
    fitted.save_pretrained(tmp_path)
    assert 'from_pretrained("this folder or repository")' in card.read_text()
    fitted.save_pretrained(tmp_path, data="Noise.", repo_id="me/tiles")
    assert "Noise." in card.read_text() and 'from_pretrained("me/tiles")' in card.read_text()
    assert not recwarn
    for edited in (card.read_text().replace("Noise", "Nuts"), "# Of mine\n", ""):
        card.write_text(edited)
        with pytest.warns(UserWarning, match=r"README\.md was edited, or is of an"):
            fitted.save_pretrained(tmp_path, data="Noise.")
        assert card.read_text() == edited


def test_from_a_hub(fitted, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    fitted.save_pretrained(tmp_path)
    asked = []

    def download(name, file, **options):
        asked.append((name, file, options))
        return tmp_path / file

    monkeypatch.setattr(hub, "hf_hub_download", download)
    again = daf.Detector.from_pretrained("someone/tiles", revision="v1", device="cpu")
    assert asked == [("someone/tiles", "model.safetensors", {"revision": "v1"})]
    np.testing.assert_array_equal(again.score(rows(5, 1)).score, fitted.score(rows(5, 1)).score)


def test_to_a_hub(fitted, tmp_path, monkeypatch):
    """Against a hub that keeps files in a folder, called as its methods' signatures say."""
    hub = pytest.importorskip("huggingface_hub")
    kept = tmp_path / "hub"
    calls = []

    def create_repo(self, *args, **options):
        real["create_repo"].bind(self, *args, **options)
        calls.append((self.token, args, options))
        return hub.RepoUrl(f"https://huggingface.co/me/{args[0].split('/')[-1]}")

    def upload_folder(self, **options):
        real["upload_folder"].bind(self, **options)
        target = kept / options["repo_id"]
        shutil.copytree(options.pop("folder_path"), target, dirs_exist_ok=True)
        calls.append(options)
        return "https://huggingface.co/me/tiles/commit/1"

    def hf_hub_download(self, *args, **options):
        real["hf_hub_download"].bind(self, *args, **options)
        return str(kept / args[0] / args[1])

    def file_exists(self, *args, **options):
        real["file_exists"].bind(self, *args, **options)
        return (kept / args[0] / args[1]).exists()

    names = ("create_repo", "upload_folder", "hf_hub_download", "file_exists")
    real = {name: signature(getattr(hub.HfApi, name)) for name in names}
    monkeypatch.setattr(hub.HfApi, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(hub.HfApi, "file_exists", file_exists)
    monkeypatch.setattr(hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload_folder)
    address = fitted.push_to_hub("tiles", data="Noise.", private=True, token="hf_1", branch="dev")
    assert address == "https://huggingface.co/me/tiles/commit/1"
    assert calls[0] == ("hf_1", ("tiles",), {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/tiles" and calls[1]["revision"] == "dev"
    again = daf.Detector.from_pretrained(kept / "me" / "tiles", device="cpu")
    np.testing.assert_array_equal(again.score(rows(5, 1)).score, fitted.score(rows(5, 1)).score)
    card = kept / "me" / "tiles" / "README.md"
    assert "Noise." in card.read_text() and 'from_pretrained("me/tiles")' in card.read_text()

    # As PyTorchModelHubMixin: saved and pushed in one call, named after the folder.
    assert fitted.save_pretrained(tmp_path / "mine", push_to_hub=True, create_pr=True) == address
    assert calls[3]["repo_id"] == "me/mine" and calls[3]["create_pr"] is True
    assert (tmp_path / "mine" / "config.json").is_file()
    with pytest.raises(TypeError, match="private: only for push_to_hub=True"):
        fitted.save_pretrained(tmp_path / "mine", private=True)
    with pytest.raises(InputError, match="not fitted"):
        daf.Detector(device="cpu", **VECTORS).push_to_hub("me/none")
    assert len(calls) == 4

    fitted.push_to_hub("me/tiles", data="More noise.")
    assert "More noise." in card.read_text()
    card.write_text("# Edited there\n")
    with pytest.warns(UserWarning, match=r"me/tiles/README\.md was edited, or is of an"):
        fitted.push_to_hub("me/tiles")
    assert card.read_text() == "# Edited there\n"
    (tmp_path / "tiles" / "README.md").parent.mkdir()
    (tmp_path / "tiles" / "README.md").write_text("# Edited here\n")
    with pytest.warns(UserWarning, match=r"tiles/README\.md was edited, or is of an"):
        fitted.save_pretrained(tmp_path / "tiles", push_to_hub=True)
    assert card.read_text() == "# Edited here\n"


def test_errors_of_hub_folders(fitted, tmp_path):
    with pytest.raises(InputError, match="neither a folder nor the name of a repository"):
        daf.Detector.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="there is no file .*model.safetensors"):
        daf.Detector.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        fitted.save_pretrained(tmp_path / "file" / "model")
    with pytest.raises(InputError, match="not fitted"):
        daf.Detector(device="cpu", **VECTORS).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
