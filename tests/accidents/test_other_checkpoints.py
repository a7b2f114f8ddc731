"""What a run makes of checkpoints of something else: a sentence, and the files stay as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import as_flags
from left_behind import content

from newllm.errors import UserError
from newllm.saving.files import load_sealed, save_sealed
from train import main

ROOT = Path(__file__).parents[2]


def test_a_checkpoint_with_tensors_of_another_shape_is_refused(after_phase_1):
    """The settings agree and the weights do not, as with a file from another version: the sentence names the tensor."""
    latest = Path(after_phase_1.checkpoint_dir) / "model_latest.pt"
    state = load_sealed(latest)
    name, tensor = next((n, t) for n, t in state["model_state_dict"].items() if t.dim() == 2)
    state["model_state_dict"][name] = torch.cat([tensor, tensor])
    for path in Path(after_phase_1.checkpoint_dir).glob("model_*.pt"):
        path.unlink()
    save_sealed(state, latest)
    before = latest.read_bytes()
    with pytest.raises(UserError, match=name) as caught:
        main(after_phase_1)
    assert "\n" not in str(caught.value) and latest.read_bytes() == before


def test_a_refused_checkpoint_is_one_line_and_exit_status_2(tiny_settings, after_phase_1):
    """As a command: one of a version that counted the place inside an epoch in batches, and the files are as they were."""
    latest = Path(after_phase_1.checkpoint_dir) / "model_latest.pt"
    save_sealed(load_sealed(latest) | {"format": 3}, latest)
    before = content(after_phase_1)
    settings = tiny_settings | {"phase2_epochs": 1, "save_every_n_batches": 10**6}
    done = subprocess.run(
        [sys.executable, "train.py", *as_flags(settings)], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "has format 3, this version continues 4" in line
    assert content(after_phase_1) == before
