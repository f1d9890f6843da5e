"""Detectors as folders that model hubs understand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path

from ..detector import Detector
from ..errors import InputError
from ..files import write_atomically
from ..persistence import load
from ..version import __version__
from ._host import require

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# Options of from_pretrained that are for the download.
DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# Behind a card that was written here; it is not shown.
_MARK = "\n<!-- written by diffad_fast, and anew unless it was changed: "


def save_pretrained(
    detector: Detector, folder: str | os.PathLike, data: str | None, repo_id: str | None = None
) -> str | None:
    """See :meth:`diffad_fast.Detector.save_pretrained`; the card that stays, if one does."""
    folder = Path(folder)
    _save(detector, folder)
    path = folder / CARD
    kept = _edited(path if path.exists() else None, path)
    if kept is None:
        write_atomically(path, card(detector, data, repo_id).encode())
    return kept


def _save(detector: Detector, folder: Path) -> None:
    """All but the card."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from None
    # The checkpoint is a safetensors file already, with everything in it; the others tell of it.
    detector.save(folder / WEIGHTS)
    config = {"library_name": "diffad_fast", "library_version": __version__}
    config |= dataclasses.asdict(detector.config)
    write_atomically(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def push_to_hub(
    detector: Detector,
    repo_id: str,
    data: str | None,
    commit_message: str,
    private: bool | None,
    token: str | None,
    branch: str | None,
    create_pr: bool | None,
    text: str | None,
) -> str:
    """See :meth:`diffad_fast.Detector.push_to_hub`."""
    api = require("huggingface_hub").HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _save(detector, folder)  # it may raise: nothing is made on the hub before
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if text is None:
            path = None
            if api.file_exists(repo_id, CARD, revision=branch):
                path = Path(api.hf_hub_download(repo_id, CARD, revision=branch))
            if _edited(path, f"{repo_id}/{CARD}") is None:
                text = card(detector, data, repo_id)
        if text is not None:
            write_atomically(folder / CARD, text.encode(errors="surrogateescape"))
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=branch,
            create_pr=create_pr,
        )  # fmt: skip


def _edited(path: Path | None, name: str | os.PathLike) -> str | None:
    """The text of a card that is there and somebody's own, which stays, with a warning."""
    text = None if path is None else path.read_text(encoding="utf-8", errors="surrogateescape")
    if text is None or text == _marked(text.rpartition(_MARK)[0]):
        return None
    warnings.warn(
        f"{name} was edited, or is of an earlier version, and stays as it is: delete it to have "
        "one of this detector",
        stacklevel=4,
    )
    return text


def _marked(text: str) -> str:
    """The text with a mark by which it is known for unchanged."""
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return f"{text}{_MARK}{digest[:16]} -->\n"


def from_pretrained(name: str | os.PathLike, **options) -> Detector:
    """See :meth:`diffad_fast.Detector.from_pretrained`."""
    download = {key: options.pop(key) for key in DOWNLOAD if key in options}
    if Path(name).is_dir():
        return load(Path(name) / WEIGHTS, **options)
    name = os.fspath(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise InputError(f"{name} is neither a folder nor the name of a repository, owner/name")
    return load(require("huggingface_hub").hf_hub_download(name, WEIGHTS, **download), **options)


def card(detector: Detector, data: str | None, name: str | None) -> str:
    """The model card: what the detector is, on what it was fitted, how it was calibrated, and how
    it is read from the repository of that ``name``."""
    config = detector.config
    rows = ["| mode | held-out normals | groups | threshold | false-positive rate |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for mode, calibration in detector.calibrations.items():
        conformal, threshold = calibration.conformal, calibration.conformal.threshold
        rows.append(
            f"| {mode}{' (default)' if mode == config.mode else ''} | {len(conformal.scores)} | "
            f"{conformal.groups} | {'none' if threshold is None else f'{threshold:.4g}'} | "
            f"{config.false_positive_rate:g} |"
        )
    what = {
        "image": f"images of {config.image_size[0]}x{config.image_size[1]} pixels, "
        f"{config.channels} channel{'s' if config.channels > 1 else ''}, values in [0, 1]",
        "audio": f"recordings of one channel at {config.sample_rate} Hz",
        "vector": "vectors of numbers",
    }[config.kind]
    calibration = "\n".join(rows)
    return _marked(f"""---
library_name: diffad_fast
tags:
- anomaly-detection
- diffusion
---

# Anomaly detector by diffusion

Kind: {config.kind} ({what}). Denoiser: {config.denoiser}. Preset: {config.preset}. Seed:
{config.seed}. Training: {detector.history.steps} steps, {detector.history.seconds:.0f} s.
Written by diffad_fast {__version__}; every option is in {CONFIG}.

## Data

{data or "Not described: give save_pretrained(data=...) a sentence."}

## Calibration

A score above the threshold is labelled anomalous. p-values are conformal, from the scores of
held-out normal samples; they hold for normal samples like these alone.

{calibration}

## Use

```python
from diffad_fast import Detector

detector = Detector.from_pretrained("{name or "this folder or repository"}")
answer = detector.score(new_data)  # .score, .p_value, .label, .map
```
""")
