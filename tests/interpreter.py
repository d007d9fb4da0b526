"""A new interpreter that imports the cbn under test, whatever folder the tests run in."""

import os
import pathlib
import subprocess
import sys

import cbn

FOLDER = pathlib.Path(cbn.__file__).parents[1]  # modules are looked for in the working directory first: a checkout that was not built, perhaps


def python(code, timeout=120, **environment):
    """Run code with these environment variables and none of the caller's that matter here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CBN_", "OMP_NUM"))}
    command = [sys.executable, "-c", "import os, numpy as np, cbn\n" + code]
    return subprocess.run(command, cwd=FOLDER, env=kept | environment, capture_output=True, text=True, timeout=timeout, check=False)


def output(code, **environment):
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
