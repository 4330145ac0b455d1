"""Embedding a catalogue under relation sentences, and the items of it most related to one.

model = open_model("runs/rcml")
items = read_items("my_catalogue")
embeddings = embed_catalogue(model, items, ["both of them show a heart"], "embeddings")
related(embeddings, "both of them show a heart", item="beating heart", k=10)

With `tokens="float16"` the catalogue can be asked under any sentence: see `Searcher`.
"""

import collections
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
from flax.errors import FlaxError

from rcml_jax.data.images import DECODE_ERRORS, Framing
from rcml_jax.errors import UserError
from rcml_jax.evaluation.top_k import nearest
from rcml_jax.log import counted, log_line
from rcml_jax.methods import EMBEDDINGS, RELATIONAL, build, family_of
from rcml_jax.methods.relational import Embedder, RelationalMethod, TokenReader
from rcml_jax.models.relation_pooling import FoldedRelation
from rcml_jax.models.towers.transformer import TokenStates
from rcml_jax.parsing import argument_text, read_file, user_path
from rcml_jax.remote import address_of
from rcml_jax.search.embedding_store import (
    MODALITIES,
    Embeddings,
    Plan,
    Store,
    Writer,
    either,
    hold_store,
    open_embeddings,
)
from rcml_jax.search.exported import export_config, export_mark, find_export, load_export
from rcml_jax.search.items import Items, pixels
from rcml_jax.search.token_store import (
    Tokens,
    TokenWriter,
    open_tokens,
    plan_tokens,
    pool_tokens,
)
from rcml_jax.training import sharding
from rcml_jax.training.checkpoint import best_step, read_params
from rcml_jax.training.workdir import load_config

_CHUNK = 256
_MOST_CHARACTERS = 2_000
#: Sentences whose vectors a `Searcher` keeps, the last ones that were asked for.
_KEPT_SENTENCES = 8


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained relational method. about: "workdir", "method", "step" and the weights' "digest".

    devices: those of this process, over which a catalogue's items are split; all else is done on
    the first, which has the parameters.
    """

    method: RelationalMethod
    params: Any
    about: dict[str, Any]
    devices: tuple[jax.Device, ...]

    @property
    def device(self) -> jax.Device:
        """The first of the devices."""
        return self.devices[0]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """On the model's device; a checkpoint that does not fit becomes a UserError."""
        try:
            with sharding.working_on(self.device):
                yield
        except FlaxError as error:
            raise UserError(
                f"{self.about['workdir']} holds the checkpoint of another model than its "
                "config.json describes; restore that file, or train anew in another --workdir"
            ) from error


@dataclasses.dataclass(frozen=True)
class Match:
    """An item that was found: its index in the catalogue, and its score, a mean of cosines."""

    index: int
    id: str
    text: str
    score: float


def open_model(workdir: pathlib.Path | str, config: Any = None) -> Model:
    """The best checkpoint of a work directory; `config` in place of its own where given.

    workdir: also a directory that `rcml-export` wrote, or the name of a repository on the Hugging
    Face hub that it pushed to, "user/name". `config.devices` is the most devices of a process that
    are used, 0 for all. Where there are several processes, all have to call this.

    Raises UserError where nothing was trained, or no relational method, and as `find_export`.
    """
    export = sharding.everywhere(lambda: find_export(workdir))
    if export is not None:
        return sharding.everywhere(lambda: _open_export(export, str(workdir), config))
    workdir = user_path(workdir)
    return _open_run(
        workdir, sharding.everywhere(lambda: load_config(workdir) if config is None else config)
    )


def _open_run(workdir: pathlib.Path, config: Any) -> Model:
    if config.method == EMBEDDINGS or family_of(config.method) != "relational":
        raise UserError(
            f"{workdir} holds the method {config.method!r}, which embeds nothing under relations; "
            f"give a run of {', '.join(RELATIONAL)}"
        )
    devices = _devices(config)
    params = sharding.everywhere(lambda: read_params(workdir))
    with sharding.working_on(devices[0]):
        # The primary prepares the data, where they are not yet.
        method: Any = sharding.primary_first(lambda: build(config, workdir))
        about = {
            "workdir": address_of(workdir) or str(workdir.resolve()),
            "method": config.method,
            "step": best_step(workdir),
            "digest": _digest(config, workdir, params, method.task.sentence(-1)),
        }
        return Model(method, jax.tree.map(jax.numpy.asarray, params), about, devices)


