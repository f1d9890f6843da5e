"""Accuracy and speed of the audio detector on UrbanSound8K, one class normal at a time.

By default the detector is trained on one class's clips of fold 1 and tested on fold 2, where the
other classes are anomalous. `--ten-fold` is the protocol of the data set's authors: its ten folds
as they are, each tested once by detectors trained on the other nine; mean and deviation over the
folds, written after every fold. Beside it, on the same clips, two controls: the mean distance to
the 5 nearest training clips, and scikit-learn's local outlier factor with 20 neighbours. Both go by
mean and deviation of every log-mel band, standardised by the training clips, or, with `--features`,
by the mean embedding of a clip and its cosines. Intervals draw whole recordings of the test folds.
Test clips in which a shorter sound repeats, as copies of the data set have them that fill every
clip to one length, are counted, and the AUROC is also taken without them.

`--within FOLD` is for choices, which no test may make: inside one fold, every fifth of the normal
class's recordings is left out in turn and told from the other classes of that fold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
import torch
from sklearn.neighbors import LocalOutlierFactor

from diffad_fast import Detector, metrics
from diffad_fast.data.audio import (
    groups_by_recording,
    labelled_clips,
    read_audio,
    training_clips,
)
from diffad_fast.errors import InputError
from diffad_fast.evaluation import evaluate_audio
from diffad_fast.integrations.yamnet import YAMNet
from diffad_fast.representations import LogMel
from diffad_fast.scoring.split import cross_splits

from .. import stats
from ..grid import grid
from ..machine import describe
from ..results import write_quality
from ..tables import machine_line
from .controls import nearest, standardised
from .tables import spread

CLASSES = ["air_conditioner", "drilling", "engine_idling", "jackhammer", "siren"]
LOF_NEIGHBOURS = 20
# Of the recordings of a class, left out in turn.
PARTS = 5
# Of a wave with itself, where it is heard again.
REPEATS_RATE, REPEATS_AGREEMENT = 16000, 0.99
# Key of a control in a result -> its name in tables.
CONTROLS = {"nearest": "nearest neighbours", "lof": "local outlier factor"}


def main(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.name is None:
        fold = "" if args.within is None else f"-fold{args.within}"
        parts = ["audio", fold, "-ten-fold" * args.ten_fold, "-yamnet" * bool(args.features)]
        args.name = "".join(parts)
    try:
        if args.within is not None:
            return within(args)
        features, tests = backbone(args.features), _tests(args)
    except (InputError, ImportError) as error:
        parser.error(str(error))
    result = {
        **_head(args),
        "runs": [],
        **{control: [] for control in CONTROLS},
        "repeats": [],
    }
    draws = []
    for folds, clips in tests:
        detector, found = _measure(folds, clips, args, features, result)
        draws.append(found)
        result["intervals"] = intervals(draws)
        if "speed" not in result:
            result["speed"] = speed(detector)
        write_quality(args.name, dict(result), table(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks audio", description=__doc__)
    parser.add_argument("--data", required=True, help="the folder of UrbanSound8K")
    parser.add_argument("--normal", nargs="+", default=CLASSES, metavar="CLASS")
    parser.add_argument("--train-folds", nargs="+", type=int, default=[1])
    parser.add_argument("--test-folds", nargs="+", type=int, default=[2])
    protocol = parser.add_mutually_exclusive_group()
    protocol.add_argument(
        "--ten-fold", action="store_true", help="test each fold, train on the rest"
    )
    protocol.add_argument("--within", type=int, metavar="FOLD", help="leave out recordings of it")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--features", help="yamnet, or a file of its weights")
    parser.add_argument("--name", help="name of the result; by default it tells the protocol")
    parser.add_argument("--note", default="", help="what a reader must know, for the table")
    return parser


def _tests(args: argparse.Namespace) -> list[tuple[list[int], dict[str, tuple[list, list]]]]:
    """Of each test its folds, and for each normal class the clips to train on and to test."""
    folds = [(args.train_folds, args.test_folds)]
    if args.ten_fold:
        known = range(1, 11)
        folds = [([f for f in known if f != test], [test]) for test in known]
    return [
        (test, {
            normal: (
                training_clips(args.data, normal=normal, folds=train),
                both_kinds(labelled_clips(args.data, normal=normal, folds=test), normal, test),
            )
            for normal in args.normal
        })
        for train, test in folds
    ]  # fmt: skip


def _measure(
    folds: list[int], clips: dict[str, tuple[list, list]], args: argparse.Namespace, features,
    result: dict,
) -> tuple[Detector, tuple[dict, dict]]:  # fmt: skip
    """Put into ``result`` what one test gives. Returns the last detector, and the AUROCs with
    those of recordings that are drawn anew."""
    test = next(iter(clips.values()))[1]
    once = ~np.array([repeats(read_audio(clip.path, REPEATS_RATE)) for clip in test])
    result["repeats"].append([int((~once).sum()), len(once)])
    scores: dict[str, list[np.ndarray]] = {}
    distances: dict[str, dict[str, np.ndarray]] = {}
    for normal, (train, test) in clips.items():
        where = {"normal": normal, "test_folds": folds}
        for seed in args.seeds:
            detector, fit_seconds = _fit(args, seed, features, train)
            evaluation = evaluate_audio(detector, test, strict=True, maps=False)
            scores.setdefault(normal, []).append(evaluation.score.score)
            found = evaluation.metrics
            without = without_repeats(test, evaluation.score.score, once)
            result["runs"].append({
                **where, "seed": seed, "fit_seconds": fit_seconds,
                "auroc_without_repeats": without, **found,
            })  # fmt: skip
            print(f"{where} seed {seed}: {found['auroc']:.3f}", file=sys.stderr, flush=True)
        distances[normal] = controls(detector, train, test)
        for control, distance in distances[normal].items():
            auroc = metrics.auroc([clip.anomaly for clip in test], distance)
            result[control].append({**where, "auroc": auroc})
    return detector, drawn(test, scores, distances)


def _fit(args: argparse.Namespace, seed: int, features, clips: list) -> tuple[Detector, float]:
    """A detector, and the seconds that its fit took."""
    detector = Detector(kind="audio", preset=args.preset, seed=seed, features=features)
    start = time.perf_counter()
    detector.fit([clip.path for clip in clips], groups=groups_by_recording(clips))
    return detector, time.perf_counter() - start


def repeats(wave: np.ndarray) -> bool:
    """Does a wave (samples,) at REPEATS_RATE agree with itself, moved by a quarter of a second or
    more, wherever at least as much of both is left?"""
    n, least, wave = len(wave), REPEATS_RATE // 4, wave.astype(np.float64)
    product = np.fft.irfft(np.abs(np.fft.rfft(wave, 2 * n)) ** 2)[:n]
    energy = np.append(0.0, np.cumsum(wave**2))
    lags = np.arange(least, n - least)
    size = np.sqrt(energy[n - lags] * (energy[n] - energy[lags]))
    return bool((product[lags] > REPEATS_AGREEMENT * size + 1e-12).any())


def without_repeats(clips: list, scores: np.ndarray, once: np.ndarray) -> float | None:
    """The AUROC of the clips in ``once``; None without both kinds."""
    label = np.array([clip.anomaly for clip in clips])[once]
    return metrics.auroc(label, scores[once]) if 0 < label.sum() < len(label) else None


def _head(args: argparse.Namespace) -> dict:
    return {
        "machine": describe(),
        "note": args.note,
        "preset": args.preset,
        "features": "YAMNet" if args.features else None,
    }


def backbone(name: str | None) -> str | YAMNet | None:
    """What ``Detector(features=...)`` takes. Raises InputError for no file of weights, ImportError
    without onnx for a graph."""
    return name if name in (None, "yamnet") else YAMNet(name)


def within(args: argparse.Namespace) -> int:
    """Splits of one fold's recordings, with the other classes of that fold as anomalies."""
    features, aurocs = backbone(args.features), {}
    for normal in args.normal:
        clips = both_kinds(
            labelled_clips(args.data, normal=normal, folds=[args.within]), normal, [args.within]
        )
        known = [clip for clip in clips if not clip.anomaly]
        others = [clip for clip in clips if clip.anomaly]
        recordings = groups_by_recording(known)
        found = aurocs[normal] = []
        for split in cross_splits(range(len(known)), recordings, PARTS, seed=0):
            train = [known[i] for i in split.fit]
            test = [*(known[i] for i in split.conformal), *others]
            scores = []
            for seed in args.seeds:
                detector, _ = _fit(args, seed, features, train)
                score = detector.score([clip.path for clip in test], maps=False, strict=True).score
                scores.append(metrics.auroc([clip.anomaly for clip in test], score))
            label = [clip.anomaly for clip in test]
            distances = controls(detector, train, test)
            beside = {name: metrics.auroc(label, d) for name, d in distances.items()}
            found.append({"auroc": statistics.mean(scores), **beside})
            print(f"{normal} {len(found)}: {found[-1]}", file=sys.stderr, flush=True)
    result = {**_head(args), "within": args.within, "seeds": args.seeds, "aurocs": aurocs}
    write_quality(args.name, result, development_table(result))
    return 0


