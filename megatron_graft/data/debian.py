"""Fetch a pinned Debian package with ``apt-get download`` and read files out of it. Nothing is installed."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_graft.errors import CorpusError, PlatformError
from megatron_graft.files import sha256_of_file, storage_errors
from megatron_graft.log import get_logger

_STDERR_LINES = 8
_WAY_OUT = "Leave this text out, or give files of your own."


@dataclass(frozen=True, kw_only=True)
class DebianPackage:
    """One exact version of a package, and the digest of its archive."""

    name: str
    version: str
    sha256: str

    @property
    def spec(self) -> str:
        """What ``apt-get download`` is asked for: ``name=version``."""
        return f"{self.name}={self.version}"

    @property
    def archive_name(self) -> str:
        """The archive's name in our cache."""
        return f"{self.name}_{self.version.replace(':', '%3a')}.deb"


def fetch_debian_package(package: DebianPackage, cache: Path) -> Path:
    """Return the package's archive in ``cache``, downloading it if it is not there yet.

    Raises:
        PlatformError: there is no ``dpkg-deb`` on PATH, or no ``apt-get`` to download with.
        CorpusError: this Debian has no such version, or the archive is not the pinned one.
        StorageError: the cache cannot be written.
    """
    archive = cache / package.archive_name
    _require("dpkg-deb", package)
    if not archive.is_file():
        _require("apt-get", package)
        _download(package, archive)
    found = sha256_of_file(archive)
    if found != package.sha256:
        raise CorpusError(
            archive, f"is not the archive of {package.spec} that this package was made for", got=f"sha256 {found}",
            expected=f"sha256 {package.sha256}", remedy="Delete the file and run the command again.",
        )  # fmt: skip
    return archive


def _require(program: str, package: DebianPackage) -> None:
    if shutil.which(program) is None:
        raise PlatformError(program, f"is not on PATH, and {package.spec} is read with it", remedy=_WAY_OUT)


def _download(package: DebianPackage, archive: Path) -> None:
    get_logger().info("fetching %s with apt-get download", package.spec)
    with storage_errors(archive):
        archive.parent.mkdir(parents=True, exist_ok=True)
        # A private directory: a killed download leaves no archive under the final name.
        with tempfile.TemporaryDirectory(prefix=f".{archive.name}.", dir=archive.parent) as scratch:
            result = subprocess.run(
                ["apt-get", "download", "--quiet", package.spec], cwd=scratch, capture_output=True, encoding="utf-8",
                errors="replace", check=False,
            )  # fmt: skip
            fetched = list(Path(scratch).glob("*.deb"))
            if result.returncode != 0 or len(fetched) != 1:
                last_lines = "\n".join(result.stderr.strip().splitlines()[-_STDERR_LINES:])
                raise CorpusError(
                    package.spec, f"could not be fetched: apt-get ended with exit code {result.returncode}",
                    got=f"its last lines:\n{last_lines}\n",
                    remedy=f"Run apt-get update and try again; another Debian may have another version. {_WAY_OUT}",
                )  # fmt: skip
            fetched[0].replace(archive)


def read_debian_members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield ``(path, bytes)`` of the package's files whose path (``usr/share/...``) ``pattern`` matches as a whole.

    They come in the order of their paths.

    Raises:
        CorpusError: the archive cannot be read.
    """
    wanted, contents = re.compile(pattern), {}
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=False)
    if unpacked.returncode != 0:
        raise CorpusError(
            archive, "is no readable package", got=unpacked.stderr.decode(errors="replace").strip(),
            remedy="Delete the file and run the command again.",
        )  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as tar:
        for member in tar:
            path = member.name.removeprefix("./")
            stream = tar.extractfile(member) if member.isfile() and wanted.fullmatch(path) else None
            if stream is not None:
                contents[path] = stream.read()
    yield from sorted(contents.items())
