#!/usr/bin/env python3
"""Plan on paper: what a bank would cost on machines that are not here, or how far the formulas were from a build.

`build` prints bytes, core-hours, GPU-hours and wall time of every stage, and the rates that it assumes. With --check
it compares its formulas with the log of a build that has been run. The formulas: docs/building-cost.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.bank.row_layout import ROW_DTYPES
from megatron_graft.building.cost import (
    DEFAULT_ORDERS,
    BuildShape,
    Fleet,
    OrderShape,
    Rates,
    build_cost,
    combined,
)
from megatron_graft.building.cost_check import compare_with_log
from megatron_graft.building.count import check_orders
from megatron_graft.building.log_summary import read_build_log, summarise_stages
from megatron_graft.commands import run_command
from megatron_graft.errors import ConfigError
from megatron_graft.files import write_bytes_atomically
from megatron_graft.reporting.cost_page import check_table, plan_page

MOST = 1e18
"""No number of a plan is as large."""
MARK = "<!-- Everything below is made by tools/plan.py build --update-page. -->"


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build", help="a bank's build", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    _add_shape(build.add_argument_group("what is built"))
    _add_rates(build.add_argument_group("what the machines do, all of it assumed"))
    output = build.add_argument_group("output")
    output.add_argument("--check", type=Path, metavar="LOG", help="compare with this build's log (.build.jsonl)")
    output.add_argument(
        "--update-page", type=Path, metavar="PAGE", help="write the plan into this page, below its mark"
    )
    return parser


def _add_shape(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tokens", type=float, default=1e9, help="of the corpus")
    group.add_argument("--rows", type=float, default=1e6, help="of the bank")
    group.add_argument("--orders", nargs="+", type=int, default=[2, 3, 4], metavar="N", help="n-gram lengths")
    group.add_argument("--min-count", type=float, default=2, help="rarer n-grams are never kept")
    group.add_argument("--vocab-size", type=int, default=49_152, help="of the recipient's tokenizer")
    group.add_argument("--hidden-size", type=int, default=576, help="of the donor")
    group.add_argument("--layers", type=int, default=1, help="donor layers in a row")
    group.add_argument("--row-dtype", default="bfloat16", choices=ROW_DTYPES, help="what rows are stored as")
    group.add_argument("--donor-params", type=float, default=135e6, help="parameters that a donor token passes through")
    group.add_argument("--donor-tokens-per-row", type=float, default=BuildShape.donor_tokens_per_row,
                       help="with shared beginnings run once")  # fmt: skip
    group.add_argument("--chunk-ngrams", type=float, default=BuildShape.chunk_ngrams,
                       help="that a task collects, and combines before it writes them")  # fmt: skip
    group.add_argument("--slice-tokens", type=float, default=BuildShape.slice_tokens, help="of one counting task")
    for name, what in (("candidates", "n-grams formed, per token"), ("distinct", "distinct ones of them, in a chunk "
                       "of 45 M tokens")):  # fmt: skip
        group.add_argument(f"--{name}", nargs="+", default=[], metavar="ORDER=SHARE", help=what)


def _add_rates(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--nodes", type=int, default=1, help="machines")
    group.add_argument("--cores-per-node", type=int, default=2, help="that count")
    group.add_argument("--gpus-per-node", type=int, default=0, help="that run the donor; 0: cores do")
    group.add_argument("--count-mtok-per-core", type=float, default=Rates.count_tokens / 1e6,
                       help="million tokens a second, orders 2 to 5 together")  # fmt: skip
    group.add_argument("--spill-gb-per-s", type=float, default=Rates.spill_bytes / 1e9,
                       help="of one node, to and from the work directory")  # fmt: skip
    group.add_argument("--gpu-tflops", type=float, default=Rates.donor_flops / 1e12, help="peak of one GPU (or core)")
    group.add_argument("--mfu", type=float, default=Rates.mfu, help="part of the peak that the donor reaches")
    group.add_argument("--donor-tokens-per-s", type=float, help="of one GPU (or core), in place of TFLOPS and MFU")
    group.add_argument("--assemble-gb-per-s", type=float, default=Rates.assemble_bytes / 1e9, help="of float32 states")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(words)
    return run_command(lambda: _run(arguments, words))


def _run(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    _check(arguments)
    shape, rates, fleet = _shape(arguments), _rates(arguments), _fleet(arguments)
    if arguments.check is not None:
        stages = summarise_stages(read_build_log(arguments.check))
        print(check_table(figure.to_json() for figure in compare_with_log(stages, shape, rates)))
        return
    cost = build_cost(shape, rates, fleet, donor_params=arguments.donor_params)
    page = plan_page(
        {"cost": cost.to_json(), "shape": _shown_shape(arguments), "rates": _shown_rates(arguments, shape)}
    )
    if arguments.update_page is None:
        print(page, end="")
        return
    kept = [word for place, word in enumerate(words) if "--update-page" not in (word, words[place - 1])]
    command = f"```\npython tools/plan.py {' '.join(kept)}\n```\n\n"
    if not arguments.update_page.is_file():
        raise ConfigError(f"--update-page {arguments.update_page}", "does not exist")
    text = _page_with(arguments.update_page.read_text(encoding="utf-8"), command + page, arguments.update_page)
    write_bytes_atomically(arguments.update_page, text.encode())


def _page_with(page: str, plan: str, where: Path) -> str:
    if MARK not in page:
        raise ConfigError(f"--update-page {where}", "has no place for the plan", expected=f"a line {MARK}")
    return page[: page.index(MARK)] + MARK + "\n\n" + plan


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers that no plan can be made of."""
    for flag in ("nodes", "cores_per_node", "count_mtok_per_core", "spill_gb_per_s", "gpu_tflops", "mfu",
                 "assemble_gb_per_s", "donor_tokens_per_s", "donor_params", "vocab_size", "tokens", "rows",
                 "donor_tokens_per_row"):  # fmt: skip
        value = getattr(arguments, flag)
        if value is not None and not 0 < value < MOST:
            raise ConfigError(
                f"--{flag.replace('_', '-')}", "is out of range", got=value, expected=f"above 0, below {MOST:g}"
            )
    if arguments.gpus_per_node < 0:
        raise ConfigError("--gpus-per-node", "is negative", got=arguments.gpus_per_node, expected="0 or more")


