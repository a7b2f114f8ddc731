"""Cross-entropy of a linear layer's logits that never holds more than one chunk of them.

The full logits of N tokens take N * V floats, more than all the rest of a step; only the loss and two
gradients are needed. So each chunk's logits are made, used for loss and gradients at once, and dropped.
Shapes: N tokens, E width, V vocabulary.
"""

import torch
from torch.nn import functional

from newllm.models.network import in_compute_type

# Logits held at a time, 128 MiB in half precision; each chunk also rewrites the weight's gradient.
CHUNK_ELEMENTS = 1 << 26
# The softmax is taken of fewer of them on a CPU: in fp32 they fit into a core's own cache.
CACHE_ELEMENTS = 1 << 19


def linear_cross_entropy(hidden, weight_VE, bias_V, targets, shares=None):
    """Mean cross-entropy in nats, with gradient to hidden, weight and bias.

    Args:
        hidden: [..., E]; targets: ids [...]; weight_VE, bias_V: the output layer.
        shares: [S], of the ids [..., S] that are the target of a place together; None: there is one, [...].
    """
    if shares is None:
        targets, shares = targets[..., None], bias_V.new_ones(1, dtype=torch.float32)
    targets = targets.flatten(0, -2).long()
    total = _LinearCrossEntropySum.apply(hidden.flatten(0, -2), weight_VE, bias_V, targets, shares)
    return total / len(targets)


@torch.no_grad()
def linear_token_nll(hidden, weight_VE, bias_V, targets):
    """Nats of each target (fp32) and whether it is the likeliest token (bool), without gradient."""
    nats, hits = [], []
    size = _chunk_size(targets.numel(), len(weight_VE))
    for part, wanted in zip(hidden.flatten(0, -2).split(size), targets.flatten().split(size), strict=True):
        logits = functional.linear(part, weight_VE, bias_V).float()
        nats.append(functional.cross_entropy(logits, wanted.long(), reduction="none"))
        hits.append(logits.argmax(-1) == wanted)
    return torch.cat(nats).view(targets.shape), torch.cat(hits).view(targets.shape)


class _LinearCrossEntropySum(torch.autograd.Function):
    """Sum over tokens and their targets of -share * log softmax(hidden @ weight.T + bias)[target].

    The gradients are made in the same pass. Shares add up to 1.
    """

    @staticmethod
    def forward(ctx, hidden_NE, weight_VE, bias_V, targets_NS, shares_S):
        hidden, weight, bias = in_compute_type(hidden_NE), in_compute_type(weight_VE), in_compute_type(bias_V)
        with torch.autocast(hidden.device.type, enabled=False):
            loss = torch.zeros((), device=hidden.device)
            grad_hidden = torch.empty_like(hidden)
            # Sums over chunks are in the parameters' own type: in bf16 the late chunks would be rounded away.
            grad_weight = torch.zeros_like(weight_VE) if weight_VE.requires_grad else None
            grad_bias = torch.zeros_like(bias_V)
            # One buffer for all: fresh memory of this size takes as long as the product that fills it.
            size = _chunk_size(len(hidden), len(weight))
            buffer, product = hidden.new_empty(size, len(weight)), torch.empty_like(weight)
            rows = max(1, CACHE_ELEMENTS // len(weight)) if hidden.device.type == "cpu" else size
            chunks = (tensor.split(size) for tensor in (hidden, grad_hidden, targets_NS))
            for part, grad_part, targets in zip(*chunks, strict=True):
                logits = torch.addmm(bias, part, weight.T, out=buffer[: len(part)])
                for some, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
                    log_share = torch.log_softmax(some, -1, dtype=torch.float32)
                    loss -= (log_share.gather(-1, wanted) * shares_S).sum()
                    # The gradient to the logits is softmax - shares. It takes their place in the buffer.
                    gradient = log_share.exp_()
                    gradient.scatter_add_(-1, wanted, -shares_S.expand_as(wanted))
                    grad_bias += gradient.sum(0)
                    some.copy_(gradient)
                torch.mm(logits, weight, out=grad_part)
                if grad_weight is not None:
                    grad_weight += torch.mm(logits.T, part, out=product)
        ctx.save_for_backward(grad_hidden.to(hidden_NE.dtype), grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        # In place: nobody else has these, and the weight's is the largest tensor of a step.
        scaled = [None if g is None else g.mul_(grad_output.to(g.dtype)) for g in ctx.saved_tensors]
        return *scaled, None, None


def _chunk_size(num_tokens, vocab_size):
    """Tokens of nearly equal chunks with at most CHUNK_ELEMENTS logits each."""
    most = max(1, CHUNK_ELEMENTS // vocab_size)
    return -(-num_tokens // -(-num_tokens // most))
