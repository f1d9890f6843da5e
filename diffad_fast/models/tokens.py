"""Diffusion of single tokens: of vectors, of the cells of an image, of windows of a clip."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from .. import native, ops
from ..config import DetectorConfig
from ..denoisers.token_mlp import TokenMLP, ddim_row, residual_row
from ..diffusion import Graphed, NoiseFields
from ..representations import WindowEmbedding, create_tokens
from ..representations.logmel import time_map
from ..representations.smoothing import GaussianSmoothing, Upsampling
from ..representations.tokens import SMALLEST_SMOOTHED
from ..scoring import FeatureDistance, MapStatistics, Split
from ..training.augment import augmented
from ..training.history import History
from ..training.state import TrainingCheckpoint
from ..training.tokens import SIGMA_RANGE, TokenTrainer
from .base import Model, resize_buffers
from .fusion import resized, standards, top_mean, weighted

# Windows of large images that are scored together.
WINDOWS = 32
# Tokens that a training keeps in memory: at 500 numbers each these take 1 GiB.
LARGEST_BANK = 1 << 19
# Samples, or windows of large images, that statistics of tokens rest on.
LARGEST_FIT = 2048


class TokenModel(Model):
    """One token MLP for every source of tokens, scored as whole loops of
    ``ops.token_mlp_loop``.

    features: the backbone behind the token source "features" of images, or the one that hears what
    windows of a clip mean.
    """

    closed_forms: Sequence[Callable[[torch.Tensor], torch.Tensor]] | None = None
    """In the denoisers' place, to compare them with: for each source of tokens, what gives the
    distances (M,) of its rows (M,dim). Set before :meth:`use`; not for clips."""

    def __init__(
        self, config: DetectorConfig, device: torch.device, features: nn.Module | None = None
    ):
        super().__init__(config, device)
        self.representation = create_tokens(config, features)
        heard = config.semantic_of == "features"
        self.embedding = WindowEmbedding(features, config) if heard else None
        self.denoisers = nn.ModuleList()
        self.distances = nn.ModuleList()
        self._smoothed = GaussianSmoothing()
        if config.kind == "image":
            self._upsampled = Upsampling(self.representation.offset)
        self.to(device).eval()
        self.use(None)

    # ---------------------------------------------------------------- fit

    def learn(self, source, split: Split, kept: TrainingCheckpoint | None) -> History:
        """Fit the representations and train a denoiser for each."""
        config = self.config
        self.schedule.warn_untrained(config, *SIGMA_RANGE)
        histories = []
        some = split.fit[:: -(-len(split.fit) // LARGEST_FIT)]  # evenly chosen

        def seen(batches: Callable) -> Callable:
            def parts() -> Iterator[torch.Tensor]:
                generator = torch.Generator().manual_seed(config.seed)
                for x in batches(source, some):
                    yield from self._seen(x, LARGEST_FIT * len(x) // len(some), generator)

            return parts

        passes = [seen(self._augmented_batches)]
        if config.augment:
            passes.append(seen(self._batches))
        if config.kind == "vector" and len(some) < len(split.fit):
            passes.append(lambda: self._batches(source, split.fit))
        self.representation.fit(*passes)
        if config.kind == "image":
            config = self.config = config.replace(**self.representation.preprocessing.choices)
        if config.semantic_weight is None:
            weight = 0.0 if self.representation.by_one_scale else 1.0
            config = self.config = config.replace(semantic_weight=weight)
        training, dims = config, self.representation.dims
        if config.train_budget is not None:
            training = config.replace(train_budget=config.train_budget / len(dims))
        validation = self._banks(source, split.validation)
        fitted = self._banks(source, split.fit, augment=True)
        sources = zip(dims, fitted, validation, strict=True)
        for number, (dim, bank, held_out) in enumerate(sources):
            denoiser = self._denoiser(dim)
            part = None if kept is None else kept.part(number)
            history = TokenTrainer(denoiser, bank, held_out, training, self.device).run(part)
            histories.append(history)
            # What the first one's trial has found holds for the others.
            training = training.replace(train_compile=history.compiled)
            self.denoisers.append(denoiser)
            if config.semantic_weight > 0:
                distance = FeatureDistance(config.semantic).to(self.device)
                if self.embedding is None:
                    means = (self._features(denoiser, rows) for rows in bank.split(8192))
                else:
                    means = map(self.embedding.of_normals, self._batches(source, some))
                with torch.inference_mode():
                    distance.fit(means, config.seed)
                self.distances.append(distance)
        config = self.config = config.replace(train_compile=training.train_compile)
        if config.inference_dtype == "auto":
            # Where there are units for its products, many tokens take little more than half the
            # time of float32's, and one takes no longer: no trial is needed.
            device = self.device.type
            units = device == "cuda" or (device == "cpu" and native.cpu_isa() in native.BF16_ISAS)
            self.config = config.replace(inference_dtype="bfloat16" if units else "float32")
        self.use(None)
        return History.joined(histories)

    def _batches(self, source, indices: Sequence[int]) -> Iterable[torch.Tensor]:
        for batch in source.batches(self.config.batch_size, indices=indices):
            yield batch.x.to(self.device)

    def _augmented_batches(self, source, indices: Sequence[int]) -> Iterable[torch.Tensor]:
        """The same batches, each followed by itself as ``augment`` changes it."""
        config = self.config
        for batch in source.batches(config.batch_size, indices=indices):
            x = batch.x.to(self.device)
            yield x
            if config.augment:
                epoch = torch.zeros_like(batch.index)
                yield augmented(x, config.augment, config.seed, batch.index, epoch)

    def _banks(self, source, indices: Sequence[int], augment: bool = False) -> list[torch.Tensor]:
        """The tokens (M,dim) of these samples, for each source of tokens; of each sample as many
        positions as LARGEST_BANK allows."""
        generator = torch.Generator().manual_seed(self.config.seed)
        copies = 2 if augment and self.config.augment else 1
        share = max(1, LARGEST_BANK // max(1, copies * len(indices)))
        banks: list[list[torch.Tensor]] = [[] for _ in self.representation.dims]
        batches = self._augmented_batches if augment else self._batches
        for x in batches(source, indices):
            for bank, tokens in zip(banks, self._tokens(x, share, generator), strict=True):
                bank.append(tokens)
        if not len(indices):
            return [torch.zeros(0, dim) for dim in self.representation.dims]
        return [torch.cat(banks.pop(0)) for _ in self.representation.dims]  # one by one twice

    def _tokens(
        self, x: torch.Tensor, share: int, generator: torch.Generator
    ) -> list[torch.Tensor]:
        """The tokens (n,dim) of these samples at up to ``share`` positions, the same of each, for
        each source of tokens; no others are kept while the rest is encoded."""
        config, windows, done = self.config, 1, 0
        if config.overlap is not None:
            windows = len(places(x.shape[2:], config.image_size, config.overlap))
        rows, found = [], []  # of each source: which of all tokens, and these
        for part in self._seen(x):
            with torch.inference_mode():
                grids = self.representation.encode(part)
            for number, grid in enumerate(grids):
                tokens, size = grid.flatten(0, 2), grid.shape[1] * grid.shape[2]
                if len(rows) == number:
                    chosen = torch.arange(windows * size)
                    if len(chosen) > share:
                        chosen = torch.randperm(len(chosen), generator=generator)[:share]
                    chosen = chosen + torch.arange(len(x))[:, None] * windows * size
                    rows.append(chosen.flatten().to(tokens.device))
                    found.append(tokens.new_empty(chosen.numel(), tokens.shape[1]))
                place = rows[number] - done * size
                inside = (place >= 0) & (place < len(tokens))
                found[number][inside] = tokens[place[inside]]
            done += len(part)
        return found

    def _seen(
        self,
        x: torch.Tensor,
        most: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[torch.Tensor]:
        """Samples as they come; of larger images their windows, image after image, or ``most`` that
        are drawn from them, WINDOWS at a time, so that memory does not grow with the size of the
        images."""
        config = self.config
        if config.overlap is None or tuple(x.shape[2:]) == config.image_size:
            yield x
            return
        height, width = config.image_size
        corners = places(x.shape[2:], config.image_size, config.overlap)
        every = [image[:, y : y + height, x_ : x_ + width] for image in x for y, x_ in corners]
        if most is not None and most < len(every):
            drawn = torch.randperm(len(every), generator=generator)[:most]
            every = [every[i] for i in drawn.tolist()]
        for first in range(0, len(every), WINDOWS):
            yield torch.stack(every[first : first + WINDOWS])

    def _encoded(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The tokens (n,h,w,dim) of all that :meth:`_seen` gives, for each source of tokens."""
        return concatenated(self.representation.encode(part) for part in self._seen(x))

    def _denoiser(self, dim: int) -> TokenMLP:
        with self._seeded():
            denoiser = TokenMLP(dim, self.config.token_width, self.config.token_blocks)
        return denoiser.to(self.device).eval()

    # -------------------------------------------------------------- score

    def use(self, statistics: list[MapStatistics] | None) -> None:
        """As every model, and weigh the maps as the configuration says."""
        super().use(statistics)
        self._standards = None
        if statistics is not None:
            self._standards = standards(statistics, self._weights(len(statistics)))
        self._steps = self._steps_of(self.config.mode)
        self._noise = NoiseFields(self.config.seed)
        self._loops: list[tuple] | None = None
        self._scoring = self._scoring_pass()  # at once: threads may share it

    @property
    def has_semantic(self) -> bool:
        return len(self.distances) > 0

    @property
    def map_names(self) -> list[str]:
        config = self.config
        names = self._mode_names(["reconstruction error"])
        sources = config.tokens if config.kind == "image" else [config.kind]
        return [f"{source}: {name}" for source in sources for name in names]

    statistics_smoothing = 1.0

    def raw_maps(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (K,N,h,w) of every source of tokens, on the finest grid, smoothed, not standardised.

        They are logarithms of distances: what multiplies all of them in an image adds to these, and
        their spread among normals is near a Gaussian's.
        """
        parts = [self._raw_maps(part) for part in self._seen(x.to(self.device))]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _raw_maps(self, x: torch.Tensor) -> torch.Tensor:
        grids = self.representation.encode(x)
        finest = max((grid.shape[1:3] for grid in grids), key=lambda s: s[0] * s[1])
        smoothing = 0.0
        if self.config.kind == "image":
            smoothing = self.config.smoothing * min(finest) / min(self.config.image_size)
        maps = []
        for i, (tokens, loop) in enumerate(zip(grids, self._prepared(), strict=True)):
            rows = tokens.flatten(0, 2)
            forms = self.closed_forms
            numbers = forms[i](rows)[None] if forms else self._evaluate(tokens, rows, loop)
            if self.distances:
                numbers = torch.cat([numbers, self._semantic(i, x, rows)[None]])
            found = log_distance(numbers).reshape(-1, *tokens.shape[1:3])
            found = resized(found, finest)
            if min(tokens.shape[1:3]) > SMALLEST_SMOOTHED:
                found = self._smoothed(found, smoothing)
            maps.append(found.unflatten(0, (len(numbers), -1)))
        return torch.cat(maps) if len(maps) > 1 else maps[0]

    def _scoring_pass(self) -> Graphed:
        return Graphed(self._score, [self])

    def _weights(self, count: int) -> list[float]:
        """Those of so many maps of all sources of tokens."""
        own = count // len(self.denoisers)
        if self.distances:
            weights = [1 / (own - 1)] * (own - 1) + [self.config.semantic_weight]
        else:
            weights = [1.0] * own
        return weights * len(self.denoisers)

    def _score(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        if config.kind == "audio":
            return self._score_audio(x)
        if config.overlap is not None and tuple(x.shape[2:]) != config.image_size:
            return self._score_windows(x)
        map_ = weighted(self._raw_maps(x), *self._standards)
        score = top_mean(map_, config.top_fraction)
        if config.kind == "image":
            map_ = self._upsampled(map_, x.shape[2:])
        return map_, score

    def _score_windows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The windows' maps, one fading into the next where they overlap, and the highest of their
        scores.

        A window says least at its border, where it does not see what goes on: there it weighs
        least, and its map begins and ends without a seam.
        """
        size = height, width = self.config.image_size
        corners = places(x.shape[2:], size, self.config.overlap)
        weight = window_weight(size, x.device)
        total = x.new_zeros(len(x), *x.shape[2:])
        share = x.new_zeros(x.shape[2:])
        for top, left in corners:
            share[top : top + height, left : left + width] += weight
        scores, number = [], 0
        for part in self._seen(x):
            maps, score = self._score(part)
            scores.append(score)
            for map_ in maps * weight:
                image, (top, left) = number // len(corners), corners[number % len(corners)]
                total[image, top : top + height, left : left + width] += map_
                number += 1
        return total / share, torch.cat(scores).view(len(x), -1).amax(dim=1)

    def _score_audio(self, waves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The score's curve over windows, and the map that says which bands made it.

        As ``fuse``, but of the residuals themselves: the curve of each is given to the bands by
        their shares of the residual's length, that of the semantic distance evenly. The sum of a
        column is the curve.
        """
        curve, bands = self._curves(waves)
        representation = self.representation
        map_ = time_map(bands, representation.window, representation.step)
        return map_, top_mean(curve, self.config.top_fraction)

    def window_scores(self, waves: torch.Tensor) -> torch.Tensor:
        """(N,k): of clips (N,samples) what each window scores by itself, as a clip of its own."""
        return self._curves(waves.to(self.device))[0]

    def _curves(self, waves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,k) and, with the bands' parts in it, (N,k,bands)."""
        representation = self.representation
        (tokens,) = representation.encode(waves)
        rows = tokens.flatten(0, 2)
        numbers, shares = [], []
        for residual in self._residuals(tokens, rows, self._prepared()[0]):
            parts = representation.contributions(residual)
            numbers.append(residual.square().mean(dim=1))
            shares.append(parts / parts.sum(dim=1, keepdim=True).clamp(min=1e-12))
        if self.distances:
            numbers.append(self._semantic(0, waves, rows))
            shares.append(torch.full_like(shares[0], 1 / shares[0].shape[1]))
        weights = self._weights(len(numbers))
        curve, bands = 0.0, 0.0
        for number, share, (mean, deviation), weight in zip(
            numbers, shares, self.statistics, weights, strict=True
        ):
            part = (log_distance(number) - mean) / deviation * (weight / sum(weights))
            curve, bands = curve + part, bands + part[:, None] * share
        curve = curve.view(len(waves), -1)
        return curve, bands.view(*curve.shape, -1)

    def trajectory(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of every model; means over tokens and sources."""
        latents, ways, n = [], [], len(x)
        for tokens, loop in zip(self._encoded(x.to(self.device)), self._prepared(), strict=True):
            rows = tokens.flatten(0, 2) * self._steps[0].alpha_t ** 0.5
            z, way = ops.token_mlp_loop(rows, *loop)
            latents.append(z.square().mean(dim=1).view(n, -1).mean(dim=1))
            ways.append(way.view(n, -1, way.shape[1]).mean(dim=1))
        return torch.stack(latents).mean(dim=0), torch.stack(ways).mean(dim=0)

    def _semantic(self, number: int, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Semantic distances (M,) of the rows that the source of this number gave to inputs x."""
        if self.embedding is not None:
            return self.distances[number](self.embedding(x)).flatten()
        return self.distances[number](self._features(self.denoisers[number], rows))

    def _features(self, denoiser: TokenMLP, rows: torch.Tensor) -> torch.Tensor:
        if self.config.semantic_of == "tokens":
            return rows
        return denoiser.features(*self._at_feature_level(rows))

    def _prepared(self) -> list[tuple]:
        """What :meth:`_loop` gives for each denoiser, made once."""
        if self._loops is None:
            self._loops = [self._loop(denoiser) for denoiser in self.denoisers]
        return self._loops

    def _loop(self, denoiser: TokenMLP) -> tuple:
        """(weights, step_bias, table) of the mode, for ``ops.token_mlp_loop``."""
        config = self.config
        if config.mode == "one_step":
            log_sigma = [math.log(sigma) for sigma in config.sigmas]
            table = [residual_row(sigma) for sigma in config.sigmas]
        else:
            log_sigma = [step.log_sigma for step in self._steps]
            table = [ddim_row(step) for step in self._steps]
        dtype = torch.bfloat16 if config.inference_dtype == "bfloat16" else None
        with torch.inference_mode():
            levels = torch.tensor(log_sigma, dtype=torch.float32, device=self.device)
            return (
                denoiser.pack(dtype), denoiser.step_bias(levels),
                torch.tensor(table, dtype=torch.float32, device=self.device),
            )  # fmt: skip

    def _evaluate(self, tokens: torch.Tensor, rows: torch.Tensor, loop: tuple) -> torch.Tensor:
        """The mode's numbers (K,M), K for each of rows (M,dim) = tokens (N,h,w,dim)."""
        if self.config.mode == "one_step":
            return ops.token_mlp_loop(rows, *loop)[1].T
        return torch.stack([r.square().mean(dim=1) for r in self._residuals(tokens, rows, loop)])

    def _residuals(self, tokens: torch.Tensor, rows: torch.Tensor, loop: tuple) -> list:
        """The vectors (M,dim) whose mean squares are the mode's numbers."""
        mode = self.config.mode
        if mode == "one_step":
            weights, step_bias, table = loop
            # The residual p x + q m as the update of a loop of one step.
            update = torch.zeros_like(table)
            update[:, 0], update[:, 1:3] = table[:, 0], table[:, 3:5]
            return [
                ops.token_mlp_loop(rows, weights, step_bias[i : i + 1], update[i : i + 1])[0]
                for i in range(len(table))
            ]
        alpha = self._steps[0].alpha_t
        if mode == "invert":
            return [ops.token_mlp_loop(rows * alpha**0.5, *loop)[0]]
        # The same noise for every sample, so that a score does not depend on its neighbours.
        # Windows of a clip have no position of their own: one noise serves all, as in a stream.
        shape = (1, *tokens.shape[1:])
        if self.config.kind == "audio":
            shape = (1, 1, 1, tokens.shape[3])
        noise = self._noise(shape, rows.device)
        noised = tokens * alpha**0.5 + noise * (1 - alpha) ** 0.5
        return [ops.token_mlp_loop(noised.flatten(0, 2), *loop)[0] - rows]

    # --------------------------------------------------------- checkpoint

    @staticmethod
    def _is_of_backbone(name: str) -> bool:
        return ".backbone." in name

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        resize_buffers(self.representation, tensors, "representation.")
        # As it was fitted: the weight may have been changed since.
        semantic = any(name.startswith("distances.") for name in tensors)
        for dim in self.representation.dims:
            self.denoisers.append(self._denoiser(dim))
            if semantic:
                self.distances.append(FeatureDistance(self.config.semantic).to(self.device))
        resize_buffers(self.distances, tensors, "distances.")
        super().restore(tensors)


def log_distance(number: torch.Tensor) -> torch.Tensor:
    """The logarithm of a distance, finite where that is 0, and the highest where it is no number:
    what lies beyond float32 is as far away as can be told."""
    number, largest = number.float(), torch.finfo(torch.float32).max
    return torch.where(number <= largest, number, largest).clamp(min=1e-12).log()


def concatenated(parts: Iterable[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Lists of tensors, each of the same meaning, as one list of longer tensors."""
    first, *more = parts
    return [torch.cat(same) for same in zip(first, *more, strict=True)] if more else first


def window_weight(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(height, width): how much a window counts, linearly from its borders to its middle."""
    sides = []
    for n in size:
        place = torch.arange(n, device=device)
        sides.append(torch.minimum(place + 1, n - place).float() / ((n + 1) // 2))
    return sides[0][:, None] * sides[1]


def places(image: Sequence[int], size: tuple[int, int], overlap: float) -> list[tuple[int, int]]:
    """Where the windows (height, width) of an image (height, width) begin: as few as overlap by at
    least that share of a side, evenly spread from border to border."""
    starts = []
    for side, window in zip(image, size, strict=True):
        room = side - window
        # Whole pixels, so that windows which are not spread evenly still overlap by that share.
        steps = math.ceil(room / max(1, int(window * (1 - overlap) + 1e-9)))
        starts.append([room * i // steps for i in range(steps + 1)] if steps else [0])
    return [(top, left) for top in starts[0] for left in starts[1]]
