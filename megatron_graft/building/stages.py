"""The stages of a build, in order, made from its plan. Each reads what earlier ones left, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_graft.building.assemble import assemble_bank
from megatron_graft.building.build_plan import BuildPlan
from megatron_graft.building.count import CountedNgrams, count_stages
from megatron_graft.building.encode import EncodedRows, Encoder, encode_task, pack_texts
from megatron_graft.building.norms import LayerNorms
from megatron_graft.building.select import NgramTokenizer, select_ngrams
from megatron_graft.building.selected import SelectedNgrams, write_selection
from megatron_graft.building.tasks import BuildLog, Stage, task_directory
from megatron_graft.errors import ConfigError

FACTS_NAME = "facts.json"
ReportOn = Callable[[Mapping[int, LayerNorms]], Mapping[str, Any]]
"""Makes the report of the finished bank, given norms of the donor's states by layer; returns facts for the log."""


class BuildStages:
    """All stages of one build.

    Args:
        plan: of the build.
        tokenizer: opens the recipient's tokenizer; called where it is needed only.
        encoder: opens the donor, likewise.
        report_on: makes the report, as the last stage; None builds without one.
    """

    def __init__(
        self,
        plan: BuildPlan,
        *,
        tokenizer: Callable[[], NgramTokenizer],
        encoder: Callable[[], Encoder],
        report_on: ReportOn | None = None,
    ) -> None:
        self.plan, self.work = plan, plan.config.work
        self.log = BuildLog(plan.config.log)
        self._tokenizer, self._open_encoder, self._report_on = tokenizer, encoder, report_on

    @cached_property
    def all(self) -> list[Stage]:
        """The stages, in the order they run."""
        counting = count_stages(self.plan.counts, self.work)
        counted = tuple(stage.name for stage in counting)
        return [
            *counting,
            Stage(name="select", num_tasks=1, run=self._select, obsolete=counted),
            Stage(name="pack", num_tasks=1, run=self._pack),
            Stage(name="encode", num_tasks=self.plan.encode_tasks, run=self._encode),
            Stage(name="assemble", num_tasks=1, run=self._assemble, obsolete=("pack", "encode")),
            Stage(name="report", num_tasks=1, run=self._report),
        ]

    def named(self, name: str) -> Stage:
        """One stage.

        Raises:
            ConfigError: there is no such stage.
        """
        for stage in self.all:
            if stage.name == name:
                return stage
        raise ConfigError("STAGE", "is unknown", got=name, expected=", ".join(stage.name for stage in self.all))

    @cached_property
    def _encoder(self) -> Encoder:
        return self._open_encoder()

    def _only_task(self, stage: str) -> Path:
        return task_directory(self.work, stage, 0)

    def _select(self, _task: int, scratch: Path) -> Mapping[str, Any]:
        candidates = CountedNgrams(self.plan.counts, self.work)
        selection = select_ngrams(candidates, self._tokenizer(), self.plan.config.quota)
        facts = write_selection(selection, scratch)
        by_order = {str(order): candidates.candidates(order) for order in self.plan.config.orders}
        (scratch / "candidates.json").write_text(json.dumps(by_order))
        return {"candidates_by_order": by_order, **facts}

    def _pack(self, _task: int, scratch: Path) -> Mapping[str, Any]:
        texts = SelectedNgrams(self._only_task("select")).texts()
        facts = pack_texts(texts, self._encoder, self.plan.config.pack_tokens, scratch)
        (scratch / FACTS_NAME).write_text(json.dumps(facts))
        return facts

    def _encode(self, task: int, scratch: Path) -> Mapping[str, Any]:
        layers, tasks = self.plan.config.donor_layers, self.plan.encode_tasks
        return encode_task(self._only_task("pack"), self._encoder, layers, task, tasks, scratch)

    def _assemble(self, _task: int, scratch: Path) -> Mapping[str, Any]:
        selected = SelectedNgrams(self._only_task("select"))
        tasks = [task_directory(self.work, "encode", task) for task in range(self.plan.encode_tasks)]
        states = EncodedRows(self._only_task("pack"), tasks, self.plan.config.donor_layers)
        candidates = json.loads((self._only_task("select") / "candidates.json").read_text())
        facts = assemble_bank(
            self.plan,
            keys=selected.keys,
            states=states,
            lengths_of_row=states.lengths_of_row,
            selection={"candidates_by_order": candidates, **selected.facts},
            donor_facts=json.loads((self._only_task("pack") / FACTS_NAME).read_text()),
            scratch=scratch,
        )
        (scratch / FACTS_NAME).write_text(json.dumps(facts))
        return {"digest": facts["digest"]}

    def _report(self, _task: int, _scratch: Path) -> Mapping[str, Any]:
        if self._report_on is None:
            return {}
        facts = json.loads((self._only_task("assemble") / FACTS_NAME).read_text())
        norms = {int(layer): LayerNorms.from_json(value) for layer, value in facts["state_norms"].items()}
        return self._report_on(norms)


def stage_lines(stages: Sequence[Stage]) -> str:
    """Name and number of tasks of every stage, one a line, for scripts."""
    return "\n".join(f"{stage.name} {stage.num_tasks}" for stage in stages)
