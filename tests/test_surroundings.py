"""What a program has set around a call changes neither models nor scores."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import diffad_fast as daf
from diffad_fast import denoisers, models, native, ops, surroundings
from diffad_fast.denoisers.token_mlp import TokenMLP
from diffad_fast.diffusion import NoiseSchedule
from diffad_fast.errors import BackendError
from diffad_fast.ops.diffusion import step_table
from diffad_fast.training.sampling import stratified

TOKENS = {
    "image": {
        "image_size": 32,
        "token_width": 32,
        "token_blocks": 1,
        "tokens": ("cell-8",),
        "cross_fit": 0,
    },
    "vector": {"kind": "vector", "token_width": 32, "token_blocks": 1},
}
UNET = {
    "image_size": 32,
    "denoiser": "unet-tiny",
    "haar_level": 2,
    "train_steps": 4,
    "inference_dtype": "float32",
}


def samples(kind, n, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 6) if kind == "vector" else (n, 1, 32, 32)
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def fitted(kind, options):
    options = {"train_steps": 20, **options}
    return daf.Detector(**options, device="cpu").fit(samples(kind, 60, 0))


def test_a_gpu_is_chosen_once(monkeypatch):
    """The program's own at that time, whichever is current where the detector is used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = {None: "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}
    for asked, device in found.items():
        assert surroundings.resolve_device(asked) == torch.device(device)
    options = {"image_size": 32, "train_steps": 1}
    made = daf.Detector(**options, device="cpu")
    monkeypatch.setattr(models, "create", lambda *_: made.model)
    for asked, kept in ((None, None), ("cuda", "cuda"), ("cuda:1", "cuda:1")):
        detector = daf.Detector(**options, device=asked)
        # Where it goes next, a number that nobody asked for may not be there.
        assert str(detector.device) == "cuda:1" and detector._parts_of_copies()[1]["device"] == kept
    with pytest.raises(BackendError, match="cuda:2 was asked for, but PyTorch finds 2"):
        surroundings.resolve_device("cuda:2")


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype
        torch.set_default_dtype(before)


def precisions():
    """Of products, in all of the places in which PyTorch keeps them."""
    places = torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "mixed"
    return legacy, *(place.fp32_precision for place in places)


@contextlib.contextmanager
def precision(set_it):
    usual = precisions()
    set_it()
    changed = precisions()
    try:
        yield
    finally:
        now = precisions()
        if changed[1] != usual[1]:  # what a library inherits is not made its own
            torch.backends.fp32_precision = usual[1]
            assert precisions() == usual
        torch.set_float32_matmul_precision("highest")
        for place, name in zip(
            (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul),
            usual[1:], strict=True,
        ):  # fmt: skip
            place.fp32_precision = name
        assert now == changed != usual == precisions()


PRECISIONS = {
    "TF32": lambda: torch.set_float32_matmul_precision("high"),
    "bfloat16 products": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "of a library": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "of all libraries": lambda: setattr(torch.backends, "fp32_precision", "bf16"),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_products_are_in_float32_inside(name):
    @surroundings.undisturbed
    def call(fails):
        assert set(precisions()[2:]) <= {"ieee", "none"}
        if fails:
            raise KeyError(fails)

    with precision(PRECISIONS[name]):
        call(None)
        with pytest.raises(KeyError):
            call("in the call")


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "products in bfloat16": lambda: precision(PRECISIONS["bfloat16 products"]),
}


DETECTORS = {
    "tokens": ("image", TOKENS["image"]),
    "vectors": ("vector", TOKENS["vector"]),
    "unet": ("image", UNET),
}


@pytest.fixture(scope="module", params=DETECTORS)
def usual(request):
    """(kind, options, a detector that nothing surrounded)."""
    kind, options = DETECTORS[request.param]
    return kind, options, fitted(kind, options)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_fit_score_and_load(name, usual, tmp_path):
    kind, options, expected = usual
    new = samples(kind, 5, 1)
    with SURROUNDINGS[name]():
        found = fitted(kind, options)
        found.save(tmp_path / "m.diffad")
        loaded = daf.load(tmp_path / "m.diffad", device="cpu")
    for mode in ("reconstruct", "invert", "one_step"):
        expected.mode = found.mode = loaded.mode = mode
        want = expected.score(new)
        with SURROUNDINGS[name]():
            for detector in (expected, found, loaded):
                got = detector.score(new)
                np.testing.assert_array_equal(got.score, want.score)
                np.testing.assert_array_equal(got.p_value, want.p_value)
                if want.map is not None:
                    np.testing.assert_array_equal(got.map, want.map)


