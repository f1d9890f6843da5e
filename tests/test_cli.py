from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffad_fast as daf
from diffad_fast import cli
from diffad_fast.cli import _duration, _size, main
from diffad_fast.data import demo, images
from diffad_fast.errors import InputError, Terminated
from diffad_fast.report.audio import ClipPage
from diffad_fast.report.text import evaluation_text, printable

# Enough held-out normals for labels, and little else.
OPTIONS = {"conformal_share": 0.5, "reverse_steps": 2, "warmup_steps": 2}
FAST = ("--image-size", "32", "--denoiser", "unet-tiny", "--batch-size", "8", "--device", "cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set in the MVTec AD layout: 44 training images, 6 good and 12 defective ones."""
    folder = tmp_path_factory.mktemp("data")
    demo.write_data(
        folder / "tiles", folder / "null", texture="gravel", side=32, train=44, test=2, seed=0
    )
    return folder / "tiles"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "options.json"
    path.write_text(json.dumps(OPTIONS))
    return str(path)


@pytest.fixture(scope="module")
def model(root, config, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.diffad"
    assert main(["fit", str(root), "--out", str(path), "--config", config, "--steps=5", *FAST]) == 0
    return path


@pytest.fixture
def good(root, tmp_path):
    """A copy of the training images that a test may add files to."""
    return Path(shutil.copytree(root / "train" / "good", tmp_path / "good"))


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def fails(tmp_path, capsys):
    """Run a command that must fail as promised: one sentence, status 2, nothing left behind."""

    def run(*argv, names):
        before = tree(tmp_path)
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), err
        for name in names:
            assert str(name) in lines[0]
        assert out == ""
        assert tree(tmp_path) == before
        return err

    return run


def truncate(source, target):
    Image.open(source).resize((64, 64)).save(target, format="jpeg")
    target.write_bytes(target.read_bytes()[:-400])
    return target


def write_bomb(path):
    """A PNG whose header promises 30000 x 30000 pixels."""
    Image.new("L", (40, 40)).save(path, format="png")
    content = bytearray(path.read_bytes())
    content[16:24] = (30000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def write_nan(path):
    values = np.random.default_rng(0).random((40, 40)).astype(np.float32)
    values[3, 3] = np.nan
    Image.fromarray(values).save(path)


def rows(folder):
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------- the way it should go


def test_fit_says_what_it_did_and_leaves_one_file(root, config, tmp_path, capsys):
    out = tmp_path / "m.diffad"
    argv = ["fit", str(root), "--out", str(out), "--config", config, "--steps", "4", *FAST]
    assert main(argv) == 0
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    (line,) = stderr.splitlines()
    # 44 groups: shares of 5%, 10% and 50% are held out.
    assert line.startswith("trained on 16 of 44 images, held out 2 for validation, 4 for stat")
    assert "22 for p-values" in line and "validation loss" in line and str(out) in line
    assert tree(tmp_path) == ["m.diffad", "m.diffad.csv"]
    fitted = daf.load(out, device="cpu")
    assert fitted.config.train_steps == 4 and len(fitted.conformal.scores) == 22


def test_options_override_the_file_that_overrides_the_preset(root, tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({**OPTIONS, "train_steps": 2, "seed": 3, "image_size": [32, 48]}))
    out = tmp_path / "m.diffad"
    argv = ["fit", root, "--out", out, "--config", path, "--seed", 5, "--denoiser", "unet-tiny"]
    assert main([str(a) for a in [*argv, "--preset", "best", "--device", "cpu"]]) == 0
    config = daf.load(out).config
    assert config.seed == 5 and config.train_steps == 2 and config.image_size == (32, 48)
    assert config.preset == "best" and config.reverse_steps == OPTIONS["reverse_steps"]
    path.write_text(json.dumps({**OPTIONS, "train_budget": "1h"}))
    argv = ["fit", root, "--out", out, "--config", path, "--steps", 3, *FAST]
    assert main([str(a) for a in argv]) == 0
    config = daf.load(out).config
    assert (config.train_steps, config.train_budget) == (3, None)


def test_group_regex_keeps_groups_apart(good, config, tmp_path, capsys):
    for path in sorted(good.iterdir()):
        path.rename(good / f"tile{int(path.stem) // 2:02}_{path.name}")
    out = tmp_path / "m.diffad"
    argv = ["fit", good, "--out", out, "--config", config, "--steps", 1, *FAST]
    assert main([str(a) for a in [*argv, "--group-regex", r"tile(\d+)_"]]) == 0
    # 22 groups of two images, of which 11 calibrate.
    conformal = daf.load(out).conformal
    assert (conformal.groups, len(conformal.scores)) == (11, 22)
    assert f"; {conformal.why_no_label()}; saved as {out}" in capsys.readouterr().err
    argv = ["score", out, good, "--out", tmp_path / "out", "--no-maps"]
    assert main([str(a) for a in argv]) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: label is None") and "20" in warning
    assert {row["label"] for row in rows(tmp_path / "out")} == {""}


def test_score_writes_what_the_detector_says(model, root, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert main(["score", str(model), str(root / "test"), "--out", str(out)]) == 0
    expected = daf.load(model).score(root / "test")
    written = rows(out)
    assert [row["path"] for row in written] == expected.paths
    # CSV keeps every digit.
    assert [float(row["score"]) for row in written] == expected.score.tolist()
    assert [float(row["p_value"]) for row in written] == expected.p_value.tolist()
    assert [int(row["label"]) for row in written] == expected.label.tolist()
    names = [str(Path(path).relative_to(root / "test")) for path in expected.paths]
    assert sorted(n for n in tree(out / "heatmaps") if n.endswith(".png")) == sorted(names)
    with Image.open(out / "heatmaps" / names[0]) as image:
        assert image.size == (32, 32) and image.mode == "RGB"

    # Again: its own files are replaced, others stay, and in batches of any size nothing changes.
    first = {path: (out / path).read_bytes() for path in tree(out) if path.endswith(".png")}
    (out / "notes.txt").write_text("mine")
    (out / "heatmaps" / "old.png").write_text("of another run")
    argv = ["score", str(model), str(root / "test"), "--out", str(out), "--batch-size", "16"]
    assert main(argv) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert {path for path in tree(out) if path.endswith(".png")} == first.keys()
    again = [float(row["score"]) for row in rows(out)]
    np.testing.assert_allclose(again, expected.score, rtol=1e-5)
    assert capsys.readouterr().err == ""


def test_score_of_one_image_without_maps(model, root, tmp_path):
    image = root / "test" / "good" / "000.png"
    out = tmp_path / "out"
    assert main(["score", str(model), str(image), "--out", str(out), "--no-maps"]) == 0
    assert tree(out) == ["scores.csv"]
    assert main(["score", str(model), str(image), "--out", str(out)]) == 0
    assert tree(out) == ["heatmaps", "heatmaps/000.png", "scores.csv"]
    assert main(["score", str(model), str(image), "--out", str(out), "--no-maps"]) == 0
    assert tree(out) == ["scores.csv"]


def test_every_image_is_read_once_and_has_its_own_heatmap(model, tmp_path, monkeypatch):
    data, read = tmp_path / "data", []
    data.mkdir()
    for i, name in enumerate(["a.jpg", "a.jpg.png", "a.jpg.png.png", "a.png", "b.c.png", "d.bmp"]):
        values = np.random.default_rng(i).integers(0, 256, (32, 32), dtype=np.uint8)
        Image.fromarray(values).save(data / name)
    one = images.read_image
    monkeypatch.setattr(images, "read_image", lambda p, *how: read.append(p) or one(p, *how))
    argv = ["score", str(model), str(data), "--out", str(tmp_path / "out"), "--batch-size", "4"]
    assert main(argv) == 0
    assert sorted(read) == sorted(str(path) for path in data.iterdir())
    pictures = tree(tmp_path / "out" / "heatmaps")
    assert pictures == ["a.jpg.png", "a.jpg.png.png", "a.jpg.png.png.png", "a.png", "b.c.png",
                        "d.bmp.png"]  # fmt: skip
    for name in ("a.png", "a.jpg", "a.jpg.png"):  # what a picture is called, no neighbour decides
        out = tmp_path / f"of {name}"
        assert main(["score", str(model), str(data / name), "--out", str(out)]) == 0
        (found,) = (out / "heatmaps").iterdir()
        assert found.read_bytes() == (tmp_path / "out" / "heatmaps" / found.name).read_bytes()


def test_heatmaps_of_images_with_the_longest_names(model, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for last in "ab":
        Image.linear_gradient("L").save(data / f"{250 * 'x'}{last}.jpg")
    assert main(["score", str(model), str(data), "--out", str(out)]) == 0
    assert len(rows(out)) == len(list((out / "heatmaps").glob("*.png"))) == 2


def test_score_in_another_mode(model, root, tmp_path):
    argv = ["score", str(model), str(root / "test" / "good"), "--out", str(tmp_path), "--no-maps"]
    assert main([*argv, "--mode", "invert"]) == 0
    detector = daf.load(model)
    assert detector.mode != "invert"
    detector.mode = "invert"
    expected = detector.score(root / "test" / "good").score
    assert [float(row["score"]) for row in rows(tmp_path)] == expected.tolist()


def test_evaluate_json_is_one_object_of_finite_numbers(model, root, tmp_path, capsys):
    report = tmp_path / "report"
    argv = ["evaluate", str(model), str(root), "--json", "--mode", "reconstruct"]
    assert main([*argv, "--report", str(report)]) == 0
    out, _ = capsys.readouterr()
    metrics = json.loads(out)
    names = ("image_auroc", "pixel_auroc", "aupro", "f1_max", "latency_ms")
    assert all(math.isfinite(metrics[name]) for name in names)
    assert len(metrics["per_defect"]) == 6
    for row in metrics["per_defect"].values():
        assert all(math.isfinite(row[name]) for name in names[:-1])
    assert tree(report) == ["index.html"]


def test_evaluate_prints_a_table(model, root, capsys):
    assert main(["evaluate", str(model), str(root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["defect", "images"]
    assert [line.split()[:2] for line in lines[1:3]] == [["all", "12"], ["blob-high", "2"]]
    assert len({len(line) for line in lines[:8]}) == 1  # aligned


def test_evaluate_without_anomalies_gives_null_and_the_reason(model, root, tmp_path, capsys):
    shutil.copytree(root / "test" / "good", tmp_path / "set" / "test" / "good")
    assert main(["evaluate", str(model), str(tmp_path / "set"), "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    for name in ("image_auroc", "pixel_auroc", "aupro", "f1_max"):
        assert metrics[name] is None and metrics["undefined"][name]
    assert metrics["per_defect"] == {} and math.isfinite(metrics["latency_ms"])
    assert main(["evaluate", str(model), str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert metrics["undefined"]["image_auroc"] in out


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = json.loads(out)
    assert main(["info"]) == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is of Linux")
def test_a_full_disk_behind_standard_output_is_an_error(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info"]) == 2
        full.flush()  # as the interpreter does at its end: nothing is left that could fail
    assert capsys.readouterr().err == "error: No space left on device\n"
    monkeypatch.setattr(sys, "stdout", None)  # it was closed
    assert main(["info"]) == 0


def test_bench_runs_the_suite_with_its_own_options(tmp_path, monkeypatch, capsys, fails):
    for name in [n for n in sys.modules if n.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["diffad-fast"])
    elsewhere = [p for p in sys.path if p and not (Path(p) / "benchmarks").is_dir()]
    monkeypatch.setattr(sys, "path", elsewhere)
    monkeypatch.chdir(tmp_path)
    fails("bench", names=["source repository"])
    suite = tmp_path / "suite" / "benchmarks"
    suite.mkdir(parents=True)
    (suite / "__main__.py").write_text("import sys\nprint(sys.argv[1:])\n")
    monkeypatch.chdir(tmp_path / "suite")
    assert main(["bench", "--quick", "maps", "--help"]) == 0
    assert capsys.readouterr().out == "['--quick', 'maps', '--help']\n"
    for name in [n for n in sys.modules if n.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_version_and_unknown_options_are_argparse(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and daf.__version__ in capsys.readouterr().out
    for argv in (
        ["fit", "x", "--out", "y", "--stepz", "3"],
        ["evaluate", "x", "y", "--js"],
        ["fit", "x"],
        ["fit", "x", "--out", "y", "--steps", "many"],
        ["fit", "x", "--out", "y", "--checkpoint-every", "5 parsecs"],
        ["fit", "x", "--out", "y", "--image-size", "big"],
        ["score", "x", "y", "--out", "z", "--batch-size", "0"],
        ["launch"],
        [],
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_durations_and_sizes():
    times = {"300": 300, "300s": 300, "5min": 300, "2h": 7200, "0.5 min": 30, "0": 0}
    assert {text: _duration(text) for text in times} == times
    assert _size("256") == 256 and _size("192x256") == (192, 256)


# -------------------------------------------------------------------- bad input


def test_truncated_jpeg_is_named_and_left_out(good, config, tmp_path, capsys, fails):
    bad = truncate(good / "000.png", good / "zz.jpg")
    out = tmp_path / "m.diffad"
    argv = ["fit", good, "--out", out, "--config", config, "--steps", 1, *FAST]
    fails(*argv, "--strict", names=[bad])
    assert main([str(a) for a in argv]) == 0
    warning, summary = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and str(bad) in warning
    assert "44 images (1 left out)" in summary


def test_score_lists_what_it_left_out(model, root, tmp_path, capsys, fails):
    test = Path(shutil.copytree(root / "test" / "good", tmp_path / "test"))
    bad = [truncate(test / "000.png", test / "000b.jpg"), test / "text.png"]
    bad[1].write_text("this is no image")
    fails("score", model, test, "--out", tmp_path / "out", "--strict", names=["000b.jpg"])
    assert main(["score", str(model), str(test), "--out", str(tmp_path / "out")]) == 0
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all(line.startswith("warning: ") for line in err)
    written = {row["path"]: row for row in rows(tmp_path / "out")}
    assert len(written) == 8
    for path in bad:
        row = written.pop(str(path))
        assert row["score"] == row["p_value"] == row["label"] == "" and path.name in row["left_out"]
    assert all(float(row["score"]) and row["left_out"] == "" for row in written.values())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("text.png", lambda p: p.write_text("no image")),
        ("nan.tif", write_nan),
        ("constant.png", lambda p: Image.new("L", (40, 40), 7).save(p)),
        ("tiny.png", lambda p: Image.effect_noise((10, 10), 50).save(p)),
        ("bomb.png", write_bomb),
    ],
)
def test_unusable_images(name, write, good, model, tmp_path, fails):
    write(good / name)
    fails("fit", good, "--out", tmp_path / "m.diffad", *FAST, "--strict", names=[name])
    fails("score", model, good / name, "--out", tmp_path / "out", names=[name])


def test_folders_that_cannot_be_fitted(tmp_path, good, fails):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    shutil.copy(good / "000.png", tmp_path / "one")
    out = tmp_path / "m.diffad"
    fails("fit", tmp_path / "empty", "--out", out, *FAST, names=["empty"])
    fails("fit", tmp_path / "missing", "--out", out, *FAST, names=["missing"])
    fails("fit", tmp_path / "one", "--out", out, *FAST, names=["1 usable normal sample"])


def test_options_that_cannot_be(good, tmp_path, fails):
    argv = ["fit", good, "--out", tmp_path / "m.diffad"]
    fails(*argv, "--preset", "fastest", names=["fastest", "balanced"])
    fails(*argv, "--denoiser", "unet-huge", names=["unet-huge", "unet-tiny"])
    fails(*argv, "--kind", "smell", names=["smell", "image"])
    fails(*argv, "--steps", "-1", names=["train_steps", "-1"])
    fails(*argv, "--channels", "2", names=["channels", "2"])
    fails(*argv, "--image-size", "33", "--denoiser", "unet-tiny", names=["33"])
    fails(*argv, "--group-regex", "(", *FAST, names=["regular expression"])
    fails(*argv, "--group-regex", "tile(.)", *FAST, names=["tile(.)", "000.png"])
    fails(*argv, "--device", "warp", names=["warp"])
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 3)))
    table = ["fit", tmp_path / "x.npy", "--kind", "vector", "--out", tmp_path / "t.diffad"]
    fails(*table, "--group-regex", "x", names=["--group-regex", "table"])
    fails(*argv, "--config", tmp_path / "none.json", names=["none.json"])
    path = tmp_path / "options.json"
    for text, name in (("{", "JSON"), ("[1]", "list"), ('{"step": 3}', "'step'")):
        path.write_text(text)
        fails(*argv, "--config", path, names=[name])


def test_data_are_not_written_over(model, tmp_path, monkeypatch, fails):
    table = tmp_path / "scores.csv"
    rows = np.random.default_rng(0).normal(size=(40, 3))
    np.savetxt(table, rows, delimiter=",", header="a,b,c", comments="")
    before = table.read_bytes()
    fit = ["fit", table, "--kind", "vector", "--steps", "2", "--out"]
    fails(*fit, table, names=["overwrite the data", str(table)])
    fails(*fit, tmp_path / "scores", names=[str(table), "no log"])
    monkeypatch.chdir(tmp_path)
    fails("score", model, "scores.csv", "--out", ".", names=["overwrite the data"])
    assert table.read_bytes() == before


def test_results_do_not_lie_in_the_data(model, good, fails):
    for out in (good / "results", good):
        fails("score", model, good, "--out", out, names=["--out", str(out)])
    fit = ["fit", good, *FAST, "--steps", "2", "--pictures-every", "2", "--out"]
    fails(*fit, good / "m.diffad", names=[good / "m.diffad.pictures", "one lies in the other"])


def test_data_do_not_lie_in_what_is_replaced(model, root, tmp_path, fails):
    good = Path(shutil.copytree(root / "test" / "good", tmp_path / "out" / "heatmaps" / "good"))
    for data in (good.parent, good, good / "000.png"):
        fails("score", model, data, "--out", tmp_path / "out", names=[data, tmp_path / "out"])


def test_steps_or_a_budget(good, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", str(good), "--out", str(tmp_path / "m"), "--steps", "4", "--budget", "1s"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_mode_that_is_not(model, root, fails):
    fails("evaluate", model, root, "--mode", "guess", names=["guess", "reconstruct"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(good, model, root, tmp_path, fails):
    out = tmp_path / "out"
    fails("fit", good, "--out", out, "--device", "cuda", names=["cuda"])
    fails("score", model, root / "test", "--out", out, "--device", "cuda", names=["cuda"])
    fails("evaluate", model, root, "--device", "cuda:0", names=["cuda"])


def test_outputs_that_cannot_be_written(good, model, root, tmp_path, fails):
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "folder").mkdir()
    fails("fit", good, "--out", tmp_path / "none" / "m.diffad", *FAST, names=["none"])
    fails("fit", good, "--out", file / "m.diffad", *FAST, names=["file"])
    fails("fit", good, "--out", tmp_path / "folder", *FAST, names=["folder"])
    fails("score", model, root / "test", "--out", file, names=["file"])
    fails("score", model, root / "test", "--out", file / "out", names=["file"])
    fails("evaluate", model, root, "--report", file / "report", names=["file"])


def test_an_error_in_the_middle_leaves_no_scores(model, root, tmp_path, monkeypatch, fails):
    whole = daf.Detector.score_batch
    calls = []

    def break_down(self, images, **options):
        calls.append(len(images))
        if len(calls) == 2:
            raise InputError("the second batch is broken")
        return whole(self, images, **options)

    monkeypatch.setattr(daf.Detector, "score_batch", break_down)
    argv = ["score", model, root / "test", "--out", tmp_path / "a" / "out", "--batch-size", 8]
    fails(*argv, names=["second batch"])


def test_damaged_checkpoints(model, root, tmp_path, fails):
    content = model.read_bytes()
    path = tmp_path / "bad.diffad"

    def refuse(*names):
        fails("evaluate", path, root, names=["bad.diffad", *names])
        fails("score", path, root / "test", "--out", tmp_path / "out", names=["bad.diffad", *names])

    refuse("no file")
    path.write_bytes(content[: len(content) // 2])
    refuse()
    flipped = bytearray(content)
    flipped[len(content) * 3 // 4] ^= 16
    path.write_bytes(flipped)
    refuse("checksum")
    with safe_open(model, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(model), path, {**metadata, "format_version": "99"})
    refuse("99", "upgrade")
    save_file({"x": torch.zeros(2)}, path)
    refuse("not a diffad")
    Image.new("L", (40, 40)).save(path, format="png")
    refuse()
    path.unlink()


def test_test_sets_that_cannot_be_evaluated(model, root, tmp_path, fails):
    fails("evaluate", model, root / "train", names=["test"])
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    mask = copy / "ground_truth" / "blob-high" / "001_mask.png"
    Image.new("L", (31, 32), 255).save(mask)
    fails("evaluate", model, copy, "--report", tmp_path / "report", names=[mask, "31x32", "32x32"])
    mask.unlink()
    fails("evaluate", model, copy, names=[mask])


def test_a_category_of_visa_from_the_download_to_the_figures(root, config, tmp_path, fails, capsys):
    """The pictures of the other data set, under the names that VisA gives them."""
    table = ["object,split,label,image,mask"]
    folders = {"Normal": "Images", "Anomaly": "Images", "Masks/Anomaly": "."}
    data = tmp_path / "candle"
    for label, folder in folders.items():
        (data / "Data" / folder / label).mkdir(parents=True)

    def add(source, split, label, name, mask=None):
        image = f"candle/Data/Images/{label}/{name}.JPG"
        Image.open(source).save(tmp_path / image, quality=95)
        truth = "" if mask is None else f"candle/Data/Masks/Anomaly/{name}.png"
        if mask is not None:
            shutil.copy(mask, tmp_path / truth)
        table.append(f"candle,{split},{label.lower()},{image},{truth}")

    for i, path in enumerate(sorted((root / "train/good").iterdir())):
        add(path, "train", "Normal", f"{i:04}")
    for i, path in enumerate(sorted((root / "test/good").iterdir())):
        add(path, "test", "Normal", f"1{i:03}")
    for i, path in enumerate(sorted((root / "test/blob-high").iterdir())):
        mask = root / "ground_truth/blob-high" / f"{path.stem}_mask.png"
        add(path, "test", "Anomaly", f"{i:03}", mask)
    fit = ["fit", data, "--config", config, "--steps", "5", *FAST, "--out", tmp_path / "m.diffad"]
    evaluate = ["evaluate", tmp_path / "m.diffad", data, "--json"]
    fails(*fit, names=["split_csv/1cls.csv is missing"])
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text("\n".join(table) + "\n")
    fails(*fit, "--layout", "mvtec_ad2", names=["Anomaly lies in"])
    fails(*fit, "--layout", "dcase", names=["unknown layout 'dcase': choose auto, mvtec, mvtec_lo"])
    assert main([str(a) for a in fit]) == 0
    assert "of 44 images" in capsys.readouterr().err
    fails(*evaluate, "--layout", "mvtec", names=["no folder test"])
    figures = []
    for layout in ([], ["--layout", "visa"]):
        assert main([str(a) for a in [*evaluate, *layout]]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    for found in figures:
        assert (found["n_normal"], found["n_anomalous"]) == (6, 2) and found["undefined"] == {}
        assert set(found["per_defect"]) == {"anomaly"}
    assert figures[0]["aupro"] == figures[1]["aupro"]


# -------------------------------------------------------------------- stop and resume


def test_resume_needs_a_state(good, tmp_path, fails):
    out = tmp_path / "m.diffad"
    fails("fit", good, "--out", out, "--resume", *FAST, names=[f"{out}.training"])


@pytest.mark.usefixtures("hangups")
def test_a_closed_terminal_keeps_the_training(root, config, tmp_path):
    out = tmp_path / "m.diffad"
    argv = ["fit", root, "--config", config, "--steps", "100000", *FAST, "--out", out]
    mine, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "diffad_fast", *argv],
        stdin=its, stdout=its, stderr=its, cwd=Path(daf.__file__).parents[1],
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY),
    )  # fmt: skip
    os.close(its)
    while b"training" not in os.read(mine, 4096):  # the bar, which goes on until then
        pass
    os.close(mine)
    assert process.wait(60) == 129
    assert tree(tmp_path) == ["m.diffad.csv", "m.diffad.training"]


def test_an_interrupted_fit_resumes_to_the_same_weights(root, config, tmp_path, capsys):
    argv = ["fit", str(root), "--config", config, "--steps", "30", *FAST, "--checkpoint-every", "0"]
    stopped, whole = tmp_path / "stopped.diffad", tmp_path / "whole.diffad"
    state = Path(f"{stopped}.training")
    process = subprocess.Popen(
        [sys.executable, "-m", "diffad_fast", *argv, "--out", stopped],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(daf.__file__).parents[1],
        # The sums of several threads depend on how many there are.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    while not state.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    (line,) = err.splitlines()
    assert str(state) in line and "--resume" in line
    assert tree(tmp_path) == [f"{stopped.name}.csv", state.name]

    other = argv.copy()
    other[other.index("30")] = "31"
    assert main([*other, "--out", str(stopped), "--resume"]) == 2
    assert "other options" in capsys.readouterr().err

    assert main([*argv, "--out", str(stopped), "--resume"]) == 0
    assert main([*argv[:-2], "--out", str(whole)]) == 0
    assert tree(tmp_path) == sorted(
        f"{path.name}{suffix}" for path in (stopped, whole) for suffix in ("", ".csv")
    )
    a, b = load_file(stopped), load_file(whole)
    assert a.keys() == b.keys() and any("denoiser" in name for name in a)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind, status", [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_stop_before_training_says_that_nothing_is_kept(
    kind, status, root, tmp_path, monkeypatch, capsys
):
    def stop(self, *args, **options):
        raise kind

    monkeypatch.setattr(daf.Detector, "fit", stop)
    assert main(["fit", str(root), "--out", str(tmp_path / "m.diffad"), *FAST]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert "before" in line and "--resume" not in line
    assert tree(tmp_path) == []


SIGNALS = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.usefixtures("hangups")
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_ends_like_an_exception(name, monkeypatch):
    """What is half written is removed, and the caller's handler is back."""
    number = getattr(signal, name)
    before, cleaned = signal.getsignal(number), []

    def killed(args):
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(cli, "_info", killed)
    with pytest.raises(SystemExit) as error:
        main(["info"])
    assert error.value.code == 128 + number and cleaned == [True]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("name", SIGNALS)
def test_an_ignored_signal_stays_ignored(name, monkeypatch):
    """As SIGHUP is under nohup."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "_info", lambda args: signal.raise_signal(number))
        assert main(["info"]) == 0
    finally:
        signal.signal(number, before)


def test_tables_from_a_shell(tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "normal.npy", rng.normal(size=(300, 6)).astype(np.float32))
    test = rng.normal(size=(40, 6)).astype(np.float32)
    test[20:] += 5
    np.savez(tmp_path / "test.npz", X=test, y=np.repeat([0, 1], 20))
    model, out = str(tmp_path / "v.diffad"), tmp_path / "out"
    data = [str(tmp_path / name) for name in ("normal.npy", "test.npz")]
    assert main(["fit", data[0], "--kind", "vector", "--steps", "50", "--out", model]) == 0
    assert main(["score", model, data[1], "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert [row["path"] for row in rows] == [str(i) for i in range(40)]
    capsys.readouterr()
    assert main(["evaluate", model, data[1]]) == 0
    text = capsys.readouterr().out
    for line in (r"auroc +1\.000", "n_normal +20"):
        assert re.search(f"^{line}$", text, re.M)


def test_calibrate_takes_other_normals(model, root, good, tmp_path, capsys, fails):
    before, out = daf.load(model), tmp_path / "other.diffad"
    options = ["--false-positive-rate", "0.2", "--group-regex", r"(\d+)\.png"]
    assert main(["calibrate", str(model), str(good), "--out", str(out), *options]) == 0
    after = daf.load(out)
    expected = before.score(str(good), maps=False).score
    np.testing.assert_array_equal(np.sort(after.conformal.scores), np.sort(expected))
    assert (after.conformal.groups, after.false_positive_rate) == (44, 0.2)
    err = capsys.readouterr().err
    assert f"of 44 images; reconstruct labels above a score of {after.threshold:.4g}; saved" in err
    assert main(["evaluate", str(out), str(root), "--json", "--false-positive-rate", "0.3"]) == 0
    threshold = json.loads(capsys.readouterr().out)["threshold"]
    after.false_positive_rate = 0.3
    assert threshold == after.threshold
    fails("calibrate", model, root / "test", "--out", good, names=["it is a folder"])
    fails("score", model, good, "--out", tmp_path / "o", "--false-positive-rate", 7, names=["7"])


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_names_that_are_not_utf8(model, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8))
    name = os.path.join(os.fsencode(folder), b"caf\xe9.png")
    with open(name, "wb") as file:
        image.save(file, "png")
    assert main(["score", str(model), str(folder), "--out", str(tmp_path / "out")]) == 0
    assert b"caf\xe9.png," in (tmp_path / "out" / "scores.csv").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_a_defect_whose_name_is_not_utf8(model, root, tmp_path, capsys):
    test = os.path.join(os.fsencode(shutil.copytree(root, tmp_path / "set")), b"test")
    shutil.rmtree(tmp_path / "set" / "ground_truth")
    os.rename(os.path.join(test, b"blob-high"), os.path.join(test, b"caf\xe9"))
    assert main(["evaluate", str(model), str(tmp_path / "set")]) == 0
    lines = capsys.readouterr().out.splitlines()  # of strict UTF-8
    (line,) = (line for line in lines if "caf" in line)
    assert line.split()[:2] == ["caf\\udce9", "2"]
    assert len({len(line) for line in lines[:8]}) == 1  # aligned


def test_names_on_other_outputs(monkeypatch):
    for encoding, errors, shown in (
        ("ascii", "strict", "caf\\xe9 \\udcff"), ("latin-1", "strict", "caf\xe9 \\udcff"),
        ("utf-8", "surrogateescape", "caf\xe9 \udcff"), ("ascii", "replace", "caf\xe9 \udcff"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding, errors))
        assert printable("caf\xe9 \udcff") == shown
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert printable("caf\xe9") == "caf\xe9"


def test_kinds_of_sounds_whose_names_are_not_utf8(monkeypatch):
    figures = dict.fromkeys(ClipPage.figures, 0.5)
    row = {"n_anomalous": 1, "auroc": 0.5, "pauc": 0.5}
    metrics = {
        **figures, "n_anomalous": 2, "n_normal": 3, "latency_ms": 1.0, "real_time": 9.0,
        "threshold": None,
        "undefined": {}, "per_kind": {"bang": row, "caf\udce9": row},
    }  # fmt: skip
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    lines = evaluation_text("audio", metrics).splitlines()
    assert lines[3].startswith("caf\\udce9") and len({len(line) for line in lines[:4]}) == 1


def test_fit_on_a_folder_with_defects(root, tmp_path, fails):
    copy = Path(shutil.copytree(root, tmp_path / "set"))
    shutil.rmtree(copy / "train")
    out = tmp_path / "m.diffad"
    fails("fit", copy, "--out", out, *FAST, names=[f"{copy / 'ground_truth'} lies in {copy}"])
