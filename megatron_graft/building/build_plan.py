"""What a build is asked to do, and the plan of its tasks: ``plan.json``, written before anything else.

The plan fixes what decides the bank (its *settings*), the inputs as they were, and how the work is cut. Every process
that works for the build reads it, so none can work on something else.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_graft.bank.manifest import MAX_VOCAB_SIZE, Control, DonorIdentity, Processing, TokenizerIdentity
from megatron_graft.bank.quantise import BUILD_DTYPES
from megatron_graft.building.count_plan import CountPlan, plan_counts
from megatron_graft.building.documents import MegatronDocuments
from megatron_graft.building.encode import Encoder
from megatron_graft.building.existing import refuse_other_settings
from megatron_graft.building.select import NgramTokenizer, Quota
from megatron_graft.building.tasks import LOCK_NAME, PLANNED, BuildLog
from megatron_graft.errors import BankError, BankIncompleteError, ConfigError, DataError
from megatron_graft.files import scratch_prefix, write_json_atomically

PLAN_NAME = "plan.json"
PLAN_VERSION = 1
GIB = 1 << 30
_ROWS_PER_ENCODE_TASK = 100_000
_TASKS_OF_UNKNOWN_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class BankBuildConfig:
    """What to build. The first fields decide the bank; those from ``output`` on do not."""

    data_prefixes: tuple[str, ...]
    """Megatron data sets to count, without ``.bin``/``.idx``."""
    data_weights: tuple[float, ...] | None = None
    """A blend's weights, one a data set, as in Megatron's ``--data-path``; None counts every occurrence as 1."""
    split: str | None = None
    """``--split`` of the training run, so that only its training share is counted; None counts everything."""
    orders: tuple[int, ...]
    """Lengths of the n-grams: ascending, without a gap, 2 to 8."""
    num_rows: int | None
    """How many n-grams to keep, over all orders; None keeps all that are frequent enough."""
    rows_by_order: tuple[tuple[int, int], ...] = ()
    """Pairs of an order and how many n-grams of it to keep, in place of ``num_rows``."""
    min_count: int = 2
    """Rarer n-grams are never kept."""
    count_by: str = "occurrences"
    """``occurrences``, or ``documents``: every document counts an n-gram once."""
    donor_layers: tuple[int, ...]
    """Donor blocks, counted from 1, whose outputs stand side by side in a row; 0 is the embedding."""
    pack_tokens: int = 256
    """Donor tokens of one pass. Cuts the work, and with it how sums are rounded, the same on any machine."""
    raw: bool = False
    """Keep the donor's states as they are, neither centred nor normalised."""
    control: Control | None = None
    """Make a control bank instead of the real one."""
    row_dtype: str = "bfloat16"
    """What rows are stored as: ``bfloat16``, ``float16``, or ``int8`` with a scale for every row and donor layer."""

    output: Path
    """The bank's directory."""
    work_dir: Path | None = None
    """Where a build keeps what is done; None: ``<output>.build``. Removed when the bank is there."""
    workers: int = 1
    """Processes that count side by side; 0 counts in this process, whose own memory then comes on top."""
    memory_gb: float = 4.0
    """Most memory, in GiB, of all processes that count, together."""
    encode_tasks: int | None = None
    """Into how many tasks the donor's work is cut; None: about one for 100,000 rows."""
    count_slices: int | None = None
    """Into how many slices the corpus is cut for counting; None: as fits."""
    count_partitions: int | None = None
    """Into how many partitions counted keys are divided; None: as fits the memory."""

    @property
    def work(self) -> Path:
        """The work directory."""
        return self.work_dir or self.output.with_name(self.output.name + ".build")

    @property
    def log(self) -> Path:
        """The structured log, beside the bank."""
        return self.output.with_name(self.output.name + ".build.jsonl")

    @property
    def quota(self) -> Quota:
        """How many rows."""
        return Quota(num_rows=self.num_rows, by_order=dict(self.rows_by_order))

    @property
    def processing(self) -> Processing:
        """What is done to the donor's states."""
        return Processing(centred=not self.raw, normalised=not self.raw)

    def check(self, tokenizer: NgramTokenizer, encoder: Encoder) -> None:
        """Refuse what cannot be built, before anything is done.

        Raises:
            ConfigError: naming the flag.
            DonorError: the donor lacks a layer.
        """
        at_least_one = {
            "--min-count": self.min_count, "--workers": self.workers + 1, "--pack-tokens": self.pack_tokens,
            "--encode-tasks": 1 if self.encode_tasks is None else self.encode_tasks,
        }  # fmt: skip
        for flag, value in at_least_one.items():
            if value < 1:
                raise ConfigError(flag, "is too small", got=value, expected="at least 1")
        if not 0 < self.memory_gb < float("inf"):
            raise ConfigError("--memory-gb", "is no amount of memory", got=self.memory_gb, expected="GiB, above 0")
        self._check_directories()
        self.quota.groups(self.orders)
        if self.row_dtype not in BUILD_DTYPES:
            expected = " or ".join(BUILD_DTYPES)
            raise ConfigError("--row-dtype", "cannot be built", got=self.row_dtype, expected=expected)
        if tokenizer.vocab_size > MAX_VOCAB_SIZE:
            largest = f"at most {MAX_VOCAB_SIZE}"
            raise ConfigError("--tokenizer-model", "has too many tokens", got=tokenizer.vocab_size, expected=largest)
        encoder.check_layers(self.donor_layers)

    def _check_directories(self) -> None:
        output, work = self.output.resolve(), self.work.resolve()
        if output == work or output in work.parents or work in output.parents:
            raise ConfigError(
                f"--work-dir {self.work}", "and --output lie one within the other", got=self.output,
                remedy="Put them side by side: the work directory is removed when the bank is there.",
            )  # fmt: skip

    def settings(self, documents: MegatronDocuments, tokenizer: NgramTokenizer, encoder: Encoder) -> dict[str, Any]:
        """Everything that decides the bank, for telling whether a bank or a half-done build is the one asked for."""
        return {
            "data": documents.fingerprint(),
            "data_weights": list(self.data_weights) if self.data_weights else None,
            "split": self.split,
            "tokenizer": tokenizer.fingerprint,
            "orders": list(self.orders),
            "num_rows": None if self.rows_by_order else self.num_rows,
            "rows_by_order": {str(order): rows for order, rows in self.rows_by_order} or None,
            "min_count": self.min_count,
            "count_by": self.count_by,
            "donor": encoder.revision,
            "donor_layers": list(self.donor_layers),
            **encoder.settings(),
            "pack_tokens": self.pack_tokens,
            "raw": self.raw,
            "row_dtype": self.row_dtype,
            "control": self.control.kind if self.control else None,
            "seed": self.control.seed if self.control else None,
        }

    def to_json(self) -> dict[str, Any]:
        """A JSON object of the fields."""
        return {**asdict(self), "output": str(self.output), "work_dir": str(self.work)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BankBuildConfig:
        """Read what :meth:`to_json` wrote."""
        fields = dict(value)
        weights, control = fields["data_weights"], fields["control"]
        return cls(
            **fields
            | {name: tuple(fields[name]) for name in ("data_prefixes", "orders", "donor_layers")}
            | {
                "data_weights": tuple(weights) if weights else None,
                "rows_by_order": tuple((order, rows) for order, rows in fields["rows_by_order"]),
                "control": Control(**control) if control else None,
                "output": Path(fields["output"]),
                "work_dir": Path(fields["work_dir"]),
            }
        )


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """The contents of ``plan.json``.

    Attributes:
        settings: everything that decides the bank.
        config: what was asked for.
        tokenizer: identity of the recipient's tokenizer.
        donor: identity of the donor.
        counts: how counting is cut.
        encode_tasks: number of the donor's tasks.
        inputs: size and time of change of every file of the data sets.
        corpus: facts of the data sets for the bank's provenance.
        sources: what the commands need to open tokenizer, donor and the report's data sets again.
    """

    settings: Mapping[str, Any]
    config: BankBuildConfig
    tokenizer: TokenizerIdentity
    donor: DonorIdentity
    counts: CountPlan
    encode_tasks: int
    inputs: Mapping[str, Any]
    corpus: Mapping[str, Any]
    sources: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this plan."""
        return {
            "version": PLAN_VERSION,
            "settings": self.settings,
            "config": self.config.to_json(),
            "tokenizer": asdict(self.tokenizer),
            "donor": asdict(self.donor),
            "counts": self.counts.to_json(),
            "encode_tasks": self.encode_tasks,
            "inputs": self.inputs,
            "corpus": self.corpus,
            "sources": self.sources,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BuildPlan:
        """Read what :meth:`to_json` wrote."""
        donor = dict(value["donor"])
        return cls(
            settings=value["settings"],
            config=BankBuildConfig.from_json(value["config"]),
            tokenizer=TokenizerIdentity(**value["tokenizer"]),
            donor=DonorIdentity(**donor | {"layers": tuple(donor["layers"])}),
            counts=CountPlan.from_json(value["counts"]),
            encode_tasks=value["encode_tasks"],
            inputs=value["inputs"],
            corpus=value["corpus"],
            sources=value["sources"],
        )


def make_plan(
    config: BankBuildConfig,
    *,
    tokenizer: NgramTokenizer,
    encoder: Encoder,
    sources: Mapping[str, Any] | None = None,
) -> BuildPlan:
    """Check everything that can be checked before work begins, and cut the work into tasks.

    Args:
        config: what to build.
        tokenizer: the recipient's. That it made the data sets is for the caller to check; ids outside its
            vocabulary are refused when they are read.
        encoder: the donor.
        sources: kept in the plan for the commands.

    Raises:
        ConfigError: the configuration is unusable.
        DataError: a data set cannot be read.
        DonorError: the donor lacks a layer.
    """
    config.check(tokenizer, encoder)
    documents = MegatronDocuments(config.data_prefixes, split=config.split, vocab_size=tokenizer.vocab_size)
    counts = plan_counts(
        documents,
        weights=config.data_weights,
        orders=config.orders,
        eod=tokenizer.eod,
        min_count=config.min_count,
        count_by=config.count_by,
        memory_bytes=int(config.memory_gb * GIB) // max(1, config.workers),
        workers=max(1, config.workers),
        num_slices=config.count_slices,
        num_partitions=config.count_partitions,
    )
    return BuildPlan(
        settings=config.settings(documents, tokenizer, encoder),
        config=config,
        tokenizer=TokenizerIdentity(
            fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod
        ),
        donor=DonorIdentity(
            name=encoder.name, revision=encoder.revision, layers=config.donor_layers, hidden_size=encoder.hidden_size
        ),
        counts=counts,
        encode_tasks=config.encode_tasks or _encode_tasks(config),
        inputs=documents.file_states(),
        corpus={
            "data_sets": [Path(prefix).name for prefix in documents.prefixes],
            "documents": documents.num_documents,
            "tokens": documents.num_tokens,
        },
        sources=sources or {},
    )


def _encode_tasks(config: BankBuildConfig) -> int:
    rows = sum(rows for _, rows in config.rows_by_order) or config.num_rows
    return _TASKS_OF_UNKNOWN_SIZE if rows is None else max(1, -(-rows // _ROWS_PER_ENCODE_TASK))


def keep_plan(plan: BuildPlan, work: Path) -> BuildPlan:
    """Write the plan into its work directory; if one of the same build is there, return it with this start's options.

    How the work was cut when the build began stays as it was; workers, memory and what is reported are those of this
    start.

    Raises:
        BankError: the directory belongs to a build of other settings or another output, or holds something else.
        DataError: an input changed since that build began.
        StorageError: the plan cannot be written.
    """
    path = work / PLAN_NAME
    if not path.is_file():
        _refuse_foreign(work)
        BuildLog(plan.config.log).write(event=PLANNED, settings=plan.settings)
        write_json_atomically(path, plan.to_json())
        return read_plan(work)
    kept = read_plan(work)
    found = {**kept.settings, "output": str(kept.config.output)}
    wanted = {**plan.settings, "output": str(plan.config.output)}
    remedy = "Remove it or give another --work-dir."
    refuse_other_settings(work, "is the work directory of a build with other settings", found, wanted, remedy)
    _check_inputs(kept, plan.inputs, work)
    counts = replace(kept.counts, memory_bytes=plan.counts.memory_bytes)
    plan = replace(plan, counts=counts, encode_tasks=kept.encode_tasks)
    write_json_atomically(path, plan.to_json())
    return read_plan(work)


def _refuse_foreign(work: Path) -> None:
    """A directory without a plan may hold nothing but what a kill left of one: it is removed when the bank is there."""
    left = scratch_prefix(work / PLAN_NAME)
    names = (path.name for path in work.iterdir()) if work.is_dir() else ()
    found = sorted(name for name in names if name != LOCK_NAME and not name.startswith(left))
    if found:
        raise BankError(
            work, "is not empty and holds no plan of a build", got=", ".join(found[:3]),
            expected="an empty directory, or none", remedy="Give another --work-dir.",
        )  # fmt: skip


def read_plan(work: Path) -> BuildPlan:
    """Read a work directory's plan.

    Raises:
        BankIncompleteError: there is none.
        BankError: it is of another version or no plan.
    """
    path = work / PLAN_NAME
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BankIncompleteError(
            path, "does not exist", remedy="Plan the build first: tools/build_stage.py plan."
        ) from error
    except ValueError as error:
        raise BankError(path, f"is not valid JSON: {error}", remedy="Remove the work directory.") from error
    if not isinstance(value, dict) or value.get("version") != PLAN_VERSION:
        found = value.get("version") if isinstance(value, dict) else type(value).__name__
        raise BankError(
            path, "is the plan of another version", got=found, expected=PLAN_VERSION,
            remedy="Remove the work directory and build again.",
        )  # fmt: skip
    plan = BuildPlan.from_json(value)
    return replace(plan, config=replace(plan.config, work_dir=work.absolute()))  # wherever it was moved to


def check_inputs_unchanged(plan: BuildPlan) -> None:
    """Refuse to go on where a file of the data sets is not what it was when the build began.

    Raises:
        DataError: naming the file.
    """
    found = {}
    for name in plan.inputs:
        with contextlib.suppress(OSError):
            state = os.stat(name)
            found[name] = {"size": state.st_size, "mtime_ns": state.st_mtime_ns}
    _check_inputs(plan, found, plan.config.work)


def _check_inputs(plan: BuildPlan, found: Mapping[str, Any], work: Path) -> None:
    for name in sorted({*plan.inputs, *found}):
        if plan.inputs.get(name) != found.get(name):
            raise DataError(
                name,
                "changed since the build began",
                got=found.get(name),
                expected=plan.inputs.get(name),
                remedy=f"Put the old file back, or remove {work} and build again.",
            )
