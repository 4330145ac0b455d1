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

import jax.numpy as jnp
import numpy as np
from PIL import Image

from rcml_jax.data.images import DECODE_ERRORS
from rcml_jax.errors import UserError
from rcml_jax.search.catalogue import Match, Searcher, check_sentence, item_number
from rcml_jax.search.embedding_store import MODALITIES
from rcml_jax.search.items import pixels, thumbnail

#: Bytes of an uploaded image, characters of a typed text, results of a search.
MOST_BYTES, MOST_TEXT, MOST_RESULTS = 20 * 2**20, 2_000, 100
_HEAT = 224  # pixels of the side of an image that is shown with its attention


@dataclasses.dataclass(frozen=True)
class View:
    """What is asked: by an item, a text or an uploaded image's bytes, one of them.

    relation: the sentence, "" for what the items are; other: a second sentence to compare with, ""
    for none; against: both, text or image; candidates: as of `Searcher.search`.
    """

    item: str = ""
    text: str = ""
    image: bytes | None = None
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
        relation = view.other if other else view.relation
        if not 1 <= view.k <= MOST_RESULTS:
            raise UserError(f"{view.k} results cannot be shown; give 1 to {MOST_RESULTS}")
        with self._lock:
            return self.searcher.search(
                relation or None,
                **self._query(view),
                k=view.k,
                against=view.against,
                candidates=view.candidates,
            )

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
        model = self.searcher.model
        if model is None:
            return None
        with self._lock, model.running():
            try:
                reader = model.method.token_reader(model.params)
            except UserError:
                return None
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

    def warm_up(self) -> None:
        """Compile what a new sentence needs, so that the first one does not wait for it."""
        if self.any_sentence:
            has = next(i for i in range(len(self.searcher.embeddings.items)) if self._has_any(i))
            item = self.searcher.embeddings.items.ids[has]
            for words in (3, 9, 15):
                view = View(item=item, relation="they are " * (words // 3), k=1)
                self.search(view)
                self.attention(view)

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
            return {"image": self._pixels(view.image)}
        if view.item:
            return {"item": view.item}
        _check_text(view.text)
        return {"text": view.text}

    def _query_content(self, view: View) -> tuple[str, np.ndarray | None]:
        """The query's text and pixels, as far as it has them."""
        if view.image is not None:
            return "", self._pixels(view.image)
        if not view.item:
            _check_text(view.text)
            return view.text, None
        embeddings = self.searcher.embeddings
        index = item_number(embeddings, view.item)
        image = None
        if embeddings.has["image"][index]:
            try:
                image = self._pixels(self._read(index))
            except (*DECODE_ERRORS, UserError):  # it is gone since
                image = None
        return embeddings.items.texts[index], image

    def _pixels(self, encoded: bytes) -> np.ndarray:
        model = self.searcher.model
        if model is None:
            raise UserError("an image can be embedded with the catalogue's model only")
        if len(encoded) > MOST_BYTES:
            raise UserError(
                f"the image has {len(encoded) / 2**20:.0f} MiB; give one of at most "
                f"{MOST_BYTES // 2**20}"
            )
        try:
            return pixels(encoded, model.method.task.images.framing)
        except DECODE_ERRORS as error:
            raise UserError(f"the image cannot be read ({error}); give another one") from error

    def _under_all(self, view: View) -> list[np.ndarray]:
        """The query's vectors (1 + R, d) under all known sentences, one array a modality."""
        if view.item:
            index = item_number(self.searcher.embeddings, view.item)
            has = self.searcher.embeddings.has
            return [self._stored(name, index) for name in MODALITIES if has[name][index]]
        model, given = self.searcher.model, self._query(view)
        if model is None:
            raise UserError("a text or an image can be embedded with the catalogue's model only")
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


def _check_text(text: str) -> None:
    if not text.strip():
        raise UserError("nothing is asked; pick an item, upload an image or type a text")
    if len(text) > MOST_TEXT:
        raise UserError(f"the text has {len(text):,} characters; give at most {MOST_TEXT:,}")


def _heat(image: np.ndarray, weights: np.ndarray, pooled: int) -> tuple[bytes | None, float]:
    """A PNG of pixels (H, W, 3) with its patches' weights in red, and the pooled state's weight."""
    patches = np.delete(weights, pooled)
    side = math.isqrt(len(patches))
    if side**2 != len(patches):  # the tower's states are no square of patches
        return None, float(weights[pooled])
    # Half as red at an even share, and wholly at twice that.
    share = (patches / max(patches.sum(), 1e-12) * len(patches) / 2).clip(0, 1)
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
