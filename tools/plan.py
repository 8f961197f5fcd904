#!/usr/bin/env python3
"""Plan on paper: what a bank or a training run would cost on machines that are not here.

`build` prints bytes, core-hours, GPU-hours and wall time of every stage, and the rates that it assumes. With --check
it compares its formulas with the log of a build that has been run. The formulas: docs/building-cost.md.

`train` reads a run's own flags, after --, and prints what each of any number of ranks will hold and move, and which
resource binds first. The formulas: megatron_graft/training/run_cost.py; worked through in docs/scale.md.

`page` runs every `<!-- plan: ARGUMENTS -->` of a page again and writes what it prints behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.bank.manifest import MAX_NODES, MAX_ORDER
from megatron_graft.bank.row_layout import ROW_DTYPES
from megatron_graft.building.bank_size import bank_bytes
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
from megatron_graft.reporting.run_plan_page import run_plan_page
from megatron_graft.training.run_terms import BankShape, Machine, TextShape

MOST = 1e18
"""No number of a plan is as large."""
PLANS = re.compile(r"(?P<head><!-- plan: (?P<arguments>[^>]*?)\s*-->).*?<!-- /plan -->", re.DOTALL)
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
    _add_train(commands)
    page = commands.add_parser("page", help="make the plans of a page anew", allow_abbrev=False)
    page.add_argument("page", type=Path, metavar="PAGE", help="a Markdown file")
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train", help="a training run", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
        usage="%(prog)s --world-size N [options] -- FLAGS OF THE RUN",
    )  # fmt: skip
    what = train.add_argument_group("the run")
    what.add_argument("--world-size", type=int, required=True, help="number of ranks, one a GPU")
    what.add_argument("--bank-shape", metavar="ROWSxWIDTH[,WIDTH...][:DTYPE]",
                      help="in place of every --graft-bank of the run, which then need not exist")  # fmt: skip
    what.add_argument("--bank-max-order", type=int, default=4, help="its longest n-gram")
    text = train.add_argument_group("what the text makes of the memory, assumed")
    for name, value in vars(TextShape()).items():
        text.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=_TEXT_HELP[name])
    machine = train.add_argument_group("a node, all of it assumed")
    for name, (scale, what_it_is) in _MACHINE_HELP.items():
        value = getattr(Machine(), name) / scale
        machine.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=what_it_is)
    machine.add_argument("--step-seconds", type=float, help="of a step, in place of operations over TFLOPS and MFU")
    train.add_argument("--json", action="store_true", help="print figures instead of tables")


_TEXT_HELP = {
    "hit_rate": "share of positions that match a key",
    "distinct": "distinct rows over matches, in a micro-batch of one rank",
    "distinct_table": "the same of trained tables",
}
_MACHINE_HELP = {
    "devices": (1, "GPUs of a node"),
    "cores": (1, "of a node"),
    "device_memory": (1e9, "GB of one GPU"),
    "host_memory": (1e9, "GB of a node"),
    "host_bandwidth": (1e9, "GB/s of a node's memory"),
    "link_bandwidth": (1e9, "GB/s from host to one GPU"),
    "network": (1e9, "GB/s of one GPU to other nodes"),
    "flops": (1e12, "TFLOP/s of one GPU at its peak"),
    "mfu": (1, "part of the peak that a step reaches"),
    "lookup": (1e6, "million positions a second that one core looks up"),
    "gather": (1e9, "GB/s that one core gathers"),
}


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
    if words[:1] == ["train"]:
        end = words.index("--") if "--" in words else len(words)
        arguments, flags = build_parser().parse_args(words[:end]), words[end + 1 :]
        return run_command(lambda: _plan_train(arguments, flags))
    arguments = build_parser().parse_args(words)
    if arguments.command == "page":
        return run_command(lambda: _remake(arguments.page))
    return run_command(lambda: _run(arguments, words))


def _remake(page: Path) -> None:
    """Each plan by a process of its own: Megatron reads one command line per process."""

    def made(mark: re.Match[str]) -> str:
        command = [sys.executable, str(Path(__file__)), *mark["arguments"].split()]
        result = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False)
        if result.returncode != 0:
            raise ConfigError(page, "has a plan that cannot be made; why stands above", got=mark["arguments"])
        return f"{mark['head']}\n\n{result.stdout.strip()}\n\n<!-- /plan -->"

    if not page.is_file():
        raise ConfigError(page, "does not exist", expected="a Markdown page")
    write_bytes_atomically(page, PLANS.sub(made, page.read_text(encoding="utf-8")).encode())


def _plan_train(arguments: argparse.Namespace, flags: Sequence[str]) -> None:
    machine, text = _machine(arguments), TextShape(**{name: getattr(arguments, name) for name in _TEXT_HELP})
    with contextlib.redirect_stdout(sys.stderr):  # Megatron says a lot on the way
        from megatron_graft.compat import cpu

        cpu.install()
        from megatron_graft.training.run_cost import forward_flops, stage_costs
        from megatron_graft.training.run_limits import demands, most_rows, step_seconds
        from megatron_graft.training.run_plan import plan_run

        plan = plan_run(flags, arguments.world_size, _bank_shape(arguments))
    costs = stage_costs(plan.shape, text)
    seconds = step_seconds(plan, machine) if arguments.step_seconds is None else arguments.step_seconds
    if not seconds > 0:
        raise ConfigError("--step-seconds", "is out of range", got=seconds, expected="above 0")
    figures = {
        "run": _shown_run(arguments, plan),
        "assumed": [
            [f"--{name.replace('_', '-')}", f"{getattr(arguments, name):g}", what] for name, what in _assumptions()
        ],
        "stages": [asdict(cost) for cost in costs],
        "step_seconds": seconds,
        "tokens": plan.tokens,
        "sites_share": 3 * forward_flops(plan.shape) / plan.backbone_flops,
        "backbone_state": plan.backbone_state,
        "demands": [
            asdict(one) | {"share": one.share} for one in demands(plan, costs, machine, seconds)
        ],
        "most_rows": most_rows(plan, machine, share=0.8),
    }  # fmt: skip
    print(json.dumps(figures, indent=2) if arguments.json else run_plan_page(figures), end="")


def _assumptions() -> list[tuple[str, str]]:
    return [*_TEXT_HELP.items(), *((name, what) for name, (_, what) in _MACHINE_HELP.items())]


def _machine(arguments: argparse.Namespace) -> Machine:
    for name in (*_MACHINE_HELP, *_TEXT_HELP, "world_size"):
        value = getattr(arguments, name)
        if not 0 < value < MOST:
            raise ConfigError(
                f"--{name.replace('_', '-')}", "is out of range", got=value, expected=f"above 0, below {MOST:g}"
            )
    return Machine(**{name: getattr(arguments, name) * scale for name, (scale, _) in _MACHINE_HELP.items()})


def _bank_shape(arguments: argparse.Namespace) -> BankShape | None:
    if arguments.bank_shape is None:
        return None
    longest = arguments.bank_max_order
    if not 2 <= longest <= MAX_ORDER:
        raise ConfigError("--bank-max-order", "is no n-gram's length", got=longest, expected=f"2 to {MAX_ORDER}")
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\+?\d+)?)x(\d+(?:,\d+)*)(?::(\w+))?", arguments.bank_shape)
    dtype = (found and found[3]) or "bfloat16"
    if found is None or dtype not in ROW_DTYPES:
        raise ConfigError(
            "--bank-shape", "is malformed", got=arguments.bank_shape, expected="such as 3e6x2048,2048:bfloat16"
        )
    given, widths = float(found[1]), tuple(int(width) for width in found[2].split(","))
    if not 1 <= given <= MAX_NODES or min(widths) < 1:
        raise ConfigError(
            "--bank-shape",
            "is out of range",
            got=arguments.bank_shape,
            expected=f"1 to {MAX_NODES} rows, widths from 1",
        )
    rows = int(given)
    orders = range(2, longest + 1)
    size = bank_bytes(
        num_rows=rows, entries={order: rows // len(orders) for order in orders}, nodes=rows, vocab_size=1 << 17,
        widths=widths, row_dtype=dtype,
    )  # fmt: skip
    return BankShape(
        num_rows=rows, layers=tuple(range(1, len(widths) + 1)), widths=widths, max_order=longest,
        row_dtype=dtype, num_bytes=float(size.total),
    )  # fmt: skip


def _shown_run(arguments: argparse.Namespace, plan: Any) -> dict[str, str]:
    run = plan.shape
    banks = ", ".join(f"{bank.num_rows:,} rows × {sum(bank.widths):,} {bank.row_dtype}" for bank in plan.banks)
    return {
        "ranks": f"{run.world_size:,}: {run.tensor} tensor × {run.context} context × {run.pipeline} pipeline"
        + (f" (of {run.virtual} chunks)" if run.virtual > 1 else "")
        + f" × {run.data} data parallel",
        "step": f"{run.micro_batches} micro-batches of {run.micro_batch} × {run.sequence:,} tokens on each rank",
        "banks": banks or "none",
    }


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
            nearest = max(order for order in shapes if order <= number)
            shapes[number] = replace(shapes[nearest], **{name: given})
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
