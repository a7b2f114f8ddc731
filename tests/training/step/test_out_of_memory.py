"""A batch that does not fit into memory is computed in parts, to the same steps and figures."""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import stop_after
from torch import nn

from config import ResidualConfig
from newllm.errors import UserError
from newllm.fixed_point.solver import sweep
from newllm.memory import map_parts, split
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.phases import phase1, phase2
from newllm.saving.files import load_sealed
from newllm.training.loop import State
from newllm.training.runtime import open_runtime
from newllm.training.step import OptimizerStep, make_optimizer
from train import main

NO_MEMORY = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    "Python": MemoryError(),
    "driver": torch.AcceleratorError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "NCCL": RuntimeError("NCCL error: unhandled cuda error. Cuda failure 'out of memory'"),
}


def test_parts_are_consecutive_and_nearly_equal():
    """Every row once, for any number of parts, more than there are rows included."""
    for count in range(1, 12):
        for parts in range(1, 15):
            cut = split(count, parts)
            assert len(cut) == min(parts, count)
            assert [row for part in cut for row in range(count)[part]] == list(range(count))
            sizes = [part.stop - part.start for part in cut]
            assert max(sizes) - min(sizes) <= 1


@pytest.fixture
def taking():
    """(OptimizerStep on one parameter, the parameter, the lines it says)."""
    parameter, notes = nn.Parameter(torch.zeros(2)), []
    eager = SimpleNamespace(compiled=False, graphs=SimpleNamespace(forget=lambda: None))
    optimizer = make_optimizer([([parameter], 1.0)], 1e-3, 0.0)
    runtime = open_runtime(ResidualConfig(device="cpu", precision="fp32"))
    return OptimizerStep(runtime, optimizer, eager, 9.0, notes.append), parameter, notes


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_a_batch_that_does_not_fit_is_done_again_in_parts(taking, kind):
    """Half-made gradients are dropped, random numbers are those of a first attempt, the plan is kept."""
    (take, parameter, notes), drawn, state = taking, [], State()

    def gradients(parts):
        for part in parts:
            drawn.append(torch.rand(()).item())
            (parameter.sum() * (part.stop - part.start)).backward()
            if part.stop - part.start > 2:
                raise NO_MEMORY[kind]
        return (1.0,)

    take(gradients, 7, state, 5, "here")
    assert state.parts == 4 and state.grad_norm == pytest.approx(7 * 2**0.5)
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(notes) == 2 and "2 samples at a time from now on, 7 a step as before" in notes[1]
    take(gradients, 7, state, 5, "here")
    assert state.parts == 4 and len(notes) == 2


@pytest.mark.parametrize(
    "error, raised, words",
    [
        (torch.OutOfMemoryError("no"), UserError, "not even one sample fits into memory at batch 3"),
        (RuntimeError("mat1 and mat2 do not fit"), RuntimeError, "mat1 and mat2"),
    ],
)
def test_a_sample_that_does_not_fit_and_a_real_error_end_the_run(taking, error, raised, words):
    """The first with a sentence, the second as it is; nothing is tried for ever."""

    def fails(parts):
        raise error

    with pytest.raises(raised, match=words):
        taking[0](fails, 5, State(), 0, "batch 3")


def test_no_memory_for_the_update_stops_with_a_sentence(taking, monkeypatch):
    """Some parameters may have moved, so it is not tried again."""
    take, parameter, _ = taking

    def fails():
        raise torch.OutOfMemoryError("no")

    def gradients(parts):
        parameter.sum().backward()
        return (1.0,)

    monkeypatch.setattr(take.optimizer, "step", fails)
    with pytest.raises(UserError, match="continue from the last checkpoint"):
        take(gradients, 1, State(), 0, "here")


def sweep_of_two(step, contexts, tokens):
    """A sweep of training for at most two sequences."""
    if len(contexts) > 2 and isinstance(step, functools.partial):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return sweep(step, contexts, tokens)


def loss_of_two(hidden, *rest):
    if len(hidden) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return linear_cross_entropy(hidden, *rest)


@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_short_of_memory_keeps_its_effective_batch(tiny_settings, monkeypatch, capsys, freeze):
    """Two samples at a time where four are a batch, also after a restart: same steps, same losses."""
    settings = tiny_settings | dict(dropout=0.0, freeze_context=freeze, context_noise=0.1)
    whole = main(ResidualConfig(**settings))
    monkeypatch.setattr(phase1, "sweep", sweep_of_two)
    monkeypatch.setattr(phase2, "linear_cross_entropy", loss_of_two)
    config = ResidualConfig(**settings | {"checkpoint_dir": settings["checkpoint_dir"] + "_small"})
    stop_after(config, 9 + 2)  # in Phase 1, behind the untrained stage
    state = load_sealed(Path(config.checkpoint_dir) / "model_latest.pt")
    assert state["stage"] == "phase1" and state["stage_state"]["parts"] == 2
    small = main(config)
    # Once a stage; what memory taught is remembered by the next session.
    assert capsys.readouterr().out.count("2 samples at a time from now on, 4 a step as before") == 3
    assert small["phase1_steps"] == whole["phase1_steps"] and small["sample_order"] == whole["sample_order"]
    # Not closer, because Adam makes much of gradients that are nearly zero.
    for key in ("val_loss", "phase1_param_change", "er_val", "val_ppl_untrained_context"):
        assert small[key] == pytest.approx(whole[key], rel=1e-3), key


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no"), ValueError("other")], ids=repr)
def test_evaluation_takes_half_as_many_rows_from_where_memory_runs_out(error):
    """Each row once. What is no lack of memory is raised, and a single row that does not fit."""

    def work(part, most=2):
        if part.stop - part.start > most:
            raise error
        return range(9)[part]

    if isinstance(error, ValueError):
        with pytest.raises(ValueError):
            map_parts(work, 9, 8)
        return
    assert [list(part) for part in map_parts(work, 9, 8)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    with pytest.raises(torch.OutOfMemoryError):
        map_parts(lambda part: work(part, most=0), 9, 8)
