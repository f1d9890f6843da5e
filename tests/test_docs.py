"""The pages of the reference name what is public; `make docs` builds them and needs more."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import diffad_fast
from diffad_fast import diffusion, ops, representations
from diffad_fast.denoisers import token_mlp

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted((DOCS / "api").glob("*.md"))
NAMED = re.findall(r"^::: (\S+)$", "\n".join(map(Path.read_text, PAGES)), re.MULTILINE)
OBJECTS = [
    *((ops, name) for name in ops.__all__),
    *((diffad_fast, name) for name in diffad_fast.__all__ if name not in ("__version__", "ops")),
    *((diffusion, name) for name in diffusion.__all__),
    *((token_mlp, name) for name in ("TokenMLP", "ddim_row", "residual_row")),
    (ops.token_mlp, "laid_out"),
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


def test_the_loop_of_a_token_mlp_runs_as_it_stands(monkeypatch):
    monkeypatch.setattr(token_mlp, "zero_init", lambda layer: layer)  # predicts something
    pages = re.findall(r"```python\n(.*?)```", (DOCS / "pipeline.md").read_text(), re.DOTALL)
    (code,) = [page for page in pages if "token_mlp_loop" in page]
    drawn = torch.randn(1000, 64)
    monkeypatch.setattr(torch, "randn", lambda *shape: drawn)
    names: dict = {}
    exec(code, names)
    loop = diffusion.ReverseLoop(names["mlp"], names["steps"])
    torch.testing.assert_close(names["end"], loop.run(drawn), rtol=1e-5, atol=1e-5)
    assert names["ways"].shape == (1000, 5)
