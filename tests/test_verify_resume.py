"""The command that proves exact resume: it proves, and it can fail."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from newllm.errors import UserError
from newllm.saving.files import save_sealed
from scripts import verify_resume

ROOT = Path(__file__).parent.parent
COMMAND = """
import sys
from newllm.errors import exit_on_user_error
from scripts import verify_resume
{fault}
with exit_on_user_error():
    sys.exit(0 if verify_resume.main() else 1)
"""  # a process of its own, as forks want; what `fault` patches, its children inherit
FAULTS = {
    "a restart without the optimizer's state": (
        "import torch\ntorch.optim.Optimizer.load_state_dict = lambda self, state: None",
        r"model_latest\.pt\.\S+ differs",
    ),
    "a restart that begins afresh": (
        "verify_resume.SETTINGS['load_checkpoint'] = False",
        "it did not go on from its save",
    ),
}


def prove(scratch, *arguments, fault=""):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}
    command = [sys.executable, "-c", COMMAND.format(fault=fault), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_killed_runs_end_equal(tmp_path):
    """At random moments and at every 61st operation on files: each killed run comes back, and nothing is left over."""
    done = prove(tmp_path, "--kills", "6", "--operations", "61")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills at random moments: 6/6 died by SIGKILL and resumed; " in done.stdout
    operations, good = re.search(
        r"(\d+) operations: (\d+)/\1 died by SIGKILL, resumed and ended", done.stdout
    ).groups()
    assert operations == good and int(good) > 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_comes_back_otherwise_is_found(tmp_path, fault):
    """Exit status 1, the first difference by name, and its folder kept."""
    patch, expected = FAULTS[fault]
    done = prove(tmp_path, "--kills", "0", "--operations", "100", fault=patch)
    assert done.returncode == 1, done.stdout + done.stderr
    verdict = done.stdout.splitlines()[-1]
    assert re.match(f"DIFFERENT: {expected}", verdict)
    assert (Path(verdict.split("kept as ")[1]) / "output.txt").exists()


def test_a_difference_is_found_and_named():
    """The comparison sees one bit of a weight, a figure of a history and a metric, and passes over times."""
    state = {
        "weights": {"a": torch.zeros(2)},
        "history": {"cvfp": [1.0, float("nan")], "tok_per_s": [5.0]},
        "best": None,
    }
    assert verify_resume.difference(state, copy.deepcopy(state), "file") is None
    other = copy.deepcopy(state)
    other["history"]["tok_per_s"] = [6.0]
    assert verify_resume.difference(state, other, "file") is None
    other["history"]["cvfp"][0] = 1.0 + 2**-52
    assert verify_resume.difference(state, other, "file") == "file.history.cvfp.0"
    other["weights"]["a"][1] = -0.0
    assert verify_resume.difference(state, other, "file") == "file.weights.a"
    assert verify_resume.difference(state, {"weights": {}}, "file") == "file"


@pytest.mark.parametrize("name", [".model_latest.pt.17.tmp", "model_latest.pt.corrupt"])
def test_what_a_kill_leaves_behind_is_found(tmp_path, name):
    """A temporary file, or one that was set aside as damaged, anywhere in the run's folder."""
    for folder in ("checkpoints", "cache"):
        (tmp_path / folder).mkdir()
    for file in verify_resume.FILES:
        save_sealed(dict.fromkeys(verify_resume.PROVEN), tmp_path / "checkpoints" / file)
    verify_resume.compare(tmp_path, tmp_path)
    (tmp_path / "cache" / name).touch()
    with pytest.raises(verify_resume.Broken, match=re.escape(name)):
        verify_resume.compare(tmp_path, tmp_path)


def test_a_save_that_is_gone_or_damaged_is_found(tmp_path):
    """Two complete saves noted by the killed child, and no checkpoint, or half of one."""
    (tmp_path / "output.txt").write_text(2 * verify_resume.SAVED)
    with pytest.raises(verify_resume.Broken, match="2 saves were complete, but the checkpoint is number 0"):
        verify_resume.restart(tmp_path, {})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / verify_resume.LATEST).write_bytes(b"half")
    with pytest.raises(verify_resume.Broken, match="too short"):
        verify_resume.restart(tmp_path, {})


def test_what_cannot_be_proved_is_said_in_a_sentence(monkeypatch):
    """Numbers without sense, and a system without fork."""
    with pytest.raises(UserError, match="--jobs 1 or more"):
        verify_resume.main(["--jobs", "0"])
    monkeypatch.delattr(os, "fork")
    with pytest.raises(UserError, match="no fork"):
        verify_resume.main([])
