"""Targets of which counting has a share: whose counts, which loss, and that a run goes on exactly."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import stop_after
from torch.nn import functional

import train
from config import ResidualConfig
from newllm.models.cross_entropy import linear_cross_entropy
from newllm.phases.phase2 import DRAWS, FOLDS, counted_targets
from newllm.retrieval.ngram import KneserNey
from newllm.saving.files import load_sealed


def drawn(samples, vocab_size=50, seed=0):
    return counted_targets(samples, vocab_size, torch.Generator().manual_seed(seed))


def test_a_sample_is_counted_by_the_others_alone():
    """A token that one sample has and no other is drawn there as rarely as one that nobody has."""
    samples = torch.arange(12).repeat(30, 1) % 10
    samples[7, 1:] = 49
    targets = drawn(samples)
    assert targets.shape == (30, 11, DRAWS) and targets.dtype == torch.int32
    assert (targets[7] == 49).double().mean() < 0.1
    others = torch.arange(30) % FOLDS != 7 % FOLDS
    expected = KneserNey(5, 50).fit(samples[others].numpy())
    likely = expected.over_all(expected.contexts(samples[12:13, :-1]))[0, 5:].argmax(-1)
    assert (targets[12, 5:] == likely[:, None]).double().mean() > 0.8


def test_draws_depend_on_the_seed_alone():
    """So that a run that goes on within an epoch has the targets of its beginning."""
    samples = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (9, 8)))
    assert torch.equal(drawn(samples), drawn(samples))
    assert not torch.equal(drawn(samples), drawn(samples, seed=1))


def test_the_loss_is_that_of_the_shared_target():
    """Cross-entropy, and its gradients, of shares of several ids; shares of one id add up."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 4), (9, 4), (9,))
    )
    targets = torch.randint(9, (2, 3, 3), generator=generator)
    targets[0, 0, 1] = targets[0, 0, 0]
    shares = torch.tensor([0.5, 0.3, 0.2])
    spread = torch.zeros(2, 3, 9).scatter_add_(-1, targets, shares.expand(2, 3, 3))
    logits = functional.linear(hidden, weight, bias).flatten(0, 1)
    expected = functional.cross_entropy(logits, spread.flatten(0, 1).double())
    loss = linear_cross_entropy(hidden, weight, bias, targets, shares)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    inputs = [hidden, weight, bias]
    for ours, torchs in zip(*(torch.autograd.grad(each, inputs) for each in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


def test_a_stopped_run_goes_on_exactly(tiny_settings):
    """In the middle of an epoch of Phase 2, whose targets are drawn again."""
    config = ResidualConfig(**tiny_settings, untrained_control=False, label_smoothing=0.4)
    expected = train.main(dataclasses.replace(config, checkpoint_dir=config.checkpoint_dir + "_whole"))
    stop_after(config, 9 + 4)
    summary = train.main(config)
    weights = [
        load_sealed(f"{folder}/model_latest.pt")["model_state_dict"]
        for folder in (config.checkpoint_dir, config.checkpoint_dir + "_whole")
    ]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert summary["val_loss"] == expected["val_loss"]
    without = dataclasses.replace(config, label_smoothing=0.0, checkpoint_dir=config.checkpoint_dir + "_no")
    assert train.main(without)["val_loss"] != expected["val_loss"]
