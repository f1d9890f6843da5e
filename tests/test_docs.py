"""The pages of the reference name what is public; `make docs` builds them and needs more."""

import importlib
import re
from pathlib import Path

import pytest

import diffad_fast
from diffad_fast import ops, representations

PAGES = sorted((Path(__file__).parents[1] / "docs" / "api").glob("*.md"))
NAMED = re.findall(r"^::: (\S+)$", "\n".join(map(Path.read_text, PAGES)), re.MULTILINE)
OBJECTS = [
    *((ops, name) for name in ops.__all__),
    *((diffad_fast, name) for name in diffad_fast.__all__ if name not in ("__version__", "ops")),
    (representations, "LogMel"),
]


def found(path: str):
    """The module or the object of a module at a dotted path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)


def shown() -> list:
    """What the pages show: what they name, and of modules what these define or export."""
    everything = []
    for path in NAMED:
        if path.startswith("diffad_fast.integrations."):
            continue  # whose hosts may be missing
        named = found(path)
        everything.append(named)
        exported = getattr(named, "__all__", ())
        for name, value in vars(named).items() if hasattr(named, "__file__") else ():
            own = getattr(value, "__module__", None) == path and not name.startswith("_")
            if own or name in exported:
                everything.append(value)
    return everything


SHOWN = set(map(id, shown()))


@pytest.mark.parametrize("module, name", OBJECTS, ids=lambda one: getattr(one, "__name__", one))
def test_a_public_name_stands_in_the_reference(module, name):
    assert id(getattr(module, name)) in SHOWN
