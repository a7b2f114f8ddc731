"""Device and precision: what is in effect is what was asked for, or a sentence says why not."""

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from config import ResidualConfig
from newllm.errors import UserError
from newllm.training import runtime as device
from newllm.training.runtime import (
    StepFunction,
    allocator_setting,
    best_precision,
    describe_device,
    memory_mb,
    open_runtime,
    peak_memory_mb,
)


@pytest.fixture(autouse=True)
def alone():
    """One process; what accelerate keeps, in its state and in the environment, is gone afterwards."""
    environment = dict(os.environ)
    for name in (
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "ACCELERATE_MIXED_PRECISION",
    ):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(environment)
    AcceleratorState._reset_state(True)


@pytest.fixture
def opened(monkeypatch):
    """Arguments that open_runtime gives accelerate, which opens nothing."""
    given = []

    def accelerator(**options):
        given.append(options)
        return SimpleNamespace(
            num_processes=1,
            process_index=0,
            is_main_process=True,
            device=torch.device("cpu" if options["cpu"] else "cuda"),
        )

    monkeypatch.setattr(device, "Accelerator", accelerator)
    return given


def pretend_cuda(monkeypatch, capability):
    """A CUDA device of the capability, which like all emulates bf16 where it has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(major=capability))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (capability, 5))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)


def pretend_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pretend_cpu(monkeypatch, avx512=False, amx=False):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def config(**changes):
    return ResidualConfig(**dict(device="cpu", precision="fp32") | changes)


def sentence(**changes):
    with pytest.raises(UserError) as caught:
        open_runtime(config(**changes))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


# Refusals


def test_fp16_on_a_cpu_is_refused(monkeypatch):
    """It would silently compute in fp32."""
    assert "fp16" in sentence(precision="fp16")
    pretend_no_cuda(monkeypatch)
    assert "fp16" in sentence(device="auto", precision="fp16")


def test_cuda_that_is_not_there_is_refused(monkeypatch):
    """Asked for by name, it is not replaced by the CPU."""
    pretend_no_cuda(monkeypatch)
    assert "--device cpu" in sentence(device="cuda")


@pytest.mark.parametrize("started", [2, 8])
def test_processes_without_a_common_group_are_refused(monkeypatch, opened, started):
    """Each would train a model of its own."""
    monkeypatch.setenv("WORLD_SIZE", str(started))
    message = sentence()
    assert f"{started} processes" in message and "torchrun" in message


def test_a_world_size_without_an_address_is_refused(monkeypatch):
    """WORLD_SIZE set by a cluster, python3 train.py started by hand: nobody to meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or accelerate sets the threads of this process
    sentence()


