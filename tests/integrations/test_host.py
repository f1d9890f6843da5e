"""What is said where a host is missing."""

import subprocess
import sys

import pytest

from diffad_fast.integrations import _host


def test_a_missing_host_names_the_extra():
    with pytest.raises(
        ImportError, match=r"needs nowhere_at_all: .* not installed; pip install"
    ) as e:
        _host.require("nowhere_at_all.part")
    assert "diffad_fast[plugins]" in str(e.value) and e.value.name == "nowhere_at_all"


def test_a_broken_host_says_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "broken_host.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="broken_host is installed but .*'what_it_needs'"):
        _host.require("broken_host")


def test_the_library_imports_no_host():
    code = (
        "import sys, diffad_fast as daf, diffad_fast.cli\n"
        "daf.Detector, daf.load, daf.ops\n"
        "print(*[m for m in ('pyod', 'anomalib', 'diffusers', 'lightning', 'onnx')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
