import pytest
import torch

from diffad_fast.models.fusion import fuse, standards, top_mean, weighted
from diffad_fast.scoring import MapStatistics

WEIGHTS = [1.0, 0.5, 2.0, 1.0]


def statistics(kinds: str) -> list[MapStatistics]:
    """Of maps (6,5), each by position (p) or as scalars (s)."""
    shapes = [(6, 5) if kind == "p" else () for kind in kinds]
    return [
        MapStatistics(torch.randn(shape).double(), 0.1 + torch.rand(shape).double())
        for shape in shapes
    ]


@pytest.mark.parametrize("kinds", ["ssss", "pppp", "spsp"])
@pytest.mark.parametrize("top", [0.0, 0.2, 1.0])
def test_maps_of_one_size_are_fused_alike_in_few_calls(kinds, top):
    maps, known = torch.randn(4, 3, 6, 5).double(), statistics(kinds)
    expected, score = fuse(list(maps), known, WEIGHTS, 0.0, top)
    found = weighted(maps, *standards(known, WEIGHTS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(top_mean(found, top), score, rtol=0, atol=1e-13)
    one = weighted(maps[:, 1:2], *standards(known, WEIGHTS))
    assert torch.equal(one, found[1:2])


@pytest.mark.parametrize("top, count", [(0.0, 1), (0.02, 1), (0.1, 3), (1.0, 30)])
def test_the_mean_of_the_largest(top, count):
    maps = torch.randn(7, 6, 5)
    expected = maps.flatten(1).sort(dim=1, descending=True).values[:, :count].mean(dim=1)
    torch.testing.assert_close(top_mean(maps, top), expected)
    maps[2, 3, 3] = float("nan")
    assert top_mean(maps, top).isnan().nonzero().tolist() == [[2]]
