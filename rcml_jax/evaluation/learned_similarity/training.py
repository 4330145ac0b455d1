"""Similarities learned on frozen embeddings: networks of pairs, projections and closed forms.

    learned = fit("two_tower", image, text, image_of_text, (val_image, val_text, val_rows))
    scores = learned.score(image, text)  # (n, d), (m, d′) → (n, m), for any other rows

Embeddings are images (n, d) and texts (m, d′), whose widths may differ, and `image_of_text` (m,)
int, the row of each text's image. Every learner first scales rows to length one, subtracts the mean
of their modality over the training pairs, and divides by one number, the root mean square of the
result. Dividing by a single number keeps the angles.

mlp_mse, mlp_cosine, mlp_contrastive: an MLP on [x; y] (Xu and Leiva, 2025). The first two have
    squared error on each pair and `negatives` others of its batch, against 1 for matched pairs and
    0 for others, or against the pair's cosine before anything is subtracted.
bilinear: xᵀ W y. two_tower: the cosine of two MLPs, which without hidden layers are projections;
    two_tower_mlp: with one hidden layer at least; two_tower_sigmoid: with SigLIP's loss, and as
    score its logit, scale times cosine plus bias, which is negative for what is unrelated.
attention: both vectors become `tokens` tokens of `width`; each token u of the text attends to those
    of the image, and the score is the mean over tokens of Σ_s softmax_s(q·k_s/√width) cos(u, v_s).
procrustes: the cosine after the best rotation of images onto texts. cca: the cosine of canonical
    variates, each times its correlation. kernel_cca: the same of Gaussian-kernel features.
    relative: the cosine of the similarities with the training pairs. optimal_transport: as
    procrustes, after a matching that uses no pair (`maps` beside this module has all of these).
All other networks are trained with the CLIP loss over the batch; all texts of an image are its
positives. The closed forms are not trained.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rcml_jax.errors import UserError
from rcml_jax.evaluation import CLOSED, MLPS
from rcml_jax.evaluation.learned_similarity import maps, networks
from rcml_jax.evaluation.learned_similarity.networks import EMBEDDING, Options, read_options
from rcml_jax.evaluation.modality_gap import check_pairs
from rcml_jax.ops.ranking import retrieval_metrics


class _Pairs:
    """Checked training and validation pairs, and what fits of all options have in common.

    Raises UserError for invalid pairs.
    """

    def __init__(self, name, image, text, image_of_text, validation):
        self.image, self.text, self.rows = check_pairs(
            image, text, image_of_text, same_width=name == "mlp_cosine"
        )
        if validation is None and name not in CLOSED:
            raise UserError(
                f"{name} needs validation=(image, text, image_of_text) to know when to stop"
            )
        self.validation = validation and self._checked(validation)
        self._kernel = None

    def _checked(self, validation):
        try:
            found = check_pairs(*validation)
        except UserError as error:
            raise UserError(f"validation: {error}") from error
        for modality, x, y in zip(maps.MODALITIES, (self.image, self.text), found[:2], strict=True):
            if x.shape[1] != y.shape[1]:
                raise UserError(
                    f"validation {modality} has width {y.shape[1]} and training {x.shape[1]}; "
                    "they must agree"
                )
        return found

    @cached_property
    def prepare(self):
        return maps.fit_preparation(self.image, self.text, self.rows)

    @cached_property
    def prepared(self):
        """All images and texts, prepared, in float32."""
        pairs = zip(maps.MODALITIES, (self.image, self.text), strict=True)
        return [np.asarray(maps.prepared(self.prepare[name], jnp.asarray(x))) for name, x in pairs]

    @cached_property
    def moments(self):
        """Those of the prepared pairs, in float64."""
        sides = [
            [np.asarray(self.prepare[name][key], np.float64) for key in ("mean", "scale")]
            for name in maps.MODALITIES
        ]
        (x_mean, x_scale), (y_mean, y_scale) = sides
        return maps.moments(
            ((x - x_mean) / x_scale, (y - y_mean) / y_scale)
            for x, y in maps.paired_chunks(self.image, self.text, self.rows)
        )

    def kernel_features(self, **options):
        """As of `maps.kernel_features`; those of the last options are kept."""
        if self._kernel is None or self._kernel[0] != options:
            self._kernel = None  # before the next ones are made
            x, y = self.prepared
            self._kernel = options, maps.kernel_features(x, y, self.rows, **options)
        return self._kernel[1]


# Closed forms: of options, pairs and a seed.


def _procrustes(options, pairs, seed):
    return {"rotation": maps.procrustes(pairs.moments[2])}


def _cca(options, pairs, seed):
    found = maps.cca(*pairs.moments, shrinkage=options.shrinkage, width=options.width)
    return dict(zip(("image", "text", "correlations"), found, strict=True))


def _kernel_cca(options, pairs, seed):
    features = pairs.kernel_features(landmarks=options.landmarks, bandwidth=options.bandwidth)
    return maps.kernel_variates(*features, shrinkage=options.shrinkage, width=options.width)


def _relative(options, pairs, seed):
    x, y = pairs.prepared
    anchors = maps.anchors_of_pairs(x, y, pairs.rows)
    params = dict(zip(maps.MODALITIES, anchors, strict=True)) | {"power": options.power}
    return params | ({"kept": np.int32(options.kept)} if options.kept else {})


def _optimal_transport(options, pairs, seed):
    """Of the pairs nothing is used: which text belongs to which image is not looked at."""
    found = maps.match_unpaired(*pairs.prepared, points=options.landmarks, seed=seed)
    return {"rotation": found[0]}


CLOSED_FORMS: dict[str, Callable[..., dict[str, Any]]] = {
    "procrustes": _procrustes,
    "cca": _cca,
    "kernel_cca": _kernel_cca,
    "relative": _relative,
    "optimal_transport": _optimal_transport,
}


_NETWORK = {
    "width": [64, 128, 256, 512],
    "depth": (1, 3),
    "dropout": (0.0, 0.5),
    "learning_rate": (1e-4, 1e-2),
}
_CCA = {"width": [16, 32, 64, 128, 256, 512], "shrinkage": (1e-4, 0.9)}
#: Search space of each learner: choices (a list) or bounds (a tuple).
SPACES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(MLPS, _NETWORK),
    "two_tower": _NETWORK | {"depth": (0, 2)},
    "two_tower_mlp": _NETWORK | {"depth": (1, 3)},
    "two_tower_sigmoid": _NETWORK | {"depth": (0, 2)},
    "attention": {k: v for k, v in _NETWORK.items() if k != "depth"} | {"tokens": [1, 2, 4, 8]},
    "bilinear": {"learning_rate": (1e-4, 1e-2), "weight_decay": (1e-6, 1e-1)},
    "cca": _CCA,
    "kernel_cca": _CCA | {"bandwidth": (0.1, 10.0)},
    "relative": {"kept": [0, 25, 100, 400, 1600], "power": (1.0, 8.0)},
}


#: What `fit_best` tries of each closed form: how much to regularise depends on the number of pairs.
GRIDS: dict[str, dict[str, tuple]] = {
    "cca": {"shrinkage": (0.01, 0.1, 0.3, 0.6, 0.9)},
    "kernel_cca": {"shrinkage": (0.01, 0.1, 0.3, 0.6, 0.9)},
    "relative": {"power": (1.0, 2.0, 4.0), "kept": (0, 100)},
}


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """A learned similarity.

    params and prepare: its arrays. history: a dict for each validation, with `step`, the mean
    training `loss` since the last one, and `mrr` and `recall@1` on the validation rows, averaged
    over both directions; best: the history entry of these parameters (None without validation).
    """

    name: str
    options: Options
    params: Any
    prepare: Any
    history: list[dict]
    best: dict | None

    def score(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Scores (n, m) of images (n, d) with texts (m, d′), larger for more similar; jitted.

        Networks of pairs hold, beyond the scores, at most `PAIR_NUMBERS` numbers or those of one
        image with all texts.
        """
        self._check(image=x, text=y)
        return networks.score(self.name, self.params, self.prepare, x, y)

    @property
    def embeds(self) -> bool:
        """Whether the score is `embed_image(x) @ embed_text(y).T`."""
        return self.name in EMBEDDING

    def embed_image(self, x: jax.Array | np.ndarray) -> jax.Array:
        """Embeddings (n, k) of images (n, d); UserError if the learner has none."""
        return self._embed("image", x)

    def embed_text(self, y: jax.Array | np.ndarray) -> jax.Array:
        """Embeddings (m, k) of texts (m, d′); UserError if the learner has none."""
        return self._embed("text", y)

    def _embed(self, modality: str, x: Any) -> jax.Array:
        if not self.embeds:
            raise UserError(f"{self.name} scores pairs and has no embedding; use its score")
        self._check(**{modality: x})
        return networks.embedding(self.name, modality, self.params, self.prepare, x)

    def _check(self, **arrays: Any) -> None:
        for modality, x in arrays.items():
            width = self.prepare[modality]["mean"].shape[0]
            if x.ndim != 2 or x.shape[1] != width:
                raise UserError(
                    f"{modality} has shape {x.shape}; {self.name} was fitted on (rows, {width})"
                )


