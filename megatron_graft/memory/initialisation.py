"""Random numbers for the sites' parameters, apart from every other generator of the run."""

from __future__ import annotations

import hashlib

import torch


def site_generator(seed: int, layer_number: int) -> torch.Generator:
    """A CPU generator that depends on the run's seed and the layer's number only.

    The backbone's generators are never touched, so adding a site changes no other parameter's initial value; and the
    draw is the same on every rank and in every parallel layout.
    """
    digest = hashlib.sha256(f"megatron-graft site {seed} {layer_number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
