"""anomalib: a diffusion model for its ``Engine``.

Importing this module makes the model known: ``get_model("diffad_fast")``.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..detector import Detector
from ..errors import InputError
from ..ops.dispatch import by_reference
from ..persistence import from_state
from ..surroundings import evaluating
from ._host import require

require("anomalib")

from anomalib import LearningType  # noqa: E402
from anomalib.data import Batch, InferenceBatch  # noqa: E402
from anomalib.metrics import Evaluator  # noqa: E402
from anomalib.models.components import AnomalibModule, MemoryBankMixin  # noqa: E402
from anomalib.post_processing import PostProcessor  # noqa: E402
from anomalib.pre_processing import PreProcessor  # noqa: E402
from anomalib.visualization import Visualizer  # noqa: E402
from torchvision.transforms.v2 import Resize  # noqa: E402

__all__ = ["DiffADFast"]

STATE = "diffad_fast"


class DiffADFast(MemoryBankMixin, AnomalibModule):
    """:class:`diffad_fast.Detector` of images as an anomalib model.

    The one epoch of ``Engine().fit`` gathers the training images; then the detector trains and
    calibrates itself on them, in its own loop and its own number of steps.

    preset: "fast", "balanced" or "best". image_size: side, or (height, width), in pixels.
    channels: 3, or 1 for the mean of the three that anomalib reads. denoiser, mode, train_steps:
    override the preset's. options: further options of :class:`diffad_fast.Detector` by name;
    without a ``device`` the detector computes on that of the Engine, and one from a checkpoint on
    the best there is. seed: of everything random. pre_processor, post_processor, evaluator,
    visualizer: as in every anomalib model; a pre-processor has to leave images in [0, 1].

    Modules among the options are copied, and are not in checkpoints: ``load_from_checkpoint`` takes
    the options again.
    """

    def __init__(
        self,
        preset: str = "balanced",
        image_size: int | tuple[int, int] = 256,
        channels: int = 3,
        denoiser: str | nn.Module | None = None,
        mode: str | None = None,
        train_steps: int | None = None,
        options: dict[str, Any] | None = None,
        seed: int = 0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        super().__init__(
            pre_processor=self.configure_pre_processor(size) if pre_processor is True
            else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )  # fmt: skip
        chosen = {"denoiser": denoiser, "mode": mode, "train_steps": train_steps}
        self.model = GatheringDetector({
            "preset": preset, "image_size": size, "channels": channels, "seed": seed,
            **{name: value for name, value in chosen.items() if value is not None},
            **(options or {}),
        })  # fmt: skip

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resized to ``image_size`` (256x256), and left in [0, 1]."""
        return PreProcessor(transform=Resize(list(image_size or (256, 256)), antialias=True))

    @staticmethod
    def configure_optimizers() -> None:
        """None: the detector trains itself in :meth:`fit`."""

    def on_train_start(self) -> None:
        """Begin anew, whatever an earlier fit or an interrupted one has left."""
        super().on_train_start()
        self.model.detector, self.model.gathered = None, []
        self._is_fitted = torch.tensor([False], device=self.device)

    def training_step(self, batch: Batch, *args, **kwargs) -> torch.Tensor:
        """Keep the batch's images."""
        self.model(batch.image)
        return torch.tensor(0.0, requires_grad=True, device=self.device)

    def fit(self) -> None:
        """Train and calibrate on the images of the epoch."""
        self.model.fit(self.device)

    def validation_step(self, batch: Batch, *args, **kwargs) -> Batch:
        """Scores and maps of a batch."""
        return batch.update(**self.model(batch.image)._asdict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # weights_only=True reads no modules.
        checkpoint["hyper_parameters"] = _plain(checkpoint["hyper_parameters"])
        if self.model.detector is not None:
            tensors, texts = self.model.detector.state()
            checkpoint[STATE] = {"tensors": tensors, "texts": texts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if STATE in checkpoint:
            detector = self.model.loaded(**checkpoint[STATE])
            # The first score makes what the next ones need, packed weights and noise. An export
            # must not be the first: it computes with tensors that hold no numbers.
            config = detector.config
            with torch.inference_mode():
                detector.model.score(torch.zeros(1, config.channels, *config.image_size))
            self.model.detector = detector

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One epoch on one device, without a look at the validation set before it.

        ``max_steps`` is without a limit, whatever the Engine was given: its steps are the batches
        that are gathered, and a limit would leave out training images without a word. The number of
        optimisation steps is ``train_steps``.
        """
        return {
            "gradient_clip_val": 0, "max_epochs": 1, "max_steps": -1, "num_sanity_val_steps": 0,
            "devices": 1,
        }  # fmt: skip

    @property
    def learning_type(self) -> LearningType:
        """Normal images alone."""
        return LearningType.ONE_CLASS


class GatheringDetector(nn.Module):
    """Gathers images in training mode; scores them otherwise.

    Images (N,3,H,W) in [0,1]. The detector is no part of the state_dict: the module that holds this
    one saves it.
    """

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options
        self._made()  # what is wrong with the options is said at once
        self.detector: Detector | None = None
        self.gathered: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> InferenceBatch | torch.Tensor:
        if self.options["channels"] == 1:
            images = images.mean(dim=1, keepdim=True)
        if self.training:
            # As bytes, as which files and cameras give them: a quarter of the memory.
            self.gathered.append((images * 255).round().clamp(0, 255).byte().cpu())
            return images
        if self.detector is None:
            raise InputError("the model is not fitted: call Engine().fit, or load a checkpoint")
        # An exported program runs without our operators.
        exporting = torch.compiler.is_exporting()
        with by_reference() if exporting else nullcontext():
            model = self.detector.model
            with torch.autocast(images.device.type, enabled=False), evaluating(model):
                map_, score = model.score(images)
        map_, score = map_.to(images.device), score.to(images.device)
        return InferenceBatch(pred_score=score, anomaly_map=map_[:, None])

    def fit(self, device: torch.device) -> None:
        """Fit a detector on ``device`` to what was gathered, and let go of that."""
        if not self.gathered:
            raise InputError("there are no training images: call Engine().fit with a datamodule")
        images = torch.cat(self.gathered)
        self.gathered = []
        # Lightning validates in inference mode, and the detector trains.
        with torch.inference_mode(False), torch.enable_grad():
            self.detector = self._made(device).fit(images.clone())

    def loaded(self, tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> Detector:
        """The detector in a checkpoint, with the modules and on the device of the options."""
        modules = {
            name: copy.deepcopy(module)
            for name in ("denoiser", "features")
            if isinstance(module := self.options.get(name), nn.Module)
        }
        device = self.options.get("device")
        return from_state(tensors, texts, "the checkpoint", device=device, **modules)

    def _made(self, device: str | torch.device = "cpu") -> Detector:
        """A detector on a device, unless the options name another."""
        return Detector(**{"device": device} | copy.deepcopy(self.options))


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Those that are no modules, at any depth."""
    return {
        name: _plain(value) if isinstance(value, dict) else value
        for name, value in options.items()
        if not isinstance(value, nn.Module)
    }
