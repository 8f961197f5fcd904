"""Which donor passes a list of texts needs: a beginning that texts share is run once, whatever follows it.

Under causal attention a state depends on the tokens up to its own and on nothing else. So the token lists of
all texts form a *trie*, one node for every distinct beginning, and each node needs one donor token. Numbered
depth first (a node, then its descendants, children by token id), the trie is cut into *packs*: a pack is the
path from the root to its first node, then consecutive nodes. All ancestors of a pack's nodes are thus in the
pack, and one forward pass runs it as one sequence in which a node attends to its ancestors and itself.

Shapes: N rows, K trie nodes, P packs, M nodes of one pack. A *place* is an index into the packs laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from megatron_graft.errors import ConfigError, DonorError
from megatron_graft.files import storage_errors

DEFAULT_PACK_TOKENS = 256
"""Most nodes of a pack. On a CPU, 128 to 512 are equally fast; larger ones pay for attention between strangers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
    """One sequence for the donor, all arrays ``[M]``; index i is the pack's i-th node.

    ``tokens``, ``parents`` (index in this pack, -1 at a root) and ``depths`` (0 at a root): int32.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def ancestors_MM(self) -> np.ndarray:
        """bool ``[M, M]``: whether node i (line) may see node j (column): its ancestors and itself."""
        sees = np.eye(len(self), dtype=bool)
        above = self.parents.astype(np.int64)
        while (above >= 0).any():
            (nodes,) = np.nonzero(above >= 0)
            sees[nodes, above[nodes]] = True
            above[nodes] = self.parents[above[nodes]]
        return sees


@dataclass(frozen=True, kw_only=True, eq=False)
class Packs:
    """All packs of a list of texts, laid end to end.

    Attributes:
        tokens: int32 ``[total]``, donor ids.
        parents: int32 ``[total]``, index of the parent inside the pack, -1 at a root.
        depths: int32 ``[total]``, tokens before this one: the position it has in its text.
        pack_starts: int64 ``[P + 1]``, place where each pack begins; the last is ``total``.
        node_of_row: int64 ``[N]``, place of the node whose state a row takes.
        lengths_of_row: int32 ``[N]``, donor tokens of a row's text, the first (BOS) not counted.
        taken: int64 ascending, the distinct places that rows take.
    """

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    pack_starts: np.ndarray
    node_of_row: np.ndarray
    lengths_of_row: np.ndarray
    taken: np.ndarray

    def __len__(self) -> int:
        """P, the number of packs."""
        return len(self.pack_starts) - 1

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.node_of_row)

    def __getitem__(self, pack: int) -> Pack:
        inside = slice(int(self.pack_starts[pack]), int(self.pack_starts[pack + 1]))
        return Pack(tokens=self.tokens[inside], parents=self.parents[inside], depths=self.depths[inside])

    def taken_in(self, first_pack: int, last_pack: int) -> np.ndarray:
        """int64: the places that rows take in packs ``first_pack`` to ``last_pack``, the last not included."""
        bounds = self.pack_starts[[first_pack, last_pack]]
        start, stop = np.searchsorted(self.taken, bounds)
        return self.taken[start:stop]

    def token_path(self, place: int) -> list[int]:
        """Donor ids from the root to the node at ``place``."""
        start = int(self.pack_starts[np.searchsorted(self.pack_starts, place, side="right") - 1])
        path, node = [], place - start
        while node >= 0:
            path.append(int(self.tokens[start + node]))
            node = int(self.parents[start + node])
        return path[::-1]


def packs_of_task(num_packs: int, task: int, num_tasks: int) -> tuple[int, int]:
    """First pack of a task and the first one after it. Nothing but who does the work depends on ``num_tasks``."""
    return task * num_packs // num_tasks, (task + 1) * num_packs // num_tasks


def flat_token_lists(token_lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token lists end to end, int32, and their lengths, int64 ``[N]``."""
    lengths = np.fromiter(map(len, token_lists), dtype=np.int64, count=len(token_lists))
    ids = np.fromiter((token for tokens in token_lists for token in tokens), dtype=np.int32, count=int(lengths.sum()))
    return ids, lengths


