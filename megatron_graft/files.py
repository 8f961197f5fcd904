"""Writing files and directories so that a reader sees all of them or nothing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_graft.errors import StorageError
from megatron_graft.log import get_logger

_READ_BYTES = 1 << 22


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte string for a JSON value: keys sorted, no spaces. Digests are taken over this."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a refused write below ``path`` into a :class:`StorageError` that names it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EROFS,
            errno.EACCES,
            errno.EIO,
            errno.ENOTDIR,
        ):
            raise
        free = shutil.disk_usage(_existing_parent(path)).free
        raise StorageError(
            path,
            f"could not be written: {os.strerror(error.errno or 0)}",
            got=f"{free:,} bytes free",
            remedy="Free space or choose another output directory; nothing was left behind.",
        ) from error


def _existing_parent(path: Path) -> Path:
    while not os.path.exists(path):  # False, unlike Path.exists(), also where nobody may look
        path = path.parent
    return path


def make_directory(path: Path) -> None:
    """Make a directory and those above it, unless it is there.

    Raises:
        StorageError: something else is in its place, or the file system refused.
    """
    with storage_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            raise StorageError(
                path, "is not a directory", expected="a directory, or a path where one can be made"
            ) from error


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other process is alone in a directory, made if need be; then this one is, until the block ends.

    Raises:
        StorageError: there can be no such directory, or nothing can be written into it.
    """
    make_directory(directory)
    with storage_errors(directory):
        lock = (directory / ".lock").open("w")
    with lock:
        take_lock(lock.fileno(), directory, wait=True)
        yield


def take_lock(descriptor: int, path: Path, *, alone: bool = True, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False if another process has it and ``wait`` is not set.

    A file system without locks (NFS and Lustre can be mounted so) is used all the same, with a warning that names
    ``path``.
    """
    kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        get_logger().warning("%s: cannot be locked (%s); others that work there go unnoticed", path, error.strerror)
    return True


def beside(path: Path, suffix: str) -> Path:
    """What lies beside a directory under its name and a suffix; ``.`` and ``..`` have names, too."""
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    return path.with_name(path.name + suffix)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename inside it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, flush it, and rename it into place."""
    make_directory(path.parent)
    with storage_errors(path):
        descriptor, temporary = tempfile.mkstemp(prefix=scratch_prefix(path), dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def write_json_atomically(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, all or nothing."""
    write_bytes_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def scratch_prefix(path: Path) -> str:
    """How the names begin of what will be renamed to ``path``, in the same directory."""
    return f".{path.name}.partial-"


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """A directory for what will be renamed to ``path``, in the same directory; it is removed when the block ends.

    A process killed outright leaves it; the next one that asks for one of the same ``path`` removes it. While somebody
    has it, it is locked.
    """
    make_directory(path.parent)
    _remove_abandoned(path)
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=scratch_prefix(path), dir=path.parent))
        try:
            descriptor = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:  # it was taken for abandoned before it was opened
            continue
        try:
            with contextlib.suppress(OSError):  # a file system without locks: nobody removes anything there
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if scratch.is_dir():  # else it was taken for abandoned before it was locked
                yield scratch
                return
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    for scratch in path.parent.glob(f"{glob.escape(scratch_prefix(path))}*/"):
        with contextlib.suppress(OSError):  # somebody has it, or removes it, too
            descriptor = os.open(scratch, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(scratch, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def directory_in_one_step(path: Path) -> Iterator[Path]:
    """Yield a scratch directory beside ``path`` that becomes ``path`` if the block succeeds.

    On any exception the scratch directory is removed and ``path`` is untouched. ``path`` must not exist.
    A process killed outright leaves only the scratch directory (:func:`scratch_beside`).

    Raises:
        StorageError: it cannot be written, or another process has made ``path`` in the meantime.
    """
    with storage_errors(path), scratch_beside(path) as scratch:
        yield scratch
        for file in sorted(scratch.rglob("*")):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        os.chmod(scratch, 0o755)
        try:
            os.rename(scratch, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise StorageError(
                path, "was made by another process meanwhile", remedy="That one is kept; this one's is dropped."
            ) from error
        sync_directory(path.parent)
