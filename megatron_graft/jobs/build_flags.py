"""The flags of a bank's build, from the command line or a YAML file, and the configuration they make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from megatron_graft.bank.manifest import Control
from megatron_graft.bank.quantise import BUILD_DTYPES
from megatron_graft.building.build_plan import GIB, BankBuildConfig
from megatron_graft.building.count_plan import MIN_MEMORY_BYTES
from megatron_graft.building.donor import DonorDtype
from megatron_graft.building.packs import DEFAULT_PACK_TOKENS
from megatron_graft.errors import ConfigError
from megatron_graft.processes import available_processors

ALL_ROWS = "all"
_NOT_IN_FILES = ("help", "config")
_OF_BUILD_BANK = (
    "estimate", "estimate_tokens", "executor", "from_bank", "keep_work", "slurm_encode_gpus",
    "slurm_encode_partition", "slurm_flags", "slurm_partition", "slurm_time",
)  # fmt: skip
"""Flags of tools/build_bank.py alone; a file that has some serves tools/build_stage.py, too."""


def add_build_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is built and from what; their defaults are those of the command."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of flags; the command line wins")
    data = parser.add_argument_group("what is counted")
    data.add_argument(
        "--data-prefix", nargs="+", metavar="PREFIX",
        help="data sets, without .bin/.idx; or, as in Megatron's --data-path, WEIGHT PREFIX ...",
    )  # fmt: skip
    data.add_argument("--split", help="--split of the training run: only its training share is counted")
    data.add_argument("--tokenizer-model", help="tokenizer that made the data: *.model or tokenizer.json")
    data.add_argument("--orders", nargs="+", type=int, default=[2, 3, 4], metavar="N", help="n-gram lengths, 2 to 8")
    data.add_argument("--num-rows", type=_rows, default=50_000, metavar="K", help="n-grams to keep, or 'all'")
    data.add_argument("--rows-by-order", nargs="+", default=[], metavar="N=K", help="n-grams to keep of each order")
    data.add_argument("--min-count", type=int, default=2, help="rarer n-grams are never kept")
    data.add_argument("--count-by", default="occurrences", choices=("occurrences", "documents"),
                      help="what is counted: every occurrence, or the documents that hold it")  # fmt: skip
    donor = parser.add_argument_group("the donor")
    donor.add_argument("--donor", type=Path, metavar="DIR", help="local Hugging Face causal-LM directory")
    donor.add_argument(
        "--donor-layers", nargs="+", type=int, default=[12], metavar="N", help="blocks, from 1; 0 = embedding"
    )
    donor.add_argument("--donor-dtype", default="auto", choices=get_args(DonorDtype),
                       help="type of weights and states; auto: bfloat16 on a GPU, float32 on a CPU")  # fmt: skip
    donor.add_argument("--pack-tokens", type=int, default=DEFAULT_PACK_TOKENS, help="donor tokens of one pass")
    donor.add_argument(
        "--batch-packs", type=int, metavar="N", help="passes side by side on a GPU (default: as memory allows)"
    )
    donor.add_argument(
        "--threads", type=int, metavar="N", help="passes side by side on a CPU (default: its processors)"
    )
    rows = parser.add_argument_group("the rows")
    rows.add_argument("--raw", action="store_true", help="neither centre nor normalise the rows")
    rows.add_argument("--row-dtype", default="bfloat16", choices=BUILD_DTYPES, help="int8 has a scale a row")
    rows.add_argument("--control", choices=("shuffled", "random"), help="a control bank: same keys, other rows")
    rows.add_argument("--seed", type=int, default=0, help="seed of the control")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="DIR", help="the bank's directory")
    output.add_argument("--coverage", nargs="+", default=[], metavar="NAME=PREFIX", help="more data sets to report on")
    work = parser.add_argument_group("the work (changes nothing in the bank)")
    work.add_argument("--work-dir", type=Path, metavar="DIR", help="what is done so far (default: OUTPUT.build)")
    work.add_argument(
        "--memory-gb", type=float, default=4.0, help="most memory of counting, all workers together, in GiB"
    )
    work.add_argument(
        "--workers", type=int, metavar="N",
        help="processes that count side by side; 0: this one (default: as many as there are processors and memory for)",
    )  # fmt: skip
    work.add_argument(
        "--encode-tasks",
        type=int,
        metavar="N",
        help="tasks of the donor's work (default: 100,000 rows each; 16 with --num-rows all)",
    )
    work.add_argument("--count-slices", type=int, metavar="N", help="tasks that read the corpus (default: as fits)")
    work.add_argument("--count-partitions", type=int, metavar="N", help="tasks that sum counts (default: as fits)")


def parse_build_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line whose ``--config`` file, if there is one, gives the defaults.

    Raises:
        ConfigError: the file cannot be read, or names a flag that there is not.
    """
    early, _ = parser.parse_known_args(argv)
    if early.config is not None:
        parser.set_defaults(**_file_defaults(parser, early.config))
    return parser.parse_args(argv)


