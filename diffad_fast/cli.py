"""The command line ``diffad-fast``: fit, score, calibrate, evaluate, info, bench.

Results go to standard output or to the files that were named; progress, warnings and errors go to
standard error. Exit status: 0 done, 2 an error (one sentence, nothing half-written), 129 its
terminal was closed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import re
import runpy
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import DiffadError, InputError, SkippedInput, Terminated
from .version import __version__

if TYPE_CHECKING:
    import torch

    from .data.samples import Batch, Samples
    from .detector import Detector
    from .scoring import Score


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; ``argv`` defaults to the program's arguments."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is _bench:
        args.arguments = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    with _one_line_warnings(), _terminable():
        try:
            if "device" not in args:
                args.command(args)
            else:
                from .training.distributed import torchrun_group

                with torchrun_group(args.device) as args.device:
                    args.command(args)
            _flush()
        except DiffadError as error:
            return _fail(str(error))
        except OSError as error:
            with suppress(OSError):  # of the same file, if it was print
                _flush()
            name = "" if error.filename is None else f"{error.filename}: "
            return _fail(f"{name}{error.strerror or error}")
        except KeyboardInterrupt as interrupt:
            with suppress(OSError):  # of a terminal that was closed
                print(f"interrupted{interrupt}", file=sys.stderr)
            terminated = isinstance(interrupt, Terminated)
            return 128 + (interrupt.signal if terminated else signal.SIGINT)
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that is closed, end the program as an exception does: what
    is half written is removed."""
    # torchrun ends its processes itself, and one that waits for another would not hear of it.
    mine = threading.current_thread() is threading.main_thread()
    if "WORLD_SIZE" in os.environ or not mine:
        yield
        return
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # What is ignored stays so, as SIGHUP under nohup; a handler that was not made by Python, None
    # here, could not be put back.
    before = {
        number: signal.signal(number, lambda number, _: sys.exit(128 + number))
        for number in known
        if signal.getsignal(number) not in (None, signal.SIG_IGN)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _flush() -> None:
    """Write out what was printed. Raises OSError; at the interpreter's end, which would have a
    status and a traceback of its own, nothing is left then that could fail again."""
    if sys.stdout is None:  # closed by whoever started the program
        return
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise


def _fail(sentence: str) -> int:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show each warning as one line that names no source file of ours."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        from tqdm import tqdm

        # Through tqdm, which moves a visible progress bar out of the way.
        tqdm.write(f"warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", SkippedInput)
        warnings.showwarning = show
        yield


# --------------------------------------------------------------- commands

# File names need not be UTF-8; their bytes are written as they are.
_CSV = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}


def _fit(args: argparse.Namespace) -> None:
    from .config import read_options
    from .detector import Detector
    from .files import check_writable
    from .training.distributed import processes
    from .training.state import TrainingCheckpoint

    options = read_options(args.config) if args.config else {}
    given = {key: getattr(args, key) for key in _FIT_OPTIONS if getattr(args, key) is not None}
    if "train_steps" in given:
        options.pop("train_budget", None)  # which would be in place of it
    detector = Detector(**(options | given))
    state, first = f"{args.out}.training", processes().first
    pictures = f"{args.out}.pictures" if args.pictures_every else None
    _keep_apart(args.data, args.out, args.out, pictures)
    if first:
        check_writable(args.out)
        check_writable(state)
    if args.resume and not os.path.exists(state):
        raise InputError(
            f"there is no unfinished training to resume: {state} does not exist; leave out --resume"
        )
    samples, groups = _normals(detector, args)
    kept = TrainingCheckpoint(
        state, seconds=args.checkpoint_every, resume=args.resume, log=f"{args.out}.csv",
        pictures_every=args.pictures_every,
    )  # fmt: skip
    try:
        detector.fit(samples, groups=groups, training_checkpoint=kept)
        if first:
            detector.save(args.out)
    except KeyboardInterrupt as interrupt:
        if os.path.exists(state):
            told = f": the training is kept in {state}; repeat the command with --resume to go on"
        else:
            told = " before there was a state to keep"
        interrupt.args = (told,)
        raise
    if first:
        kept.remove()
        print(_fit_summary(detector, samples, args.out), file=sys.stderr)


