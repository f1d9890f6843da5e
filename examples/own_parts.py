"""A denoiser and a feature extractor of one's own; see diffad_fast.protocols for what they are."""

import torch
from images import stripes
from torch import nn

import diffad_fast as daf


class Denoiser(nn.Module):
    """Three convolutions that know the noise level."""

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.level = nn.Linear(1, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x, log_sigma):
        return self.last(self.features(x, log_sigma)[-1])

    def features(self, x, log_sigma):
        h = torch.relu(self.first(x) + self.level(log_sigma[:, None])[:, :, None, None])
        return [h, torch.relu(self.middle(h))]


class Edges(nn.Module):
    """A feature extractor: gradients in two directions. A timm model's name would do as well."""

    def forward(self, images):
        return [torch.cat([images.diff(dim=2)[..., :-1], images.diff(dim=3)[..., :-1, :]], dim=1)]


def main() -> None:
    torch.manual_seed(0)
    # Two levels of the Haar packet make 16 channels of one. A denoiser that has not learnt what is
    # normal tells nothing apart: 60 steps are too few, 500 enough.
    detector = daf.Detector(
        image_size=64, denoiser=Denoiser(16), features=Edges(), haar_level=2, train_steps=500,
        mode="reconstruct", seed=0, device="cpu",
    )  # fmt: skip
    detector.fit(stripes(200, seed=1))
    for name, images in (("normal", stripes(5, 2)), ("broken", stripes(5, 3, broken=True))):
        print(name, detector.score(images, maps=False).score.round(2))


if __name__ == "__main__":
    main()
