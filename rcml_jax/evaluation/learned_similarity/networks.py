"""The networks of `evaluation.learned_similarity`: parameters, scores and losses.

Images are x (n, d) and texts y (m, d′), prepared by `maps.prepared`. Functions take the learner's
name, one of `LEARNERS`, and its parameters, a dict of arrays.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rcml_jax.errors import UserError
from rcml_jax.evaluation import CLOSED, LEARNERS, MLPS, TWO_TOWERS
from rcml_jax.evaluation.learned_similarity.maps import gaussian_kernel, prepared, relative
from rcml_jax.losses.siglip import sigmoid
from rcml_jax.losses.softmax import softmax_contrastive
from rcml_jax.ops.dropout import LEVELS, keep_units
from rcml_jax.ops.similarity import l2_normalize

#: Those whose score is the dot product of an embedding of each side.
EMBEDDING = ("bilinear", *TWO_TOWERS, *CLOSED)
#: Numbers that pair scores may hold at once, beyond the scores themselves: what a cache holds.
PAIR_NUMBERS = 2**20


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the learners; each learner uses those that apply to it.

    width: of hidden layers, of the two-tower embedding, of a token; for cca the number of variates,
    cut to the narrower width. depth: hidden layers (unless given 0 for two_tower and
    two_tower_sigmoid, 1 for two_tower_mlp). dropout: of the inputs of every layer. steps: at most;
    validated every `validate_every` and stopped after `patience` validations without a better one.
    validation_rows: texts that a validation takes at most, drawn by the seed, with their images
    alone. temperature: where that of a cosine starts.
    shrinkage: of the covariances of cca and kernel_cca, as in `maps.cca`. landmarks, bandwidth: of
    kernel_cca, as in `maps.kernel_features`; landmarks also bounds the points of optimal_transport.
    kept (0: all), power: of relative, as in `maps.relative`.
    """

    width: int = 256
    depth: int = 2
    dropout: float = 0.0
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 128
    steps: int = 5000
    validate_every: int = 100
    patience: int = 10
    validation_rows: int = 1000
    negatives: int = 4
    tokens: int = 4
    temperature: float = 0.07
    shrinkage: float = 0.01
    landmarks: int = 1000
    bandwidth: float = 1.0
    kept: int = 0
    power: float = 1.0


def read_options(name: str, options: Mapping[str, Any] | None) -> Options:
    """The options of a learner. Raises UserError for unknown names and invalid values."""
    if name not in LEARNERS:
        raise UserError(f"learner {name!r} is unknown; choose one of {', '.join(LEARNERS)}")
    known = {field.name: field.type for field in dataclasses.fields(Options)}
    given = dict(options or {})
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UserError(f"option {unknown[0]!r} is unknown; choose among {', '.join(known)}")
    for key, value in given.items():
        kinds = int if known[key] is int else (int, float)
        endless = isinstance(value, float) and not math.isfinite(value)
        if isinstance(value, bool) or not isinstance(value, kinds) or endless:
            raise UserError(f"{key}={value!r} must be a {'whole ' * (kinds is int)}number")
    if name in TWO_TOWERS:
        given = {"depth": int(name == "two_tower_mlp")} | given
    settings = Options(**given)
    least = dict.fromkeys(
        ("width", "steps", "validate_every", "patience", "negatives", "tokens", "landmarks"), 1
    ) | {"kept": 0, "batch_size": 2, "validation_rows": 2}
    least["depth"] = int(name in (*MLPS, "two_tower_mlp"))
    for key, bound in least.items():
        if not getattr(settings, key) >= bound:
            raise UserError(f"{key}={getattr(settings, key)} must be at least {bound}")
    for key in ("learning_rate", "temperature", "bandwidth", "power"):
        if not getattr(settings, key) > 0:
            raise UserError(f"{key}={getattr(settings, key)} must be above 0")
    if not 0 <= settings.dropout < 1:
        raise UserError(f"dropout={settings.dropout} must be at least 0 and below 1")
    if not 0 <= settings.shrinkage <= 1:
        raise UserError(f"shrinkage={settings.shrinkage} must be from 0 to 1")
    if not settings.weight_decay >= 0:
        raise UserError(f"weight_decay={settings.weight_decay} must not be negative")
    return settings


