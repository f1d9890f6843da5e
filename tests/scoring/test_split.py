import pytest

from diffad_fast.config import DetectorConfig
from diffad_fast.errors import InputError
from diffad_fast.scoring import split_by_group

CONFIG = DetectorConfig.create()


@pytest.mark.parametrize("n", [8, 9, 50, 659])
def test_parts_are_disjoint_and_complete(n):
    split = split_by_group(range(n), None, CONFIG)
    parts = split[:4]
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert all(parts)
    if n == 659:
        assert [len(p) for p in parts] == [461, 33, 66, 99]
        assert split.conformal_groups == split.conformal


def test_groups_stay_together():
    groups = [i // 5 for i in range(200)]
    split = split_by_group(range(200), groups, CONFIG)
    sets = [{groups[i] for i in part} for part in split[:4]]
    for i, a in enumerate(sets):
        for b in sets[:i]:
            assert not a & b
    assert split.conformal_groups == [groups[i] for i in split.conformal] and len(sets[3]) == 6


@pytest.mark.parametrize("seed", range(5))
def test_large_groups_stay_in_training(seed):
    """Recordings as they are: a few make most of the clips."""
    sizes = [79, 22, 11, 7, 1]
    groups = [name for name, size in zip("abcde", sizes, strict=True) for _ in range(size)]
    split = split_by_group(range(120), groups, CONFIG.replace(seed=seed))
    assert {groups[i] for i in split.fit} == {"a", "b"}
    # Unless there is nothing else.
    groups = [name for name in "abcd" for _ in range(30)]
    split = split_by_group(range(120), groups, CONFIG.replace(seed=seed))
    assert [len(part) for part in split[:4]] == [30, 30, 30, 30]


def test_seed_decides():
    a, b, c = (split_by_group(range(100), None, CONFIG.replace(seed=s)) for s in (0, 0, 1))
    assert a == b != c


def test_too_little_data():
    with pytest.raises(InputError, match="1 usable normal sample.*at least 8"):
        split_by_group([0], None, CONFIG)
    with pytest.raises(InputError, match="2 object"):
        split_by_group(range(20), [i % 2 for i in range(20)], CONFIG)
