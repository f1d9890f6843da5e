"""Order and levels of a training's samples."""

import torch

from diffad_fast.training.sampling import generator, stratified, visits


def test_an_epoch_visits_every_sample_once():
    positions, epochs = visits(8, 0, 48, seed=0)
    for epoch in range(6):
        assert sorted(positions[epochs == epoch].tolist()) == list(range(8))
        assert (epochs[8 * epoch : 8 * epoch + 8] == epoch).all()
    assert len({tuple(positions[8 * k : 8 * k + 8].tolist()) for k in range(6)}) > 1
    part = visits(8, 19, 41, seed=0)
    assert torch.equal(part[0], positions[19:41]) and torch.equal(part[1], epochs[19:41])


def test_levels_lie_one_in_each_part():
    u = stratified(50, generator(0, "level", 3))
    assert (u * 50).long().tolist() == list(range(50))
    assert len(set((u * 50 % 1).round(decimals=9).tolist())) == 1