def _devices(config: Any) -> tuple[jax.Device, ...]:
    """The devices of this process, at most as many as the configuration names."""
    found = sharding.of_process(sharding.pick_devices(config.platform))
    return tuple(found[: config.get("devices", 0) or None])


def _open_export(directory: pathlib.Path, name: str, config: Any) -> Model:
    config = export_config(directory) if config is None else config
    devices = _devices(config)
    with sharding.working_on(devices[0]):
        method, params = load_export(directory, config)
        about = {"workdir": name, **(export_mark(directory) or {})}
        plain = config.copy_and_resolve_references()
        plain.model.pretrained = ""  # the place of the files embeds nothing
        about["digest"] = _digest(plain, directory, params, method.task.sentence(-1))
        return Model(method, params, about, devices)


def embed_catalogue(
    model: Model,
    items: Items,
    relations: Sequence[str],
    to: pathlib.Path | str,
    *,
    dtype: str = "float32",
    shard: int = 1024,
    strict: bool = False,
    tokens: str = "",
    note: Callable[[int, int], None] | None = None,
) -> Embeddings | None:
    """Embed items as what they are and under relation sentences into a directory, or go on there.

    Items are divided over all processes and the devices of each; the primary process writes. All
    have to call this alike, and those that do not write get None.

    dtype: float32 or float16, of what is stored; shard: items between two marks from which an
    interrupted call is resumed; note: is told the number of items that are done and of all. Items
    may lack their text or their image. An image that is missing or damaged is left out and
    counted ("unreadable"); what then has neither text nor image is counted too ("empty"); both
    are errors with `strict`. Items whose text or image has changed since an earlier call are
    embedded anew, and one line on standard error counts them. The layout is that of
    `rcml_jax.search.embedding_store`. tokens: "float16" or "int8" also keeps the token states, so
    that items can be pooled under sentences to come; one line says first how large they are.

    Raises UserError for an empty sentence, where the directory holds anything else, and with
    `tokens` for a method that pools none.
    """
    sentences = sentences_of(model, relations)
    check_alike(model, items, sentences, tokens)
    with model.running(), contextlib.ExitStack() as stack:
        reader = model.method.token_reader(model.params, model.devices) if tokens else None
        sharding.on_primary(lambda: stack.enter_context(hold_store(to)))
        embedder = model.method.embedder(model.params, sentences[1:], model.devices)
        layout = None if reader is None else plan_tokens(reader, items, tokens)
        embed: Callable[..., tuple] = functools.partial(embed_chunk, embedder)
        if reader is not None:
            embed = functools.partial(_embed_tokens, reader, reader.relations(sentences))

        def begin() -> tuple[Writer, TokenWriter | None]:
            kept = None if layout is None else layout.manifest()
            plan = Plan(model.about, items, sentences, embedder.shapes, dtype, shard, kept)
            writer = Writer(to, plan)
            if layout is None:
                return writer, None
            log_line(
                f"{to}: token states ({tokens}) of {len(items):,} items: {_size(layout.bytes)}"
            )
            return writer, TokenWriter(writer.directory, layout, items, writer.begun)

        writer, token_writer = sharding.on_primary(begin) or (None, None)
        fill(writer, model, items, embed, token_writer, strict=strict, note=note)
    return sharding.on_primary(lambda: open_embeddings(to))


def check_alike(model: Model, items: Items, sentences: Sequence[str], tokens: str = "") -> None:
    """Raise UserError in all processes unless they have the same of what they divide the work by.

    That are the model, the number of devices, items, sentences and the type of token states.
    """
    if jax.process_count() > 1:
        about = [model.about["digest"], len(model.devices), items.digest(), tokens]
        found = sharding.gather([*about, *sentences])
        if any(other != found[0] for other in found):
            raise UserError(
                "the processes have different items, models, relations, numbers of devices or "
                "types of token states; start the same command in all of them, on the same files"
            )


