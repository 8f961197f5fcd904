"""Measure lookup, gather and opening, and compare every design's answers: build/bench/lookup.json and a table.

Everything is made below --build-dir and kept between runs. Ratios are taken within one run; run on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from banks import bench_bank
from corpus import Corpus, measure_corpus, prepare_corpus
from machine import OtherLoad, commit, describe_machine
from opening import measure_opening
from pages import TARGET_HEADER, markdown, page_with, plain_table, proof, target_rows
from programs import CHECKOUT, KeysOnDisk, bench_lookup, build_programs, make_keys, run_program
from python_gather import measure_gather
from python_lookup import adversarial_tokens, measure_lookup
from targets import ANSWERS, TARGETS, judge

from megatron_graft.bank.reader import open_bank
from megatron_graft.commands import run_command
from megatron_graft.errors import GraftError
from megatron_graft.files import write_bytes_atomically, write_json_atomically
from megatron_graft.log import format_seconds, get_logger


class WrongAnswers(GraftError):
    """Two designs disagreed about a lookup, or two gathers about a row."""


PARTS = ("lookup", "vocabularies", "python", "python_gather", "gather", "open", "corpus")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of everything: for figures, or for checking the answers in little time."""

    tokens: int  # of synthetic text that keys are counted over
    positions: int
    rounds: int
    line_reads: int
    vocabulary_tokens: int
    python_rows: int
    python_positions: int
    gather_rows: int
    gather_bytes: tuple[int, int]  # source and output of the C++ gather bench


SIZES = {
    "large": Size(
        tokens=400_000_000, positions=4_000_000, rounds=7, line_reads=4_000_000, vocabulary_tokens=40_000_000,
        python_rows=1_000_000, python_positions=200_000, gather_rows=524_288, gather_bytes=(1 << 30, 1 << 28),
    ),
    "small": Size(
        tokens=850_000, positions=100_000, rounds=1, line_reads=100_000, vocabulary_tokens=200_000,
        python_rows=20_000, python_positions=5_000, gather_rows=2_000, gather_bytes=(1 << 24, 1 << 22),
    ),
}  # fmt: skip
HELD_OUT_TOKENS = {"large": 16_777_216, "small": 131_072}
VOCAB_SIZE = 1 << 17
OTHER_VOCAB_SIZES = (1 << 13, 1 << 15, 1 << 20)
GATHER_WIDTH = 1024  # bfloat16 numbers: 2 KiB a row


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", choices=tuple(SIZES), default="large",
                        help="large: about 50 M, for figures (default); small: about 0.1 M, for checks")  # fmt: skip
    parser.add_argument("--build-dir", type=Path, default=CHECKOUT / "build" / "bench", metavar="DIR",
                        help="where everything is made (default: build/bench)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: lookup.json in the build directory")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"measure these parts only: {', '.join(PARTS)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, metavar="N", help="of every measurement (default: 7; small: 1)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--corpus-text", type=Path, nargs="+", default=[], metavar="FILE",
                        help=".txt or .jsonl of the real corpus (default: the default sources, fetched)")  # fmt: skip
    parser.add_argument("--data-prefix", nargs="+", metavar="PREFIX",
                        help="training .bin/.idx of a real corpus that is prepared already")  # fmt: skip
    parser.add_argument("--held-out-prefix", nargs="+", metavar="PREFIX", help="its held-out .bin/.idx")
    parser.add_argument("--tokenizer-model", type=Path, metavar="FILE",
                        help="tokenizer of --data-prefix or of the text (default: trained on the text)")  # fmt: skip
    parser.add_argument("--reuse-index", action="store_true",
                        help="do not build the main index again if it is there: while tuning the walk")  # fmt: skip
    parser.add_argument("--markdown", type=Path, metavar="JSON",
                        help="measure nothing: print the page's tables from a run's JSON")  # fmt: skip
    parser.add_argument("--proof", type=Path, metavar="JSON",
                        help="with --markdown: add what `make prove-lookup` wrote")  # fmt: skip
    parser.add_argument("--update-page", type=Path, metavar="PAGE",
                        help="with --markdown: write the tables into this page, below its mark, instead")  # fmt: skip
    arguments = parser.parse_args(argv)
    prepared = (arguments.data_prefix, arguments.held_out_prefix)
    if any(prepared) and not all((*prepared, arguments.tokenizer_model)):
        parser.error("--data-prefix, --held-out-prefix and --tokenizer-model go together")
    if arguments.threads < 1 or (arguments.rounds is not None and arguments.rounds < 1):
        parser.error("--threads and --rounds are at least 1")
    return arguments