def _normals(detector: Detector, args: argparse.Namespace) -> tuple[Samples, list[str] | None]:
    """The samples that a command is to learn from, and their groups."""
    from .data.groups import groups_by_regex
    from .data.sources import training_part

    source, groups = training_part(
        detector.config.kind, args.data, args.layout, args.normal, args.folds
    )
    if args.clip_seconds is not None:
        return _cut_normals(detector, source, groups, args)
    samples = detector.open(source, strict=args.strict)
    if args.group_regex:
        if samples.paths is None:
            raise InputError("--group-regex reads names of files: leave it out for a table")
        groups = groups_by_regex(samples.paths, args.group_regex)
    return samples, groups


def _cut_normals(
    detector: Detector, source, groups: list[str] | None, args: argparse.Namespace
) -> tuple[Samples, list[str]]:
    """Clips of so many seconds, of which those of one recording, or of one group of recordings,
    belong together."""
    from .data.audio import cut_recordings
    from .data.groups import groups_by_regex

    config = detector.config
    if config.kind != "audio":
        raise InputError(f"--clip-seconds is for recordings: leave it out for {config.kind}s")
    paths = [source] if isinstance(source, str) else source
    if args.group_regex:
        groups = groups_by_regex(paths, args.group_regex)
    groups = groups or paths
    clips, recordings = cut_recordings(
        source, config.sample_rate, args.clip_seconds, highest=config.fmax, strict=args.strict
    )
    return detector.open(clips, strict=args.strict), [groups[i] for i in recordings]


def _keep_apart(
    data: str, out: str, file: str | os.PathLike, pictures: str | os.PathLike | None = None
) -> None:
    """Raise InputError where ``file`` is ``data``, or it and a folder of ``pictures`` lie in each
    other: what the next command would read, or this one replace. All are written for ``out``."""
    if os.path.exists(file) and os.path.exists(data) and os.path.samefile(data, file):
        raise InputError(f"--out would overwrite the data, {data}: give another name")
    if pictures is None:
        return
    source, folder = Path(data).resolve(), Path(pictures).resolve()
    if source in (folder, *folder.parents) or folder in source.parents:
        raise InputError(
            f"--out {out} puts pictures into {pictures}, and the data are {data}: one lies in the "
            "other, and pictures would be taken for data, or data go with old ones; give another "
            "place"
        )


def _fit_summary(detector: Detector, samples, out: str) -> str:
    left_out = f" ({len(samples.skipped)} left out)" if samples.skipped else ""
    total, loss = len(samples.load()), detector.history.kept_loss
    split = detector.parts[0].split
    if len(detector.parts) > 1:
        trained = f"trained on all {total} {samples.unit}s{left_out}"
    else:
        trained = (
            f"trained on {len(split.fit)} of {total} {samples.unit}s{left_out}, held out "
            f"{len(split.validation)} for validation, {len(split.statistics)} for statistics, "
            f"{len(split.conformal)} for p-values"
        )
    return (
        f"{trained}; {detector.history.seconds:.1f} s"
        + ("" if loss is None else f", validation loss {loss:.4f}")
        + "".join(f"; {note}" for note in detector.history.notes)
        + ("" if detector.threshold is not None else f"; {detector.conformal.why_no_label()}")
        + f"; saved as {out}"
    )


def _loaded(args: argparse.Namespace) -> Detector:
    from .persistence import load

    detector = load(args.model, device=args.device)
    if args.mode is not None:
        detector.mode = args.mode
    if args.false_positive_rate is not None:
        detector.false_positive_rate = args.false_positive_rate
    return detector


def _calibrate(args: argparse.Namespace) -> None:
    from .files import check_writable
    from .training.distributed import processes

    detector, first = _loaded(args), processes().first
    _keep_apart(args.data, args.out, args.out)
    if first:
        check_writable(args.out)
    samples, groups = _normals(detector, args)
    detector.recalibrate(samples, groups=groups)
    if first:
        detector.save(args.out)
        if detector.threshold is None:
            above = detector.conformal.why_no_label()
        else:
            above = f"{detector.mode} labels above a score of {detector.threshold:.4g}"
        print(
            f"p-values of {len(samples.load())} {samples.unit}s; {above}; saved as {args.out}",
            file=sys.stderr,
        )