def fill(
    writer: Any,
    model: Model,
    items: Items,
    embed: Callable[..., tuple],
    token_writer: TokenWriter | None = None,
    *,
    strict: bool = False,
    note: Callable[[int, int], None] | None = None,
) -> None:
    """Embed what a store lacks or has of an earlier state of the items, shard by shard.

    Every process embeds its part of each chunk; the primary, which has the writers, gets all parts.
    A mistake in one process ends all of them.

    writer: as `embedding_store.Writer`, None in the other processes; embed: `embed_chunk` with its
    embedder, or what returns the same of a chunk; the others as of `embed_catalogue`.
    """
    framing, plan = model.method.task.images.framing, None
    if writer is not None:
        spans = [[rows.start, rows.stop] for rows in writer.shards()]
        plan = {"stale": writer.stale, "shards": spans}
    plan = sharding.gather(plan)[0]
    assert plan is not None  # it is the primary's
    stale, shards = plan["stale"], [range(*span) for span in plan["shards"]]
    ends = {rows.stop for rows in shards}
    size = _CHUNK * len(model.devices) * jax.process_count()
    problems: dict[str, list[str]] = {"unreadable": [], "empty": []}

    def embedded(chunks: Sequence[_Chunk], pool: ThreadPoolExecutor) -> Iterator[tuple]:
        """Each chunk, and what the processes made of their parts of it, with these parts."""
        own = [_part(chunk, jax.process_index()) for chunk in chunks]
        reading = _read_ahead(items, own, framing, pool)

        def work() -> dict[str, Any] | None:
            rows, images = next(reading)
            if not len(rows):
                return None
            found = _problems(items, rows, images, strict)
            blocks, has, states = embed(items, rows, images, framing.size)
            states = {name: tokens._asdict() for name, tokens in states.items()}
            return {"problems": found, "blocks": blocks, "has": has, "states": states}

        for chunk in chunks:
            made = sharding.gather(sharding.everywhere(work))
            yield chunk, [(_part(chunk, n), part) for n, part in enumerate(made) if part]

    def keep(rows: Sequence[int], made: dict[str, Any], put: Callable) -> None:
        if token_writer is not None:
            states = {name: TokenStates(**tokens) for name, tokens in made["states"].items()}
            token_writer.write(rows, states, made["has"])
        put(made["blocks"], made["has"])

    def rewrite(parts: list[tuple]) -> None:
        for rows, made in parts:
            keep(rows, made, functools.partial(writer.rewrite, rows))

    def refresh() -> None:
        if token_writer is not None:
            token_writer.sync()
        writer.refresh()

    def write(chunk: range, parts: list[tuple]) -> None:
        for rows, made in parts:
            for name, ids in made["problems"].items():
                problems[name] += ids
            keep(rows, made, functools.partial(writer.write, rows.start))
        if chunk.stop in ends:
            if token_writer is not None:
                token_writer.sync()
            writer.mark(problems)
            problems.update({name: [] for name in problems})
        if note is not None:
            note(chunk.stop, len(items))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        if stale and writer is not None:
            log_line(
                f"{writer.directory}: {len(stale):,} of {counted(len(items), 'items')} changed "
                "since the last embedding; embedding anew what changed"
            )
        for _, parts in embedded(_chunks(stale, size), pool):
            sharding.on_primary(functools.partial(rewrite, parts))
        if stale:
            sharding.on_primary(refresh)
        chunks = [chunk for rows in shards for chunk in _chunks(rows, size)]
        for chunk, parts in embedded(chunks, pool):
            sharding.on_primary(functools.partial(write, chunk, parts))


def related(
    embeddings: Embeddings,
    relation: str | None = None,
    *,
    item: str | None = None,
    text: str | None = None,
    image: pathlib.Path | str | None = None,
    model: Model | None = None,
    k: int = 10,
    against: str = "both",
) -> list[Match]:
    """The k items most related to an item, a text or an image's file under a relation sentence.

    As `Searcher.search`, which see; a `Searcher` keeps what several calls have in common.
    """
    found = Searcher(embeddings, model)
    return found.search(relation, item=item, text=text, image=image, k=k, against=against)