def test_one_process_of_one_is_not_refused(monkeypatch):
    """WORLD_SIZE of 1 is no group to form."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert open_runtime(config()).accelerator.num_processes == 1


# Resolution


@pytest.mark.parametrize(
    ("capability", "expected"), [(6, "fp16"), (7, "fp16"), (8, "bf16"), (9, "bf16"), (12, "bf16")]
)
def test_cuda_precision_is_what_the_hardware_computes_in(monkeypatch, capability, expected):
    """A T4 (7.5) emulates bf16, slowly, so it gets fp16."""
    pretend_cuda(monkeypatch, capability)
    assert torch.cuda.is_bf16_supported()  # the trap: with emulation every device says yes
    assert best_precision(on_cpu=False) == expected


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"), [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")]
)
def test_cpu_precision_is_what_the_hardware_computes_in(monkeypatch, avx512, amx, expected):
    """bf16 where there are instructions for it, fp32 elsewhere, whatever GPU stands beside it."""
    pretend_cuda(monkeypatch, 7)
    pretend_cpu(monkeypatch, avx512, amx)
    assert best_precision(on_cpu=True) == expected


def test_auto_takes_the_gpu_and_its_precision(monkeypatch, opened):
    """On a T4: CUDA, fp16, contexts stored in fp16."""
    pretend_cuda(monkeypatch, 7)
    runtime = open_runtime(config(device="auto", precision="auto"))
    assert opened == [dict(cpu=False, mixed_precision="fp16")]
    assert (runtime.precision, runtime.storage_dtype, runtime.device.type) == ("fp16", torch.float16, "cuda")


def test_auto_without_a_gpu_is_the_cpu(monkeypatch, opened):
    """With the precision of the CPU."""
    pretend_no_cuda(monkeypatch)
    pretend_cpu(monkeypatch, avx512=True)
    runtime = open_runtime(config(device="auto", precision="auto"))
    assert opened == [dict(cpu=True, mixed_precision="bf16")]
    assert (runtime.precision, runtime.storage_dtype, runtime.device.type) == ("bf16", torch.bfloat16, "cpu")


def test_a_cpu_asked_for_is_taken_beside_a_gpu(monkeypatch, opened):
    """device = "cpu" does not touch CUDA."""
    pretend_cuda(monkeypatch, 9)
    pretend_cpu(monkeypatch)
    assert open_runtime(config(precision="auto")).precision == "fp32"
    assert opened == [dict(cpu=True, mixed_precision="no")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_precision_asked_for_is_taken(monkeypatch, opened, precision):
    """Nothing is second-guessed on a device that can do it."""
    pretend_cuda(monkeypatch, 7)
    assert open_runtime(config(device="cuda", precision=precision)).precision == precision


# In effect


def product_dtype(runtime):
    with runtime.autocast():
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_two_runs_in_one_process_have_each_their_own_precision():
    """A notebook runs main() twice: accelerate's shared state must not keep the first one's."""
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for precision in ("fp32", "bf16", "fp32"):
        runtime = open_runtime(config(precision=precision))
        assert runtime.precision == precision and runtime.storage_dtype == expected[precision]
        assert product_dtype(runtime) == expected[precision]
        assert runtime.device.type == "cpu" and runtime.accelerator.scaler is None


def test_the_description_is_one_line_of_what_is_in_effect():
    """Device, memory, precision, compiled or not."""
    line = describe_device(open_runtime(config(precision="bf16")))
    assert "\n" not in line
    assert line.startswith("CPU, ") and "GiB memory" in line and line.endswith("precision bf16, eager")
    assert describe_device(open_runtime(config(compile=True))).endswith("precision fp32, compiled")


def test_a_step_function_is_compiled_until_it_falls_back(monkeypatch):
    """Then it is the model's own again, and says so."""
    model = SimpleNamespace(step=lambda context, token, stream=True: (context, token))
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: lambda context, token, stream=True: "compiled"
    )
    step = StepFunction(model.step, True)
    assert step.compiled and step(1, 2) == "compiled"
    step.fall_back()
    assert not step.compiled and step(1, 2) == (1, 2)
    assert StepFunction(model.step, False)(1, 2) == (1, 2)


def test_the_share_of_the_gpu_is_a_limit_set_before_it_is_used(monkeypatch):
    """And the allocator is told to grow its segments, unless the user said otherwise."""
    pretend_cuda(monkeypatch, 8)
    limits = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    open_runtime(config(device="auto", gpu_memory_fraction=0.85))
    assert limits == [0.85] and os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:512")
    open_runtime(config(device="auto"))
    assert limits == [0.85] and os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:512"


def test_the_allocator_s_older_variable_counts(monkeypatch):
    """What the user set there is kept, not overridden by the newer name."""
    pretend_cuda(monkeypatch, 8)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    open_runtime(config(device="auto"))
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    assert allocator_setting() == "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:512"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    assert allocator_setting() == ""


FAULTS = """
import resource, torch
from newllm.training.runtime import keep_freed_memory
if {keep}:
    keep_freed_memory()
def use():
    for _ in range(5):
        blocks = [torch.ones(2_000_000) for _ in range(8)]
        del blocks
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_new_pages():
    """64 MB taken and given back again and again: tens of thousands of page faults by default, next to none if kept."""
    faults = {}
    for keep in (True, False):
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        faults[keep] = int(printed)
    assert faults[True] < 100
    if not faults[False]:
        pytest.skip("this kernel counts no page faults, or keeps freed memory by itself")
    assert faults[False] > 1000


def test_memory_in_use_is_that_of_the_process():
    """In MB: a tensor of 80 MB shows."""
    before = memory_mb()["memory_mb"]
    held = torch.ones(20_000_000)
    assert 60 < memory_mb()["memory_mb"] - before < 120
    del held


def test_peak_memory_never_falls(monkeypatch):
    """It is a high-water mark in MB, of a process that has torch loaded."""
    pretend_no_cuda(monkeypatch)
    first = peak_memory_mb()
    assert 50 < first <= peak_memory_mb()
