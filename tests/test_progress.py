import io
import sys
import threading

import numpy as np
import pytest
from tqdm import tqdm

import diffad_fast as daf
from diffad_fast.progress import progress


class Written:
    """What some programs put in the place of standard error."""

    def write(self, text):
        pass

    def flush(self):
        pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, Written(), closed()], ids=["none", "own", "closed"])
def test_without_a_terminal_there_is_no_bar(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress(range(3), 3, "reading", "image")) == [0, 1, 2]
    with progress(None, 3, "scoring", "image") as bar:
        bar.update(2)
        bar.set_postfix(refresh=False, loss=1.0)
        bar.close()


def test_scores_do_not_wait_for_a_lock_that_processes_share():
    """A forked process may have it taken by a thread that it has not."""
    rows = np.random.default_rng(0).normal(size=(200, 3))
    detector = daf.Detector(kind="vector", train_steps=1, device="cpu").fit(rows)
    scored = []
    with tqdm.get_lock():
        thread = threading.Thread(target=lambda: scored.append(detector.score(rows)), daemon=True)
        thread.start()
        thread.join(60)
    assert scored


def test_a_terminal_sees_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(None, 3, "scoring", "image") as bar:
        assert isinstance(bar, tqdm) and not bar.disable
    monkeypatch.setenv("DIFFAD_FAST_PROGRESS", "0")
    assert not isinstance(progress(None, 3, "scoring", "image"), tqdm)
