"""A world small enough to train in seconds, and the real entry point launched on it.

The text is a seeded walk over the words of a few real sentences, the tokenizer a real SentencePiece model, the data set
is written by our own preprocessing, and the bank holds the most frequent n-grams of that text with random rows.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_graft.bank.bf16 import bf16_from_float32
from megatron_graft.bank.manifest import DonorIdentity, Processing, TokenizerIdentity
from megatron_graft.bank.writer import write_bank
from megatron_graft.building.select import Quota, select_ngrams
from megatron_graft.data.preprocess import dataset_prefix, preprocess
from megatron_graft.data.tokenizer import TextTokenizer, load_tokenizer
from tests.helpers.candidates import CandidatesInMemory
from tests.helpers.tokenizers import SENTENCES, small_sentencepiece
from tests.helpers.warm_ranks import WarmRanks

NUM_LAYERS, SEQ_LENGTH, GLOBAL_BATCH_SIZE = 4, 64, 8
SITE_LAYERS = (2, 3)  # under PP=2 one on each stage
DONOR_LAYERS, DONOR_WIDTH = (4, 8), 15
NUM_ROWS, MANY_ROWS = 400, 1600
TIMEOUT_SECONDS = 500  # below the limit of a test
PRETRAIN = "megatron_graft.training.pretrain"
_RANKS = WarmRanks()

# fmt: off
MODEL_FLAGS = (
    "--num-layers", NUM_LAYERS, "--hidden-size", 64, "--ffn-hidden-size", 128, "--num-attention-heads", 4,
    "--seq-length", SEQ_LENGTH, "--max-position-embeddings", SEQ_LENGTH, "--position-embedding-type", "rope",
    "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights",
    "--attention-dropout", 0, "--hidden-dropout", 0, "--init-method-std", 0.05,
)
MOE_FLAGS = (
    "--num-experts", 4, "--moe-router-topk", 2, "--moe-router-load-balancing-type", "aux_loss",
    "--moe-aux-loss-coeff", 1e-2, "--moe-token-dispatcher-type", "alltoall",
)
TRAINING_FLAGS = (
    "--micro-batch-size", 2, "--global-batch-size", GLOBAL_BATCH_SIZE, "--lr", 1e-3, "--min-lr", 1e-4,
    "--lr-decay-style", "cosine", "--clip-grad", 1.0, "--seed", 1234, "--log-interval", 1, "--eval-iters", 0,
    "--num-workers", 0, "--no-create-attention-mask-in-dataloader", "--split", "1,0,0",
    "--save-interval", 1000, "--eval-interval", 1000,
)
CPU_FLAGS = (
    "--distributed-backend", "gloo", "--transformer-impl", "local", "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion", "--no-bias-dropout-fusion", "--no-bias-swiglu-fusion", "--no-rope-fusion",
    "--no-persist-layer-norm",
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class World:
    """What a run needs, on disk.

    Attributes:
        directory: holds everything; runs go below it.
        tokenizer: SentencePiece model file.
        data: ``.bin/.idx`` prefix.
        bank: the bank of most tests.
        many_rows: another bank of the same text and row width, with more rows.
    """

    directory: Path
    tokenizer: Path
    data: Path
    bank: Path
    many_rows: Path

    def flags(
        self, bank: Path | None = None, layers: Sequence[int] = SITE_LAYERS, *, experts: bool = True
    ) -> list[str]:
        """Every flag of a run but the number of steps, the layout and the checkpoints."""
        flags: list[Any] = [*MODEL_FLAGS, *(MOE_FLAGS if experts else ()), *TRAINING_FLAGS, *CPU_FLAGS]
        flags += ["--data-path", self.data]
        flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", self.tokenizer]
        flags += ["--data-cache-path", self.directory / "index-cache"]
        if bank is not None:
            flags += ["--graft-bank", bank, "--graft-layers", *layers]
        return [str(flag) for flag in flags]


def make_world(directory: Path) -> World:
    """Make text, tokenizer, data set and banks below ``directory``; the same bytes every time."""
    documents = make_text(400)
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    tokenizer = load_tokenizer(small_sentencepiece(directory))
    preprocess([corpus], directory / "tiny", tokenizer)
    world = World(
        directory=directory,
        tokenizer=tokenizer.path,
        data=dataset_prefix(directory / "tiny"),
        bank=directory / "bank",
        many_rows=directory / "bank-many-rows",
    )
    tokens = [np.array(tokenizer.encode(text), dtype=np.int64) for text in documents]
    _write_bank(world.bank, tokens, tokenizer, NUM_ROWS)
    _write_bank(world.many_rows, tokens, tokenizer, MANY_ROWS)
    return world


def make_text(num_documents: int, seed: int = 7) -> list[str]:
    """Documents of 3 to 70 words: mostly each word's real successor, now and then any word."""
    words = " ".join(SENTENCES).split()
    successors: dict[str, list[str]] = defaultdict(list)
    for word, following in zip(words, words[1:], strict=False):
        successors[word].append(following)
    choose = random.Random(seed)
    documents = []
    for _ in range(num_documents):
        text = [choose.choice(words)]
        for _ in range(choose.randint(2, 69)):
            known = successors[text[-1]]
            text.append(choose.choice(known if known and choose.random() < 0.8 else words))
        documents.append(" ".join(text))
    return documents


