"""A step is taken on finite gradients alone, and survives a lack of memory and a failing compiler."""

import dataclasses
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config import ResidualConfig
from newllm import evaluate
from newllm.errors import UserError
from newllm.fixed_point.losses import phase1_loss
from newllm.fixed_point.solver import sequential, sweep
from newllm.interrupt import Interrupt, Stopped
from newllm.memory import map_parts, split
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.models.language_model import LanguageModel
from newllm.storage import load_sealed
from newllm.training import device, phase1, phase2
from newllm.training.checkpoint import Checkpointer
from newllm.training.device import StepFunction, open_runtime
from newllm.training.optim import copy_of, make_optimizer
from newllm.training.step import SMALLEST_SCALE, OptimizerStep
from train import main

NO_MEMORY = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError(),
}


@pytest.fixture(scope="module")
def runtime():
    return open_runtime(ResidualConfig(device="cpu", precision="fp32"))


@pytest.fixture
def model():
    return LanguageModel(ResidualConfig(context_dim=12, embed_dim=8, num_layers=2, tie_weights=False), 20)


def fresh_state():
    return {"parts": 1, "skipped": 0, "grad_norm": 0.0}


def taker(runtime, optimizer, max_norm=1.0, step=None, notes=None):
    """One step after the other on a loss that is given as a function."""
    eager = SimpleNamespace(compiled=False)
    take = OptimizerStep(runtime, optimizer, step or eager, max_norm, ([] if notes is None else notes).append)
    state = fresh_state()

    def step_on(loss_of, where="here"):
        def gradients(parts):
            loss = loss_of()
            runtime.accelerator.backward(loss)
            return (loss.item(),)

        take(gradients, 4, state, 0, where)
        return state["grad_norm"]

    return step_on


def prediction_loss(model):
    ids = torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0))
    contexts, streams = sequential(model.step, model.embed(ids[:, :-1]), model.context_dim)
    return linear_cross_entropy(model.hidden(contexts, streams), *model.output_weights(), ids[:, 1:])


def changed(model, before):
    """Names of the parameters that differ from their copies."""
    return {name for (name, p), old in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, old)}


def names_of(model, parameters):
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


# What a step changes


@pytest.mark.parametrize("trained", ["head", "context", "both"])
def test_a_step_changes_every_trained_parameter_and_no_other(runtime, model, trained):
    """The loss reaches them all; the optimizer's list decides."""
    parts = {"head": [model.head_parameters()], "context": [model.context_parameters()]}
    parts["both"] = parts["head"] + parts["context"]
    optimizer = make_optimizer([(part, 1.0) for part in parts[trained]], 1e-2, 0.1)
    before = copy_of(model.parameters())
    taker(runtime, optimizer)(lambda: prediction_loss(model))
    assert changed(model, before) == names_of(model, [p for part in parts[trained] for p in part])


def test_a_phase_1_step_changes_what_the_contexts_depend_on(runtime, model):
    """All of the context parameters but the last token norm, whose output is the stream that no context reads."""
    optimizer = make_optimizer([(model.context_parameters(), 1.0)], 1e-2, 0.0)
    tokens = model.embed(torch.randint(20, (4, 7), generator=torch.Generator().manual_seed(0)))
    old = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(1))
    before = copy_of(model.parameters())
    taker(runtime, optimizer)(lambda: phase1_loss(sweep(model.step, old, tokens)[0], old, 0.5, "logdet", 0.0)[0])
    unread = names_of(model, model.context_map.layers[-1].token_norm.parameters())
    assert changed(model, before) == names_of(model, model.context_parameters()) - unread


def test_steps_lower_the_loss(runtime, model):
    """Thirty steps on one batch."""
    model.eval()
    take = taker(runtime, make_optimizer([(list(model.parameters()), 1.0)], 1e-2, 0.0))
    first = prediction_loss(model).item()
    for _ in range(30):
        take(lambda: prediction_loss(model))
    assert prediction_loss(model).item() < 0.8 * first


def test_gradients_do_not_add_up_over_steps(runtime):
    """Each step starts from no gradient."""
    parameter = nn.Parameter(torch.ones(2))
    take = taker(runtime, make_optimizer([([parameter], 1.0)], 1e-3, 0.0), 100.0)
    assert [take(lambda: (3 * parameter).sum()) for _ in range(3)] == pytest.approx([3 * 2**0.5] * 3)