def development_table(result: dict) -> str:
    """Markdown, in percent: of every class the mean over its splits, and the mean of these."""
    rows = []
    # Those of fold 1 were recorded without the second.
    beside = [name for name in CONTROLS if name in next(iter(result["aurocs"].values()))[0]]
    whose = ["auroc", *beside]
    for normal, found in result["aurocs"].items():
        rows.append([normal, *(statistics.mean(one[k] for one in found) for k in whose)])
    means = [statistics.mean(row[i] for row in rows) for i in range(1, 1 + len(whose))]
    rows.append(["mean", *means])
    head = ["normal class", "AUROC", *(f"{CONTROLS[name]}, AUROC" for name in beside)]
    return "\n".join([
        f"# Recordings of fold {result['within']} of UrbanSound8K, {PARTS} parts left out in turn",
        "",
        f"{machine_line(result)}.",
        f"{_recipe(result)}, {len(result['seeds'])} seeds. For choices: no clip of another fold is "
        "heard.",
        *([result["note"]] if result["note"] else []),
        "",
        *grid(head, [[name, *(f"{100 * value:.1f}" for value in row)] for name, *row in rows]),
    ]) + "\n"  # fmt: skip


def _recipe(result: dict) -> str:
    features = result.get("features")
    return f"Preset {result['preset']}" + (f" with the features of {features}" if features else "")


