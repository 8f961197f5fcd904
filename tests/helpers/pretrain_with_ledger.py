"""The real entry point, and beside it a ledger of what each rank holds and hands to collectives.

``ledger-<rank>.json`` in the run's directory has ``parameters`` (``dense`` and ``table``, of memory sites), ``bytes``
handed to each function of ``torch.distributed`` over the whole run, and ``device_bytes``, those of packed memories that
carry content.
"""

from __future__ import annotations

import atexit
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

# Which argument of a function is what this rank hands in.
_HANDED = {"all_reduce": 0, "all_to_all_single": 1, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 1}


class Ledger:
    """Counts of one process."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.device_bytes = 0

    def watch(self) -> None:
        """Wrap the collectives and what packs a micro-batch's memory."""
        import torch.distributed as dist

        from megatron_graft.data.look_ahead import SEQUENCE_NUMBER, LookAhead

        for name, place in _HANDED.items():
            setattr(dist, name, self._counting(name, place, getattr(dist, name)))
        exchange, take = dist.batch_isend_irecv, LookAhead.take

        @functools.wraps(exchange)
        def batch_isend_irecv(operations: Any) -> Any:
            for one in operations:
                if one.op is dist.isend:
                    self.bytes["send"] += one.tensor.nbytes
            return exchange(operations)

        @functools.wraps(take)
        def counted_take(look_ahead: Any, batch: Any) -> Any:
            held = look_ahead._tickets.get(batch[SEQUENCE_NUMBER])  # what was fetched and never taken does not count
            if held is not None:
                self.device_bytes += sum(end - first for first, end in held[1].memory.used_ranges())
            return take(look_ahead, batch)

        dist.batch_isend_irecv = batch_isend_irecv
        LookAhead.take = counted_take  # type: ignore[method-assign]

    def _counting(self, name: str, place: int, original: Any) -> Any:
        import torch.distributed as dist

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            if dist.get_world_size(group) == 1:  # nothing travels
                return original(*args, **kwargs)
            handed = args[place] if len(args) > place else kwargs.get("input", kwargs.get("input_tensor"))
            self.bytes[name] += handed.nbytes
            return original(*args, **kwargs)

        return collective


def main() -> int:
    """Watch, pre-train, write the ledger; return the exit code."""
    from megatron_graft.compat import cpu

    cpu.install()
    ledger, parameters = Ledger(), Counter[str]()
    ledger.watch()
    from megatron.training import get_args

    from megatron_graft.compat.parameter_groups import TABLE_ATTRIBUTE
    from megatron_graft.memory.site import MemorySite
    from megatron_graft.training import pretrain

    original = MemorySite.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for parameter in self.parameters():
            kind = "table" if hasattr(parameter, TABLE_ATTRIBUTE) else "dense"
            parameters[kind] += parameter.numel()

    MemorySite.__init__ = init  # type: ignore[method-assign]

    def write() -> None:
        args = get_args()
        path = Path(args.graft_run_dir, f"ledger-{args.rank}.json")
        found = {"parameters": parameters, "bytes": ledger.bytes, "device_bytes": ledger.device_bytes}
        path.write_text(json.dumps(found))

    atexit.register(write)
    return pretrain.main()


if __name__ == "__main__":
    raise SystemExit(main())
