"""Diffusion of an image's wavelet coefficients by a network that sees the whole image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .. import denoisers, ops
from ..config import DetectorConfig
from ..denoisers import inference
from ..diffusion import Graphed, ReverseLoop
from ..diffusion.loop import network_dtype
from ..errors import InputError
from ..ops.maps import MAPS
from ..representations import WaveletRepresentation, feature_maps
from ..scoring import FeatureDistance, MapStatistics, Split
from ..training import batch
from ..training.distributed import processes
from ..training.history import History
from ..training.images import ImageTrainer
from ..training.philox_steps import PICTURE_STEPS
from ..training.state import TrainingCheckpoint
from .base import Model, resize_buffers
from .fusion import fuse, resized

# Samples for the pictures of a training start at what is nearly noise alone.
SAMPLE_SIGMA, SAMPLE_STEPS = 20.0, 20


class CoefficientModel(Model):
    """Haar packet, denoiser on it, three modes of scoring.

    denoiser: a module of one's own, else the one that ``config`` names. features: a module
    ``images (N,C,H,W) -> list of maps`` for the feature map of ``reconstruct``, in place of the
    denoiser's own features.
    """

    def __init__(
        self,
        config: DetectorConfig,
        device: torch.device,
        denoiser: nn.Module | None = None,
        features: nn.Module | None = None,
    ):
        super().__init__(config, device)
        self.representation = WaveletRepresentation(config.channels, config.haar_level)
        if denoiser is None:
            with self._seeded():
                denoiser = denoisers.create(config.denoiser, self.representation.channels)
        elif not isinstance(denoiser, denoisers.WaveletUNet):
            if config.inference_dtype == "bfloat16":
                raise InputError(
                    "inference_dtype='bfloat16' is for the built-in U-Nets: convert your denoiser "
                    "yourself and leave inference_dtype at 'float32'"
                )
            config = config.replace(inference_dtype="float32")
            dtype = network_dtype(denoiser)
            if dtype is not None and config.trains:
                raise InputError(
                    f"the denoiser's weights are in {dtype}, and training needs float32: pass "
                    "denoiser.float(), or take it as it is with train_steps=0"
                )
        self.config = config
        self.denoiser = denoiser.to(memory_format=torch.channels_last)
        self.backbone = None if features is None else features.eval().requires_grad_(False)
        self.distance = FeatureDistance(config.semantic) if config.semantic_weight > 0 else None
        self.to(device).eval()
        read = self.distance is not None or (config.map_weights[1] > 0 and features is None)
        if read and not hasattr(denoiser, "features"):
            raise InputError(
                f"{type(denoiser).__name__} has no method features, which map_weights="
                f"{config.map_weights} and semantic_weight={config.semantic_weight:g} need: pass "
                "map_weights=(1, 0, 1), or features=, and leave semantic_weight at 0"
            )
        # In a tuple, or it would be a part of the model and of its state.
        self._in_bfloat16: tuple[nn.Module, ...] = ()
        self.use(None)

    # ---------------------------------------------------------------- fit

    def learn(self, source, split: Split, kept: TrainingCheckpoint | None) -> History:
        """Fit the representation, train the denoiser, fit the features' distribution."""
        config = self.config
        if config.batch_size == "auto":
            begun = None if kept is None else kept.config()
            if begun is not None:
                config = config.with_batch(begun.batch_size)
            else:
                config = batch.with_auto_batch(
                    self.denoiser, self.representation, source, split.fit, config, self.device
                )
            self.config = config

        def batches(indices: Sequence[int]) -> Iterable[torch.Tensor]:
            for found in source.batches(config.batch_size, indices=indices):
                yield found.x.to(self.device)

        self.representation.fit(batches(split.fit))
        history = History()
        if config.trains:
            self.schedule.warn_untrained(config, *self.schedule.range)
            history = ImageTrainer(
                self.denoiser, self.representation, source, split.fit, split.validation,
                config, self.device, self._pictures,
            ).run(kept)  # fmt: skip
            self.config = config.replace(train_compile=history.compiled)
        self._settle_dtype()
        if self.distance is not None:
            with torch.inference_mode():
                self.distance.fit(
                    (self._coarsest(self.representation.encode(x)) for x in batches(split.fit)),
                    config.seed,
                )
        return history

    def _settle_dtype(self) -> None:
        """Settle "auto" once and for all, before anything is calibrated."""
        self._in_bfloat16 = ()
        config = self.config
        if config.inference_dtype == "auto":
            side = [s // 2**config.haar_level for s in config.image_size]
            x = torch.zeros(4, self.representation.channels, *side, device=self.device)
            x = x.contiguous(memory_format=torch.channels_last)
            dtype = processes().agreed(inference.faster_dtype(self.denoiser, x))
            self.config = config.replace(inference_dtype=dtype)

    @property
    def scoring_denoiser(self) -> nn.Module:
        """The denoiser in its inference dtype."""
        if self.config.inference_dtype != "bfloat16":
            return self.denoiser
        if not self._in_bfloat16:
            self._in_bfloat16 = (inference.in_dtype(self.denoiser, "bfloat16"),)
        return self._in_bfloat16[0]

    # -------------------------------------------------------------- score

    @property
    def has_semantic(self) -> bool:
        return self.distance is not None

    @property
    def map_names(self) -> list[str]:
        return self._mode_names(MAPS)

    @property
    def statistics_smoothing(self) -> float:
        return self.config.smoothing * (1 if self.config.mode == "reconstruct" else self._grid)

    @property
    def _grid(self) -> float:
        """Positions of the coefficients' grid in a pixel."""
        return 2.0**-self.config.haar_level

    def raw_maps(self, images: torch.Tensor) -> list[torch.Tensor | None]:
        """As of every model; nothing is smoothed."""
        config, images = self.config, images.to(self.device)
        if config.mode == "reconstruct":
            end, *features = self._reconstruction(self._evidence).eager(images)
            result: list[torch.Tensor | None] = [end.pixel, None, end.sub_band]
            if config.map_weights[1] > 0:
                one = (0.0, 1.0, 0.0)
                result[1] = ops.anomaly_map(images, end.x_hat, *features, one, sigma=0.0)[0]
            result = [m if w > 0 else None for m, w in zip(result, config.map_weights, strict=True)]
        elif config.mode == "invert":
            result = self._loop("invert", self._latent).eager(images)
        else:
            result = self._residuals(self.representation.encode(images))
        if self.distance is not None:
            result.append(self._semantic(images, self.representation.encode(images)))
        return result

    def _scoring_pass(self) -> Graphed | ReverseLoop:
        if self.config.mode == "one_step":
            return Graphed(self._score_one_step, [self.scoring_denoiser, self.representation])
        if self.config.mode == "invert":
            return self._loop("invert", self._score_latent)
        return self._reconstruction(self._score_reconstruction)

    @torch.inference_mode()
    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """The model's idea of images (N,C,H,W) in [0,1] without their anomalies."""
        return self._back_to_images().eager(images.to(self.device)).cpu()

    @torch.inference_mode()
    def _pictures(self, images: torch.Tensor) -> torch.Tensor:
        """(3,N,C,H,W) in [0,1] while the denoiser is trained: images, their reconstructions, and as
        many samples, the same noise each time."""
        config, images = self.config, images.to(self.device)
        # Not the denoiser of scoring, which in bfloat16 is a copy of what it was before.
        back = self._back_to_images(self.denoiser)
        x0 = self.representation.encode(images)
        draws = torch.arange(1, len(x0) + 1, device=self.device)
        noise = ops.philox_normal(x0.shape, config.seed, draws, PICTURE_STEPS.start, self.device)
        start = self.schedule.timestep(min(SAMPLE_SIGMA, self.schedule.range[1]))
        steps = self.schedule.reverse_steps(start, min(SAMPLE_STEPS, start + 1))
        sampler = ReverseLoop(self.denoiser, steps, prediction_type=config.prediction_type)
        samples = sampler.run(noise.contiguous(memory_format=torch.channels_last))
        samples = self.representation.decode(samples)
        return torch.stack([images, back.eager(images), samples]).clamp(0, 1)

    def trajectory(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        steps, denoiser = self._steps_of("invert"), self.scoring_denoiser
        x = self.representation.encode(images.to(self.device)) * steps[0].alpha_t ** 0.5
        ways = []
        for step in steps:
            loop = ReverseLoop(denoiser, [step], prediction_type=self.config.prediction_type)
            x_s = loop.run(x)
            way = x_s / step.alpha_s**0.5 - x / step.alpha_t**0.5
            ways.append(way.square().flatten(1).mean(dim=1))
            x = x_s
        return x.square().flatten(1).mean(dim=1), torch.stack(ways, dim=1)

    def _reconstruction(self, conclude) -> ReverseLoop:
        """From images to ``conclude(images, x0, end)``, end the :class:`ops.Finish` of their
        reconstruction."""
        return self._loop("reconstruct", conclude, finish=self.representation.finish)

    def _back_to_images(self, denoiser: nn.Module | None = None) -> ReverseLoop:
        """From images to their reconstructions."""
        decode = self.representation.decode
        return self._loop("reconstruct", lambda images, x0, x0_hat: decode(x0_hat), denoiser)

    def _loop(
        self, mode: str, conclude, denoiser: nn.Module | None = None, finish=None
    ) -> ReverseLoop:
        """From images to ``conclude(images, x0, x_end)``: in the mode invert up to their latent, in
        reconstruct there and back. denoiser: in place of that of scoring."""
        config, options = self.config, {}
        if mode == "reconstruct":
            names = "eta", "clip", "dynamic_threshold", "use_clipped_model_output", "guidance"
            options = {name: getattr(config, name) for name in names}
        denoiser = self.scoring_denoiser if denoiser is None else denoiser
        return ReverseLoop(
            denoiser,
            self._steps_of(mode),
            seed=config.seed,
            prediction_type=config.prediction_type,
            prepare=self.representation.encode,
            conclude=conclude,
            finish=finish,
            modules=[denoiser, self.representation],
            **options,
        )

    # reconstruct

    def _evidence(self, images: torch.Tensor, x0: torch.Tensor, end: ops.Finish) -> tuple:
        """(end, features of the images, features of their reconstruction)."""
        if self.config.map_weights[1] == 0:
            return end, (), ()
        if self.backbone is not None:
            return end, *(feature_maps(self.backbone, x) for x in (images, end.x_hat))
        return end, self._features(x0), self._features(end.x0)

    def _score_reconstruction(
        self, images: torch.Tensor, x0: torch.Tensor, end: ops.Finish
    ) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        end, *features = self._evidence(images, x0, end)
        statistics = self.statistics
        ready = None  # the maps that the finish has given, standardised and weighted
        for i, map_ in ((0, end.pixel), (2, end.sub_band)):
            weight = config.map_weights[i]
            if weight > 0:
                mean, deviation = statistics[i]
                part = (map_ - mean) * (weight / deviation)
                ready = part if ready is None else ready + part
        map_, score = ops.anomaly_map(
            images,
            end.x_hat,
            *features,
            weights=(0.0, config.map_weights[1], 0.0),
            stats=(None, statistics[1], None),
            sigma=config.smoothing,
            top=config.top_fraction,
            base=ready,
        )
        if self.distance is None:
            return map_, score
        own = features[0] if self.backbone is None else ()
        share = sum(config.map_weights)
        standard = MapStatistics(score.new_zeros(()), score.new_full((), share))
        return fuse(
            [map_, self._semantic(images, x0, own)], [standard, statistics[3]],
            [share, config.semantic_weight], 0.0, config.top_fraction,
        )  # fmt: skip

    # invert

    def _latent(self, images: torch.Tensor, x0: torch.Tensor, z: torch.Tensor) -> list:
        """[mean square of the latent over channels (N,h,w)]."""
        return [z.square().mean(dim=1)]

    def _score_latent(self, images: torch.Tensor, x0: torch.Tensor, z: torch.Tensor) -> tuple:
        return self._fused(self._latent(images, x0, z), images, x0)

    # one_step

    def _residuals(self, x0: torch.Tensor) -> list[torch.Tensor]:
        """mean over channels of (D(x0, sigma) - x0)^2 at each of the levels (N,h,w)."""
        sigmas = self.config.sigmas
        n = x0.shape[0]
        # Filled on the device: a capture must not copy from the host.
        sigma = torch.cat([x0.new_full((n,), s, dtype=torch.float32) for s in sigmas])
        alpha = (1 / (1 + sigma**2))[:, None, None, None]
        x = x0.repeat(len(sigmas), 1, 1, 1)
        x_in = (x * alpha.sqrt()).contiguous(memory_format=torch.channels_last)
        denoiser = self.scoring_denoiser
        output = denoiser(self._as_weights(x_in, denoiser), sigma.log()).to(x.dtype)
        # x_in as a state at its level: its clean estimate is D.
        if self.config.prediction_type == "v_prediction":
            clean = alpha.sqrt() * x_in - (1 - alpha).sqrt() * output
        elif self.config.prediction_type == "epsilon":
            clean = (x_in - (1 - alpha).sqrt() * output) / alpha.sqrt()
        else:
            clean = output
        residuals = (clean - x).square().mean(dim=1)
        return list(residuals.unflatten(0, (len(sigmas), n)).unbind(0))

    def _score_one_step(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x0 = self.representation.encode(images)
        return self._fused(self._residuals(x0), images, x0)

    # all

    def _fused(self, maps: list[torch.Tensor], images: torch.Tensor, x0: torch.Tensor) -> tuple:
        config = self.config
        weights = [1.0 / len(maps)] * len(maps)
        if self.distance is not None:
            maps = [*maps, self._semantic(images, x0)]
            weights.append(config.semantic_weight)
        map_, score = fuse(
            maps, self.statistics, weights, config.smoothing * self._grid, config.top_fraction
        )
        return resized(map_, config.image_size), score

    def _features(self, x0: torch.Tensor) -> list[torch.Tensor]:
        """The denoiser's features of coefficients, at the level ``feature_sigma``."""
        (x, level), denoiser = self._at_feature_level(x0), self.scoring_denoiser
        found = denoiser.features(self._as_weights(x, denoiser), level)
        return [f.to(x0.dtype) for f in found]

    @staticmethod
    def _as_weights(x: torch.Tensor, denoiser: nn.Module) -> torch.Tensor:
        """x in the dtype of the weights; the built-in U-Nets take float32 whatever theirs is."""
        if isinstance(denoiser, denoisers.WaveletUNet):
            return x
        return x.to(network_dtype(denoiser) or x.dtype)

    def _coarsest(self, x0: torch.Tensor) -> torch.Tensor:
        """(N,h,w,C): the features that see most of the image."""
        return self._features(x0)[-1].permute(0, 2, 3, 1)

    def _semantic(
        self, images: torch.Tensor, x0: torch.Tensor, features: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """(N,h,w), in reconstruct at the size of the images. features: of x0, where they are known
        already."""
        coarsest = features[-1].permute(0, 2, 3, 1) if features else self._coarsest(x0)
        distance = self.distance(coarsest)
        in_pixels = self.config.mode == "reconstruct"
        return resized(distance, images.shape[2:] if in_pixels else x0.shape[2:])

    # --------------------------------------------------------- checkpoint

    @staticmethod
    def _is_of_backbone(name: str) -> bool:
        return name.startswith("backbone.")

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        # As it was fitted: the weight may have been changed since.
        self.distance = None
        if any(name.startswith("distance.") for name in tensors):
            self.distance = FeatureDistance(self.config.semantic).to(self.device)
            resize_buffers(self.distance, tensors, "distance.")
        super().restore(tensors)
        self._in_bfloat16 = ()
