"""Where this package's commands and its example script lie: in a checkout, or in an installed package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
_SCRIPT = "pretrain_graft_moe.sh"
_CODE = ("megatron_graft", "csrc", "tools", "examples", "setup.py", "requirements.lock")


def tool_command(name: str) -> list[str]:
    """The command line that starts the tool ``name``, without its arguments."""
    file = PACKAGE.parent / "tools" / f"{name}.py"
    return [sys.executable, str(file)] if file.is_file() else [sys.executable, "-m", f"{PACKAGE.name}.tools.{name}"]


def training_script() -> Path:
    """The example script."""
    in_checkout = PACKAGE.parent / "examples" / _SCRIPT
    return in_checkout if in_checkout.is_file() else PACKAGE / "examples" / _SCRIPT


def code_version() -> dict[str, str | bool | None]:
    """``commit`` of the checkout that this code lies in and whether code in it is ``changed``; None where unknown."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top) != PACKAGE.parent.resolve():  # installed into an environment inside another's checkout
        return {"commit": None, "changed": None}
    commit, status = (_git(*words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", *_CODE)))
    return {"commit": commit, "changed": None if status is None else bool(status)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], cwd=PACKAGE.parent, capture_output=True, encoding="utf-8", check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
