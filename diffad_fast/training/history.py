"""What a training reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class History:
    """What a training run reports: losses by step, and the seconds that it took in all."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    validation_loss: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    best_step: int | None = None
    """The step after which the averaged weights had the lowest validation loss: those are kept."""
    compiled: bool = False
    """The steps went through torch.compile."""
    notes: list[str] = field(default_factory=list)
    """What trials have found, in words."""

    @property
    def steps(self) -> int:
        """Steps that were taken; of several networks by each."""
        return max((step for step, _ in self.loss), default=-1) + 1

    @property
    def kept_loss(self) -> float | None:
        """The validation loss of the weights that were kept; None without any, and for several
        networks, of which each has its own."""
        if self.best_step is None:
            return None
        return dict(self.validation_loss)[self.best_step]

    @staticmethod
    def joined(parts: Sequence[History]) -> History:
        """The losses of several networks, one after another, and their seconds together."""
        if len(parts) == 1:
            return parts[0]
        return History(
            loss=[entry for part in parts for entry in part.loss],
            validation_loss=[entry for part in parts for entry in part.validation_loss],
            seconds=sum(part.seconds for part in parts),
            compiled=any(part.compiled for part in parts),
            notes=[note for part in parts for note in part.notes],
        )


def is_history(found) -> bool:
    """Of the types of a History's fields, with a loss of the step that was kept."""

    def number(n) -> bool:
        return type(n) in (int, float)

    def curve(entries) -> bool:
        return isinstance(entries, list) and all(
            isinstance(entry, list) and len(entry) == 2 and all(map(number, entry))
            for entry in entries
        )

    checks = {
        "loss": curve,
        "validation_loss": curve,
        "seconds": number,
        "best_step": lambda step: step is None or step in [k for k, _ in found["validation_loss"]],
        "compiled": lambda flag: isinstance(flag, bool),
        "notes": lambda notes: isinstance(notes, list) and all(isinstance(n, str) for n in notes),
    }
    return (
        isinstance(found, dict)
        and found.keys() == checks.keys()
        and all(check(found[name]) for name, check in checks.items())
    )
