"""Diffusion of an image's wavelet coefficients by a network that sees the whole image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .. import denoisers, ops
from ..config import DetectorConfig
from ..denoisers import inference
from ..diffusion import Graphed, NoiseSchedule, ReverseLoop, ReverseStep
from ..diffusion.loop import network_dtype
from ..errors import InputError
from ..representations import WaveletRepresentation, feature_maps
from ..scoring import MAPS, FeatureDistance, MapStatistics, Split
from ..training import batch
from ..training.distributed import processes
from ..training.images import Trainer
from ..training.loop import History, TrainingCheckpoint
from .fusion import fuse, resized

# Samples for the pictures of a training start at what is nearly noise alone.
SAMPLE_SIGMA, SAMPLE_STEPS = 20.0, 20
SAMPLE_STEP = 2**32 - 2**19  # of philox_normal; the validation's end before it


class CoefficientModel(nn.Module):
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
        super().__init__()
        self.device = device
        self.representation = WaveletRepresentation(config.channels, config.haar_level)
        if denoiser is None:
            # With the weights of its seed. torch.manual_seed would seed GPUs, too.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(config.seed)
                denoiser = denoisers.create(config.denoiser, self.representation.channels)
        elif not isinstance(denoiser, denoisers.WaveletUNet):
            if config.inference_dtype == "bfloat16":
                raise InputError(
                    "inference_dtype='bfloat16' is for the built-in U-Nets: convert your denoiser "
                    "yourself and leave inference_dtype at 'float32'"
                )
            config = config.replace(inference_dtype="float32")
            dtype = network_dtype(denoiser)
            if dtype is not None and config.train_steps:
                raise InputError(
                    f"the denoiser's weights are in {dtype}, and training needs float32: pass "
                    "denoiser.float(), or take it as it is with train_steps=0"
                )
        self.config = config
        self.denoiser = denoiser.to(memory_format=torch.channels_last)
        self.backbone = None if features is None else features.eval().requires_grad_(False)
        self.distance = FeatureDistance(config.semantic) if config.semantic_weight > 0 else None
        self.schedule = NoiseSchedule(config.schedule, config.diffusion_steps)
        self.to(device).eval()
        read = self.distance is not None or (config.map_weights[1] > 0 and features is None)
        if read and not hasattr(denoiser, "features"):
            raise InputError(
                f"{type(denoiser).__name__} has no method features, which map_weights="
                f"{config.map_weights} and semantic_weight={config.semantic_weight:g} need: pass "
                "map_weights=(1, 0, 1), or features=, and leave semantic_weight at 0"
            )
        for inverts in (True, False):
            self._steps(inverts)  # raises for steps that the schedule does not have
        # In a tuple, or it would be a part of the model and of its state.
        self._in_bfloat16: tuple[nn.Module, ...] = ()
        self._scoring: Graphed | ReverseLoop | None = None
        self.use(None)

    # ---------------------------------------------------------------- fit

    def learn(self, source, split: Split, kept: TrainingCheckpoint | None) -> History:
        """Fit the representation, train the denoiser, fit the features' distribution; once in a
        model's life."""
        config = self.config
        if config.batch_size == "auto":
            begun = None if kept is None else kept.config()
            if begun is not None:
                config = config.with_batch(begun.batch_size)
            else:
                config = batch.settled(
                    self.denoiser, self.representation, source, split.fit, config, self.device
                )
            self.config = config

        def batches(indices: Sequence[int]) -> Iterable[torch.Tensor]:
            for found in source.batches(config.batch_size, indices=indices):
                yield found.x.to(self.device)

        self.representation.fit(batches(split.fit))
        history = History()
        if config.train_steps:
            self.schedule.warn_untrained(config, *self.schedule.range)
            history = Trainer(
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

    def use(self, statistics: list[MapStatistics | None] | None) -> None:
        """Standardise the maps of the configuration's mode by ``statistics`` from now on."""
        self.statistics = statistics
        self.release()
        # Made at the first score and kept, with the graphs that it captures on a GPU, until what
        # they read is replaced.
        self._scoring = None

    def release(self) -> None:
        """Give back the memory of the graphs."""
        if self._scoring is not None:
            self._scoring.forget()

    @property
    def map_names(self) -> list[str]:
        """What each of :meth:`raw_maps` is."""
        config = self.config
        names = {
            "reconstruct": list(MAPS),
            "invert": ["latent"],
            "one_step": [f"residual at {sigma:g}" for sigma in config.sigmas],
        }[config.mode]
        return names + (["semantic"] if self.distance is not None else [])

    @property
    def statistics_smoothing(self) -> float:
        """Deviation of the Gaussian for statistics per position, in positions of the maps."""
        return self.config.smoothing * (1 if self.config.mode == "reconstruct" else self._grid)

    @property
    def _grid(self) -> float:
        """Positions of the coefficients' grid in a pixel."""
        return 2.0**-self.config.haar_level

    def raw_maps(self, images: torch.Tensor) -> list[torch.Tensor | None]:
        """Each map alone, neither standardised nor smoothed; None where it has no weight."""
        config, images = self.config, images.to(self.device)
        if config.mode == "reconstruct":
            end, *features = self._reconstruction(self._evidence).eager(images)
            result: list[torch.Tensor | None] = [end.pixel, None, end.sub_band]
            if config.map_weights[1] > 0:
                one = (0.0, 1.0, 0.0)
                result[1] = ops.anomaly_map(images, end.x_hat, *features, one, sigma=0.0)[0]
            result = [m if w > 0 else None for m, w in zip(result, config.map_weights, strict=True)]
        elif config.mode == "invert":
            result = self._loop(self._latent).eager(images)
        else:
            result = self._residuals(self.representation.encode(images))
        if self.distance is not None:
            result.append(self._semantic(images, self.representation.encode(images)))
        return result

    def score(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(map (N,H,W), score (N,)) of images (N,C,H,W)."""
        if self._scoring is None:
            if self.config.mode == "one_step":
                modules = [self.scoring_denoiser, self.representation]
                self._scoring = Graphed(self._score_one_step, modules)
            elif self.config.mode == "invert":
                self._scoring = self._loop(self._score_latent)
            else:
                self._scoring = self._reconstruction(self._score_reconstruction)
        return self._scoring(images.to(self.device))

    @torch.inference_mode()
    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """The model's idea of images (N,C,H,W) in [0,1] without their anomalies."""
        loop = self._loop(lambda images, x0, x0_hat: self.representation.decode(x0_hat), False)
        return loop.eager(images.to(self.device)).cpu()

    @torch.inference_mode()
    def _pictures(self, images: torch.Tensor) -> torch.Tensor:
        """(3,N,C,H,W) in [0,1] while the denoiser is trained: images, their reconstructions, and as
        many samples, the same noise each time."""
        config, images = self.config, images.to(self.device)
        decode = self.representation.decode
        # Not the denoiser of scoring, which in bfloat16 is a copy of what it was before.
        back = self._loop(lambda images, x0, x0_hat: decode(x0_hat), False, self.denoiser)
        x0 = self.representation.encode(images)
        draws = torch.arange(1, len(x0) + 1, device=self.device)
        noise = ops.philox_normal(x0.shape, config.seed, draws, SAMPLE_STEP, self.device)
        start = self.schedule.timestep(min(SAMPLE_SIGMA, self.schedule.range[1]))
        steps = self.schedule.reverse_steps(start, min(SAMPLE_STEPS, start + 1))
        sampler = ReverseLoop(self.denoiser, steps, prediction_type=config.prediction_type)
        samples = decode(sampler.run(noise.contiguous(memory_format=torch.channels_last)))
        return torch.stack([images, back.eager(images), samples]).clamp(0, 1)

    def trajectory(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the inversion of images: mean square of the latent (N,) and, of every step, the mean
        square of the way (N,S), as the states of the variance-exploding process go. In mode invert
        only."""
        steps, denoiser = self._steps(), self.scoring_denoiser
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
        return self._loop(conclude, False, finish=self.representation.finish)

    def _loop(
        self, conclude, inverts: bool = True, denoiser: nn.Module | None = None, finish=None
    ) -> ReverseLoop:
        """From images to ``conclude(images, x0, x_end)``: up to their latent, or through their
        reconstruction. denoiser: in place of that of scoring."""
        config, options = self.config, {}
        if not inverts:
            options = {"eta": config.eta, "clip": config.clip, "guidance": config.guidance}
        denoiser = self.scoring_denoiser if denoiser is None else denoiser
        return ReverseLoop(
            denoiser,
            self._steps(inverts),
            seed=config.seed,
            prediction_type=config.prediction_type,
            prepare=self.representation.encode,
            conclude=conclude,
            finish=finish,
            modules=[denoiser, self.representation],
            **options,
        )

    def _steps(self, inverts: bool = True) -> list[ReverseStep]:
        config = self.config
        if inverts:
            return self.schedule.inversion_steps(*config.inversion_sigmas, config.inversion_steps)
        start = self.schedule.timestep(config.start_sigma)
        return self.schedule.reverse_steps(start, config.reverse_steps)

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
        statistics = self.statistics or [None] * 3
        ready = None  # the maps that the finish has given, standardised and weighted
        for i, map_ in ((0, end.pixel), (2, end.sub_band)):
            weight = config.map_weights[i]
            if weight > 0:
                mean, deviation = statistics[i] or (0.0, 1.0)
                part = (map_ - mean) * (weight / deviation)
                ready = part if ready is None else ready + part
        map_, score = ops.anomaly_map(
            images,
            end.x_hat,
            *features,
            weights=(0.0, config.map_weights[1], 0.0),
            stats=None if self.statistics is None else (None, statistics[1], None),
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
            [map_, self._semantic(images, x0, own)], [standard, self.statistics[3]],
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
        sigma = self.config.feature_sigma
        level = x0.new_full((x0.shape[0],), math.log(sigma), dtype=torch.float32)
        # The network expects inputs of the variance-preserving process at that level.
        x, denoiser = x0 * (1 + sigma**2) ** -0.5, self.scoring_denoiser
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

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that :meth:`restore` needs."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what :meth:`state` gave. Raises RuntimeError where it does not fit."""
        if self.distance is not None:
            restore_buffers(self.distance, tensors, "distance.")
        missing, unexpected = self.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if not name.startswith("backbone.")]
        if missing or unexpected:
            raise RuntimeError(f"tensors {', '.join([*missing, *unexpected][:3])} do not match")
        self._in_bfloat16 = ()


def restore_buffers(module: nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    """Give the buffers below ``module``, whose sizes come from data, the sizes in ``tensors``."""
    for name, buffer in list(module.named_buffers()):
        if prefix + name in tensors:
            parent, _, own = name.rpartition(".")
            sized = torch.empty_like(buffer, memory_format=torch.contiguous_format)
            sized = sized.new_empty(tensors[prefix + name].shape)
            setattr(module.get_submodule(parent), own, sized)
