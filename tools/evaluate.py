"""Evaluate a run's newest checkpoint on whole data sets: loss and bits per byte, with the memory and with it off.

Losses are told by document, by length of match, and by length of match and frequency of the matched key. Writes
<run>/evaluation.json. Any Megatron flag given after the options is appended to the run's own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.commands import run_command, value_of
from megatron_graft.errors import ConfigError
from megatron_graft.files import write_json_atomically

NOT_FINISHED = "{}: training is not finished; run it again to resume. Not evaluated."


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest for Megatron."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="directory of the run (its --graft-run-dir)")
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=PREFIX", help=".bin/.idx data sets")
    parser.add_argument("--if-finished", action="store_true",
                        help="do nothing if the run is not at its last step, or is evaluated already")  # fmt: skip
    parser.add_argument("--classify-by", type=Path, metavar="BANK",
                        help="split the losses of a run without memory by this bank's matches")  # fmt: skip
    parser.add_argument("--other-bank", nargs="+", default=[], metavar="NAME=DIR",
                        help="measure also with these banks, each in place of the run's; the weights stay")  # fmt: skip
    parser.add_argument("--memory-off", nargs="+", metavar="NAME",
                        help="texts to measure also with memory off and with other banks (default: all)")  # fmt: skip
    return parser.parse_known_args(argv)


def _named(flag: str, items: list[str], expected: str) -> dict[str, str]:
    named: dict[str, str] = {}
    for item in items:
        name, _, path = item.partition("=")
        if not name or not path:
            raise ConfigError(flag, "is malformed", got=item, expected=expected)
        if name in named:
            raise ConfigError(flag, "gives a name twice", got=item, expected="another name for each path")
        named[name] = path
    return named


def _is_up_to_date(result_file: Path, asked: dict[str, Any]) -> bool:
    """Whether the same was asked of the checkpoint that is still the newest, and nothing was saved since."""
    if not result_file.is_file():
        return False
    result = json.loads(result_file.read_text(encoding="utf-8"))
    newest = Path(result["checkpoint"]).with_name("latest_checkpointed_iteration.txt")
    return (
        result.get("asked") == asked
        and newest.is_file()
        and newest.read_text().strip() == str(result["iteration"])
        and newest.stat().st_mtime < result_file.stat().st_mtime
    )


def _has_steps_left(run_dir: Path) -> bool:
    """Whether flags and files alone tell that a run is not at its last step: a job that must end soon asks this."""
    try:
        recorded = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["arguments"]
    except (OSError, ValueError, KeyError):
        return False  # evaluating says what is wrong
    steps, saved = value_of("--train-iters", recorded), value_of("--save", recorded)
    newest = Path(saved or ".") / "latest_checkpointed_iteration.txt"
    done = newest.read_text().strip() if saved and newest.is_file() else "unknown"
    return bool(steps and steps.isdecimal() and done.isdecimal() and int(done) < int(steps))


def _print(name: str, result: dict[str, Any]) -> None:
    line = f"{name}: loss {result['loss']:.4f}, {result['bits_per_byte']:.4f} bits per byte"
    for bank, other in result.get("other_bank", {}).items():
        line += f" (bank {bank}: {other['loss']:.4f})"
    if "memory_off" in result:
        line += f" (memory off: {result['memory_off']['loss']:.4f})"
    if "by_order_and_count" in result:
        line += ", by match " + ", ".join(f"{order} {part['loss']:.4f}" for order, part in result["by_order"].items())
    print(line)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments, extra = parse_arguments(argv)
    data = arguments.data

    def body() -> None:
        started = time.monotonic()
        asked = {
            "data": data, "classify_by": str(arguments.classify_by), "other_bank": arguments.other_bank,
            "memory_off": arguments.memory_off, "flags": extra,
        }  # fmt: skip
        texts = _named("--data", data, "NAME=PREFIX")
        banks = _named("--other-bank", arguments.other_bank, "NAME=DIR")
        if arguments.if_finished and _is_up_to_date(arguments.run_dir / "evaluation.json", asked):
            print(f"{arguments.run_dir}: evaluated already")
            return
        if arguments.if_finished and _has_steps_left(arguments.run_dir):
            print(NOT_FINISHED.format(arguments.run_dir))
            return
        from megatron_graft.compat import cpu

        cpu.install()
        from megatron_graft.training.evaluate_run import RESULT_FILE, evaluate_run

        result = evaluate_run(
            arguments.run_dir, texts, extra, if_finished=arguments.if_finished, classify_by=arguments.classify_by,
            other_banks={name: Path(path) for name, path in banks.items()}, memory_off=arguments.memory_off,
        )  # fmt: skip
        if result is None:
            print(NOT_FINISHED.format(arguments.run_dir))
            return
        result["asked"] = asked
        result["seconds"] = round(time.monotonic() - started, 1)
        write_json_atomically(arguments.run_dir / RESULT_FILE, result)
        for name, part in result["data"].items():
            _print(name, part)
        print(f"bigram counts of the same tokens: {result['bigram_loss']}")

    return run_command(body)


if __name__ == "__main__":
    raise SystemExit(main())
