"""diffusers: the fused scheduler in a pipeline, the fast sampler, and a pipeline as a detector.

The U-Net here is a small untrained one; with `DDPMPipeline.from_pretrained(...)` it is yours.
"""

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import diffad_fast as daf
from diffad_fast.integrations.diffusers import FusedDDIMScheduler, fast_sampler


def main() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=8, down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)

    # One line in a pipeline: every DDIM step in two passes over memory.
    pipeline.scheduler = FusedDDIMScheduler.from_config(pipeline.scheduler.config)
    images = pipeline(num_inference_steps=5, output_type="np").images
    print("the pipeline's samples:", images.shape)

    # The whole loop, on a GPU as one CUDA graph.
    sampler = fast_sampler(unet, pipeline.scheduler, num_inference_steps=5)
    print("the fast sampler's:", tuple(sampler.run(torch.randn(2, 3, 32, 32)).shape))

    # A detector on that model: normal images calibrate it, nothing is trained.
    detector = daf.Detector.from_diffusers(pipeline, device="cpu", reverse_steps=3)
    rng = np.random.default_rng(0)
    detector.fit(rng.uniform(0.4, 0.6, (60, 3, 32, 32)).astype(np.float32))
    print("scores:", detector.score(rng.random((2, 3, 32, 32), np.float32)).score.round(2))


if __name__ == "__main__":
    main()