def unit(preparation: dict, x: jax.Array) -> jax.Array:
    """Undo `prepared`: the rows of length one."""
    return x * preparation["scale"] + preparation["mean"]


def initial(
    name: str, key: jax.Array, width_image: int, width_text: int, options: Options
) -> dict[str, Any]:
    """Parameters of a network before its training."""
    first, second, third, fourth = jax.random.split(key, 4)
    hidden = [options.width] * options.depth
    if name in MLPS:
        return {"layers": _layers(first, [width_image + width_text, *hidden, 1])}
    if name == "bilinear":
        return {"w": jnp.zeros((width_image, width_text))}
    log_scale = jnp.asarray(-math.log(options.temperature), jnp.float32)
    if name in TWO_TOWERS:
        image = _layers(first, [width_image, *hidden, options.width])
        text = _layers(second, [width_text, *hidden, options.width])
        params = {"image": image, "text": text, "log_scale": log_scale}
        # As SigLIP starts: nearly all pairs of a batch are negatives.
        return params | ({"bias": jnp.float32(-10)} if name == "two_tower_sigmoid" else {})
    draw = jax.nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
    tokens = (options.tokens, options.width)
    return {
        "key": draw(first, (width_image, *tokens)),
        "value": draw(second, (width_image, *tokens)),
        "query": draw(third, (width_text, *tokens)),
        "text": draw(fourth, (width_text, *tokens)),
        "log_scale": log_scale,
    }


def _layers(key, widths):
    draw = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"w": draw(k, (rows, columns)), "b": jnp.zeros(columns)}
        for k, rows, columns in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def _dropout(key, rate):
    """A function that drops entries, by a new key each time that it is called."""
    calls = itertools.count()

    def drop(x):
        if isinstance(rate, float) and not rate:
            return x
        kept = jnp.round((1 - rate) * LEVELS).astype(jnp.uint32)
        return keep_units(jax.random.fold_in(key, next(calls)), x, kept)

    return drop


def _keep(x):
    return x


def matrix(name: str, params: Any, x: jax.Array, y: jax.Array, drop: Callable = _keep) -> jax.Array:
    """Scores (n, m) of prepared rows, all pairs at once."""
    if name in EMBEDDING:
        x, y = (_embed(name, side, params, v, drop) for side, v in (("image", x), ("text", y)))
        return x @ y.T
    a, b = _pair_features(name, params, drop(x), drop(y))
    return _mlp(params, a[:, None], b, drop) if name in MLPS else _attention(a, b)


def _embed(name, modality, params, x, drop=_keep):
    if name == "bilinear":
        return x @ params["w"] if modality == "image" else x
    if name in TWO_TOWERS:
        *hidden, last = params[modality]
        x = drop(x)
        for layer in hidden:
            x = drop(jax.nn.relu(x @ layer["w"] + layer["b"]))
        x = l2_normalize(x @ last["w"] + last["b"])
        if name != "two_tower_sigmoid":
            return x
        # One more entry each, so that the dot product is the logit, scale times cosine plus bias.
        more = params["bias"] if modality == "image" else jnp.float32(1)
        more = jnp.broadcast_to(more, (len(x), 1))
        return jnp.concatenate([x * jnp.sqrt(_scale(params)), more], axis=1)
    if name in ("procrustes", "optimal_transport"):
        return l2_normalize(x @ params["rotation"] if modality == "image" else x)
    if name == "relative":
        return relative(x, params[modality], power=params["power"], kept=params.get("kept"))
    if name == "kernel_cca":
        side = params[modality]
        x = gaussian_kernel(x, side["landmarks"], side["bandwidth"]) @ side["map"] - side["offset"]
    else:
        x = x @ params[modality]
    return l2_normalize(x * params["correlations"])


def _scale(params):
    """What cosines are multiplied by in a loss: at most 100, as in CLIP."""
    return jnp.exp(jnp.minimum(params["log_scale"], math.log(100)))


