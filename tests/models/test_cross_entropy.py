"""The chunked loss: torch's numbers and gradients, without torch's memory."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from newllm.models import cross_entropy
from newllm.models.cross_entropy import linear_cross_entropy, linear_token_nll

B, T, E, V = 3, 11, 6, 20
CHUNKS = [1, 5 * V + 3, 1 << 24]  # one token at a time, several, all


@pytest.fixture(params=CHUNKS)
def chunk(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(cross_entropy, "CACHE_ELEMENTS", 4 * V)


def layer(dtype=torch.float64):
    """(hidden [B, T, E], weight [V, E], bias [V], targets [B, T])."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((B, T, E), (V, E), (V,))]
    return *(part.requires_grad_() for part in draw), torch.randint(V, (B, T), generator=generator)


def reference(hidden, weight, bias, targets):
    return functional.cross_entropy(functional.linear(hidden, weight, bias).flatten(0, -2), targets.flatten())


def gradients(loss, inputs, factor=1):
    return torch.autograd.grad(factor * loss, inputs)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_loss_and_gradients_are_torchs(chunk):
    """Mean over tokens, and the gradient of all that trains; also where a loss scale multiplies them."""
    *inputs, targets = layer()
    loss, expected = linear_cross_entropy(*inputs, targets), reference(*inputs, targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    close(gradients(loss, inputs), gradients(expected, inputs))
    scaled = linear_cross_entropy(*inputs, targets.int())  # samples are stored in int32
    close(gradients(scaled, inputs, 7), gradients(reference(*inputs, targets), inputs, 7))


def test_what_is_frozen_gets_no_gradient_and_changes_no_other(chunk):
    """Pretrained embeddings stay; so do the hidden states of a head without layers on frozen contexts. A
    tied matrix's gradient adds to that of its other use."""
    hidden, weight, bias, targets = layer()
    of_hidden, of_weight = gradients(reference(hidden, weight, bias, targets), [hidden, weight])
    linear_cross_entropy(hidden, weight.detach(), bias, targets).backward()
    assert weight.grad is None
    close(hidden.grad, of_hidden)
    hidden.grad = None
    (linear_cross_entropy(hidden.detach(), weight, bias, targets) + weight.sum()).backward()
    assert hidden.grad is None
    close(weight.grad, of_weight + 1)


def test_under_autocast_products_are_bf16_and_sums_are_fp32(chunk):
    """Loss and gradients within the precision of bf16 of the exact ones, and in the parameters' own type."""
    *inputs, targets = layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*inputs, targets)
    expected = reference(*inputs, targets)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-2)
    rounded = functional.linear(*(part.detach().bfloat16() for part in inputs)).float()
    of_rounded = functional.cross_entropy(rounded.flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(of_rounded.item(), rel=1e-5)
    for ours, torchs in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - torchs).norm() < 2e-2 * torchs.norm()


def test_token_nll_is_torchs_and_its_hits_are_the_argmax(chunk):
    """Per token, shaped like the targets, fp32, without gradient."""
    *inputs, targets = layer()
    logits = functional.linear(*inputs)
    targets[0] = logits[0].argmax(-1)  # so that some are right
    nll, correct = linear_token_nll(*inputs, targets.int())
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T)
    assert nll.dtype == torch.float32 and not nll.requires_grad
    close(nll.double(), expected.detach())
    assert torch.equal(correct, logits.argmax(-1) == targets) and correct[0].all() and not correct.all()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize(("elements", "most"), [(1000, 1000), (10, 800)], ids=["chunk", "one token"])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_more_than_a_chunk_of_logits_exists(monkeypatch, autocast, elements, most):
    """200 tokens times 50 ids would be 10,000 logits; no tensor is larger than a chunk, or the inputs."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", elements)
    hidden, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((200, 4), (50, 4), (50,)))
    targets = torch.zeros(200, dtype=torch.long)
    with LargestTensor() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        linear_cross_entropy(hidden, weight, bias, targets).backward()
        linear_token_nll(hidden, weight, bias, targets)
    assert 50 < largest.elements <= most
