"""A relation graph made ready for training: data, splits, tokenizer and images."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rcml_jax import remote
from rcml_jax.data import queries
from rcml_jax.data.images import (
    CACHE_BYTES,
    Framing,
    ImageBank,
    ItemImages,
    StoredPixels,
    augment,
)
from rcml_jax.data.relation_graph import RelationGraph, Splits, split_graph, split_index
from rcml_jax.data.sampling import BatchSizes, RelationSampler, batch_iterator, collator
from rcml_jax.data.sources import SOURCES
from rcml_jax.data.tokenizer import StoredTexts, Tokenizer, train_tokenizer
from rcml_jax.errors import UserError
from rcml_jax.log import counted, log_line
from rcml_jax.methods.base import Rows
from rcml_jax.parsing import user_cache, user_path
from rcml_jax.registry import call, resolve

#: Largest number of relations for which relation type is also measured among all of them.
MOST_RELATIONS = 20
#: Texts that are counted in one call of the tokenizer.
_TEXTS_AT_ONCE = 10_000


def make_splits(graph: RelationGraph, data: Any) -> Splits:
    """The graph's splits, as `config.data` asks for them."""
    return split_graph(
        graph,
        seed=data.split_seed,
        disjoint=data.disjoint,
        domain=data.domain_split,
    )


def load_source(
    data: Any, known: Mapping[str, str], kind: type, workdir: pathlib.Path | None = None
) -> Any:
    """What the source that `config.data` names returns, of `known` or by an import path.

    kind: the type that it has to return. Raises UserError for an unknown source, one that is no
    data source, and whatever the source finds wrong.
    """
    option = "config.data.name"
    cache = cache_directory(data.dir, workdir)
    if not data.dir and user_cache() is None:
        log_line(f"No home directory is known, so data sets are cached in {cache}.")
    with remote.shared(data.dir):
        return call(
            data.name,
            resolve(data.name, known, option),
            option,
            "a data source takes (config.data, directory of the cache) and returns an "
            f"{kind.__module__}.{kind.__qualname__}",
            data,
            cache,
            accepts=lambda found: isinstance(found, kind),
        )


def load_graph(data: Any, workdir: pathlib.Path | None = None) -> RelationGraph:
    """The relation graph that `config.data` names. Raises UserError as `load_source`."""
    graph = load_source(data, SOURCES, RelationGraph, workdir)
    # Only a source can tell which of its relation ids have one sentence, and does so.
    same = _first_equal(np.array([" ".join(sentence.split()) for sentence in graph.relations]))
    return graph if same is None else dataclasses.replace(graph, same_sentence=same)


