"""`test.py --ladder` as a sweep: killed, stopped, with other settings, without stdin; only what is missing is made."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import test as scale_check
import train
from config import ResidualConfig
from newllm.errors import UserError
from newllm.interrupt import EXIT_STATUS, Stopped
from newllm.reporting.sweep import STATE_NAME

ROOT = Path(__file__).parent.parent
BUDGETS = (6, 8, 10)

LADDER = """
import json, os, signal, sys
import test
from config import ResidualConfig
from newllm.errors import exit_on_user_error
from newllm.reporting.sweep import Sweep

settings, kill_after = json.loads(sys.argv[1]), int(sys.argv[2])
change = Sweep._change

def killing(self, run, **fields):
    change(self, run, **fields)
    if sum(run["status"] == "done" for run in self.runs) == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)

Sweep._change = killing
test.LADDER = tuple(settings.pop("ladder"))
with exit_on_user_error():
    sys.exit(0 if test.main(ResidualConfig(**settings), ladder=True) else 1)
"""


def start(settings, kill_after=-1):
    """The ladder at small budgets with its stdin closed; it kills itself when so many budgets are done."""
    settings = settings | {"ladder": BUDGETS}
    command = [sys.executable, "-c", LADDER, json.dumps(settings), str(kill_after)]
    return subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def runs(settings):
    return json.loads((Path(settings["checkpoint_dir"]) / STATE_NAME).read_text())["runs"]


def wait_for_a_checkpoint(process, run_folder):
    deadline = time.monotonic() + 60
    while not (run_folder / "model_latest.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_between_and_inside_runs_only_what_is_missing_is_made(tiny_settings):
    """SIGKILL after the first budget, then within the second: that one goes on to the bits it would have ended with."""
    folder = Path(tiny_settings["checkpoint_dir"])
    process = start(tiny_settings, kill_after=1)
    assert process.communicate()[0].count("Sweep: ") == 0 and process.returncode == -signal.SIGKILL
    first = runs(tiny_settings)
    assert [run["status"] for run in first] == ["done", "pending", "pending"]

    process = start(tiny_settings)
    wait_for_a_checkpoint(process, folder / "samples_8")
    process.kill()
    process.communicate()
    second = runs(tiny_settings)
    assert [run["status"] for run in second] == ["done", "running", "pending"] and second[0] == first[0]

    process = start(tiny_settings)
    out, errors = process.communicate()
    assert process.returncode in (0, 1), errors
    third = runs(tiny_settings)
    assert [run["status"] for run in third] == ["done"] * 3 and third[0] == first[0]
    assert out.count("continuing run ") == 1 and out.count("\n---\n") == 2
    assert "Sweep: 3 runs, 2 done, 0 failed, 1 remaining | Elapsed: " in out
    for run in third:
        (record,) = Path(run["folder"]).glob("*/logs/metrics_*.jsonl")  # a run made twice would have two
        assert not list(Path(run["folder"]).glob("model_*.pt")), record
    alone = ResidualConfig(**tiny_settings | {"num_samples": 8, "checkpoint_dir": str(folder / "alone")})
    assert train.main(alone)["val_loss"] == third[1]["metrics"]["val_loss"]

    out, _ = (process := start(tiny_settings)).communicate()
    assert process.returncode in (0, 1) and "\n---\n" not in out and out.count("criterion") == 3
    assert runs(tiny_settings) == third


def test_stopped_by_a_signal_the_ladder_saves_and_says_how_to_go_on(tiny_settings):
    """SIGTERM to the command alone: exit status EXIT_STATUS, the budget in hand is saved and its folder free."""
    process = start(tiny_settings)
    run_folder = Path(tiny_settings["checkpoint_dir"]) / "samples_6"
    wait_for_a_checkpoint(process, run_folder)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_STATUS, errors
    assert errors.startswith("stopped: SIGTERM received; run the same command again")
    assert (run_folder / "model_latest.pt").exists() and not (run_folder / "run.lock").exists()
    assert [run["status"] for run in runs(tiny_settings)] == ["pending"] * 3


@pytest.fixture
def begun(tiny_settings, monkeypatch):
    """Configuration of a ladder that was stopped in its first run; `calls` gets those of later ones."""
    calls = []

    def stopped(function, config):
        calls.append(config)
        raise Stopped("SIGTERM received")

    monkeypatch.setattr(scale_check, "call_apart", stopped)
    config = ResidualConfig(**tiny_settings)
    with pytest.raises(Stopped):
        scale_check.main(config, ladder=True)
    calls.clear()
    return config, calls


def test_other_settings_are_refused_with_the_difference(begun):
    """What shapes the figures must agree; the state stays as it is."""
    config, calls = begun
    state = Path(config.checkpoint_dir) / STATE_NAME
    before = state.read_bytes()
    with pytest.raises(UserError, match=r"phase1_learning_rate 0\.002 -> 0\.001.*--checkpoint_dir"):
        scale_check.main(dataclasses.replace(config, phase1_learning_rate=0.001), ladder=True)
    assert state.read_bytes() == before and not calls


@pytest.mark.parametrize("change", [dict(num_samples=7), dict(max_minutes=5.0), dict(save_every_n_batches=9)], ids=str)
def test_settings_that_shape_no_figure_may_change(begun, change):
    """The ladder has its own budgets, and when to save or to stop is no part of the experiment."""
    config, calls = begun
    with pytest.raises(Stopped):
        scale_check.main(dataclasses.replace(config, **change), ladder=True)
    assert calls[0].num_samples == 50 and calls[0].load_checkpoint


def test_a_ladder_in_use_is_refused(begun, tiny_settings):
    """Two at once would make the same runs."""
    config, calls = begun
    process = start(tiny_settings | {"checkpoint_dir": config.checkpoint_dir, "load_checkpoint": False})
    wait_for_a_checkpoint(process, Path(config.checkpoint_dir) / "samples_6")
    with pytest.raises(UserError, match=str(process.pid)):
        scale_check.main(config, ladder=True)
    process.terminate()
    process.communicate(timeout=60)
    assert not calls


def test_the_ladder_starts_afresh_when_asked_to(begun):
    """`--no-load_checkpoint` takes neither the state nor a run's checkpoint."""
    config, calls = begun
    with pytest.raises(Stopped):
        scale_check.main(dataclasses.replace(config, dropout=0.2, load_checkpoint=False), ladder=True)
    assert not calls[0].load_checkpoint
