"""The real entry point, and beside it a record of how clear the router's choices were.

Each line of ``margins.txt`` in the run's directory is one call of one router: the smallest distance, over its tokens,
between the logit of the last expert chosen and that of the first one not chosen. Where two runs part, a margin of the
size of rounding says that a tie has flipped; a larger one says that it has not.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any


def main() -> int:
    """Wrap the router, then pre-train; return the exit code."""
    from megatron_graft.compat import cpu

    cpu.install()
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.training import get_args

    from megatron_graft.training import pretrain

    original = TopKRouter.routing

    @functools.wraps(original)
    def routing(self: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
        best = logits.detach().float().topk(self.topk + 1, dim=-1).values
        margin = float((best[..., -2] - best[..., -1]).min())
        with Path(get_args().graft_run_dir, "margins.txt").open("a") as stream:
            stream.write(f"{margin!r}\n")
        return original(self, logits, *args, **kwargs)

    TopKRouter.routing = routing
    return pretrain.main()


if __name__ == "__main__":
    raise SystemExit(main())
