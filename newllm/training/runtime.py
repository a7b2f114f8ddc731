"""Where a run computes and in which precision: what is in effect, not what was asked for."""

import atexit
import contextlib
import ctypes
import functools
import logging
import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from newllm.errors import UserError
from newllm.fixed_point.solver import sequential
from newllm.training.cuda_graph import Graphed
from newllm.training.group import Group

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
STORAGE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_own_cache = []  # of compiled code, once a process has left the shared one


@dataclass(frozen=True)
class Runtime:
    """Device, precision and the accelerate layer that applies them."""

    accelerator: Accelerator
    group: Group
    precision: str
    compile: bool

    @property
    def device(self):
        return self.accelerator.device

    @property
    def storage_dtype(self):
        """Type in which contexts are kept between steps: what the sweep computes in."""
        return STORAGE_DTYPE[self.precision]

    @property
    def memory(self):
        """Bytes that the device has."""
        return memory_of(self.device)

    def autocast(self):
        return self.accelerator.autocast()


class StepFunction:
    """The model's step of F, or a baseline's pass over samples, compiled if asked for until a compiled call fails.

    Args:
        cast: function that gives `function` for the many calls of one batch, with its weights cast once.
        note: takes a line about what was survived.
    """

    def __init__(self, function, compiled, cast=None, note=print):
        self.eager, self.compiled = function, compiled
        if compiled:  # a cached graph that cannot be read is made again, after a traceback as a warning
            torch._logging.set_logs(inductor=logging.ERROR)
        self._call = torch.compile(function, dynamic=True) if compiled else function
        self._cast = cast or (lambda: function)
        self._graphed = Graphed(self._steps, lambda tokens, start: self._steps(tokens[:, :1], start), note)

    def __call__(self, *inputs):
        return self._call(*inputs)

    def contexts(self, context, token):
        """The step without its token stream."""
        return self._call(context, token, stream=False)

    def trajectory(self, tokens_BTE, start_BC):
        """Contexts [B, T, C] step by step from a start, without gradient: on CUDA replayed as one graph."""
        with torch.no_grad():
            if tokens_BTE.is_cuda:
                return self._graphed(tokens_BTE, start_BC)
            return sequential(self.contexts, tokens_BTE, start_BC.shape[-1], start_BC)[0]

    def survive(self, where, reason):
        """After a compiled call failed: compile anew in an empty cache, or compute as written where that was tried.

        Returns:
            A line that says so. A killed run leaves files in the shared cache that cannot be loaded.
        """
        remedy = "going on without it"
        if shared := leave_shared_cache():
            self._call = torch.compile(self.eager, dynamic=True)
            remedy = f"once more in an empty cache (if this comes again, delete {shared}: a killed run leaves damaged files)"
        else:
            self.fall_back()
        return f"warning: torch.compile failed at {where} ({reason}); {remedy}"

    def for_batch(self):
        """The step for all calls of one batch, under one autocast."""
        return self._call if self.compiled else self._cast()

    def forget(self):
        """Drop the recorded graphs, and the memory that they keep."""
        self._graphed.forget()

    def _steps(self, tokens_BTE, start_BC):
        # Of the step as written: a compiled one would convert the weights to the compute type at every step, not once.
        step = functools.partial(self._cast(), stream=False)
        return sequential(step, tokens_BTE, start_BC.shape[-1], start_BC)[0]

    def fall_back(self):
        """Compute as written from now on; the model itself was never changed."""
        self._call, self.compiled = self.eager, False
        self.forget()


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next ones instead of giving it back to the system.

    Every step allocates the same large blocks again; given back, each comes as new pages that the kernel clears first,
    about a fifth of a step's time. On other systems nothing is done.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # names in malloc.h; values in mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(
            m_mmap_threshold, 32 << 20
        )  # the most it takes: up to this size blocks come from the heap,
        libc.mallopt(m_trim_threshold, 2**31 - 1)  # which is not trimmed


def reason_of(error):
    """The first line that says something: torch puts the name of its backend before the error of it."""
    error = getattr(error, "inner_exception", error)
    return f"{type(error).__name__}: {next(filter(None, str(error).splitlines()), 'no reason given')}"