def _score(args: argparse.Namespace) -> None:
    from .files import result_folder
    from .training.distributed import processes

    out = Path(args.out)
    _keep_apart(args.data, args.out, out / "scores.csv", out / "heatmaps")
    _keep_apart(args.data, args.out, out / "windows.csv")
    detector = _loaded(args)
    if args.windows and detector.config.kind != "audio":
        raise InputError(f"--windows is for recordings: leave it out for {detector.config.kind}s")
    if args.windows and (args.batch_size is not None or not args.maps):
        raise InputError(
            "--windows scores window by window and draws no maps: leave out --batch-size, --no-maps"
        )
    if not processes().first:
        if args.windows:
            return
        # Scores its share and hands it to the first, which writes.
        options = {"maps": args.maps, "batch_size": args.batch_size, "strict": args.strict}
        for _ in detector.score_iter(args.data, **options):
            pass
        return
    with result_folder(args.out, "heatmaps", "windows.csv") as staged:
        path = staged / "scores.csv"
        with open(path, "w", **_CSV) as file, ThreadPoolExecutor() as pool:
            writer = csv.writer(file)
            writer.writerow(["path", "score", "p_value", "label", "left_out"])
            if args.windows:
                pairs = _by_windows(detector, args.data, args.strict, staged / "windows.csv")
            else:
                pairs = detector.score_pairs(
                    args.data, maps=args.maps, batch_size=args.batch_size, strict=args.strict
                )
            for batch, part in pairs:
                for skipped, reason in part.skipped:
                    writer.writerow([skipped, "", "", "", reason])
                paths = part.index.tolist() if part.paths is None else part.paths
                labels = [""] * len(part) if part.label is None else part.label.tolist()
                writer.writerows(
                    [name, repr(score), repr(p_value), label, ""]
                    for name, score, p_value, label in zip(
                        paths, part.score.tolist(), part.p_value.tolist(), labels, strict=True
                    )
                )
                if part.map is not None and len(part):
                    x = _scored_samples(detector, batch, part)
                    folder = staged / "heatmaps"
                    _write_heatmaps(detector, x, part, Path(args.data), folder, pool)


def _by_windows(
    detector: Detector, data: str, strict: bool, table: Path
) -> Iterator[tuple[None, Score]]:
    """The scores of recordings of any length, one after the other, as their windows make them;
    those are written to ``table``."""
    import numpy as np
    import torch

    from .data.audio_files import audio_files
    from .models.fusion import top_mean
    from .progress import progress
    from .scoring import Score
    from .streaming import stream_file

    paths, skipped, told = audio_files(data), [], set()
    strict = strict or os.path.isfile(data)
    seconds = detector.stream(detector.config.sample_rate).window  # or raise, before all are opened
    conformal, hertz = detector.conformal, detector.frequencies
    # Files of before have no number.
    known = detector.calibrations[detector.mode].most_windows
    fraction = detector.config.top_fraction
    if conformal.threshold is None:
        warnings.warn(f"label is None: {conformal.why_no_label()}", stacklevel=2)
    with open(table, "w", **_CSV) as file, progress(None, None, "scoring", "window") as bar:
        writer = csv.writer(file)
        writer.writerow(["path", "start", "end", "score", "p_value", "label", "frequency"])
        for number, path in enumerate(paths):
            begin, scores = file.tell(), []
            try:
                for part in stream_file(detector, path, told):
                    scores.append(part.score)
                    labels = [""] * len(part.score) if part.label is None else part.label
                    most = hertz[part.map.argmax(axis=1)]
                    writer.writerows(
                        [path, f"{end - seconds:.3f}", f"{end:.3f}", repr(score), repr(p_value),
                         label, f"{frequency:.1f}"]
                        for end, score, p_value, label, frequency in zip(
                            part.time, part.score.tolist(), part.p_value.tolist(), labels, most,
                            strict=True,
                        )
                    )  # fmt: skip
                    bar.update(len(part.score))
            except InputError as error:
                if strict:
                    raise
                file.seek(begin)
                file.truncate()
                warnings.warn(f"left out: {error}", SkippedInput, stacklevel=2)
                skipped.append((path, str(error)))
                continue
            curve = torch.from_numpy(np.concatenate(scores))[None]
            score = top_mean(curve, fraction).numpy()
            if fraction < 1 and curve.shape[1] > known > 0 and "windows" not in told:
                told.add("windows")
                warnings.warn(
                    f"{path} has {curve.shape[1]} windows and the normals behind the p-values had "
                    f"at most {known}: of more scores those that top_fraction={fraction:g} takes "
                    "may be higher, and the recording's p too small; go by those of the windows, "
                    "or fit on recordings as long as those that are scored",
                    stacklevel=2,
                )
            yield None, Score(
                score=score, map=None, p_value=conformal.p_value(score),
                label=conformal.label(score), paths=[path], index=np.array([number]),
                skipped=skipped,
            )  # fmt: skip
            skipped = []
    if len(skipped) == len(paths):
        raise InputError(
            f"none of the {len(paths)} clip files can be used, the first because {skipped[0][1]}"
        )
    none = np.empty(0)
    yield None, Score(none, None, none, None, [], none, skipped)


