"""The processes that train one model together, through accelerate: who owns which samples, what is summed, who decides.

A process owns the samples whose index leaves its rank as the remainder of the number of processes; their contexts live there
and nowhere else. Everything that shapes what happens next is summed over all processes or decided by the main one, so that
all go the same way. With one process nothing here does anything.
"""

import contextlib
import os
import sys

import torch
from accelerate.utils import broadcast_object_list, gather_object

from newllm.errors import UserError
from newllm.saving.stop import Stopped


class Group:
    """Collective operations: every process has to call them, in the same order.

    Args:
        accelerator: accelerate.Accelerator.

    Raises:
        UserError: by every method, when another process has ended.
    """

    def __init__(self, accelerator):
        self._accelerator = accelerator
        self.size, self.rank, self.is_main = (
            accelerator.num_processes,
            accelerator.process_index,
            accelerator.is_main_process,
        )

    def owned(self, samples):
        """Which of the samples [B] are this process's own: positions, int64 [b]."""
        return (samples % self.size == self.rank).nonzero().flatten()

    def owned_of(self, count):
        """This process's own of the samples 0 ... count - 1: int64 [b]."""
        return torch.arange(self.rank, count, self.size)

    def total(self, tensor):
        """The sum of the processes' tensors."""
        if self.size == 1:
            return tensor
        with _together():  # between GPUs only what lies on them can be summed
            return self._accelerator.reduce(tensor.to(self._accelerator.device), reduction="sum").to(
                tensor.device
            )

    def totals(self, *numbers):
        """The sums of the processes' numbers, each in double precision."""
        if self.size == 1:
            return numbers
        return self.total(
            torch.tensor(numbers, dtype=torch.float64, device=self._accelerator.device)
        ).tolist()

    def assemble(self, rows, positions, count):
        """[count, ...] from the rows that each process has at its own positions."""
        if self.size == 1:
            return rows
        half = rows.dtype in (torch.bfloat16, torch.float16)
        wide = rows.float() if half else rows  # zeros added to a value leave it as it is
        whole = wide.new_zeros(count, *rows.shape[1:])
        whole[positions] = wide
        return self.total(whole).to(rows.dtype)

    def sum_gradients(self, parameters):
        """Replace each gradient by the sum of the processes', in one message; a process without samples adds nothing."""
        if self.size == 1:
            return
        has = self.total(
            torch.tensor([float(p.grad is not None) for p in parameters], device=self._accelerator.device)
        )
        shared = [p for p, count in zip(parameters, has.tolist(), strict=True) if count]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in shared])
        for parameter, part in zip(shared, self.total(flat).split([p.numel() for p in shared]), strict=True):
            parameter.grad = part.view_as(parameter)

    def decided(self, value):
        """The main process's value."""
        if self.size == 1:
            return value
        with _together():
            return broadcast_object_list([value])[0]

    def first_reason(self, reason):
        """The reason of the first process that has one, None when none has."""
        if self.size == 1:
            return reason
        with _together():
            return next((each for each in gather_object([reason]) if each), None)

    def require_same(self, name, value):
        """Raises UserError, on all processes, unless every one has the value of the main one."""
        differing = self.totals(self.decided(value) != value)
        if differing[0]:
            raise UserError(
                f"the processes have different {name}: start all of them with the same settings, code and files."
            )

    @contextlib.contextmanager
    def run(self):
        """In the block only the main process prints; at its end the processes part, after an orderly one all at once."""
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(sys.stdout if self.is_main else nowhere),
        ):
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

    def _wait(self):
        if self.size > 1:
            with _together():
                self._accelerator.wait_for_everyone()


@contextlib.contextmanager
def _together():
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"another process of this run has ended ({str(error).splitlines()[0]}): see its message, then start all of them "
            "again to continue from the last checkpoint."
        ) from None
