"""Runs in one process, as in a notebook: each gives back what it took."""

import gc

import torch

from config import ResidualConfig
from train import main


def live_bytes():
    """Bytes of all tensors that something still refers to; storages that several share count once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # Not the compiler's stand-ins, which have no storage.
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_runs_in_one_process_leave_no_more_than_the_second(tiny_settings):
    """Tensors alive after the fourth run are, within 1 %, those alive after the second: nothing adds up."""
    after = []
    for number in range(4):
        own = dict(checkpoint_dir=f"{tiny_settings['checkpoint_dir']}_{number}", phase1_max_iterations=1)
        main(ResidualConfig(**tiny_settings | own | dict(phase2_epochs=1, retrieval="ngram,cache,knn")))
        after.append(live_bytes())
    kept = torch.zeros(100_000)
    assert live_bytes() - after[3] == kept.nbytes  # the measure sees what is left
    assert abs(after[3] - after[1]) <= 0.01 * after[1], after
