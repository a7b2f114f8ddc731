"""The bits of small runs: `python3 -m tests.bits [CHECKOUT]` prints a line a run, to compare versions.

Weights and curves are a function of settings, data, seed, machine, torch and number of threads, so lines of
one machine compare. The last run of each precision is stopped again and again until it is complete; nothing
is looked up, as that changes no weight and is made in one go.
"""

import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

TINY = shlex.split("""
--data_source chitchat --tokenizer bpe --vocab_size 512 --num_samples 40 --val_samples 12 --max_seq_length 32
--context_dim 48 --embed_dim 48 --num_layers 2 --phase1_max_iterations 4 --phase2_epochs 3 --no-artifacts
--save_every_n_batches 5 --save_min_seconds 0 --weight_decay 0.1 --label_smoothing 0 --retrieval none
""")
ARMS = {
    "frozen": ["--freeze_context"],
    "fine-tuned": ["--gradient_sweeps", "0", "--no-untrained_control"],
    "sweeps": ["--no-untrained_control"],
    "gru": ["--model_type", "gru"],
}
STOPPED = 75  # exit status of a run that is to be continued
MOST_SESSIONS = 60


def digest(checkpoint):
    """16 hex digits of the SHA-256 over a state's weights, in the order of their names, and its curves."""
    state = torch.load(checkpoint, weights_only=True)
    total = hashlib.sha256()
    for name, tensor in sorted(state["model_state_dict"].items()):
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for history in ("phase1_history", "phase2_history"):
        for name, values in sorted(state[history].items()):
            if "second" not in name and "tok_per_s" not in name:
                total.update(f"{name} {values}".encode())
    return total.hexdigest()[:16]


def run(checkout, folder, flags, stop=False):
    """Train to the end in a checkpoint folder; with `stop`, in as many short sessions as it takes."""
    places = ["--checkpoint_dir", f"{folder}/checkpoints", "--cache_dir", f"{folder}/../cache"]
    limit = ["--max_minutes", "0.03"] if stop else []
    command = [sys.executable, "train.py", *TINY, *flags, *places, *limit]
    options = dict(cwd=checkout, env=os.environ | {"OMP_NUM_THREADS": "1"}, encoding="utf-8")
    for session in range(1, MOST_SESSIONS):
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if done.returncode == 0:
            return digest(Path(folder) / "checkpoints" / "model_latest.pt"), session
        if not stop or done.returncode != STOPPED:
            break
    raise SystemExit(f"not complete after {session} sessions:\n{done.stdout}\n{done.stderr}")


def main(checkout):
    with tempfile.TemporaryDirectory() as base:
        for precision in ("fp32", "bf16"):
            for arm, flags in ARMS.items():
                for seed in range(3):
                    flags_of_run = [*flags, "--seed", str(seed), "--precision", precision]
                    bits, _ = run(checkout, f"{base}/{precision}_{arm}_{seed}", flags_of_run)
                    print(f"{precision} {arm} {seed}: {bits}", flush=True)
            flags_of_run = [*ARMS["sweeps"], "--seed", "0", "--precision", precision]
            bits, sessions = run(checkout, f"{base}/{precision}_stopped", flags_of_run, stop=True)
            print(f"{precision} sweeps 0, stopped: {bits} ({sessions} sessions)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")
