"""In anomalib's Engine, on a folder of images; makes one if none is named.

With data of your own: python anomalib_engine.py FOLDER, in the layout of MVTec AD.
"""

import sys
import tempfile
from pathlib import Path

from anomalib.data import Folder
from anomalib.engine import Engine
from images import stripes
from PIL import Image

from diffad_fast.integrations.anomalib import DiffADFast


def make_folder(root: Path) -> Path:
    parts = {"train/good": (80, False), "test/good": (10, False), "test/square": (10, True)}
    for seed, (part, (n, broken)) in enumerate(parts.items()):
        (root / part).mkdir(parents=True)
        for i, image in enumerate(stripes(n, seed, broken)):
            Image.fromarray((image * 255).astype("uint8")).save(root / part / f"{i:03d}.png")
    return root


def main(folder: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(folder) if folder else make_folder(Path(temporary) / "stripes")
        defects = [p.name for p in sorted((root / "test").iterdir()) if p.name != "good"]
        data = Folder(
            name=root.name, root=root, normal_dir="train/good", normal_test_dir="test/good",
            abnormal_dir=[f"test/{name}" for name in defects], num_workers=0,
        )  # fmt: skip
        # Few steps on one coarse grid, to be done in seconds: leave both out with real data.
        options = {"tokens": ("energy-16",)}
        model = DiffADFast("fast", 64, train_steps=100, options=options, visualizer=False)
        engine = Engine(default_root_dir=Path(temporary) / "results", logger=False)
        engine.fit(model, datamodule=data)
        print(engine.test(model, datamodule=data)[0])


if __name__ == "__main__":
    main(*sys.argv[1:2])