def _write_bank(path: Path, documents: list[np.ndarray], tokenizer: TextTokenizer, num_rows: int) -> None:
    candidates = CandidatesInMemory([tokens.tolist() for tokens in documents], (2, 3, 4), tokenizer.eod)
    keys = select_ngrams(candidates, tokenizer, Quota(num_rows=num_rows)).keys
    generator = np.random.default_rng(num_rows)
    shape = (len(DONOR_LAYERS), len(keys.key_orders), DONOR_WIDTH)
    bits = bf16_from_float32(generator.standard_normal(shape).astype(np.float32))
    write_bank(
        path,
        keys=keys,
        layers=dict(zip(DONOR_LAYERS, bits, strict=True)),
        tokenizer=TokenizerIdentity(
            fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, eod=tokenizer.eod
        ),
        donor=DonorIdentity(name="random", revision="0" * 64, layers=DONOR_LAYERS, hidden_size=DONOR_WIDTH),
        processing=Processing(centred=True, normalised=True),
        control=None,
        provenance={"made_by": "a test"},
    )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a launch ended.

    Attributes:
        returncode: of the one process, or of the launcher.
        stdout, stderr: of all ranks.
        directory: of the run: given as ``--graft-run-dir``.
    """

    returncode: int
    stdout: str
    stderr: str
    directory: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        return read_records(self.directory)

    @property
    def losses(self) -> dict[int, float]:
        """Iteration -> loss, in full precision."""
        return {record["iteration"]: record["lm loss"] for record in self.records}

    @property
    def checkpoints(self) -> Path:
        """What was given as ``--save``."""
        return self.directory / "checkpoints"

    def require_success(self) -> Finished:
        """Return self, or fail with the end of the output."""
        if self.returncode != 0:
            raise AssertionError(
                f"{self.directory.name} ended with {self.returncode}\n{self.stdout[-2000:]}\n{self.stderr[-6000:]}"
            )
        return self


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's ``metrics.jsonl``; none if there is no such file yet."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def launch(
    directory: Path,
    flags: Sequence[Any],
    *,
    processes: int = 1,
    module: str = PRETRAIN,
    kill_when: Callable[[], bool] | None = None,
    arguments_first: Sequence[Any] = (),
) -> Finished:
    """Run ``module`` as one rank or several, gloo on the loopback.

    The ranks are forked (``tests/helpers/warm_ranks.py``); what the launcher itself does is tested with the example
    script.

    Args:
        directory: of this run; made if need be. Output and metrics go there.
        flags: Megatron's and ours.
        processes: number of ranks.
        module: what each rank runs.
        kill_when: asked again and again; once true, every process gets SIGKILL.
        arguments_first: put before the flags.
    """
    directory.mkdir(parents=True, exist_ok=True)
    out, err = directory / "stdout.txt", directory / "stderr.txt"
    for file in (out, err):
        file.write_bytes(b"")
    arguments = [str(part) for part in (*arguments_first, *flags, "--graft-run-dir", directory)]
    code = _RANKS.run(
        module, arguments, ranks=processes, environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, stdout=out, stderr=err,
        kill_when=kill_when or (lambda: False), timeout=TIMEOUT_SECONDS,
    )  # fmt: skip
    return Finished(returncode=code, stdout=out.read_text(), stderr=err.read_text(), directory=directory)
