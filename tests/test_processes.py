"""Two processes on the CPU train what one would, stop together, and do not outlive each other."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import as_flags
from torch.distributed import distributed_c10d

import train
from config import ResidualConfig
from newllm.errors import exit_on_user_error
from newllm.phases.retrieval import retrieval_of
from newllm.report.record import format_value
from newllm.saving.files import load_sealed
from train import Run, main

ROOT = Path(__file__).parent.parent
SAME = dict(dropout=0.0, phase1_convergence_threshold=1e-6)  # dropout masks depend on who computes a row
LONG = dict(phase1_max_iterations=2000, phase1_convergence_threshold=1e-12)


def child(settings, rank, port, path):
    """A forked process, of two that train together, so that torch is imported once; output is appended."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        ours = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        os.environ |= ours | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        sys.stdout = sys.stderr = open(path, "a", buffering=1)  # noqa: SIM115
        AcceleratorState._reset_state(reset_partial_state=True)  # of runs before the fork
        with exit_on_user_error():
            main(ResidualConfig(**settings))
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        os._exit(status)


def two(settings, path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    return [child(settings, rank, port, path) for rank in "01"]


def ended(processes):
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def latest(settings):
    return load_sealed(Path(settings["checkpoint_dir"]) / "model_latest.pt")


def agrees(output, expected):
    """The closing block, printed once, holds a run's figures, to float tolerance."""
    assert output.count("\n---\n") == 1
    found = dict(line.split(": ", 1) for line in output.split("\n---\n")[1].splitlines())
    assert found["sample_order"] == expected["sample_order"]
    for name in ("phase1_steps", "phase1_iterations", "phase2_steps", "phase2_best_epoch"):
        assert int(found[name]) == expected[name]
    for name in ("val_loss", "val_bpb", "er_train", "val_ppl_untrained_context", "phase1_param_change"):
        # Not closer, because Adam makes much of gradients that are nearly zero.
        assert float(found[name]) == pytest.approx(expected[name], rel=5e-3), name


def test_two_processes_train_what_one_does(tiny_settings, tmp_path):
    """Fine-tuned, contexts of Phase 1 in files: losses, figures, order and steps; one of the two writes."""
    settings = tiny_settings | SAME | dict(freeze_context=False, context_memory_mb=0)
    expected = main(ResidualConfig(**settings))
    one, alone = latest(settings), settings["checkpoint_dir"]
    settings["checkpoint_dir"] += "_two"
    assert ended(two(settings, tmp_path / "output")) == [0, 0]
    agrees((tmp_path / "output").read_text(), expected)
    found = latest(settings)
    for history in ("phase1_history", "phase2_history"):
        assert one[history].keys() == found[history].keys()
        for name in {"cvfp", "dist_reg", "grad_norm", "train_loss", "val_loss"} & one[history].keys():
            assert found[history][name] == pytest.approx(one[history][name], rel=1e-3), name
    for folder in (alone, settings["checkpoint_dir"]):
        assert not list(Path(folder).glob("contexts_*.bin"))


def test_a_signal_stops_both_with_one_state_and_another_number_goes_on(tiny_settings, tmp_path):
    """Stopped in Phase 1 as two, continued as one, Phase 2 on frozen contexts again as two, as one has it."""
    settings = tiny_settings | SAME | LONG
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py"]
    own = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True, text=True)
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([*launcher, *as_flags(settings)], **own, **piped)
    while not (line := process.stdout.readline()).startswith("phase 1 | iteration  2"):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert errors.count("stopped: SIGTERM received") == 2, errors
    state = latest(settings)
    done = state["stage_state"]["iteration"]
    assert done >= 2 and state["stage_state"]["contexts"].norm(dim=(1, 2)).min() > 0

    settings["phase1_max_iterations"] = done + 2  # a changed schedule is a warning
    assert main(ResidualConfig(**settings, phase="1"))["phase1_iterations"] == done + 2
    alone = settings | dict(checkpoint_dir=settings["checkpoint_dir"] + "_alone")
    shutil.copytree(settings["checkpoint_dir"], alone["checkpoint_dir"])
    assert ended(two(settings, tmp_path / "output")) == [0, 0]
    agrees((tmp_path / "output").read_text(), main(ResidualConfig(**alone)))


def test_a_killed_process_ends_the_other_with_a_sentence(tiny_settings, tmp_path):
    """No hang, a status that is not zero, and the state is whole."""
    output, deadline = tmp_path / "output", time.monotonic() + 60
    output.touch()
    processes = two(tiny_settings | SAME | LONG, output)
    while "phase 1 | iteration  2" not in output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(processes[1], signal.SIGKILL)
    assert ended(processes) == [2, -signal.SIGKILL] and time.monotonic() < deadline + 60
    assert "error: another process of this run has ended" in output.read_text()
    assert latest(tiny_settings)["stage"] == "phase1"


LOOKS_UP = dict(retrieval="ngram,cache,knn", num_samples=6, val_samples=4, max_seq_length=16)


def cut_before_the_stage(settings):
    """A run of one process, killed when all but retrieval is done."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(run):
            raise KeyboardInterrupt

        patch.setattr(Run, "complete_untrained_row", killed)
        main(ResidualConfig(**settings))


def elsewhere(settings, name):
    folder = f"{settings['checkpoint_dir']}_{name}"
    shutil.copytree(settings["checkpoint_dir"], folder)
    return settings | dict(checkpoint_dir=folder)


def looked_up(settings):
    content = load_sealed(Path(settings["checkpoint_dir"]) / "model_retrieval.pt")
    return {name: value for name, value in content.items() if name != "run_id"}


def interrupted(*arguments):
    signal.raise_signal(signal.SIGTERM)
    return retrieval_of(*arguments)


def slowly(*arguments):
    time.sleep(9)
    return retrieval_of(*arguments)


def test_one_of_two_looks_up_for_both_stops_both_and_gives_the_bits_of_one(tiny_settings, tmp_path):
    """Told to stop in its middle both end with exit 75; then the other waits, past the usual time-out."""
    settings = tiny_settings | SAME | LOOKS_UP
    cut_before_the_stage(settings)
    alone, output = elsewhere(settings, "alone"), tmp_path / "output"
    expected = main(ResidualConfig(**alone))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "retrieval_of", interrupted)
        assert ended(two(settings, output)) == [75, 75]
    assert output.read_text().count("stopped: SIGTERM received") == 2
    assert not (Path(settings["checkpoint_dir"]) / "model_retrieval.pt").exists()
    output.write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed_c10d, "default_pg_timeout", timedelta(seconds=6))
        patch.setattr(train, "retrieval_of", slowly)
        assert ended(two(settings, output)) == [0, 0]
    found = dict(line.split(": ", 1) for line in output.read_text().split("\n---\n")[1].splitlines())
    for name in ("val_ppl_retrieval", "val_ppl_retrieval_counting", "val_ppl_retrieval_untrained"):
        assert found[name] == format_value(expected[name])
    one, other = looked_up(settings), looked_up(alone)
    assert one["model"] == other["model"] and one["description"] == other["description"]
    assert all(torch.equal(one["state"][name], tensor) for name, tensor in other["state"].items())
