"""The stubs say what is there (mypy.stubtest), and type checkers find in users' code the types, and the mistakes, that they should."""

import inspect
import json
import pathlib
import runpy
import subprocess
import sys

import pytest

import cbn

FOLDER = pathlib.Path(__file__).parent / "typing"
PACKAGE = pathlib.Path(cbn.__file__).parent


def check(command):
    """What a checker prints of a file in a folder in which no source of cbn lies."""
    return subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)


def marked():
    """The numbers of lines with a mistake."""
    lines = (FOLDER / "mistakes.py").read_text().splitlines()
    return {number for number, line in enumerate(lines, 1) if line.endswith("# error")}


def test_stubs_agree_with_the_package():
    pytest.importorskip("mypy", reason="needs mypy")
    modules = [f"cbn.{path.stem}" for path in sorted(PACKAGE.glob("*.pyi"))]
    done = check([sys.executable, "-m", "mypy.stubtest", "--allowlist", FOLDER / "stubtest.txt", "--ignore-unused-allowlist", *modules])
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy(tmp_path):
    pytest.importorskip("mypy", reason="needs mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path]
    done = check([*command, FOLDER / "user_code.py"])
    assert done.returncode == 0, done.stdout
    done = check([*command, FOLDER / "mistakes.py"])
    assert {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line} == marked(), done.stdout


def test_pyright():
    pytest.importorskip("pyright", reason="needs pyright")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    for name, expected in (("user_code.py", set()), ("mistakes.py", marked())):
        found = json.loads(check([*command, FOLDER / name]).stdout)["generalDiagnostics"]
        assert {d["range"]["start"]["line"] + 1 for d in found if d["severity"] == "error"} == expected, found


def test_user_code_runs():
    pytest.importorskip("typing_extensions", reason="needs typing_extensions")
    runpy.run_path(str(FOLDER / "user_code.py"))


FUNCTIONS = [getattr(cbn, name) for name in cbn.__all__ if inspect.isroutine(getattr(cbn, name))]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_help(function):
    """help(), inspect.signature and editors show names and defaults of compiled functions, too."""
    parameters = inspect.signature(function).parameters
    assert function.__module__.startswith("cbn.") and function.__qualname__ == function.__name__
    assert inspect.getdoc(function), "a docstring"
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "axis" in parameters:
        assert parameters["axis"].default in (1, -1) and parameters["axis"].kind is inspect.Parameter.KEYWORD_ONLY
