import torch

from diffad_fast.training.ema import EMA


def test_average_by_its_recursion():
    module = torch.nn.Linear(3, 2)
    ema = EMA(module, decay=0.5)
    expected = [p.detach().clone() for p in module.parameters()]
    for step in range(12):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        ema.update(module, step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = [
            keep * e + (1 - keep) * p.detach()
            for e, p in zip(expected, module.parameters(), strict=True)
        ]
    ema.copy_to(module)
    for p, e in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)
