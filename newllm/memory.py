"""When memory runs out: recognise it, give back what can be given back, do the work in smaller parts."""

import contextlib
import ctypes

import torch
from accelerate.utils.memory import clear_device_cache

# Drivers and libraries say it in words, of which accelerate's should_reduce_batch_size knows fewer.
NO_MEMORY = "out of memory", "_alloc_failed", "not enough memory", "defaultcpuallocator", "memory allocation"


def is_out_of_memory(error):
    """Whether an exception says that the device or the machine has no memory left."""
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def free_memory():
    """Give unreferenced tensors and the allocator's cache back. Slow: between phases, after failures."""
    clear_device_cache(garbage_collection=True)
    trim()


def trim():
    """Give the machine what is freed; glibc keeps it until it is told. Some 20 ms a gigabyte."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def split(count, parts):
    """`count` rows as at most `parts` consecutive slices of nearly equal length."""
    parts = min(parts, count)
    return [slice(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def map_parts(work, count, size):
    """[work(slice), ...] over `count` rows, `size` at a time; from where memory runs out, half as many."""
    results, start = [], 0
    while start < count:
        part = slice(start, min(start + size, count))
        try:
            results.append(work(part))
            start = part.stop
            continue
        except Exception as error:
            if not is_out_of_memory(error) or size == 1:
                raise
        free_memory()  # only here: inside `except` the traceback keeps the failed attempt's tensors alive
        size = (size + 1) // 2
    return results
