"""A failing compiler changes no bit, and how a run computes may change between its sessions."""

import dataclasses
from pathlib import Path

import pytest
import torch
from steps import stop_after

from config import ResidualConfig
from newllm.interrupt import Stopped
from newllm.storage import load_sealed
from newllm.training import device
from newllm.training.device import StepFunction
from train import main


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("backend failed on the way back")


def failing_compiler(when):
    """A torch.compile whose result fails on the first call, on the way back, or on the second shape it sees."""

    def compile(function, **options):
        shapes = set()

        def compiled(context, token):
            shapes.add(context.shape)
            if when == "forward" or (when == "second shape" and len(shapes) > 1):
                raise RuntimeError("backend failed")
            context, token = function(context, token)
            return (_FailsBackward.apply(context), token) if when == "backward" else (context, token)

        return compiled

    return compile


@pytest.mark.parametrize("when", ["forward", "backward", "second shape"])
def test_a_failing_compiler_changes_no_bit(tiny_settings, monkeypatch, capsys, when):
    """The run goes on uncompiled from the same state, to the same weights; no name in the file tells of it."""
    settings = tiny_settings | dict(num_samples=13)  # batches of two sizes
    expected = main(ResidualConfig(**settings))
    monkeypatch.setattr(device.torch, "compile", failing_compiler(when))
    config = ResidualConfig(**settings | {"checkpoint_dir": settings["checkpoint_dir"] + "_compiled"}, compile=True)
    found = main(config)
    assert "warning: torch.compile failed at " in capsys.readouterr().out
    assert found["val_loss"] == expected["val_loss"] and found["phase1_param_change"] == expected["phase1_param_change"]
    names = load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["model_state_dict"]
    assert not any("_orig_mod" in name for name in names)


@pytest.mark.slow
def test_precision_and_compilation_may_change_between_sessions(tiny_settings, monkeypatch, capsys):
    """fp32, then bf16, then compiled: each session takes over where the one before stopped, within a phase."""
    config = ResidualConfig(**tiny_settings | dict(phase1_max_iterations=6, phase2_epochs=6))
    plain = main(dataclasses.replace(config, checkpoint_dir=config.checkpoint_dir + "_plain"))
    plans = [dict(precision="bf16"), dict(compile=True), dict(precision="fp32"), dict(precision="bf16", compile=True)]
    stages = []
    for number in range(8):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_after(patch, 5)
            main(dataclasses.replace(config, **plans[number % len(plans)]))
        stages.append(load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")["stage"])
    assert set(stages) == {"untrained", "phase1", "phase2"}
    assert "warning: torch.compile failed" not in capsys.readouterr().out
    mixed = main(dataclasses.replace(config, compile=True))
    assert mixed["compiled_graphs"] >= 1 and mixed["compile_seconds"] > 0
    assert mixed["phase1_steps"] == plain["phase1_steps"] and mixed["phase2_steps"] == plain["phase2_steps"]
    assert mixed["val_loss"] == pytest.approx(plain["val_loss"], rel=0.02)


def test_a_real_step_function_compiles_or_says_that_it_is_eager(model):
    """Without compilation the model's own step is called, bit for bit."""
    context, token = torch.randn(3, 12), torch.randn(3, 8)
    for mine, own in zip(StepFunction(model.step, False)(context, token), model.step(context, token), strict=True):
        assert torch.equal(mine, own)
