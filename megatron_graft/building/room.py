"""Whether a build fits on the disk, asked before it starts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from megatron_graft.building.build_plan import BuildPlan
from megatron_graft.building.cost import BuildShape, bank_size, kept_ngrams, peak_work_bytes
from megatron_graft.errors import StorageError
from megatron_graft.log import get_logger

_MARGIN = 1.5
"""Text may repeat itself so much less than the text that the formulas were fitted to."""
_KEY_BYTES = 8
_MOST_POOL_BYTES = 1 << 29


def shape_of_plan(plan: BuildPlan) -> BuildShape:
    """What a planned build is, as the formulas of ``cost`` see it."""
    config, counts = plan.config, plan.counts
    tokens = float(plan.corpus["tokens"])
    shape = BuildShape(
        tokens=tokens,
        rows=1,
        hidden_size=plan.donor.hidden_size,
        layers=len(plan.donor.layers),
        orders=config.orders,
        row_dtype=config.row_dtype,
        min_count=config.min_count,
        vocab_size=plan.tokenizer.vocab_size,
        workers=max(1, config.workers),
        # A task collects in what the table of kept n-grams leaves it, half of its memory at least.
        chunk_ngrams=min(counts.working_bytes // 2, _MOST_POOL_BYTES) / _KEY_BYTES,
        slice_tokens=tokens / len(counts.slices),
        token_bytes=max(data.id_bytes for data in counts.data_sets),
    )
    kept = kept_ngrams(shape)
    most = int(sum(kept[order] for order in config.orders))
    wanted = sum(rows for _, rows in config.rows_by_order) or config.num_rows or most
    return replace(shape, rows=wanted)


def check_room_of_plan(plan: BuildPlan) -> None:
    """Refuse a planned build that does not fit the disk; say so where it may not. One whose bank is there does fit.

    Raises:
        StorageError: as :func:`check_room` of the formulas' own figures.
    """
    if plan.config.output.exists():  # all that took room is done, and most of it removed
        return
    shape = shape_of_plan(plan)
    most = sum(kept_ngrams(shape)[order] for order in shape.orders)  # asked for more, a build takes what there is
    shape = replace(shape, rows=max(1, min(shape.rows, int(most))))
    counting = not (plan.config.work / "select").is_dir()  # else the counts are gone, and with them what they needed
    check_room(plan.config.output, plan.config.work, shape, counting=counting)
    try:
        check_room(plan.config.output, plan.config.work, cautious(shape), counting=counting)
    except StorageError as error:
        get_logger().warning("if the text repeats itself little, then %s", error)


def cautious(shape: BuildShape) -> BuildShape:
    """``shape`` with half as many distinct n-grams again: room to hope for when no sample has been looked at."""
    by_order = {
        order: replace(
            span,
            distinct=min(1.0, _MARGIN * span.distinct),
            kept_scale=_MARGIN * span.kept_scale,
        )
        for order, span in shape.by_order.items()
    }
    return replace(shape, by_order=by_order)


def check_room(output: Path, work_dir: Path, shape: BuildShape, *, counting: bool = True) -> None:
    """Refuse a build whose work directory and bank do not fit, by the formulas of ``cost`` for ``shape``.

    Give it :func:`shape_of_plan`, or the shape that a sample gave. Text that repeats itself less
    still may fill the disk; the build then stops with the same error, and goes on once there is room.

    What the work directory holds already counts as room: a build that is resumed needs it no second time.

    Args:
        output: the bank's directory, which need not exist.
        work_dir: of the build, likewise.
        shape: what is to be built.
        counting: whether that is still to be done.

    Raises:
        StorageError: a file system has fewer free bytes than are needed.
    """
    bank, work = bank_size(shape).total, peak_work_bytes(shape, counting=counting)
    needs = {_existing(work_dir): ("--work-dir", work_dir, work - _size(work_dir))}
    if _same_file_system(output, work_dir):
        # The bank is written while what the donor gave is still there, long after the counts are gone.
        together = max(work, peak_work_bytes(shape, counting=False) + bank)
        needs = {_existing(work_dir): ("--output", output, together - _size(work_dir))}
    else:
        needs[_existing(output)] = ("--output", output, bank)
    for place, (flag, path, needed) in needs.items():
        free = shutil.disk_usage(place).free
        if free < needed:
            raise StorageError(
                f"{flag} {path}",
                "has no room for this build",
                got=f"{free:,} bytes free",
                expected=f"about {needed:,.0f} bytes",
                remedy="Free space, put --work-dir on another file system, or ask for fewer rows or orders.",
            )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _same_file_system(first: Path, second: Path) -> bool:
    return _existing(first).stat().st_dev == _existing(second).stat().st_dev


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) if directory.is_dir() else 0
