"""Keep ``requirements.lock``: the exact version of every package this project and its tools need.

    python scripts/lock_requirements.py write            # pin what this environment has
    python scripts/lock_requirements.py check            # fail if `write` would change the lock
    python scripts/lock_requirements.py pins build       # print the pins of a section
    python scripts/lock_requirements.py missing runtime  # print those that this environment lacks

The roots are the requirements and extras that the project's own metadata declares (setup.py, pyproject.toml);
the rest is their closure over installed metadata. The lock has one section per root set, and a package stands
in the first section that needs it. ``pins`` and ``missing`` serve the container image, whose base brings a
PyTorch of its own; they need nothing but the standard library.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]
LOCK = REPOSITORY / "requirements.lock"
SECTIONS = ("build", "runtime", "donor", "cluster", "dev")
# Parts of PyTorch that an image with a PyTorch of its own has under other names, or outside Python.
PYTORCH_STACK = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
HEADER = """\
# Exact versions that `make` installs: Linux, CPython 3.12 or 3.13. Written by `make lock`; do not edit.
"""


def canonical(name: str) -> str:
    """A distribution's name as registries compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_requirements(repository: Path = REPOSITORY) -> dict[str, list[Requirement]]:
    """The root requirements of every section, read through the project's own build back end."""
    from build.util import project_wheel_metadata
    from packaging.requirements import Requirement

    roots: dict[str, list[Requirement]] = {section: [] for section in SECTIONS}
    metadata = project_wheel_metadata(repository, isolated=False)
    for requirement in map(Requirement, metadata.get_all("Requires-Dist") or []):
        for section, extra in (("runtime", ""), ("donor", "donor"), ("cluster", "cluster"), ("dev", "dev")):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                roots[section].append(requirement)
                break
    pyproject = tomllib.loads((repository / "pyproject.toml").read_text())
    roots["build"] = [Requirement(text) for text in pyproject["build-system"]["requires"]]
    roots["dev"] += [Requirement(text) for text in pyproject["dependency-groups"]["checkout"]]
    return roots


def closure(roots: Iterable[Requirement]) -> dict[str, str]:
    """Name -> installed version of the roots and of all they require, markers and extras followed.

    Raises:
        SystemExit: a requirement is not installed or its installed version does not satisfy it.
    """
    from packaging.requirements import Requirement

    versions: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    waiting = [(requirement, extra) for requirement in roots for extra in ("", *requirement.extras)]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonical(requirement.name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit(f"error: {requirement} is required but not installed; install it and retry") from None
        if not requirement.specifier.contains(distribution.version, prereleases=True):
            raise SystemExit(f"error: {requirement} is required, but {distribution.version} is installed")
        versions[name] = distribution.version
        if (name, extra) in done:
            continue
        done.add((name, extra))
        for needed in map(Requirement, distribution.requires or []):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed, further) for further in ("", *needed.extras)]
    return versions


def lock_text(repository: Path = REPOSITORY) -> str:
    """The content of ``requirements.lock`` for what is installed now."""
    seen: set[str] = set()
    text = HEADER
    for section, roots in declared_requirements(repository).items():
        pins = {name: version for name, version in closure(roots).items() if name not in seen}
        seen |= pins.keys()
        text += f"\n# {section}\n" + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))
    return text


def read_lock(path: Path = LOCK) -> dict[str, dict[str, str]]:
    """Section -> name -> version."""
    sections: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line.removeprefix("# ") in SECTIONS:
            current = sections.setdefault(line.removeprefix("# "), {})
        elif line and not line.startswith("#"):
            name, _, version = line.partition("==")
            current[name] = version
    return sections


def pins(sections: Iterable[str], path: Path = LOCK) -> dict[str, str]:
    """Name -> version over the given sections."""
    locked = read_lock(path)
    return {name: version for section in sections for name, version in locked[section].items()}


def missing(sections: Iterable[str], path: Path = LOCK) -> dict[str, str]:
    """The given sections' pins whose package is installed in no version, PyTorch's own parts left out."""
    installed = {canonical(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    return {
        name: version
        for name, version in pins(sections, path).items()
        if name not in installed and not PYTORCH_STACK.fullmatch(name)
    }


def main(argv: list[str] | None = None) -> int:
    """Write, check or query the lock."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=("write", "check", "pins", "missing"))
    parser.add_argument("sections", nargs="*", help=f"for `pins` and `missing`: any of {', '.join(SECTIONS)}")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))} (expected {', '.join(SECTIONS)})")
    if arguments.action in ("pins", "missing"):
        chosen = (pins if arguments.action == "pins" else missing)(arguments.sections)
        print("".join(f"{name}=={version}\n" for name, version in chosen.items()), end="")
        return 0
    wanted = lock_text()
    if arguments.action == "write":
        LOCK.write_text(wanted)
        return 0
    locked = LOCK.read_text().splitlines()
    difference = list(difflib.unified_diff(locked, wanted.splitlines(), "requirements.lock", "installed"))
    print("\n".join(difference), end="\n" if difference else "")
    return 1 if difference else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
