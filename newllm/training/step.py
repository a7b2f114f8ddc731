"""AdamW, and one step of it that survives a lack of memory and a failing compiler, and none on a NaN."""

import math
from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from newllm.errors import UserError
from newllm.memory import free_memory, is_out_of_memory, split
from newllm.saving.stop import Stopped
from newllm.training.step_function import reason_of

# A shorter memory of squared gradients than the default: runs here take tens to hundreds of steps.
BETAS = (0.9, 0.98)
SMALLEST_SCALE = 2.0**-10  # an fp16 loss scale this small is no overflow of the scale any more


@dataclass(frozen=True)
class Batch:
    """The samples of one step, B of them, and the rows of those b that this process owns."""

    samples: torch.Tensor  # their numbers, int64 [B]
    own: torch.Tensor  # positions among them, int64 [b]
    ids: torch.Tensor  # token ids on the device, int64 [b, T+1]
    epoch: int  # complete passes before this one
    ends_epoch: bool

    @property
    def own_samples(self):
        return self.samples[self.own]


class OptimizerStep:
    """Gradients, clipping and step of one batch after the other.

    A batch that does not fit into memory is done again in twice as many parts (micro-batches) whose gradients
    add up to those of the whole batch; a compiled step that fails is done again uncompiled. Both begin anew
    from the same random state, before any parameter has changed.

    Args:
        optimizer: as accelerate prepared it. step: the StepFunction in use. max_norm: largest gradient norm.
        note: takes a line about what was survived.
    """

    def __init__(self, runtime, optimizer, step, max_norm, note):
        self.runtime = runtime
        self.optimizer = optimizer
        self.step = step
        self.max_norm = max_norm
        self.note = note

    def __call__(self, gradients, count, state, seed, where):
        """Take the step.

        Args:
            gradients: function of a list of slices of the batch that adds up the gradients and returns (loss
                of the whole batch, a number or a scalar on the device, anything).
            count: samples of the batch that this process owns.
            state: the stage's: `parts` is read and may grow, `skipped` and `grad_norm` are written.
            seed: of everything random within the step. where: for messages.

        Returns:
            What `gradients` returned, the loss as a number.

        Raises:
            UserError: loss or gradient is not finite, or a single sample does not fit; no parameter is
                touched.
        """
        done = None
        # On a CPU its own generator alone: torch would note a traceback for devices to come, a millisecond.
        random = torch if self.runtime.device.type == "cuda" else torch.default_generator
        while done is None:
            random.manual_seed(seed + self.runtime.group.rank)
            self.optimizer.zero_grad()
            try:
                done = gradients(split(count, state.parts))
            except (UserError, Stopped):
                raise
            except Exception as error:
                memory = is_out_of_memory(error)
                if not memory and not self.step.compiled:
                    raise
                reason = reason_of(error)
            if done is None:
                # Out here: inside `except` the traceback keeps the failed attempt's tensors alive.
                self._change_plan(memory, reason, count, state, where)
        return self._update(done[0], state, where), *done[1:]

    def _change_plan(self, memory, reason, count, state, where):
        """After a lack of memory smaller parts, else nothing of the compiler; the batch begins anew."""
        self.optimizer.zero_grad()
        self.step.graphs.forget()
        free_memory()
        if self.runtime.group.size > 1:  # the others are elsewhere in the batch and cannot begin it again
            remedy = "smaller batches" if memory else "--no-compile"
            raise UserError(f"{reason} at {where}: train with {remedy}, or fewer processes.")
        if not memory:
            self.note(self.step.survive(where, reason))
            return
        if state.parts >= count:
            remedy = "use a smaller model or max_seq_length"
            raise UserError(f"not even one sample fits into memory at {where}: {remedy}.")
        state.parts *= 2
        size = math.ceil(count / state.parts)
        self.note(
            f"warning: out of memory at {where}: {size} samples at a time from now on, "
            f"{count} a step as before"
        )

    def _update(self, loss, state, where):
        """Clip the gradients and step on them, if all is finite; the loss as a number."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.runtime.group.sum_gradients(parameters)
        self.runtime.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = any(gradient.is_cuda for gradient in gradients) or None  # one launch for all tensors
        total = get_total_norm(gradients, foreach=together)
        loss = torch.as_tensor(loss, dtype=torch.float64, device=total.device)
        # The one time that a step waits for the device.
        loss, norm = torch.stack([loss, total.double()]).tolist()
        state.grad_norm = norm
        if not math.isfinite(norm):
            state.skipped += 1
        if not math.isfinite(loss) or (not math.isfinite(norm) and not self._skips()):
            name, value = ("gradient", norm) if math.isfinite(loss) else ("loss", loss)
            raise UserError(f"the {name} is {value} at {where}: stopped before it; lower the learning rate.")
        if norm > self.max_norm:  # else every gradient would be read and written to be multiplied by one
            clip_grads_with_norm_(parameters, self.max_norm, total, foreach=together)
        try:
            self.optimizer.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory while the parameters were updated at {where}: run again to continue from the "
                "last checkpoint, with a smaller model if it happens again."
            ) from None
        return loss

    def _skips(self):
        """Whether there is an fp16 scaler, which leaves such a step out and lowers its scale."""
        scaler = self.runtime.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= SMALLEST_SCALE


def make_optimizer(parts, learning_rate, weight_decay):
    """AdamW over groups; matrices decay, vectors (biases, norms) do not.

    Args:
        parts: list of (parameters, learning-rate scale).
    """
    groups = []
    for parameters, scale in parts:
        rate = learning_rate * scale
        trained = [p for p in parameters if p.requires_grad]
        matrices = [p for p in trained if p.dim() > 1]
        vectors = [p for p in trained if p.dim() <= 1]
        groups.append(dict(params=matrices, lr=rate, peak_lr=rate, weight_decay=weight_decay))
        groups.append(dict(params=vectors, lr=rate, peak_lr=rate, weight_decay=0.0))
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=BETAS, fused=True)


def prepare_optimizer(runtime, optimizer, saved):
    """Give the optimizer to accelerate, with its moments and the fp16 scaler as saved, and today's settings.

    Args:
        saved: what `optimizer_state` returned in an earlier session; None at the start of a stage.
    """
    saved = saved or {}
    if saved:
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved["optimizer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group |= own  # the saved ones would silently outlive a changed learning rate or weight decay
    scaler = runtime.accelerator.scaler
    if scaler:  # one per process: without this a stage would inherit the last one's scale
        fresh = torch.amp.GradScaler(runtime.device.type)
        scaler.load_state_dict(saved.get("scaler") or fresh.state_dict())
    return runtime.accelerator.prepare(optimizer)


def optimizer_state(runtime, optimizer):
    """State dicts of the optimizer and of the fp16 scaler (None in other precisions)."""
    scaler = runtime.accelerator.scaler
    return {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}


def warmup_cosine(step, total_steps, warmup_ratio):
    """Learning-rate factor of step 0 ... total_steps - 1: linear warm-up, then half a cosine to zero."""
    warmup = warmup_ratio * total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total_steps - warmup)))


def set_learning_rate(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
