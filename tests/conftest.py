"""What every test runs under: one thread per process, no compiler at run time, gloo on the loopback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Set before the first `import torch` and inherited by every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the machine's few cores
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DEVICE": "cpu"}  # what tests mean, on a machine with GPUs too
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron decorates with torch.compile at import
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
# `pytest` alone must reach the checkout from subprocesses too, as `make test` does.
if str(REPOSITORY) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the directory they live in."""
    for item in items:
        for kind in ("distributed", "functional"):
            if item.path.is_relative_to(REPOSITORY / "tests" / kind):
                item.add_marker(kind)
