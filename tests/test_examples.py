"""Every example runs as it stands and says what it is about to say."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
# A host that may be missing, and what stands in the output.
EXAMPLES = {
    "images": (None, r"(?s)(normal\n.*){3}(ANOMALY at row [123]\d, column [234]\d\n.*){3}$"),
    "recordings": (
        None,
        r"^(.* normal\n){2}.* ANOMALY: 49\d\d Hz at 2\.\d s\n"
        r"(alarm: [3-6]\.\d to [6-9]\.\d s, .*\n){4,}$",
    ),
    "service": (None, r'"anomaly": false.*\n.*"anomaly": true, "at": \[[123]\d, [234]\d\].*\n422 '),
    "own_parts": (None, r"normal \[.*\]\nbroken \["),
    "scikit_learn": (None, r"AUROC of the training data: (0\.[89]\d*|1\.000)\n"),
    "pyod_combination": ("pyod", r"mean    AUROC (0\.9\d*|1\.000)\n"),
    "anomalib_engine": ("anomalib", r"'image_AUROC': (0\.9|1\.0)"),
    "diffusers_pipeline": ("diffusers", r"sampler's: \(2, 3, 32, 32\)\nscores: \["),
    "take_away": (None, r"torch.export  \[.*\]\n"),
}
# PyPI's torchvision beside a CPU build of torch; see tests/integrations/conftest.py.
SCHEMAS = """
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.mark.slow  # make test-plugins runs them
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name, tmp_path):
    host, pattern = EXAMPLES[name]
    if host is not None and importlib.util.find_spec(host) is None:
        pytest.skip(f"{host} is not installed")
    schemas = SCHEMAS if host is not None and torch.version.cuda is None else ""
    code = f"import runpy, torch\n{schemas}\nrunpy.run_path({str(FOLDER / name)!r} + '.py', "
    code += "run_name='__main__')"
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(pattern, done.stdout), done.stdout
    if name == "own_parts":
        normal, broken = (
            [float(score) for score in re.findall(r"\d+\.\d*", line)]
            for line in done.stdout.splitlines()
        )
        assert len(normal) == len(broken) == 5
        assert 1.25 * max(normal) < min(broken)


def test_every_example_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES)
