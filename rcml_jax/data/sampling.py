"""Relation batches: which items, relations and pairs go into a step, and their arrays."""

import dataclasses
import signal
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from rcml_jax.data.packing import pack_texts
from rcml_jax.data.relation_graph import RelationGraph, Splits
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """Static sizes of a relation batch.

    relations: inter-sample relations a batch; pairs: pairs of each; intra_pairs: self pairs under
    the intra-sample relation; items: distinct items. Places that the pairs leave free are filled
    with further training items, which serve as negatives.
    """

    relations: int
    pairs: int
    intra_pairs: int
    items: int

    def check(self, training_items: int) -> None:
        """Raise UserError where the data have too few items for a batch."""
        if self.items > training_items:
            raise UserError(
                f"a batch of {self.items} items is larger than the training split, which has "
                f"{training_items}; lower config.batch.size"
            )


class RelationSampler:
    """Random-access source of batch plans: plan k is a function of the seed and k alone.

    A plan names items (N,), the relation of each row (R,), and anchor and positive (R, G) as
    indices into the items. Row 0 is the intra-sample relation, named −1. A row short of pairs is
    padded, with `pair_valid` false there. `noise` seeds the batch's augmentation. `paraphrase` (R,)
    draws one of each relation's sentences.

    Relations, the pairs of each, and the items that fill the batch are uniform draws without
    replacement. The cost of a plan depends on the batch size, not on the graph's size. The sampler
    keeps the training pairs, sorted by relation, and the training items, in int32.
    """

    def __init__(self, graph: RelationGraph, splits: Splits, sizes: BatchSizes, seed: int):
        self._items = splits.items("train").astype(np.int32)
        self._sizes = sizes
        self._seed = seed
        pairs = splits.pairs("train")
        counts = np.bincount(pairs[:, 2], minlength=len(graph.relations))
        self._bounds = np.concatenate([[0], np.cumsum(counts)])
        self._relations = np.flatnonzero(counts)
        # Pairs hold indices into the split's items; the other items are the indices not among them.
        index_of = np.zeros(len(graph), np.int32)
        index_of[self._items] = np.arange(len(self._items), dtype=np.int32)
        self._pairs = index_of[pairs[np.argsort(pairs[:, 2], kind="stable"), :2]]
        if sizes.relations > len(self._relations):
            raise UserError(
                f"config.batch.relations={sizes.relations}, but only {len(self._relations)} "
                "relations have training pairs; lower it"
            )

    def __len__(self) -> int:
        """Effectively infinite; every index is an independent draw."""
        return 2**31 - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, int(index)))
        sizes = self._sizes
        chosen = rng.choice(len(self._relations), sizes.relations, replace=False)
        relations = self._relations[chosen]
        rows = [self._draw_pairs(rng, relation) for relation in relations]
        drawn = self._pairs[np.concatenate([np.zeros(0, np.int64), *rows])]
        paired, inverse = np.unique(drawn, return_inverse=True)
        free = sizes.items - len(paired)
        ranks = rng.choice(len(self._items) - len(paired), free, replace=False)
        items = self._items[np.concatenate([paired, _not_among(paired, ranks)])]
        itself = rng.choice(sizes.items, sizes.intra_pairs, replace=False)

        width = max(sizes.intra_pairs, sizes.pairs)
        counts = np.array([len(itself), *map(len, rows)])
        pair_valid = np.arange(width) < counts[:, None]
        anchor, positive = np.zeros((2, *pair_valid.shape), np.int32)
        first, second = inverse.reshape(-1, 2).T
        anchor[pair_valid] = np.concatenate([itself, first])
        positive[pair_valid] = np.concatenate([itself, second])
        return {
            "items": items.astype(np.int64),
            "relations": np.concatenate([[-1], relations]),
            "anchor": anchor,
            "positive": positive,
            "pair_valid": pair_valid,
            "noise": rng.integers(2**63, size=2),
            "paraphrase": rng.integers(2**31, size=len(relations) + 1),
        }

    def _draw_pairs(self, rng: np.random.Generator, relation: int) -> np.ndarray:
        """Rows of some pairs of a relation; `choice` of a number draws without listing them all."""
        start, stop = self._bounds[relation], self._bounds[relation + 1]
        return start + rng.choice(stop - start, min(self._sizes.pairs, stop - start), replace=False)


