"""The chunked loss: torch's numbers and gradients, without torch's memory."""

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from newllm.models import cross_entropy
from newllm.models.cross_entropy import linear_cross_entropy, linear_token_nll

B, T, E, V = 3, 11, 6, 20
CHUNKS = [1, V, 4 * V, 5 * V + 3, 1 << 24]  # less than a token, one, several, an uneven number, all


@pytest.fixture(params=CHUNKS)
def chunk(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", request.param)


def layer(dtype=torch.float64):
    """(hidden [B, T, E], weight [V, E], bias [V], targets [B, T])."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((B, T, E), (V, E), (V,))]
    return *(part.requires_grad_() for part in draw), torch.randint(V, (B, T), generator=generator)


def reference(hidden, weight, bias, targets):
    return functional.cross_entropy(functional.linear(hidden, weight, bias).flatten(0, -2), targets.flatten())


def test_loss_and_gradients_are_torchs(chunk):
    """Mean over tokens, and the gradient of hidden states, matrix and bias, for every size of chunk."""
    *inputs, targets = layer()
    got, expected = linear_cross_entropy(*inputs, targets), reference(*inputs, targets)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    for ours, torchs in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-7)


def test_a_frozen_matrix_gets_no_gradient_and_changes_no_other(chunk):
    """Pretrained embeddings stay; the hidden states learn as before."""
    hidden, weight, offset, targets = layer()
    (expected,) = torch.autograd.grad(reference(hidden, weight, offset, targets), hidden)
    linear_cross_entropy(hidden, weight.detach(), offset, targets).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-5, atol=1e-7)


def test_hidden_states_may_be_without_gradient():
    """A head without layers on frozen contexts trains its output alone."""
    hidden, weight, offset, targets = layer()
    linear_cross_entropy(hidden.detach(), weight, offset, targets).backward()
    (expected,) = torch.autograd.grad(reference(hidden, weight, offset, targets), weight)
    assert hidden.grad is None
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-7)


def test_gradients_follow_what_is_done_with_the_loss():
    """A loss multiplied by 7, as by a loss scale, has 7 times the gradient."""
    *inputs, targets = layer()
    once = torch.autograd.grad(linear_cross_entropy(*inputs, targets), inputs)
    scaled = torch.autograd.grad(7 * linear_cross_entropy(*inputs, targets), inputs)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(b, 7 * a)


def test_gradients_add_to_those_of_another_use_of_the_matrix():
    """A tied matrix is used as embedding too."""
    hidden, weight, offset, targets = layer()
    (linear_cross_entropy(hidden, weight, offset, targets) + weight.sum()).backward()
    (expected,) = torch.autograd.grad(reference(hidden, weight, offset, targets), weight)
    torch.testing.assert_close(weight.grad, expected + 1, rtol=1e-5, atol=1e-6)


def test_under_autocast_products_are_bf16_and_sums_are_fp32(chunk):
    """Loss and gradients within the precision of bf16 of the exact ones, and in the parameters' own type."""
    *inputs, targets = layer(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(*inputs, targets)
    expected = reference(*inputs, targets)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=1e-2)
    hidden, weight, offset, targets = (part.detach() for part in (*inputs, targets))
    rounded = functional.linear(*(part.bfloat16() for part in (hidden, weight, offset))).float()
    assert got.item() == pytest.approx(
        functional.cross_entropy(rounded.flatten(0, 1), targets.flatten()).item(), rel=1e-5
    )
    for ours, torchs in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - torchs).norm() < 2e-2 * torchs.norm()


def test_huge_logits_do_not_overflow():
    """exp of 1e4 is infinite; the loss and its gradient are not."""
    hidden, weight, offset, targets = layer(torch.float32)
    loss = linear_cross_entropy(1e4 * hidden, weight, offset, targets)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [hidden, weight, offset]))


def test_token_nll_is_torchs_and_its_hits_are_the_argmax(chunk):
    """Per token, in the shape of the targets, fp32 and without gradient."""
    hidden, weight, offset, targets = layer()
    targets[0] = functional.linear(hidden, weight, offset)[0].argmax(-1)  # so that some are right
    nll, correct = linear_token_nll(hidden, weight, offset, targets)
    logits = functional.linear(hidden, weight, offset)
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T)
    assert nll.dtype == torch.float32 and not nll.requires_grad
    torch.testing.assert_close(nll.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(correct, logits.argmax(-1) == targets)
    assert correct[0].all() and not correct.all()


def test_the_mean_of_the_token_nll_is_the_loss():
    """Training and evaluation measure the same thing."""
    *inputs, targets = layer()
    nll, _ = linear_token_nll(*inputs, targets)
    assert nll.double().mean().item() == pytest.approx(
        linear_cross_entropy(*inputs, targets).item(), rel=1e-6
    )


def test_int32_targets_are_ids_too():
    """Samples are stored in int32."""
    *inputs, targets = layer()
    assert (
        linear_cross_entropy(*inputs, targets.int()).item() == linear_cross_entropy(*inputs, targets).item()
    )
    assert torch.equal(linear_token_nll(*inputs, targets.int())[0], linear_token_nll(*inputs, targets)[0])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_no_more_than_a_chunk_of_logits_exists(monkeypatch, autocast):
    """200 tokens times 50 ids would be 10,000 logits; with chunks of 1,000 no tensor is larger than its inputs."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1000)
    hidden, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((200, 4), (50, 4), (50,)))
    targets = torch.zeros(200, dtype=torch.long)
    with LargestTensor() as largest, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        linear_cross_entropy(hidden, weight, bias, targets).backward()
        linear_token_nll(hidden, weight, bias, targets)
    assert 50 < largest.elements <= 1000


def test_a_vocabulary_larger_than_a_chunk_is_taken_one_token_at_a_time(monkeypatch):
    """The least that can be held is one token's logits."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 10)
    *inputs, targets = layer()
    with LargestTensor() as largest:
        linear_token_nll(*inputs, targets)
    assert largest.elements == max(B * T * E, V * E)