def fit(
    name: str,
    image: np.ndarray,
    text: np.ndarray,
    image_of_text: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    note: Callable[[dict], None] | None = None,
) -> Learned:
    """Fit one of `LEARNERS` to training pairs; `options` override the defaults of `Options`.

    validation: (image, text, image_of_text) of other pairs. Training (AdamW, constant rate) stops
    early by the mean reciprocal rank among these rows, averaged over both directions, and returns
    the best parameters. MRR serves every loss, and still changes where recall@1 is 0. Ties count
    against the model. The closed forms use validation for their figures only; it may be None there.
    note: is told each entry of a network's history, and may raise to end its training. Equal seeds
    give equal results. Raises UserError for invalid input, and if the loss is not finite.
    """
    settings = read_options(name, options)
    pairs = _Pairs(name, image, text, image_of_text, validation)
    return _fit(name, settings, pairs, seed, note)


def _fit(name, settings, pairs, seed, note=None):
    """As `fit`, of pairs that are checked."""
    validation = pairs.validation
    if validation is not None:
        x, y, rows = validation
        validation = _some(x, y, rows, settings.validation_rows, seed)
    if name not in CLOSED:
        params, history, best = _descend(name, settings, pairs, validation, seed, note)
        return Learned(name, settings, params, pairs.prepare, history, best)
    params = CLOSED_FORMS[name](settings, pairs, seed)
    integers = jax.tree.map(lambda p: np.asarray(p).dtype.kind == "i", params)
    params = jax.tree.map(
        lambda p, whole: jnp.asarray(p, jnp.int32 if whole else jnp.float32), params, integers
    )
    best = None
    if validation is not None:
        best = {"step": 0, "loss": None} | _validate(name, params, pairs.prepare, *validation)
    return Learned(name, settings, params, pairs.prepare, [best] if best else [], best)