def _not_among(taken: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The numbers of some ranks, from 0, among the whole numbers that `taken`, sorted, lacks."""
    return ranks + np.searchsorted(taken - np.arange(len(taken)), ranks, side="right")


class EpochSampler:
    """Random-access source of batches that go through the rows once an epoch, in a new order each.

    Plan k is a function of the seed and k alone: `rows` (size,), `valid` (size,) bool, false where
    the last batch of an epoch is padded, and `noise`, the seed of the batch's augmentation.
    """

    def __init__(self, rows: np.ndarray, size: int, seed: int):
        """size: rows of a batch; 0 for all of them, which then keep their order."""
        if not 0 <= size <= len(rows):
            raise UserError(
                f"a batch of {size} samples does not fit the training split, which has "
                f"{len(rows)}; set config.batch.size between 1 and that, or 0 for all of them"
            )
        self._rows, self._seed = rows, seed
        self._order = -1, rows  # of the latest epoch: made once for all of its batches
        self.size = size or len(rows)
        self.per_epoch = -(-len(rows) // self.size)

    def __len__(self) -> int:
        """Effectively infinite."""
        return 2**31 - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        epoch, position = divmod(int(index), self.per_epoch)
        rows = self._rows if self.per_epoch == 1 else self._rows_of(epoch)
        rows = rows[position * self.size : (position + 1) * self.size]
        padding = self.size - len(rows)
        rng = np.random.default_rng((self._seed, int(index), 1))
        return {
            "rows": np.concatenate([rows, np.repeat(rows[:1], padding)]),
            "valid": np.arange(self.size) < self.size - padding,
            "noise": rng.integers(2**63, size=2),
        }

    def _rows_of(self, epoch: int) -> np.ndarray:
        known, rows = self._order
        if known != epoch:
            rows = np.random.default_rng((self._seed, epoch)).permutation(self._rows)
            self._order = epoch, rows
        return rows


def collator(
    graph: RelationGraph,
    tokenizer: Tokenizer,
    images: Callable[[np.ndarray], np.ndarray],
    sentence: Callable[[int, int], str],
    max_length: int,
    augment: Callable[..., np.ndarray] | None = None,
    texts_per_row: int = 1,
    negatives: str = "unrelated",
    stored: Mapping[str, Callable[[np.ndarray], Any]] | None = None,
    sentence_noise: Callable[[np.random.Generator, int], np.ndarray] | None = None,
    encoded: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
    local_rows: Callable[[int], np.ndarray] | None = None,
    split_related: bool = False,
) -> Callable[[dict], dict]:
    """A function from a plan to a relation batch; `augment` changes its images.

    `sentence` gives the sentence of a relation for a number that was drawn. `stored` may have, for
    "text" and "image", what of items takes the place of their ids and images. `sentence_noise`
    draws the noise added to the embeddings of that many sentences, `shared["sentence_noise"]`.
    `encoded` gives the ids and the mask of items' texts, which are tokenized anew without it.
    `local_rows`: number of rows of `items` → those that the batch has, all without it. Images of
    others are not read; of all texts the ids are, as the longest sets the length.
    `split_related`: whether `related` has the columns of the items of these rows alone.

    `items` are split over devices: ids (N, T) int32 and images (N, H, W, 3) uint8; with
    k > 1 texts a row `PackedTexts` of N/k rows and images (N/k, k, H, W, 3), and the plan's items
    come in another order. `shared` has what every device needs whole: relation_ids (R, T'),
    intra (R,), anchor, positive and pair_valid (R, G), linked (R, G, R), whether a pair is linked
    under each of the batch's relations, related, valid (N,) and labels (N,). What is related is no
    negative: under any relation where `negatives` is "unrelated", (N, N), and under the relation of
    the pair where it is "unlinked", (R, N, N).
    """

    stored = stored or {}
    images = stored.get("image", images)

    def collate(plan: dict) -> dict:
        if "text" in stored:
            ids = stored["text"](plan["items"])
        elif encoded is not None:
            ids, mask = encoded(plan["items"])
        else:
            ids, mask = tokenizer.encode([graph.texts[i] for i in plan["items"]], max_length)
        if texts_per_row > 1:
            order, ids = pack_texts(ids, mask, texts_per_row)
            plan = _reordered(plan, order)
        items, relations = plan["items"], plan["relations"]
        anchor, positive = items[plan["anchor"]], items[plan["positive"]]
        linked = graph.linked_under(anchor, positive, relations)
        mine = np.arange(len(items))
        if local_rows is not None:
            rows = local_rows(len(items) // texts_per_row)
            mine = mine.reshape(-1, texts_per_row)[rows].ravel()
            # Of stored states there are as many rows as items, whatever shares a row.
            ids = _rows_of(ids, rows)
        columns = items[mine] if split_related else items
        pixels = images(items[mine])
        if augment is not None:
            pixels = augment(pixels, np.random.default_rng(plan["noise"]), (len(items), mine))
        if texts_per_row > 1:
            pixels = _in_rows(pixels, texts_per_row)
        drawn = zip(relations.tolist(), plan["paraphrase"].tolist(), strict=True)
        relation_ids, _ = tokenizer.encode([sentence(r, k) for r, k in drawn], max_length)
        more = {}
        if sentence_noise is not None:
            rng = np.random.default_rng([*plan["noise"], 1])
            more["sentence_noise"] = sentence_noise(rng, len(relations))
        return {
            "items": {"ids": ids, "images": pixels},
            "shared": more
            | {
                "relation_ids": relation_ids,
                "intra": relations < 0,
                "anchor": plan["anchor"],
                "positive": plan["positive"],
                "pair_valid": plan["pair_valid"],
                "linked": linked,
                "related": graph.related_block(items, columns)
                if negatives == "unrelated"
                else graph.linked_blocks(items, columns, relations),
                "valid": np.ones(len(items), bool),
                "labels": graph.labels[items],
            },
        }

    return collate


def _in_rows(x: Any, per_row: int) -> Any:
    """An array (N, ...), or a named tuple of arrays → (N / per_row, per_row, ...)."""
    if isinstance(x, tuple):
        return type(x)(*(_in_rows(part, per_row) for part in x))
    return x.reshape(-1, per_row, *x.shape[1:])


def _rows_of(x: Any, rows: np.ndarray) -> Any:
    """Rows of an array, or of each array of a named tuple."""
    return type(x)(*(part[rows] for part in x)) if isinstance(x, tuple) else x[rows]


def _reordered(plan: dict, order: np.ndarray) -> dict:
    """The same plan with its items in another order."""
    position = np.argsort(order).astype(np.int32)
    pairs = {name: position[plan[name]] for name in ("anchor", "positive")}
    return {**plan, **pairs, "items": plan["items"][order]}


def batch_iterator(
    sampler: Any, collate: Callable[[dict], dict], threads: int = 1, workers: int = 0
) -> grain.DatasetIterator:
    """A grain iterator over batches, whose state is its position.

    `threads` read ahead, or that many `workers`, processes to which sampler and collate are copied.
    """
    dataset = grain.MapDataset.source(sampler).map(collate)
    if workers:
        return _InWorkers(dataset, workers)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(2 * threads, 2))
    return iter(dataset.to_iter_dataset(options))


class _InWorkers(grain.DatasetIterator):
    """Elements of a data set read by processes, with the state of an iterator in threads.

    Worker w of W reads the elements w, w + W and so on from the position of the start. Another
    position starts the workers anew, unless it is that of the first element after a start.
    """

    def __init__(self, dataset: grain.MapDataset, workers: int):
        super().__init__()
        self._dataset, self._workers = dataset, workers
        self._next = 0
        self._running: Any = None
        self._first: tuple[int, Any] | None = None  # after a start, until the next one is read

    def __next__(self) -> Any:
        if self._first is not None and self._first[0] == self._next:
            element = self._first[1]
        else:
            started = self._running is None
            if started:
                self._start()
            element = next(self._running)
            self._first = (self._next, element) if started else None
        self._next += 1
        return element

    def _start(self) -> None:
        # grain reads flags of absl, which are parsed only where absl starts the program.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        ahead = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=1)
        rest = self._dataset[self._next :].to_iter_dataset(options)
        self._running = iter(rest.mp_prefetch(ahead, _ignore_interrupts))

    def get_state(self) -> dict:
        """The position of the next element."""
        return {"next_index": self._next}

    def set_state(self, state: dict) -> None:
        """Go to a position."""
        wanted = state["next_index"]
        held = self._first is not None and self._first[0] == wanted
        if wanted != self._next and not held:
            self.close()
        self._next = wanted

    def close(self) -> None:
        """End the workers; the next element starts others."""
        if self._running is not None:
            self._running.close()
        self._running = self._first = None


def _ignore_interrupts(worker: int, workers: int) -> None:
    """A terminal sends an interrupt to all of its processes; the main one decides what ends."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
