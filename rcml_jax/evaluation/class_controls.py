"""Controls of classification: the largest class, class words in a text, and linear models.

The functions are pure: arrays and texts in, probabilities out. `eval.json` and every table hold
them beside the method, whose gain is measured over the best of them.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rcml_jax.data.classification import word_stems
from rcml_jax.evaluation.classification import summarize
from rcml_jax.evaluation.relation_probes import minimise
from rcml_jax.models.m3col import column_moments

#: Weights of the penalty that `linear_probabilities` chooses among, the strongest first.
PENALTIES = (1000.0, 100.0, 10.0, 1.0)
_STEPS = 200
#: Weight of the classes' shares beside the rule's scores: it decides between equal ones only.
_TIE = 1e-3


def majority(labels: np.ndarray, classes: int, count: int) -> np.ndarray:
    """Shares of the classes in training, (count, classes); the largest class is predicted.

    labels (m,): the training labels.
    """
    shares = np.bincount(labels, minlength=classes) / len(labels)
    return np.tile(shares, (count, 1))


def class_word_probabilities(
    texts: Sequence[str], names: Sequence[str], labels: np.ndarray
) -> np.ndarray:
    """Probabilities (n, classes) of a rule: the class whose name's words stand in the text.

    A class's score is the share of its name's words that the text has, singular and plural alike.
    Of equal scores the class wins that is more frequent among the training labels (m,); so a text
    without such a word gets the largest class.
    """
    words = [word_stems(name) for name in names]
    score = np.zeros((len(texts), len(names)))
    for row, text in enumerate(texts):
        found = word_stems(text)
        score[row] = [len(w & found) / max(len(w), 1) for w in words]
    score += _TIE * majority(labels, len(names), 1)
    return score / score.sum(axis=1, keepdims=True)


def linear_probabilities(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    features: Sequence[np.ndarray],
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[list[np.ndarray], float]:
    """Probabilities (n, classes) of each array of features (n, f), and the penalty's weight.

    Logistic regression on columns standardised by `column_moments` of training, as M3CoL's of
    frozen towers; a column that is constant there is left out. train, validation: (features (m, f),
    labels (m,)). The weight is one of `penalties`, strongest first: the best before accuracy on
    validation falls.
    """
    rows = jnp.ones(len(train[0]), bool)
    mean, deviation = column_moments(jnp.asarray(train[0], jnp.float32), rows)

    def standard(x: np.ndarray) -> jax.Array:
        return (jnp.asarray(x, jnp.float32) - mean[None]) / deviation[None]

    x, y = standard(train[0]), jnp.asarray(train[1])
    held_out, params = standard(validation[0]), first_params(x.shape[1], classes)
    best, chosen = -1.0, (params, penalties[0])
    for penalty in penalties:  # each fit starts from the one before
        params = _fit(params, x, y, penalty)
        scores = np.asarray(_logits(params, held_out))
        right = float(np.sum(scores.argmax(axis=1) == validation[1]))
        if right < best:
            break  # the weaker ones take the longest, and fit the noise
        if right > best:
            best, chosen = right, (params, penalty)
    found = [np.asarray(jax.nn.softmax(_logits(chosen[0], standard(x)))) for x in features]
    return found, chosen[1]


def first_params(features: int, classes: int) -> dict[str, jax.Array]:
    """Zero weights "w" (features, classes) and biases "b" (classes,)."""
    return {"w": jnp.zeros((features, classes)), "b": jnp.zeros(classes)}


def regression_loss(
    params: Mapping[str, jax.Array], x: jax.Array, y: jax.Array, penalty: float
) -> jax.Array:
    """(Σ_i CE(y_i, softmax(w x_i + b)) + penalty/2 ‖w‖²) / n, for x (n, f) and y (n,) int."""
    fit = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(_logits(params, x), y))
    return (fit + penalty / 2 * jnp.sum(params["w"] ** 2)) / len(y)


def _logits(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"][None]


@jax.jit
def _fit(params: dict, x: jax.Array, y: jax.Array, penalty: float) -> dict[str, jax.Array]:
    loss = functools.partial(regression_loss, x=x, y=y, penalty=penalty)
    found: dict[str, jax.Array] = minimise(loss, params, _STEPS, tolerance=1e-4)
    return found


def gain(result: Mapping, controls: Mapping[str, dict]) -> dict[str, dict]:
    """What the last epoch's mean accuracy has over the best control's, a fraction.

    result: an `eval.json` with "classification"; controls: name → measures under the same paths.
    """
    accuracy = lambda x: x["classification"]["last"]["accuracy"]["mean"]  # noqa: E731
    name = max(controls, key=lambda control: accuracy(controls[control]))
    value = accuracy(result) - accuracy(controls[name])
    return {"classification": {"measure": "last/accuracy", "control": name, "gain": value}}


def row(test: dict[str, float] | None, validation: dict[str, float] | None) -> dict[str, dict]:
    """A control's measures under the paths of the method's: one value each, of the last epoch."""
    found = {"classification": test, "validation": validation}
    return {task: {"last": summarize([row])} for task, row in found.items() if row}
