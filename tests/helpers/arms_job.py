"""Two arms with two seeds in miniature: an experiment with texts and a donor of its own."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.helpers.main_job import DONOR_LAYER, NUM_ROWS, SEQ_LENGTH, VOCAB_SIZE, make_job

STEPS = 8
RECIPIENT = {
    "num-layers": 2, "hidden-size": 32, "ffn-hidden-size": 32, "seq-length": SEQ_LENGTH,
    "max-position-embeddings": SEQ_LENGTH, "micro-batch-size": 2, "global-batch-size": 4, "train-iters": STEPS,
    "log-interval": 2, "save-interval": 2,
}  # fmt: skip
NAMES = ["none-seed1", "graft-seed1", "none-seed2", "graft-seed2"]


def miniature(directory: Path) -> Path:
    """The experiment's file, with its texts and donor beside it."""
    job = make_job(directory / "inputs", directory)
    experiment = {
        "name": "miniature",
        "seeds": [1, 2],
        "primary": "heldout",
        "baseline": "none",
        "texts": {
            "input": [str(text) for text in job.texts], "foreign": [f"mail={job.foreign}"],
            "held_out_fraction": 0.3, "longest_document": 400,
        },
        "tokenizer": {"vocab_size": VOCAB_SIZE},
        "evaluation": {"classify_by": "real", "other_bank": "shuffled", "memory_off": ["heldout"]},
        "recipient": RECIPIENT,
        "banks": {
            "real": {"donor": str(job.donor), "flags": {"num-rows": NUM_ROWS, "donor-layers": DONOR_LAYER}},
            "shuffled": {"from": "real", "control": "shuffled"},
        },
        "arms": {
            "none": {"label": "no memory", "group": "core"},
            "graft": {"label": "a bank", "group": "core", "bank": "real", "flags": {"graft-layers": 2}},
        },
        "hypotheses": [{"name": "H1", "better": "graft", "worse": "none", "claim": "the bank pays"}],
    }  # fmt: skip
    path = directory / "arms.yaml"
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return path
