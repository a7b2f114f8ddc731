"""What is replayed or compiled is what would be computed, for every input, shape and state of the weights."""

import functools

import pytest
import torch

from newllm.fixed_point.solver import sequential
from newllm.models.network import ContextMap
from newllm.training import step_function
from newllm.training.step_function import Graphs, StepFunction


@pytest.fixture
def recordings(monkeypatch):
    """On the CPU: a record is the work done again into the same memory, as a graph does it."""
    made = []

    def record(work, warm_up):
        warm_up()
        output = work()
        made.append(output)
        return lambda: output.copy_(work()), output

    monkeypatch.setattr(step_function, "record", record)
    return made


def test_a_replay_is_the_function_on_its_inputs(recordings):
    """A record for each shape and type; weights that changed count; earlier results are left alone."""
    factor = torch.tensor(2)
    times = Graphs(lambda values: factor * values, lambda values: values, pytest.fail)
    first, second = times(torch.tensor([1.0, 2.0])), times(torch.tensor([5.0, 6.0]))
    assert first.tolist() == [2, 4] and second.tolist() == [10, 12] and len(recordings) == 1
    for values in (torch.ones(3), torch.ones(2, dtype=torch.int64), torch.zeros(2)):
        assert torch.equal(times(values), 2 * values)
    assert len(recordings) == 3
    factor.mul_(4)
    assert times(torch.tensor([1.0, 2.0])).tolist() == [8, 16] and len(recordings) == 3


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a CUDA device."""

    is_cuda = True


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("on_cuda", [True, False])
def test_a_trajectory_is_recorded_on_cuda_and_elsewhere_is_the_loop(
    recordings, monkeypatch, compiled, on_cuda
):
    """Compiled or not, the bits are those of the reference, from any start, without gradient."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = ContextMap(6, 5, 2)
    step = StepFunction(model, compiled)
    tokens, start = torch.randn(2, 7, 5), torch.randn(2, 6)
    reference = sequential(functools.partial(model, stream=False), tokens, 6, start)[0].detach()
    given = tokens.as_subclass(OnCuda) if on_cuda else tokens
    for _ in range(2):
        contexts = step.trajectory(given, start)
        assert torch.equal(contexts.as_subclass(torch.Tensor), reference) and not contexts.requires_grad
    assert len(recordings) == on_cuda


def test_what_cannot_be_recorded_is_computed(monkeypatch):
    """With one line and the function's own values, until that is forgotten; its errors are its own."""
    lines, tries = [], []

    def refuses(work, warm_up):
        tries.append(work)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(step_function, "record", refuses)
    double = Graphs(lambda values: 2 * values, lambda values: values, lines.append)
    for values in (torch.ones(2), torch.ones(2), torch.ones(3)):
        assert torch.equal(double(values), 2 * values)
    assert len(lines) == len(tries) == 1 and "operation not permitted when stream is capturing)" in lines[0]
    double.forget()
    double(torch.ones(2))
    assert len(tries) == 2

    def fails(values):
        raise torch.OutOfMemoryError("no")

    with pytest.raises(torch.OutOfMemoryError):
        Graphs(fails, fails, pytest.fail)(torch.ones(2))


def test_a_step_is_compiled_until_that_fails(monkeypatch):
    """Then it is the model's own, and a line says what to do about damaged files."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda context, token: "compiled")

    def own(context, token):
        return context, token

    step = StepFunction(own, True)
    assert step.compiled and step(1, 2) == "compiled"
    line = step.survive("batch 1", "it broke")
    assert "failed at batch 1 (it broke); going on without it" in line and "delete " in line
    assert not step.compiled and step(1, 2) == (1, 2) == StepFunction(own, False)(1, 2)
