"""Ranks of a node share one copy of a bank: the kernel's own count of their proportional memory says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.helpers.banks import make_bank

NUM_ROWS, WIDTH, VOCAB = 40_000, 128, 1000
RANKS = 2
READ_ALL = """
import sys
import numpy as np
from megatron_graft.bank.reader import open_bank
from megatron_graft.lookup.index import open_index
bank = open_bank(sys.argv[1])
index = open_index(bank, "native")
out = np.empty((bank.num_rows, bank.row_bytes), dtype=np.uint8)
bank.gather(np.arange(bank.num_rows), out)
keys = np.asarray(bank.key_ids[bank.key_orders == 2]).reshape(1, -1).astype(np.int64)
rows, orders = index.lookup(keys, eod=bank.eod)
print(int((orders > 0).sum()), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    codes = np.random.default_rng(0).choice((VOCAB - 1) ** 2, NUM_ROWS, replace=False)
    counts = {(1 + int(code) // (VOCAB - 1), 1 + int(code) % (VOCAB - 1)): 3 for code in codes}
    return make_bank(tmp_path_factory.mktemp("shared") / "bank", counts, vocab_size=VOCAB, width=WIDTH).path


def test_two_ranks_hold_one_copy(bank: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([sys.executable, "-c", READ_ALL, str(bank)], **pipes) for _ in range(RANKS)]  # type: ignore[call-overload]
    try:
        assert all(int(rank.stdout.readline()) > 0 for rank in ranks)
        for name in ("rows", "index"):
            (file,) = (path for path in bank.iterdir() if path.name.startswith(name) and path.stat().st_size > 1e5)
            maps = [one for rank in ranks for one in psutil.Process(rank.pid).memory_maps() if one.path == str(file)]
            resident, proportional = (sum(getattr(one, kind) for one in maps) for kind in ("rss", "pss"))
            assert resident >= 0.9 * RANKS * file.stat().st_size, "each has read all of it"
            assert proportional <= 1.05 * file.stat().st_size, "together they hold it once"
    finally:
        for rank in ranks:
            rank.communicate("")
