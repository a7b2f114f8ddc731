"""AdamW with decay groups, its learning-rate schedule, and what of it belongs into a checkpoint."""

import math

import torch

BETAS = (
    0.9,
    0.98,
)  # a shorter memory of squared gradients than the default: runs here take tens to hundreds of steps


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
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


def prepare_optimizer(runtime, optimizer, saved):
    """Give the optimizer to accelerate, with its moments and the fp16 scaler as they were saved; its settings are today's.

    Args:
        saved: what `optimizer_state` returned in an earlier session, or {} at the start of a stage.
    """
    if saved:
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(saved["optimizer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group |= own  # the saved ones would silently outlive a changed learning rate or weight decay
    if (
        scaler := runtime.accelerator.scaler
    ):  # one per process: without this a stage would inherit the last one's scale
        scaler.load_state_dict(
            (saved or {}).get("scaler") or torch.amp.GradScaler(runtime.device.type).state_dict()
        )
    return runtime.accelerator.prepare(optimizer)


def optimizer_state(runtime, optimizer):
    """State dicts of the optimizer and of the fp16 scaler (None in other precisions, and then begun anew by fp16)."""
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


@torch.no_grad()
def distance(parameters, others=None):
    """Euclidean distance between two lists of tensors; of one from zero."""
    others = others or [torch.zeros_like(p) for p in parameters]
    return torch.stack([(a - b).norm() for a, b in zip(parameters, others, strict=True)]).norm().item()


@torch.no_grad()
def copy_of(parameters):
    return [p.detach().clone() for p in parameters]