def drawn(
    clips: list,
    scores: dict[str, list[np.ndarray]],
    distances: dict[str, dict[str, np.ndarray]],
):
    """AUROCs of the detector (mean over its seeds) and of the controls, for all clips of one test
    and for recordings that are drawn anew: (class or "mean", whose) -> a number, an array. The
    clips are the same for every class."""
    kinds = np.array([clip.kind for clip in clips])

    def measure(rows: np.ndarray) -> dict | None:
        found = {}
        for normal in scores:
            label = kinds[rows] != normal
            if label.all() or not label.any():
                return None
            ours = [metrics.auroc(label, score[rows]) for score in scores[normal]]
            found[normal, "auroc"] = float(np.mean(ours))
            for control, distance in distances[normal].items():
                found[normal, control] = metrics.auroc(label, distance[rows])
        for whose in {whose: None for _, whose in found}:
            found["mean", whose] = float(np.mean([found[normal, whose] for normal in scores]))
        return found

    return stats.over_groups(groups_by_recording(clips) or range(len(clips)), measure)


def intervals(tests: list[tuple[dict, dict]]) -> dict[str, dict[str, list[float]]]:
    """Of the means over tests, whose recordings are drawn independently."""
    result: dict[str, dict[str, list[float]]] = {}
    observed, mean = (
        {key: np.mean([one[key] for one in part], axis=0) for key in part[0]}
        for part in zip(*tests, strict=True)
    )
    for name, whose in mean:
        result.setdefault(name, {})[whose] = stats.interval(mean[name, whose])
    for name, found in result.items():
        for control in CONTROLS:
            whose = (name, "auroc"), (name, control)
            found[f"difference_{control}"] = stats.difference(observed, mean, *whose)
    return result


