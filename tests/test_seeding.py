"""Seeds: a function of the key and nothing else."""

import itertools

import torch

from newllm.seeding import derived_generator, derived_seed


def test_the_value_is_the_same_for_ever():
    """A run of an earlier version can be repeated: these values are not to change."""
    assert derived_seed(42, "phase1", 0) == 8433892637267668893
    assert derived_seed(0) == 7520536977032167579


def test_distinct_keys_have_distinct_seeds():
    """Over seed, purpose and step; also where the parts would read the same put together."""
    keys = list(itertools.product(range(5), ("phase1", "phase2", "untrained"), range(100)))
    keys += [
        (1, 23),
        (12, 3),
        (123,),
        ("1", 23),
        ("123",),
        ("a", "b"),
        ("ab",),
        (),
        ("",),
        (1.0, 23),
        (None,),
    ]
    assert len({derived_seed(*key) for key in keys}) == len(keys)


def test_a_seed_is_one_that_torch_takes():
    """Non-negative and below 2^63."""
    seeds = [derived_seed("key", k) for k in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # the whole range is used


def test_a_generator_starts_from_its_key_alone():
    """Equal keys draw equal numbers, whatever the global generator has done; other keys draw others."""
    torch.manual_seed(1)
    first = torch.rand(5, generator=derived_generator(7, "order", 0))
    torch.rand(3)
    assert torch.equal(torch.rand(5, generator=derived_generator(7, "order", 0)), first)
    assert not torch.equal(torch.rand(5, generator=derived_generator(7, "order", 1)), first)


def test_a_generator_leaves_the_global_one_alone():
    """Dropout is not shifted by an order of samples drawn in between."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    torch.rand(4, generator=derived_generator("key"))
    assert torch.equal(torch.rand(3), expected)