def test_settings_of_the_process_are_put_back_by_the_last_thread():
    """A thread that is done changes nothing for one that is not."""
    detector = fitted("vector", TOKENS["vector"])
    seen, inside, gone = [], threading.Barrier(2), threading.Event()

    @surroundings.undisturbed
    def call(model, last):
        inside.wait(10)
        if last:
            assert gone.wait(10)
        seen.append((torch.get_default_dtype(), torch.get_float32_matmul_precision()))

    with default_dtype(torch.float64), precision(PRECISIONS["TF32"]):
        threads = [threading.Thread(target=call, args=(detector, last)) for last in (False, True)]
        for thread in threads:
            thread.start()
        threads[0].join(10)
        gone.set()
        threads[1].join(10)
        assert seen == 2 * [(torch.float32, "highest")]


def test_modes_of_modules_are_put_back_by_the_last_thread():
    """In whichever order threads begin and end, and inside of a training."""
    inner, outer = torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    outer.append(inner)
    outer[1].eval()

    def modes():
        return [part.training for part in (outer, *outer)]

    before = modes()
    for order in itertools.permutations(range(3)):
        inside = [surroundings.evaluating(module) for module in (outer, inner, outer)]
        for one in inside:
            one.__enter__()
        for number in order:
            assert not inner.training
            inside[number].__exit__(None, None, None)
        assert modes() == before
    with surroundings.evaluating(outer):
        outer.train()
        with surroundings.evaluating(outer):
            assert modes() == 4 * [False]
        assert modes() == 4 * [True]
    assert modes()[0]


def test_modes_of_modules_in_a_fork():
    """What other threads were at is not gone on with there."""
    module, entered, gone = torch.nn.Dropout(), threading.Event(), threading.Event()

    def other():
        with surroundings.evaluating(module):
            entered.set()
            gone.wait(60)

    with surroundings.evaluating(module):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(60)
        child = os.fork()
    if child == 0:
        os._exit(0 if module.training else 1)
    gone.set()
    thread.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and module.training


# The parent's threads have computed before it starts another process.
OTHER_PROCESS = """
import multiprocessing, sys, warnings
import numpy as np, torch
import diffad_fast as daf

def child(detector, x, queue):
    if sys.argv[1] == "spawn":
        torch.set_num_threads(2)  # as in the parent: of other threads the last bits are others
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        queue.put((detector.score(x).score, [str(w.message) for w in caught]))

if __name__ == "__main__":
    torch.set_num_threads(2)
    x = np.random.default_rng(0).normal(size=(4096, 6)).astype(np.float32)
    options = {"token_width": 32, "token_blocks": 1, "train_steps": 2}
    detector = daf.Detector("vector", device="cpu", **options).fit(x)
    expected = detector.score(x).score
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=child, args=(detector, x, queue), daemon=True)
    process.start()
    score, warned = queue.get(timeout=100)
    process.join(timeout=100)
    assert process.exitcode == 0
    np.testing.assert_array_equal(score, expected)
    print(*warned)
"""


@pytest.mark.parametrize("start, warned", [("fork", "on one thread"), ("spawn", "")])
def test_a_detector_in_another_process(tmp_path, start, warned):
    """A fork has none of OpenMP's threads; to a spawned one the detector goes as a pickle."""
    (tmp_path / "program.py").write_text(OTHER_PROCESS)
    command = [sys.executable, str(tmp_path / "program.py"), start]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert warned in done.stdout and bool(done.stdout.strip()) == bool(warned)


@pytest.mark.parametrize("options", [TOKENS["image"], UNET], ids=["tokens", "U-Net"])
def test_a_detector_seeds_nobodys_generators(options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs"))
    before = torch.get_rng_state()
    fitted("image", options)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_one_thread():
    """The same as from the process's generator after its seed, which other threads draw from."""

    def made():
        drawn = {
            name: getattr(torch, name)(*size)
            for name, size in {"randn": (3, 4), "rand": (5,), "randperm": (9,)}.items()
        }
        unet, mlp = denoisers.create("unet-tiny", 4), TokenMLP(8, 16, 2)
        return unet.state_dict() | mlp.state_dict() | drawn

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(5)
        expected = made()
    before, others = torch.get_rng_state(), []
    with surroundings.drawing_from(torch.Generator().manual_seed(5)):
        thread = threading.Thread(target=lambda: others.append(torch.rand(3)))
        thread.start()
        found = made()
        thread.join()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name
    torch.set_rng_state(before)
    assert torch.equal(others[0], torch.rand(3))


def test_parts_of_a_pipeline_do_not_take_the_default_device():
    def found():
        x, y = samples("image", 2, 0)
        stats = ((0.1, 2.0), None, (0.3, 0.5))
        schedule = NoiseSchedule("cosine", 20)
        generator = torch.Generator().manual_seed(0)
        parts = [
            *ops.anomaly_map(x[None], y[None], levels=2, stats=stats),
            schedule.alphas_cumprod,
            stratified(5, generator),
            ops.dwt2d(x[None], "db3")[0],
        ]
        if native.loaded():
            parts.append(step_table([(0.3, 0.5)], "epsilon"))
        return parts

    expected = found()
    with torch.device("meta"):
        got = found()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
