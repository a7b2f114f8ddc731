"""Every random number is a function of seed, purpose and step, so that no generator state is ever saved."""

import hashlib
import json

import torch


def derived_seed(*key):
    """Seed for torch from plain values, e.g. (seed, "phase1", step); distinct keys give unrelated seeds."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derived_generator(*key):
    return torch.Generator().manual_seed(derived_seed(*key))
