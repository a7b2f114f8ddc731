"""A CUDA device that is not there: a T4 or an A100 for dispatch, autocast and device rules; a CPU computes.

Import it before torch, in a process of its own; then `with pretended_cuda((7, 5)) as counts: ...`. Tensors
that say "cuda:0" hold a CPU tensor each. Every operation on one is refused where CUDA refuses it (operands of
two devices, a layer norm of two types, waiting while a graph is captured), counted as a launch, a wait or
neither, and computed on what they hold. Graphs are replayed as CUDA does it: the same operations again.

It does not show the device's rounding, its speed, its memory, or races.
"""

import collections
import contextlib
import ctypes
import importlib.util
import subprocess
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

# What torch asks about CUDA devices from C++, autograd's threads above all. A build for CPUs knows of none.
SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>);
"""


def _answer_for_devices():
    """Compile SOURCE and load it, before torch asks for the first time."""
    torch_home = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "devices.cpp", Path(folder) / "devices.so"
        source.write_text(SOURCE)
        where = [f"-I{torch_home}/include", f"-L{torch_home}/lib", f"-Wl,-rpath,{torch_home}/lib"]
        command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", source, *where, "-lc10", "-ltorch_cpu"]
        subprocess.run([*command, "-o", library], check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


_answer_for_devices()

import torch  # noqa: E402, see above
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

aten, DEVICE, HOST = torch.ops.aten, torch.device("cuda", 0), torch.device("cpu")
CROSSING = {aten.copy_, aten._to_copy, aten.set_}  # may have operands on two devices
GATHERING = {aten.index, aten._unsafe_index}  # take their indices from the host too
SCATTERING = {aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index_put}
# The host cannot go on before the device is done: it wants a value, or a size that depends on values.
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.unique_dim,
    aten._unique2, aten._linalg_check_errors, aten.bincount, aten._linalg_eigh, aten.repeat_interleave,
}  # fmt: skip
WITHOUT_KERNEL = {
    aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided, aten.detach,
    aten.alias, aten.lift_fresh, aten._local_scalar_dense, aten._has_compatible_shallow_copy_type,
}  # fmt: skip
SOFTMAX = {aten._softmax, aten._log_softmax}


def leaves(values):
    """All that lists, tuples and dictionaries hold, as torch.utils._pytree, and several times as fast."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, list | tuple | dict):
            yield from leaves(value)
        else:
            yield value


def mapped(function, value):
    """The same structure of function(leaf)."""
    if isinstance(value, list | tuple):
        return type(value)([mapped(function, part) for part in value])
    if isinstance(value, dict):
        return {name: mapped(function, part) for name, part in value.items()}
    return function(value)


def tensors_in(*values):
    return [leaf for leaf in leaves(values) if isinstance(leaf, torch.Tensor)]


class Refused(RuntimeError):
    """What CUDA would not do."""


class Counts:
    """Launches and waits so far, by operation, and the types of what was launched on."""

    def __init__(self):
        self.launched, self.waited, self.types = (collections.Counter() for _ in range(3))
        self.held = threading.local()  # quiet: what stands for one kernel counts once

    @property
    def launches(self):
        return self.launched.total()

    @property
    def waits(self):
        return self.waited.total()

    @contextlib.contextmanager
    def as_one_launch(self, name):
        self.launched[name] += 1
        self.held.quiet = True
        try:
            yield
        finally:
            self.held.quiet = False

    def launch(self, name):
        if not getattr(self.held, "quiet", False):
            self.launched[name] += 1

    def wait(self, name):
        if _capturing.tape is not None:
            raise Refused("CUDA error: operation not permitted when stream is capturing")
        if not getattr(self.held, "quiet", False):
            self.waited[name] += 1


_counts = Counts()
_capturing = SimpleNamespace(tape=None)