class Searcher:
    """Finds the items of a catalogue that are most related to a query, under any sentence.

    Sentences that the catalogue was embedded under need nothing but the embeddings. Any other one
    needs the model, and a catalogue that keeps its token states: these are pooled anew. The vectors
    of the last few sentences are kept.

    Raises UserError for a model that is not the catalogue's.
    """

    def __init__(self, embeddings: Embeddings, model: Model | None = None):
        if model is not None:
            check_model(embeddings, model)
        self.embeddings, self.model = embeddings, model
        self._pooled: collections.OrderedDict[str, dict] = collections.OrderedDict()
        self._last: tuple[str | None, Any] = None, None

    @functools.cached_property
    def tokens(self) -> Tokens:
        """The token states. Raises UserError where the catalogue keeps none."""
        return open_tokens(self.embeddings)

    def search(
        self,
        relation: str | None = None,
        *,
        item: str | None = None,
        text: str | None = None,
        image: pathlib.Path | str | np.ndarray | None = None,
        k: int = 10,
        against: str = "both",
        candidates: int = 0,
    ) -> list[Match]:
        """The k items most related to an item, a text or an image under a sentence, best first.

        relation: None: as what the items are. image: a file, or the pixels of one as the model has
        them. A text, an image and a new sentence need the model. A candidate's score is the mean of
        the cosines between what the query has and what the candidate has, both text and image or,
        with `against`, "text" or "image" alone. The item itself is left out; of equal scores the
        first in the catalogue comes first. The search is exact, unless `candidates` is given: then
        only so many items are pooled under a new sentence, those that are nearest under the known
        sentence that is most like it.

        Raises UserError for an item that the catalogue lacks, a sentence that is empty, too long or
        new to a catalogue without token states, an image that cannot be read, k below 1.
        """
        number = self.known(relation)
        names = check_question(k, against, item, text, image)
        if candidates and candidates < k:
            raise UserError(f"{candidates} candidates are too few for k={k}; give k at least")
        own = None if item is None else self.embeddings.number(item)
        if own is not None and not any(self.embeddings.has[name][own] for name in MODALITIES):
            raise UserError(f"the item {item!r} has no embedding: no text and no readable image")
        query = functools.partial(self._query, own=own, text=text, image=image)
        if number is None and candidates:
            assert relation is not None
            nearby = self.nearest_known(relation)
            index, _ = self._nearest(
                self._under(nearby), query(self._under(nearby), nearby), candidates, own, names
            )
            index = np.sort(index)  # of equal scores the first comes first
            rows = index if own is None else np.append(index, own)
            vectors = self._pool(relation, rows)
            last = None if own is None else len(index)
            asked = query({n: x[-1:] for n, x in vectors.items()}, relation, last=True)
            found, scores = self._nearest(vectors, asked, k, last, names, rows)
            index = rows[found]
        else:
            under = self.vectors(relation)
            asked = query(under, relation if number is None else number)
            index, scores = self._nearest(under, asked, k, own, names)
        if not len(index):
            raise UserError(
                f"{self.embeddings.directory} holds no other item with {' or '.join(names)}"
            )
        ids, texts = self.embeddings.items.ids, self.embeddings.items.texts
        return [
            Match(int(i), ids[i], texts[i], float(score))
            for i, score in zip(index, scores, strict=True)
        ]

    def known(self, relation: str | None) -> int | None:
        """The index of a sentence that the catalogue was embedded under; None: it is a new one.

        Raises UserError for an empty or very long sentence, and for a new one where the catalogue
        keeps no token states or no model is given.
        """
        if relation is not None:
            check_sentence(relation)
            if is_new(self.embeddings, relation) and self.embeddings.tokens is not None:
                if self.model is None:
                    raise UserError(f"the sentence {relation!r} is new and needs the model")
                return None
        return relation_number(self.embeddings, relation)

    def vectors(self, relation: str | None) -> dict[str, np.ndarray]:
        """The vectors (items, d) of each modality under any sentence; raises as `known`."""
        number = self.known(relation)
        if number is not None:
            return self._under(number)
        assert relation is not None
        key = _plain(relation)
        if key not in self._pooled:
            self._pooled[key] = self._pool(relation)
            while len(self._pooled) > _KEPT_SENTENCES:
                self._pooled.popitem(last=False)
        self._pooled.move_to_end(key)
        return self._pooled[key]

    def nearest_known(self, relation: str) -> int:
        """The index of the embedded sentence whose embedding has the largest cosine."""
        known, asked = self._known_states, np.asarray(self._state(relation))[0]
        return int(np.argmax(known @ asked / np.linalg.norm(known, axis=1)))

    def recall(self, relation: str, *, k: int = 10, candidates: int = 1000, queries: int = 20):
        """The share of the exact form's k items that the form with candidates finds.

        Returns its mean over queries, and their number: `queries` items at equal distances in the
        catalogue, or all where there are fewer.
        """
        has = np.any([self.embeddings.has[name] for name in MODALITIES], axis=0)
        items = np.flatnonzero(has)
        items = items[np.unique(np.linspace(0, len(items) - 1, queries).astype(int))]
        shares = []
        for i in items:
            key = self.embeddings.items.ids[i]
            exact = {m.index for m in self.search(relation, item=key, k=k)}
            few = self.search(relation, item=key, k=k, candidates=candidates)
            shares.append(len(exact & {m.index for m in few}) / len(exact))
        return float(np.mean(shares)), len(items)

    @functools.cached_property
    def _reader(self) -> TokenReader:
        assert self.model is not None
        return self.model.method.token_reader(self.model.params)

    @functools.cached_property
    def _known_states(self) -> np.ndarray:
        assert self.model is not None
        with self.model.running():
            return np.asarray(self._reader.relations(self.embeddings.relations))

    def _state(self, relation: str) -> jax.Array:
        """The embedding (1, d) of a sentence; that of the last one is kept."""
        if self._last[0] != relation:
            assert self.model is not None
            with self.model.running():
                self._last = relation, self._reader.relations([relation])
        return self._last[1]

    def _under(self, number: int) -> dict[str, np.ndarray]:
        return {name: self.embeddings.under(name, number) for name in MODALITIES}

    def _pool(self, relation: str, items: np.ndarray | None = None) -> dict[str, np.ndarray]:
        assert self.model is not None
        with self.model.running():
            folded: FoldedRelation = self._reader.fold(
                self._state(relation), jax.numpy.zeros(1, bool)
            )
            return pool_tokens(self.tokens, folded, items, device=self.model.device)

    def _query(
        self,
        under: dict[str, np.ndarray],
        relation: str | int | None,
        *,
        own: int | None,
        text: str | None,
        image: Any,
        last: bool = False,
    ) -> list[np.ndarray]:
        """The query's vectors; an item's are its rows in `under`, or the last rows there."""
        if own is not None:
            has = self.embeddings.has
            return [under[name][-1 if last else own] for name in MODALITIES if has[name][own]]
        if isinstance(relation, int):
            sentences = () if relation == 0 else (self.embeddings.relations[relation],)
        else:
            assert relation is not None
            sentences = (relation,)
        return list(embed_query(self.model, sentences, text, image).values())

    def _nearest(
        self,
        vectors: dict[str, np.ndarray],
        query: list[np.ndarray],
        k: int,
        own: int | None,
        names: Sequence[str],
        rows: np.ndarray | slice = slice(None),
    ) -> tuple[np.ndarray, np.ndarray]:
        has = {name: self.embeddings.has[name][rows] for name in names}
        return nearest({name: vectors[name] for name in names}, has, query, k, leave_out=own)


