"""How a run computes: a failing compiler changes no bit, half precision no curve, and both may change."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import stop_after
from torch._dynamo.exc import BackendCompilerFailed

from config import ResidualConfig
from newllm.saving.files import load_sealed
from newllm.training.step import OptimizerStep
from train import main


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise BackendCompilerFailed(lambda: None, RuntimeError("backend failed on the way back"), None)


@pytest.mark.parametrize("when", ["forward", "backward", "second shape"])
def test_a_failing_compiler_changes_no_bit(tiny_settings, monkeypatch, capsys, when):
    """The run goes on uncompiled from the same state to the same weights, with a line; no name tells."""
    shapes = set()

    def compiled_by(function, **options):
        def compiled(context, token, stream=True):
            shapes.add(context.shape)
            if when == "forward" or (when == "second shape" and len(shapes) > 1):
                raise RuntimeError("backend failed")
            context, token = function(context, token, stream)
            return (_FailsBackward.apply(context), token) if when == "backward" else (context, token)

        return compiled

    settings = tiny_settings | dict(num_samples=13, untrained_control=False)  # batches of two sizes
    expected = main(ResidualConfig(**settings))
    monkeypatch.setattr(torch, "compile", compiled_by)
    settings["checkpoint_dir"] += "_compiled"
    found = main(ResidualConfig(**settings, compile=True))
    lines = [line for line in capsys.readouterr().out.splitlines() if "torch.compile failed at" in line]
    assert lines and all("(RuntimeError: backend failed" in line for line in lines)
    assert "going on without it" in lines[0] and "damaged files" in lines[0]
    assert found["val_loss"] == expected["val_loss"]
    assert found["phase1_param_change"] == expected["phase1_param_change"]
    names = load_sealed(Path(settings["checkpoint_dir"]) / "model_latest.pt")["model_state_dict"]
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.slow
def test_precision_and_compilation_may_change_between_sessions(tiny_settings, capsys):
    """fp32, bf16, compiled: each session takes over where the one before stopped, within a phase."""
    config = ResidualConfig(**tiny_settings | dict(untrained_control=False))
    plain = main(dataclasses.replace(config, checkpoint_dir=config.checkpoint_dir + "_plain"))
    half, compiled, stages = dict(precision="bf16"), dict(compile=True), []
    for changes, batches in ((half, 5), (compiled, 8), (half, 2)):
        stop_after(dataclasses.replace(config, **changes), batches)
        stages.append(load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["stage"])
    assert set(stages) == {"phase1", "phase2"}
    mixed = main(dataclasses.replace(config, compile=True))
    assert "warning: torch.compile failed" not in capsys.readouterr().out
    assert mixed["compiled_graphs"] >= 1 and mixed["compile_seconds"] > 0
    assert mixed["phase1_steps"] == plain["phase1_steps"] and mixed["phase2_steps"] == plain["phase2_steps"]
    assert mixed["val_loss"] == pytest.approx(plain["val_loss"], rel=0.02)


STEP = """
import torch
from config import ResidualConfig
from newllm.training.loop import State
from newllm.training.runtime import open_runtime
from newllm.training.step import OptimizerStep, make_optimizer
from newllm.training.step_function import StepFunction

weight, runtime = torch.nn.Parameter(torch.ones(4)), open_runtime(ResidualConfig(device="cpu", compile=True))
step = StepFunction(lambda values: (values * weight).relu(), True)
optimizer = make_optimizer([([weight], 1.0)], 0.0, 0.0)

def gradients(parts):
    loss = step(torch.ones(3, 4)).sum()
    loss.backward()
    return (loss.item(),)

state = State()
(loss,) = OptimizerStep(runtime, optimizer, step, 1.0, print)(gradients, 3, state, 0, "here")
print(loss, state.grad_norm)
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_damaged_files_in_the_compilers_cache_cost_a_line_at_most(tmp_path):
    """Code, wrappers and graphs cut to nothing: the same figures, and no traceback."""

    def run():
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", STEP]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert "Traceback" not in found.stderr
        return found.stdout.splitlines()

    assert run() == ["12.0 6.0"]
    patterns = "*.main.so", "*.py", "fxgraph/**/*"
    damaged = [path for pattern in patterns for path in tmp_path.rglob(pattern) if path.is_file()]
    assert damaged
    for path in damaged:
        path.write_bytes(b"")
    *lines, last = run()
    assert last == "12.0 6.0" and len(lines) <= 1
    assert all(line.startswith("warning: torch.compile failed at here") for line in lines)
    assert all(f"delete {tmp_path}" in line for line in lines)


STEPS = 100
# Twice what was seen. Of the largest too: where Phase 1 ends, rounding no longer shrinks with the loss.
TOLERANCE, TOLERANCE_OF_LARGEST = 0.05, 0.02
SETTINGS = dict(
    phase1_max_iterations=20, phase1_min_converged_ratio=1.0, phase1_convergence_threshold=1e-9,
    phase2_epochs=20, patience=20, min_batches=5, num_samples=15, context_dim=32, embed_dim=32, num_layers=2,
    dropout=0.0, label_smoothing=0.0, untrained_control=False, save_checkpoint=False,
)  # fmt: skip


def test_the_loss_curve_of_bf16_is_that_of_fp32(tiny_settings, monkeypatch):
    """At each of 100 steps of either phase; and the curves fall, so that there is something to follow."""
    config, taken, take = ResidualConfig(**tiny_settings | SETTINGS), [], OptimizerStep.__call__

    def noted(self, *arguments):
        found = take(self, *arguments)
        taken.append(float(found[0]))
        return found

    monkeypatch.setattr(OptimizerStep, "__call__", noted)
    for precision in ("fp32", "bf16"):
        folder = config.checkpoint_dir + precision
        main(dataclasses.replace(config, precision=precision, checkpoint_dir=folder))
    fp32, bf16 = torch.tensor(taken).view(2, 2, STEPS)
    largest = fp32.amax(1, keepdim=True)
    assert ((bf16 - fp32).abs() <= TOLERANCE * fp32 + TOLERANCE_OF_LARGEST * largest).all()
    assert not torch.equal(bf16, fp32)
    assert (fp32[:, -1] < 0.7 * largest[:, 0]).all()
