"""A copy of a bank on the node's own storage, made by one process and used by all of the node.

``<directory>/<digest>`` is the copy; it appears by one rename, so it is complete or absent. Beside it lie
``<digest>.lock``, an empty file that is never removed, and, while a process copies, a scratch directory whose
name starts with ``.<digest>.``. Whoever holds the lock may copy and may clear away what a killed process left.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_graft.bank.manifest import MANIFEST_NAME, Manifest, read_manifest
from megatron_graft.bank.reader import open_bank
from megatron_graft.bank.verify import Depth
from megatron_graft.errors import BankError, BankFormatError, IdentityError, StorageError
from megatron_graft.files import directory_in_one_step, make_directory, storage_errors
from megatron_graft.log import Progress, get_logger

_COPY_BYTES = 1 << 23
_POLL_SECONDS = 0.2


def node_copy(bank: Path, directory: Path, *, verify: Depth = "header") -> Path:
    """Have a bank's files below ``directory``, copied there once whatever number of processes asks.

    The first process copies; the others wait for it, and all open the same files. A copy that is there already
    is checked and used; one that fails the check is made again.

    Args:
        bank: directory of the bank.
        directory: on the node's storage: a local disk, or a tmpfs, where the copy lives in memory that all
            processes of the node share. Made if it does not exist.
        verify: how deeply a copy is checked, a new one before it appears and one that is there already: ``"full"``
            reads all of it back and compares digests.

    Returns:
        Directory of the copy, for :func:`~megatron_graft.bank.reader.open_bank`.

    Raises:
        BankError, BankIncompleteError, BankVersionError, BankFormatError: the bank itself cannot be used.
        BankFormatError: the new copy is not what the manifest says; it is not left behind.
        IdentityError: the bank was replaced while it was copied.
        StorageError: ``directory`` cannot be written, cannot be locked or has no room for the bank; no part of a
            copy is left behind.
    """
    bank, directory = Path(bank), Path(directory)
    manifest = open_bank(bank).manifest
    copy = directory / manifest.digest
    make_directory(directory)
    with _exclusive(copy.with_suffix(".lock"), copy, _num_bytes(bank, manifest)):
        _remove_scratch(copy)
        if not _is_sound(copy, manifest, verify):
            _copy(bank, copy, manifest, verify)
    return copy


def _files(bank: Path, manifest: Manifest) -> dict[str, int]:
    """Name and size of every file of a bank, the manifest last."""
    sizes = {file.name: file.bytes for file in (*manifest.identity.files, manifest.index)}
    return sizes | {MANIFEST_NAME: (bank / MANIFEST_NAME).stat().st_size}


def _num_bytes(bank: Path, manifest: Manifest) -> int:
    return sum(_files(bank, manifest).values())


@contextlib.contextmanager
def _exclusive(lock: Path, copy: Path, num_bytes: int) -> Iterator[None]:
    """Hold the lock; while another process has it, tell how far that one's copy is."""
    descriptor = _open_lock(lock)
    try:
        waiting: Progress | None = None
        while not _try_lock(descriptor, lock):
            waiting = waiting or Progress(f"wait for another process to copy to {copy}", num_bytes, "bytes")
            waiting.advance(max(0, _scratch_bytes(copy) - waiting.done))
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def _open_lock(lock: Path) -> int:
    # For reading, and created only if it is missing: so that another user's lock file can be used, too.
    with storage_errors(lock), contextlib.suppress(FileNotFoundError):
        return os.open(lock, os.O_RDONLY)
    with storage_errors(lock):
        return os.open(lock, os.O_RDONLY | os.O_CREAT, 0o644)


def _try_lock(descriptor: int, lock: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(
            lock,
            f"cannot be locked: {error.strerror}",
            remedy="Choose a directory on a local disk or a tmpfs.",
        ) from error
    return True


def _scratch_directories(copy: Path) -> list[Path]:
    return [path for path in copy.parent.glob(f".{copy.name}.*") if path.is_dir()]


def _scratch_bytes(copy: Path) -> int:
    """Bytes that the copying process has written so far."""
    total = 0
    for scratch in _scratch_directories(copy):
        for file in scratch.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed since it was listed
                total += file.stat().st_size
    return total


def _remove_scratch(copy: Path) -> None:
    for scratch in _scratch_directories(copy):
        try:
            shutil.rmtree(scratch)
            get_logger().warning("%s is what a killed process left: removed", scratch)
        except OSError as error:
            get_logger().warning("%s is what a killed process left; it stays: %s", scratch, error.strerror)


def _is_sound(copy: Path, manifest: Manifest, verify: Depth) -> bool:
    """Whether the copy is there and passes the check; removes one that does not."""
    if not copy.exists():
        return False
    try:
        if open_bank(copy, verify=verify).digest == manifest.digest:
            get_logger().info("bank copy %s is there already", copy)
            return True
        reason = "another bank lies there"
    except BankError as error:
        reason = str(error)
    get_logger().warning("bank copy %s cannot be used and is made again: %s", copy, reason)
    try:
        shutil.rmtree(copy)
    except OSError as error:
        raise StorageError(
            copy, f"cannot be removed: {error.strerror}", remedy="Remove it, or choose another directory."
        ) from error
    return False


def _copy(bank: Path, copy: Path, manifest: Manifest, verify: Depth) -> None:
    sizes = _files(bank, manifest)
    total = sum(sizes.values())
    free = shutil.disk_usage(copy.parent).free
    if total > free:
        raise StorageError(
            copy.parent,
            f"has no room for a copy of the bank {bank}",
            got=f"{free:,} bytes free",
            expected=f"at least {total:,}",
            remedy="Free space, choose another directory, or run without a copy.",
        )
    progress = Progress(f"copy {bank} to {copy}", total, "bytes")
    with directory_in_one_step(copy) as scratch:
        for name, size in sizes.items():
            copied = _copy_file(bank / name, scratch / name, progress)
            if copied != size:
                raise BankFormatError(
                    bank / name, "changed while it was copied", got=f"{copied} bytes", expected=f"{size} bytes"
                )
        found = read_manifest(scratch).digest
        if found != manifest.digest:
            raise IdentityError(bank, "was replaced while it was copied", got=found, expected=manifest.digest)
        if verify != "header":
            _read_back(scratch, bank, verify)
    progress.finish()


def _read_back(scratch: Path, bank: Path, verify: Depth) -> None:
    """Check a copy that has not appeared yet. What it finds may be the bank's own fault, or the storage's."""
    try:
        open_bank(scratch, verify=verify)
    except BankFormatError as error:
        raise BankFormatError(
            scratch,
            f"is no true copy of {bank}: {error}",
            remedy=f"Check {bank} with tools/verify_bank.py; if it is sound, the node's storage or memory is not.",
        ) from error


def _copy_file(source: Path, target: Path, progress: Progress) -> int:
    """Copy one file; return its bytes."""
    buffer = memoryview(bytearray(_COPY_BYTES))
    copied = 0
    with source.open("rb", buffering=0) as reader, target.open("wb", buffering=0) as writer:
        while count := _read(reader, buffer, source):
            remaining = buffer[:count]
            while remaining:
                remaining = remaining[writer.write(remaining) :]
            copied += count
            progress.advance(count)
    return copied


def _read(reader: io.FileIO, buffer: memoryview, source: Path) -> int:
    try:
        return reader.readinto(buffer)
    except OSError as error:  # not a fault of the file system that is written
        raise BankError(source, "cannot be read", got=error.strerror) from error
