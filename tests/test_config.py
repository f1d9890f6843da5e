import dataclasses
import json

import numpy as np
import pytest

from diffad_fast import Detector
from diffad_fast.config import PRESETS, DetectorConfig, read_options
from diffad_fast.errors import InputError


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_presets_override_defaults_and_options_override_presets(kind, preset):
    config = DetectorConfig.create(preset, kind)
    assert config.denoiser == PRESETS[kind][preset]["denoiser"]
    assert DetectorConfig.create(preset, reverse_steps=7).reverse_steps == 7


@pytest.mark.parametrize(
    "size, level, stride", [(32, 1, 16), (64, 1, 16), (128, 2, 32), (256, 3, 64), (512, 4, 128)]
)
def test_haar_level_follows_the_size(size, level, stride):
    config = DetectorConfig.create(image_size=size, denoiser="unet-small")
    assert (config.haar_level, config.stride) == (level, stride)
    assert config.smoothing == size / 64


def test_json_round_trip():
    config = DetectorConfig.create("fast", image_size=(128, 256), denoiser="unet-tiny", clip=3.0)
    assert DetectorConfig.from_json(config.to_json()) == config
    config = config.replace(clip=None, dynamic_threshold=[0.9, 2])
    assert DetectorConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "options, unread",
    [
        ({}, {"haar_level": 3}),
        ({"kind": "audio"}, {"haar_level": 3, "smoothing": 8.0}),
        ({"denoiser": "unet-tiny"}, {"token_width": 128, "token_blocks": 2, "token_batch": 512}),
    ],
)
def test_values_that_nothing_read_are_let_go(options, unread):
    """Those of files of before, which held them."""
    config = DetectorConfig.create(**options)
    assert DetectorConfig.stored(json.loads(config.to_json()) | unread) == config


