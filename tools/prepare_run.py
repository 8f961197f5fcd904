"""Make whatever a run still lacks: corpus, tokenizer, .bin/.idx data, donor, bank. Stages that are done are skipped.

Each stage is one of the other commands with its defaults; see their --help. Give a run your own data, tokenizer or
bank and the stages that would have made them fall away.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

if __package__ in (None, ""):  # run as a file from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_graft.bank.reader import open_bank
from megatron_graft.commands import is_number, run_command
from megatron_graft.data.preprocess import is_complete
from megatron_graft.data.tokenizer import load_tokenizer
from megatron_graft.errors import ConfigError, DataError, GraftError, IdentityError
from megatron_graft.files import alone_in, write_json_atomically
from megatron_graft.log import format_seconds, get_logger
from megatron_graft.processes import available_processors, run_while_alive

SPLITS = ("train", "heldout", "foreign")
NO_BANK = "none"


class StageFailed(GraftError):
    """A stage's own command failed; it has said why."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, metavar="DIR", help="where everything is made")
    parser.add_argument("--input", nargs="+", metavar="FILE", help="your own .txt/.jsonl text (default: fetched)")
    parser.add_argument("--foreign", nargs="+", metavar="FILE", help="text of another domain, for evaluation only")
    parser.add_argument("--data-path", nargs="+", metavar="PREFIX", help="your own .bin/.idx data")
    parser.add_argument("--split", help="Megatron's --split of your own data: only its training share is counted")
    parser.add_argument("--tokenizer-model", type=Path, metavar="FILE", help="your own tokenizer (default: trained)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the tokenizer to train (default: %(default)s)")
    parser.add_argument("--bank", default=None, help="an existing bank, or 'none' (default: built)")
    parser.add_argument("--bank-arguments", nargs=argparse.REMAINDER, default=[], help="passed on to build_bank")
    parser.add_argument("--donor", default="smollm2-135m",
                        help="packaged donor's name or a local causal-LM directory (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


class Preparation:
    """The stages of one work directory."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.work: Path = arguments.work_dir
        self.tokenizer: Path = arguments.tokenizer_model or self.work / "tokenizer" / "tokenizer.model"

    def run(self) -> None:
        """Run the stages in order."""
        arguments = self.arguments
        if arguments.data_path and not arguments.tokenizer_model:
            raise ConfigError(
                "--data-path", "was given without its tokenizer", remedy="Add --tokenizer-model (TOKENIZER_MODEL)."
            )
        _check_data(arguments.data_path or [])
        if not arguments.data_path:
            self._corpus()
            if not arguments.tokenizer_model:
                self._train_tokenizer()
            self._data()
        if arguments.bank is None:
            self._bank()
        elif arguments.bank != NO_BANK:
            self._check_bank(Path(arguments.bank))

    def _corpus(self) -> None:
        options = ["--output", self.work / "corpus", "--cache", self.work / "cache"]
        for flag, files in (("--input", self.arguments.input), ("--foreign", self.arguments.foreign)):
            options += [flag, *files] if files else []
        self._stage("corpus", "prepare_corpus", options)

    def _train_tokenizer(self) -> None:
        self._stage("tokenizer", "train_tokenizer", [
            "--input", self.work / "corpus" / "train.jsonl", "--output", self.work / "tokenizer",
            "--vocab-size", self.arguments.vocab_size,
        ])  # fmt: skip

    def _data(self) -> None:
        tokenizer = load_tokenizer(self.tokenizer)
        for split in SPLITS:
            text, prefix = self.work / "corpus" / f"{split}.jsonl", self.work / "data" / split
            if not text.is_file() or text.stat().st_size == 0:  # one's own text may come without a foreign domain
                continue
            if is_complete(f"{prefix}_text_document", tokenizer, [text]):
                get_logger().info("data %s: complete, skipped", split)
                continue
            self._stage(f"data {split}", "preprocess_data", [
                "--input", text, "--output-prefix", prefix, "--tokenizer-model", self.tokenizer,
                "--workers", available_processors(),
            ])  # fmt: skip

    def _bank(self) -> None:
        donor = self.arguments.donor
        if not Path(donor).is_dir():
            directory = self.work / "donor" / donor
            self._stage("donor", "fetch_donor", [donor, directory])
            donor = directory
        prefixes = self.arguments.data_path or [self.work / "data" / "train_text_document"]
        coverage = [
            f"{split}={self.work / 'data' / split}_text_document"
            for split in SPLITS[1:]  # what is counted is reported on in any case
            if not self.arguments.data_path and (self.work / "data" / f"{split}_text_document.idx").is_file()
        ]
        options = ["--data-prefix", *prefixes, "--tokenizer-model", self.tokenizer, "--donor", donor]
        options += ["--output", self.work / "bank"]
        options += ["--split", self.arguments.split] if self.arguments.split else []
        options += ["--coverage", *coverage] if coverage else []
        self._stage("bank", "build_bank", [*options, *self.arguments.bank_arguments])

    def _check_bank(self, path: Path) -> None:
        """Say now what the training would say later, in every process and under its launcher's traceback."""
        bank, tokenizer = open_bank(path), load_tokenizer(self.tokenizer)
        if bank.tokenizer_fingerprint != tokenizer.fingerprint:
            raise IdentityError(
                f"--bank {path}", f"was not made for the tokenizer {self.tokenizer}", got=bank.tokenizer_fingerprint,
                expected=tokenizer.fingerprint, remedy="Give the bank's tokenizer, or no bank to have one built.",
            )  # fmt: skip

    def _stage(self, name: str, tool: str, options: list[object]) -> None:
        """Run one command in a process of its own, so that its memory is gone afterwards, and note its time."""
        started = time.monotonic()
        command = [sys.executable, *_tool(tool), *map(str, options)]
        if run_while_alive(command) != 0:
            raise StageFailed(f"stage {name}", "failed; its own message stands above")
        seconds = time.monotonic() - started
        get_logger().info("%s: %s", name, format_seconds(seconds))
        self._note(name, seconds)

    def _note(self, name: str, seconds: float) -> None:
        """Keep the longest time of a stage: when nothing was left to do, the shorter run says nothing about it."""
        path = self.work / "stages.json"
        stages = json.loads(path.read_text()) if path.is_file() else {}
        stages[name] = round(max(seconds, stages.get(name, 0.0)), 1)
        write_json_atomically(path, stages)


def _check_data(blend: list[str]) -> None:
    for item in blend:
        if is_number(item):  # a weight
            continue
        for path in (Path(f"{item}.bin"), Path(f"{item}.idx")):
            if not path.is_file():
                raise DataError(
                    f"--data-path {item}", f"has no {path.name}", expected="the prefix of a Megatron data set",
                    remedy="Leave out .bin and .idx, or make it with tools/preprocess_data.py.",
                )  # fmt: skip


def _tool(name: str) -> list[str]:
    if __package__:
        return ["-m", f"{__package__}.{name}"]
    return [str(Path(__file__).with_name(f"{name}.py"))]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = parse_arguments(argv)

    def body() -> None:
        with alone_in(arguments.work_dir):  # the first process of a node, or of a file system; the others wait for it
            Preparation(arguments).run()

    return run_command(body)


if __name__ == "__main__":
    raise SystemExit(main())
