"""The benchmark suite itself, and a guard on work that can be counted."""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import (
    cases,
    compare,
    counting,
    end_to_end,
    harness,
    machine,
    peers,
    plots,
    readme,
    results,
    scaling,
    stats,
    timing,
)  # fmt: skip
from benchmarks import tables as report
from benchmarks.__main__ import main
from benchmarks.case import OURS, REFERENCE, Case, Contender, random
from benchmarks.cases import detector as detector_cases
from benchmarks.cases import metrics as metric_cases
from benchmarks.cases import training
from benchmarks.compile_report import parse, spills_in_loops
from benchmarks.quality import anoddpm, controls, dte
from benchmarks.quality import run as quality
from benchmarks.quality import tables as quality_tables
from benchmarks.quality.data import DataSet, objects, part_of
from benchmarks.timing import DeviceClock, HostClock, rounds
from benchmarks.verify import wrong
from diffad_fast import ops
from diffad_fast.ops import dispatch

CPU = torch.device("cpu")
TINY = harness.Effort(seconds=0.0, at_least=3, each=3, compile_seconds=0.0)
CEILINGS = {
    "copy_gb_per_s": 10.0, "clone_gb_per_s": 5.0, "copy_megabytes": 1,
    "matrix_gflop_per_s": {"float32": 100.0},
    "matrix_side": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_long_measurements(monkeypatch):
    monkeypatch.setattr(harness.ceilings, "measure", lambda device, quick: CEILINGS)
    monkeypatch.setattr(harness, "QUICK", TINY)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the suites refuse it


def small(operator: str) -> Case:
    """The quick case of an operator."""
    families = (*cases.OPERATORS, "metrics")
    return next(c for c in cases.load(families, "cpu", quick=True) if c.operator == operator)


def measured(case: Case) -> harness.Run:
    run = harness.Run(CPU, TINY, quick=True)
    run.measure([case])
    return run


def suite(out: Path, *arguments: str) -> tuple[int, dict | None, str]:
    """Exit status, JSON and Markdown of `python -m benchmarks ... --quick`."""
    import sys

    argv = sys.argv
    sys.argv = ["benchmarks", *arguments, "--quick", "--out", str(out)]
    try:
        status = main()
    finally:
        sys.argv = argv
    path = next(out.glob("*.json"))
    return status, results.read(path), path.with_suffix(".md").read_text()


# ------------------------------------------------------------- a wrong result gets no time


def test_a_wrong_operator_gets_no_time_and_fails_the_run(tmp_path, monkeypatch):
    operator = dispatch.OPERATORS["haar_pack"]
    name = operator.backend("cpu")
    right = operator.implementations[name]

    def spoiled(x, level):
        y = right(x, level).clone()
        y[0, 0, 0, 0] += 1e-3
        return y

    monkeypatch.setitem(operator.implementations, name, spoiled)
    status, result, text = suite(tmp_path, "cpu", "--filter", "haar_pack level 3")
    (row,) = result["rows"]
    assert status == 1
    assert "ms" not in row["contenders"][OURS] and "error" in row["contenders"][OURS]["wrong"]
    assert "ms" in row["contenders"]["conv2d with fixed filters"]
    assert all("ratio" not in entry for entry in row["contenders"].values())
    assert "Wrong, and not timed" in text and "WRONG: error" in text


def test_a_failing_operator_fails_the_run_and_a_failing_peer_is_named(monkeypatch):
    case = small("q_sample")

    def refuse(*inputs):
        raise RuntimeError("no such thing")

    contenders = dict(case.contenders) | {"peer": Contender(refuse)}
    run = measured(Case(**{**vars(case), "contenders": contenders}))
    assert not run.wrong
    assert run.rows[0]["contenders"]["peer"]["failed"] == "RuntimeError: no such thing"
    contenders = {OURS: Contender(refuse)}
    run = measured(Case(**{**vars(case), "contenders": contenders}))
    assert len(run.wrong) == 1 and "no such thing" in run.wrong[0]


@pytest.mark.parametrize(
    "output, reason",
    [
        (torch.zeros(3), "error"),
        (torch.ones(4), "shape"),
        ((torch.ones(3), torch.ones(3)), "results"),
        (torch.full((3,), torch.nan), "nan"),
    ],
)
def test_what_counts_as_wrong(output, reason):
    case = Case("op", "name", lambda device: (), lambda inputs: None, {})
    assert reason in wrong(case, Contender(lambda: None), np.ones(3), output)
    assert wrong(case, Contender(lambda: None), np.ones(3), torch.ones(3) + 1e-6) is None


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


def test_every_operator_has_a_case():
    here = {case.operator for case in cases.load(cases.OPERATORS[:-1], "cpu", quick=True)}
    assert set(dispatch.OPERATORS) == here


# ------------------------------------------------------------- times and how they are judged


def fake(times: dict[str, float], operator: str = "op", note: str = "") -> dict:
    """A result with samples around the given milliseconds."""
    noise = 1 + 0.02 * np.random.default_rng(0).permutation(np.linspace(-1, 1, 41))
    entries = {}
    for name, ms in times.items():
        samples = (ms * noise).tolist()
        settings = Contender(lambda: None, note=note).settings(CPU)
        entries[name] = {"settings": settings, "ms": samples, **stats.quantiles(samples),
                         "per_second": 1e3 / ms, "first_call_ms": ms,
                         "counts": {"operators": 2, "peak_bytes": 0}}  # fmt: skip
        if name != OURS:
            ratio = stats.ratio(samples, entries[OURS]["ms"], paired=True)
            entries[name]["ratio"] = {
                **dict(zip(("value", "low", "high"), ratio, strict=True)),
                "ours_is": stats.verdict(*ratio[1:]),
            }
    row = {"case": f"{operator} case", "operator": operator, "name": "case", "batch": 1,
           "unit": "sample", "bytes": 10**7, "flops": 10**6, "sweep": {}, "served_by": "cpu",
           "clock": "host", "in_cache": False, "bound": "memory", "bound_ms": 1.0,
           "contenders": entries}  # fmt: skip
    return {"format": 1, "suite": "cpu", "quick": False, "device": "cpu",
            "machine": machine.describe(CPU), "ceilings": CEILINGS, "rows": [row],
            "wrong": []}  # fmt: skip


def test_compare_tells_what_got_slower_beyond_noise():
    before = fake({OURS: 1.0, "peer": 3.0})
    text, slower = compare.report(before, fake({OURS: 1.3, "peer": 3.0}))
    assert slower == ["op case"]
    assert "| op case | diffad_fast | 1" in text and "slower" in text
    text, slower = compare.report(before, fake({OURS: 0.7, "peer": 3.0}))
    assert not slower and "faster" in text
    assert compare.report(before, fake({OURS: 1.02, "peer": 3.0}))[1] == []
    # The whole machine is slower: what did not change shows it.
    assert compare.report(before, fake({OURS: 1.3, "peer": 3.9}))[1] == []


def test_a_slow_operator_shows_in_compare(tmp_path, monkeypatch):
    """By a clock that tells what the operator says it has done, within a hundredth."""
    noise, work = np.random.default_rng(0), [1.0]

    def start(clock, run):
        work[0] = 1.0
        run()
        elapsed = work[0] * noise.uniform(1.0, 1.01)
        return lambda: elapsed

    monkeypatch.setattr(HostClock, "start", start)
    arguments = ("cpu", "--filter", "^q_sample")
    _, before, _ = suite(tmp_path / "before", *arguments)
    operator = dispatch.OPERATORS["q_sample"]
    right = operator.implementations["reference"]

    def slow(*given):
        work[0] = 5.0
        return right(*given)

    monkeypatch.setitem(operator.implementations, operator.backend("cpu"), slow)
    path = next((tmp_path / "before").glob("*.json"))
    status, after, _ = suite(tmp_path / "after", *arguments, "--baseline", str(path))
    assert not after["wrong"] and status == 1
    assert compare.report(before, after)[1] == [before["rows"][0]["case"]]
    # Baselines that are as slow as before show that the machine has not changed.
    assert before["rows"][0]["contenders"][REFERENCE]["p50"] < 1.1


def test_faster_only_if_the_interval_excludes_one():
    rng = np.random.default_rng(1)
    ours = 1 + 0.1 * rng.standard_normal(40)
    ratio, low, high = stats.ratio(2 * ours, ours, paired=True)
    assert ratio == pytest.approx(2) and low == pytest.approx(2) and high == pytest.approx(2)
    ratio, low, high = stats.ratio(2 * ours, ours, paired=False)
    assert low < 1.97 and high > 2.03  # without pairs the noise that both share counts
    ratio, low, high = stats.ratio(1 + 0.1 * rng.standard_normal(40), ours, paired=False)
    assert low < 1 < high and stats.verdict(low, high) == "even"
    assert stats.verdict(1.01, 1.2) == "faster" and stats.verdict(0.8, 0.99) == "slower"
    assert stats.verdict(1.01, 1.2, margin=0.05) == "even"


def test_bootstrap_interval_covers_the_true_ratio():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        a, b = 3 * np.exp(0.1 * rng.standard_normal((2, 30)))
        _, low, high = stats.ratio(a, b / 3 * 2, paired=False)
        hits += low <= 1.5 <= high
    assert 88 <= hits <= 100  # 95 expected; 88 has a probability below 0.5%


def test_rounds_interleave_in_changing_order():
    order = []

    class Clock:
        def start(self, run):
            order.append(run)
            return lambda: 1.0

    times = rounds({"a": "a", "b": "b", "c": "c"}, Clock(), 9.0, 300, 300)
    played = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert played[0] == "abc"  # only warms up
    assert all(sorted(one) == ["a", "b", "c"] for one in played)
    # Of six orders and six pairs of neighbours within a round, each about as often as the others.
    counts = [played[1:].count("".join(p)) for p in itertools.permutations("abc")]
    assert min(counts) > 30 and sum(counts) == 300
    assert times == {name: [1.0] * 300 for name in "abc"}


def test_a_slow_contender_runs_in_every_third_round():
    order = []

    class Clock:
        def start(self, run):
            order.append(run)
            return lambda: {"a": 1.0, "b": 3.9, "c": 4.1}[run]

    runs = {"a": "a", "b": "b", "c": "c"}
    times = rounds(runs, Clock(), 0.0, 99, 99, leader="a", each=3)
    assert [sorted(order[3:][i:j]) for i, j in ((0, 3), (3, 5), (5, 7), (7, 10))] == [
        ["a", "b", "c"], ["a", "b"], ["a", "b"], ["a", "b", "c"]
    ]  # fmt: skip
    assert {name: len(found) for name, found in times.items()} == {"a": 7, "b": 7, "c": 3}


@pytest.mark.parametrize("leader, fast, slow", [("a", 19, 7), (None, 7, 7)])
def test_everybody_runs_in_seven_rounds_however_long_they_take(monkeypatch, leader, fast, slow):
    class Clock:
        def start(self, run):
            return lambda: {"a": 1.0, "b": 9.0}[run]

    times = rounds({"a": "a", "b": "b"}, Clock(), 0.0, 1, 99, leader)
    assert {name: len(found) for name, found in times.items()} == {"a": fast, "b": slow}
    # Nor are there fewer where the time is over, but not ten times.
    clock = itertools.chain([0.0], itertools.repeat(2.0))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    times = rounds({"a": "a", "b": "b"}, Clock(), 1.0, 5, 99, leader)
    assert {name: len(found) for name, found in times.items()} == {"a": fast, "b": slow}
    assert harness.FULL.each == 7


def test_a_part_of_the_work_is_scaled_and_compared_in_its_own_rounds(monkeypatch):
    sampled = {OURS: [1.0, 9.0, 9.0, 2.0], "peer": [10.0, 20.0]}
    monkeypatch.setattr(harness, "rounds", lambda *arguments: sampled)
    ones = Contender(lambda: torch.ones(3))
    case = Case("op", "name", lambda device: (), lambda inputs: torch.ones(3),
                {OURS: ones, "peer": Contender(ones.run, part=0.1)})  # fmt: skip
    entry = measured(case).rows[0]["contenders"]["peer"]
    assert entry["ms"] == [100.0, 200.0] and entry["p50"] == 150.0
    assert entry["ratio"]["value"] == entry["ratio"]["low"] == entry["ratio"]["high"] == 100.0


def test_slope_of_a_power_law():
    assert stats.slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


# ------------------------------------------------------------------------------- the report


def test_losses_stand_in_the_table():
    result = fake({OURS: 2.0, REFERENCE: 4.0, "better peer": 1.0, "equal peer": 2.0})
    (line,) = report.summary(result["rows"])[2:]
    assert "2× (2–2)" in line and "better peer **0.5×**" in line and "equal peer *1× even*" in line
    assert "50% of memory" in line
    assert report.losses(result["rows"]) == result["rows"]


def test_training_goals_stand_in_the_report():
    result = fake({OURS: 2.0, REFERENCE: 4.0, f"{REFERENCE}, channels_last": 3.0})
    result["suite"] = "train"
    assert report.training_goals(result) == []  # a case without goals
    row = result["rows"][0]
    row["name"] = "unet-small, batch 16, 256×256"
    row["parameters"] = 4
    for name, peak in ((OURS, 60), (REFERENCE, 100), (f"{REFERENCE}, channels_last", 101)):
        row["contenders"][name]["counts"]["peak_bytes"] = peak
    text = report.markdown(result)
    head = "| unet-small, batch 16, 256×256 | reference"
    # With 5 vectors of ours and 4 of theirs: (60 + 80) / (100 + 64).
    first = f"{head} | 500 samples/s | 2× (2–2) | 2.5×: missed |"
    assert f"{first} 85% | 60%: missed |" in text
    other = f"{head}, channels_last | 500 samples/s | 1.5× (1.5–1.5) | 1.3×: reached |"
    assert f"{other} 85% | 60%: missed |" in text
    row["contenders"][REFERENCE]["counts"]["peak_bytes"] = 170
    assert f"{first} 60% | 60%: reached |" in report.markdown(result)


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


def test_what_a_process_sends():
    """Of a vector in N parts a ring passes N - 1 parts twice; one process sends nothing."""
    assert scaling.sent(1_000_000, 1) == 0
    assert scaling.sent(1_000_000, 2) == 4 * 1_000_003
    assert scaling.sent(1_000_000, 4) == pytest.approx(2 * 3 * 4 * 1_000_003 / 4)
    row = {"network": "m", "ms": 100.0, "exchange_ms": 5.0, "parameters": 10**6, "threads": 1,
           "counted_bytes": None}  # fmt: skip
    two = row | {"processes": 2, "ms": 50.0, "counted_bytes": 4_100_000}
    text = scaling.lines([row | {"processes": 1}, two])
    assert text[-2] == "| m | 1 × 1 | 100 | 1.00× |  | 1,000,000 | 0.00 | not told |"
    assert text[-1] == "| m | 2 × 1 | 50 | 2.00× | 5 | 1,000,000 | 4.00 | 4.10 |"


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_processes_send_what_the_formula_says():
    one, threads, two = scaling.run(quick=True)
    assert (one["processes"], threads["threads"], two["processes"]) == (1, 2, 2)
    assert min(row["ms"] for row in (one, threads, two)) > 0
    if two["counted_bytes"] is None:
        pytest.skip("the system does not count bytes")
    assert two["counted_bytes"] == pytest.approx(scaling.sent(two["parameters"], 2), rel=0.02)


def test_settings_and_machine_stand_in_the_report():
    text = report.markdown(fake({OURS: 2.0, REFERENCE: 4.0}, note="another function"))
    m = machine.describe(CPU)
    for part in (m["cpu"], m["versions"]["torch"], str(m["commit"]), "tf32 off", "10 GB/s",
                 "another function", "float32 | contiguous | no | off"):  # fmt: skip
        assert part in text
    for name, why in m["absent_peers"].items():
        assert f"{name} ({why}" in text


def test_plots_are_drawn_from_the_json_alone(tmp_path):
    pytest.importorskip("matplotlib")
    result = fake({OURS: 2.0, REFERENCE: 4.0})
    for i, (axis, value) in enumerate([("batch", 1), ("batch", 8), ("steps", 1), ("steps", 4)]):
        row = copy.deepcopy(fake({OURS: 2.0 + i, REFERENCE: 4.0})["rows"][0])
        result["rows"].append({**row, "case": f"{axis} {value}", "sweep": {axis: value}})
    result = json.loads(json.dumps(result))
    drawn = plots.draw(result, tmp_path / "stem")
    assert [path.name for path in drawn] == [
        "stem-bars.png",
        "stem-roofline.png",
        "stem-growth.png",
    ]
    for path in drawn:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size < 150_000


def test_readme_agrees_with_the_newest_results():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.replaced(text) == text, "run `python -m benchmarks readme`"
    assert readme.PAGE.read_text(encoding="utf-8") == readme.page()


def test_readme_quotes_every_lost_case(tmp_path):
    result = fake({OURS: 2.0, REFERENCE: 4.0})
    lost = fake({OURS: 2.0, "peer": 1.0, "slow peer": 8.0})["rows"][0]
    result["rows"] += [{**result["rows"][0], "case": "op minor"}, {**lost, "case": "op lost"}]
    (tmp_path / "a-cpu.json").write_text(json.dumps(result))
    older = {**result, "machine": {**result["machine"], "date": "2001-01-01", "cpu": "Old"}}
    (tmp_path / "b-cpu.json").write_text(json.dumps(older))
    older = {**result["machine"], "time": "", "cpu": "Old"}  # of another machine, that day
    (tmp_path / "c-cpu.json").write_text(json.dumps({**result, "machine": older}))
    short, page = readme.headlines(tmp_path), readme.page(tmp_path)
    for text in (short, page):
        assert "| op case |" in text and "| op lost |" in text and "| op minor |" not in text
        assert "Of 3 cases a contender is faster than ours in 1;" in text and "Old" not in text
    assert "| op case | 2× |  |  |  |" in short and "| op lost |  |  |  | **0.5×** peer |" in short
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert readme.replaced(text, tmp_path) == text.replace("old", short)
    with pytest.raises(ValueError, match="benchmarks:begin"):
        readme.replaced("no markers", tmp_path)


def test_compile_report_reads_what_ptxas_prints():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kIfEvPf' for 'sm_90'
ptxas info    : Function properties for _Z1kIfEvPf
    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 9216 bytes smem, 128 bytes cmem[0]
"""
    (kernel,) = parse(log, "k.cu", "sm_90", {"_Z1kIfEvPf": [2, 5]})
    assert kernel.pop("kernel") in ("k<float>", "_Z1kIfEvPf")
    assert kernel == {
        "file": "k.cu", "architecture": "sm_90", "registers": 40, "shared_bytes": 9216,
        "stack_bytes": 24, "spill_bytes": 48, "spills_in_loops": [2, 5],
    }  # fmt: skip


def test_compile_report_counts_spills_in_loops():
    """What stands before and behind the loop does not count, nor the last jump, to itself."""
    sass = """
    Function : _Z1kv
        /*0000*/                   STL [R1], R7 ;                    /* 0x0000 */
        /*0010*/              @!P0 BRA 0x0060 ;                      /* 0x0000 */
        /*0020*/                   LDL.64 R2, [R1+0x8] ;             /* 0x0000 */
        /*0030*/                   FFMA R2, R3, R4, R2 ;             /* 0x0000 */
        /*0040*/               @P1 STL [R1+0x10], R2 ;               /* 0x0000 */
        /*0050*/               @P2 BRA 0x20 ;                        /* 0x0000 */
        /*0060*/                   LDL R7, [R1] ;                    /* 0x0000 */
        /*0070*/                   EXIT ;                            /* 0x0000 */
        /*0080*/                   BRA 0x80;                         /* 0x0000 */
    Function : straight
        /*0000*/                   EXIT ;                            /* 0x0000 */
"""
    assert spills_in_loops(sass) == {"_Z1kv": [2, 4], "straight": [0, 0]}


def test_the_gpu_suite_fails_loudly_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        suite(tmp_path, "gpu")


# ----------------------------------------------------------- counted work: a guard without a clock


def counts(function, *args, **options) -> dict[str, int]:
    with torch.inference_mode():
        function(*args, **options)  # filters and the like are made once
        return counting.count(lambda: function(*args, **options), CPU)


X = random(4, 16, 32, 32)
SIZE = X.nbytes


@pytest.mark.native
@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_native_haar_is_one_call_that_allocates_its_result_alone(level, memory_format):
    x = X.to(memory_format=memory_format)
    for found in (
        counts(ops.haar_pack, x, level),
        counts(ops.haar_unpack, ops.haar_pack(x, level), level),
    ):
        assert found["operators"] == 1
        assert found["allocated_bytes"] == found["peak_bytes"] == SIZE


# Operators called from Python, and the sum of all allocations as a multiple of the first input:
# what the plain reference needs; a tenth more is allowed. A native version needs less.
LIMITS = {
    "group_norm_silu": (ops.group_norm_silu, (X, 4), 2, 2.0),
    "q_sample": (ops.q_sample, (X, torch.arange(4), X, torch.rand(10)), 16, 3.0),
    "ddim_step": (ops.ddim_step, (X, X, 0.5, 0.6), 28, 6.0),
    "dwt2d": (ops.dwt2d, (X, "db4", "symmetric"), 29, 26.4),
    "idwt2d": (ops.idwt2d, ((X, X, X, X), "db4", "symmetric"), 16, 25.7),
    "wavelet_attention": (ops.wavelet_attention, (X.reshape(2, 2, 32, 32, 16),) * 3, 132, 42.0),
    "anomaly_map": (ops.anomaly_map, (X, -X, (), (), (1.0, 1.0, 1.0), 2), 109, 12.4),
    "philox_normal": (ops.philox_normal, (tuple(X.shape), 7, 0, 0, CPU), 146, 71.5),
}


@pytest.mark.parametrize("operator", LIMITS)
def test_counted_work_of_operators(operator):
    function, inputs, calls, passes = LIMITS[operator]
    found, again = (counts(function, *inputs) for _ in range(2))
    for key in ("operators", "allocated_bytes", "peak_bytes"):
        assert found[key] == again[key]
    assert 0 < found["operators"] <= 1.1 * calls
    assert found["allocated_bytes"] <= 1.1 * passes * SIZE


def test_a_count_sees_what_is_there():
    found = counts(lambda: (X + 1) * 2)
    assert found["operators"] == 2
    assert found["allocated_bytes"] == pytest.approx(2 * SIZE, abs=100)  # and the two scalars
    assert found["peak_bytes"] == pytest.approx(2 * SIZE, abs=100)
    found = counts(lambda: [(X + 1).sum() for _ in range(3)])
    assert found["allocated_bytes"] == pytest.approx(3 * SIZE, rel=0.01)
    assert found["peak_bytes"] == pytest.approx(SIZE, rel=0.01)
    found = counts(lambda: np.ones(1 << 20))
    assert found["numpy_peak_bytes"] == pytest.approx(8 << 20, rel=0.01)


@pytest.mark.gpu
def test_counted_work_and_times_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda")
    x = X.to(device)
    ops.haar_pack(x, 3)
    found = counting.count(lambda: ops.haar_pack(x, 3), device)
    assert found["synchronisations"] == 0
    assert found["kernels"] >= 1 and found["peak_bytes"] >= SIZE
    if dispatch.OPERATORS["haar_pack"].backend("cuda") == "cuda":
        assert found["kernels"] == 1 and found["allocated_bytes"] == SIZE
    clock = DeviceClock(device)
    small, large = torch.ones(1 << 10, device=device), torch.ones(1 << 28, device=device)
    times = [clock.start(lambda y=y: y.add_(1))() for y in (small, large)]
    # 2 GiB are moved: at most 10 TB/s, so at least 0.2 ms, where 8 KiB take microseconds.
    assert times[0] < 0.2 < times[1]


# ------------------------------------------------------------------------ quality


def test_a_variant_of_the_score_is_what_a_fit_with_it_gives():
    """Without another training, and it leaves no trace."""
    images = np.random.default_rng(0).random((26, 1, 32, 32), dtype=np.float32)
    data = DataSet("noise", "image", images[:20], images[20:], np.zeros(6), np.zeros(6))
    options = {"denoiser": "unet-tiny", "train_steps": 2}
    args = SimpleNamespace(preset="balanced", options=options, size=32, channels=1, device="cpu")
    detector, _ = quality._fit(data, args, 0, {})
    usual = detector.score(data.test).score
    for scoring in ({"map_weights": [1, 0, 1]}, {"mode": "invert", "inversion_steps": 2}):
        expected = quality._fit(data, args, 0, scoring)[0].score(data.test)
        with quality._scored_by(detector, data, scoring):
            found = detector.score(data.test)
        assert np.array_equal(found.score, expected.score)
        assert np.array_equal(found.p_value, expected.p_value)
        assert not np.allclose(found.score, usual)
    with quality._scored_by(detector, data, {"multi_scale": False}):
        assert not np.allclose(detector.score(data.test).score, usual)
        assert len(detector.model._features(torch.zeros(1, 4, 16, 16))) == 1
    assert np.array_equal(detector.score(data.test).score, usual)


def test_parts_stay_what_choices_were_made_on():
    # By the name alone: another rule would report on images that options were chosen by.
    report = ["000.png", "001.png", "x/004.bmp", "a.jpg", "f.png", "g.tif"]
    dev = ["002.png", "y/003.png", "exp1_num_100.png", "exp1_num_101.png", "c.png", "e.png"]
    assert [part_of(name) for name in report + dev] == ["report"] * 6 + ["dev"] * 6


def test_a_step_larger_than_the_gap_begins_an_object():
    names = [f"photo{i}_num_{n}.png" for i, n in enumerate((500, 100, 300, 301, 100, 702))]
    assert objects(names, r"num_(\d+)", 202) == [0, 0, 0, 0, 0, 0]
    assert objects(names, r"num_(\d+)", 200) == [0, 0, 0, 0, 0, 1]
    assert objects(names, r"num_(\d+)", 199) == [1, 0, 1, 1, 0, 2]


def test_what_was_hidden_in_the_training_is_no_test(monkeypatch):
    # 60 training images and 60 test images of 20 objects, each of the value of its row; the test's
    # labels go round, so that an object has both kinds.
    train, test = -1 - np.arange(60.0), np.arange(60.0)
    data = DataSet(
        "values", "image", train, test, np.arange(60) % 2, np.zeros(60),
        groups=[n // 3 for n in range(60)], test_groups=[n // 3 for n in range(60)],
    )  # fmt: skip
    rows, scored, fitted = np.arange(9, 60), [], []

    def scorer(sign):
        def score(images, maps):
            scored.append(images.astype(int))
            # All anomalies in front of all normal ones, or behind.
            return SimpleNamespace(score=sign * (images % 2))

        def open_(source):
            return SimpleNamespace(batches=lambda n: [SimpleNamespace(x=torch.as_tensor(source))])

        return SimpleNamespace(score=score, open=open_)

    def fit(data, args, seed, options, polluted, groups):
        fitted.append((polluted, groups))
        return scorer(-1), 0.0

    monkeypatch.setattr(quality, "_fit", fit)
    found = quality._polluted(scorer(1), data, None, 0, rows)
    assert found == {f"{share}% hidden anomalies": -1.0 for share in (2, 5, 10)}
    for (polluted, groups), kept, count in zip(fitted, scored[::2], (1, 3, 6), strict=True):
        hidden = polluted[60:].astype(int)
        assert len(hidden) == count and (hidden % 2 == 1).all()
        assert polluted[:60].tolist() == train.tolist() and groups[:60] == data.groups
        # One group an object, none of which is one of the training's.
        objects = hidden // 3
        assert [groups[60:].index(name) for name in groups[60:]] == [
            objects.tolist().index(n) for n in objects
        ]
        assert not set(groups[60:]) & set(data.groups)
        assert kept.tolist() == [row for row in rows if row // 3 not in objects]
    assert [part.tolist() for part in scored[::2]] == [part.tolist() for part in scored[1::2]]
    # Where nothing is known of objects each is one.
    monkeypatch.setattr(quality, "_array", lambda detector, source: source)
    alone = DataSet("rows", "vector", train, test, data.label, data.part)
    scored.clear()
    quality._polluted(scorer(1), alone, None, 0, rows)
    polluted, groups = fitted[-1]
    assert groups is None and scored[-1].tolist() == [r for r in rows if r not in polluted[60:]]


def test_objects_in_both_parts_are_counted_and_told():
    part = np.array(["dev", "report", "dev", "report", "dev", "report"])
    data = DataSet("tiles", "image", None, None, np.zeros(6), part, test_groups=[0, 0, 0, 1, 2, 2])
    rows = np.flatnonzero(part == "report")
    assert quality._in_both(data, rows) == 2 and quality._in_both(data, np.arange(6)) == 0
    assert quality._in_both(DataSet("t", "vector", None, None, part, part), rows) == 0
    one = {"name": "tiles", "n_objects": 3}
    assert not quality_tables._both_parts(one)
    text = quality_tables._both_parts({**one, "n_objects_in_both_parts": 2})
    assert "2 of the 3 objects of this part stand in the other one too" in text


def test_principal_components_keep_most_of_the_variance():
    # Deviations on axes: the last two hold 4% of the variance, the last three 10%.
    deviation = torch.tensor([80.0, 10.0, 6.0, 3.0, 1.0]).sqrt()
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)))
    residual = controls._pca_residual(5 + signs * deviation, lambda rows: rows)
    found = residual(5 + 2 * torch.eye(5))
    torch.testing.assert_close(found, torch.tensor([0.0, 0, 0, 4, 4]), atol=1e-5, rtol=1e-6)


def test_nearest_of_all_normals_are_scikit_learns():
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    rng = np.random.default_rng(0)
    train, test = (rng.standard_normal((n, 3)) * [1, 100, 0] + [0, 5, 7] for n in (30, 9))
    scaler = preprocessing.StandardScaler().fit(train)
    known, new = scaler.transform(train), scaler.transform(test)
    distance = np.sort(np.linalg.norm(new[:, None] - known[None], axis=2), axis=1)[:, :5]
    np.testing.assert_allclose(
        controls.nearest(*controls.standardised(train, test)), distance.mean(axis=1)
    )


def test_public_detectors_train_on_standardised_normals(tmp_path):
    """By a stand-in for their code: what it is given, and that its scores come back."""
    (tmp_path / "diffusion").mkdir()
    for module, kind in dte.DETECTORS.values():
        (tmp_path / "diffusion" / f"{module}.py").write_text(
            "import numpy as np, torch\n"
            f"class {kind}:\n"
            "    def __init__(self, seed):\n"
            "        self.drawn = torch.rand(1).item() + 10 * np.random.rand()\n"
            "    def fit(self, train):\n"
            "        assert len(train) == 30 and np.abs(train.mean(0)).max() < 1e-6\n"
            "        assert np.allclose(train.std(0), 1)\n"
            "        print('epoch 0')\n"
            "        return self\n"
            "    def predict_score(self, test):\n"
            "        assert len(test) > 1, 'DDPM takes no single row'\n"
            "        return np.append(test[:-1, 0] + self.drawn, np.float32('nan'))\n"
        )
    rng = np.random.default_rng(0)
    train, test = (3 + 7 * rng.standard_normal((n, 2)) for n in (30, 4))
    torch.manual_seed(5)
    np.random.seed(5)
    expected = (test[:3, 0] - train[:, 0].mean()) / train[:, 0].std()
    expected += torch.rand(1).item() + 10 * np.random.rand()
    found = list(dte.detectors(tmp_path, train, test, seed=5))
    assert [name for name, _, _ in found] == ["DTE-NP", "DTE-C", "DDPM"]
    for _, scores, costs in found:
        np.testing.assert_allclose(scores, [*expected, 0.0])
        assert costs["fit_seconds"] > 0 and costs["latency_ms"] > 0
    with pytest.raises(SystemExit, match="is no clone of https://github.com/vicliv/DTE"):
        next(dte.detectors(tmp_path / "diffusion", train, test, seed=5))


def test_a_public_detector_of_images_trains_on_normals_and_is_scored_by_its_error(tmp_path):
    """By a stand-in for its code: a network that learns the images' mean and gives it back."""
    (tmp_path / "UNet.py").write_text(
        "import torch\n"
        "class UNetModel(torch.nn.Module):\n"
        "    def __init__(self, side, width, n_heads, in_channels):\n"
        "        super().__init__()\n"
        "        assert (side, width, n_heads, in_channels) == (16, 4, 2, 3)\n"
        "        self.mean = torch.nn.Parameter(torch.zeros(in_channels, side, side))\n"
        "def update_ema_params(target, source, decay):\n"
        "    assert decay == 0.9999 ** (300_100 / 40)\n"
        "    target.mean.data.mul_(decay).add_(source.mean.data, alpha=1 - decay)\n"
    )
    (tmp_path / "GaussianDiffusion.py").write_text(
        "import torch\n"
        "seen = []\n"
        "def get_beta_schedule(count, name):\n"
        "    return count, name\n"
        "class GaussianDiffusionModel:\n"
        "    def __init__(self, size, betas, img_channels, loss_type, loss_weight, noise):\n"
        "        assert (size, betas, img_channels) == ([16, 16], (1000, 'linear'), 3)\n"
        "        assert (loss_type, loss_weight, noise) == ('l2', 'none', 'simplex')\n"
        "    def p_loss(self, model, x, args):\n"
        "        assert args == {'train_start': True, 'sample_distance': 800}\n"
        "        # What the step before has left: gradients are clipped.\n"
        "        assert not seen or abs(model.mean.grad.norm() - 1) < 1e-3\n"
        "        seen.append(x)\n"
        "        return 1e4 * (model.mean - x).mean(), ()\n"
        "    def forward_backward(self, model, x, see_whole_sequence, t_distance, denoise_fn):\n"
        "        assert not model.training and t_distance == 200 and denoise_fn == 'noise_fn'\n"
        "        assert see_whole_sequence is None\n"
        "        return model.mean.data[None]\n"
    )
    rng = np.random.default_rng(0)
    train, test = (rng.random((n, 3, 16, 16), dtype=np.float32) for n in (20, 5))
    maps, scores, costs = anoddpm.detect(tmp_path, train, test, seed=5, steps=40, width=4)
    # AdamW's steps against a gradient that never changes are of 1e-4, after clipping too.
    decay, mean, averaged = 0.9999 ** (300_100 / 40), 0.0, 0.0
    for _ in range(40):
        mean -= 1e-4
        averaged = decay * averaged + (1 - decay) * mean
    expected = ((2 * test - 1 - averaged) ** 2).mean(axis=1)
    np.testing.assert_allclose(maps, expected, rtol=1e-5)
    highest = np.sort(expected.reshape(5, -1), axis=1)[:, -3:]  # a hundredth of 256
    np.testing.assert_allclose(scores, highest.mean(axis=1), rtol=1e-5)
    assert costs["fit_seconds"] > 0 and costs["latency_ms"] > 0
    seen = torch.cat(sys.modules["GaussianDiffusion"].seen).numpy()
    assert len(seen) == 40 and not np.array_equal(seen[:20], seen[20:])
    assert not np.array_equal(seen[:20], 2 * train - 1)
    for epoch in (seen[:20], seen[20:]):
        assert {image.tobytes() for image in epoch} == {(2 * x - 1).tobytes() for x in train}
    for name in ("GaussianDiffusion", "UNet"):
        del sys.modules[name]
    with pytest.raises(SystemExit, match="no clone of https://github.com/Julian-Wyatt/AnoDDPM: Ga"):
        anoddpm.detect(tmp_path / "none", train, test, seed=5, steps=1, width=4)
    (tmp_path / "UNet.py").write_text("import no_such_package")
    with pytest.raises(SystemExit, match="AnoDDPM needs the package no_such_package"):
        anoddpm.detect(tmp_path, train, test, seed=5, steps=1, width=4)


def test_the_best_of_the_others_stands_in_the_readme():
    result = json.loads((results.RESULTS / "quality-tables.json").read_text(encoding="utf-8"))
    best = max(controls.CONTROLS, key=lambda name: np.mean(
        [[run["auroc"] for run in one["runs"][name]] for one in result["sets"]]
    ))  # fmt: skip
    for one in result["sets"]:
        for name in (controls.NEAREST, *dte.DETECTORS):
            one["runs"].pop(name, None)
    ((_, _, cell),) = quality_tables.headlines(result)
    assert cell.startswith(f"{best}: AUROC ")
    for one in result["sets"]:
        one["runs"][controls.NEAREST] = [{"auroc": 0.99, "f1_max": 0.5}] * len(result["seeds"])
    assert quality_tables.headlines(result)[0][2] == "nearest, all normals: AUROC 99.0 ± 0.0"
    # Nothing of what a result of robustness says is about detection.
    result["sets"][0]["robustness"] = {OURS: [{"noise": -0.1}]}
    assert quality_tables.headlines(result) == []


def test_a_copy_in_float64_computes_in_float64():
    detector = detector_cases._detector(CPU, "unet-tiny", 32, 1, "one_step")
    images = random(2, 1, 32, 32).double() / 8 + 0.5
    with detector_cases.as_written(), torch.inference_mode():
        exact = detector_cases.in_float64(detector)
        (map_, _), (narrow, _) = exact.model.score(images), detector.model.score(images.float())
    assert map_.dtype == torch.float64 and narrow.dtype == torch.float32
    floating = [x for x in exact.model.state_dict().values() if x.is_floating_point()]
    assert {x.dtype for x in floating} == {torch.float64}
    torch.testing.assert_close(narrow.double(), map_, rtol=1e-5, atol=1e-5)


def test_whole_detectors_are_tested_on_the_report_part(tmp_path):
    from PIL import Image

    names = ["000", "001", "002", "003", "004"]
    for kind in ("good", "scratch"):
        (tmp_path / "test" / kind).mkdir(parents=True)
        for name in names:
            Image.new("L", (8, 8)).save(tmp_path / "test" / kind / f"{name}.png")
            if kind != "good":
                masks = tmp_path / "ground_truth" / kind
                masks.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8), 255).save(masks / f"{name}_mask.png")

    def found(made_up):
        return sorted(Path(test.path).stem for test in end_to_end._tests(tmp_path, made_up))

    assert found(made_up=False) == sorted(2 * ["000", "001", "004"])
    assert found(made_up=True) == sorted(2 * names)


def test_robustness_has_a_column_for_each_method():
    one = {"name": "tiles", "robustness": {
        "ours": [{"2% hidden anomalies": -0.01, "noise": -0.3}, {"noise": -0.2}],
        "other": [{"noise": 0.015}],
    }}  # fmt: skip
    assert quality_tables._robustness(one)[3:] == [
        "| what | ours | other |",
        "| --- | --- | --- |",
        "| 2% hidden anomalies | -1.0 |  |",
        "| noise | -25.0 ± 7.1 | +1.5 |",
    ]


def test_an_interrupted_suite_keeps_what_it_measured():
    def interrupt(x):
        raise KeyboardInterrupt

    def case(name, run):
        inputs = lambda device: (torch.ones(2),)  # noqa: E731
        return Case("op", name, inputs, lambda x: x[0], {OURS: Contender(run)})

    runner = harness.Run(CPU, harness.QUICK, quick=True)
    runner.measure([case("first", torch.clone), case("second", interrupt)])
    assert [row["name"] for row in runner.rows] == ["first"]
    assert runner.wrong == ["interrupted: only the first 1 cases are measured"]
