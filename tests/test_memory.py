"""Memory of streaming: ten times the images, the same peak; and of large tables."""

import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from diffad_fast.config import DetectorConfig
from diffad_fast.data.vectors import open_vectors
from diffad_fast.scoring import Score, split_by_group

SCORE = """
import json, resource, sys, warnings
import diffad_fast as daf
warnings.simplefilter("ignore")
detector = daf.load(sys.argv[1])
count = 0
if sys.argv[3] == "score":
    count = len(detector.score(sys.argv[2], maps=False))
else:
    for part in detector.score_iter(sys.argv[2]):
        count += len(part)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"count": count, "peak": peak}))
"""


@pytest.mark.parametrize(
    "size, few, many",
    [(64, 80, 400), pytest.param(256, 500, 5000, marks=pytest.mark.slow)],
)
def test_peak_memory_does_not_grow_with_the_data(tmp_path, size, few, many):
    from PIL import Image

    import diffad_fast as daf

    rng = np.random.default_rng(0)
    images = (rng.uniform(size=(20, size, size)) * 255).astype(np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    detector = daf.Detector(
        image_size=size, denoiser="unet-tiny", haar_level=3, train_steps=1, reverse_steps=1,
        batch_size=16,
    ).fit(images)  # fmt: skip
    detector.save(tmp_path / "m.diffad")

    peaks = {}
    for count in (few, many):
        folder = tmp_path / f"images{count}"
        folder.mkdir()
        for i in range(count):
            os.link(tmp_path / f"{i % 20}.png", folder / f"{i:05}.png")
        for call in ("score", "score_iter"):
            command = [sys.executable, "-c", SCORE, str(tmp_path / "m.diffad"), str(folder), call]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout)
            assert result["count"] == count
            peaks[call, count] = result["peak"]
    for call in ("score", "score_iter"):
        assert peaks[call, many] <= 1.1 * peaks[call, few], peaks


def _peak(call) -> int:
    """Bytes that Python and NumPy allocate at most while ``call`` runs."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_table_on_disk_is_not_read_into_memory(tmp_path, dtype):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(1_000_000, 8)).astype(dtype))
    rows = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert _peak(lambda: open_vectors(rows)) < 0.1 * rows.nbytes
    batch = next(open_vectors(rows).batches(3, [999_999, 5, 0]))
    assert batch.x.dtype == torch.float32
    assert np.array_equal(batch.x.numpy(), rows[[999_999, 5, 0]].astype(np.float32))


def test_a_csv_file_takes_little_more_than_its_numbers(tmp_path):
    rows = np.random.default_rng(0).normal(size=(20_000, 10))
    with open(tmp_path / "x.csv", "w") as file:
        file.write(",".join("abcdefghij") + "\n")
        file.writelines(",".join(map(repr, row)) + "\n" for row in rows.tolist())
    found = []
    assert _peak(lambda: found.append(open_vectors(tmp_path / "x.csv"))) < 2 * rows.nbytes
    assert np.array_equal(found[0].rows, rows)


def test_bytes_a_row():
    """Of the split of a table and of its scores, beside 80 bytes for 20 numbers."""
    n = 200_000
    config = DetectorConfig.create(kind="vector")
    assert _peak(lambda: split_by_group(range(n), None, config)) < 160 * n

    def parts():
        for first in range(0, n, 1000):
            numbers = np.arange(first, first + 1000)
            yield Score(numbers / 2, None, numbers / 3, numbers % 2, None, numbers)

    assert _peak(lambda: Score.join(parts())) < 80 * n
    whole = Score.join(parts())
    for name, right in (("score", np.arange(n) / 2), ("label", np.arange(n) % 2)):
        assert getattr(whole, name).dtype == right.dtype
        assert np.array_equal(getattr(whole, name), right)
