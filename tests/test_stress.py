"""A short form of stress/stress.py, which finds what goes wrong rarely."""

import os
import pathlib
import subprocess
import sys

import pytest
from test_threads import openmp

FOLDER = pathlib.Path(__file__).parent


@openmp
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stress():
    import cbn

    command = [sys.executable, FOLDER / "stress" / "stress.py", "--forks=200", "--nested=10", "--calls=20000", "--threads=200"]
    path = str(pathlib.Path(cbn.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stdout.count(": right;") == 4, done.stdout + done.stderr
