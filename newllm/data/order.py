"""Which samples come when: a function of seed, stage and epoch, so resuming costs and changes nothing."""

import hashlib

import torch

from newllm.seeding import derived_generator


def epoch_order(num_samples, seed, stage, epoch):
    """Order of the samples in an epoch: int64 [num_samples], a permutation that the arguments alone give."""
    return torch.randperm(num_samples, generator=derived_generator(num_samples, seed, stage, epoch))


def order_digest(digest, samples):
    """The digest (hex, "" at first) of all sample ids so far, extended by those of one more batch."""
    return hashlib.sha256(digest.encode() + samples.long().numpy().tobytes()).hexdigest()


def batch_count(num_samples, batch_size, min_batches):
    """Batches of an epoch: of about batch_size samples, of fewer where that would give under min_batches."""
    return max(num_samples // batch_size, min(min_batches, num_samples))


def batches_done(num_samples, batches, done):
    """How many batches of an epoch its first `done` samples are, a float.

    The epoch is cut into `batches` nearly equal parts, the larger first. The number is whole between two of
    them, and broken where the epoch was begun with another batch size.
    """
    size, larger = divmod(num_samples, batches)
    edge = larger * (size + 1)
    return done / (size + 1) if done <= edge else larger + (done - edge) / size


def next_batch(order, batches, done):
    """The samples that follow the first `done` of an epoch's order: the next of its nearly equal parts.

    Where `done` lies between two of their bounds, as after a change of the batch size, what is left of the
    epoch is cut anew, into parts that are no larger.
    """
    left, at = len(order) - done, batches_done(len(order), batches, done)
    parts = batches - int(at) if at.is_integer() else -(-left // -(-len(order) // batches))
    return order[done : done - (-left // parts)]


def quick_check_due(num_samples, batches, every, before, done):
    """Whether a quick check belongs after a batch that took an epoch from `before` to `done` samples.

    They divide an epoch evenly, with one half-way at least and about `every` batches between two at most;
    0: none. None at the epoch's end, where all is checked.
    """
    if not every or done == num_samples:
        return False
    parts = max(2, -(-batches // every))
    return done * parts // num_samples > before * parts // num_samples


def quick_subset(num_samples, fraction, seed):
    """The fixed samples of quick checks: int64 [max(1, round(fraction * num_samples))], sorted."""
    count = max(1, round(fraction * num_samples))
    order = torch.randperm(num_samples, generator=derived_generator(num_samples, seed, "quick subset", 0))
    return order[:count].sort().values