def leave_shared_cache():
    """Give torch's compiler an empty cache until the process ends; returns the folder of the one before, at the first call."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.utils import fresh_cache  # private; the environment alone leaves loaded code in use

    if _own_cache:
        return None
    shared = cache_dir()
    torch.compiler.reset()
    _own_cache.append(fresh_cache())
    _own_cache[0].__enter__()
    atexit.register(_own_cache[0].__exit__, None, None, None)
    return shared


def compile_cost():
    """What torch.compile has cost this process: graphs made (recompilations included) and seconds spent on them."""
    from torch._dynamo import (
        utils,
    )  # private, the only place that tells; slow to import, so only where it was used

    seconds = utils.cumulative_time_spent_ns["entire_frame_compile"] / 1e9
    return {"compiled_graphs": utils.counters["stats"]["unique_graphs"], "compile_seconds": seconds}


def open_runtime(config):
    """Resolve `device`, `precision` and `compile` of the configuration.

    Raises:
        UserError: CUDA asked for and absent, fp16 without CUDA, or several processes started without a common group.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda' but torch finds no CUDA device; use --device cpu or auto.")
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if not on_cpu and not allocator_setting():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read at the first use of the device
    precision = best_precision(on_cpu) if config.precision == "auto" else config.precision
    if precision == "fp16" and on_cpu:
        raise UserError(
            "precision fp16 needs a CUDA device (a CPU would silently compute in fp32); use bf16 or fp32."
        )
    if on_cpu:
        keep_freed_memory()
    AcceleratorState._reset_state(True)  # a notebook may run main() twice with different precision
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=MIXED_PRECISION[precision])
    except ValueError as error:  # WORLD_SIZE without the rest of what a launcher sets
        raise UserError(f"the processes cannot form a group ({error}); start them with torchrun.") from error
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started but they form {accelerator.num_processes} group(s) of one and would train "
            "independently; on CPU start them with ACCELERATE_USE_CPU=true torchrun."
        )
    if not on_cpu and config.gpu_memory_fraction < 1:
        torch.cuda.set_per_process_memory_fraction(
            config.gpu_memory_fraction
        )  # of this process's own device, chosen by now
    return Runtime(accelerator, Group(accelerator), precision, config.compile)


def allocator_setting():
    """What the environment says to torch's allocator of device memory, e.g. "PYTORCH_ALLOC_CONF=expandable_segments:True", or ""."""
    names = (
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
    )  # torch takes the older name where the newer is not set
    return next((f"{name}={os.environ[name]}" for name in names if os.environ.get(name)), "")


def best_precision(on_cpu):
    """bf16 where the hardware computes in it, fp16 on older CUDA devices, else fp32."""
    if on_cpu:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "fp32"
    # Without the argument a T4 says yes, by slow emulation.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def describe_device(runtime):
    """One line: device name, its memory, precision in effect."""
    if runtime.device.type == "cuda":
        properties = torch.cuda.get_device_properties(runtime.device)
        name, memory = properties.name, properties.total_memory
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mode = "compiled" if runtime.compile else "eager"
    return f"{name}, {memory / 2**30:.1f} GiB memory, precision {runtime.precision}, {mode}"


def memory_of(device):
    """Bytes that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_mb():
    """Memory in use now, in MB: the process's resident set; on CUDA what tensors hold and what the allocator reserved."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {
            "memory_mb": torch.cuda.memory_allocated() / 1e6,
            "memory_reserved_mb": torch.cuda.memory_reserved() / 1e6,
        }
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return {"memory_mb": None}
    return {"memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6}


def gpu_utilization():
    """Per cent of the last moments in which the GPU worked, as NVML tells; None without a GPU or the package for that."""
    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.utilization()
    except Exception:  # the package or the driver's library is not there, or refuses: no reason to stop a run
        return None


def peak_memory_mb():
    """Largest memory so far in MB: of the device's allocator on CUDA, else resident memory of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(
        OSError
    ):  # getrusage would begin with the peak of the process that started this one
        return (
            int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
            * 1024
            / 1e6
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
