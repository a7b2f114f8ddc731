"""The whole project on a CUDA device that is pretended: the tests of cases.py, in one process of their own.

`python3 -m pytest tests/cuda -s` prints launches and waits of a step; pretended.py says what it cannot show.
"""

import ast
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = [
    node for node in ast.parse((HERE / "cases.py").read_text()).body if isinstance(node, ast.FunctionDef)
]
NAMES = [node.name for node in CASES if node.name.startswith("test_")]


def unable():
    """Why no device can be pretended here; "" where it can."""
    if not shutil.which("g++"):
        return "pretending a CUDA device needs the compiler g++, which is not here"
    if torch.version.cuda or torch.version.hip:
        return "this torch is built for GPUs and can pretend none beside them: python3 -m pytest -m gpu"
    return ""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{name of a case: its reports}, and what the process printed."""
    if reason := unable():
        pytest.skip(reason)
    record = tmp_path_factory.mktemp("pretended") / "cases.xml"
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", HERE / "cases.py", "-p", "pretended", "-p", "no:cacheprovider"]
    command += [f"--junitxml={record}", "--durations=5", "-o", "addopts=-q"]
    ended = subprocess.run(command, cwd=HERE.parent.parent, env=environment, capture_output=True, text=True)
    assert record.exists(), ended.stdout + ended.stderr
    found = {}
    for case in ElementTree.parse(record).iter("testcase"):
        found.setdefault(case.get("name").partition("[")[0], []).append(case)
        for line in case.iter("property"):
            print(line.get("value"))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_on_a_pretended_device(reports, name):
    """Each case passes there, with all its parameters."""
    assert reports.get(name), f"{name} did not run"
    failures = [
        f"{case.get('name')}: {sign.get('message')}\n{sign.text}"
        for case in reports[name]
        for sign in case
        if sign.tag in ("failure", "error")
    ]
    assert not failures, "\n\n".join(failures)
    if skipped := [sign.get("message") for case in reports[name] for sign in case.iter("skipped")]:
        pytest.skip(skipped[0])
