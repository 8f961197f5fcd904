"""Measure what memory sites add to a training step: build/bench/overhead.json and a table.

    python tools/bench/overhead.py --run runs/graft_moe

Takes a run's recorded flags, and trains in one process, in turn, with and without its memory: the model as it is, one
four times as wide, and the model as it is with banks of ten thousand and of ten million rows. Ratios are taken between
neighbouring blocks of steps; their median has a bootstrap interval. One thread computes, so that one is left to look
ahead; run on an idle machine. What was measured stands in the file when its part ends, beside the file's other parts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from machine import OtherLoad, commit, describe_machine
from pages import page_with, plain_table
from programs import CHECKOUT
from step_times import WARM_UP_BLOCKS

from megatron_graft.bank.bf16 import bf16_from_float32
from megatron_graft.bank.keys import BankKeys, canonical_order
from megatron_graft.bank.manifest import DonorIdentity, Processing, TokenizerIdentity
from megatron_graft.bank.reader import Bank, open_bank
from megatron_graft.bank.writer import write_bank
from megatron_graft.commands import run_command, without_flags
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.errors import ConfigError, GraftError
from megatron_graft.files import write_bytes_atomically, write_json_atomically
from megatron_graft.log import get_logger
from megatron_graft.processes import available_processors

PARTS = ("memory", "wide", "rows")
FEW, MANY = 10_000, 10_000_000
TOLERANCE = 1.02
RESAMPLES = 10_000
MARK = "<!-- Everything below is made by tools/bench/overhead.py --update-page. -->"
# Flags of places that a measurement leaves alone, each with one value.
_PLACES = ("--save", "--load", "--tensorboard-dir", "--graft-run-dir", "--save-interval")
# Both runs keep the weights that they were given, by which a site adds exactly nothing. So the routers of both choose
# the same experts; else one run's experts would be more evenly loaded than the other's, and its products faster.
_AS_INITIALISED = ("--lr", "0", "--min-lr", "0", "--weight-decay", "0")
_LAYER, _ROW_WIDTH = 1, 64


class MeasurementFailed(GraftError):
    """The process that measures ended with an error; it has said why."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=CHECKOUT / "runs" / "graft_moe", metavar="DIR",
                        help="whose flags are taken (default: that of `make pretrain`)")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=48, help="of blocks (%(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="of a block (%(default)s)")
    parser.add_argument("--rows", type=int, default=MANY, help="of the large bank (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], metavar="FLAG",
                        help="further Megatron flags, the last of all")  # fmt: skip
    parser.add_argument("--build-dir", type=Path, default=CHECKOUT / "build" / "bench" / "overhead", metavar="DIR",
                        help="where banks are made and kept (default: build/bench/overhead)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: overhead.json in the build directory")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="measure nothing: print a run's JSON as a table")
    parser.add_argument("--update-page", type=Path, metavar="PAGE", help="with --markdown: write it into this page")
    return parser.parse_args(argv)


