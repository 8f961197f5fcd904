"""The settings of a run's memory: what our flags say, checked against each other and the model. No Megatron in here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_graft.compat.parameter_groups import ROWS_RATE, SITE_RATE, TABLE_RATE, Multipliers
from megatron_graft.errors import ConfigError
from megatron_graft.ngram.hashing import DIALECTS, EngramConfig

FROZEN = "frozen"
MOST_AHEAD = 4  # micro-batches that wait ready, unless the user asks for more: each holds device memory
DEFAULT_FACTORS = {"--graft-rows-lr-mult": 1.0, "--graft-rows-wd-mult": 0.0, "--graft-lr-mult": 1.0}


@dataclass(frozen=True, kw_only=True)
class EngramSettings:
    """The ``--engram-*`` flags of a run that has hashed tables.

    Attributes:
        layers: global, 1-based numbers of the layers whose site reads a table, ascending.
        layer_ids: the dialect's own id of each, in the same order.
        dialect: name of the hash dialect.
        max_order: longest n-gram that is hashed.
        heads: K, rows read for each order.
        vocab_sizes: least rows of each head, one number per order from 2 on.
        dim: elements read for each order, over all heads.
        seed: of the hash constants.
        pad_id: token id that stands where an n-gram reaches before its document, or None for the tokenizer's EOD.
        across_documents: let n-grams reach across document starts, as the published code does.
        lr_mult: learning rate of the tables, as a multiple of the run's.
        wd_mult: their weight decay, as a multiple of the run's.
    """

    layers: tuple[int, ...]
    layer_ids: tuple[int, ...]
    dialect: str
    max_order: int
    heads: int
    vocab_sizes: tuple[int, ...]
    dim: int
    seed: int
    pad_id: int | None
    across_documents: bool
    lr_mult: float
    wd_mult: float

    def hashing(self, eod: int) -> EngramConfig:
        """How n-grams are hashed; the tokenizer's ``eod`` is the pad unless a flag names another."""
        return EngramConfig(
            dialect=DIALECTS[self.dialect],
            max_order=self.max_order,
            heads=self.heads,
            vocab_sizes=self.vocab_sizes,
            dim=self.dim,
            seed=self.seed,
            pad_id=eod if self.pad_id is None else self.pad_id,
            across_documents=self.across_documents,
            layer_ids=tuple(sorted(zip(self.layers, self.layer_ids, strict=True))),
        )


