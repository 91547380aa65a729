"""Where the groups of a pattern lie within blocks."""

from typing import NamedTuple

import numpy as np

from woodfisher_jax.selection.patterns import Groups


class Part(NamedTuple):
    """Parts of groups that lie in the blocks of a panel, of about the same size.

    Attributes:
        columns: Their columns in each block, int32 [blocks, parts, size]; c is padding.
        groups: The number of their group, int32 [blocks, parts]; the number of groups
            is padding.
    """

    columns: np.ndarray
    groups: np.ndarray


def parts_of(index: np.ndarray, groups: Groups) -> tuple[Part, ...]:
    """Where the groups lie in some blocks.

    Args:
        index: Of the blocks' weights in the flat vector, [blocks, c]; d is padding.
        groups: Of the whole vector.

    Returns:
        For each power of two that sizes are rounded up to, the parts of that size; for
        N:M one, in which the columns are in the order of the slots.
    """
    blocks, width = index.shape
    block, column = np.nonzero(index < len(groups.of))
    weight = index[block, column]
    # One number for each pair of block and group; weights by slots within it.
    pair = block * np.int64(groups.number) + groups.of[weight]
    order = np.lexsort((groups.slots[weight], pair))
    pair, column, weight = pair[order], column[order], weight[order]
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    sizes = np.diff(starts, append=len(pair))
    part = np.repeat(np.arange(len(starts)), sizes)
    part_block, part_group = np.divmod(pair[starts], groups.number)
    if groups.removals is None:
        place = np.arange(len(pair)) - starts[part]
        level = np.ceil(np.log2(sizes)).astype(int)
    else:
        place = groups.slots[weight]
        level = np.zeros(len(starts), int)
        sizes = np.full(len(starts), groups.slots.max() + 1)
    found = []
    for chosen in np.unique(level):
        mine = level == chosen
        # Parts are in the order of blocks: their number within their block.
        owner = part_block[mine]
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        shape = (blocks, int(rank.max()) + 1)
        columns = np.full((*shape, int(sizes[mine].max())), width, np.int32)
        numbers = np.full(shape, groups.number, np.int32)
        numbers[owner, rank] = part_group[mine]
        ranks = np.zeros(len(starts), int)
        ranks[mine] = rank
        inside = mine[part]
        at = part[inside]
        columns[part_block[at], ranks[at], place[inside]] = column[inside]
        found.append(Part(columns, numbers))
    return tuple(found)
