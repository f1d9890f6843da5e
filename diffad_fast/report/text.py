"""What ``Detector.evaluate`` found as text for a terminal."""

from __future__ import annotations

import sys

from . import PAGES
from .tables import reasons, text


def evaluation_text(kind: str, metrics: dict) -> str:
    """Tables of the figures, the speed, and why a figure is missing."""
    if kind == "vector":
        lines, names = _vectors(metrics), {}
    else:
        page, lines = PAGES[kind], []
        for table in page.tables(metrics):
            rows = [[printable(row[0]), *row[1:]] for row in table.rows]
            lines += text(table._replace(rows=rows))
        speed = f"{metrics['latency_ms']:.1f} ms {page.one}"
        if "real_time" in metrics:
            speed += f", {metrics['real_time']:.0f} times real time"
        if metrics["threshold"] is not None:
            speed += f"; labelled above a score of {metrics['threshold']:.4g}"
        lines.append(f"{metrics['n_normal']} normal {page.unit}s; {speed}")
        names = page.figures
    return "\n".join([*lines, *(f"- {reason}" for reason in reasons(metrics["undefined"], names))])


def _vectors(metrics: dict) -> list[str]:
    """A line for each figure."""
    figures = {k: v for k, v in metrics.items() if k != "undefined"}
    width = max(map(len, figures))
    return [
        f"{k.ljust(width)}  {'-' if v is None else v if isinstance(v, int) else f'{v:.3f}'}"
        for k, v in figures.items()
    ]


def printable(name: str) -> str:
    """A folder's name as standard output can show it: bytes that are no text are escaped there."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        name.encode(encoding, getattr(sys.stdout, "errors", None) or "strict")
    except UnicodeEncodeError:
        return name.encode(encoding, "backslashreplace").decode(encoding)
    return name
