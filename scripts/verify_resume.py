"""Proof of exact resume: a small run is killed again and again and must end as if nothing had happened.

    python3 -m scripts.verify_resume --kills 20

Each child is killed with SIGKILL at a random moment, during saving or anywhere else, and started again by the same
command. At the end weights, metrics and histories are compared bit for bit with those of a run nobody touched. The exit
status is 0 when they are equal.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from newllm.errors import UserError, exit_on_user_error
from newllm.storage import load_sealed

ROOT = Path(__file__).parent.parent
SETTINGS = dict(
    data_source="chitchat", tokenizer="bpe", vocab_size=400, num_samples=16, val_samples=8, max_seq_length=32,
    context_dim=32, embed_dim=32, num_layers=2, phase1_max_iterations=80, phase1_min_converged_ratio=1.0,
    dist_reg_weight=1.0, phase2_epochs=40, patience=40, min_batches=4, precision="fp32", device="cpu",
    save_every_n_batches=3,
)  # fmt: skip


def start(folder):
    """Begin or continue the run in a folder, as a user would; its output goes to a file there."""
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    flags += [f"--checkpoint_dir={folder / 'checkpoints'}", f"--cache_dir={folder / 'cache'}"]
    with open(folder / "output.txt", "a") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "train.py", *flags], cwd=ROOT, env=environment, stdout=output, stderr=output
        )


def finish(process, folder):
    """Wait for a run that nobody kills.

    Raises:
        UserError: it failed by itself.
    """
    if process.wait() != 0:
        raise UserError(
            f"the run failed by itself with status {process.returncode}; its output is {folder / 'output.txt'}."
        )


def kill_somewhere(folder, source, longest):
    """Start the run, let it go on for a random while after it has begun to train, and kill it.

    Returns:
        Whether it was killed; False when it was complete before its time came.
    """
    before = (folder / "output.txt").read_text().count("\n== ") if (folder / "output.txt").exists() else 0
    process = start(folder)
    while process.poll() is None and (folder / "output.txt").read_text().count("\n== ") == before:
        time.sleep(0.01)
    time.sleep(source.uniform(0, longest))
    process.kill()
    process.wait()
    if process.returncode == 0:
        return False
    if process.returncode != -signal.SIGKILL:
        finish(process, folder)
    return True


def difference(one, other):
    """First thing in which two checkpoints differ, or None."""
    for name, tensor in one["model_state_dict"].items():
        if not torch.equal(tensor, other["model_state_dict"][name]):
            return f"weights {name}"
    timed = ("seconds", "tok_per_s", "tok_per_s_phase1")
    for key in ("phase1_history", "phase2_history", "results"):
        if _without(one[key], timed) != _without(other[key], timed):
            return key
    return None


def _without(value, names):
    if isinstance(value, dict):
        return {name: _without(part, names) for name, part in value.items() if name not in names}
    return value


def main(arguments=None):
    """Kill, continue, compare. Returns whether the two runs ended equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how often to kill the run (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        alone, killed = Path(scratch) / "alone", Path(scratch) / "killed"
        alone.mkdir()
        killed.mkdir()
        started = time.monotonic()
        finish(start(alone), alone)
        seconds = time.monotonic() - started
        source, kills, runs = random.Random(options.seed), 0, 1
        while kills < options.kills:
            if kill_somewhere(killed, source, longest=max(0.2, 2 * seconds / options.kills)):
                kills += 1
            elif kills < options.kills:  # complete already: the next kills are for another run of the same settings
                runs += 1
                killed = Path(scratch) / f"killed_{runs}"
                killed.mkdir()
            print(f"killed {kills}/{options.kills}", flush=True)
        finish(start(killed), killed)
        states = [load_sealed(folder / "checkpoints" / "model_latest.pt") for folder in (alone, killed)]
    found = difference(*states)
    print(
        f"{kills} kills by SIGKILL, then to the end: " + ("equal bit for bit" if not found else f"DIFFERENT: {found}")
    )
    return not found


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(0 if main() else 1)
