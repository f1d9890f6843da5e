"""Public diffusion detectors of tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.quality import dte
from diffad_fast.errors import InputError


def test_public_detectors_train_on_standardised_normals(tmp_path):
    """By a stand-in for their code: what it is given, and that its scores come back."""
    (tmp_path / "diffusion").mkdir()
    for module, kind in dte.DETECTORS.values():
        (tmp_path / "diffusion" / f"{module}.py").write_text(
            "import numpy as np, torch\n"
            f"class {kind}:\n"
            "    def __init__(self, seed):\n"
            "        self.drawn = torch.rand(1).item() + 10 * np.random.rand()\n"
            "    def fit(self, train):\n"
            "        assert len(train) == 30 and np.abs(train.mean(0)).max() < 1e-6\n"
            "        assert np.allclose(train.std(0), 1)\n"
            "        print('epoch 0')\n"
            "        return self\n"
            "    def predict_score(self, test):\n"
            "        assert len(test) > 1, 'DDPM takes no single row'\n"
            "        return np.append(test[:-1, 0] + self.drawn, np.float32('nan'))\n"
        )
    rng = np.random.default_rng(0)
    train, test = (3 + 7 * rng.standard_normal((n, 2)) for n in (30, 4))
    torch.manual_seed(5)
    np.random.seed(5)
    expected = (test[:3, 0] - train[:, 0].mean()) / train[:, 0].std()
    expected += torch.rand(1).item() + 10 * np.random.rand()
    found = list(dte.detectors(tmp_path, train, test, seed=5))
    assert [name for name, _, _ in found] == ["DTE-NP", "DTE-C", "DDPM"]
    for _, scores, costs in found:
        np.testing.assert_allclose(scores, [*expected, 0.0])
        assert costs["fit_seconds"] > 0 and costs["latency_ms"] > 0
    with pytest.raises(InputError, match="is no clone of https://github.com/vicliv/DTE"):
        next(dte.detectors(tmp_path / "diffusion", train, test, seed=5))