class Run:
    """The parts of one run; each gives plain JSON values."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.size = SIZES[arguments.entries]
        self.rounds: int = arguments.rounds or self.size.rounds
        self.threads: int = arguments.threads
        self.data: Path = arguments.build_dir / "data"
        self.programs = build_programs(arguments.build_dir / "programs", jobs=os.cpu_count() or 1)

    def keys(self, vocab_size: int = VOCAB_SIZE) -> KeysOnDisk:
        """The synthetic keys of a vocabulary; the main one has the most."""
        tokens = self.size.tokens if vocab_size == VOCAB_SIZE else self.size.vocabulary_tokens
        return make_keys(
            self.programs, self.data, tokens=tokens, vocab_size=vocab_size,
            held_out_tokens=HELD_OUT_TOKENS[self.arguments.entries], threads=self.threads,
        )  # fmt: skip

    def lookup(self) -> dict[str, Any]:
        """Everything about the main index, in C++."""
        keys = self.keys()
        measured = bench_lookup(
            self.programs, keys, positions=self.size.positions, rounds=self.rounds, threads=self.threads,
            line_reads=self.size.line_reads, reuse_index="yes" if self.arguments.reuse_index else "no",
        )  # fmt: skip
        return {"made": keys.made, **measured}

    def vocabularies(self) -> list[dict[str, Any]]:
        """Index size for vocabularies of other sizes, and their speed for what it is worth at fewer entries."""
        results = []
        for vocab_size in OTHER_VOCAB_SIZES:
            measured = bench_lookup(
                self.programs, self.keys(vocab_size), positions=self.size.positions // 4, rounds=self.rounds,
                threads=self.threads, line_reads=self.size.line_reads // 4, measure="pages",
            )  # fmt: skip
            results.append({"vocab_size": vocab_size, **measured["build"], **measured})
        return results

    def python(self) -> dict[str, Any]:
        """Ours through Python beside a dict and ``torch.searchsorted``; all compared with the definition."""
        bank = bench_bank(self.data, self.keys(), rows=self.size.python_rows, width=2, threads=self.threads)
        text = self.keys().text(self.size.python_positions)
        queries = {"text": text, "adversarial": adversarial_tokens(bank, self.size.python_positions)}
        return measure_lookup(bank, queries, self.rounds)

    def python_gather(self) -> dict[str, Any]:
        """The bank's gather beside ``torch.index_select(out=)``."""
        bank = bench_bank(
            self.data, self.keys(), rows=self.size.gather_rows, width=GATHER_WIDTH, threads=self.threads
        )  # fmt: skip
        return measure_gather(bank.path, open_bank, self.size.gather_rows // 4, self.rounds)

    def gather(self) -> dict[str, Any]:
        """The gather in C++ beside plain copies of as many bytes."""
        source_bytes, output_bytes = self.size.gather_bytes
        return run_program(
            self.programs / "bench_gather", source_bytes=source_bytes, output_bytes=output_bytes,
            rounds=self.rounds, threads=self.threads,
        )  # fmt: skip

    def open(self) -> dict[str, Any]:
        """Opening a bank of all keys, with rows of one number each."""
        bank = bench_bank(self.data, self.keys(), rows=None, width=1, threads=self.threads)
        return measure_opening(bank.path, self.rounds)

    def corpus(self) -> dict[str, Any]:
        """The real corpus."""
        arguments = self.arguments
        if arguments.data_prefix:
            corpus = Corpus(
                tokenizer=arguments.tokenizer_model,
                train_prefixes=arguments.data_prefix,
                held_out_prefixes=arguments.held_out_prefix,
            )
        else:
            work = arguments.build_dir / "corpus"
            corpus = prepare_corpus(work, arguments.corpus_text, arguments.tokenizer_model)
        return measure_corpus(self.programs, self.data, corpus, rounds=self.rounds, threads=self.threads)


def _measure(arguments: argparse.Namespace) -> None:
    load = OtherLoad()
    if not load.idle:
        get_logger().warning("the machine is not idle (%.0f %% busy): doubt figures", 100 * load.busy_share_at_start)
    run = Run(arguments)
    results: dict[str, Any] = {"machine": describe_machine(), "commit": commit(), "entries": arguments.entries}
    results["threads"], results["rounds"] = run.threads, run.rounds
    for part in (part for part in PARTS if part in arguments.only):
        started = time.monotonic()
        measure: Callable[[], Any] = getattr(run, part)
        try:
            results[part] = measure()
        except GraftError as error:
            if part != "corpus":  # the one part that needs a network
                raise
            get_logger().warning("%s", error)
            results[part] = {"not_measured": str(error)}
        get_logger().info("%s: %s", part, format_seconds(time.monotonic() - started))
    results["load"] = load.report()
    # A small bank lies in the caches: its figures say nothing about the promises, which are for 50 M entries.
    results["targets"] = judge(results, TARGETS if arguments.entries == "large" else [ANSWERS])
    output = arguments.output or arguments.build_dir / "lookup.json"
    write_json_atomically(output, results)
    print(plain_table([TARGET_HEADER, *target_rows(results)]))
    print(f"written to {output}")
    answers = results["targets"][-1]  # no figure if no part that was asked for compares any
    if differing := answers["figure"]:
        raise WrongAnswers(output, "records answers that differ between designs", got=f"{differing:,.0f}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = parse_arguments(argv)
    if arguments.markdown:
        return run_command(lambda: _print_tables(arguments))
    return run_command(lambda: _measure(arguments))


def _print_tables(arguments: argparse.Namespace) -> None:
    tables = markdown(json.loads(arguments.markdown.read_text(encoding="utf-8")))
    if arguments.proof:
        tables += "\n" + proof(json.loads(arguments.proof.read_text(encoding="utf-8")))
    if arguments.update_page:
        page = arguments.update_page.read_text(encoding="utf-8")
        write_bytes_atomically(arguments.update_page, page_with(page, tables, arguments.update_page).encode())
    else:
        print(tables, end="")


if __name__ == "__main__":
    raise SystemExit(main())
