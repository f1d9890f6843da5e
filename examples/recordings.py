"""A detector of recordings: what sounds wrong, when, at which frequency; also while it arrives."""

import numpy as np

import diffad_fast as daf

RATE = 16000


def machine(seed: int, seconds: float = 4.0, whistle: bool = False) -> np.ndarray:
    """A motor's hum and its harmonics, in noise that beats with it; some whistle at 5,000 Hz from
    the middle on, for a second."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    hum = sum(np.sin(2 * np.pi * k * rng.uniform(98, 102) * t) / k for k in range(1, 6))
    beat = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(3.8, 4.2) * t)
    wave = 0.1 * rng.uniform(0.8, 1.2) * hum + 0.02 * beat * rng.standard_normal(len(t))
    if whistle:
        middle = (t >= seconds / 2) & (t < seconds / 2 + 1)
        wave += 0.05 * middle * np.sin(2 * np.pi * 5000 * t)
    return wave.astype(np.float32)


def main() -> None:
    # Half of so few clips is held out for p-values: labels need 20. In place of arrays there may be
    # a folder, files, or pairs (wave, rate).
    detector = daf.Detector(
        kind="audio", preset="fast", conformal_share=0.5, token_width=64, train_steps=100, seed=0
    )
    detector.fit([machine(seed) for seed in range(50)])

    new = [machine(100), machine(101), machine(102, whistle=True)]
    answer = detector.score(new)
    for score, p, label, map_ in zip(
        answer.score, answer.p_value, answer.label, answer.map, strict=True
    ):
        band, step = np.unravel_index(map_.argmax(), map_.shape)
        where = f"{detector.frequencies[band]:.0f} Hz at {detector.times(map_)[step]:.1f} s"
        print(f"score {score:6.2f}  p {p:.3f}  {f'ANOMALY: {where}' if label else 'normal'}")

    stream = detector.stream(RATE)
    for chunk in np.array_split(machine(103, seconds=12.0, whistle=True), 50):
        part = stream.push(chunk)
        for end, score in zip(part.time[part.label == 1], part.score[part.label == 1], strict=True):
            print(f"alarm: {end - stream.window:.1f} to {end:.1f} s, score {score:.1f}")


if __name__ == "__main__":
    main()