class OnDevice(torch.Tensor):
    """A tensor on "cuda:0" whose values are those of the CPU tensor `values`."""

    @staticmethod
    def __new__(cls, values):
        layout = dict(strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype)
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, device=DEVICE, **layout)

    def __init__(self, values):
        self.values = values

    def __repr__(self):
        return f"OnDevice({self.values!r})"

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_, **__):
        return self.numpy()

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.values.detach().__reduce_ex__(protocol)  # as a file read with map_location="cpu"

    def __deepcopy__(self, memo):
        copied = OnDevice(self.values.detach().clone())
        parameter = isinstance(self, torch.nn.Parameter)
        memo[id(self)] = made = torch.nn.Parameter(copied) if parameter else copied
        return made.requires_grad_(self.requires_grad)

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class Watching(TorchDispatchMode):
    """Sees operations without a tensor on the device: those that make one there, or copy one to it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # composite operations arrive whole there
            with self:
                made = operation.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if _is_cuda(kwargs.get("device")) or any(isinstance(x, OnDevice) for x in leaves((args, kwargs))):
            return compute(operation, args, kwargs)
        return operation(*args, **kwargs)


def _is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"


def compute(operation, args, kwargs):
    """Refuse, count or do one operation."""
    packet, wanted = operation.overloadpacket, kwargs.get("device")
    tensors = tensors_in(args, kwargs)
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    _refuse(operation, args, kwargs, tensors, ours)
    if packet is aten.copy_:
        lands = isinstance(args[0], OnDevice)
    else:
        stays = bool(ours) and wanted is None
        lands = packet is not aten._local_scalar_dense and (_is_cuda(wanted) or stays)
    _count(operation, args, kwargs, ours, wanted)
    if wanted is not None:
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"} | {"device": HOST}
    plain, named = mapped(lambda x: x.values if isinstance(x, OnDevice) else x, (args, kwargs))
    if packet in SOFTMAX and plain[2]:  # to fp32 within the kernel, which CPUs have not
        plain = plain[0].float(), plain[1], False
    made = operation(*plain, **named)
    if packet is aten._to_copy and any(made is x.values for x in ours):
        made = made.clone()
    if _capturing.tape is not None and lands:
        _capturing.tape.append((operation, plain, named, made))
    known = {id(x.values): x for x in ours}  # an operation in place gives back its own operand

    def placed(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice):
            return x
        return known.get(id(x)) if id(x) in known else OnDevice(x) if lands else x

    # A view of what was made outside of inference mode is no tensor of that mode either.
    outside = operation.is_view and ours and not ours[0].is_inference()
    with torch.inference_mode(False) if outside else contextlib.nullcontext():
        return mapped(placed, made)


def _refuse(operation, args, kwargs, tensors, ours):
    """What CUDA does not do."""
    packet, generator = operation.overloadpacket, kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu" and (ours or _is_cuda(kwargs.get("device"))):
        raise Refused(f"Expected a 'cuda' device type for generator but found 'cpu' ({operation})")
    if packet is aten.native_layer_norm and ours and any(x.dtype != args[0].dtype for x in tensors):
        raise Refused(f"layer norm: expected one type, got {[x.dtype for x in tensors]}")
    others = [x for x in tensors if not isinstance(x, OnDevice)]
    if not ours or packet in CROSSING:
        return
    if packet in GATHERING | SCATTERING and isinstance(args[0], OnDevice):
        others = [args[2]] if packet in SCATTERING and not isinstance(args[2], OnDevice) else []
    pointwise = torch.Tag.pointwise in operation.tags or "_fused_adam" in str(operation)
    if pointwise or packet in SCATTERING | {aten.fill_}:
        others = [x for x in others if x.dim()]  # a single number may come from the host
    if others:
        where = [(str(x.device), tuple(x.shape)) for x in tensors]
        raise Refused(f"Expected all tensors to be on the same device ({operation}: {where})")


def _count(operation, args, kwargs, ours, wanted):
    """One launch, one wait, both or neither."""
    packet, name = operation.overloadpacket, operation.overloadpacket.__name__
    if packet in WAITING:
        _counts.wait(name)
    if packet in GATHERING | SCATTERING and isinstance(args[0], OnDevice):
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        if any(not isinstance(x, OnDevice) or x.dtype == torch.bool for x in indices):
            _counts.wait(f"{name} by indices from the host, or by a mask")
    crosses, unhurried = False, kwargs.get("non_blocking")
    if packet is aten._to_copy:
        crosses, to_host = wanted is not None and bool(ours) != _is_cuda(wanted), bool(ours)
    elif packet is aten.copy_:
        to_host = isinstance(args[1], OnDevice)
        crosses = isinstance(args[0], OnDevice) != to_host
        unhurried = args[2] if len(args) > 2 else unhurried
    # Towards the device the driver takes the values along, if it may; towards the host they have to be there.
    if crosses and (to_host or not unhurried):
        _counts.wait(f"copy to {'host' if to_host else 'device'}")
    if not operation.is_view and packet not in WITHOUT_KERNEL:
        _counts.launch(name)
        for x in ours[:1]:
            _counts.types[name, x.dtype] += 1


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self):
        self.tape = []

    def replay(self):
        """The recorded operations once more, into the memory that they wrote to first."""
        with torch.no_grad(), _counts.as_one_launch("graph replay"):
            for operation, args, kwargs, made in self.tape:
                again = operation(*args, **kwargs)
                if operation.is_view or operation._schema.is_mutable:
                    continue
                for place, values in zip(tensors_in(made), tensors_in(again), strict=True):
                    place.copy_(values)


@contextlib.contextmanager
def _capture(graph, capture_error_mode="global", **_):
    """Stands for torch.cuda.graph; what is launched in it counts as launches, to see what recording costs."""
    if capture_error_mode != "thread_local":
        raise Refused("a capture that forbids other threads to allocate meanwhile")
    _capturing.tape = graph.tape
    try:
        yield
    finally:
        _capturing.tape = None


def _recurrent(name):
    """cuDNN's GRU and LSTM are one operation each: here the CPU's, in autocast's type on CUDA."""
    own = getattr(torch._VF, name)

    def call(x, state, weights, *rest):
        if not isinstance(x, OnDevice):
            return own(x, state, weights, *rest)
        states = state if isinstance(state, tuple) else [state]
        if not all(isinstance(each, OnDevice) for each in (*states, *weights)):
            raise Refused(f"Input and parameter tensors are not at the same device ({name})")
        kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        with _counts.as_one_launch(name), torch.autocast("cuda", enabled=False):
            host = [tensor.cpu().float() for tensor in (x, *states, *weights)]
            begun = tuple(host[1 : 1 + len(states)]) if isinstance(state, tuple) else host[1]
            found = own(host[0], begun, host[1 + len(states) :], *rest)
            return tuple(tensor.to(DEVICE).to(kind) for tensor in found)

    return call