def _shape(arguments: argparse.Namespace) -> BuildShape:
    return BuildShape(
        tokens=arguments.tokens,
        rows=int(arguments.rows),
        orders=check_orders(arguments.orders),
        min_count=arguments.min_count,
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        layers=arguments.layers,
        row_dtype=arguments.row_dtype,
        donor_tokens_per_row=arguments.donor_tokens_per_row,
        chunk_ngrams=arguments.chunk_ngrams,
        slice_tokens=arguments.slice_tokens,
        by_order=_orders(arguments),
    )


def _orders(arguments: argparse.Namespace) -> dict[int, OrderShape]:
    """The default shapes with what ``--candidates`` and ``--distinct`` say in their place."""
    shapes = dict(DEFAULT_ORDERS)
    for name in ("candidates", "distinct"):
        for value in getattr(arguments, name):
            order, _, share = value.partition("=")
            try:
                number, given = int(order), float(share)
            except ValueError:
                number, given = 0, 0.0
            if number < 2 or not 0 < given <= 1:
                raise ConfigError(f"--{name}", "is malformed", got=value, expected="ORDER=SHARE, such as 3=0.8")
            shapes[number] = replace(shapes[min(number, max(shapes))], **{name: given})
    return shapes


def _rates(arguments: argparse.Namespace) -> Rates:
    return Rates(
        count_tokens=arguments.count_mtok_per_core * 1e6,
        spill_bytes=arguments.spill_gb_per_s * 1e9,
        donor_flops=arguments.gpu_tflops * 1e12,
        mfu=arguments.mfu,
        assemble_bytes=arguments.assemble_gb_per_s * 1e9,
        donor_tokens=arguments.donor_tokens_per_s,
    )


def _shown_shape(arguments: argparse.Namespace) -> dict[str, str]:
    return {
        "corpus": f"{arguments.tokens:.4g} tokens",
        "bank": f"{arguments.rows:.4g} rows × {arguments.layers} × {arguments.hidden_size} {arguments.row_dtype}",
        "n-grams": f"orders {' '.join(map(str, arguments.orders))}, at least {arguments.min_count:g} times",
        "machines": f"{arguments.nodes} nodes of {arguments.cores_per_node} cores and {arguments.gpus_per_node} GPUs",
    }


def _shown_rates(arguments: argparse.Namespace, shape: BuildShape) -> dict[str, str]:
    """Every rate that the plan stands on."""
    if arguments.donor_tokens_per_s:
        donor = f"{arguments.donor_tokens_per_s:,.4g} tokens/s a device"
    else:
        donor = (
            f"2 FLOPs a parameter and token, {arguments.donor_params:.3g} parameters, {arguments.gpu_tflops:g} TFLOP/s "
            f"at {arguments.mfu:.0%}"
        )
    rates = _rates(arguments)
    spans = {order: shape.of_order(order) for order in range(2, shape.orders[-1] + 1)}
    return {
        "counting": f"{arguments.count_mtok_per_core:g} M tokens/s a core for orders 2 to 5, "
                    f"{rates.reduce_share:.0%} of it in reduce stages",
        "work directory": f"{arguments.spill_gb_per_s:g} GB/s a node",
        "chunk": f"{shape.chunk_ngrams:.3g} n-grams are collected, and combined before they are written",
        "candidates a token": ", ".join(f"{order}: {span.candidates:.2f}" for order, span in spans.items()),
        "distinct of them in a chunk": ", ".join(f"{order}: {combined(shape, order):.2f}" for order in spans),
        "donor": donor,
        "donor tokens a row": f"{shape.donor_tokens_per_row:g}",
        "select, pack, report (one core)": f"{rates.select_rows:,.0f}, {rates.pack_rows:,.0f} and "
                                           f"{rates.report_rows:,.0f} rows/s",
        "assemble (one core)": f"{arguments.assemble_gb_per_s:g} GB/s of float32 states",
    }  # fmt: skip


def _fleet(arguments: argparse.Namespace) -> Fleet:
    return Fleet(nodes=arguments.nodes, cores=arguments.cores_per_node, devices=arguments.gpus_per_node)


if __name__ == "__main__":
    raise SystemExit(main())
