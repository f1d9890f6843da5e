"""Tables of the figures of ``Detector.evaluate``, as text and in HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple


class Missing(NamedTuple):
    """A cell of a figure that is undefined, and why, if that is known."""

    why: str


class Table(NamedTuple):
    """``head`` has a name for each column; of each row the first cell is its name."""

    head: list[str]
    rows: list[list[str | Missing]]


def cells(figures: Mapping, names: Iterable[str]) -> list[str | Missing]:
    """A cell for each of these figures; blank where there is none of that name."""
    found = []
    for name in names:
        value = figures.get(name, "")
        if value is None:
            found.append(Missing(figures["undefined"].get(name, "")))
        else:
            found.append(value if value == "" else f"{value:.3f}")
    return found


def reasons(undefined: Mapping[str, str], names: Mapping[str, str]) -> Iterator[str]:
    """Why figures are undefined, each reason once behind the names of its figures."""
    for reason in dict.fromkeys(undefined.values()):
        which = [names.get(key, key) for key, why in undefined.items() if why == reason]
        yield f"{', '.join(which)}: {reason}"


def text(table: Table) -> list[str]:
    """A line for the head and one for each row, in columns."""
    lines = [
        ["-" if isinstance(c, Missing) else c for c in row] for row in (table.head, *table.rows)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]


def markup(table: Table) -> Iterator[str]:
    """The table in HTML; the reason of a missing figure shows where a pointer rests on it."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.head)
    yield f"<table><thead><tr>{head}</tr></thead><tbody>"
    for row in table.rows:
        yield f"<tr>{''.join(map(_cell, row))}</tr>"
    yield "</tbody></table>"


def _cell(cell: str | Missing) -> str:
    if isinstance(cell, Missing):
        return f"<td title='{html.escape(cell.why)}'>—</td>"
    return f"<td>{html.escape(cell)}</td>"
