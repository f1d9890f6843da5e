"""The declared cases: that all contenders compute the same, and of what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import cases, peers
from benchmarks.case import ONE_THREAD, OURS, REFERENCE, random
from benchmarks.cases import attention, training
from benchmarks.cases import detector as detector_cases
from benchmarks.cases import metrics as metric_cases
from benchmarks.verify import wrong
from diffad_fast import native, reference
from diffad_fast.ops import dispatch

CPU = torch.device("cpu")


def test_every_quick_operator_case_is_right():
    """Each contender of each operator passes its own check: the baselines compute the same."""
    for case in cases.load(cases.OPERATORS[:-1], "cpu", quick=True):
        with torch.inference_mode(not case.gradients):
            inputs = case.inputs(CPU)
            exact = case.exact(inputs)
            for name, contender in case.contenders.items():
                if not contender.compiled:
                    output = contender.run(*contender.prepare(inputs))
                    assert wrong(case, contender, exact, output) is None, (case.key, name)


def test_the_gpu_suite_has_what_its_goals_compare():
    found = {c.key: c for c in cases.load(cases.OPERATORS[:-1], "cuda", quick=False)}
    eager = (REFERENCE, f"{REFERENCE}, channels_last")
    goals = {
        "dwt2d haar, periodization, 256×3×256×256": ("ptwt", "pytorch_wavelets"),
        "idwt2d haar, periodization, 256×3×256×256": ("ptwt", "pytorch_wavelets"),
        **{
            f"haar_{way} level {level}, 256×3×256×256, contiguous": (f"{OURS}, Triton",)
            for way in ("pack", "unpack")
            for level in (1, 2, 3)
        },
        "q_sample 512×64×32×32": (REFERENCE,),
        "anomaly_map three maps, 128×1×256×256": (REFERENCE,),
        "group_norm_silu 16 groups, 64×256×16×16, channels_last": eager,
        "group_norm_silu 5 groups, 1×80×32×32, channels_last, modulated": eager,
    }
    for batch, side in ((16, 64), (16, 128), (1, 64), (1, 128)):
        name = f"wavelet_attention level 1, {batch}×8×{side}×{side}×64, bf16"
        goals[name] = (REFERENCE, "SDPA over pixels", "pack + SDPA + unpack")
        goals[f"{name}, forward + backward"] = ("SDPA over pixels",)
    absent = peers.absent()
    for key, contenders in goals.items():
        missing = set(contenders) - set(found[key].contenders) - set(absent)
        assert not missing, (key, missing)
    fused = found["wavelet_attention level 1, 16×8×64×64×64, bf16"].contenders
    assert fused["pack + SDPA + unpack"].compiled
    graphed = found["group_norm_silu 5 groups, 1×80×32×32, channels_last, modulated"]
    for contender in graphed.contenders.values():
        assert contender.settings(torch.device("cuda"))["graph"]
        assert not contender.settings(CPU)["graph"]


def test_bfloat16_stands_in_names_and_settings(monkeypatch):
    monkeypatch.setattr(native, "cpu_isa", lambda: native.BF16_ISAS[0])
    counted = {}
    for device_type in ("cpu", "cuda"):
        for case in cases.load(("attention", "token_mlp"), device_type, quick=True):
            narrow = "bf16" in case.name or "bfloat16 weights" in case.name
            dtype = "bfloat16" if narrow else "float32"
            assert case.rate == dtype, case.key
            for name, contender in case.contenders.items():
                wide = name == f"{REFERENCE}, float32 weights"
                assert contender.dtype == ("float32" if wide else dtype), (case.key, name)
            counted.setdefault((case.operator, device_type), []).append(narrow)
            if device_type == "cpu" and case.operator == "token_mlp_loop":
                assert case.inputs(CPU)[1].W1.dtype == getattr(torch, dtype)
    assert counted == {
        ("wavelet_attention", "cpu"): [False],
        ("wavelet_attention", "cuda"): [False, True, True],
        ("token_mlp_loop", "cpu"): [False, True],
        ("token_mlp_loop", "cuda"): [True],
        ("token_mlp_loss", "cpu"): [False],
        ("token_mlp_loss", "cuda"): [True],
    }


def test_a_stream_of_rows_is_calls_of_one_row_each(monkeypatch):
    from diffad_fast import ops, reference

    found = cases.load(("token_mlp",), "cpu", quick=False)
    found = [case for case in found if case.name.endswith("weights stay in the caches")]
    assert len(found) == 2
    case, seen = found[1], []
    for functions in (ops, reference):
        loop = functions.token_mlp_loop
        monkeypatch.setattr(
            functions, "token_mlp_loop", lambda *a, loop=loop: seen.append(a[:2]) or loop(*a)
        )
    inputs = case.inputs(CPU)
    assert [tuple(x.shape) for x in inputs] == [(case.batch, 64)]  # of which copies are rotated
    exact = case.exact(inputs)
    for name, contender in case.contenders.items():
        del seen[:]
        output = contender.run(*contender.prepare(inputs))
        assert wrong(case, contender, exact, output) is None, name
        assert {len(x) for x, _ in seen} == {1} and len(seen) == case.batch
        assert len({id(weights) for _, weights in seen}) == 1


def test_every_operator_has_a_case():
    here = {case.operator for case in cases.load(cases.OPERATORS[:-1], "cpu", quick=True)}
    assert set(dispatch.OPERATORS) == here


def test_the_plain_loop_of_tokens_embeds_as_many_levels_as_ours():
    from diffad_fast.training.tokens import SIGMA_RANGE

    module, bank = training.token_network(8, 16, 2), random(50, 8)
    loop = training.PlainTokens(bank, module, 1024)
    embedded = []
    module.embedding.register_forward_hook(lambda _, given, out: embedded.append(given[0]))
    torch.manual_seed(1)
    loss = loop.loss(bank)
    (levels,) = embedded
    ours, _ = training.token_step("cpu", 1024, 8, 16, 2)
    assert levels.shape == ours.inputs(0)[2].shape == (32,)
    low, high = np.log(SIGMA_RANGE)
    steps = np.floor((levels.double().numpy() - low) / (high - low) * 32 + 1e-4)
    assert steps.tolist() == list(range(32))
    # The same with a level for each token.
    torch.manual_seed(1)
    x0 = bank[torch.randint(len(bank), (32, 32))].flatten(0, 1)
    torch.rand(())
    noise, log_sigma = torch.randn(32, 32, 8).flatten(0, 1), levels.repeat(32)
    sigma = log_sigma.exp()[:, None]
    scale = (1 + sigma**2).rsqrt()
    error = module(scale * (x0 + sigma * noise), log_sigma) - scale * (noise - sigma * x0)
    torch.testing.assert_close(loss, error.square().mean())


def test_metrics_by_sorted_normals_are_exact_with_ties():
    masks, maps = metric_cases._data(3, 64)
    maps = maps.round(1)
    pixels = masks.reshape(-1), maps.reshape(-1)
    for name in ("auroc", "pauc", "f1_max"):
        case = next(c for c in cases.load(("metrics",), "cpu", True) if c.operator.endswith(name))
        found = case.contenders[metric_cases.BY_NORMALS].run(*pixels)
        exact = metric_cases._EXACT[name](pixels[0], pixels[1].astype(np.float64))
        assert found == pytest.approx(exact, abs=1e-12)
    found = metric_cases._aupro_by_normals(masks, maps)
    exact = metric_cases._aupro_by_sort(masks, maps.astype(np.float64))
    assert found == pytest.approx(exact, abs=1e-12)


def test_a_long_sum_in_float32_is_no_wrong_baseline():
    case = next(c for c in cases.load(("diffusion",), "cpu", True) if c.operator == "weighted_mse")
    exact = torch.tensor(1.0, dtype=torch.float64)
    rounded = {
        name: wrong(case, one, exact, exact + 1.6e-5) for name, one in case.contenders.items()
    }
    assert rounded.pop(f"{REFERENCE}, torch.compile") is None
    assert all("error 1.6e-05" in reason for reason in rounded.values())
    compiled = case.contenders[f"{REFERENCE}, torch.compile"]
    assert wrong(case, compiled, exact, exact + 2e-4) is not None


def test_work_is_counted_of_operators_alone():
    """torch's own count of a U-Net takes each convolution for a direct sum."""
    for case in cases.load((*cases.OPERATORS, "training"), "cpu", quick=True):
        assert bool(case.bytes) == (case.operator in dispatch.OPERATORS), case.key
        assert case.bytes or not case.flops, case.key


