"""What the container image does that needs no NVIDIA image: in a clean Debian, and over a base that has PyTorch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.functional, pytest.mark.timeout(1500)]

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts/install_image.sh"
BANK = REPOSITORY / "tests/compat/bank-v2"
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", ".benchmarks", "build", "dist", "runs", "work", "*.so", "__pycache__",
    "*.egg-info",
)  # fmt: skip
# Releases with a Python that the package runs on.
SUITES = ("trixie", "noble")
DEBIAN_PACKAGES = "ca-certificates,g++,python3-dev,python3-pip,python3-venv"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
ROOM_BYTES = 4 << 30


def run(*command: object, environment: dict[str, str], cwd: Path | None = None) -> str:
    finished = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, f"{command}\n{finished.stdout[-6000:]}"
    return finished.stdout


def copy_of_the_checkout(directory: Path) -> Path:
    shutil.copytree(REPOSITORY, directory, ignore=NOT_SOURCE, symlinks=True)
    return directory


# ---- a clean Debian


def mirror_and_suite() -> tuple[str, str]:
    """A mirror that this machine's own packages come from, and a release there with a new enough Python."""
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    text = "\n".join(file.read_text() for file in files if file.is_file())
    mirrors = re.findall(r"^(?:URIs:|deb(?: \[[^]]*\])?)\s+(https?://\S+)", text, re.MULTILINE)
    for mirror in dict.fromkeys(mirrors):
        for suite in SUITES:
            try:
                urllib.request.urlopen(f"{mirror.rstrip('/')}/dists/{suite}/InRelease", timeout=20).close()
            except (urllib.error.URLError, OSError):
                continue
            return mirror, suite
    pytest.skip(f"no mirror in /etc/apt has one of the releases {', '.join(SUITES)}")


def large_scratch() -> Path | None:
    """A tmpfs with room for a Debian, where packages unpack several times as fast as on a disk; None: no such."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and shutil.disk_usage(memory).free > ROOM_BYTES else None


@pytest.fixture(scope="module")
def debian() -> Iterator[Path]:
    """Root of a Debian that has Python, a compiler and nothing else; and the checkout in its ``/src``."""
    debootstrap = shutil.which("debootstrap", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if os.getuid() != 0:
        pytest.skip("only root can make a Debian to change into")
    if debootstrap is None:
        pytest.skip("debootstrap is not installed: run scripts/install_test_tools.sh as root")
    mirror, suite = mirror_and_suite()
    scratch = Path(tempfile.mkdtemp(prefix="graft-debian-", dir=large_scratch()))
    try:
        root = scratch / "root"
        options = ["--variant=minbase", f"--include={DEBIAN_PACKAGES}", suite, root, mirror]
        run(debootstrap, *options, environment=dict(os.environ))
        for file in (Path("/etc/resolv.conf"), CERTIFICATES):  # what this machine reaches and trusts, it does, too
            if file.is_file():
                shutil.copy(file, root / file.relative_to("/"))
        copy_of_the_checkout(root / "src")
        yield root
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def inside(debian: Path, *command: object, **variables: str) -> str:
    """Run a command in the Debian, with nothing of this machine's environment but how packages are reached."""
    reach = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    fixed = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "PYTHON": "/venv/bin/python"}
    return run("chroot", debian, *command, environment=reach | fixed | {"PIP_CERT": str(CERTIFICATES)} | variables)


def test_a_clean_debian_builds_the_wheel_and_installs_it_and_is_refused_for_want_of_pytorch(debian: Path) -> None:
    inside(debian, "python3", "-m", "venv", "/venv")
    inside(debian, "/src/scripts/install_image.sh", "wheel", "/src", "/wheels")
    inside(debian, "/src/scripts/install_image.sh", "install", "/wheels")
    shutil.rmtree(debian / "src" / "megatron_graft")  # nothing but the wheel is left to be imported
    python = "/venv/bin/python"
    printed = inside(debian, python, "-c", "import megatron_graft; print(megatron_graft.__file__)")
    assert printed.startswith("/venv/lib/")
    help_text = inside(debian, python, "-m", "megatron_graft.tools.verify_bank", "--help")
    assert "usage: verify_bank.py" in help_text
    opened = inside(debian, python, "-m", "megatron_graft.tools.verify_bank", "/src/tests/compat/bank-v2")
    assert "full check passed" in opened
    frozen = inside(debian, python, "-m", "pip", "freeze")
    assert "megatron-core==" in frozen and "transformers==" in frozen
    assert not re.search(r"^(torch|triton|nvidia-)", frozen, re.MULTILINE), "a base's PyTorch is never added to"
    with pytest.raises(AssertionError, match=r"megatron-graft \S+ requires torch, which is not installed") as refused:
        inside(debian, "/src/scripts/install_image.sh", "check")
    assert "this base image does not satisfy the requirements" in str(refused.value)


# ---- a base that has everything, as NVIDIA's image has PyTorch


@pytest.fixture
def base(tmp_path: Path) -> dict[str, str]:
    """Environment of a fresh Python whose packages are those of the Python that runs this, PyTorch among them."""
    run(sys.executable, "-m", "venv", tmp_path / "base", environment=dict(os.environ))
    (packages,) = (tmp_path / "base/lib").glob("python3.*/site-packages")
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "base.pth").write_text(ours + "\n")
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "CXX", "SSL_CERT_FILE")}
    return kept | {"PYTHON": str(tmp_path / "base/bin/python")}


def test_a_base_with_pytorch_keeps_all_that_it_has_and_is_accepted(base: dict[str, str], tmp_path: Path) -> None:
    freeze = (base["PYTHON"], "-m", "pip", "freeze")
    before = set(run(*freeze, environment=base).splitlines())
    assert any(line.startswith("torch==") for line in before)
    checkout = copy_of_the_checkout(tmp_path / "checkout")
    run(checkout / "scripts/install_image.sh", "wheel", checkout, tmp_path / "wheels", environment=base)
    # The network is out of reach: with a base that lacks nothing, nothing is fetched.
    offline = base | {"PIP_NO_INDEX": "1"}
    run(checkout / "scripts/install_image.sh", "install", tmp_path / "wheels", environment=offline)
    run(checkout / "scripts/install_image.sh", "check", environment=offline)
    shutil.rmtree(checkout)
    added = set(run(*freeze, environment=base).splitlines()) - before
    assert [line for line in added if not line.startswith("megatron-graft @")] == []
    program = "import torch, megatron_graft.training.pretrain as p; print(torch.__file__, p.__file__)"
    torch, package = run(base["PYTHON"], "-W", "ignore", "-c", program, environment=base, cwd=tmp_path).split()[-2:]
    assert not Path(torch).is_relative_to(tmp_path) and Path(package).is_relative_to(tmp_path / "base")
    opened = run(
        base["PYTHON"], "-m", "megatron_graft.tools.verify_bank", BANK, environment=base, cwd=tmp_path
    )  # fmt: skip
    assert "full check passed" in opened


def test_a_wrong_call_says_what_the_steps_are() -> None:
    finished = subprocess.run([SCRIPT, "install"], capture_output=True, text=True)
    assert finished.returncode == 2
    for step in ("wheel CHECKOUT DIRECTORY", "install DIRECTORY", "check"):
        assert f"install_image.sh {step}" in finished.stderr