def _file_defaults(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    import yaml

    try:
        # Texts alone: YAML would read 12:00:00 as a number of seconds, and the flags know what they are.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ConfigError(f"--config {path}", "cannot be read", got=error.strerror) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"--config {path}", "is not YAML", got=first_line, expected="lines of FLAG: VALUE") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path}", "is no mapping", got=type(values).__name__, expected="lines of FLAG: VALUE"
        )
    actions = {action.dest: action for action in parser._actions if action.dest not in _NOT_IN_FILES}
    found = {str(name).replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(found.keys() - actions.keys() - set(_OF_BUILD_BANK)):
        known = ", ".join(sorted(name.replace("_", "-") for name in actions))
        raise ConfigError(f"--config {path}", "names unknown flags", got=", ".join(unknown), expected=known)
    return {name: _as_flag(actions[name], value, path) for name, value in found.items() if name in actions}


def _as_flag(action: argparse.Action, value: Any, path: Path) -> Any:
    """The value as the flag would have parsed it."""
    many = action.nargs == "+"
    if isinstance(value, dict) and many:  # rows-by-order: {2: 1000}, coverage: {heldout: prefix}
        value = [f"{name}={part}" for name, part in value.items()]
    if action.nargs == 0:
        if str(value).lower() not in ("true", "false"):
            raise ConfigError(
                f"--config {path}", f"gives {action.dest} no truth value", got=value, expected="true or false"
            )
        return str(value).lower() == "true"
    if value in ("", "null", "~"):
        return action.default
    if isinstance(value, list) != many:
        expected = "a list" if many else "one value"
        raise ConfigError(
            f"--config {path}", f"gives {action.dest} the wrong kind of value", got=value, expected=expected
        )
    texts = [str(part) for part in (value if many else [value])]
    convert = action.type if callable(action.type) else str
    try:
        parsed = [convert(text) for text in texts]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"--config {path}", f"gives {action.dest} a value it cannot have", got=value) from error
    if action.choices is not None and (wrong := [part for part in parsed if part not in action.choices]):
        expected = ", ".join(map(str, action.choices))
        raise ConfigError(
            f"--config {path}", f"gives {action.dest} a value it cannot have", got=wrong[0], expected=expected
        )
    return parsed if many else parsed[0]


def config_of(flags: argparse.Namespace) -> BankBuildConfig:
    """The configuration that flags ask for.

    Raises:
        ConfigError: a flag is missing or malformed.
    """
    for flag in ("--data-prefix", "--tokenizer-model", "--donor", "--output"):
        if not getattr(flags, flag[2:].replace("-", "_")):
            raise ConfigError(flag, "is missing", remedy="Give it, or write it into the file of --config.")
    prefixes, weights = blend(flags.data_prefix)
    return BankBuildConfig(
        data_prefixes=tuple(str(Path(prefix).absolute()) for prefix in prefixes),
        data_weights=weights,
        split=flags.split,
        orders=tuple(flags.orders),
        num_rows=flags.num_rows,
        rows_by_order=_rows_by_order(flags.rows_by_order),
        min_count=flags.min_count,
        count_by=flags.count_by,
        donor_layers=tuple(flags.donor_layers),
        pack_tokens=flags.pack_tokens,
        raw=flags.raw,
        control=control_of(flags),
        row_dtype=flags.row_dtype,
        output=flags.output.absolute(),
        work_dir=flags.work_dir.absolute() if flags.work_dir else None,
        workers=_default_workers(flags.memory_gb) if flags.workers is None else flags.workers,
        memory_gb=flags.memory_gb,
        encode_tasks=flags.encode_tasks,
        count_slices=flags.count_slices,
        count_partitions=flags.count_partitions,
    )


def control_of(flags: argparse.Namespace) -> Control | None:
    """The control that flags ask for.

    Raises:
        ConfigError: the seed is negative.
    """
    if flags.seed < 0:
        raise ConfigError("--seed", "is negative", got=flags.seed, expected="0 or more")
    return Control(kind=flags.control, seed=flags.seed) if flags.control else None


def blend(values: Sequence[str]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    """Data sets and weights of ``--data-prefix``: ``A B``, or ``0.3 A 0.7 B`` as in Megatron's ``--data-path``.

    Raises:
        ConfigError: some data sets have a weight and others have none, or a weight is not above 0.
    """
    weights = [_number(value) for value in values]
    if all(weight is None for weight in weights):
        return tuple(values), None
    given = weights[::2]
    paired = len(values) % 2 == 0 and all(weight is None for weight in weights[1::2])
    if not paired or any(weight is None or not 0 < weight < float("inf") for weight in given):
        raise ConfigError(
            "--data-prefix", "is no blend", got=" ".join(values),
            expected="prefixes alone, or pairs of a weight above 0 and a prefix",
            remedy="Write a file named like a number as ./NAME.",
        )  # fmt: skip
    return tuple(values[1::2]), tuple(weight for weight in given if weight is not None)


def _default_workers(memory_gb: float) -> int:
    """As many as there are processors, and as the memory is enough for."""
    affordable = int(memory_gb * GIB) // MIN_MEMORY_BYTES if 0 < memory_gb < float("inf") else 1
    return max(1, min(available_processors(), affordable))


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _rows(value: str) -> int | None:
    if value == ALL_ROWS:
        return None
    if not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{value!r} is neither a number of rows nor '{ALL_ROWS}'")
    return int(value)


def _rows_by_order(values: Sequence[str]) -> tuple[tuple[int, int], ...]:
    pairs = [value.partition("=") for value in values]
    if not all(order.isdecimal() and rows.isdecimal() for order, _, rows in pairs):
        raise ConfigError(
            "--rows-by-order", "is malformed", got=" ".join(values), expected="ORDER=ROWS, such as 2=1000"
        )
    if len({int(order) for order, _, _ in pairs}) < len(pairs):
        raise ConfigError("--rows-by-order", "names an order twice", got=" ".join(values))
    return tuple(sorted((int(order), int(rows)) for order, _, rows in pairs))
