"""AdamW with decay groups, the learning-rate schedule, and the one place where an optimizer step is taken."""

import math

import torch

from newllm.errors import UserError

SMALLEST_SCALE = 2.0**-10  # an fp16 loss scale this small is no overflow of the scale any more
BETAS = (0.9, 0.98)  # a shorter memory of squared gradients than the default: runs here take tens to hundreds of steps


def make_optimizer(parts, learning_rate, weight_decay):
    """AdamW over groups; matrices decay, vectors (biases, norms) do not.

    Args:
        parts: list of (parameters, learning-rate scale).
    """
    groups = []
    for parameters, scale in parts:
        for decays in (True, False):
            members = [p for p in parameters if p.requires_grad and (p.dim() > 1) == decays]
            decay = weight_decay if decays else 0.0
            groups.append(dict(params=members, lr=learning_rate * scale, weight_decay=decay))
    groups = [dict(group, peak_lr=group["lr"]) for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=BETAS)


def warmup_cosine(step, total_steps, warmup_ratio):
    """Learning-rate factor of step 0 ... total_steps - 1: linear warm-up, then half a cosine to zero."""
    warmup = warmup_ratio * total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total_steps - warmup)))


def set_learning_rate(optimizer, factor):
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def take_step(runtime, optimizer, loss, max_norm, where):
    """Backward, clip and step; a step is taken, or the run stops, or fp16 says that it was not.

    Returns:
        Gradient norm before clipping; not finite when fp16's scaler left this step out.

    Raises:
        UserError: loss or gradient is not finite; no parameter has been touched.
    """
    if not math.isfinite(loss.item()):
        raise UserError(f"the loss is {loss.item()} at {where}: stopped before the step; lower the learning rate.")
    optimizer.zero_grad()
    runtime.accelerator.backward(loss)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = runtime.accelerator.clip_grad_norm_(parameters, max_norm).item()
    scaled = runtime.accelerator.scaler is not None  # fp16: the scaler leaves the step out and lowers its scale
    if not math.isfinite(grad_norm) and (not scaled or runtime.accelerator.scaler.get_scale() < SMALLEST_SCALE):
        raise UserError(f"the gradient is {grad_norm} at {where}: stopped before the step; lower the learning rate.")
    optimizer.step()
    return grad_norm


@torch.no_grad()
def distance(parameters, others):
    """Euclidean distance between two lists of tensors."""
    return torch.stack([(a - b).norm() for a, b in zip(parameters, others, strict=True)]).norm().item()


@torch.no_grad()
def copy_of(parameters):
    return [p.detach().clone() for p in parameters]
