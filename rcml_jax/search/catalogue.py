"""Embedding a catalogue under relation sentences, and the items of it most related to one.

model = open_model("runs/rcml")
items = read_items("my_catalogue")
embeddings = embed_catalogue(model, items, ["both of them show a heart"], "embeddings")
related(embeddings, "both of them show a heart", item="beating heart", k=10)
"""

import contextlib
import dataclasses
import difflib
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

from rcml_jax.data.gates import argument_text, read_file, user_path
from rcml_jax.data.images import DECODE_ERRORS, Framing
from rcml_jax.data.log import counted, log_line
from rcml_jax.errors import UserError
from rcml_jax.evaluation.top_k import nearest
from rcml_jax.methods import EMBEDDINGS, RELATIONAL, build, family_of
from rcml_jax.methods.relational import Embedder, RelationalMethod
from rcml_jax.search.embedding_store import (
    MODALITIES,
    Embeddings,
    Plan,
    Writer,
    hold_store,
    open_embeddings,
)
from rcml_jax.search.items import Items, pixels
from rcml_jax.training import sharding
from rcml_jax.training.checkpoint import Checkpoints, read_params
from rcml_jax.training.workdir import load_config

_CHUNK = 256
_SEARCHED_IDS = 20_000


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained relational method. about: "workdir", "method", "step" and the weights' "digest"."""

    method: RelationalMethod
    params: Any
    about: dict[str, Any]
    device: jax.Device

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

    Raises UserError where nothing was trained, or no relational method.
    """
    workdir = user_path(workdir)
    config = load_config(workdir) if config is None else config
    if config.method == EMBEDDINGS or family_of(config.method) != "relational":
        raise UserError(
            f"{workdir} holds the method {config.method!r}, which embeds nothing under relations; "
            f"give a run of {', '.join(RELATIONAL)}"
        )
    device = sharding.first_local(sharding.pick_devices(config.platform))
    params = read_params(workdir)
    with sharding.working_on(device):
        method: Any = build(config, workdir)
        about = {
            "workdir": str(workdir.resolve()),
            "method": config.method,
            "step": _best_step(workdir),
            "digest": _digest(config, workdir, params, method.task.sentence(-1)),
        }
        return Model(method, jax.tree.map(jax.numpy.asarray, params), about, device)


def embed_catalogue(
    model: Model,
    items: Items,
    relations: Sequence[str],
    to: pathlib.Path | str,
    *,
    dtype: str = "float32",
    shard: int = 1024,
    strict: bool = False,
    note: Callable[[int, int], None] | None = None,
) -> Embeddings:
    """Embed items as what they are and under relation sentences into a directory, or go on there.

    dtype: float32 or float16, of what is stored; shard: items between two marks from which an
    interrupted call is resumed; note: is told the number of items that are done and of all. Items
    may lack their text or their image. An image that is missing or damaged is left out and
    counted ("unreadable"); what then has neither text nor image is counted too ("empty"); both
    are errors with `strict`. Items whose text or image has changed since an earlier call are
    embedded anew, and one line on standard error counts them. The layout is that of
    `rcml_jax.search.embedding_store`.

    Raises UserError for an empty sentence and where the directory holds anything else.
    """
    sentences = _sentences(model.method.task.sentence(-1), relations)
    framing = model.method.task.images.framing
    with model.running(), hold_store(to):
        embedder = model.method.embedder(model.params, sentences[1:])
        plan = Plan(model.about, items, sentences, embedder.shapes, dtype, shard)
        writer = Writer(to, plan)
        chunks = [
            range(start, min(start + _CHUNK, rows.stop))
            for rows in writer.shards()
            for start in range(rows.start, rows.stop, _CHUNK)
        ]
        problems: dict[str, list[str]] = {"unreadable": [], "empty": []}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            stale = writer.stale
            if stale:
                log_line(
                    f"{to}: {len(stale):,} of {counted(len(items), 'items')} changed since the "
                    "last embedding; embedding anew what changed"
                )
            parts = [stale[start : start + _CHUNK] for start in range(0, len(stale), _CHUNK)]
            for part, images in _read_ahead(items, parts, framing, pool):
                _problems(items, part, images, strict)
                writer.rewrite(part, *_embed(embedder, items, part, images, framing.size))
            if stale:
                writer.refresh()
            for rows, images in _read_ahead(items, chunks, framing, pool):
                for name, ids in _problems(items, rows, images, strict).items():
                    problems[name] += ids
                writer.write(rows.start, *_embed(embedder, items, rows, images, framing.size))
                if rows.stop % writer.shard == 0 or rows.stop == len(items):
                    writer.mark(problems)
                    problems = {name: [] for name in problems}
                if note is not None:
                    note(rows.stop, len(items))
    return open_embeddings(to)


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

    relation: one that the catalogue was embedded under; None: as what the items are. A text and a
    image need the model. A candidate's score is the mean of the cosines between what the query
    has and what the candidate has, both text and image or, with `against`, "text" or "image"
    alone. The item itself is left out; of equal scores the first in the catalogue comes first. The
    search is exact and holds a block of the catalogue at a time.

    Raises UserError for a sentence or an item that the catalogue lacks, an image that cannot be
    read, another model than the catalogue's, k below 1.
    """
    number = relation_number(embeddings, relation)
    if k < 1:
        raise UserError(f"k is {k}; it must be at least 1")
    if against != "both" and against not in MODALITIES:
        raise UserError(f"against={against!r} is unknown; choose both, text or image")
    if sum(given is not None for given in (item, text, image)) != 1:
        raise UserError("give one of an item, a text and an image")
    own = None
    if item is not None:
        own = item_number(embeddings, item)
        query = {
            name: embeddings.under(name, number)[own]
            for name in MODALITIES
            if embeddings.has[name][own]
        }
        if not query:
            raise UserError(f"the item {item!r} has no embedding: no text and no readable image")
    else:
        query = _embed_query(embeddings, model, number, text, image)
    names = MODALITIES if against == "both" else (against,)
    vectors = {name: embeddings.under(name, number) for name in names}
    index, scores = nearest(vectors, embeddings.has, list(query.values()), k, leave_out=own)
    if not len(index):
        raise UserError(f"{embeddings.directory} holds no other item with {' or '.join(names)}")
    ids, texts = embeddings.items.ids, embeddings.items.texts
    return [
        Match(int(i), ids[i], texts[i], float(score))
        for i, score in zip(index, scores, strict=True)
    ]