def both_kinds(clips: list, normal: str, folds: list[int]) -> list:
    """``clips``; raises InputError if there are no normal ones or no anomalies among them."""
    if len({clip.anomaly for clip in clips}) < 2:
        raise InputError(
            f"folds {folds} hold {len(clips)} clips, normal ones ({normal}) or others alone: an "
            "AUROC needs both"
        )
    return clips


def controls(detector: Detector, train: list, test: list) -> dict[str, np.ndarray]:
    """Of each control a number for every test clip, higher for what is less like the training
    clips."""
    config, embedding = detector.config, detector.model.embedding
    logmel = LogMel(config.sample_rate, config.n_fft, config.hop, config.n_mels)

    def features(clips: list) -> np.ndarray:
        rows = []
        for batch in detector.open([clip.path for clip in clips]).batches(32):
            if embedding is not None:
                rows.append(embedding(batch.x.to(detector.device)).mean(dim=1).cpu())
                continue
            mel = logmel(batch.x)
            rows.append(torch.cat([mel.mean(dim=2), mel.std(dim=2)], dim=1))
        return torch.cat(rows).double().numpy()

    known, new = features(train), features(test)
    if embedding is not None:
        metric = "cosine"
    else:
        metric, (known, new) = "euclidean", standardised(known, new)
    count = min(LOF_NEIGHBOURS, len(known) - 1)  # as many as one of them has
    factor = LocalOutlierFactor(count, metric=metric, novelty=True).fit(known)
    return {
        "nearest": nearest(known, new, metric),
        "lof": -factor.score_samples(new),
    }


def speed(detector: Detector, batch: int = 64, seconds: float = 4.0) -> dict[str, float]:
    """Seconds of sound scored a second, waves on the host to scores and maps on the host."""
    generator = torch.Generator().manual_seed(0)
    wave = torch.randn(batch, int(seconds * detector.config.sample_rate), generator=generator)
    waves = next(detector.open(0.1 * wave).batches(batch)).x
    result = {}
    for count in (1, batch):
        times = []
        for _ in range(12):
            start = time.perf_counter()
            detector.score_batch(waves[:count])
            times.append(time.perf_counter() - start)
        result[f"batch_{count}"] = count * seconds / statistics.median(times[2:])
    return result