def nothing():
    """A function without effect, a new one each time: torch._dynamo takes none under two names."""
    return lambda *_: None


def _fakes(capability, memory):
    """torch.cuda's functions, as they answer on a machine with one device."""
    card = dict(major=capability[0], minor=capability[1], name="pretended", total_memory=memory)
    properties = SimpleNamespace(**card)
    generator = SimpleNamespace(clone_state=nothing(), graphsafe_set_state=nothing())

    class Stream:  # a class: annotations of other libraries name it
        def wait_stream(self, other):
            pass

    return dict(
        is_available=lambda: True, is_initialized=lambda: True, current_device=lambda: 0,
        device_count=lambda: 1, set_device=nothing(), get_device_properties=lambda *_: properties,
        get_device_name=lambda *_: "pretended", get_device_capability=lambda *_: capability,
        _check_bf16_tensor_supported=lambda *_: True, _initialized=True, _lazy_init=nothing(),
        synchronize=nothing(), empty_cache=nothing(), manual_seed=nothing(), manual_seed_all=nothing(),
        set_per_process_memory_fraction=nothing(),
        memory_allocated=lambda *_: 0, memory_reserved=lambda *_: 0, max_memory_allocated=lambda *_: 0,
        is_current_stream_capturing=lambda: _capturing.tape is not None, default_generators=(generator,),
        Stream=Stream, current_stream=lambda *_: Stream(), stream=lambda *_: contextlib.nullcontext(),
        CUDAGraph=Graph, graph=_capture,
    )  # fmt: skip


@contextlib.contextmanager
def pretended_cuda(capability, memory=16 * 2**30):
    """In the block torch has one CUDA device of this compute capability. Gives the Counts of what it does."""
    _counts.__init__()
    replaced = [(torch.cuda, name, value) for name, value in _fakes(capability, memory).items()]
    replaced += [(torch._VF, name, _recurrent(name)) for name in ("gru", "lstm")]
    with contextlib.ExitStack() as stack:
        for module, name, value in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        # to(device) cannot swap what a tensor holds.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        # torch.tensor(..., device="cuda") then copies where Watching sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(Watching())
        yield _counts