def _first_equal(rows: np.ndarray) -> np.ndarray | None:
    """For each row the first one that equals it (n,) int32; None where all differ."""
    _, first, same = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return None if len(first) == len(rows) else first[same.ravel()].astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class RelationTask:
    """Data shared by every method on a relation graph: items, splits, texts and queries."""

    config: Any
    graph: RelationGraph
    splits: Splits
    tokenizer: Tokenizer
    images: ImageBank | StoredPixels
    max_length: int
    cache: pathlib.Path

    @classmethod
    def load(cls, config: Any, workdir: pathlib.Path) -> "RelationTask":
        """Prepare or open the data; fit the tokenizer, or read the one in the work directory."""
        data, model = config.data, config.model
        graph = load_graph(data, workdir)
        splits = make_splits(graph, data)
        # Imported here: who wants the data alone has no need of Hugging Face's classes.
        from rcml_jax.tasks.towers import inputs

        taken = inputs(model)
        new = not (pathlib.Path(workdir) / "tokenizer.json").is_file()
        tokenizer = work_tokenizer(
            pathlib.Path(workdir),
            lambda: _texts(graph, splits),
            taken.tokenizer,
            model.vocab_size,
            kind=taken.kind,
        )
        graph = tell_sentences_apart(
            graph, tokenizer, taken.max_length, strict=data.get("strict", False), tell=new
        )
        if new:
            tell_cut_texts(graph.texts, tokenizer, taken.max_length)
        cache = cache_directory(data.dir, workdir)
        images = image_reader(data, graph.name, graph.images, taken.framing, cache)
        return cls(config, graph, splits, tokenizer, images, taken.max_length, cache)

    def sentence(self, relation: int, drawn: int = 0) -> str:
        """The sentence of a relation; −1 is the intra-sample one.

        drawn: any number; selects one of the training paraphrases, 0 the first.
        """
        if relation < 0:
            return self.graph.intra_relation
        if not self.config.data.relation_text:
            return "These two items are related."
        sentences = self.graph.training_sentences(relation)
        return sentences[drawn % len(sentences)]

    @functools.cached_property
    def sentences(self) -> list[str]:
        """The sentences of all inter-sample relations, in their order."""
        return [self.sentence(r) for r in range(len(self.graph.relations))]

    def encode(self, texts: list[str]) -> np.ndarray:
        """Token ids (n, T) int32 of texts, T the smallest of a few fixed lengths that fits."""
        return self.tokenizer.encode(texts, self.max_length)[0]

    def known_graph(self) -> RelationGraph:
        """The graph that training may see: no pair of another split is in its masks and links.

        With item-disjoint splits this is the whole graph: pairs of other splits have other items.
        Without inter-sample pairs every item is related to itself only.
        """
        if not self.config.batch.inter_pairs:
            return self.graph.without_pairs()
        if self.splits.by_items and self.splits.disjoint != "relation":
            return self.graph
        return self.graph.only(self.splits.pair_split == split_index("train"))

    def batches(
        self,
        stored: Mapping[str, Callable] | None = None,
        sentence_noise: Callable | None = None,
        local_rows: Rows | None = None,
        split_related: bool = False,
    ) -> Any:
        """The grain iterator over training batches; the arguments are those of `collator`."""
        batch, seed = self.config.batch, self.config.seed
        sizes = BatchSizes(
            relations=batch.relations if batch.inter_pairs else 0,
            pairs=batch.pairs_per_relation,
            intra_pairs=batch.intra_pairs if batch.inter_pairs else batch.size,
            items=batch.size,
        )
        sizes.check(len(self.splits.items("train")))
        if isinstance(self.images, StoredPixels) and not (stored and "image" in stored):
            self.images.open()  # Before the first step, so that a full disk is told at the start.
        sampler = RelationSampler(self.graph, self.splits, sizes, seed)
        moved = functools.partial(augment, shift=batch.image_shift, flip=batch.image_flip)
        collate = collator(
            self.known_graph(),
            self.tokenizer,
            self.images,
            self.sentence,
            self.max_length,
            moved if batch.image_shift or batch.image_flip else None,
            batch.texts_per_row,
            # The baselines' losses have one mask for all relations.
            self.config.loss.negatives if self.config.method == "rcml" else "unrelated",
            stored or {},
            sentence_noise,
            None if stored and "text" in stored else self.stored_texts,
            local_rows,
            split_related,
        )
        data = self.config.data
        return batch_iterator(sampler, collate, data.threads, data.get("workers", 0))

    @functools.cached_property
    def stored_texts(self) -> StoredTexts | None:
        """The token ids of all texts, kept beside the prepared data; None where they cannot be."""
        try:
            return StoredTexts(
                self.cache / "token_ids",
                self.graph.name,
                self.tokenizer,
                self.graph.texts,
                self.max_length,
            )
        except UserError as error:  # such as a cache that can only be read
            log_line(f"Texts are tokenized in every batch: {error}.")
            return None

    def _draw(self) -> dict:
        """How the evaluation draws: the same for every method and training seed."""
        data = self.config.data
        return {
            "limit": data.queries,
            "per_relation": data.pairs_per_relation,
            "seed": data.split_seed,
        }

    @functools.cache  # noqa: B019 - a task lives as long as its run
    def retrieval_queries(
        self, split: str, candidates: str = "controlled"
    ) -> queries.RetrievalQueries:
        """The split's retrieval queries, the same for every method and seed.

        candidates: "controlled" or "random".
        """
        draws = {"controlled": queries.controlled_queries, "random": queries.retrieval_queries}
        return draws[candidates](self.graph, self.splits, split, **self._draw())

    def check_queries(self) -> None:
        """Draw what the evaluation will ask, so that a split that is too small is told before it.

        Raises UserError as the evaluation would. The draws are those of the evaluation, except that
        of validation: where random candidates can be drawn for it, which is faster, controlled ones
        can be, too.
        """
        try:
            self.retrieval_queries("validation", "random")
        except UserError:
            self.retrieval_queries("validation")
        self.retrieval_queries("test", "random")
        for split in ("train", "test"):
            self.validity_examples(split)

    @functools.cache  # noqa: B019
    def gallery_queries(self, split: str) -> queries.GalleryQueries:
        """The split's queries over all of its items; every linked item is relevant."""
        return queries.gallery_queries(self.graph, self.splits, split, **self._draw())

    @functools.cache  # noqa: B019
    def relation_queries(self, split: str) -> queries.RelationQueries:
        """The split's pairs with their candidate relations."""
        total = len(self.graph.relations)
        # Of few relations half are candidates; else frequent ones would be among all candidates.
        candidates = 10 if total > MOST_RELATIONS else max(2, total // 2)
        return queries.relation_candidates(
            self.graph, self.splits, split, candidates=candidates, **self._draw()
        )

    @functools.cache  # noqa: B019
    def validity_examples(self, split: str) -> queries.ValidityExamples:
        """The split's true and false triples (A, B, relation)."""
        return queries.validity_examples(self.graph, self.splits, split, **self._draw())


def tell_sentences_apart(
    graph: RelationGraph, tokenizer: Tokenizer, max_length: int, *, strict: bool, tell: bool
) -> RelationGraph:
    """The graph, which knows what relations have one and the same sentence as the tower takes it.

    Sentences that differ behind the last token that it takes are the same to it. tell: whether one
    line on standard error names such relations. Raises UserError for them with `strict`.
    """
    ids, mask = tokenizer.encode(graph.relations, max_length)
    rows = np.where(mask == 1, ids, -1)
    first = _first_equal(rows)
    known = graph.same_sentence
    if first is None or (known is not None and np.array_equal(first, known)):
        return graph
    names = graph.relation_ids or tuple(map(str, range(len(first))))
    alike = [np.flatnonzero(first == r) for r in np.unique(first)]
    groups = [", ".join(repr(names[r]) for r in g) for g in alike if len(g) > 1]
    many = counted(len(groups), "groups of relations have", "group of relations has")
    problem = (
        f"{many} the same first {max_length} tokens, all that "
        f"the text tower takes ({'; '.join(groups[:5])}{'; ...' if len(groups) > 5 else ''})"
    )
    if strict:
        raise UserError(
            f"{problem}; give them other or shorter sentences, or set config.data.strict=False"
        )
    if tell:
        log_line(f"{problem}: no model can tell these apart, and the evaluation takes them for one")
    return dataclasses.replace(graph, same_sentence=first)


def tell_cut_texts(texts: Sequence[str], tokenizer: Tokenizer, max_length: int) -> None:
    """Say on standard error how many texts are longer than the tower takes, and by how much."""
    starts = range(0, len(texts), _TEXTS_AT_ONCE)
    over = np.concatenate([tokenizer.lengths(texts[i : i + _TEXTS_AT_ONCE]) for i in starts])
    over -= max_length
    over = over[over > 0]
    if len(over):
        log_line(
            f"The ends of {len(over):,} of {counted(len(texts), 'texts')} are cut, behind the "
            f"{max_length} tokens that the text tower takes: "
            f"{counted(int(np.median(over)), 'tokens')} in the median, {over.max():,} at most"
        )


def image_reader(
    data: Any, name: str, images: ItemImages, framing: Framing, cache: pathlib.Path
) -> ImageBank | StoredPixels:
    """What reads images of items as `config.data.pixels` says.

    name: of the data set; cache: the directory of stored pixels.
    """
    if data.get("pixels", "encoded") == "encoded":
        workers = data.get("workers", 0)
        if not workers:
            return ImageBank(images, framing)
        # Each worker has a copy; threads in it would wait for its one interpreter.
        return ImageBank(images, framing, cache_bytes=CACHE_BYTES // workers, threads=1)
    return StoredPixels(cache / "pixels", name, images, framing)


def cache_directory(given: str = "", beside: pathlib.Path | None = None) -> pathlib.Path:
    """Where data sets are cached: the directory given, or the user's own.

    That is `$XDG_CACHE_HOME/rcml_jax`, or `~/.cache/rcml_jax`. Where no home directory is known, it
    is `rcml_jax_cache` next to the work directory `beside`, or in the current directory. An address
    on object storage stands for its mirror.
    """
    if remote.is_remote(given):
        return remote.local_directory(given)
    if given:
        return user_path(given)
    cache = user_cache()
    if cache is not None:
        return user_path(cache) / "rcml_jax"
    place = pathlib.Path.cwd() if beside is None else pathlib.Path(beside).absolute().parent
    return place / "rcml_jax_cache"


def work_tokenizer(
    workdir: pathlib.Path,
    texts: Callable[[], Iterable[str]],
    pretrained: str,
    vocab_size: int,
    *,
    kind: str = "CLIP",
) -> Tokenizer:
    """The tokenizer of a work directory; the first time a checkpoint's, or one fitted on texts.

    `kind` is what an error calls the checkpoint.
    """
    path = workdir / "tokenizer.json"
    if path.is_file():
        return Tokenizer.load(path)
    if pretrained:
        from rcml_jax.models.checkpoints import pretrained_directory

        tokenizer = Tokenizer.from_pretrained_dir(pretrained_directory(pretrained, kind=kind))
    else:
        tokenizer = train_tokenizer(texts(), vocab_size)
    tokenizer.save(path)
    return tokenizer


def _texts(graph: RelationGraph, splits: Splits) -> Iterator[str]:
    """What a tokenizer is fitted on: the training items' texts and the relation sentences."""
    for item in splits.items("train"):
        yield graph.texts[item]
    for relation in range(len(graph.relations)):
        yield from graph.training_sentences(relation)
    yield graph.intra_relation
