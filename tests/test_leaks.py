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


def test_live_bytes_sees_a_tensor_and_its_end():
    """4 MB more while a tensor lives, nothing for a view, and as before when it is gone."""
    before = live_bytes()
    kept = [torch.zeros(1_000_000)]
    kept.append(kept[0][5:])
    assert live_bytes() - before == 4_000_000
    kept.clear()
    assert live_bytes() == before


def test_four_runs_in_one_process_leave_no_more_than_two(tiny_settings):
    """Tensors alive after the fourth run are, within 1 %, those alive after the second: nothing adds up."""
    after = []
    for number in range(4):
        main(
            ResidualConfig(
                **tiny_settings | {"checkpoint_dir": f"{tiny_settings['checkpoint_dir']}_{number}"}
            )
        )
        after.append(live_bytes())
    assert abs(after[3] - after[1]) <= 0.01 * after[1], after
