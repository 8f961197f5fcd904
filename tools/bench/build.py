"""Measure the building of banks beside what else could do it: build/bench/building.json and a table.

Counting against KenLM's lmplz, its memory against a corpus five times as large; the donor's packs against batches of
whole texts. Ratios are taken within one run, on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from build_pages import MARK, building_tables
from counting import compare_with_lmplz, measure_memory, measure_rate
from encoding import measure_encoding
from machine import OtherLoad, commit, describe_machine
from pages import TARGET_HEADER, page_with, plain_table, target_rows
from programs import CHECKOUT
from targets import BUILD_TARGETS, judge

from megatron_graft.building.count import CountedNgrams, count_stages
from megatron_graft.building.count_plan import plan_counts
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.building.select import Quota, select_ngrams
from megatron_graft.building.tasks import BuildLog, run_stage
from megatron_graft.commands import run_command
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.files import write_bytes_atomically, write_json_atomically
from megatron_graft.log import format_seconds, get_logger

PARTS = ("count", "memory", "encode")
ENCODE_ORDERS = (2, 3, 4, 5)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    work = CHECKOUT / "work"
    parser.add_argument("--data-prefix", default=str(work / "data" / "train_text_document"), metavar="PREFIX",
                        help="real text to count (default: that of `make pretrain`)")  # fmt: skip
    parser.add_argument("--tokenizer-model", type=Path, default=work / "tokenizer" / "tokenizer.model", metavar="FILE",
                        help="its tokenizer (default: likewise)")  # fmt: skip
    parser.add_argument("--donor", type=Path, default=work / "donor" / "smollm2-135m", metavar="DIR",
                        help="a donor (default: likewise)")  # fmt: skip
    parser.add_argument("--donor-layers", type=int, nargs="+", default=[12], metavar="N", help="default: 12")
    parser.add_argument("--rows", type=int, default=200_000, help="of the bank whose texts are encoded (%(default)s)")
    parser.add_argument("--sample-packs", type=int, default=24, help="passes that are timed (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the encoding (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the donor (%(default)s)")
    parser.add_argument("--lmplz", type=Path, metavar="FILE", help="KenLM's program, if it is there to compare with")
    parser.add_argument("--tokens", type=int, metavar="N", help="count the first N tokens only")
    parser.add_argument("--memory-gb", type=float, default=0.5, help="bound of the memory test (%(default)s)")
    parser.add_argument("--memory-tokens", type=int, default=690_000_000, metavar="N",
                        help="ids of the memory test, 4 bytes each (%(default)s)")  # fmt: skip
    parser.add_argument("--build-dir", type=Path, default=CHECKOUT / "build" / "bench", metavar="DIR",
                        help="where everything is made (default: build/bench)")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: building.json in the build directory")
    parser.add_argument("--markdown", type=Path, metavar="JSON",
                        help="measure nothing: print the tables of a run's JSON")  # fmt: skip
    parser.add_argument("--update-page", type=Path, metavar="PAGE", help="with --markdown: write them into this page")
    return parser.parse_args(argv)


class Run:
    """The parts of one run; each gives plain JSON values."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.tokenizer = load_tokenizer(arguments.tokenizer_model)
        self.work: Path = arguments.build_dir / "building"

    def count(self) -> dict[str, Any]:
        """The real text, by us and by lmplz."""
        arguments = self.arguments
        data = (arguments.data_prefix, self.tokenizer.vocab_size, self.tokenizer.eod, self.work / "count")
        compared = compare_with_lmplz(*data, arguments.lmplz, tokens=arguments.tokens)
        if "not_measured" not in compared:
            return compared
        return {"ours": measure_rate(*data, tokens=arguments.tokens), **compared}

    def memory(self) -> dict[str, Any]:
        """Synthetic ids, far more than the memory."""
        arguments = self.arguments
        return measure_memory(self.work / "memory", memory_gb=arguments.memory_gb, tokens=arguments.memory_tokens)

    def encode(self) -> dict[str, Any]:
        """The texts of a bank of the real text, packed and whole."""
        arguments = self.arguments
        vocab_size, eod = self.tokenizer.vocab_size, self.tokenizer.eod
        plan = plan_counts(
            MegatronDocuments([arguments.data_prefix], split=None, vocab_size=vocab_size),
            weights=None, orders=ENCODE_ORDERS, eod=eod, min_count=2, count_by="occurrences", memory_bytes=2 << 30,
        )  # fmt: skip
        work = self.work / "encode"
        for stage in count_stages(plan, work):
            run_stage(stage, work, BuildLog(work / "log.jsonl"))
        selection = select_ngrams(CountedNgrams(plan, work), self.tokenizer, Quota(num_rows=arguments.rows))
        shutil.rmtree(work)
        return measure_encoding(
            arguments.donor, selection.texts, arguments.donor_layers, sample_packs=arguments.sample_packs,
            rounds=arguments.rounds, threads=arguments.threads,
        )  # fmt: skip


def _measure(arguments: argparse.Namespace) -> None:
    load = OtherLoad()
    if not load.idle:
        get_logger().warning("the machine is not idle (%.0f %% busy): doubt figures", 100 * load.busy_share_at_start)
    run = Run(arguments)
    results: dict[str, Any] = {"machine": describe_machine(), "commit": commit()}
    for part in (part for part in PARTS if part in arguments.only):
        started = time.monotonic()
        measure: Callable[[], Any] = getattr(run, part)
        results[part] = measure()
        get_logger().info("%s: %s", part, format_seconds(time.monotonic() - started))
    results["load"] = load.report()
    results["targets"] = judge(results, BUILD_TARGETS)
    output = arguments.output or arguments.build_dir / "building.json"
    write_json_atomically(output, results)
    print(plain_table([TARGET_HEADER, *target_rows(results)]))
    print(f"written to {output}")


def _print_tables(arguments: argparse.Namespace) -> None:
    tables = building_tables(json.loads(arguments.markdown.read_text(encoding="utf-8")))
    if arguments.update_page:
        page = arguments.update_page.read_text(encoding="utf-8")
        write_bytes_atomically(arguments.update_page, page_with(page, tables, arguments.update_page, MARK).encode())
    else:
        print(tables, end="")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = parse_arguments(argv)
    return run_command(lambda: (_print_tables if arguments.markdown else _measure)(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
