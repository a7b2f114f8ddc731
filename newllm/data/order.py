"""Which samples come when: a function of seed, stage and epoch, so that resuming costs nothing and changes nothing."""

import hashlib

import torch

from newllm.seeding import derived_generator


def epoch_order(num_samples, seed, stage, epoch):
    """Order of the samples in an epoch: int64 [num_samples], a permutation that depends on the arguments alone.

    So resuming at any batch costs nothing for the batches before it, and no global random state is involved.
    """
    return torch.randperm(num_samples, generator=derived_generator(num_samples, seed, stage, epoch))


def order_digest(digest, samples):
    """The digest (hex, "" at first) of all sample ids so far, extended by those of one more batch: equal orders, equal digests."""
    return hashlib.sha256(digest.encode() + samples.long().numpy().tobytes()).hexdigest()


def batch_count(num_samples, batch_size, min_batches):
    """Batches of an epoch: of about batch_size samples, of fewer where a small budget would give under min_batches."""
    return max(num_samples // batch_size, min(min_batches, num_samples))


def batch_at(order, batches, index):
    """Samples of batch `index` when an epoch's order is cut into `batches` nearly equal parts, the larger ones first."""
    size, larger = divmod(len(order), batches)
    start = index * size + min(index, larger)
    return order[start : start + size + (index < larger)]


def quick_subset(num_samples, fraction, seed):
    """The fixed samples of quick checks: int64 [max(1, round(fraction * num_samples))], sorted."""
    count = max(1, round(fraction * num_samples))
    order = torch.randperm(num_samples, generator=derived_generator(num_samples, seed, "quick subset", 0))
    return order[:count].sort().values
