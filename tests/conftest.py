from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data: the folder in DIFFAD_DATA, or shared/data beside the repository."""
    folder = os.environ.get("DIFFAD_DATA") or Path(__file__).parents[2] / "shared" / "data"
    if not Path(folder).is_dir():
        pytest.skip(f"no real data: {folder} is not there, set DIFFAD_DATA")
    return Path(folder)
