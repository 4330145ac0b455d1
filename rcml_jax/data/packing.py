"""Several texts in one row of tokens, so that short ones are not padded to the longest."""

import heapq
from typing import NamedTuple

import numpy as np

#: Lengths of rows of tokens: a few, as each is compiled once.
LENGTHS = (8, 16, 24, 32, 48, 64, 77)
_STEP = 8  # Beyond LENGTHS rows have a multiple of it: few lengths, each of which is compiled.


class PackedTexts(NamedTuple):
    """Rows of k texts each, one after the other, then padding.

    ids: (n, L) int32 tokens; ends: (n, k) int32, the place of each text's last token in its row.
    """

    ids: np.ndarray
    ends: np.ndarray


def pack_order(lengths: np.ndarray, per_row: int) -> np.ndarray:
    """An order (N,) of texts whose consecutive groups of `per_row` have about equal sums of tokens.

    Each text, the longest first, goes to the emptiest row with a free slot. N is a multiple of
    `per_row`.
    """
    rows: list[list[int]] = [[] for _ in range(len(lengths) // per_row)]
    emptiest = [(0, number) for number in range(len(rows))]
    for text in np.argsort(-lengths, kind="stable").tolist():
        total, number = heapq.heappop(emptiest)
        rows[number].append(text)
        if len(rows[number]) < per_row:
            heapq.heappush(emptiest, (total + int(lengths[text]), number))
    return np.asarray(rows, int).reshape(-1)


def pack_texts(ids: np.ndarray, mask: np.ndarray, per_row: int) -> tuple[np.ndarray, PackedTexts]:
    """Pack padded texts, ids and mask (n, T), into rows of about equal length.

    Returns indices (N,) into the texts, in the order of the rows. If the texts do not fill the last
    row, the last text is repeated.
    """
    count = len(ids)
    indices = np.arange(count + -count % per_row).clip(max=count - 1)
    indices = indices[pack_order(mask[indices].sum(axis=1), per_row)]
    return indices, pack(ids[indices], mask[indices], per_row)


def pack(ids: np.ndarray, mask: np.ndarray, per_row: int) -> PackedTexts:
    """Padded texts, ids and mask (N, T), to rows of `per_row` consecutive ones, N/per_row of them.

    The rows' length L is the smallest of a few that fits the fullest one. Padding is 0.
    """
    ends = mask.sum(axis=1).reshape(-1, per_row).cumsum(axis=1)
    fullest = int(ends.max())
    width = next((x for x in LENGTHS if x >= fullest), -(-fullest // _STEP) * _STEP)
    packed = np.zeros((len(ends), width), np.int32)
    # Both run through texts and their tokens in the same order.
    packed[np.arange(width) < ends[:, -1:]] = ids[mask.astype(bool)]
    return PackedTexts(packed, (ends - 1).astype(np.int32))
