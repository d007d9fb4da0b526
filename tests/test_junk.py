"""Junk in any argument of any public function: an error of the right kind, nothing changed, never a crash: 20,000 calls of junk.py."""

import inspect
import pathlib
import subprocess
import sys

import junk
import numpy as np
import pytest

import cbn


def test_drawn_junk():
    command = [sys.executable, "-W", "ignore", str(pathlib.Path(junk.__file__)), "--seed", "5", "--calls", "20000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "counts" in done.stdout


NOT_CALLED = {"BatchStats", "Gradients", "GradientSums", "Folded", "empty_cache", "get_cache_limit", "get_include", "get_num_threads", "show_config"}  # take nothing


def test_the_space_has_everything():
    """A public function, or an argument of one, that junk is not tried on."""
    tried = {}
    for name, make in junk.TARGETS:
        tried.setdefault(name, set()).update(make()[1])
    assert set(cbn.__all__) - NOT_CALLED <= tried.keys()
    for name in set(cbn.__all__) & tried.keys():
        if name not in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
            assert set(inspect.signature(getattr(cbn, name)).parameters) <= tried[name], name


@pytest.mark.parametrize("fault", ["raw error", "half done"])
def test_what_is_wrong_is_noticed(fault, monkeypatch):
    """A check of the checks."""

    def faulty(x, *args, **kwargs):
        if fault == "raw error":
            raise IndexError("raw")
        if isinstance(x, np.ndarray) and x.flags.writeable and x.dtype == np.float32:
            x[...] = 0
        raise ValueError("x: expected something else")

    monkeypatch.setattr(cbn, "batch_norm_train", faulty)
    monkeypatch.setattr(junk, "TARGETS", [target for target in junk.targets() if target[0] == "batch_norm_train"])
    with pytest.raises(AssertionError, match="raw|was written"):
        for index in range(50):
            junk.one(index, 0)
