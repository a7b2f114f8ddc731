"""Where a run computes: device, precision, memory and processes, as they are in effect."""

import contextlib
import ctypes
import functools
import gc
import os
import re
import resource
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from newllm.errors import UserError, first_line
from newllm.saving.stop import Interrupt, Stopped

STORAGE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Device, precision and the accelerate layer that applies them."""

    accelerator: Accelerator
    group: "Group"
    precision: str
    compile: bool

    @property
    def device(self):
        return self.accelerator.device

    @property
    def storage_dtype(self):
        """Type in which contexts are kept between steps: the one that a sweep computes in."""
        return STORAGE_DTYPE[self.precision]

    @property
    def memory(self):
        """Bytes that the device has."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return psutil.virtual_memory().total

    def autocast(self):
        return self.accelerator.autocast()


def open_runtime(settings):
    """The Runtime of newllm.config.MachineSettings.

    Raises:
        UserError: CUDA asked for and absent, fp16 without CUDA, or several processes that form no group.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda' but torch finds no CUDA device; use --device cpu or auto.")
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    precision = best_precision(on_cpu) if settings.precision == "auto" else settings.precision
    if precision == "fp16" and on_cpu:
        raise UserError("precision fp16 needs a CUDA device; a CPU would compute in fp32: use bf16 or fp32.")
    if on_cpu:
        keep_freed_memory()
    elif not allocator_setting():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # read at the first use of the device
    AcceleratorState._reset_state(True)  # a notebook may run main() twice with different precision
    try:
        patience = InitProcessGroupKwargs(timeout=timedelta(days=20))  # usually they give up after minutes
        mixed = "no" if precision == "fp32" else precision
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=[patience])
    except ValueError as error:  # WORLD_SIZE without the rest of what a launcher sets
        raise UserError(f"the processes cannot form a group ({error}); start them with torchrun.") from error
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started and each would train a model of its own; "
            "on CPU start them with ACCELERATE_USE_CPU=true torchrun."
        )
    if not on_cpu and settings.gpu_memory_fraction < 1:
        # Of this process's own device, which is chosen by now.
        torch.cuda.set_per_process_memory_fraction(settings.gpu_memory_fraction)
    return Runtime(accelerator, Group(accelerator), precision, settings.compile)


def best_precision(on_cpu):
    """bf16 where the hardware computes in it, fp16 on older CUDA devices, else fp32."""
    if on_cpu:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if native else "fp32"
    # Without the argument a T4 says yes, by slow emulation.
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@functools.cache  # once: what a notebook makes after its first run stays to be collected
def skip_loaded_code():
    """Leave what is imported by now out of garbage collections: it costs each of them half a second."""
    gc.collect()
    gc.freeze()


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next ones; elsewhere nothing is done.

    Each step allocates the same large blocks again. Given back to the system they come as new pages, which
    the kernel clears first: about a fifth of a step's time.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # names in malloc.h; values in mallopt(3)
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # Blocks up to this size, which is the most, come from the heap, and that is not trimmed.
        libc.mallopt(m_mmap_threshold, 32 << 20)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def allocator_setting():
    """What the environment says to torch's allocator, e.g. "PYTORCH_ALLOC_CONF=backend:native", or ""."""
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # torch takes the older where the newer is unset
    return next((f"{name}={os.environ[name]}" for name in names if os.environ.get(name)), "")


def describe_device(runtime):
    """One line: device name, its memory, precision in effect."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if runtime.device.type == "cuda":
        name = torch.cuda.get_device_name(runtime.device)
    mode = "compiled" if runtime.compile else "eager"
    return f"{name}, {runtime.memory / 2**30:.1f} GiB memory, precision {runtime.precision}, {mode}"


def memory_mb():
    """MB in use: the process's resident set; on CUDA what tensors hold and what the allocator reserved."""
    if not torch.cuda.is_initialized():
        return {"memory_mb": psutil.Process().memory_info().rss / 1e6}
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    return {"memory_mb": held / 1e6, "memory_reserved_mb": reserved / 1e6}