def is_new(embeddings: Embeddings, relation: str | None) -> bool:
    """Whether a catalogue was not embedded under a sentence."""
    return relation is not None and _plain(relation) not in map(_plain, embeddings.relations)


def check_sentence(sentence: str) -> None:
    """Raise UserError for a sentence that is empty, very long or no text."""
    if not argument_text(sentence).strip():
        raise UserError("the relation is empty; give a sentence, or none at all")
    if len(sentence) > _MOST_CHARACTERS:
        raise UserError(
            f"the relation has {len(sentence):,} characters; give a sentence of at most "
            f"{_MOST_CHARACTERS:,}"
        )


def check_question(k: int, against: str, *queries: Any) -> tuple[str, ...]:
    """The modalities to compare with. Raises UserError unless one query is given, and k above 0."""
    if not isinstance(k, int | np.integer):
        raise UserError(f"k is {k!r}; it must be a whole number")
    if k < 1:
        raise UserError(f"k is {k}; it must be at least 1")
    if against != "both" and against not in MODALITIES:
        raise UserError(f"against={against!r} is unknown; choose both, text or image")
    if sum(given is not None for given in queries) != 1:
        raise UserError("give one of an item, a text and an image")
    return MODALITIES if against == "both" else (against,)


def check_model(embeddings: Store, model: Model) -> None:
    """Raise UserError where another model embedded a store."""
    if model.about["digest"] != embeddings.model.get("digest"):
        raise UserError(
            f"{embeddings.directory} was embedded by another model ({embeddings.model['workdir']}, "
            f"step {embeddings.model['step']}) than {model.about['workdir']}; give that one as "
            "--workdir, or embed anew"
        )