def test_the_gradient_is_clipped_and_its_norm_before_that_recorded(runtime):
    """A gradient of norm 5 becomes one of norm 1 in the same direction."""
    parameter = nn.Parameter(torch.zeros(2))
    take = taker(runtime, make_optimizer([([parameter], 1.0)], 1e-3, 0.0))
    assert take(lambda: (parameter * torch.tensor([3.0, 4.0])).sum()) == pytest.approx(5)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-4, atol=0)


# What is not finite

BAD = {
    "nan loss": lambda p: (p * float("nan")).sum(),
    "infinite loss": lambda p: (p * float("inf")).sum(),
    "infinite gradient": lambda p: p.sub(1).abs().sqrt().sum(),  # finite at 1, its slope is not
    "nan gradient": lambda p: (p.sub(1).square().sum()).sqrt(),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_step(runtime, kind):
    """One sentence that says where; no bit of a parameter or of the optimizer's state has changed."""
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = make_optimizer([([parameter], 1.0)], 1e-2, 0.1)
    take = taker(runtime, optimizer)
    take(lambda: parameter.square().sum())
    with torch.no_grad():
        parameter.fill_(1)
    state = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    with pytest.raises(UserError) as caught:
        take(lambda: BAD[kind](parameter), "batch 7 of Phase 1")
    message = str(caught.value)
    assert "at batch 7 of Phase 1" in message and "\n" not in message
    assert ("loss" if kind.endswith("loss") else "gradient") in message.split(" at ")[0]
    assert torch.equal(parameter, torch.ones(3, 2))
    assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in state.items())


@pytest.mark.parametrize(("scale", "stops"), [(2.0**16, False), (SMALLEST_SCALE, False), (SMALLEST_SCALE / 2, True)])
def test_with_a_loss_scaler_an_infinite_gradient_is_the_scalers_business(runtime, scale, stops):
    """fp16: the scaler leaves such a step out and lowers its scale; the run goes on until the scale itself is nothing."""
    accelerator = SimpleNamespace(
        backward=lambda loss: (loss * float("inf")).backward(),
        unscale_gradients=lambda optimizer: None,
        scaler=SimpleNamespace(get_scale=lambda: scale),
    )
    parameter = nn.Parameter(torch.ones(2))
    take = taker(
        SimpleNamespace(accelerator=accelerator, group=runtime.group), make_optimizer([([parameter], 1.0)], 1e-2, 0.0)
    )
    if stops:
        with pytest.raises(UserError, match="gradient is inf at here"):
            take(lambda: parameter.sum())
        assert torch.equal(parameter, torch.ones(2))
    else:
        assert take(lambda: parameter.sum()) == float("inf")


# Memory


def test_parts_are_consecutive_and_nearly_equal():
    """Every row once, for any number of parts, more than there are rows included."""
    for count in range(1, 12):
        for parts in range(1, 15):
            cut = split(count, parts)
            assert len(cut) == min(parts, count)
            assert [row for part in cut for row in range(count)[part]] == list(range(count))
            sizes = [part.stop - part.start for part in cut]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_a_batch_that_does_not_fit_is_done_again_in_parts(runtime, kind):
    """Half-accumulated gradients are dropped, random numbers are those of a first attempt, and the plan is kept."""
    parameter = nn.Parameter(torch.zeros(2))
    notes, drawn, state = [], [], fresh_state()
    take = OptimizerStep(
        runtime, make_optimizer([([parameter], 1.0)], 1e-3, 0.0), SimpleNamespace(compiled=False), 9.0, notes.append
    )

    def gradients(parts):
        for part in parts:
            drawn.append(torch.rand(()).item())
            (parameter.sum() * (part.stop - part.start)).backward()
            if part.stop - part.start > 2:
                raise NO_MEMORY[kind]
        return (1.0,)

    take(gradients, 7, state, 5, "here")
    assert state["parts"] == 4 and state["grad_norm"] == pytest.approx(7 * 2**0.5)
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(notes) == 2 and "2 samples at a time from now on, 7 a step as before" in notes[1]
    take(gradients, 7, state, 5, "here")
    assert state["parts"] == 4 and len(notes) == 2


