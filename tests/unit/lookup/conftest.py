from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from megatron_graft.bank.reader import Bank
from tests.helpers.banks import Key, make_bank

BankMaker = Callable[..., Bank]


@pytest.fixture
def bank_of(tmp_path: Path) -> BankMaker:
    """Makes a bank of the given keys; their counts do not matter to lookup."""
    made = 0

    def make(keys: list[Key] | Mapping[Key, int], **settings: object) -> Bank:
        nonlocal made
        made += 1
        return make_bank(tmp_path / f"bank-{made}", dict.fromkeys(keys, 1), **settings)

    return make


@pytest.fixture(params=["native", "reference"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param