def plan_packs(ids: np.ndarray, lengths: np.ndarray, pack_tokens: int = DEFAULT_PACK_TOKENS) -> Packs:
    """Plan the passes that yield the last state of every token list.

    Args:
        ids: int32, the donor ids of all texts end to end, BOS first in each.
        lengths: int64 ``[N]``, tokens of each text, BOS counted; none is 0.
        pack_tokens: most nodes of one pack; a text with more tokens than that makes a pack of its own path.

    Returns:
        packs that follow from the arguments alone: each node of the trie stands once behind its pack's path.

    Raises:
        ConfigError: ``pack_tokens`` is not positive.
        DonorError: there is no text, or one has no token.
    """
    if pack_tokens < 1:
        raise ConfigError("--pack-tokens", "is not positive", got=pack_tokens, expected="at least 1")
    if len(lengths) == 0 or int(lengths.min()) < 1:
        raise DonorError("texts", "cannot be packed", got="none" if len(lengths) == 0 else "a text without a token")
    trie = _depth_first(*_levels(ids, lengths))
    starts = _cut(trie.depths, pack_tokens)
    tokens, parents, depths, pack_starts = _lay_out(trie, starts)
    # A node's place: its pack's begin, the path before the pack's own nodes, its number among those.
    pack = np.searchsorted(starts, trie.node_of_row, side="right") - 1
    node_of_row = pack_starts[pack] + trie.depths[starts[pack]] + (trie.node_of_row - starts[pack])
    return Packs(
        tokens=tokens,
        parents=parents,
        depths=depths,
        pack_starts=pack_starts,
        node_of_row=node_of_row,
        lengths_of_row=(lengths - 1).astype(np.int32),
        taken=np.unique(node_of_row),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Trie:
    """Nodes numbered depth first: token (int32), parent's number (int64, -1 at a root) and depth (int32) of each."""

    tokens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    node_of_row: np.ndarray


def _levels(ids: np.ndarray, lengths: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """The trie level by level: tokens and parents (numbers in the level above) of each level's nodes.

    Nodes of a level are sorted by parent, then token. Also each row's level and its node's number there.
    """
    starts = np.cumsum(lengths) - lengths
    base = int(ids.max()) + 1
    tokens: list[np.ndarray] = []
    parents: list[np.ndarray] = []
    node_of_row = np.zeros(len(lengths), dtype=np.int64)
    rows = np.arange(len(lengths))
    for depth in range(int(lengths.max())):
        rows = rows[lengths[rows] > depth]
        keys, node_of_row[rows] = np.unique(node_of_row[rows] * base + ids[starts[rows] + depth], return_inverse=True)
        tokens.append((keys % base).astype(np.int32))
        parents.append(keys // base)
    return tokens, parents, lengths - 1, node_of_row


def _depth_first(
    tokens: list[np.ndarray], parents: list[np.ndarray], level_of_row: np.ndarray, node_of_row: np.ndarray
) -> _Trie:
    sizes = [np.ones(len(level), dtype=np.int64) for level in tokens]
    for depth in range(len(tokens) - 1, 0, -1):
        np.add.at(sizes[depth - 1], parents[depth], sizes[depth])
    total = int(sizes[0].sum())
    out_tokens, out_depths = np.empty(total, dtype=np.int32), np.empty(total, dtype=np.int32)
    out_parents = np.empty(total, dtype=np.int64)
    rows_out = np.empty_like(node_of_row)
    order = np.argsort(level_of_row, kind="stable")
    bounds = np.searchsorted(level_of_row[order], np.arange(len(tokens) + 1))
    above = np.array([-1])
    for depth, size in enumerate(sizes):
        before = np.cumsum(size) - size
        eldest = np.concatenate(([True], parents[depth][1:] != parents[depth][:-1]))
        eldest_before = before[np.maximum.accumulate(np.where(eldest, np.arange(len(size)), 0))]
        numbers = above[parents[depth]] + 1 + before - eldest_before
        out_tokens[numbers], out_depths[numbers], out_parents[numbers] = tokens[depth], depth, above[parents[depth]]
        rows = order[bounds[depth] : bounds[depth + 1]]
        rows_out[rows] = numbers[node_of_row[rows]]
        above = numbers
    return _Trie(tokens=out_tokens, parents=out_parents, depths=out_depths, node_of_row=rows_out)


def _cut(depths: np.ndarray, pack_tokens: int) -> np.ndarray:
    """int64 ``[P]``: number of the first node of each pack that is not on its path."""
    starts, start = [], 0
    while start < len(depths):
        starts.append(start)
        start += max(1, pack_tokens - int(depths[start]))
    return np.array(starts, dtype=np.int64)


def _lay_out(trie: _Trie, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, parents, depths of all packs end to end, and where each begins."""
    stops = np.append(starts[1:], len(trie.tokens))
    path = trie.depths[starts].astype(np.int64)
    pack_starts = np.concatenate(([0], np.cumsum(path + stops - starts)))
    nodes = np.empty(pack_starts[-1], dtype=np.int64)
    pack = np.repeat(np.arange(len(starts)), path + stops - starts)
    index = np.arange(len(nodes)) - pack_starts[pack]
    own = index >= path[pack]
    nodes[own] = np.arange(len(trie.tokens))
    for packs, up, node in _paths(trie.parents, starts):
        nodes[pack_starts[packs] + path[packs] - up] = node
    above = trie.parents[nodes]
    # Inside the pack: own nodes by number behind the path, ancestors on the path by their depth.
    parents = np.where(above >= starts[pack], path[pack] + above - starts[pack], trie.depths[above])
    parents[above < 0] = -1
    return trie.tokens[nodes], parents.astype(np.int32), trie.depths[nodes], pack_starts


def _paths(parents: np.ndarray, starts: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
    """Ancestors of the packs' first nodes, one generation after the other: packs, generations up, node numbers."""
    packs, nodes, up = np.arange(len(starts)), parents[starts], 1
    while len(packs):
        packs, nodes = packs[nodes >= 0], nodes[nodes >= 0]
        yield packs, up, nodes
        nodes, up = parents[nodes], up + 1


def save_packs(packs: Packs, directory: Path) -> None:
    """Write every array as ``<name>.npy`` into ``directory``.

    Raises:
        StorageError: the file system refused.
    """
    with storage_errors(directory):
        for field in fields(Packs):
            np.save(directory / f"{field.name}.npy", getattr(packs, field.name))


def load_packs(directory: Path) -> Packs:
    """Map what :func:`save_packs` wrote, without reading it.

    Raises:
        DonorError: a file is missing or damaged.
    """
    arrays = {}
    for field in fields(Packs):
        file = directory / f"{field.name}.npy"
        arrays[field.name] = map_array(file)
    return Packs(**arrays)


def map_array(file: Path) -> np.ndarray:
    """Map an array that an earlier stage wrote.

    Raises:
        DonorError: it is missing or damaged.
    """
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DonorError(
            file,
            "is missing or damaged",
            got=str(error),
            expected="an array written by an earlier stage of the build",
            remedy="Remove its directory and run the stage again.",
        ) from error
    return array
