"""Memory of streaming: ten times the images, the same peak."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

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
        image_size=size, denoiser="unet-tiny", train_steps=1, reverse_steps=1, batch_size=16
    ).fit(images)
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
