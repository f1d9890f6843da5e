"""A detector of images: fit on normal ones, then ask what is wrong with others, and where."""

import numpy as np

import diffad_fast as daf


def stripes(n: int, seed: int, broken: bool = False) -> np.ndarray:
    """Images (n,64,64) of stripes in [0, 1]; broken ones have a grey square."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 6, (n, 1, 1))
    images = 0.5 + 0.3 * np.sin(np.arange(64) * 0.8 + phase) + 0.02 * rng.normal(size=(n, 64, 64))
    if broken:
        images[:, 20:32, 30:42] = 0.5
    return images.clip(0, 1).astype(np.float32)


def main() -> None:
    # On two coarse grids of cells, to be done in seconds; without `tokens` it sees finer ones too.
    detector = daf.Detector(
        image_size=64, preset="fast", tokens=("energy-16", "spread-2"), train_steps=100, seed=0
    )
    detector.fit(stripes(200, seed=1))
    detector.save("stripes.diffad")

    detector = daf.load("stripes.diffad")
    answer = detector.score(np.concatenate([stripes(3, 2), stripes(3, 3, broken=True)]))
    for score, p, label, map_ in zip(
        answer.score, answer.p_value, answer.label, answer.map, strict=True
    ):
        row, column = np.unravel_index(map_.argmax(), map_.shape)
        verdict = f"ANOMALY at row {row}, column {column}" if label else "normal"
        print(f"score {score:6.2f}  p {p:.3f}  {verdict}")


if __name__ == "__main__":
    main()