def _descend(name, options, pairs, validation, seed, note):
    """Minibatch descent with early stopping: the best parameters, the history, its best entry."""
    prepare, image, text, rows = pairs.prepare, pairs.image, pairs.text, pairs.rows
    rng = np.random.default_rng(seed)
    start, noise = jax.random.split(jax.random.key(seed))
    params = networks.initial(name, start, image.shape[1], text.shape[1], options)
    state = _optimizer(options.learning_rate, options.weight_decay).init(params)
    size = min(options.batch_size, len(rows))
    batches = _endless_batches(rng, len(rows), size)
    arrays = [
        maps.prepared(prepare["image"], jnp.asarray(image)),
        maps.prepared(prepare["text"], jnp.asarray(text)),
        jnp.asarray(rows, jnp.int32),
    ]
    best = {"step": 0, "loss": None} | _validate(name, params, prepare, *validation)
    history, kept = [best], params
    step = 0
    while step < options.steps:
        count = min(options.validate_every, options.steps - step)
        chosen = np.stack(list(itertools.islice(batches, count)))
        keys = jax.vmap(partial(jax.random.fold_in, noise))(step + jnp.arange(count))
        params, state, loss = _train(
            name,
            options.dropout > 0,
            options.negatives,
            options.dropout,
            (options.learning_rate, options.weight_decay),
            (params, state),
            (*arrays, prepare),
            (chosen, keys),
        )
        step += count
        loss = float(loss)
        if not math.isfinite(loss):
            raise Diverged(f"the loss of {name} is not finite at step {step}; lower learning_rate")
        entry = {"step": step, "loss": loss} | _validate(name, params, prepare, *validation)
        history.append(entry)
        if note is not None:
            note(entry)
        if entry["mrr"] > best["mrr"]:
            best, kept = entry, params
        elif step - best["step"] >= options.patience * options.validate_every:
            break
    return kept, history, best


