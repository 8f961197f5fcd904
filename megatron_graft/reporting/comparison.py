"""Setting a run beside other arms: runs that differ from it in their memory only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron_graft.errors import ConfigError
from megatron_graft.reporting.figures import figures_of, texts_of
from megatron_graft.reporting.run_files import HELD_OUT, Run

_SAME_FLAGS = ("seed", "global_batch_size", "seq_length")
_RELATIVE_TOLERANCE = 1e-6  # of bigram losses: sums of the same numbers, perhaps by other threads


def compare(run: Run, others: Sequence[Run]) -> dict[str, Any]:
    """Figures of the other arms by run name; ``difference`` is theirs minus the run's: positive, the run is better.

    Raises:
        ConfigError: another run's steps, seed, batch or data differ, or two runs have one name.
    """
    own = texts_of(figures_of(run, None, None))
    compared: dict[str, Any] = {}
    for other in others:
        check_comparable(run, other)
        if other.name in (run.name, *compared):
            raise ConfigError(f"--compare {other.directory}", "has the name of another run", got=other.name)
        figures = figures_of(other, None, None)
        compared[other.name] = {
            "arm": other.arm,
            "tokens_per_second": figures["speed"] and figures["speed"]["tokens_per_second"],
            "training_loss": figures["training_loss"],
        }
        for key, text in texts_of(figures).items():
            if key in own:
                kept = {name: text[name] for name in ("loss", "bits_per_byte", "by_order")}
                compared[other.name][key] = kept | {"difference": text["loss"] - own[key]["loss"]}
    return compared


def check_comparable(run: Run, other: Run) -> None:
    """Make sure that ``other`` was trained and evaluated on what ``run`` was.

    Data are compared by what they hold, not by where they lie: sizes, and the loss of the bigram counts of the tokens
    trained on.

    Raises:
        ConfigError: it was not.
    """
    facts, other_facts = _facts(run), _facts(other)
    for name, value in facts.items():
        got = other_facts.get(name)
        if isinstance(value, float) and isinstance(got, float):
            same = math.isclose(value, got, rel_tol=_RELATIVE_TOLERANCE)
        else:
            same = value == got
        # A further text that only one of them was evaluated on does no harm; the held-out one must be there.
        if not same and not (got is None and name.startswith("text ") and HELD_OUT not in name):
            raise ConfigError(
                f"--compare {other.directory}", f"differs from {run.directory} in its {name}", got=got, expected=value,
                remedy="Compare runs of the same steps, seed, batch and data.",
            )  # fmt: skip


def _facts(run: Run) -> dict[str, Any]:
    evaluation = run.evaluation
    facts: dict[str, Any] = {"--train-iters": evaluation["train_iters"]}
    facts |= {f"--{name.replace('_', '-')}": run.flags[name] for name in _SAME_FLAGS}
    facts["training text (tokens available)"] = evaluation["training_text"]["tokens_available"]
    for name, text in evaluation["data"].items():
        facts[f"text {name} (tokens)"] = text["tokens"]
        facts[f"text {name} (bytes)"] = text["bytes"]
        facts[f"text {name} (bigram loss of the tokens trained on)"] = evaluation["bigram_loss"].get(name)
    return facts
