"""One optimizer step that survives a lack of memory and a failing compiler, and is never taken on a NaN."""

import math

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from newllm.errors import UserError
from newllm.memory import free_memory, is_out_of_memory, split
from newllm.saving.stop import Stopped
from newllm.training.runtime import reason_of

SMALLEST_SCALE = 2.0**-10  # an fp16 loss scale this small is no overflow of the scale any more


class OptimizerStep:
    """Gradients, clipping and step of one batch after the other.

    A batch that does not fit into memory is done again in twice as many parts (micro-batches) whose gradients add up to
    those of the whole batch; a compiled step that fails is done again uncompiled. Both begin anew from the same random
    state, before any parameter has changed.

    Args:
        runtime: device, precision and accelerate layer. optimizer: as accelerate prepared it.
        step: the StepFunction in use. max_norm: largest gradient norm.
        note: takes a line about what was survived.
    """

    def __init__(self, runtime, optimizer, step, max_norm, note):
        self.runtime, self.optimizer, self.step, self.max_norm, self.note = (
            runtime,
            optimizer,
            step,
            max_norm,
            note,
        )

    def __call__(self, gradients, count, state, seed, where):
        """Take the step.

        Args:
            gradients: function of a list of slices of these; adds up the gradients and returns (loss of the whole batch,
                a number or a scalar on the device, anything).
            count: samples of the batch that this process owns.
            state: the stage's state: `parts` is read and may grow, `skipped` and `grad_norm` are written.
            seed: of everything random within the step. where: for messages.

        Returns:
            What `gradients` returned, the loss as a number.

        Raises:
            UserError: loss or gradient is not finite, with no parameter touched; or a single sample does not fit.
        """
        done = None
        while done is None:
            torch.manual_seed(seed + self.runtime.group.rank)
            self.optimizer.zero_grad()
            try:
                done = gradients(split(count, state["parts"]))
            except (UserError, Stopped):
                raise
            except Exception as error:
                memory = is_out_of_memory(error)
                if not memory and not self.step.compiled:
                    raise
                reason = reason_of(error)
            if (
                done is None
            ):  # out here: inside `except` the traceback keeps the failed attempt's tensors alive
                self._change_plan(memory, reason, count, state, where)
        return self._update(done[0], state, where), *done[1:]

    def _change_plan(self, memory, reason, count, state, where):
        self.optimizer.zero_grad()
        self.step.forget()
        free_memory()
        if self.runtime.group.size > 1:  # the others are elsewhere in the batch and cannot begin it again
            remedy = (
                "use a smaller phase1_batch_size or phase2_batch_size"
                if memory
                else "train with --no_compile"
            )
            raise UserError(f"{reason} at {where}: {remedy}, or fewer processes.")
        if not memory:
            self.note(self.step.survive(where, reason))
        elif state["parts"] < count:
            state["parts"] *= 2
            size = math.ceil(count / state["parts"])
            self.note(
                f"warning: out of memory at {where}: {size} samples at a time from now on, {count} a step as before"
            )
        else:
            raise UserError(
                f"not even one sample fits into memory at {where}: use a smaller model or max_seq_length."
            )

    def _update(self, loss, state, where):
        accelerator = self.runtime.accelerator
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.runtime.group.sum_gradients(parameters)
        accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = any(gradient.is_cuda for gradient in gradients) or None  # one launch for all tensors
        total = get_total_norm(gradients, foreach=together)
        loss = torch.as_tensor(loss, dtype=torch.float64, device=total.device)
        loss, norm = torch.stack(
            [loss, total.double()]
        ).tolist()  # the one time that a step waits for the device
        state["grad_norm"] = norm
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at {where}: stopped before the step; lower the learning rate."
            )
        if norm > self.max_norm:  # else every gradient would be read and written to be multiplied by one
            clip_grads_with_norm_(parameters, self.max_norm, total, foreach=together)
        scaler = accelerator.scaler  # fp16: the scaler leaves such a step out and lowers its scale
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < SMALLEST_SCALE):
            raise UserError(
                f"the gradient is {norm} at {where}: stopped before the step; lower the learning rate."
            )
        try:
            self.optimizer.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory while the parameters were updated at {where}, so their state is not whole: run again to "
                "continue from the last checkpoint, with a smaller model if it happens again."
            ) from None
        state["skipped"] += not math.isfinite(norm)
        return loss
