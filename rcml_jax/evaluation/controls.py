"""Controls: scores that leave out a part of the question. Every method is compared with them.

A gain is measured over the best control, never over chance. The functions are pure: arrays in,
scores or measures out, no model. `LABELS` names the controls, in the order of every table; those of
classification are computed by `rcml_jax.evaluation.class_controls`.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse

from rcml_jax.evaluation import SCORES
from rcml_jax.evaluation.measures import main_measures, of_ranks
from rcml_jax.evaluation.relation_probes import fit_classifier
from rcml_jax.evaluation.scores import RelationEmbeddings

LABELS = {
    "chance": "chance",
    "relation_only": "relation only",
    "query_only": "query only",
    "relation_frequency": "frequency of relations",
    "relation_one_hot": "one-hot of the relation",
    "words": "word overlap",
    "words_sentence": "word overlap + sentence",
    "words_relation_only": "words, relation only",
    "words_and_relation": "word overlap + relation only",
    "frozen_towers": "frozen towers as they came",
    "frozen_towers_sentence": "frozen towers + sentence",
    "majority": "largest class",
    "class_words": "class word in the text",
    "linear": "logistic regression",
}
#: A linear control on one modality alone has its name behind this.
LINEAR = "linear_"


def label_of(name: str) -> str:
    """A control's label in tables."""
    if name.startswith(LINEAR):
        return f"{LABELS['linear']}, {name.removeprefix(LINEAR)}"
    return LABELS[name]


def tf_idf(texts: Sequence[str], fitted: Sequence[str]) -> scipy.sparse.csr_array:
    """TF-IDF vectors of length one, (n, words) sparse; zero for a text without words.

    Words are lower-case runs of letters, digits and underscores. A word's weight is its count times
    log((1 + m) / (1 + f)) + 1, where f of the m `fitted` texts have it.
    """
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    index: dict[str, int] = {}
    for word in (w for row in words for w in row):
        index.setdefault(word, len(index))
    found = Counter(w for text in fitted for w in set(re.findall(r"\w+", text.lower())))
    idf = np.array([np.log((1 + len(fitted)) / (1 + found[w])) + 1 for w in index])
    rows = np.repeat(np.arange(len(words)), [len(row) for row in words])
    columns = np.array([index[w] for row in words for w in row], np.int64)
    shape = (len(words), len(index))
    counts = scipy.sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)
    return unit_rows(counts.multiply(idf[None]).tocsr() if index else counts)


