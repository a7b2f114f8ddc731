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


def linear_cross_entropy(hidden, weight_VE, bias_V, targets):
    """Mean cross-entropy in nats, with gradient to hidden, weight and bias.

    Args:
        hidden: [..., E]; targets: ids [...]; weight_VE, bias_V: the output layer.
    """
    total = _LinearCrossEntropySum.apply(hidden.flatten(0, -2), weight_VE, bias_V, targets.flatten().long())
    return total / targets.numel()


@torch.no_grad()
def linear_token_nll(hidden, weight_VE, bias_V, targets):
    """Nats of each target (fp32) and whether it is the likeliest token (bool), without gradient."""
    flat, wanted = hidden.flatten(0, -2), targets.flatten().long()
    nll = torch.empty(len(flat), device=flat.device)
    correct = torch.empty(len(flat), dtype=torch.bool, device=flat.device)
    for part in _chunks(len(flat), len(weight_VE)):
        logits = functional.linear(flat[part], weight_VE, bias_V).float()
        nll[part] = functional.cross_entropy(logits, wanted[part], reduction="none")
        correct[part] = logits.argmax(-1) == wanted[part]
    return nll.view(targets.shape), correct.view(targets.shape)


class _LinearCrossEntropySum(torch.autograd.Function):
    """Sum over tokens of -log softmax(hidden @ weight.T + bias)[target], gradients made in the same pass."""

    @staticmethod
    def forward(ctx, hidden_NE, weight_VE, bias_V, targets_N):
        hidden, weight, bias = in_compute_type(hidden_NE), in_compute_type(weight_VE), in_compute_type(bias_V)
        vocab_size, on_cpu = len(weight), hidden.device.type == "cpu"
        with torch.autocast(hidden.device.type, enabled=False):
            loss = torch.zeros((), device=hidden.device)
            grad_hidden = torch.empty_like(hidden)
            # Sums over chunks are in the parameters' own type: in bf16 the late chunks would be rounded away.
            grad_weight = torch.zeros_like(weight_VE) if weight_VE.requires_grad else None
            grad_bias = torch.zeros_like(bias_V)
            chunks = _chunks(len(hidden), vocab_size)
            # One buffer for all: fresh memory of this size takes as long as the product that fills it.
            buffer = hidden.new_empty(chunks[0].stop, vocab_size)
            product = torch.empty_like(weight) if weight_VE.requires_grad else None
            for part in chunks:
                logits, targets = buffer[: part.stop - part.start], targets_N[part, None]
                torch.addmm(bias, hidden[part], weight.T, out=logits)
                for rows in _slices(len(logits), CACHE_ELEMENTS // vocab_size if on_cpu else len(logits)):
                    log_share = torch.log_softmax(logits[rows], -1, dtype=torch.float32)
                    loss -= log_share.gather(-1, targets[rows]).sum()
                    # The gradient to the logits is softmax - one-hot. It takes their place in the buffer.
                    gradient = log_share.exp_()
                    gradient.scatter_add_(-1, targets[rows], -gradient.new_ones(len(gradient), 1))
                    grad_bias += gradient.sum(0)
                    logits[rows] = gradient
                torch.mm(logits, weight, out=grad_hidden[part])
                if product is not None:
                    grad_weight += torch.mm(logits.T, hidden[part], out=product)
        ctx.save_for_backward(grad_hidden.to(hidden_NE.dtype), grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        # In place: nobody else has these, and the weight's is the largest tensor of a step.
        return *(None if g is None else g.mul_(grad_output.to(g.dtype)) for g in ctx.saved_tensors), None


def _chunks(num_tokens, vocab_size):
    """Nearly equal slices of the tokens with at most CHUNK_ELEMENTS logits each."""
    size = max(1, CHUNK_ELEMENTS // vocab_size)
    return _slices(num_tokens, -(-num_tokens // -(-num_tokens // size)))


def _slices(count, size):
    size = max(1, size)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