class Diverged(UserError):
    """The loss is not finite; `search` counts such a trial as 0."""


@partial(jax.jit, static_argnames=("name", "dropping", "negatives"))
def _train(name, dropping, negatives, dropout, rates, carry, arrays, inputs):
    """Take a step for each batch of pair indices and key; the mean of the losses comes along.

    dropping: whether `dropout`, which is traced so that a search compiles once, is above 0.
    """
    image, text, rows, prepare = arrays
    optimizer = _optimizer(*rates)

    def step(carry, batch):
        params, state = carry
        chosen, key = batch
        x, y = image[rows[chosen]], text[chosen]
        same = rows[chosen][:, None] == rows[chosen]
        loss, grad = jax.value_and_grad(
            lambda p: networks.loss(
                name,
                p,
                prepare,
                x,
                y,
                same,
                key,
                dropout=dropout if dropping else 0.0,
                negatives=negatives,
            )
        )(params)
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), losses = jax.lax.scan(step, carry, inputs)
    return params, state, jnp.mean(losses)


def _optimizer(rate, decay):
    matrices = partial(jax.tree.map, lambda p: p.ndim > 1)
    return optax.adamw(rate, weight_decay=decay, mask=matrices)


def _endless_batches(rng, count, size):
    """Indices (size,) into the pairs, each pass in a new order; what is left of it is left out."""
    while True:
        order = rng.permutation(count)
        yield from order[: count - count % size].reshape(-1, size)


def _validate(name, params, prepare, image, text, rows):
    """{"mrr", "recall@1"} of validation rows, averaged over both directions."""
    scores = np.asarray(networks.score(name, params, prepare, image, text))
    relevant = np.arange(len(image))[:, None] == rows
    both = [
        retrieval_metrics(_ranks(s, r), ks=(1,), where=jnp.asarray(r.any(axis=1)))
        for s, r in ((scores, relevant), (scores.T, relevant.T))
    ]
    return {
        name: sum(metrics[key] for metrics in both) / 2
        for name, key in (("mrr", "mrr"), ("recall@1", "hit@1"))
    }


def _ranks(scores, relevant):
    """0-based rank of each query's best relevant candidate; ties and NaN count against it."""
    best = np.max(scores, axis=1, where=relevant, initial=-np.inf, keepdims=True)
    return jnp.asarray(np.sum(~(scores < best) & ~relevant, axis=1))


def _some(image, text, rows, count, seed):
    """At most so many texts, drawn by the seed, and then their images alone."""
    if len(text) <= count:
        return image, text, rows
    chosen = np.sort(np.random.default_rng(seed).choice(len(text), count, replace=False))
    images, rows = np.unique(rows[chosen], return_inverse=True)
    return image[images], text[chosen], rows


