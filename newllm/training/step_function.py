"""The step of F as a run calls it: compiled, its weights cast once a batch, replayed as a CUDA graph."""

import functools
import logging

import torch

from newllm.fixed_point.solver import sequential


class StepFunction:
    """The model's step of F, or a baseline's pass over samples, compiled if asked for until that fails.

    Args:
        cast: function that gives `function` for the many calls of one batch, with its weights cast once.
        note: takes a line about what was survived.
    """

    def __init__(self, function, compiled, cast=None, note=print):
        self.eager = function
        self.compiled = compiled
        if compiled:  # a cached graph that cannot be read is made again, after a traceback as a warning
            torch._logging.set_logs(inductor=logging.ERROR)
        self._call = torch.compile(function, dynamic=True) if compiled else function
        self._cast = cast or (lambda: function)
        self.graphs = Graphs(self._steps, lambda tokens, start: self._steps(tokens[:, :1], start), note)

    def __call__(self, *inputs):
        return self._call(*inputs)

    def contexts(self, context, token):
        """The step without its token stream."""
        return self._call(context, token, stream=False)

    def for_batch(self):
        """The step for all calls of one batch, under one autocast."""
        return self._call if self.compiled else self._cast()

    @torch.no_grad()
    def trajectory(self, tokens_BTE, start_BC):
        """Contexts [B, T, C] step by step from a start, without gradient: on CUDA replayed as one graph."""
        if tokens_BTE.is_cuda:
            return self.graphs(tokens_BTE, start_BC)
        return sequential(self.contexts, tokens_BTE, start_BC.shape[-1], start_BC)[0]

    def _steps(self, tokens_BTE, start_BC):
        # Of the step as written: a compiled one would convert the weights at every step, not once.
        step = functools.partial(self._cast(), stream=False)
        return sequential(step, tokens_BTE, start_BC.shape[-1], start_BC)[0]

    def survive(self, where, reason):
        """After a compiled call failed: compute as written from now on; a line that says so."""
        from torch._inductor.runtime.cache_dir_utils import cache_dir  # private; slow to import

        self._call = self.eager
        self.compiled = False
        return (
            f"warning: torch.compile failed at {where} ({reason}); going on without it. If this comes again, "
            f"delete {cache_dir()}: a killed run leaves damaged files there"
        )


def reason_of(error):
    """The first line that says something: torch puts the name of its backend before the error of it."""
    error = getattr(error, "inner_exception", error)
    return f"{type(error).__name__}: {next(filter(None, str(error).splitlines()), 'no reason given')}"


class Graphs:
    """A function of tensors, recorded as a CUDA graph for inputs of each shape and type, and replayed.

    For work of many small kernels, where the device would wait for Python: a trajectory has thousands. What
    cannot be recorded is computed as written, from then on, with a line.

    Args:
        function: of tensors on the current device, to one tensor; without gradient, doing the same whatever
            the values. The weights that it reads may change in place, but not be replaced.
        warm_up: a short call of the same kernels: what libraries allocate at first use must lie in no graph.
        note: takes the line.
    """

    def __init__(self, function, warm_up, note):
        self.function = function
        self.warm_up = warm_up
        self.note = note
        self.forget()

    def forget(self):
        """Drop what was recorded, with its memory; the next call tries again."""
        self.recorded = {}
        self.failed = False

    def __call__(self, *inputs):
        kind = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        reason = None
        if kind not in self.recorded and not self.failed:
            reason = self._record(kind, [tensor.clone() for tensor in inputs])
            if reason:
                self.forget()  # out here: inside `except` the traceback keeps what the attempt has made alive
                self.failed = True
        if self.failed:
            output = self.function(*inputs)
            if reason:  # said last: if the function fails too, it is no matter of graphs
                self.note(f"warning: the steps cannot be one CUDA graph ({reason}); going on without")
            return output
        held, replay, output = self.recorded[kind]
        for place, tensor in zip(held, inputs, strict=True):
            place.copy_(tensor)
        replay()
        return output.clone()  # the next replay writes over it

    def _record(self, kind, held):
        """Why it cannot be recorded, None if it is."""
        try:
            self.recorded[kind] = held, *record(lambda: self.function(*held), lambda: self.warm_up(*held))
        except Exception as error:
            return reason_of(error)


def record(work, warm_up):
    """Capture work() on the current CUDA device: (function that does it again, the tensor that it writes)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # autocast's copies of the weights belong into the graph alone, so that each replay makes them anew.
    torch.clear_autocast_cache()
    try:
        # Other threads may go on allocating: one of them is saving the last state.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = work()
    except BaseException:
        # A capture that broke off leaves the generator as if still being recorded, and dropout would fail.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    finally:
        torch.clear_autocast_cache()
    return graph.replay, output