def item_number(embeddings: Embeddings, key: str) -> int:
    """The index of an item in the catalogue. Raises UserError, with ids that are like it."""
    ids = embeddings.items.ids
    try:
        return ids.index(key)
    except ValueError:
        like = ids if len(ids) <= _SEARCHED_IDS else [x for x in ids if x[:1] == key[:1]]
        close = difflib.get_close_matches(key, like[:_SEARCHED_IDS], 3, 0.5)
        hint = f"; did you mean {_quoted(close)}?" if close else "; see its items.jsonl"
        raise UserError(f"{embeddings.directory} has no item {key!r}{hint}") from None


def relation_number(embeddings: Embeddings, sentence: str | None) -> int:
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
    raise UserError(
        f"{embeddings.directory} was not embedded under {sentence!r}; embed it anew with that "
        f"sentence, or choose {_quoted(close)}" + (f" or one of {rest} others" if rest else "")
    )


def _plain(sentence: str) -> str:
    return " ".join(sentence.split()).casefold()


def _quoted(names: Sequence[str]) -> str:
    return " or ".join(repr(name) for name in names)


def _sentences(intra: str, relations: Sequence[str]) -> tuple[str, ...]:
    """The intra-sample sentence and the others, each once."""
    found = [intra]
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


def _embed(
    embedder: Embedder, items: Items, rows: Sequence[int], images: Sequence[_Image], size: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Vectors (relations, n, d) of a chunk, and which of its items have them."""
    n = len(rows)
    padded = 1 << (n - 1).bit_length()  # few shapes, so that little is compiled
    texts = [items.texts[i] for i in rows] + [""] * (padded - n)
    has = {
        "text": np.array([bool(text) for text in texts[:n]]),
        "image": np.array([isinstance(image, np.ndarray) for image in images]),
    }
    blocks = {}
    if has["text"].any():
        blocks["text"] = embedder.text(texts)
    if has["image"].any():
        batch = np.zeros((padded, size, size, 3), np.uint8)
        for row in np.flatnonzero(has["image"]).tolist():
            batch[row] = images[row]
        blocks["image"] = embedder.image(batch)
    blocks = {name: np.asarray(block, np.float32)[:, :n] for name, block in blocks.items()}
    for name, block in blocks.items():
        if not np.isfinite(block[:, has[name]]).all():
            raise UserError(
                f"the model's {name} embeddings are not finite; train it anew, or take another run"
            )
    return blocks, has


def _embed_query(
    embeddings: Embeddings,
    model: Model | None,
    relation: int,
    text: str | None,
    image: pathlib.Path | str | None,
) -> dict[str, np.ndarray]:
    """The vector of a text or of an image's file under a relation."""
    if model is None:
        raise UserError("a text or an image can be embedded with the catalogue's model only")
    if model.about["digest"] != embeddings.model.get("digest"):
        raise UserError(
            f"{embeddings.directory} was embedded by another model ({embeddings.model['workdir']}, "
            f"step {embeddings.model['step']}) than {model.about['workdir']}; give that one as "
            "--workdir, or embed anew"
        )
    with model.running():
        embedder = model.method.embedder(
            model.params, () if relation == 0 else (embeddings.relations[relation],)
        )
        if text is not None:
            if not text.strip():
                raise UserError("the text is empty; give some words")
            return {"text": np.asarray(embedder.text([argument_text(text)])[-1, 0], np.float32)}
        assert image is not None  # `related` takes one of the two
        try:
            batch = pixels(read_file(user_path(image)), model.method.task.images.framing)
        except DECODE_ERRORS as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"the image {image} cannot be read ({reason}); check it") from error
        return {"image": np.asarray(embedder.image(batch[None])[-1, 0], np.float32)}


def _best_step(workdir: pathlib.Path) -> int | None:
    checkpoints = Checkpoints(workdir)
    try:
        return checkpoints.best()
    finally:
        checkpoints.close()


def _digest(config: Any, workdir: pathlib.Path, params: Any, intra: str) -> str:
    """Changes with what embeds: the weights, the tokenizer, the model's options."""
    digest = hashlib.sha256()
    options = {"method": config.method, "model": config.model.to_dict(), "intra": intra}
    digest.update(json.dumps(options, sort_keys=True).encode())
    digest.update((workdir / "tokenizer.json").read_bytes())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()