def unit_rows(x: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Sparse rows divided by their lengths; a zero row stays zero."""
    norm = np.sqrt(np.asarray(x.multiply(x).sum(axis=1)).ravel())
    scale = scipy.sparse.diags_array(1 / np.where(norm > 0, norm, 1))
    return scipy.sparse.csr_array(scale @ x)


def sparse_products(x: scipy.sparse.csr_array, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot products of rows a and b of a sparse matrix; two index arrays that broadcast."""
    a, b = np.broadcast_arrays(a, b)
    products = np.empty(a.size)
    step = 65_536
    for start in range(0, a.size, step):
        part = slice(start, start + step)
        both = x[a.ravel()[part]].multiply(x[b.ravel()[part]])
        products[part] = np.asarray(both.sum(axis=1)).ravel()
    return products.reshape(a.shape)


def relation_means(
    side: np.ndarray, rows: np.ndarray, relation: np.ndarray, relations: int
) -> np.ndarray:
    """Normalised mean embedding (R, d) of given items under each relation; zero without any item.

    side (R, n, d), or (1, n, d) where nothing depends on the relation; rows (m,), relation (m,):
    item `rows[k]` of the embeddings counts for `relation[k]`.
    """
    total = np.zeros((relations, side.shape[-1]))
    np.add.at(total, relation, side[relation if len(side) > 1 else 0, rows])
    return _unit(total)


def query_scores(
    text: np.ndarray,
    image: np.ndarray,
    table: RelationEmbeddings,
    candidates: np.ndarray,
    relation: np.ndarray,
) -> dict[str, np.ndarray]:
    """Five scores (q, c): cosines of given query vectors with candidates under a relation.

    text, image (q, d): what stands for the queries; candidates (q, c): item identifiers; relation
    (q,).
    """
    found = {name: np.empty(candidates.shape, np.float32) for name in SCORES}
    step = max(1, 2**22 // (candidates.shape[1] * text.shape[1]))
    for start in range(0, len(candidates), step):
        part = slice(start, start + step)
        rows, under = table.rows(candidates[part]), relation[part, None]
        sides = table.text, table.image
        tb, ib = (x[under if len(x) > 1 else 0, rows].astype(np.float64) for x in sides)
        ta, ia = text[part], image[part]
        pairs = {
            "tt": (ta, tb),
            "ii": (ia, ib),
            "ti": (ta, ib),
            "it": (ia, tb),
            "avg": (ta + ia, tb + ib),
        }
        for name, (x, y) in pairs.items():
            found[name][part] = np.einsum("qd,qcd->qc", _unit(x), _unit(y))
    return found


def frequency_scores(relations: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Score candidate relations (p, c) by how often each occurs; counts: (R,)."""
    return counts[relations].astype(np.float32)


def one_hot_validity(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], relations: int
) -> float:
    """Accuracy of a linear probe whose only input is the one-hot of the relation.

    train, test: (relation (m,), label (m,)).
    """
    one_hot = np.eye(relations, dtype=np.float32)
    predict = fit_classifier(one_hot[train[0]], train[1])
    return float(np.mean(predict(one_hot[test[0]]) == test[1]))


def chance(candidates: int, task: str) -> dict[str, float]:
    """Expected measures of a task for a random order of the candidates."""
    ranks = np.arange(candidates)
    return {name: float(np.mean(of(ranks))) for name, of in of_ranks(task).items()}


def best(controls: dict, task: str, measure: str) -> tuple[str, float] | None:
    """The control with the highest value of a measure, and that value; None if none has it.

    Compared by AVG; a control with one modality only is compared by its TT or II.
    """
    found: dict[str, float] = {}
    for name, row in controls.items():
        values = row.get(task, {}).get(measure, {})
        if values:
            found[name] = headline(values)[1]
    if not found:
        return None
    name = max(found, key=found.__getitem__)
    return name, found[name]


def gains(result: dict) -> dict[str, dict]:
    """Gain of the method over the best control, by task: in AVG, or in accuracy for validity.

    A method with one modality only is compared by its TT or II.

    result: an `eval.json`. Returns {"measure", "control", "gain"} a task; gains are fractions.
    """
    found = {}
    for task, measure in ((m.task, m.name) for m in main_measures()):
        best_one = best(result.get("controls", {}), task, measure)
        if result.get(task) and best_one is not None:
            name, value = best_one
            gain = headline(result[task][measure])[1] - value
            found[task] = {"measure": measure, "control": name, "gain": gain}
    return found


def headline(values: dict[str, float] | float) -> tuple[str, float]:
    """Name and value of AVG among several scores, or of the only modality's score.

    The name of a measure without scores is "".
    """
    if not isinstance(values, dict):
        return "", values
    return next((name, values[name]) for name in ("avg", "tt", "ii") if name in values)


def rows_of(results: Mapping[str, Sequence[dict]]) -> list[tuple[str, str, list[dict]]]:
    """Rows of controls for a table: (method, label, rows) from the `eval.json` of several methods.

    results: the results of each method, one for each seed. A row has the control's measures under
    the same paths as the method's. A control that does not depend on the model has the same
    measures for each method and is listed once.
    """
    found, seen = [], []
    for method, runs in results.items():
        named = [name for run in runs for name in run.get("controls", {})]
        for name in [*LABELS, *sorted(set(named) - set(LABELS), key=named.index)]:
            rows = [run["controls"][name] for run in runs if name in run.get("controls", {})]
            if rows and (name, rows[0]) not in seen:
                seen.append((name, rows[0]))
                found.append((method, label_of(name), rows))
    return found


def _unit(x: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1)
