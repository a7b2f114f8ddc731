"""What is replayed is what would be computed, for every input, shape and state of the weights; recording itself needs CUDA."""

import functools
from types import SimpleNamespace

import pytest
import torch

from newllm.fixed_point.solver import sequential
from newllm.models.network import ContextMap
from newllm.training import cuda_graph
from newllm.training.cuda_graph import Graphed
from newllm.training.runtime import StepFunction


@pytest.fixture
def recordings(monkeypatch):
    """On the CPU: a record is the work done again into the same memory, as a graph does it."""
    made = []

    def record(work, warm_up):
        warm_up()
        output = work()
        made.append(output)
        return lambda: output.copy_(work()), output

    monkeypatch.setattr(cuda_graph, "record", record)
    return made


def plain(function):
    """A function that may be recorded, and says nothing."""
    return Graphed(function, function, pytest.fail)


def test_a_replay_reads_its_inputs_and_leaves_earlier_results_alone(recordings):
    """Two inputs of one kind: one record, two results, neither of them its memory."""
    double = plain(lambda values: 2 * values)
    first = double(torch.tensor([1.0, 2.0]))
    second = double(torch.tensor([5.0, 6.0]))
    assert first.tolist() == [2, 4] and second.tolist() == [10, 12]
    assert len(recordings) == 1


def test_every_kind_of_input_has_its_own_record(recordings):
    """Another shape or type is another graph; the first is still there."""
    double = plain(lambda values: 2 * values)
    for values in (torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.int64), torch.zeros(2)):
        assert torch.equal(double(values), 2 * values)
    assert len(recordings) == 3


def test_weights_that_changed_in_place_count(recordings):
    """A replay after an optimizer step computes with the new weights."""
    layer = torch.nn.Linear(3, 3)
    graphed = plain(lambda values: layer(values).detach())
    values = torch.randn(2, 3)
    graphed(values)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(graphed(values), layer(values))


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a CUDA device."""

    is_cuda = True


@pytest.mark.parametrize(("compiled", "on_cuda"), [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_a_trajectory_is_recorded_on_cuda_and_elsewhere_is_the_loop(
    recordings, monkeypatch, compiled, on_cuda
):
    """Compiled or not, the bits are those of the reference, from any start, without gradient; a fall-back begins anew."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    model = ContextMap(6, 5, 2)
    step = StepFunction(model, bool(compiled))
    tokens, start = torch.randn(2, 7, 5), torch.randn(2, 6)
    reference = sequential(functools.partial(model, stream=False), tokens, 6, start)[0].detach()
    given = tokens.as_subclass(OnCuda) if on_cuda else tokens
    for _ in range(2):
        got = step.trajectory(given, start)
        assert torch.equal(got.as_subclass(torch.Tensor), reference) and not got.requires_grad
    assert len(recordings) == on_cuda
    step.fall_back()
    assert torch.equal(step.trajectory(given, start).as_subclass(torch.Tensor), reference)
    assert len(recordings) == 2 * on_cuda


def test_what_cannot_be_recorded_is_computed(recordings, monkeypatch):
    """With one line and the function's own values, until what was tried is forgotten; an error of the function is its own."""
    lines, tries = [], []

    def refuses(work, warm_up):
        tries.append(work)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graph, "record", refuses)
    double = Graphed(lambda values: 2 * values, lambda values: values, lines.append)
    for values in (torch.ones(2), torch.ones(2), torch.ones(3)):
        assert torch.equal(double(values), 2 * values)
    assert len(lines) == len(tries) == 1 and "(operation not permitted when stream is capturing)" in lines[0]
    double.forget()
    double(torch.ones(2))
    assert len(tries) == 2

    def fails(values):
        raise torch.OutOfMemoryError("no")

    lines.clear()
    with pytest.raises(torch.OutOfMemoryError):
        Graphed(fails, fails, lines.append)(torch.ones(2))
    assert not lines


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_graph_on_cuda_gives_the_loops_contexts(precision):
    """Recorded under autocast, replayed after the weights changed: what the loop gives then."""
    model = ContextMap(64, 48, 3).cuda()
    tokens, start = torch.randn(4, 16, 48, device="cuda"), torch.zeros(4, 64, device="cuda")
    step = StepFunction(model, False, note=pytest.fail)
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cuda", precision, enabled=precision != torch.float32):
            got = step.trajectory(tokens.to(precision), start.to(precision))
            expected = sequential(step.contexts, tokens.to(precision), 64, start.to(precision))[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-2 if precision != torch.float32 else 1e-5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


def test_recording_warms_up_and_captures_the_work_once(monkeypatch):
    """On a stream of its own, with autocast's copies of the weights dropped before and after the capture."""
    order = []
    stream = SimpleNamespace(wait_stream=lambda other: order.append("wait"))
    graph = SimpleNamespace(replay=lambda: "replayed")

    class Capture:
        def __init__(self, given, **how):
            self.name = "capture" if given is graph else "warm-up"
            assert how == ({"capture_error_mode": "thread_local"} if given is graph else {})

        def __enter__(self):
            order.append(self.name)

        def __exit__(self, *error):
            order.append("end")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", Capture)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: order.append("clear"))
    replay, output = cuda_graph.record(lambda: order.append("work") or 5, lambda: order.append("short"))
    assert replay() == "replayed" and output == 5
    assert order == ["wait", "warm-up", "short", "end", "wait", "clear", "capture", "work", "end", "clear"]
