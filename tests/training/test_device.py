"""Device and precision: what is in effect is what was asked for, or a sentence says why not."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState

from config import ResidualConfig
from newllm.errors import UserError
from newllm.training import runtime as device
from newllm.training.runtime import (
    allocator_setting,
    describe_device,
    memory_mb,
    open_runtime,
    peak_memory_mb,
)

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION")
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def alone():
    """One process; what accelerate keeps, in its state and in the environment, is gone afterwards."""
    others = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    with mock.patch.dict(os.environ, others, clear=True):
        yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def opened(monkeypatch):
    """Arguments that open_runtime gives accelerate, which opens nothing."""
    given = []

    def accelerator(**options):
        given.append({name: value for name, value in options.items() if name != "kwargs_handlers"})
        where = torch.device("cpu" if options["cpu"] else "cuda")
        return SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=where)

    monkeypatch.setattr(device, "Accelerator", accelerator)
    return given


def pretend(monkeypatch, capability=None, avx512=False, amx=False):
    """A CUDA device of the capability, which emulates bf16 where it has none, or none; and a CPU."""
    cuda = dict(
        is_available=lambda: capability is not None,
        current_device=lambda: 0,
        get_device_properties=lambda *_: SimpleNamespace(major=capability),
        get_device_capability=lambda *_: (capability, 5),
        _check_bf16_tensor_supported=lambda _: True,
    )
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def config(**changes):
    return ResidualConfig(**dict(device="cpu", precision="fp32") | changes)


@pytest.mark.parametrize(
    ("settings", "environment", "says"),
    [
        (dict(precision="fp16"), {}, "fp16 needs a CUDA device"),
        (dict(device="auto", precision="fp16"), {}, "fp16 needs a CUDA device"),
        (dict(device="cuda"), {}, "--device cpu"),
        # Set by a cluster, and train.py started by hand: nobody to meet. Threads, or accelerate sets them.
        (dict(), dict(WORLD_SIZE="2", OMP_NUM_THREADS="1"), "cannot form a group"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(monkeypatch, settings, environment, says):
    """In a sentence: a CPU would compute fp16 in fp32, and CUDA asked for is not replaced by the CPU."""
    pretend(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says) as caught:
        open_runtime(config(**settings))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_processes_without_a_common_group_are_refused(monkeypatch, opened):
    """Each would train a model of its own; one process of one is no group to form."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"8 processes were started.*torchrun"):
        open_runtime(config())
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert open_runtime(config()).group.size == 1


@pytest.mark.parametrize(
    ("capability", "cpu", "settings", "expected"),
    [
        (6, {}, {}, ("cuda", "fp16")),
        (7, {}, {}, ("cuda", "fp16")),  # a T4 (7.5), which emulates bf16, slowly
        (8, {}, {}, ("cuda", "bf16")),
        (12, {}, {}, ("cuda", "bf16")),
        (None, dict(avx512=True), {}, ("cpu", "bf16")),
        (None, dict(amx=True), {}, ("cpu", "bf16")),
        (9, {}, dict(device="cpu"), ("cpu", "fp32")),
        *((7, {}, dict(device="cuda", precision=precision), ("cuda", precision)) for precision in DTYPE),
    ],
    ids=str,
)
def test_the_device_and_precision_in_effect(monkeypatch, opened, capability, cpu, settings, expected):
    """By default the GPU, and what the hardware computes in; what is asked for is taken, beside a GPU too."""
    pretend(monkeypatch, capability, **cpu)
    assert torch.cuda.is_bf16_supported() == (capability is not None)  # with emulation every device says yes
    runtime = open_runtime(config(**dict(device="auto", precision="auto") | settings))
    place, precision = expected
    assert (runtime.device.type, runtime.precision, runtime.storage_dtype) == (*expected, DTYPE[precision])
    mixed = "no" if precision == "fp32" else precision
    assert opened == [dict(cpu=place == "cpu", mixed_precision=mixed)]


def test_two_runs_in_one_process_have_each_their_own_precision():
    """A notebook runs main() twice: accelerate's shared state must not keep the first one's."""
    for precision in ("fp32", "bf16", "fp32"):
        runtime = open_runtime(config(precision=precision))
        with runtime.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == runtime.storage_dtype == DTYPE[precision]
        assert runtime.device.type == "cpu" and runtime.accelerator.scaler is None


def test_the_description_is_one_line_of_what_is_in_effect():
    """Device, memory, precision, compiled or not."""
    line = describe_device(open_runtime(config(precision="bf16")))
    assert line.startswith("CPU, ") and "GiB memory" in line and line.endswith("precision bf16, eager")
    assert describe_device(open_runtime(config(compile=True))).endswith("precision fp32, compiled")


def test_the_share_of_the_gpu_is_a_limit_of_the_chosen_device(monkeypatch, opened):
    """And the allocator grows its segments, unless the user said otherwise, by the older name too."""
    pretend(monkeypatch, 8)
    limits = []

    def limit(share):
        assert len(opened) == 2  # a process of several has its device by then
        limits.append(share)

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert allocator_setting() == ""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    open_runtime(config(device="auto"))
    assert not limits and allocator_setting() == "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    open_runtime(config(device="auto", gpu_memory_fraction=0.85))
    assert limits == [0.85] and allocator_setting() == "PYTORCH_ALLOC_CONF=expandable_segments:True"


FAULTS = """
import resource, torch
from newllm.training.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [torch.ones(2_000_000) for _ in range(8)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_new_pages():
    """64 MB taken and given back again and again: tens of thousands of page faults, next to none if kept."""
    printed = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    ).stdout
    by_default, kept = map(int, printed.split())
    assert kept < 100
    if not by_default:
        pytest.skip("this kernel counts no page faults, or keeps freed memory by itself")
    assert by_default > 1000


def test_memory_is_that_of_the_process(monkeypatch):
    """In MB: a tensor of 80 MB shows; the peak is a high-water mark."""
    pretend(monkeypatch)
    before, peak = memory_mb()["memory_mb"], peak_memory_mb()
    held = torch.ones(20_000_000)
    assert 60 < memory_mb()["memory_mb"] - before < 120
    del held
    assert 50 < peak <= peak_memory_mb()