def relation_number(embeddings: Store, sentence: str | None) -> int:
    """The index of a sentence among the embedded ones; None: the first, the intra-sample one.

    Raises UserError that names the sentences there are.
    """
    if sentence is None:
        return 0
    wanted = _plain(sentence)
    for number, known in enumerate(embeddings.relations):
        if _plain(known) == wanted:
            return number
    close = difflib.get_close_matches(sentence, embeddings.relations, 5, 0.0)
    rest = len(embeddings.relations) - len(close)
    tokens = " or with --tokens" if isinstance(embeddings, Embeddings) else ""
    raise UserError(
        f"{embeddings.directory} was not embedded under {sentence!r}; embed it anew with that "
        f"sentence{tokens}, or choose {either(close)}"
        + (f" or one of {rest} others" if rest else "")
    )


def _plain(sentence: str) -> str:
    return " ".join(sentence.split()).casefold()


def sentences_of(model: Model, relations: Sequence[str]) -> tuple[str, ...]:
    """The intra-sample sentence and the others, each once. Raises UserError for an empty one."""
    found = [model.method.task.sentence(-1)]
    for sentence in relations:
        sentence = " ".join(argument_text(sentence).split())
        if not sentence:
            raise UserError("a relation is empty; give a sentence, or none at all")
        if _plain(sentence) not in map(_plain, found):
            found.append(sentence)
    return tuple(found)


# Embedding

_Image = np.ndarray | str | None
_Chunk = TypeVar("_Chunk", bound=Sequence[int])


def _chunks(rows: _Chunk, size: int) -> list[_Chunk]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]  # type: ignore[misc]