def table(result: dict) -> str:
    """Markdown, in percent: mean and standard deviation over the seeds of one fold; where there are
    more folds over these, each the mean of its seeds, and a line for each."""
    runs = result["runs"]
    seeds = sorted({one["seed"] for one in runs})
    folds = sorted({tuple(one["test_folds"]) for one in runs})
    over = _over(runs)
    speeds = ", ".join(f"{value:.0f} ({name})" for name, value in result["speed"].items())
    lines = [
        "# One class of UrbanSound8K against the others",
        "",
        f"{machine_line(result)}.",
        f"{_recipe(result)}, {len(seeds)} seeds: mean and standard deviation over "
        f"{f'the {len(folds)} test folds' if len(folds) > 1 else 'them'}, in percent; in brackets "
        f"the 95% bootstrap interval over recordings. Times real time: {speeds}.",
        *([result["note"]] if result["note"] else []),
        "",
    ]
    rows = []
    classes = list(dict.fromkeys(one["normal"] for one in runs))
    for name in [*classes, "mean"]:
        chosen = [one for one in runs if name in (one["normal"], "mean")]
        keys = ("auroc", "pauc", "auroc_without_repeats")
        row = [name, *(_spread(chosen, over, key) for key in keys)]
        for control in CONTROLS:
            peers = [b["auroc"] for b in result[control] if name in (b["normal"], "mean")]
            row.append(f"{100 * statistics.mean(peers):.1f}")
        for cell, whose in ((1, "auroc"), *enumerate(CONTROLS, 4)):
            low, high = (100 * value for value in result["intervals"][name][whose])
            row[cell] += f" ({low:.1f}–{high:.1f})"
        row.append(f"{statistics.median(one['fit_seconds'] for one in chosen):.0f}")
        row.append(f"{statistics.median(one['latency_ms'] for one in chosen):.1f}")
        rows.append(row)
    head = [
        "normal class", "AUROC", "pAUC", "AUROC without repeats",
        *(f"{name}, AUROC" for name in CONTROLS.values()), "fit s", "ms/clip",
    ]  # fmt: skip
    repeated, heard = map(sum, zip(*result["repeats"], strict=True))
    lines += [*grid(head, rows), ""]
    for control, name in CONTROLS.items():
        found = result["intervals"]["mean"][f"difference_{control}"]
        mean, low, high = (100 * value for value in found)
        lines.append(
            f"- In the mean the detector {stats.compared(low, high)} the {name}: "
            f"{mean:+.1f} ({low:+.1f} to {high:+.1f}), paired."
        )
    lines += [
        f"- In {repeated} of {heard} test clips a shorter sound repeats: moved by at least 0.25 s "
        f"the wave agrees with itself to {REPEATS_AGREEMENT}, as a steady tone does, too.",
    ]
    if len(folds) > 1:
        lines += ["", f"AUROC of each test fold, trained on the {len(folds) - 1} others:", ""]
        rows = []
        for fold in folds:
            here = [one for one in runs if tuple(one["test_folds"]) == fold]
            means = [
                statistics.mean(one["auroc"] for one in here if name in (one["normal"], "mean"))
                for name in [*classes, "mean"]
            ]
            rows.append([", ".join(map(str, fold)), *(f"{100 * value:.1f}" for value in means)])
        lines += grid(["fold", *classes, "mean"], rows)
    return "\n".join(lines) + "\n"


def headlines(result: dict) -> list[list[str]]:
    """A row of the data, our mean AUROC and that of the best control; none for other results."""
    if "repeats" not in result:
        return []
    over = _over(result["runs"])
    means = {name: statistics.mean(one["auroc"] for one in result[name]) for name in CONTROLS}
    best = max(means, key=means.get)
    cells = []
    for name, mean in (("auroc", _spread(result["runs"], over, "auroc")),
                       (best, f"{100 * means[best]:.1f}")):  # fmt: skip
        low, high = (100 * value for value in result["intervals"]["mean"][name])
        cells.append(f"AUROC {mean} ({low:.1f}–{high:.1f})")
    classes = len({one["normal"] for one in result["runs"]})
    features = result.get("features")
    beside = f", features of {features}" if features else ""
    name = f"UrbanSound8K, mean of {classes} classes{beside}"
    return [[name, cells[0], f"{CONTROLS[best]}: {cells[1]}"]]


def _over(runs: list[dict]) -> str:
    """What a deviation is taken over: the tests, or the seeds of the only one."""
    return "test_folds" if len({str(run["test_folds"]) for run in runs}) > 1 else "seed"


def _spread(runs: list[dict], over: str, key: str) -> str:
    """Of the means over all else of each value of ``over``."""
    if any(one[key] is None for one in runs):
        return spread([None])
    parts: dict[str, list[float]] = {}
    for one in runs:
        parts.setdefault(str(one[over]), []).append(one[key])
    return spread([statistics.mean(values) for values in parts.values()])