def _scored_samples(detector: Detector, batch: Batch | None, part: Score) -> torch.Tensor:
    """What ``part`` is about; read anew where another process has scored it."""
    if batch is None:
        batch = next(iter(detector.open(part.paths, strict=True).batches(len(part))))
    return batch.x


def _write_heatmaps(
    detector: Detector, x: torch.Tensor, part: Score, root: Path, folder: Path,
    pool: ThreadPoolExecutor,
) -> None:  # fmt: skip
    """One picture for each sample of a batch, in the same tree of folders as below ``root``."""
    from .report import drawing

    draw, target = drawing(detector), _targets(root, folder)

    def write(path: str, sample, map_) -> None:
        target(path).write_bytes(draw(sample, map_))

    # A clip's spectrogram is computed on all cores already.
    each = map if detector.config.kind == "audio" else pool.map
    list(each(write, part.paths, x.numpy(), part.map))


def _targets(root: Path, folder: Path) -> Callable[[str], Path]:
    """From a file below ``root`` to its picture below ``folder``, whose folder is made: of a.png
    a.png, of others with .png at their end. So a.jpg.png needs another end, beside a.jpg or not."""
    from .data.image_files import is_image
    from .files import with_end

    def target(path: str) -> Path:
        name = Path(path).relative_to(root if root.is_dir() else root.parent)
        if name.suffix.lower() != ".png" or is_image(name.stem):
            name = name.with_name(with_end(name.name, ".png"))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        return folder / name

    return target


def _evaluate(args: argparse.Namespace) -> None:
    from .report.text import evaluation_text
    from .training.distributed import processes

    if not processes().first:
        args.report = None
    detector = _loaded(args)
    metrics = detector.evaluate(
        args.data, strict=args.strict, report=args.report,
        layout=args.layout, normal=args.normal, folds=args.folds,
    )  # fmt: skip
    if not processes().first:
        return
    if args.json:
        print(json.dumps(metrics, allow_nan=False))
    else:
        print(evaluation_text(detector.config.kind, metrics))


def _info(args: argparse.Namespace) -> None:
    import diffad_fast

    print(json.dumps(diffad_fast.info(), indent=None if args.json else 2))


def _bench(args: argparse.Namespace) -> None:
    if Path("benchmarks", "__main__.py").is_file():
        sys.path.insert(0, os.getcwd())  # as `python -m` has it, and a console script does not
    try:
        found = importlib.util.find_spec("benchmarks.__main__") is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise InputError(
            "the benchmark suite is not installed: it is in the folder benchmarks of the source "
            "repository, run `python -m benchmarks` there"
        )
    sys.argv[1:] = args.arguments
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)


# ---------------------------------------------------------------- options

