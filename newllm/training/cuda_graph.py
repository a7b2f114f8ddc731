"""A function of tensors as one CUDA graph: kernels that Python would launch one by one are replayed by a single call."""

import torch


class Graphed:
    """Records `function` at the first call with inputs of these shapes and types, and replays the record from then on.

    For work of many small kernels, where the device would wait for Python: the steps of a trajectory are thousands. What
    cannot be recorded is computed as written, from then on, with a line. Its speed has not been measured on CUDA yet.

    Args:
        function: of tensors on the current device, to one tensor; without gradient, doing the same whatever the values.
            It may read weights that change in place, as by optimizers and load_state_dict, but not ones that are replaced.
        warm_up: a short call of the same kernels; what libraries allocate at their first use must not lie in a graph.
        note: takes the line.
    """

    def __init__(self, function, warm_up, note):
        self.function, self.warm_up, self.note = function, warm_up, note
        self.forget()

    def __call__(self, *inputs):
        kind = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        reason = None
        if kind not in self.recorded and not self.failed:
            held = [tensor.clone() for tensor in inputs]
            try:
                self.recorded[kind] = held, *record(lambda: self.function(*held), lambda: self.warm_up(*held))
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
        if reason:  # out here: inside `except` the traceback keeps what the attempt has made alive
            self.forget()
            self.failed = True
        if self.failed:
            output = self.function(*inputs)
            if reason:  # after the work: if this fails too, that is no matter of graphs
                self.note(
                    f"warning: the steps through time cannot be recorded as a CUDA graph ({reason}); going on without"
                )
            return output
        held, replay, output = self.recorded[kind]
        for place, tensor in zip(held, inputs, strict=True):
            place.copy_(tensor)
        replay()
        return output.clone()  # the next replay writes over it

    def forget(self):
        """Drop what was recorded, with its memory; the next call tries again."""
        self.recorded, self.failed = {}, False


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
    # autocast's copies of the weights belong into the graph, so that each replay makes them anew, and nowhere else.
    torch.clear_autocast_cache()
    try:
        # Other threads may go on allocating: one of them is saving the last state.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = work()
    except BaseException:
        # A capture that broke off leaves the generator as if it were still being recorded, and dropout would fail.
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    finally:
        torch.clear_autocast_cache()
    return graph.replay, output