def fit_best(
    name: str,
    image: np.ndarray,
    text: np.ndarray,
    image_of_text: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Learned:
    """Of the fits with every combination of `GRIDS[name]`, the best on validation by MRR.

    What `options` sets is not varied; a learner without a grid is fitted once. Raises UserError as
    `fit` does.
    """
    given = dict(options or {})
    grid = {k: v for k, v in GRIDS.get(name, {}).items() if k not in given}
    pairs = _Pairs(name, image, text, image_of_text, validation)
    fits = (
        _fit(name, read_options(name, given | dict(zip(grid, values, strict=True))), pairs, seed)
        for values in itertools.product(*grid.values())
    )
    return max(fits, key=_validation_mrr)


def draw_pairs(
    image: np.ndarray, text: np.ndarray, image_of_text: np.ndarray, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` pairs drawn by the seed: as many images as possible, then their further texts.

    More pairs of the same seed contain the fewer. Returns images, texts and the image of each text,
    the images without a drawn text left out. Raises UserError if there are fewer pairs.
    """
    if not 2 <= count <= len(text):
        raise UserError(f"{count} pairs cannot be drawn from {len(text)}; ask for 2 at least")
    order = np.random.default_rng(seed).permutation(len(text))
    own = image_of_text[order]
    # How many texts of the same image come before each one.
    by_image = np.argsort(own, kind="stable")
    first = np.searchsorted(own[by_image], own[by_image])
    before = np.empty(len(own), int)
    before[by_image] = np.arange(len(own)) - first
    chosen = np.sort(order[np.argsort(before, kind="stable")[:count]])
    images, rows = np.unique(image_of_text[chosen], return_inverse=True)
    return image[images], text[chosen], rows


def _validation_mrr(learned: Learned) -> float:
    assert learned.best is not None  # it was fitted with validation rows
    return learned.best["mrr"]


class Searched(NamedTuple):
    """best: the learner of the best trial that was not pruned.

    trials: {"options", "mrr", "pruned"} of each trial, in order; of a pruned one the mrr is that of
    its last validation.
    """

    best: Learned
    trials: list[dict]


def search(
    name: str,
    image: np.ndarray,
    text: np.ndarray,
    image_of_text: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    trials: int = 20,
    options: Mapping[str, Any] | None = None,
    space: Mapping[str, list | tuple] | None = None,
    seed: int = 0,
    note: Callable[[int], None] | None = None,
) -> Searched:
    """Fit a learner `trials` times with options by Optuna (TPE, seeded); the best on validation.

    The search space is `SPACES[name]`, without the options that `options` fixes; `space`, a dict of
    the same form, replaces entries: a list of choices, or a tuple of bounds (low, high), integers
    if both are, on a log scale if low is a float above 0. A network's trial goes beyond a ninth of
    `steps`, and then beyond a third, only if it is among the best third of those that came so far
    (successive halving); else it is pruned. A trial whose loss is not finite counts as 0. note: is
    told the number of trials that are done. Raises UserError if Optuna (extra `search`) is missing,
    if every trial diverged, and as `fit` does.
    """
    steps = read_options(name, options).steps
    if name not in SPACES:
        raise UserError(f"{name} has nothing to search; fit it")
    if trials < 1:
        raise UserError(f"trials={trials} must be at least 1")
    options = dict(options or {})
    free = {k: v for k, v in SPACES[name].items() if k not in options} | dict(space or {})
    try:
        import optuna
    except ImportError as error:
        raise UserError('search needs Optuna: pip install "rcml_jax[search]"') from error
    pairs = _Pairs(name, image, text, image_of_text, validation)
    best: Learned | None = None
    done: list[dict] = []

    def objective(trial) -> float:
        nonlocal best
        chosen = {key: _suggest(trial, key, choices) for key, choices in free.items()}
        done.append({"options": chosen, "mrr": 0.0, "pruned": False})

        def prune(entry: dict) -> None:
            trial.report(entry["mrr"], entry["step"])
            if trial.should_prune():
                done[-1] |= {"mrr": entry["mrr"], "pruned": True}
                raise optuna.TrialPruned

        try:
            learned = _fit(name, read_options(name, options | chosen), pairs, seed, prune)
        except Diverged:
            return 0.0
        done[-1]["mrr"] = mrr = _validation_mrr(learned)
        if best is None or mrr > _validation_mrr(best):
            best = learned
        return mrr

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed),
            pruner=optuna.pruners.SuccessiveHalvingPruner(max(1, steps // 9), 3),
        ).optimize(objective, trials, callbacks=[lambda *_: note(len(done))] if note else None)
    finally:
        optuna.logging.set_verbosity(level)
    if best is None:
        raise UserError(f"the loss of {name} was not finite in any trial; lower learning_rate")
    return Searched(best, done)


def _suggest(trial, key: str, choices: list | tuple) -> Any:
    if isinstance(choices, list):
        return trial.suggest_categorical(key, choices)
    if len(choices) != 2 or not choices[0] <= choices[1]:
        raise UserError(f"space of {key} is {choices}; give a list of choices or (low, high)")
    low, high = choices
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high)
    return trial.suggest_float(key, low, high, log=low > 0)