@dataclass(frozen=True, kw_only=True)
class GraftSettings:
    """The ``--graft-*``, ``--bank-*`` and ``--engram-*`` flags of a run.

    Attributes:
        banks: directories of the banks: none, one for all sites, or one for each of :attr:`layers`.
        layers: global, 1-based numbers of the layers whose site reads a bank, in the order given.
        donor_layers: for each of them the donor layers that it reads, or None for all of its bank.
        engram: the hashed tables, or None.
        rows: what sites read under a bank's keys: ``"frozen"``, the bank's rows; ``"trained"``, rows of their own that
            start as the bank's and are trained; ``"fresh"``, the same but started at random.
        rows_lr_mult: learning rate of trained rows, as a multiple of the run's.
        rows_wd_mult: their weight decay, as a multiple of the run's.
        lr_mult: learning rate of the sites' other parameters but tables, as a multiple of the run's.
        combine: ``"exclusive"`` or ``"sum"``, where a site reads a bank and a table.
        gate: ``"plain"`` or ``"signed-sqrt"``.
        conv_kernel: convolution taps per site; 0 leaves it out.
        conv_dilation: distance between taps, or None for the site's longest order.
        lookup: implementation of lookup and hashing.
        look_ahead: micro-batches that may wait ready, or None for those of one step, 4 at most.
        verify_every: compare with the reference path every so many steps; 0 never.
        adopt_checkpoint: begin from the weights of a checkpoint of another memory, or of none.
        allow_raw_bank: accept a bank whose rows were not normalised.
        verify_bank: how deeply to check the banks before training.
        bank_rows: use a bank's so many most frequent n-grams only, or None for all.
        bank_node_copy: directory of the node where banks are copied to and read from, or None.
        bank_lookup_threads: threads of lookup, hashing and gather.
        bank_huge_pages: hold the index in memory of huge pages.
        run_dir: where metrics and the command line of the run go, or None.
    """

    banks: tuple[Path, ...]
    layers: tuple[int, ...]
    donor_layers: tuple[tuple[int, ...] | None, ...]
    engram: EngramSettings | None
    rows: str
    rows_lr_mult: float
    rows_wd_mult: float
    lr_mult: float
    combine: str
    gate: str
    conv_kernel: int
    conv_dilation: int | None
    lookup: str
    look_ahead: int | None
    verify_every: int
    adopt_checkpoint: bool
    allow_raw_bank: bool
    verify_bank: str
    bank_rows: int | None
    bank_node_copy: Path | None
    bank_lookup_threads: int
    bank_huge_pages: bool
    run_dir: Path | None

    @property
    def has_sites(self) -> bool:
        """Whether the run has a memory at all."""
        return bool(self.banks) or self.engram is not None

    @property
    def trains_rows(self) -> bool:
        """Whether sites train rows under a bank's keys."""
        return self.rows != FROZEN

    @property
    def multipliers(self) -> dict[str, Multipliers]:
        """Learning rates and weight decay that differ from the run's, by the attribute of their parameters."""
        found = {}
        if self.engram is not None:
            found[TABLE_RATE] = Multipliers(lr=self.engram.lr_mult, wd=self.engram.wd_mult)
        if self.trains_rows:
            found[ROWS_RATE] = Multipliers(lr=self.rows_lr_mult, wd=self.rows_wd_mult)
        if self.lr_mult != DEFAULT_FACTORS["--graft-lr-mult"]:
            found[SITE_RATE] = Multipliers(lr=self.lr_mult)
        return found

    def look_ahead_of(self, micro_batches: int) -> int:
        """Micro-batches whose memory may wait ready, of a run that has so many in a step on each rank."""
        return self.look_ahead or min(max(2, micro_batches), MOST_AHEAD)

    def bank_of_site(self, site: int) -> int:
        """Number of the bank that the site of ``layers[site]`` reads."""
        return 0 if len(self.banks) == 1 else site


def check_settings(settings: GraftSettings, num_layers: int) -> None:
    """Check the settings against each other and the model.

    Args:
        settings: as read from the flags.
        num_layers: of the model.

    Raises:
        ConfigError: naming the flag.
    """
    if not settings.banks:
        _refuse_bank_flags(settings)
    else:
        _check_layers("--graft-layers", settings.layers, num_layers, "with --graft-bank")
        _check_per_site(settings)
    if settings.engram is not None:
        _check_layers("--engram-layers", settings.engram.layers, num_layers, "for hashed tables")
        _check_engram(settings.engram)
    _check_rates(settings)
    _check_numbers(settings)


def _refuse_bank_flags(settings: GraftSettings) -> None:
    """Refuse flags that would change what a bank is or how it is read, where there is none."""
    given = {
        "--graft-layers": list(settings.layers) or None,
        "--graft-donor-layers": list(settings.donor_layers) or None,
        "--graft-rows": settings.rows if settings.trains_rows else None,
        "--bank-rows": settings.bank_rows,
        "--bank-node-copy": settings.bank_node_copy,
        "--bank-huge-pages": settings.bank_huge_pages or None,
    }
    for flag, value in given.items():
        if value is not None:
            raise ConfigError(
                flag, "was given without a bank", got=value,
                remedy=f"Add --graft-bank DIR, or drop {flag}.",
            )  # fmt: skip