def _pair_features(name, params, x, y):
    """What a network of pairs computes of each side alone."""
    if name in MLPS:
        # [x; y] W = x W₁ + y W₂: the first layer costs nothing for each pair.
        first = params["layers"][0]
        return x @ first["w"][: x.shape[1]], y @ first["w"][x.shape[1] :] + first["b"]

    def tokens(v, part):
        return jnp.einsum("nd,dtw->ntw", v, params[part])

    return (
        (tokens(x, "key"), l2_normalize(tokens(x, "value"))),
        (tokens(y, "query"), l2_normalize(tokens(y, "text"))),
    )


def _mlp(params, a, b, drop=_keep):
    """Scores (...) of the halves (..., h) of the first hidden layer, broadcast."""
    h = drop(jax.nn.relu(a + b))
    *hidden, last = params["layers"][1:]
    for layer in hidden:
        h = drop(jax.nn.relu(h @ layer["w"] + layer["b"]))
    return (h @ last["w"] + last["b"])[..., 0]


def _attention(a, b):
    """Scores (..., m) of the tokens (..., s, w) of images with those (m, t, w) of texts."""
    (keys, values), (queries, texts) = a, b
    nearness = jnp.einsum("mtw,...sw->...mts", queries, keys) / math.sqrt(keys.shape[-1])
    cosines = jnp.einsum("mtw,...sw->...mts", texts, values)
    return jnp.mean(jnp.sum(jax.nn.softmax(nearness, axis=-1) * cosines, axis=-1), axis=-1)


@partial(jax.jit, static_argnames="name")
def score(name: str, params: Any, prepare: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    """Scores (n, m) of unprepared rows, images (n, d) with texts (m, d′).

    A network of pairs goes over the images in blocks: beyond the scores it holds at most
    `PAIR_NUMBERS` numbers, or those of one image with all m texts.
    """
    x, y = prepared(prepare["image"], x), prepared(prepare["text"], y)
    if name in EMBEDDING:
        return matrix(name, params, x, y)
    a, b = _pair_features(name, params, x, y)
    if name in MLPS:
        pair = max(layer["w"].shape[1] for layer in params["layers"])
        row = partial(_mlp, params, b=b)
    else:
        pair = 2 * params["key"].shape[1] ** 2
        row = partial(_attention, b=b)
    return jax.lax.map(row, a, batch_size=max(1, PAIR_NUMBERS // (pair * len(y))))


@partial(jax.jit, static_argnames=("name", "modality"))
def embedding(name: str, modality: str, params: Any, prepare: dict, x: jax.Array) -> jax.Array:
    """Embeddings (n, k) of unprepared rows, for the learners of `EMBEDDING`."""
    return _embed(name, modality, params, prepared(prepare[modality], x))


def loss(
    name: str,
    params: Any,
    prepare: dict,
    x: jax.Array,
    y: jax.Array,
    same: jax.Array,
    key: jax.Array,
    *,
    dropout: float | jax.Array = 0.0,
    negatives: int = 4,
) -> jax.Array:
    """The loss, a scalar, of a batch of prepared pairs x (b, d) and y (b, d′).

    same: (b, b) bool, whether row i's image is that of text j; true on the diagonal.
    """
    mixing, dropping = jax.random.split(key)
    drop = _dropout(dropping, dropout)
    if name in ("mlp_mse", "mlp_cosine"):
        # Each image with its own text and with those of other pairs, so many places further on.
        size = len(x)
        shifts = jnp.append(0, jax.random.randint(mixing, (negatives,), 1, size))
        image, text = jnp.arange(size), (jnp.arange(size) + shifts[:, None]) % size
        targets = jnp.asarray(same, x.dtype)
        if name == "mlp_cosine":
            targets = unit(prepare["image"], x) @ unit(prepare["text"], y).T
        a, b = _pair_features(name, params, drop(x), drop(y))
        return jnp.mean((_mlp(params, a, b[text], drop) - targets[image, text]) ** 2)
    if name == "two_tower_sigmoid":
        x, y = (_embed(name, side, params, v, drop) for side, v in (("image", x), ("text", y)))
        return sigmoid(y, x, temperature=1, bias=0, targets=same, normalize=False)
    scale: float | jax.Array = _scale(params) if "log_scale" in params else 1.0
    logits = scale * matrix(name, params, x, y, drop)
    return (softmax_contrastive(logits, same) + softmax_contrastive(logits.T, same)) / 2
