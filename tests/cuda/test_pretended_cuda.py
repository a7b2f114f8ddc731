"""The whole project on a CUDA device that is pretended: the tests of cases*.py, in one process of their own.

`python3 -m pytest tests/cuda -s` prints launches and waits of a step; pretended.py says what it cannot show.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="pretending a CUDA device needs the compiler g++")
@pytest.mark.skipif(
    bool(torch.version.cuda or torch.version.hip),
    reason="this torch is built for GPUs and can pretend none beside them: python3 -m pytest -m gpu",
)
def test_every_case_passes_on_a_pretended_device():
    """A process of its own, as torch asks once what devices there are."""
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = ["-p", "pretended", "-p", "no:cacheprovider", "-o", "addopts=-q", "--durations=5"]
    command = [sys.executable, "-m", "pytest", *sorted(HERE.glob("cases*.py")), *options]
    ended = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True)
    print(*(line for line in ended.stdout.splitlines() if "launches" in line), sep="\n")
    assert ended.returncode == 0, ended.stdout + ended.stderr
