"""Seeds: a function of the key and nothing else."""

import itertools

import torch

from newllm.seeding import derived_generator, derived_seed


def test_the_value_is_the_same_for_ever():
    """A run of an earlier version can be repeated: these values are not to change."""
    assert derived_seed(42, "phase1", 0) == 8433892637267668893
    assert derived_seed(0) == 7520536977032167579


def test_distinct_keys_have_distinct_seeds_that_torch_takes():
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
    seeds = {derived_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and min(seeds) >= 0 and 2**62 < max(seeds) < 2**63


def test_a_generator_starts_from_its_key_alone():
    """Whatever the global generator has done, which it leaves alone; other keys draw other numbers."""
    first = torch.rand(5, generator=derived_generator(7, "order", 0))
    state = torch.get_rng_state()
    assert torch.equal(torch.rand(5, generator=derived_generator(7, "order", 0)), first)
    assert not torch.equal(torch.rand(5, generator=derived_generator(7, "order", 1)), first)
    assert torch.equal(torch.get_rng_state(), state)