def peak_memory_mb():
    """Largest memory so far in MB: of the device's allocator on CUDA, else resident memory of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(OSError):  # getrusage would begin with the peak of who started this process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def gpu_utilization():
    """Per cent of the last moments in which the GPU worked, by NVML; None where nobody can say."""
    # No package for that, or a driver that refuses, is no reason to stop a run.
    with contextlib.suppress(Exception):
        if torch.cuda.is_available():
            return torch.cuda.utilization()
    return None


def compile_cost():
    """What torch.compile has cost this process: graphs made, recompilations included, and seconds."""
    from torch._dynamo import utils  # private, the only place that tells; slow to import

    seconds = utils.cumulative_time_spent_ns["entire_frame_compile"] / 1e9
    return {"compiled_graphs": utils.counters["stats"]["unique_graphs"], "compile_seconds": seconds}


@contextlib.contextmanager
def _together():
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"another process of this run has ended ({first_line(error)}): see its message, then "
            "start all of them again to continue from the last checkpoint."
        ) from None


class Group:
    """Processes that train one model. Every one has to call the collective operations, in the same order.

    A process owns the samples whose index leaves its rank as the remainder of the number of processes; their
    contexts live there alone. What shapes what happens next is summed over all, or decided by the main one.

    Raises:
        UserError: by every method, when another process has ended.
    """

    def __init__(self, accelerator):
        self._accelerator = accelerator
        self.size = accelerator.num_processes
        self.rank = accelerator.process_index
        self.is_main = accelerator.is_main_process

    def owned(self, samples):
        """Which of the samples [B] are this process's own: positions, int64 [b]."""
        return (samples % self.size == self.rank).nonzero().flatten()

    @_together()
    def total(self, tensor):
        """The sum of the processes' tensors."""
        if self.size == 1:
            return tensor
        on_device = tensor.to(self._accelerator.device)  # between GPUs only what lies on them can be summed
        return self._accelerator.reduce(on_device, reduction="sum").to(tensor.device)

    def totals(self, *numbers):
        """The sums of the processes' numbers, each in double precision."""
        if self.size == 1:
            return numbers
        return self.total(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def assemble(self, rows, positions, count):
        """[count, ...] from the rows that each process has at its own positions."""
        if self.size == 1:
            return rows
        wide = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
        whole = wide.new_zeros(count, *rows.shape[1:])  # zeros added to a value leave it as it is
        whole[positions] = wide
        return self.total(whole).to(rows.dtype)

    def sum_gradients(self, parameters):
        """Make each gradient the sum of the processes'; one without samples adds nothing."""
        if self.size == 1:
            return
        counts = self.total(torch.tensor([float(p.grad is not None) for p in parameters])).tolist()
        shared = [p for p, count in zip(parameters, counts, strict=True) if count]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in shared]
        summed = self.total(torch.cat([gradient.flatten() for gradient in own]))
        for parameter, part in zip(shared, summed.split([p.numel() for p in shared]), strict=True):
            parameter.grad = part.view_as(parameter)

    @_together()
    def decided(self, value):
        """The main process's value."""
        return broadcast_object_list([value])[0]

    def by_main(self, work):
        """What work() gives the main process, None elsewhere: the others wait for its end, however long.

        Raises:
            Stopped: by all, if the main process was stopped in it.
        """
        result, reason = None, None
        if self.is_main:
            Interrupt.current.leads = True
            try:
                result = work()
            except Stopped as stop:
                reason = str(stop)
            finally:
                Interrupt.current.leads = False
        if reason := self.decided(reason):
            raise Stopped(reason)
        return result

    @_together()
    def first_reason(self, reason):
        """The reason of the first process that has one, None when none has."""
        return next(filter(None, gather_object([reason])), None)

    def require_same(self, name, value):
        """Raises UserError, on all processes, unless every one has the value of the main one."""
        (differing,) = self.totals(self.decided(value) != value)
        if differing:
            raise UserError(
                f"processes have different {name}: start all with equal settings, code and files."
            )

    @contextlib.contextmanager
    def run(self):
        """In the block only the main process prints; after an orderly end of it they part at once."""
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        with nowhere, contextlib.redirect_stdout(sys.stdout if self.is_main else nowhere):
            try:
                yield
                self._wait()
            except Stopped:
                self._wait()
                raise
            finally:
                if self.size > 1:
                    self._accelerator.end_training()

    @contextlib.contextmanager
    def main_first(self):
        """The main process of each machine goes through the block before the others, e.g. to fill a cache."""
        if not self._accelerator.is_local_main_process:
            self._wait()
        yield
        if self._accelerator.is_local_main_process:
            self._wait()

    @_together()
    def _wait(self):
        self._accelerator.wait_for_everyone()
