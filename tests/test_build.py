"""The package builds from its source with any C compiler: without OpenMP it is serial, and gives the same bits."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

import cbn

SOURCE = pathlib.Path(__file__).parents[1]

pytest.importorskip("Cython", reason="building needs Cython")
pytest.importorskip("setuptools", reason="building needs setuptools")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SOURCE / "setup.py").exists(), reason="the source is not here"),
    pytest.mark.skipif(os.name != "posix" or not (shutil.which(os.environ.get("CC", "cc"))), reason="there is no C compiler"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source, without what was built of it."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(SOURCE / name, folder)
    shutil.copytree(SOURCE / "cbn", folder / "cbn", ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__"))
    return folder


def build(source, to, **environment):
    command = [sys.executable, "setup.py", "-q", "build", f"--build-lib={to}", f"--build-temp={to}-temp"]
    return subprocess.run(command, cwd=source, env=os.environ | environment, capture_output=True, text=True, check=False)


def run(folder, code):
    """What code prints where the package in a folder is imported."""
    code = "import numpy as np, cbn\n" + code
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_openmp(source, tmp_path):
    done = build(source, tmp_path, CBN_OPENMP="off")
    assert done.returncode == 0, done.stdout + done.stderr
    x = np.random.default_rng(26).standard_normal((8, 40, 33, 31)).astype(np.float32)
    y, st = cbn.batch_norm_train(x)
    np.savez(tmp_path / "given.npz", x=x)
    shown = run(
        tmp_path,
        """
x = np.load("given.npz")["x"]
cbn.set_num_threads(4)
y, st = cbn.batch_norm_train(x)
np.savez("results.npz", y, st.mean, st.var, *cbn.batch_norm_backward(x, x, st))
print(cbn.threads.has_openmp(), cbn.get_num_threads(), *cbn.dispatch.isa_built(), cbn.__file__)
cbn.show_config()
""",
    )
    assert shown.startswith(f"False 1 {' '.join(cbn.dispatch.isa_built())} {tmp_path}")
    assert "OpenMP: no" in shown
    expected = y, st.mean, st.var, *cbn.batch_norm_backward(x, x, st)
    with np.load(tmp_path / "results.npz") as results:
        for a, b in zip(results.values(), expected, strict=True):
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_openmp_required_but_missing(source, tmp_path):
    """The error comes before anything is compiled but the probe."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase " $* " in *" -fopenmp "*) echo "no such option" >&2; exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    done = build(source, tmp_path / "built", CBN_OPENMP="on", CC=str(compiler))
    assert done.returncode != 0
    assert "CBN_OPENMP=on, but no program with OpenMP could be built" in done.stderr
    assert not list((tmp_path / "built").rglob("*.so"))
