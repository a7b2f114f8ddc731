"""A function of tensors as one CUDA graph: kernels that Python would launch one by one are replayed by a single call."""

import torch


class Graphed:
    """Records `function` at the first call with inputs of these shapes and types, and replays the record from then on.

    For work of many small kernels, where the device would wait for Python: the steps of a trajectory are thousands. Its
    speed has not been measured on CUDA yet.

    Args:
        function: of tensors on the current device, to one tensor; without gradient, doing the same whatever the values.
            It may read weights that change in place, as by optimizers and load_state_dict, but not ones that are replaced.
    """

    def __init__(self, function):
        self.function, self.recorded = function, {}

    def __call__(self, *inputs):
        kind = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if kind not in self.recorded:
            held = [tensor.clone() for tensor in inputs]
            self.recorded[kind] = held, *record(lambda: self.function(*held))
        held, replay, output = self.recorded[kind]
        for place, tensor in zip(held, inputs, strict=True):
            place.copy_(tensor)
        replay()
        return output.clone()  # the next replay writes over it


def record(work):
    """Capture work() on the current CUDA device.

    Returns:
        (function that does it again, the tensor that it writes).
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()  # what libraries allocate at their first use must not lie in the graph
    torch.cuda.current_stream().wait_stream(side)
    # autocast's copies of the weights belong into the graph, so that each replay makes them anew, and nowhere else.
    torch.clear_autocast_cache()
    with torch.cuda.graph(graph):
        output = work()
    torch.clear_autocast_cache()
    return graph.replay, output