_FIT_OPTIONS = (
    "kind", "preset", "denoiser", "features", "image_size", "channels", "train_steps",
    "train_budget", "batch_size", "seed", "device",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffad-fast",
        description="Anomaly detection with diffusion models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"diffad-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str, **options) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **options)
        sub.set_defaults(command=run)
        return sub

    fit = command("fit", _fit, "Train a detector on normal images, clips or rows.")
    fit.add_argument(
        "data", help="folder of normal images or clips, root of a data set's layout, or a table"
    )
    fit.add_argument("--out", required=True, metavar="FILE", help="detector, such as m.diffad")
    fit.add_argument("--kind", help="what the data is: image (default), audio or vector")
    fit.add_argument("--preset", help="recipe: fast, balanced (default), best, or dcase for audio")
    fit.add_argument("--denoiser", help="token-mlp or unet-tiny, -small or -base (the preset's)")
    fit.add_argument(
        "--features", metavar="NAME",
        help="pretrained network whose features count too: yamnet or a file of its weights for "
        "audio, for a U-Net timm's",
    )  # fmt: skip
    fit.add_argument(
        "--image-size", type=_size, metavar="S", help="side in pixels, or HEIGHTxWIDTH (256)"
    )
    fit.add_argument("--channels", type=int, metavar="C", help="1 for grey (default), 3 for colour")
    length = fit.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, dest="train_steps", metavar="N", help="training steps")
    length.add_argument(
        "--budget", type=_duration, dest="train_budget", metavar="TIME",
        help="time that the training may take, instead of --steps: 300, 300s, 5min, 2h",
    )  # fmt: skip
    fit.add_argument(
        "--batch-size", type=_batch, metavar="N",
        help="samples read together (16 images, 32 clips, 4096 rows), of U-Nets also a training "
        "step; auto: for U-Nets, as many as fit into a GPU's memory",
    )  # fmt: skip
    fit.add_argument("--seed", type=int, metavar="N", help="of everything random (0)")
    fit.add_argument(
        "--config", metavar="FILE", help="JSON object of options; those given here override it"
    )
    fit.add_argument(
        "--resume", action="store_true", help="continue the interrupted training of --out"
    )
    fit.add_argument(
        "--checkpoint-every", type=_duration, default=300.0, metavar="TIME",
        help="how often the training is kept on disk: 300, 300s, 5min (default), 2h",
    )  # fmt: skip
    fit.add_argument(
        "--pictures-every", type=_positive, metavar="K",
        help="every K steps a picture of held-out normals, their reconstructions and samples, in "
        "the folder FILE.pictures; of U-Nets",
    )  # fmt: skip

    score = command("score", _score, "Score samples: scores.csv, heatmaps of images and clips.")
    score.add_argument("model", help="detector that fit wrote")
    score.add_argument("data", help="folder of images or clips, one file, or a table")
    score.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    score.add_argument("--batch-size", type=_positive, metavar="N", help="images scored together")
    score.add_argument("--no-maps", action="store_false", dest="maps", help="scores.csv only")
    score.add_argument(
        "--windows", action="store_true",
        help="of recordings, also those of hours: windows.csv in place of heatmaps, a row for each "
        "window with its time, score and most anomalous frequency; of processes one does it",
    )  # fmt: skip

    calibrate = command(
        "calibrate", _calibrate, "Take p-values and threshold from other normals, without training."
    )
    calibrate.add_argument("model", help="detector that fit wrote")
    calibrate.add_argument("data", help="normals that it was not fitted on, as for fit")
    calibrate.add_argument("--out", required=True, metavar="FILE", help="detector; may be MODEL")
    calibrate.set_defaults(mode=None)  # that of the file stays: all modes are calibrated

    evaluate = command("evaluate", _evaluate, "Compare scores with ground truth: AUROC and others.")
    evaluate.add_argument("model", help="detector that fit wrote")
    evaluate.add_argument(
        "data",
        help="root of a data set of images or clips in one of the layouts, or a table with labels",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.add_argument("--report", metavar="DIR", help="folder for an HTML report")

    for sub in (fit, calibrate):
        sub.add_argument(
            "--group-regex", metavar="RE",
            help="files whose names agree in what its first parenthesis matches show one object "
            "and belong together",
        )  # fmt: skip
        sub.add_argument(
            "--clip-seconds", type=float, metavar="S",
            help="cut recordings, also those of hours, into clips of so many seconds; those of one "
            "recording belong together",
        )  # fmt: skip

    for sub in (fit, calibrate, evaluate):
        sub.add_argument(
            "--layout", default="auto",
            help="auto (default); of images mvtec (MVTec AD, BTAD), mvtec_loco, mvtec_ad2 or visa; "
            "of audio folder, urbansound8k or dcase",
        )  # fmt: skip
        sub.add_argument("--normal", metavar="CLASS", help="the normal class of urbansound8k")
        sub.add_argument(
            "--folds", type=_folds, metavar="N[,N]", help="folds of urbansound8k (all)"
        )

    for sub in (score, evaluate):
        sub.add_argument(
            "--mode", help="how scores are made: reconstruct, invert, one_step (as fitted)"
        )

    for sub in (score, calibrate, evaluate):
        sub.add_argument(
            "--false-positive-rate", type=float, metavar="R",
            help="share of normals that may be labelled anomalous (as fitted, 0.05)",
        )  # fmt: skip

    for sub in (fit, score, calibrate, evaluate):
        sub.add_argument("--device", help="cpu or cuda; default: the best there is")
        sub.add_argument("--strict", action="store_true", help="stop at the first unusable file")

    info = command("info", _info, "Tell versions, what was built and which backends serve.")
    info.add_argument("--json", action="store_true", help="on one line")
    # The suite has options of its own, --help among them.
    command("bench", _bench, "Run the benchmark suite of the source repository.", add_help=False)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _batch(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _folds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} are not folds: give numbers such as 1 or 1,2,3")
    return [int(number) for number in text.split(",")]


def _size(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: give a side such as 256, or HEIGHTxWIDTH such as 192x256"
        )
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))


def _duration(text: str) -> float:
    """Seconds, from "300", "300s", "5min" or "2h"."""
    from .config import duration

    try:
        return duration(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
