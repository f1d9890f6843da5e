from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import diffad_fast as daf
from diffad_fast import native, ops
from diffad_fast.errors import BackendError, InputError
from diffad_fast.ops import dispatch


def serving(name: str = "haar_pack", device: str = "cpu") -> str:
    return daf.info()["operators"][name][device]


@pytest.mark.native
def test_use_backend_chooses_and_restores():
    assert serving() == "cpu"
    with daf.use_backend("reference"):
        assert serving() == "reference"
        with daf.use_backend("auto"):
            assert serving() == "cpu"
        assert serving() == "reference"
        assert daf.info()["backend"] == "reference"
    assert serving() == "cpu"
    with pytest.raises(KeyError), daf.use_backend("reference"):
        raise KeyError
    assert serving() == "cpu"


@pytest.mark.native
def test_blocks_may_end_in_another_order():
    """Those of threads do."""
    first, second = daf.use_backend("reference"), daf.use_backend("cpu")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert serving() == "cpu" and dispatch.selected() == "cpu"
    second.__exit__(None, None, None)
    assert dispatch.selected() == "auto"


@pytest.mark.native
def test_the_reference_in_one_thread():
    with ThreadPoolExecutor(1) as other, daf.use_backend("cpu"):
        with dispatch.by_reference():
            assert serving() == "reference" and other.submit(serving).result() == "cpu"
        assert serving() == "cpu"


@pytest.mark.native
@pytest.mark.parametrize("strict", [True, False])
def test_the_reference_in_an_exported_program(strict):
    class Norm(torch.nn.Module):
        def forward(self, x):
            with dispatch.by_reference():
                return ops.group_norm_silu(x, 2)

    program = torch.export.export(Norm(), (torch.rand(1, 4, 4, 4),), strict=strict)
    assert "diffad_fast" not in str(program.graph) and dispatch.selected() == "auto"


@pytest.mark.native
def test_the_chosen_backend_runs(monkeypatch):
    called = []
    for name in ("reference", "cpu"):
        original = dispatch.OPERATORS["haar_pack"].implementations[name]
        monkeypatch.setitem(
            dispatch.OPERATORS["haar_pack"].implementations,
            name,
            lambda *a, name=name, original=original: called.append(name) or original(*a),
        )
    x = torch.zeros(1, 1, 2, 2)
    ops.haar_pack(x)
    with daf.use_backend("reference"):
        ops.haar_pack(x)
    with daf.use_backend("cpu"):
        ops.haar_pack(x)
    assert called == ["cpu", "reference", "cpu"]


def test_unknown_backend():
    with pytest.raises(InputError, match="'gpu'.*auto, reference, cpu, triton, cuda"):
        with daf.use_backend("gpu"):
            pass
    assert dispatch.selected() == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_backend_raises_at_once():
    with pytest.raises(BackendError, match="'cuda' is not available here: "):
        with daf.use_backend("cuda"):
            pass
    assert "cuda" in daf.info()["unavailable"]


def test_a_backend_that_the_operator_lacks_raises_at_the_call():
    operator = dispatch.Operator("only_reference", lambda x: x)
    try:
        with daf.use_backend("cpu" if native.loaded() else "triton"):
            with pytest.raises(BackendError, match="'only_reference' has only reference"):
                operator(torch.zeros(1))
        assert operator(torch.ones(1)) == 1
    finally:
        del dispatch.OPERATORS["only_reference"]


def test_an_operator_of_another_device_raises_at_the_call(monkeypatch):
    monkeypatch.setattr(dispatch, "_unavailable", {})
    operator = dispatch.Operator("elsewhere", lambda x: x, cuda=lambda x: x)
    try:
        with daf.use_backend("cuda"):
            with pytest.raises(BackendError, match="'cuda' cannot serve 'elsewhere' on a cpu"):
                operator(torch.zeros(1))
    finally:
        del dispatch.OPERATORS["elsewhere"]


def test_an_implementation_that_refuses_a_call_is_passed_over_or_named(monkeypatch):
    monkeypatch.setattr(dispatch, "_unavailable", {})

    operator = dispatch.Operator(
        "choosy",
        lambda x, y: x - y,
        cpu=lambda x, y: x + y,
        refuses={"cpu": lambda x, y: "y is negative" if y < 0 else None},
    )
    try:
        assert operator(torch.ones(1), 2) == 3 and operator(torch.ones(1), -2) == 3
        assert operator.backend("cpu") == "cpu"
        with daf.use_backend("cpu"):
            assert operator(torch.ones(1), 2) == 3
            with pytest.raises(BackendError, match="'cpu' .*'choosy': y is negative"):
                operator(torch.ones(1), -2)
    finally:
        del dispatch.OPERATORS["choosy"]


def test_an_implementation_of_an_unavailable_backend_is_left_out(monkeypatch):
    monkeypatch.setattr(dispatch, "_unavailable", {"cuda": "no reason"})
    try:
        operator = dispatch.Operator("partly", lambda x: x, cuda=lambda x: -x, cpu=lambda x: x)
        assert list(operator.implementations) == ["reference", "cpu"]
    finally:
        del dispatch.OPERATORS["partly"]


@pytest.mark.parametrize("interpret, expected", [("0", "without CUDA"), ("1", "ok")])
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch was built with CUDA")
def test_triton_serves_cpu_tensors_in_the_interpreter_alone(interpret, expected):
    code = (
        "import diffad_fast.ops as o, sys; from diffad_fast.ops import dispatch;"
        "assert 'triton' not in sys.modules;"
        "print(dispatch.unavailable().get('triton', 'ok'))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert expected in done.stdout, done.stderr


def run(code: str, backend: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DIFFAD_FAST_BACKEND": backend},
        capture_output=True,
        text=True,
    )


def test_environment_variable():
    code = "import diffad_fast as d; print(d.info()['operators']['haar_pack']['cpu'])"
    assert run(code, "reference").stdout == "reference\n"
    wrong = run(code, "fastest")
    assert wrong.returncode and "unknown backend 'fastest'" in wrong.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch was built with CUDA")
def test_environment_variable_with_a_missing_backend():
    missing = run("import diffad_fast.ops", "cuda")
    assert missing.returncode and "backend 'cuda' is not available here" in missing.stderr
