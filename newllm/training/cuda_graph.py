"""A function of tensors as one CUDA graph: kernels that Python would launch singly are replayed at once."""

import torch


class Graphed:
    """Records `function` at the first call with inputs of these shapes and types, and replays it afterwards.

    For work of many small kernels, where the device would wait for Python: a trajectory has thousands. What
    cannot be recorded is computed as written, from then on, with a line. Not measured on CUDA yet.

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

    def __call__(self, *inputs):
        kind = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if kind not in self.recorded and not self.failed:
            reason = self._record(kind, [tensor.clone() for tensor in inputs])
            if reason:
                self.forget()  # out here: inside `except` the traceback keeps what the attempt has made alive
                self.failed = True
                output = self.function(*inputs)  # before the line: if it fails too, it is no matter of graphs
                line = f"warning: the steps cannot be recorded as a CUDA graph ({reason}); going on without"
                self.note(line)
                return output
        if self.failed:
            return self.function(*inputs)
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
            return (str(error).splitlines() or [type(error).__name__])[0]

    def forget(self):
        """Drop what was recorded, with its memory; the next call tries again."""
        self.recorded = {}
        self.failed = False


def record(work, warm_up):
    """Capture work() on the current CUDA device.

    Returns:
        (function that does it again, the tensor that it writes).
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
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
