"""A Slurm that the tests of one session share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.slurm import Slurm, SlurmUnavailable


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two nodes on this machine; tests that want them are skipped, with the reason, where they do not start."""
    # Not below pytest's own directories: the path of a socket has to be short.
    directory = Path(tempfile.mkdtemp(prefix="graft-slurm-"))
    cluster = Slurm(directory)
    try:
        try:
            cluster.start()
        except SlurmUnavailable as error:
            pytest.skip(str(error))
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)