def test_another_denoiser_is_another_configuration():
    with pytest.raises(InputError, match="denoiser='token-mlp' does not become .*'unet-tiny'"):
        DetectorConfig.create().replace(denoiser="unet-tiny")
    assert DetectorConfig.create().replace(denoiser="token-mlp", seed=2).seed == 2


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DetectorConfig().seed = 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"preset": "quick"}, "'quick'.*fast, balanced, best"),
        ({"kind": "smell"}, "'smell'"),
        ({"mode": "guess"}, "'guess'"),
        ({"denoiser": "unet-tiny", "image_size": 100}, "100 is not a multiple of .*96 or 128"),
        ({"image_size": 8, "denoiser": "unet-tiny"}, "8 is smaller than the model's stride of 16"),
        ({"image_size": 31}, "31 is too small for tokens"),
        ({"image_size": 100}, "100 is not a multiple of .* 99 or 102"),
        ({"image_size": (64,)}, "image_size"),
        ({"image_size": -32}, "image_size is a whole number of pixels or .*, not -32"),
        ({"image_size": 256.0}, "image_size is a whole number of pixels or .*, not 256.0"),
        ({"image_size": "256"}, "image_size is a whole number of pixels or .*, not '256'"),
        ({"batch_size": 16.0}, "batch_size must be a whole number or 'auto', not 16.0"),
        ({"batch_size": np.float64(4.5)}, "batch_size must be a whole number or 'auto', not 4.5"),
        ({"diffusion_steps": 10**9}, r"diffusion_steps must be .* to 1e\+06, not 1000000000"),
        ({"channels": 4}, "4"),
        ({"train_steps": -1}, "train_steps .*not -1"),
        ({"eta": 2.0}, "eta .*not 2.0"),
        ({"eta": float("nan")}, "eta"),
        ({"denoiser": "unet-tiny", "dynamic_threshold": (0.9,)}, "is .ratio, max., not .0.9,"),
        ({"denoiser": "unet-tiny", "dynamic_threshold": (2, 2)}, "the ratio of dyn.* 1, not 2"),
        ({"denoiser": "unet-tiny", "dynamic_threshold": (1, 0.5)}, "the max of dyn.*not 0.5"),
        ({"denoiser": "unet-tiny", "dynamic_threshold": (1, 2), "clip": 1.0}, "choose one"),
        ({"dynamic_threshold": (0.9, 2.0)}, "dynamic_threshold is for U-Nets"),
        ({"snr_limit": 0}, "snr_limit .*not 0"),
        ({"trainsteps": 3}, "'trainsteps': did you mean 'train_steps'"),
        ({"map_weights": (0, 0, 0)}, "map_weights"),
        ({"denoiser": "unet-tiny", "map_weights": (0, 0, 1), "haar_level": 0}, "no sub-bands"),
        ({"train_steps": 0}, "train_steps=0 takes a U-Net as it is"),
        ({"conformal_share": 0.85}, "held-out"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"accumulate": 3}, "accumulate is for U-Nets, .* denoiser='unet-small'"),
        ({"map_weights": (1, 1, 0)}, "map_weights is for U-Nets"),
        ({"kind": "vector", "guidance": 1.0}, "guidance is for U-Nets, .* leave it out$"),
        ({"prediction_type": "epsilon"}, "prediction_type is for U-Nets"),
        ({"haar_level": 2}, "haar_level is for U-Nets"),
        ({"denoiser": "unet-tiny", "token_width": 64}, "token_width is for the token MLP"),
        ({"denoiser": "unet-tiny", "tokens": "cell-8"}, "tokens is for the token MLP"),
        ({"denoiser": "unet-tiny", "illumination": 0.0}, "illumination is for the token MLP"),
        ({"feature_scale": "global"}, "feature_scale is for kind='vector'"),
        ({"kind": "vector", "smoothing": 2.0}, "smoothing is for kind='image'"),
        ({"kind": "audio", "tokens": "cell-8"}, "tokens is for kind='image'"),
        ({"self": 1}, "unknown option 'self'"),
        ({"cls": 1}, "unknown option 'cls'"),
        ({"features": "resnet18"}, "features='resnet18' do not go together: .* U-Nets .* read"),
        ({"tokens": ("features",)}, "features=None do not go together"),
        ({"kind": "vector", "features": "resnet18"}, "vectors are features themselves"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(InputError, match=words):
        DetectorConfig.create(**options)
    with pytest.raises(InputError, match=words):
        Detector(**options)


def test_numbers_of_numpy():
    found = DetectorConfig.create(
        image_size=(np.int64(64), np.int32(96)), sigmas=np.array([0.5, 2.0], np.float32),
        seed=np.uint8(3), smoothing=np.float32(1.5), cross_fit=np.int64(0),
    )  # fmt: skip
    assert found == DetectorConfig.create(
        image_size=(64, 96), sigmas=(0.5, 2.0), seed=3, smoothing=1.5, cross_fit=0
    )
    assert DetectorConfig.create(image_size=np.int64(64)).image_size == (64, 64)
    assert DetectorConfig.from_json(found.to_json()) == found


def test_read_options(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"seed": 4}))
    assert read_options(str(path)) == {"seed": 4}
    path.write_text("{")
    with pytest.raises(InputError, match="c.json is not JSON"):
        read_options(str(path))
    path.write_text("[1]")
    with pytest.raises(InputError, match="one JSON object"):
        read_options(str(path))
    with pytest.raises(InputError, match="no configuration file"):
        read_options(str(tmp_path / "missing.json"))
    for text, words in (("x", "the configuration is not JSON"), ("[1]", "object .* not list")):
        with pytest.raises(InputError, match=words):
            DetectorConfig.from_json(text)


def test_steps_of_a_recipe_are_its_own_denoisers():
    steps = {
        name: DetectorConfig.create(preset="best", denoiser=name).train_steps
        for name in ("token-mlp", "unet-tiny", "unet-base", "custom")
    }
    assert steps == {"token-mlp": 1000, "unet-tiny": 1500, "unet-base": 10000, "custom": 2000}
    given = DetectorConfig.create(preset="best", denoiser="unet-base", train_steps=7)
    assert given.train_steps == 7
    assert given.token_width == DetectorConfig.token_width  # that of the recipe is the token MLP's
