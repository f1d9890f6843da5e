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

# One process for all: a peak is that of all calls so far, and the first ones are those with few.
# Not by getrusage: a process begins with the peak of the one that started it, here pytest's.
SCORE = """
import json, re, sys, warnings
import diffad_fast as daf
warnings.simplefilter("ignore")
detector = daf.load(sys.argv[1])
for call in ("score", "score_iter"):
    for folder in sys.argv[2:]:
        if call == "score":
            count = len(detector.score(folder, maps=False))
        else:
            count = sum(map(len, detector.score_iter(folder)))
        with open("/proc/self/status") as status:
            peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read())[1])
        print(json.dumps({"call": call, "count": count, "peak": peak}))
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

    folders = [tmp_path / f"images{count}" for count in (few, many)]
    for folder, count in zip(folders, (few, many), strict=True):
        folder.mkdir()
        for i in range(count):
            os.link(tmp_path / f"{i % 20}.png", folder / f"{i:05}.png")
    command = [sys.executable, "-c", SCORE, str(tmp_path / "m.diffad"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    peaks = {(r["call"], r["count"]): r["peak"] for r in results}
    assert len(peaks) == len(results) == 4
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
