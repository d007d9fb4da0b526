"""What tells of an installation: python -m cbn, the self-test, and imports that fail, each of which says what to do."""

import os
import pathlib
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import numpy as np
import pytest
from interpreter import FOLDER, python

import cbn
from cbn import selftest

PACKAGE = pathlib.Path(cbn.__file__).parent


def run_module(name):
    return subprocess.run([sys.executable, "-m", name], cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False)


def test_python_m_cbn(capsys):
    cbn.show_config()
    shown = capsys.readouterr().out.splitlines()
    done = run_module("cbn")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "memory" not in line and "threads" not in line] == [
        line for line in shown if "memory" not in line and "threads" not in line
    ]


def test_self_test():
    done = run_module("cbn.selftest")
    assert done.returncode == 0 and done.stdout.endswith("all is well\n"), done.stdout + done.stderr
    assert done.stdout.count("the same bits: ") == 3 * len(cbn.dispatch.isa_available())


def broken(name):
    """Results of which one is wrong in the last place, on any level but the baseline."""
    true = selftest.results

    def results(*case):
        found = true(*case)
        if cbn.dispatch.get_isa() != "baseline" or name is None:
            a = found["y" if name is None else name]
            a.reshape(-1)[7] = a.reshape(-1)[7] * 2 + 1
        return found

    return results


@pytest.mark.skipif(len(cbn.dispatch.isa_available()) == 1, reason="has one CPU level")
def test_self_test_finds_other_bits(monkeypatch, capsys, restored):
    monkeypatch.setattr(selftest, "results", broken("dx"))
    assert selftest.main()
    shown = capsys.readouterr().out
    assert "ok     the same bits: baseline, 1 threads" in shown
    assert f"WRONG  the same bits: {cbn.dispatch.isa_available()[0]}, 1 threads" in shown


def test_self_test_finds_wrong_results(monkeypatch, capsys, restored):
    monkeypatch.setattr(selftest, "results", broken(None))
    assert selftest.main()
    shown = capsys.readouterr().out
    assert shown.count("WRONG  float") == 3 and "WRONG  the same bits as on other machines" in shown


def error_of_import(package):
    """In an interpreter that finds NumPy, and no installed cbn (-S: an editable one would lend its modules)."""
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(np.__file__).parents[1])}
    command = [sys.executable, "-S", "-c", "import cbn"]
    done = subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.fixture
def package(tmp_path):
    """A copy of the package's Python files, without compiled modules, as it is installed."""
    shutil.copytree(PACKAGE, tmp_path / "cbn", ignore=shutil.ignore_patterns("*.so", "*.pyd", "*.pyx", "*.c", "__pycache__"))
    return tmp_path / "cbn"


def test_a_checkout_that_was_not_built(package):
    (package / "dispatch.pyx").touch()
    assert error_of_import(package) == (
        f"ImportError: cbn: {package} is a checkout that was not built; build it (pip install -e .), or start Python in another folder "
        "to use a cbn that is installed"
    )


def test_compiled_modules_are_missing(package):
    assert error_of_import(package) == (
        f"ImportError: cbn: {package} lacks its compiled modules; install it anew (pip install --force-reinstall --no-cache-dir cbn)"
    )


@pytest.mark.parametrize("name", ["dispatch.cpython-39-x86_64-linux-gnu.so", "dispatch.cp39-win_amd64.pyd"])
def test_built_for_another_python(package, name):
    (package / name).touch()
    found = f"{package} was built for another Python: it has {name}, where this one looks for dispatch{EXTENSION_SUFFIXES[0]}"
    assert found in error_of_import(package)


def test_a_broken_module(package):
    (package / ("dispatch" + EXTENSION_SUFFIXES[0])).write_bytes(b"nothing of use")
    error = error_of_import(package)
    assert error.startswith(f"ImportError: cbn: {package} has a compiled module that can't be loaded (")
    assert error.endswith("; install it anew (pip install --force-reinstall --no-cache-dir cbn)")


def test_wrong_variables_are_named_as_before():
    done = python("", CBN_ISA="sse9")
    assert done.stderr.splitlines()[-1].startswith("ImportError: environment variable CBN_ISA: CPU level: expected one of")
