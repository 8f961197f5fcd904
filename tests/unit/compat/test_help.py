"""``--help`` of the entry point: Megatron's flags and ours."""

import argparse
import subprocess
import sys

from megatron_graft.compat.megatron import mend_help


def test_the_entry_point_lists_all_flags() -> None:
    command = [sys.executable, "-m", "megatron_graft.training.pretrain", "--help"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    for flag in ("--num-layers", "--graft-bank", "--engram-layers"):
        assert flag in finished.stdout


def test_only_texts_that_are_no_formats_are_changed() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bad", help="a tenth (10%)")
    parser.add_argument("--good", default=3, help="so many (default: %(default)s), 10%% more")
    text = mend_help(parser).format_help()
    assert "a tenth (10%)" in text and "(default: 3), 10% more" in text