class Comparisons:
    """The parts of one measurement, each of which compares two runs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        path = arguments.run / "run.json"
        if not path.is_file():
            raise ConfigError(
                arguments.run, "is not the directory of a run", expected="a file run.json",
                remedy="make bench-overhead prepares one; any run with --graft-run-dir will do.",
            )  # fmt: skip
        recorded = json.loads(path.read_text(encoding="utf-8"))["arguments"]
        steps = (arguments.pairs + WARM_UP_BLOCKS) * arguments.steps
        self.flags = [
            *without_flags(_PLACES, recorded),
            "--train-iters",
            str(steps),
            *_AS_INITIALISED,
            *arguments.flags,
        ]

    def memory(self) -> dict[str, Any]:
        """The run's model, with and without its memory."""
        return self._measure({"with": self.flags, "without": _stock(self.flags)})

    def wide(self) -> dict[str, Any]:
        """The same four times as wide, by batches of a quarter: a token costs about twelve times as many operations."""
        sizes = _values(("--hidden-size", "--ffn-hidden-size"), self.flags)
        wider = [word for flag, size in sizes.items() for word in (flag, str(4 * int(size)))]
        batch = max(1, int(_values(("--global-batch-size",), self.flags)["--global-batch-size"]) // 4)
        micro = min(batch, int(_values(("--micro-batch-size",), self.flags)["--micro-batch-size"]))
        wider += ["--global-batch-size", str(batch), "--micro-batch-size", str(micro)]
        return self._measure({"with": [*self.flags, *wider], "without": [*_stock(self.flags), *wider]})

    def rows(self) -> dict[str, Any]:
        """The run's model with a small bank and with a large one."""
        words = _values(("--tokenizer-model", "--graft-layers"), self.flags)
        tokenizer = load_tokenizer(words["--tokenizer-model"])
        identity = TokenizerIdentity(
            fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod
        )
        runs = {}
        for name, count in (("many", self.arguments.rows), ("few", min(FEW, self.arguments.rows))):
            bank = self._bank(count, identity, open_bank(_values(("--graft-bank",), self.flags)["--graft-bank"]))
            runs[name] = [*_stock(self.flags), "--graft-bank", str(bank), "--graft-layers", words["--graft-layers"]]
        return self._measure(runs)

    def _bank(self, count: int, tokenizer: TokenizerIdentity, real: Bank) -> Path:
        """The run's own keys, the most frequent first, and then bigrams of random tokens, as rare as can be."""
        path = self.arguments.build_dir / f"bank-{count}-{tokenizer.fingerprint[:8]}"
        if path.is_dir():
            return path
        keys = filled_keys(real, count, tokenizer)
        drawn = np.random.default_rng(0).standard_normal((1 << 14, _ROW_WIDTH), dtype=np.float32)
        block = bf16_from_float32(drawn)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bank(
            path, keys=keys, layers={_LAYER: np.resize(block, (count, _ROW_WIDTH))}, tokenizer=tokenizer,
            donor=DonorIdentity(name="none", revision="00" * 32, layers=(_LAYER,), hidden_size=_ROW_WIDTH),
            processing=Processing(centred=True, normalised=True), control=None, provenance={"made_by": "the bench"},
            threads=available_processors(),
        )  # fmt: skip
        return path

    def _measure(self, runs: dict[str, list[str]]) -> dict[str, Any]:
        arguments = self.arguments
        asked = {"runs": runs, "pairs": arguments.pairs, "steps": arguments.steps}
        arguments.build_dir.mkdir(parents=True, exist_ok=True)
        path = arguments.build_dir / "asked.json"
        write_json_atomically(path, asked)
        environment = os.environ | {
            "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
            "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        }  # fmt: skip
        program = [sys.executable, str(Path(__file__).with_name("step_times.py")), str(path)]
        load = OtherLoad()
        if not load.idle:
            get_logger().warning("others use this machine: figures are doubtful")
        done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise MeasurementFailed("tools/bench/step_times.py", "failed; its own message stands above")
        measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        first, second = (measured[name]["block_seconds"] for name in runs)
        return {
            "runs": measured, "steps": arguments.steps, **ratio_of(first, second), "commit": commit(),
            "load": load.report(),
        }  # fmt: skip


def filled_keys(real: Bank, count: int, tokenizer: TokenizerIdentity) -> BankKeys:
    """``count`` keys in a bank's order: the first ones of a bank, and random bigrams that it does not have."""
    taken = min(count, real.num_rows)
    ids, orders, counts = (np.asarray(part[:taken]) for part in (real.key_ids, real.key_orders, real.key_counts))
    width = ids.shape[1]
    own = ids[orders == 2].astype(np.int64)
    known = np.unique(own[:, width - 2] * tokenizer.vocab_size + own[:, width - 1])
    generator, codes = np.random.default_rng(1), np.empty(0, dtype=np.int64)
    while len(codes) < count - taken:
        drawn = generator.integers(0, tokenizer.vocab_size**2, 2 * (count - taken))
        tokens = np.stack([drawn // tokenizer.vocab_size, drawn % tokenizer.vocab_size])
        codes = np.setdiff1d(np.union1d(codes, drawn[(tokens != tokenizer.eod).all(axis=0)]), known)
    codes = generator.permutation(codes)[: count - taken]
    random_ids = np.full((len(codes), width), ids[orders == 2].min(initial=-1), dtype=np.int32)
    random_ids[:, width - 2], random_ids[:, width - 1] = codes // tokenizer.vocab_size, codes % tokenizer.vocab_size
    keys = BankKeys(
        key_ids=np.concatenate([ids, random_ids]),
        key_orders=np.concatenate([orders, np.full(len(codes), 2, dtype=np.uint8)]),
        key_counts=np.concatenate([counts, np.ones(len(codes), dtype=np.int64)]),
    )
    order = canonical_order(keys)
    return BankKeys(key_ids=keys.key_ids[order], key_orders=keys.key_orders[order], key_counts=keys.key_counts[order])


def ratio_of(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Median over pairs of blocks of the first's time by the second's, with a 95 % bootstrap interval over pairs."""
    ratios = np.asarray(first) / np.asarray(second)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high), "pairs": len(ratios)}


def _stock(flags: Sequence[str]) -> list[str]:
    """The flags that are Megatron's own."""
    from megatron_graft.training.arguments import add_graft_arguments

    return add_graft_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_known_args(flags)[1]


def _values(names: Sequence[str], flags: Sequence[str]) -> dict[str, str]:
    """The values of flags that have one, or the first of several."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in names:
        parser.add_argument(name, dest=name, nargs="+", required=True)
    return {name: values[0] for name, values in vars(parser.parse_known_args(flags)[0]).items()}


_TITLES = {
    "memory": "with memory / without",
    "wide": "with memory / without, four times as wide",
    "rows": "many rows / few rows",
}


def table_of(results: dict[str, Any]) -> list[list[str]]:
    """One row for each comparison."""
    header = ["step time", "ratio", "95 % interval", "bound", "verdict", "stall of each, ms/step", "look-ahead of each"]
    rows = [header]
    for part, title in _TITLES.items():
        if part not in results:
            continue
        one = results[part]
        first, second = one["runs"].values()
        bound = (1 + first["flops"]["share"]) / (1 + second["flops"]["share"]) * TOLERANCE
        verdicts = {"met": one["high"], "median met": one["ratio"], "within the interval": one["low"]}
        verdict = next((name for name, value in verdicts.items() if value <= bound), "MISSED")
        rows.append([
            title, f"{one['ratio']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}", f"{bound:.3f}", verdict,
            " / ".join(f"{run['stall_ms_per_step']:.2f}" for run in (first, second)),
            " / ".join(f"{run['look_ahead_ms_per_step']:.1f}" for run in (first, second)),
        ])  # fmt: skip
    return rows


def markdown(results: dict[str, Any]) -> str:
    """What was measured, on what, and the table."""
    rows, machine = table_of(results), results["machine"]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    parts = "".join(f"- {_TITLES[part]}: {_circumstances(results[part])}\n" for part in _TITLES if part in results)
    return f"{machine['cpu']}, {machine['cores']} cores, one of them computing.\n\n" + "\n".join(lines) + f"\n\n{parts}"


def _circumstances(part: dict[str, Any]) -> str:
    parameters = " and ".join(f"{run['parameters']:,}" for run in part["runs"].values())
    tokens = next(iter(part["runs"].values()))["tokens_per_step"]
    idle = "idle" if part["load"]["idle_at_start"] else "NOT idle"
    return (
        f"{parameters} parameters; {part['pairs']} pairs of blocks of {part['steps']} x {tokens:,} "
        f"tokens; commit {part['commit']}, {idle} at the start"
    )


def _other_parts(output: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """What a file holds of measurements on this machine."""
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    return found if found.get("machine") == machine else {"machine": machine}


def main(argv: list[str] | None = None) -> None:
    """Measure and write, or show what was written."""
    arguments = parse_arguments(argv)
    if arguments.markdown is not None:
        text = markdown(json.loads(arguments.markdown.read_text(encoding="utf-8")))
        if arguments.update_page is None:
            print(text, end="")
        else:
            page = page_with(arguments.update_page.read_text(encoding="utf-8"), text, arguments.update_page, MARK)
            write_bytes_atomically(arguments.update_page, page.encode())
        return
    output, machine = arguments.output or arguments.build_dir / "overhead.json", describe_machine()
    comparisons, results = Comparisons(arguments), _other_parts(output, machine)
    for part in arguments.only:
        get_logger().info("part %s", part)
        results[part] = getattr(comparisons, part)()
        write_json_atomically(output, results)
    print(plain_table(table_of(results)))


if __name__ == "__main__":
    sys.exit(run_command(main))