def _part(chunk: _Chunk, process: int) -> _Chunk:
    """The items of a chunk that a process embeds: neighbours."""
    share = -(-len(chunk) // jax.process_count())
    start = share * process
    return chunk[start : start + share]  # type: ignore[return-value]


def _read_ahead(
    items: Items, chunks: Sequence[_Chunk], framing: Framing, pool: ThreadPoolExecutor
) -> Iterator[tuple[_Chunk, list[_Image]]]:
    """Each chunk with its images, while those of the next are read."""
    waiting = None
    for chunk in (*chunks, None):
        reading = (
            None
            if chunk is None
            else (chunk, [pool.submit(_image, items, i, framing) for i in chunk])
        )
        if waiting is not None:
            yield waiting[0], [future.result() for future in waiting[1]]
        waiting = reading


def _image(items: Items, index: int, framing: Framing) -> _Image:
    """The pixels of an item; None where it has no image, a reason where it cannot be read."""
    if not items.image_names[index]:
        return None
    try:
        return pixels(items.read(index), framing)
    except DECODE_ERRORS as error:
        return str(error) or type(error).__name__


def _problems(
    items: Items, rows: Sequence[int], images: Sequence[_Image], strict: bool
) -> dict[str, list[str]]:
    """Ids whose image cannot be read, and ids with neither text nor image."""
    unreadable = {i: p for i, p in zip(rows, images, strict=True) if isinstance(p, str)}
    empty = [
        i for i, image in zip(rows, images, strict=True) if image is None and not items.texts[i]
    ]
    if strict:
        for i, reason in unreadable.items():
            raise UserError(
                f"the image {items.image_names[i]} of item {items.ids[i]!r} cannot be read "
                f"({reason}); mend it, or leave strict off"
            )
        for i in empty:
            raise UserError(
                f"the item {items.ids[i]!r} has neither text nor image; give it one, or leave "
                "strict off"
            )
    return {
        "unreadable": [items.ids[i] for i in unreadable],
        "empty": [items.ids[i] for i in empty],
    }


def embed_chunk(
    embedder: Embedder, items: Items, rows: Sequence[int], images: Sequence[_Image], size: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """Vectors (relations, n, d) of a chunk, which of its items have them, and no token states."""
    inputs, has = _inputs(items, rows, images, size, embedder.devices)
    made: dict[str, Callable] = {"text": embedder.text, "image": embedder.image}
    blocks = {name: made[name](given) for name, given in inputs.items()}
    return _checked(blocks, has), has, {}


def _embed_tokens(
    reader: TokenReader,
    relations: jax.Array,
    items: Items,
    rows: Sequence[int],
    images: Sequence[_Image],
    size: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict]:
    """As `embed_chunk`, with the token states; relations: the first is the intra-sample one."""
    inputs, has = _inputs(items, rows, images, size, reader.devices)
    intra = jax.numpy.arange(len(relations)) == 0
    made: dict[str, Callable] = {"text": reader.text, "image": reader.image}
    states = {name: made[name](given) for name, given in inputs.items()}
    blocks = {
        name: np.swapaxes(reader.pool(found, relations, intra), 0, 1)
        for name, found in states.items()
    }
    return _checked(blocks, has), has, states


def _inputs(
    items: Items, rows: Sequence[int], images: Sequence[_Image], size: int, devices: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a chunk has of each modality, filled up to a few lengths, and (n,) which items have it.

    The lengths are multiples of the number of devices.

    A modality that no item has is left out.
    """
    n = len(rows)
    # Few shapes, so that little is compiled.
    padded = devices << (-(-n // devices) - 1).bit_length()
    texts = [items.texts[i] for i in rows]
    has = {
        "text": np.array([bool(text) for text in texts]),
        "image": np.array([isinstance(image, np.ndarray) for image in images]),
    }
    inputs: dict[str, Any] = {}
    if has["text"].any():
        inputs["text"] = texts + [""] * (padded - n)
    if has["image"].any():
        inputs["image"] = np.zeros((padded, size, size, 3), np.uint8)
        for row in np.flatnonzero(has["image"]).tolist():
            inputs["image"][row] = images[row]
    return inputs, has


def _checked(blocks: dict[str, Any], has: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The vectors of the items themselves. Raises UserError where they are not finite."""
    found = {}
    for name, block in blocks.items():
        found[name] = np.asarray(block, np.float32)[:, : len(has[name])]
        if not np.isfinite(found[name][:, has[name]]).all():
            raise UserError(
                f"the model's {name} embeddings are not finite; train it anew, or take another run"
            )
    return found


def _size(count: int) -> str:
    """A number of bytes, as a person reads it."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def embed_query(
    model: Model | None,
    sentences: Sequence[str],
    text: str | None,
    image: pathlib.Path | str | np.ndarray | None,
) -> dict[str, np.ndarray]:
    """The vector of a text or an image under the last sentence, or under none of them."""
    if model is None:
        raise UserError("a text or an image can be embedded with the catalogue's model only")
    with model.running():
        embedder = model.method.embedder(model.params, sentences)
        if text is not None:
            if not text.strip():
                raise UserError("the text is empty; give some words")
            return {"text": np.asarray(embedder.text([argument_text(text)])[-1, 0], np.float32)}
        assert image is not None  # `search` takes one of the two
        if not isinstance(image, np.ndarray):
            image = image_pixels(model, image)
        return {"image": np.asarray(embedder.image(image[None])[-1, 0], np.float32)}


def image_pixels(model: Model, image: pathlib.Path | str) -> np.ndarray:
    """An image's file as the model has it, (size, size, 3). Raises UserError."""
    try:
        return pixels(read_file(user_path(image)), model.method.task.images.framing)
    except DECODE_ERRORS as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the image {image} cannot be read ({reason}); check it") from error


def _digest(config: Any, workdir: pathlib.Path, params: Any, intra: str) -> str:
    """Changes with what embeds: the weights, the tokenizer, the model's options."""
    digest = hashlib.sha256()
    options = {"method": config.method, "model": config.model.to_dict(), "intra": intra}
    digest.update(json.dumps(options, sort_keys=True).encode())
    digest.update((workdir / "tokenizer.json").read_bytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
