"""Detectors that a user would try first, and the published way, each small and plain.

Called with decoded images (n,1,H,W) float32 in [0,1]; they give (maps (n,H,W), scores (n,)), or
(scores,) where they have no map.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# As our U-Net's maps are by default: smoothed by this part of the side, and scored by this part of
# their pixels. Our token detectors smooth by 1/32 and take the maximum.
SMOOTHING, TOP = 1 / 64, 0.01


class PcaResidual:
    """What the principal components of the training images cannot explain of an image."""

    note = "scikit-learn PCA of whole images, at most 64 components"

    def __init__(self, train: torch.Tensor):
        from sklearn.decomposition import PCA

        flat = train.flatten(1).numpy()
        self.pca = PCA(min(64, len(flat) // 2), random_state=0).fit(flat)

    def __call__(self, images):
        flat = images.flatten(1).numpy()
        residual = np.abs(flat - self.pca.inverse_transform(self.pca.transform(flat)))
        return _smoothed(residual.reshape(len(images), *images.shape[2:]))


class PatchNeighbours:
    """Distance of each patch of pixels to the nearest one of the training images."""

    note = "scikit-learn, nearest of 10,000 patches of 8×8 pixels, stride 4"

    def __init__(self, train: torch.Tensor, side: int = 8, stride: int = 4, keep: int = 10_000):
        from sklearn.neighbors import NearestNeighbors

        self.side, self.stride = side, stride
        patches = self._patches(train)
        chosen = np.random.default_rng(0).permutation(len(patches))[:keep]
        self.index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(patches[chosen])

    def _patches(self, images):
        columns = F.unfold(images, self.side, stride=self.stride)
        return columns.transpose(1, 2).flatten(0, 1).numpy()

    def __call__(self, images):
        height, width = images.shape[2:]
        rows = (height - self.side) // self.stride + 1
        distance = self.index.kneighbors(self._patches(images))[0][:, 0]
        maps = torch.from_numpy(distance.astype(np.float32)).reshape(len(images), 1, rows, -1)
        full = F.interpolate(maps, (height, width), mode="bilinear", align_corners=False)
        return _smoothed(full[:, 0].numpy())


class PyodPixels:
    """A PyOD detector on images shrunk to 16×16 pixels; no map."""

    def __init__(self, kind: str, train: torch.Tensor):
        import importlib

        self.note = f"{kind} on images shrunk to 16×16; no map"
        module = importlib.import_module(f"pyod.models.{kind.lower()}")
        self.model = getattr(module, kind)().fit(self._shrunk(train))

    def _shrunk(self, images):
        return F.adaptive_avg_pool2d(images, 16).flatten(1).numpy()

    def __call__(self, images):
        return (self.model.decision_function(self._shrunk(images)),)


class PublishedDiffusion:
    """Reconstruction as the published code of diffusion detectors does it: a U-Net on pixels, noise
    to half of 1000 steps, DDIM back, the difference smoothed. Plain eager PyTorch, batch by batch.

    Random weights: only its time is of interest.
    """

    compiled = False
    note = "plain PyTorch"

    def __init__(self, device: torch.device, start: int = 500):
        torch.manual_seed(0)
        self.device, self.start = device, start
        self.model = PixelUNet().to(device).eval()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0).to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, steps: int):
        x0 = images.to(self.device) * 2 - 1
        times = torch.linspace(self.start, 0, steps + 1).round().long().tolist()
        a = self.alphas[self.start]
        x = a.sqrt() * x0 + (1 - a).sqrt() * torch.randn_like(x0)
        for t, s in zip(times[:-1], times[1:], strict=True):
            a, b = self.alphas[t], self.alphas[s]
            epsilon = self.model(x, torch.full((len(x),), t, device=self.device))
            x = b.sqrt() * (x - (1 - a).sqrt() * epsilon) / a.sqrt() + (1 - b).sqrt() * epsilon
        return _smoothed((x - x0).abs().mean(dim=1).cpu().numpy())


class DiffusersReconstruction:
    """The same with diffusers: UNet2DModel and DDIMScheduler. Random weights."""

    def __init__(self, device: torch.device, compiled: bool = False):
        from diffusers import DDIMScheduler, UNet2DModel

        torch.manual_seed(0)
        blocks = (
            ("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
            ("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
        )
        model = UNet2DModel(
            in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
            block_out_channels=PixelUNet.WIDTHS, down_block_types=blocks[0],
            up_block_types=blocks[1],
        )  # fmt: skip
        self.parameters = sum(p.numel() for p in model.parameters())
        self.model, self.device, self.compiled = model.to(device).eval(), device, compiled
        if compiled:
            mode = "reduce-overhead" if device.type == "cuda" else None
            self.model = torch.compile(self.model, mode=mode)
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.note = "diffusers UNet2DModel and DDIMScheduler"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, steps: int):
        x0 = images.to(self.device) * 2 - 1
        # As many steps as asked for lie in the lower half of the schedule.
        self.scheduler.set_timesteps(2 * steps, device=self.device)
        times = self.scheduler.timesteps[steps:]
        x = self.scheduler.add_noise(x0, torch.randn_like(x0), times[:1])
        for t in times:
            x = self.scheduler.step(self.model(x, t).sample, t, x).prev_sample
        return _smoothed((x - x0).abs().mean(dim=1).cpu().numpy())


class PixelUNet(nn.Module):
    """A small U-Net of the usual kind at full resolution, about 1 M parameters: four resolutions,
    residual blocks with GroupNorm and SiLU, attention at the coarsest."""

    WIDTHS = (24, 32, 64, 96)

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.first = nn.Conv2d(1, self.WIDTHS[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        previous = self.WIDTHS[0]
        for width in self.WIDTHS:
            self.down.append(_Block(previous, width))
            self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
            previous = width
        self.middle = _Block(previous, previous)
        self.attention = nn.MultiheadAttention(previous, 4, batch_first=True)
        self.up = nn.ModuleList()
        for width in reversed(self.WIDTHS):
            self.up.append(_Block(previous + width, width))
            previous = width
        self.last = nn.Sequential(nn.GroupNorm(8, previous), nn.SiLU(),
                                  nn.Conv2d(previous, 1, 3, padding=1))  # fmt: skip

    def forward(self, x, t):
        frequencies = torch.exp(-torch.arange(32, device=x.device) * (9.2 / 32))
        angles = t[:, None].float() * frequencies
        e = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        h, skips = self.first(x), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, e)
            skips.append(h)
            h = shrink(h)
        h = self.middle(h, e)
        tokens = h.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        h = tokens.transpose(1, 2).reshape(h.shape)
        for block in self.up:
            h = F.interpolate(h, skips[-1].shape[2:], mode="nearest")
            h = block(torch.cat([h, skips.pop()], dim=1), e)
        return self.last(h)


class _Block(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(128, width)
        self.skip = nn.Conv2d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(e)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def _smoothed(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps (n,H,W) smoothed, and the mean of the top 1% of each."""
    from scipy.ndimage import gaussian_filter

    sigma = min(maps.shape[1:]) * SMOOTHING
    maps = np.stack([gaussian_filter(one, sigma) for one in maps])
    flat = maps.reshape(len(maps), -1)
    count = max(1, round(TOP * flat.shape[1]))
    return maps, np.partition(flat, -count, axis=1)[:, -count:].mean(axis=1)
