"""The order of samples: a function of its arguments, any batch of it by arithmetic, and a fixed subset."""

import itertools
import random
import time

import pytest
import torch

from newllm.data.order import batches_done, epoch_order, next_batch, quick_check_due, quick_subset


def test_epoch_order_is_a_function_of_its_arguments():
    """A permutation; the same again, another for another argument; global random state untouched."""
    state = torch.get_rng_state()
    order = epoch_order(50, 42, "phase2", 3)
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(50))
    assert torch.equal(order, epoch_order(50, 42, "phase2", 3)) and torch.equal(state, torch.get_rng_state())
    for other in ((50, 43, "phase2", 3), (50, 42, "phase1", 3), (50, 42, "phase2", 4)):
        assert not torch.equal(order, epoch_order(*other))


def test_a_batch_is_found_by_arithmetic():
    """The same samples as cutting the whole order, for every batch of many shapes; and its number."""
    for samples in (1, 2, 3, 7, 12, 50, 97):
        order = epoch_order(samples, 42, "phase1", 0)
        for batches in range(1, samples + 1):
            done = 0
            for index, part in enumerate(order.tensor_split(batches)):
                assert batches_done(samples, batches, done) == index
                assert torch.equal(next_batch(order, batches, done), part), (samples, batches, index)
                done += len(part)
            assert batches_done(samples, batches, done) == batches


def test_whatever_sizes_follow_each_other_each_sample_comes_once():
    """Another size before every batch: the epoch in its order, none larger than of its own cutting."""
    source = random.Random(0)
    for _ in range(300):
        samples, done = source.randint(1, 60), 0
        order = epoch_order(samples, 42, "phase2", 0)
        while done < samples:
            batches = source.randint(1, samples)
            batch = next_batch(order, batches, done)
            assert torch.equal(batch, order[done : done + len(batch)])
            assert 0 < len(batch) <= -(-samples // batches)
            assert 0 <= batches_done(samples, batches, done) < batches
            done += len(batch)
        assert done == samples


@pytest.mark.parametrize(
    "samples, batches, every, due",
    [(50, 10, 50, [5]), (781, 24, 50, [12]), (7, 1, 50, []), (150, 150, 50, [50, 100]), (50, 10, 0, [])],
)
def test_quick_checks_divide_an_epoch(samples, batches, every, due):
    """Half-way where an epoch has few batches, else about so many apart; never at the end."""
    bounds = [0, *torch.tensor([len(part) for part in torch.arange(samples).tensor_split(batches)]).cumsum(0)]
    steps = enumerate(itertools.pairwise(bounds), 1)
    assert [n for n, (before, done) in steps if quick_check_due(samples, batches, every, before, done)] == due


def test_a_late_batch_of_a_large_epoch_is_reached_at_once():
    """The order of 4,000,000 samples and its batch 1,000,000 take less than a second of the processor."""
    started = time.process_time()
    order = epoch_order(4_000_000, 42, "phase2", 0)
    batch = next_batch(order, 1_333_333, 3_000_001)
    assert time.process_time() - started < 1 and torch.equal(batch, order[3_000_001:3_000_004])


@pytest.mark.parametrize("count, fraction, size", [(160, 0.1, 16), (3, 0.1, 1), (1, 0.001, 1), (7, 1.0, 7)])
def test_quick_subset_is_fixed_and_sorted(count, fraction, size):
    """round(fraction * n) different samples, at least one."""
    subset = quick_subset(count, fraction, 42)
    assert len(subset) == size and torch.equal(subset, quick_subset(count, fraction, 42))
    assert subset.tolist() == sorted(set(subset.tolist())) and subset.max() < count
