"""What a page that explores a catalogue shows, apart from how it is drawn.

explorer = Explorer(Searcher(open_embeddings("embeddings"), open_model("runs/rcml")), read)
view = View(item="1F493", relation="both of them are red")
explorer.search(view)
explorer.attention(view)
"""

import dataclasses
import functools
import io
import math
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from rcml_jax.data.images import DECODE_ERRORS
from rcml_jax.errors import UserError
from rcml_jax.evaluation.top_k import nearest_of_each
from rcml_jax.methods.relational import TokenReader
from rcml_jax.search.catalogue import (
    Match,
    Model,
    Searcher,
    check_sentence,
    is_new,
    relation_number,
)
from rcml_jax.search.embedding_store import MODALITIES
from rcml_jax.search.items import pixels, thumbnail

#: Bytes of an uploaded image, characters of a typed text, results of a search.
MOST_BYTES, MOST_TEXT, MOST_RESULTS = 20 * 2**20, 2_000, 100
#: Numbers of texts or images that are embedded at once, the smallest that holds what was asked:
#: each is compiled, once.
SIZES = (1, 8, 32)
_HEAT = 224  # pixels of the side of an image that is shown with its attention


@dataclasses.dataclass(frozen=True)
class View:
    """What is asked: by an item, a text or an uploaded image, one of them.

    image: the bytes of its file, or its pixels as `Explorer.pixels` gives them.
    relation: the sentence, "" for what the items are; other: a second sentence to compare with, ""
    for none; against: both, text or image; candidates: as of `Searcher.search`.
    """

    item: str = ""
    text: str = ""
    image: bytes | np.ndarray | None = None
    relation: str = ""
    other: str = ""
    k: int = 12
    against: str = "both"
    candidates: int = 0

    def link(self) -> str:
        """A query string that `from_link` reads back; "" for an uploaded image, which has none."""
        if self.image is not None:
            return ""
        default, values = View(), dataclasses.asdict(self)
        kept = {n: v for n, v in values.items() if v != getattr(default, n)}
        return "?" + urllib.parse.urlencode(kept)

    @classmethod
    def from_link(cls, values: Mapping[str, str]) -> "View":
        """The view of a query string's values; unknown names are passed over.

        Raises UserError for a number that is none.
        """
        found: dict = {
            n: values[n] for n in ("item", "text", "relation", "other", "against") if n in values
        }
        for name in ("k", "candidates"):
            if name in values:
                try:
                    found[name] = int(values[name])
                except ValueError:
                    raise UserError(
                        f"{name}={values[name][:20]!r} in the link is no number"
                    ) from None
        return cls(**found)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Where the pooling head looks in a query, the weights of each modality adding up to 1.

    words: each token of the text and its weight; image: a PNG of the image with the patches that
    get more than an even share in red, None where there is none; pooled: the weight of the image's
    state that is no patch.
    """

    words: tuple[tuple[str, float], ...]
    image: bytes | None
    pooled: float


class Explorer:
    """Answers what a page asks; one question at a time, from any thread.

    read: an index → the bytes of that item's image, or an error of `DECODE_ERRORS`.
    """

    def __init__(self, searcher: Searcher, read: Callable[[int], bytes]):
        self.searcher, self._read = searcher, read
        self._lock = threading.Lock()
        self.thumbnail = functools.lru_cache(2048)(self._thumbnail)

    @property
    def relations(self) -> tuple[str, ...]:
        """The sentences that the catalogue was embedded under, without the intra-sample one."""
        return self.searcher.embeddings.relations[1:]

    @property
    def any_sentence(self) -> bool:
        """Whether sentences can be asked that the catalogue was not embedded under."""
        return self.searcher.embeddings.tokens is not None and self.searcher.model is not None

    def items(self, words: str = "", most: int = 48) -> list[int]:
        """The first items whose id and text have every one of some words."""
        wanted = words[:MOST_TEXT].casefold().split()
        items, found = self.searcher.embeddings.items, []
        for index, (key, text) in enumerate(zip(items.ids, items.texts, strict=True)):
            said = f"{key} {text}".casefold()
            if all(word in said for word in wanted):
                found.append(index)
                if len(found) == most:
                    break
        return found

    def search(self, view: View, *, other: bool = False) -> list[Match]:
        """The items most related to the query under the first or the other sentence.

        Raises UserError for a query or sentence that cannot be.
        """
        with self._lock:
            return self._search(dataclasses.replace(view, relation=view.other) if other else view)

    def check(self, view: View) -> None:
        """Raise UserError for a text, a sentence or a number that no catalogue could be asked."""
        if not 1 <= view.k <= MOST_RESULTS:
            raise UserError(f"{view.k} results cannot be shown; give 1 to {MOST_RESULTS}")
        if view.against not in ("both", *MODALITIES):
            raise UserError(f"against={view.against!r:.40} is unknown; choose both, text or image")
        if view.image is None and not view.item:
            _checked_text(view.text)
        if view.relation:
            check_sentence(view.relation)

    def search_many(self, views: Sequence[View]) -> list[list[Match]]:
        """As `search` of each view, embedded and ranked together.

        Raises UserError where one of them cannot be asked.
        """
        found: list[list[Match]] = [[] for _ in views]
        groups: dict[tuple[str, str], list[int]] = {}
        with self._lock:
            for place, view in enumerate(views):
                self.check(view)
                if self.searcher.known(view.relation or None) is None and view.candidates:
                    found[place] = self._search(view)
                else:
                    groups.setdefault((self._sentence(view), view.against), []).append(place)
            given = [p for p, view in enumerate(views) if view.image is not None or not view.item]
            vectors = dict(zip(given, self._embed([views[p] for p in given]), strict=True))
            for (sentence, against), places in groups.items():
                names = MODALITIES if against == "both" else (against,)
                ranked = self._rank(sentence, names, {p: views[p] for p in places}, vectors)
                for place, matches in zip(places, ranked, strict=True):
                    # Nothing at all: the search of one says why.
                    found[place] = matches[: views[place].k] or self._search(views[place])
        return found

    def embed(self, views: Sequence[View]) -> np.ndarray:
        """Unit vectors (n, d) of texts and images, each under its first sentence, whichever it is.

        Raises UserError as `search`, and without the model.
        """
        with self._lock:
            return np.stack(self._embed(views))

    def common(self, view: View, index: int, most: int = 10) -> list[tuple[str, float]]:
        """The known sentences under which the query and an item score highest, best first."""
        embeddings = self.searcher.embeddings
        with self._lock:
            query = self._under_all(view)
        names = [name for name in MODALITIES if embeddings.has[name][index]]
        theirs = [self._stored(name, index) for name in names]
        pairs = [np.sum(a * b, axis=1) for a in query for b in theirs]
        scores = np.mean(pairs, axis=0)[1:]
        order = np.argsort(-scores, kind="stable")[:most]
        return [(self.relations[r], float(scores[r])) for r in order]

    def attention(self, view: View, *, other: bool = False) -> Attention | None:
        """Where the head looks in the query; None for a method without it, or without the model."""
        model, reader = self.searcher.model, self._reader
        if model is None or reader is None:
            return None
        with self._lock, model.running():
            sentence = (view.other if other else view.relation) or self._intra
            check_sentence(sentence)
            relation = reader.relations([sentence])
            intra = jnp.array([sentence == self._intra])
            text, image = self._query_content(view)
            words: tuple[tuple[str, float], ...] = ()
            drawn, pooled = None, 0.0
            if text:
                states = reader.text([text])
                weights = np.asarray(reader.attention(states, relation, intra))[0, 0]
                words = self._words(text, weights[np.asarray(states.mask[0])])
            if image is not None:
                states = reader.image(image[None])
                weights = np.asarray(reader.attention(states, relation, intra))[0, 0]
                drawn, pooled = _heat(image, weights, int(states.pooled_index[0]))
            return Attention(words, drawn, pooled)

    def pixels(self, image: bytes | np.ndarray) -> np.ndarray:
        """An image's file as the model has it, (size, size, 3); pixels are returned as they are.

        Raises UserError for what is too large or no image, and without the model.
        """
        if isinstance(image, np.ndarray):
            return image
        model = self._needed_model()
        if len(image) > MOST_BYTES:
            raise UserError(
                f"the image has {len(image) / 2**20:.0f} MiB; give one of at most "
                f"{MOST_BYTES // 2**20}"
            )
        try:
            return pixels(image, model.method.task.images.framing)
        except DECODE_ERRORS as error:
            raise UserError(f"the image cannot be read ({error}); give another one") from error

    def warm_up(self) -> None:
        """Compile what a new sentence needs, so that the first one does not wait for it."""
        if self.any_sentence:
            has = next(i for i in range(len(self.searcher.embeddings.items)) if self._has_any(i))
            item = self.searcher.embeddings.items.ids[has]
            for words in (3, 9, 15):
                view = View(item=item, relation="they are " * (words // 3), k=1)
                self.search(view)
                self.attention(view)

    def _needed_model(self) -> Model:
        if self.searcher.model is None:
            raise UserError("a text or an image can be embedded with the catalogue's model only")
        return self.searcher.model

    @functools.cached_property
    def _reader(self) -> TokenReader | None:
        """None for a method that pools no tokens, and without the model."""
        model = self.searcher.model
        if model is None:
            return None
        with model.running():
            try:
                return model.method.token_reader(model.params)
            except UserError:
                return None

    def _search(self, view: View) -> list[Match]:
        self.check(view)
        return self.searcher.search(
            view.relation or None,
            **self._query(view),
            k=view.k,
            against=view.against,
            candidates=view.candidates,
        )

    def _rank(
        self,
        sentence: str,
        names: Sequence[str],
        views: Mapping[int, View],
        vectors: Mapping[int, np.ndarray],
    ) -> list[list[Match]]:
        """The matches of views under one sentence; vectors: of those that ask with no item."""
        embeddings, under = self.searcher.embeddings, self.searcher.vectors(sentence)
        queries, own = [], []
        for place, view in views.items():
            number = None if place in vectors else embeddings.number(view.item)
            own.append(number)
            if number is None:
                queries.append([vectors[place]])
            else:
                has = [name for name in MODALITIES if embeddings.has[name][number]]
                queries.append([under[name][number] for name in has])
        found: list[list[Match]] = [[] for _ in queries]
        able = [n for n, query in enumerate(queries) if query]
        if able:
            ranked = nearest_of_each(
                {name: under[name] for name in names},
                {name: embeddings.has[name] for name in names},
                [queries[n] for n in able],
                max(view.k for view in views.values()),
                leave_out=[own[n] for n in able],
            )
            ids, texts = embeddings.items.ids, embeddings.items.texts
            for n, (index, scores) in zip(able, ranked, strict=True):
                pairs = zip(index.tolist(), scores.tolist(), strict=True)
                found[n] = [Match(i, ids[i], texts[i], score) for i, score in pairs]
        return found

    def _sentence(self, view: View) -> str:
        """The first sentence of a view, as the catalogue spells it where it knows it."""
        if not view.relation:
            return self._intra
        check_sentence(view.relation)
        embeddings = self.searcher.embeddings
        if is_new(embeddings, view.relation):
            return view.relation
        return embeddings.relations[relation_number(embeddings, view.relation)]

    def _embed(self, views: Sequence[View]) -> list[np.ndarray]:
        """The vectors (d,) of texts and images, each under its own sentence."""
        found: dict[int, np.ndarray] = {}
        groups: dict[tuple[bool, str], list[int]] = {}
        for place, view in enumerate(views):
            # Without token states, what a sentence makes of a text is known for one at a time.
            apart = "" if self._reader is not None else self._sentence(view)
            groups.setdefault((view.image is not None, apart), []).append(place)
        for (images, _), places in groups.items():
            for start in range(0, len(places), SIZES[-1]):
                part = places[start : start + SIZES[-1]]
                vectors = self._embed_alike([views[p] for p in part], images)
                found |= dict(zip(part, vectors, strict=True))
        return [found[place] for place in range(len(views))]

    def _embed_alike(self, views: Sequence[View], images: bool) -> np.ndarray:
        """Vectors (n, d) of at most the largest of `SIZES`, all texts or all images."""
        model, reader, n = self._needed_model(), self._reader, len(views)
        views = [*views, *[views[0]] * (next(s for s in SIZES if s >= n) - n)]
        given: list = [
            _checked_text(x.text) if x.image is None else self.pixels(x.image) for x in views
        ]
        content: Any = np.stack(given) if images else given
        sentences = [self._sentence(view) for view in views]
        with model.running():
            if reader is None:
                known = [] if sentences[0] == self._intra else sentences[:1]
                embedder = model.method.embedder(model.params, known)
                found = (embedder.image if images else embedder.text)(content)[-1]
            else:
                states = (reader.image if images else reader.text)(content)
                intra = jnp.array([sentence == self._intra for sentence in sentences])
                # All under all sentences, which costs little beside the towers.
                pooled = reader.pool(states, reader.relations(sentences), intra)
                found = np.asarray(pooled)[np.arange(len(views)), np.arange(len(views))]
        return np.asarray(found, np.float32)[:n]

    @property
    def _intra(self) -> str:
        return self.searcher.embeddings.relations[0]

    def _has_any(self, index: int) -> bool:
        return any(self.searcher.embeddings.has[name][index] for name in MODALITIES)

    def _stored(self, name: str, index: int) -> np.ndarray:
        """The vectors (1 + R, d) of an item under all known sentences."""
        embeddings = self.searcher.embeddings
        vectors = embeddings.vectors[name][:, index].astype(np.float32)
        return np.broadcast_to(vectors, (len(embeddings.relations), vectors.shape[-1]))

    def _query(self, view: View) -> dict:
        """The query as `Searcher.search` takes it."""
        if view.image is not None:
            return {"image": self.pixels(view.image)}
        if view.item:
            return {"item": view.item}
        return {"text": _checked_text(view.text)}

    def _query_content(self, view: View) -> tuple[str, np.ndarray | None]:
        """The query's text and pixels, as far as it has them."""
        if view.image is not None:
            return "", self.pixels(view.image)
        if not view.item:
            return _checked_text(view.text), None
        embeddings = self.searcher.embeddings
        index = embeddings.number(view.item)
        image = None
        if embeddings.has["image"][index]:
            try:
                image = self.pixels(self._read(index))
            except (*DECODE_ERRORS, UserError):  # it is gone since
                image = None
        return embeddings.items.texts[index], image

    def _under_all(self, view: View) -> list[np.ndarray]:
        """The query's vectors (1 + R, d) under all known sentences, one array a modality."""
        if view.item:
            index = self.searcher.embeddings.number(view.item)
            has = self.searcher.embeddings.has
            return [self._stored(name, index) for name in MODALITIES if has[name][index]]
        model, given = self._needed_model(), self._query(view)
        with model.running():
            embedder = model.method.embedder(model.params, self.relations)
            if "text" in given:
                found = embedder.text([given["text"]])
            else:
                found = embedder.image(given["image"][None])
        vectors = np.asarray(found, np.float32)[:, 0]
        return [np.broadcast_to(vectors, (1 + len(self.relations), vectors.shape[-1]))]

    def _words(self, text: str, weights: np.ndarray) -> tuple[tuple[str, float], ...]:
        """The tokens of a text with the weights of its states."""
        assert self.searcher.model is not None
        tokenizer = self.searcher.model.method.task.tokenizer
        ids = self.searcher.model.method.task.encode([text])[0]
        extra = len(weights) - min(len(weights), len(ids))  # a pooled state before the tokens
        names = {tokenizer.start_id: "[start]", tokenizer.end_id: "[end]"}
        said = ["[all]"] * extra
        said += [names.get(int(i)) or tokenizer.decode([int(i)]) or "·" for i in ids]
        return tuple(zip(said[: len(weights)], map(float, weights), strict=True))

    def _thumbnail(self, index: int) -> bytes | None:
        """A small JPEG of an item's image; None where it has none that can be read."""
        if not self.searcher.embeddings.items.image_names[index]:
            return None
        try:
            return thumbnail(self._read(index))
        except DECODE_ERRORS:
            return None