def test_a_sample_that_does_not_fit_and_a_real_error_end_the_run(runtime):
    """The first with a sentence, the second as it is; nothing is tried for ever."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer([([parameter], 1.0)], 1e-3, 0.0)
    take = OptimizerStep(runtime, optimizer, SimpleNamespace(compiled=False), 1.0, print)

    def fails(error):
        def gradients(parts):
            raise error

        return gradients

    with pytest.raises(UserError, match="not even one sample fits into memory at batch 3"):
        take(fails(torch.OutOfMemoryError("no")), 5, fresh_state(), 0, "batch 3")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        take(fails(RuntimeError("mat1 and mat2 shapes cannot be multiplied")), 5, fresh_state(), 0, "batch 3")


def test_no_memory_for_the_update_stops_with_a_sentence(runtime, monkeypatch):
    """Some parameters may have moved, so it is not tried again."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make_optimizer([([parameter], 1.0)], 1e-3, 0.0)
    take = taker(runtime, optimizer)

    def fails():
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(optimizer, "step", fails)
    with pytest.raises(UserError, match="continue from the last checkpoint"):
        take(lambda: parameter.sum())


def sweep_of_two(step, contexts, tokens):
    """A sweep of training for at most two sequences."""
    if len(contexts) > 2 and isinstance(step.__self__, StepFunction):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return sweep(step, contexts, tokens)


def loss_of_two(hidden, *rest):
    if len(hidden) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return linear_cross_entropy(hidden, *rest)


def stop_after(monkeypatch, batches):
    """Let the next session stop, with a checkpoint, after so many batches."""
    asked = []

    def due(self, batch):
        asked.append(batch)
        if len(asked) == batches:
            Interrupt.current.signal = signal.SIGTERM
        return real(self, batch)

    real = Checkpointer.due
    monkeypatch.setattr(Checkpointer, "due", due)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_short_of_memory_keeps_its_effective_batch(tiny_settings, monkeypatch, capsys, freeze):
    """Two samples at a time where four are a batch: same steps, same order, and the same losses to rounding."""
    settings = tiny_settings | dict(dropout=0.0, freeze_context=freeze, context_noise=0.1)
    whole = main(ResidualConfig(**settings))
    with monkeypatch.context() as patch:
        patch.setattr(phase1, "sweep", sweep_of_two)
        patch.setattr(phase2, "linear_cross_entropy", loss_of_two)
        config = ResidualConfig(**settings | {"checkpoint_dir": settings["checkpoint_dir"] + "_small"})
        small = main(config)
    assert capsys.readouterr().out.count("2 samples at a time from now on, 4 a step as before") == 3  # once a stage
    assert small["phase1_steps"] == whole["phase1_steps"] and small["sample_order"] == whole["sample_order"]
    # Not closer, because Adam makes much of gradients that are nearly zero.
    for key in ("val_loss", "phase1_param_change", "er_val", "val_ppl_untrained_context"):
        assert small[key] == pytest.approx(whole[key], rel=1e-3), key


def test_what_memory_taught_is_remembered_by_the_next_session(tiny_settings, monkeypatch, capsys):
    """The number of parts is in the checkpoint, so that a resumed run does not run out of memory again."""
    config = ResidualConfig(**tiny_settings)
    with monkeypatch.context() as patch:
        patch.setattr(phase1, "sweep", sweep_of_two)
        stop_after(patch, 9 + 2)  # in Phase 1, behind the untrained stage
        with pytest.raises(Stopped):
            main(config)
        state = load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")
        assert state["stage"] == "phase1" and state["stage_state"]["parts"] == 2
        capsys.readouterr()
        main(config)
    assert "out of memory" not in capsys.readouterr().out


def test_evaluation_short_of_memory_takes_fewer_at_a_time_and_says_the_same(tiny_settings, monkeypatch):
    """Half as many from where it failed; training's batches do not shrink for it."""
    config = ResidualConfig(**tiny_settings)
    whole = main(config)
    small = dataclasses.replace(config, checkpoint_dir=config.checkpoint_dir + "_small")
    real, sizes = evaluate.linear_token_nll, []

    def limited(hidden, *rest):
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("no")
        sizes.append(len(hidden))
        return real(hidden, *rest)

    monkeypatch.setattr(evaluate, "linear_token_nll", limited)
    assert main(small)["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-6)
    assert max(sizes) == 2
    assert load_sealed(Path(small.checkpoint_dir) / "model_epoch.pt")["stage_state"]["parts"] == 1


def test_map_parts_raises_what_is_no_lack_of_memory():
    """And a single row that does not fit."""

    def work(part):
        raise error

    error = torch.OutOfMemoryError("no")
    with pytest.raises(torch.OutOfMemoryError):
        map_parts(work, 5, 4)
    error = ValueError("other")
    with pytest.raises(ValueError, match="other"):
        map_parts(work, 5, 4)


# Compiler


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
