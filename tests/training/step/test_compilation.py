"""A failing compiler changes no bit, and how a run computes may change between its sessions."""

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
from newllm.training import runtime as device
from train import main


@pytest.fixture(autouse=True)
def shared_cache(monkeypatch, tmp_path):
    """Folder of compiled code that belongs to the test; what a failure leads to ends with it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr(device, "_own_cache", [])
    yield tmp_path / "compiled"
    for cache in device._own_cache:
        cache.__exit__(None, None, None)


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("backend failed on the way back")


def failing_compiler(when):
    """A torch.compile whose result fails on the first call, on the way back, or on a second shape."""

    def compile(function, **options):
        shapes = set()

        def compiled(context, token, stream=True):
            shapes.add(context.shape)
            if when == "forward" or (when == "second shape" and len(shapes) > 1):
                raise RuntimeError("backend failed")
            context, token = function(context, token, stream)
            return (_FailsBackward.apply(context), token) if when == "backward" else (context, token)

        return compiled

    return compile


@pytest.mark.parametrize("when", ["forward", "backward", "second shape"])
def test_a_failing_compiler_changes_no_bit(tiny_settings, monkeypatch, capsys, when):
    """The run goes on uncompiled from the same state to the same weights; no name in the file tells."""
    settings = tiny_settings | dict(num_samples=13)  # batches of two sizes
    expected = main(ResidualConfig(**settings))
    monkeypatch.setattr(device.torch, "compile", failing_compiler(when))
    config = ResidualConfig(
        **settings | {"checkpoint_dir": settings["checkpoint_dir"] + "_compiled"}, compile=True
    )
    found = main(config)
    first, *others = (
        line for line in capsys.readouterr().out.splitlines() if "torch.compile failed at" in line
    )
    assert "once more in an empty cache" in first and all(
        line.endswith("going on without it") for line in others
    )
    assert others and all("(RuntimeError: backend failed" in line for line in (first, *others))
    assert (
        found["val_loss"] == expected["val_loss"]
        and found["phase1_param_change"] == expected["phase1_param_change"]
    )
    names = load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["model_state_dict"]
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.slow
def test_precision_and_compilation_may_change_between_sessions(tiny_settings, capsys):
    """fp32, bf16, compiled: each session takes over where the one before stopped, within a phase."""
    config = ResidualConfig(**tiny_settings | dict(phase1_max_iterations=6, phase2_epochs=6))
    plain = main(dataclasses.replace(config, checkpoint_dir=config.checkpoint_dir + "_plain"))
    half, fp32, compiled = dict(precision="bf16"), dict(precision="fp32"), dict(compile=True)
    stages = []
    for plan in [half, compiled, fp32, half | compiled] * 2:
        stop_after(dataclasses.replace(config, **plan), 5)
        stages.append(load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["stage"])
    assert set(stages) == {"untrained", "phase1", "phase2"}
    assert "warning: torch.compile failed" not in capsys.readouterr().out
    mixed = main(dataclasses.replace(config, compile=True))
    assert mixed["compiled_graphs"] >= 1 and mixed["compile_seconds"] > 0
    assert mixed["phase1_steps"] == plain["phase1_steps"] and mixed["phase2_steps"] == plain["phase2_steps"]
    assert mixed["val_loss"] == pytest.approx(plain["val_loss"], rel=0.02)


def test_a_compiler_that_fails_once_is_asked_again(tiny_settings, monkeypatch, capsys, shared_cache):
    """One line with the reason behind torch's own and the folder to delete; the run ends compiled."""
    failures = []

    def compile(function, **options):
        def compiled(*inputs, **options):
            if not failures:
                failures.append(ImportError(f"{shared_cache}/x.main.so: file too short"))
                raise BackendCompilerFailed(lambda: None, failures[0], None)
            return function(*inputs, **options)

        return compiled

    monkeypatch.setattr(device.torch, "compile", compile)
    main(ResidualConfig(**tiny_settings, compile=True))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "torch.compile failed" in line)
    assert (
        f"ImportError: {shared_cache}/x.main.so: file too short" in line and f"delete {shared_cache}" in line
    )


STEP = """
import torch
from config import ResidualConfig
from newllm.training.runtime import StepFunction, open_runtime
from newllm.training.loop import State
from newllm.training.step import OptimizerStep, make_optimizer, prepare_optimizer

weight, runtime = torch.nn.Parameter(torch.ones(4)), open_runtime(ResidualConfig(device="cpu", compile=True))
step = StepFunction(lambda values: (values * weight).relu(), True)
optimizer = prepare_optimizer(runtime, make_optimizer([([weight], 1.0)], 0.0, 0.0), None)

def gradients(parts):
    loss = step(torch.ones(3, 4)).sum()
    loss.backward()
    return (loss.item(),)

state = State()
(loss,) = OptimizerStep(runtime, optimizer, step, 1.0, print)(gradients, 3, state, 0, "here")
print(loss, state.grad_norm, step.compiled)
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
def test_damaged_files_in_the_compilers_cache_cost_a_line_at_most(tmp_path):
    """Code, wrappers or graphs cut to nothing: the same figures, still compiled, and no traceback."""

    def run(cache):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        found = subprocess.run(
            [sys.executable, "-c", STEP], capture_output=True, text=True, check=True, env=environment
        )
        return found.stdout.splitlines(), found.stderr

    (whole,), _ = run(tmp_path / "whole")
    assert whole == "12.0 6.0 True"
    for number, pattern in enumerate(("*.main.so", "*.py", "fxgraph/**/*")):
        cache = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", cache)
        damaged = [path for path in cache.rglob(pattern) if path.is_file()]
        assert damaged
        for path in damaged:
            path.write_bytes(b"")
        (*lines, last), errors = run(cache)
        assert last == whole and "Traceback" not in errors and len(lines) <= 1
        assert all(
            line.startswith("warning: torch.compile failed at here") and str(cache) in line for line in lines
        )