def _checked_text(text: str) -> str:
    if not text.strip():
        raise UserError("nothing is asked; pick an item, upload an image or type a text")
    if len(text) > MOST_TEXT:
        raise UserError(f"the text has {len(text):,} characters; give at most {MOST_TEXT:,}")
    return text


def _heat(image: np.ndarray, weights: np.ndarray, pooled: int) -> tuple[bytes | None, float]:
    """A PNG of pixels (H, W, 3) with its patches' weights in red, and the pooled state's weight."""
    patches = np.delete(weights, pooled)
    side = math.isqrt(len(patches))
    if side**2 != len(patches):  # the tower's states are no square of patches
        return None, float(weights[pooled])
    # Not red at all up to an even share, and wholly at twice that.
    share = (patches / max(patches.sum(), 1e-12) * len(patches) - 1).clip(0, 1)
    mask = Image.fromarray((share.reshape(side, side) * 200).astype(np.uint8))
    size = (_HEAT, _HEAT)
    base = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    red = Image.new("RGB", size, (220, 30, 30))
    out = io.BytesIO()
    Image.composite(red, base, mask.resize(size, Image.Resampling.NEAREST)).save(out, "PNG")
    return out.getvalue(), float(weights[pooled])


def labels(matches: Sequence[Match]) -> list[str]:
    """A name for each result: its number, text and id."""
    return [f"{n}. {match.text[:60]} ({match.id})" for n, match in enumerate(matches, 1)]