def test_peers_on_one_thread_say_so():
    alone = {"PyWavelets", "SciPy", "NumPy Philox", metric_cases.BY_NORMALS}
    found = set()
    families = ("haar", "wavelet", "noise", "energies", "maps", "metrics")
    for case in cases.load(families, "cpu", quick=False):
        for name in alone & set(case.contenders):
            assert ONE_THREAD in case.contenders[name].note, (case.key, name)
            found.add(name)
    absent = {name.lower() for name in peers.absent()}
    assert {name for name in alone - found if name.lower() not in absent} == set()


def test_a_unet_with_sdpa_computes_the_same(monkeypatch):
    gains = [1 + 0.1 * random(2, 4, seed=seed).double() for seed in (1, 2)]
    qkv = random(3, 2, 2, 8, 6, 4).double()
    expected = reference.wavelet_attention(*qkv, *gains)
    torch.testing.assert_close(attention.haar_by_product(*qkv, *gains), expected)
    calls = []

    def counted(*given):
        calls.append(given)
        return attention.haar_by_product(*given)

    monkeypatch.setattr(detector_cases, "haar_by_product", counted)
    served = dispatch.OPERATORS["wavelet_attention"].implementations
    usual = dict(served)
    case = detector_cases.score_case("cpu", "unet-tiny", 1, 32, 1, {})
    inputs = case.inputs(CPU)
    with torch.inference_mode():
        exact = case.exact(inputs)
        for name in ("reference, channels_last", "reference, channels_last, SDPA"):
            contender = case.contenders[name]
            calls.clear()
            assert wrong(case, contender, exact, contender.run(*inputs)) is None, name
            assert bool(calls) == name.endswith("SDPA"), name
            assert served == usual


def test_a_copy_in_float64_computes_in_float64():
    detector = detector_cases._detector(CPU, "unet-tiny", 32, 1, "one_step")
    images = random(2, 1, 32, 32).double() / 8 + 0.5
    with detector_cases.as_written(), torch.inference_mode():
        exact = detector_cases.in_float64(detector)
        (map_, _), (narrow, _) = exact.model.score(images), detector.model.score(images.float())
    assert map_.dtype == torch.float64 and narrow.dtype == torch.float32
    floating = [x for x in exact.model.state_dict().values() if x.is_floating_point()]
    assert {x.dtype for x in floating} == {torch.float64}
    torch.testing.assert_close(narrow.double(), map_, rtol=2e-6, atol=2e-6)
