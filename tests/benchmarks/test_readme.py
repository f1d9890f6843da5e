"""README.md and the page of results."""

from __future__ import annotations

import json

import pytest

from benchmarks import readme
from benchmarks.case import OURS, REFERENCE


def test_readme_agrees_with_the_newest_results():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.replaced(text) == text, "run `python -m benchmarks readme`"
    assert readme.PAGE.read_text(encoding="utf-8") == readme.page()


def test_our_own_backends_and_dtypes_are_no_peers(fake, tmp_path):
    """Where one of them is faster that is told, apart from what others win."""
    result = fake({OURS: 2.0, "peer": 3.0, f"{OURS}, Triton": 1.0})
    both = fake({OURS: 2.0, "peer": 1.5, f"{OURS}, Triton": 1.0})["rows"][0]
    result["rows"] += [{**both, "case": "op both"}]
    (tmp_path / "a-cpu.json").write_text(json.dumps(result))
    short = readme.headlines(tmp_path)
    assert "| op case |  |  |  | 1.5× peer |" in short
    assert "| op both |  |  |  | **0.75×** peer |" in short
    told = f"In 1 more another backend, dtype or call of our own is faster: op case **0.5×** {OURS}"
    assert f"faster than ours in 1; all of these are shown. {told}, Triton." in short
    result["machine"] |= {"cpu_features": "NARROW"}
    (tmp_path / "b-cpu.json").write_text(json.dumps(result))
    other = readme.headlines(tmp_path).split("**The same suite on other vectors**: ")[1]
    assert f"faster than ours in 1: op both **0.75×** peer. {told}, Triton." in other


def test_readme_quotes_every_lost_case(fake, tmp_path):
    result = fake({OURS: 2.0, REFERENCE: 4.0})
    result["machine"]["cpu_features"] = "AVX512"
    lost = fake({OURS: 2.0, "peer": 1.0, "slow peer": 8.0})["rows"][0]
    result["rows"] += [{**result["rows"][0], "case": "op minor"}, {**lost, "case": "op lost"}]
    (tmp_path / "a-cpu.json").write_text(json.dumps(result))
    older = {**result, "machine": {**result["machine"], "date": "2001-01-01", "cpu": "Old"}}
    (tmp_path / "b-cpu.json").write_text(json.dumps(older))
    older = {**result["machine"], "time": "", "cpu": "Old"}  # of another machine, that day
    (tmp_path / "c-cpu.json").write_text(json.dumps({**result, "machine": older}))
    narrow = {**result["machine"], "cpu_features": "AVX2", "cpu": "Narrow", "date": "2999-01-01"}
    (tmp_path / "d-cpu.json").write_text(json.dumps({**result, "machine": narrow}))
    short, page = readme.headlines(tmp_path), readme.page(tmp_path)
    (tmp_path / "e-cpu.json").write_text(
        json.dumps({**result, "machine": {**narrow, "cpu_features": "DEFAULT", "cpu": "None"}})
    )
    short, page = readme.headlines(tmp_path), readme.page(tmp_path)
    table, other, none = short.split("**The same suite on other vectors**: ")
    assert table.count("| op lost |") == 1 and page.count("| op lost |") == 3
    assert other.startswith("Narrow, AVX2, ") and none.startswith("None, DEFAULT, ")
    assert "cases: reference: 2×. Of 3 cases" in other
    assert "faster than ours in 1: op lost **0.5×** peer." in other
    for text in (short, page):
        assert "| op case |" in text and "| op lost |" in text and "| op minor |" not in text
        assert "Of 3 cases a contender is faster than ours in 1;" in text and "Old" not in text
    assert "| op case | 2× |  |  |  |" in short and "| op lost |  |  |  | **0.5×** peer |" in short
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert readme.replaced(text, tmp_path) == text.replace("old", short)
    with pytest.raises(ValueError, match="benchmarks:begin"):
        readme.replaced("no markers", tmp_path)
