"""Where documents start inside a packed sample.

Shapes: B sequences, S positions.

Conventions, shared by counting, lookup and the memory layer:

* an end-of-document token (EOD) is the last token of its document; the next token starts a new one;
* position 0 of every sequence starts a document, whatever precedes it in the corpus;
* no n-gram contains an EOD token, so a position that holds one matches nothing.
"""

from __future__ import annotations

import numpy as np

Tokens = np.ndarray


def positions_in_document(tokens_BS: Tokens, eod: int | None) -> np.ndarray:
    """Distance of every position from the first token of its document.

    Args:
        tokens_BS: int32 or int64 ``[B, S]`` token ids.
        eod: id of the end-of-document token, or None if sequences hold one document each.

    Returns:
        int32 ``[B, S]``; 0 at every document's first token. An EOD counts in the document that it ends.
    """
    sequences, length = tokens_BS.shape
    column = np.broadcast_to(np.arange(length, dtype=np.int32), (sequences, length))
    if eod is None:
        return column.copy()
    starts = np.zeros((sequences, length), dtype=np.int32)
    np.copyto(starts[:, 1:], column[:, 1:], where=tokens_BS[:, :-1] == eod)
    return column - np.maximum.accumulate(starts, axis=1)
