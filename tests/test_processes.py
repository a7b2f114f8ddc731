"""Two processes on the CPU train what one would, stop together, and do not outlive each other."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import as_flags

from config import ResidualConfig
from newllm.saving.files import load_sealed
from newllm.saving.stop import EXIT_STATUS
from train import main

ROOT = Path(__file__).parent.parent
SAME = dict(dropout=0.0, phase1_convergence_threshold=1e-6)  # dropout masks depend on who computes a row
LONG = dict(phase1_max_iterations=2000, phase1_convergence_threshold=1e-12)


def launch(settings):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "train.py",
        *as_flags(settings),
    ]
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **piped)


def finished(process):
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def latest(settings):
    return load_sealed(Path(settings["checkpoint_dir"]) / "model_latest.pt")


def summary_of(output):
    return dict(line.split(": ", 1) for line in output.split("\n---\n")[1].splitlines())


@pytest.mark.parametrize(
    ("freeze", "megabytes"), [(True, 0), (False, 512)], ids=["frozen, in files", "fine-tuned"]
)
def test_two_processes_train_what_one_does(tiny_settings, freeze, megabytes):
    """Losses, figures, order and steps, to float tolerance; one of the two speaks and writes."""
    settings = tiny_settings | SAME | dict(freeze_context=freeze, context_memory_mb=megabytes)
    expected = main(ResidualConfig(**settings))
    one = latest(settings)
    settings["checkpoint_dir"] += "_two"
    status, output, errors = finished(launch(settings))
    assert status == 0, errors
    two, found = latest(settings), summary_of(output)
    assert output.count("\n---\n") == 1 and found["sample_order"] == expected["sample_order"]
    for name in ("phase1_steps", "phase2_steps", "phase2_best_epoch"):
        assert int(found[name]) == expected[name]
    for name in ("val_loss", "val_bpb", "er_train", "val_ppl_untrained_context", "phase1_param_change"):
        # Not closer, because Adam makes much of gradients that are nearly zero.
        assert float(found[name]) == pytest.approx(expected[name], rel=5e-3), name
    for history in ("phase1_history", "phase2_history"):
        assert one[history].keys() == two[history].keys()
        for name in {"cvfp", "dist_reg", "grad_norm", "train_loss", "val_loss"} & one[history].keys():
            assert two[history][name] == pytest.approx(one[history][name], rel=1e-3), name
    assert not list(Path(settings["checkpoint_dir"]).glob("contexts_*.bin"))


def stop_behind(process, line):
    """Read the launcher's output up to a line of the run's own that begins so."""
    for found in process.stdout:
        if found.startswith(line):
            return
    raise AssertionError(process.stderr.read())


def test_a_signal_stops_both_with_one_state_and_another_number_goes_on(tiny_settings):
    """Stopped in Phase 1 as two, continued as one, and again as two: every sample has its context."""
    settings = tiny_settings | SAME | LONG
    process = launch(settings)
    stop_behind(process, "phase 1 | iteration  2")
    process.send_signal(signal.SIGTERM)
    _, _, errors = finished(process)
    assert errors.count("stopped: SIGTERM received") == 2, errors
    state = latest(settings)
    assert state["stage"] == "phase1"
    done = state["stage_state"]["iteration"]
    assert done >= 2 and state["stage_state"]["contexts"].norm(dim=(1, 2)).min() > 0

    settings["phase1_max_iterations"] = done + 2  # a changed schedule is a warning
    summary = main(ResidualConfig(**settings, phase="1"))
    assert summary["phase1_iterations"] == done + 2
    status, output, errors = finished(launch(settings))
    assert status == 0, errors
    assert summary_of(output)["phase1_iterations"] == str(done + 2)


def test_a_killed_process_ends_the_other_with_a_sentence(tiny_settings):
    """No hang, a status that is not zero, and the state is whole."""
    settings = tiny_settings | SAME | LONG
    process = launch(settings)
    stop_behind(process, "phase 1 | iteration  2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    started = time.monotonic()
    status, _, errors = finished(process)
    assert status != 0 and time.monotonic() - started < 60
    assert re.search(r"error: another process of this run has ended|Signal 9 \(SIGKILL\)", errors), errors
    assert latest(settings)["stage"] == "phase1"


def test_the_exit_status_of_each_is_that_of_a_stop(tiny_settings):
    """max_minutes ends both in order; the launcher reports their status."""
    status, _, errors = finished(launch(tiny_settings | SAME | LONG | dict(max_minutes=0.02)))
    assert status != 0 and errors.count("stopped: max_minutes is over") == 2
    assert f"exitcode  : {EXIT_STATUS}" in errors
