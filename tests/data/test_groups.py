"""Which samples belong together."""

import re

import numpy as np
import pytest
import torch

from diffad_fast.data.groups import group_labels, groups_by_regex
from diffad_fast.errors import InputError


@pytest.mark.parametrize(
    "given",
    [["a", "b", "a"], ("a", "b", "a"), np.array(["a", "b", "a"]), iter("aba")],
)
def test_labels_are_a_list(given):
    assert group_labels(given, 3) == ["a", "b", "a"]


def test_labels_of_tensors_are_numbers():
    assert group_labels(torch.tensor([4, 5, 4]), 3) == [4, 5, 4]
    assert group_labels([torch.tensor(4), np.int64(5), 4], 3) == [4, 5, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (7, "groups is 7: give a label for each of the 2 samples"),
        ([1, 2, 3], "groups has 3 labels for 2 samples"),
        ([[1], [2]], "groups has the label [1]: give a number or a text a sample"),
        ([(1, [2]), 3], "groups has the label (1, [2])"),
        ([torch.zeros(2), 1], "groups has the label tensor([0., 0.])"),
        (np.array([1, np.nan]), "groups has the label nan, which equals no label, not even itself"),
        ([None, float("nan")], "groups has the label nan"),
    ],
)
def test_labels_that_cannot_be_compared(given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        group_labels(given, 2)


def test_groups_by_names_of_files():
    paths = ["x/num_12_a.png", "num_3/num_12_b.png", "num_4_a.png"]
    assert groups_by_regex(paths, r"num_(\d+)") == ["12", "12", "4"]
    assert groups_by_regex(paths, r"num_\d+") == ["num_12", "num_12", "num_4"]
    with pytest.raises(InputError, match=r"group regex 'num_\(b\)' does not match num_12_a\.png"):
        groups_by_regex(paths, "num_(b)")
    with pytest.raises(InputError, match=r"does not match num_4_a\.png"):  # the parenthesis
        groups_by_regex(paths, r"num_(12)?")
    with pytest.raises(InputError, match=r"group regex '\(' is not a regular expression: missing"):
        groups_by_regex(paths, "(")