def _check_layers(flag: str, layers: tuple[int, ...], num_layers: int, when: str) -> None:
    if not layers:
        raise ConfigError(
            flag, f"is required {when}", expected=f"layer numbers from 1 to {num_layers}",
            remedy=f"For example {flag} 2.",
        )  # fmt: skip
    if any(not 1 <= layer <= num_layers for layer in layers) or len(set(layers)) != len(layers):
        raise ConfigError(
            flag, "names a layer that the model does not have, or one twice", got=list(layers),
            expected=f"distinct numbers from 1 to --num-layers {num_layers}",
            remedy="Choose layers of this model, or give it more of them.",
        )  # fmt: skip


def _check_per_site(settings: GraftSettings) -> None:
    sites = len(settings.layers)
    for flag, given in (("--graft-bank", len(settings.banks)), ("--graft-donor-layers", len(settings.donor_layers))):
        if given not in (1, sites):
            raise ConfigError(
                flag, "does not fit the number of --graft-layers", got=f"{given} for {sites} layers",
                expected=f"one for all of them, or {sites} in their order",
            )  # fmt: skip


def _check_engram(engram: EngramSettings) -> None:
    if len(engram.layer_ids) != len(engram.layers):
        raise ConfigError(
            "--engram-layer-ids", "does not give one id for each of --engram-layers", got=list(engram.layer_ids),
            expected=f"{len(engram.layers)} numbers",
            remedy="Leave it out: each layer's id is then its number less one.",
        )  # fmt: skip
    if len(set(engram.layer_ids)) != len(engram.layer_ids) or min(engram.layer_ids) < 0:
        raise ConfigError(
            "--engram-layer-ids", "gives two layers one id, or a negative one", got=list(engram.layer_ids),
            expected="distinct numbers from 0 on",
        )  # fmt: skip
    _check_factors({"--engram-lr-mult": engram.lr_mult, "--engram-wd-mult": engram.wd_mult})


def _check_rates(settings: GraftSettings) -> None:
    """Factors of learning rates and weight decay; refuse those that would be of no effect."""
    of_rows = {"--graft-rows-lr-mult": settings.rows_lr_mult, "--graft-rows-wd-mult": settings.rows_wd_mult}
    _check_factors({**of_rows, "--graft-lr-mult": settings.lr_mult})
    for flag, value in of_rows.items():
        if not settings.trains_rows and value != DEFAULT_FACTORS[flag]:
            raise ConfigError(
                flag, "was given without rows that are trained", got=value,
                remedy=f"Add --graft-rows trained or fresh, or drop {flag}.",
            )  # fmt: skip
    if not settings.has_sites and settings.lr_mult != DEFAULT_FACTORS["--graft-lr-mult"]:
        raise ConfigError(
            "--graft-lr-mult", "was given without a memory", got=settings.lr_mult,
            remedy="Add --graft-bank DIR or --engram-layers N, or drop it.",
        )  # fmt: skip


def _check_factors(factors: dict[str, float]) -> None:
    for flag, value in factors.items():
        if not 0 <= value < float("inf"):
            raise ConfigError(flag, "is not a usable factor", got=value, expected="a finite number of at least 0")


def _check_numbers(settings: GraftSettings) -> None:
    limits = {
        "--graft-conv-kernel": (settings.conv_kernel, 0),
        "--graft-conv-dilation": (settings.conv_dilation, 1),
        "--graft-look-ahead": (settings.look_ahead, 1),
        "--graft-verify": (settings.verify_every, 0),
        "--bank-rows": (settings.bank_rows, 1),
        "--bank-lookup-threads": (settings.bank_lookup_threads, 1),
    }
    for flag, (value, least) in limits.items():
        if value is not None and value < least:
            raise ConfigError(flag, "is too small", got=value, expected=f"at least {least}")
    if settings.bank_huge_pages and settings.lookup == "reference":
        raise ConfigError(
            "--bank-huge-pages", "has no use with --graft-lookup reference, which makes an index of its own",
            remedy="Drop one of them.",
        )  # fmt: skip
