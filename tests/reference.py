"""Slow NumPy twins of every equation, in float64 loops, to be read beside the papers.

Nothing here is shared with the library, and nothing is vectorised where a loop reads better.
"""

import math
import re

import numpy as np

# --- Similarities ---------------------------------------------------------------------------------


def cosine(x, y):
    norms = np.sqrt(np.sum(x**2)) * np.sqrt(np.sum(y**2))
    return np.sum(x * y) / norms if norms > 0 else 0.0


def dot(x, y):
    return np.sum(x * y)


def euclidean(x, y):
    return -np.sqrt(np.sum((x - y) ** 2))


def manhattan(x, y):
    return -np.sum(np.abs(x - y))


def chi_square(x, y, signed="absolute", epsilon=1e-12):
    if signed == "shift":
        smallest = min(x.min(), y.min())
        x, y = x - smallest, y - smallest
    return -np.sum((x - y) ** 2 / (np.abs(x) + np.abs(y) + epsilon))


def matrix(similarity, x, y, **options):
    """The scores (n, m) of the rows of x (n, d) and y (m, d)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.array([[similarity(a, b, **options) for b in y] for a in x])


# --- Softmax, CLIP, SigLIP, UniCL -----------------------------------------------------------------


def cross_entropy(logits, target, allowed):
    """−Σ_j t_j log softmax(l)_j over the allowed entries of one row; None if it has no positive."""
    target = np.where(allowed, target, 0.0)
    if target.sum() <= 0:
        return None
    target = target / target.sum()
    largest = max(logits[j] for j in range(len(logits)) if allowed[j])
    total = sum(np.exp(logits[j] - largest) for j in range(len(logits)) if allowed[j])
    loss = 0.0
    for j in range(len(logits)):
        if target[j] > 0:
            loss -= target[j] * (logits[j] - largest - np.log(total))
    return loss


def target_matrix(targets, n, m):
    if targets is None:
        targets = np.arange(n)
    targets = np.asarray(targets)
    if targets.ndim == 2:
        return targets.astype(np.float64)
    return np.array([[float(targets[i] == j) for j in range(m)] for i in range(n)])


def softmax_contrastive(logits, targets=None, where=None, weights=None):
    logits = np.asarray(logits, np.float64)
    n, m = logits.shape
    targets = target_matrix(targets, n, m)
    where = np.broadcast_to(True if where is None else where, (n, m)) & (logits > -np.inf)
    weights = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    total, weight = 0.0, 0.0
    for i in range(n):
        loss = cross_entropy(logits[i], targets[i], where[i])
        if loss is not None and weights[i] != 0:
            total += weights[i] * loss
            weight += weights[i]
    return total / weight if weight else 0.0


def info_nce(queries, keys, temperature=0.1, normalize=True, **options):
    logits = matrix(cosine if normalize else dot, queries, keys) / temperature
    return softmax_contrastive(logits, **options)


def allowed_pairs(where, n):
    where = np.ones(n, bool) if where is None else where
    return where if where.ndim == 2 else np.outer(where, where)


def clip(text, image, temperature=0.07, where=None, targets=None, normalize=True):
    logits = matrix(cosine if normalize else dot, text, image) / temperature
    n = len(logits)
    targets = target_matrix(targets, n, n)
    both = allowed_pairs(where, n)
    forward = softmax_contrastive(logits, targets, both)
    return (forward + softmax_contrastive(logits.T, targets.T, both.T)) / 2


def sigmoid(text, image, temperature=0.1, bias=-10.0, where=None, targets=None, normalize=True):
    logits = matrix(cosine if normalize else dot, text, image) / temperature + bias
    n = len(logits)
    targets = target_matrix(targets, n, n)
    both = allowed_pairs(where, n)
    total = 0.0
    for i in range(n):
        for j in range(n):
            if both[i, j]:
                # log σ(l) = −log(1 + exp(−l))
                total -= targets[i, j] * np.logaddexp(0, -logits[i, j])
                total -= (1 - targets[i, j]) * np.logaddexp(0, logits[i, j])
    return -total / max(both.any(axis=1).sum(), 1)


def label_supervised(text, image, labels, temperature=0.07, where=None, normalize=True):
    n = len(labels)
    targets = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            targets[i, j] = i == j or (labels[i] == labels[j] and labels[i] >= 0)
    return clip(text, image, temperature, where, targets, normalize)


# --- DeCLIP ---------------------------------------------------------------------------------------


def nearest_row(i, text, bank, where):
    """The row of the bank, not i itself, with the largest cosine to text i; None without any."""
    others = [j for j in range(len(bank)) if j != i and where[j]]
    return max(others, key=lambda j: cosine(text[i], bank[j])) if others else None


def neighbor_supervision(text, bank, image, temperature=0.07, where=None):
    n = len(text)
    where = np.ones(n, bool) if where is None else where
    neighbor = [nearest_row(i, text, bank, where) if where[i] else None for i in range(n)]
    losses = []
    for i in range(n):
        # Neighbours of the other texts, but for text i itself.
        keys = [j for j in range(n) if neighbor[j] is not None and neighbor[j] != i]
        if neighbor[i] is None:
            continue
        logits = np.array([cosine(image[i], bank[neighbor[j]]) / temperature for j in keys])
        target = np.array([float(neighbor[j] == neighbor[i]) for j in keys])
        losses.append(cross_entropy(logits, target, np.ones(len(keys), bool)))
    return np.mean(losses) if losses else 0.0


def simsiam(predicted, projected, where=None):
    """SimSiam stops the gradient of `projected`: compare that of `predicted` alone."""
    n = len(predicted[0])
    kept = [i for i in range(n) if where is None or where[i]]
    total = 0.0
    for i in kept:
        total -= cosine(predicted[0][i], projected[1][i]) / 2
        total -= cosine(predicted[1][i], projected[0][i]) / 2
    return total / max(len(kept), 1)


def masked_tokens(states, table, bias, labels):
    n, k, _ = states.shape
    out = np.zeros((n, k))
    for i in range(n):
        for t in range(k):
            logits = np.array([states[i, t] @ table[v] + bias[v] for v in range(len(table))])
            target = np.arange(len(table)) == labels[i, t]
            out[i, t] = cross_entropy(logits, target, np.ones(len(table), bool))
    return out


def declip(text, image, bank, own, weights, temperature=0.07, where=None):
    """`bank` are the plain texts once more, as constants; `own` is L_ISS + L_TSS."""
    alpha, beta, gamma = weights
    pair = lambda t, i: clip(text[t], image[i], temperature, where)  # noqa: E731
    views = (pair(0, 1) + pair(1, 0) + pair(1, 1)) / 3
    near = [
        neighbor_supervision(t, bank, i, temperature, where) for t in (bank, text[1]) for i in image
    ]
    rest = 1 - alpha - beta - gamma
    return rest * pair(0, 0) + alpha * own + beta * views + gamma * np.mean(near)


def whole_batch_norm(x, scale, bias, where, epsilon=1e-5):
    kept = np.asarray(x, np.float64)[where]
    return (x - kept.mean(axis=0)) / np.sqrt(kept.var(axis=0) + epsilon) * scale + bias


# --- RCML (Eq. 1–2) -------------------------------------------------------------------------------


def relation_rows(anchor, positive, pair_valid, valid):
    """The valid rows (relation, from, to) of a batch: each pair in both directions."""
    for e in range(len(anchor)):
        for i, j, counts in zip(anchor[e], positive[e], pair_valid[e], strict=True):
            if counts and valid[i] and valid[j]:
                yield e, i, j
                yield e, j, i


def relation_contrastive(
    text,
    image,
    anchor,
    positive,
    *,
    pair_valid,
    related,
    valid,
    intra,
    temperature=0.1,
    intra_modal_weight=0.5,
):
    """The loss and the auxiliary scalars of Eq. 1–2, pair by pair."""
    z = {"t": np.asarray(text, np.float64), "i": np.asarray(image, np.float64)}
    losses = {"tt": [], "ti": [], "it": [], "ii": []}
    wins = []
    for e, i, j in relation_rows(anchor, positive, pair_valid, valid):
        exempt = related if np.ndim(related) == 2 else related[e]
        unrelated = [k for k in range(len(valid)) if valid[k] and not exempt[i, k] and k != j]
        for term in losses:
            x, y = z[term[0]][e], z[term[1]][e]
            similar = [np.dot(x[i], y[k]) / temperature for k in [j, *unrelated]]
            if term in ("ti", "it"):
                wins.append(all(similar[0] > other for other in similar[1:]))
            elif intra[e]:
                continue
            losses[term].append(np.logaddexp.reduce(similar) - similar[0])
    aux = {term: np.mean(rows) if rows else 0.0 for term, rows in losses.items()}
    loss = (aux["ti"] + aux["it"]) / 2 + intra_modal_weight * (aux["tt"] + aux["ii"])
    aux["pairs"] = len(losses["ti"]) / 2
    aux["accuracy"] = np.mean(wins) if wins else 0.0
    return loss, aux


def relation_identification(
    text, image, anchor, positive, *, pair_valid, linked, valid, intra, temperature=0.1
):
    """A pair's similarity under its relation against that under the unlinked ones, pair by pair."""
    z = {"t": np.asarray(text, np.float64), "i": np.asarray(image, np.float64)}
    losses, wins = [], []
    for e in range(len(anchor)):
        for g, (i, j) in enumerate(zip(anchor[e], positive[e], strict=True)):
            if intra[e] or not (pair_valid[e, g] and valid[i] and valid[j]):
                continue
            others = [r for r in range(len(anchor)) if r != e and not linked[e, g, r]]
            for x in "ti":
                for y in "ti":
                    similar = [z[x][r, i] @ z[y][r, j] / temperature for r in [e, *others]]
                    losses.append(np.logaddexp.reduce(similar) - similar[0])
                    wins.append(all(similar[0] > other for other in similar[1:]))
    if not losses:
        return 0.0, {"relation_accuracy": 0.0}
    return np.mean(losses), {"relation_accuracy": np.mean(wins)}


# --- Relation-guided pooling (RCML Eq. 4-6) ------------------------------------------------------


def relation_pooling(
    states, mask, pooled_index, relation, intra, *, query, key, value, output, beta,
    pooled_logit=1.0, pooled_prior=0.0, gate=None,
):  # fmt: skip
    """z (n, R, d): one item, one relation and one token at a time."""
    n, tokens, d = states.shape
    z = np.zeros((n, len(relation), d))
    for i in range(n):
        for r in range(len(relation)):
            q = query @ relation[r]
            logits = np.full(tokens, -np.inf)
            for t in range(tokens):
                if mask[i, t]:
                    selected = float(t == pooled_index[i])
                    bias = selected * float(intra[r])
                    score = q @ (key @ states[i, t]) / np.sqrt(d)
                    logits[t] = (1 - beta) * score + beta * pooled_logit * bias
                    logits[t] += pooled_prior * selected
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            pooled = sum(weights[t] * (value @ states[i, t]) for t in range(tokens))
            if gate is not None:
                said = relation[r] / np.linalg.norm(relation[r])
                pooled *= 1 + np.sqrt(d) * (gate @ said)
            z[i, r] = pooled @ output
            z[i, r] /= np.linalg.norm(z[i, r])
    return z


# --- Ranking --------------------------------------------------------------------------------------


def candidate_ranks(scores, where=None):
    scores = np.asarray(scores, np.float64)
    where = np.broadcast_to(True if where is None else where, scores.shape)
    ranks = []
    for row, exists in zip(scores, where, strict=True):
        rank = 0
        for score, counts in zip(row[1:], exists[1:], strict=True):
            ahead = np.isnan(row[0]) or np.isnan(score) or score >= row[0]
            rank += bool(counts and ahead)
        ranks.append(rank)
    return np.array(ranks)


# --- Gradients ------------------------------------------------------------------------------------


def gradient(function, *arrays, step=1e-5):
    """Central differences of a scalar function with respect to each of the float64 arrays."""
    arrays = [np.array(array, np.float64) for array in arrays]
    gradients = []
    for array in arrays:
        slope = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + step
            above = function(*arrays)
            array[index] = value - step
            below = function(*arrays)
            array[index] = value
            slope[index] = (above - below) / (2 * step)
        gradients.append(slope)
    return tuple(gradients)


# --- M3CoL (Eq. 2-3, 6-13) ------------------------------------------------------------------------


def mix(x, coefficient, partner):
    x = np.asarray(x, np.float64)
    return np.stack([c * x[i] + (1 - c) * x[partner[i]] for i, c in enumerate(coefficient)])


def l_sim(x, keys, m, temperature):
    """-log softmax_j(x . y_j / tau)[m] of normalised vectors (Eq. 5)."""
    similar = np.array([cosine(x, y) for y in keys]) / temperature
    return np.logaddexp.reduce(similar) - similar[m]


def m3co(clean, mixed, coefficient, partner, temperature=0.1):
    n, total = len(coefficient), 0.0
    for a in range(len(clean)):
        for b in range(a + 1, len(clean)):
            for x, y in ((a, b), (b, a)):
                for i in range(n):
                    share, j = coefficient[i], partner[x][i]
                    forward = share * l_sim(mixed[x][i], clean[y], i, temperature)
                    forward += (1 - share) * l_sim(mixed[x][i], clean[y], j, temperature)
                    backward = share * l_sim(clean[y][i], mixed[x], i, temperature)
                    backward += (1 - share) * l_sim(clean[y][j], mixed[x], i, temperature)
                    total += (forward + backward) / (2 * n)
    return total


def multi_soft_clip(embeddings, temperature=0.1):
    n, total = len(embeddings[0]), 0.0
    for a in range(len(embeddings)):
        for b in range(a + 1, len(embeddings)):
            for p, q in ((embeddings[a], embeddings[b]), (embeddings[b], embeddings[a])):
                for i in range(n):
                    similar = np.array([cosine(p[i], other) for other in p]) / temperature
                    weights = np.exp(similar - np.logaddexp.reduce(similar))
                    for k in range(n):
                        both = l_sim(q[i], p, k, temperature) + l_sim(p[k], q, i, temperature)
                        total += weights[k] * both / (2 * n)
    return total


def mlp(x, layers):
    """Layers (weight, bias) with ReLU between them, one row at a time."""
    rows = []
    for row in np.asarray(x, np.float64):
        for place, (weight, bias) in enumerate(layers):
            if place > 0:
                row = np.maximum(row, 0.0)
            row = np.array([row @ weight[:, k] + bias[k] for k in range(len(bias))])
        rows.append(row)
    return np.stack(rows)


def column_range(x, where):
    low, span = np.zeros(x.shape[1]), np.full(x.shape[1], np.finfo(np.float32).max)
    for column in range(x.shape[1]):
        values = [x[i, column] for i in range(len(x)) if where[i]]
        low[column] = min(values)
        if max(values) > min(values):
            span[column] = max(values) - min(values)
    return low, span


def column_moments(x, where):
    mean, deviation = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for column in range(x.shape[1]):
        values = [float(x[i, column]) for i in range(len(x)) if where[i]]
        mean[column] = sum(values) / len(values)
        squares = sum((value - mean[column]) ** 2 for value in values)
        deviation[column] = np.sqrt(squares / len(values))
        if deviation[column] <= 1e-6 * (1 + abs(mean[column])):
            deviation[column] = np.finfo(np.float32).max
    return mean, deviation


def m3col(tables, ranges, encoders, heads, fusion):
    """Embeddings and logits by name (Eq. 14-15); fusion sees the embeddings side by side."""
    z = {}
    for name, x in tables.items():
        low, span = ranges[name]
        z[name] = mlp([(row - low) / span for row in x], encoders[name])
    joint = [np.concatenate([z[name][i] for name in tables]) for i in range(len(x))]
    logits = {name: mlp(z[name], head) for name, head in heads.items()}
    return z, logits | {"fused": mlp(joint, fusion)}


# --- Evaluation -----------------------------------------------------------------------------------


def unit(x):
    norm = np.sqrt(np.sum(x**2))
    return x / norm if norm > 0 else x


def pair_score(text, image, h, a, b, e, similarity, weight=0.0):
    """The five scores of one pair (a, b) under relation e; text, image (R, n, d) or (1, n, d).

    weight: of the sentence, which is compared with both.
    """
    zt, zi = text[e if len(text) > 1 else 0], image[e if len(image) > 1 else 0]
    both_a, both_b = unit(zt[a] + zi[a]), unit(zt[b] + zi[b])
    sides = {
        "tt": (zt[a], zt[b]), "ii": (zi[a], zi[b]), "ti": (zt[a], zi[b]), "it": (zi[a], zt[b]),
        "avg": (both_a, both_b),
    }  # fmt: skip
    if similarity == "product":
        return {name: cosine(x, h[e]) * cosine(y, h[e]) for name, (x, y) in sides.items()}
    score = globals()[similarity]
    found = {name: score(x, y) for name, (x, y) in sides.items()}
    if weight:
        for name, (x, y) in sides.items():
            found[name] += weight * (score(h[e], x) + score(h[e], y))
    return found


def rank(scores):
    """Of the first among all: how many of the others are not below it."""
    return sum(not other < scores[0] for other in scores[1:])


def retrieval(text, image, h, query, candidates, relation, similarity):
    """Hit@1, Hit@5 and MRR by the five scores, one query at a time."""
    names = ("tt", "ii", "ti", "it", "avg")
    ranks = {name: [] for name in names}
    for q, row, e in zip(query, candidates, relation, strict=True):
        scores = [pair_score(text, image, h, q, c, e, similarity) for c in row]
        for name in names:
            ranks[name].append(rank([s[name] for s in scores]))
    return by_relation(ranks, relation, {"hit@1": hit(1), "hit@5": hit(5), "mrr": reciprocal})


def hit(k):
    return lambda rank: float(rank < k)


def reciprocal(rank):
    return 1 / (rank + 1)


def by_relation(ranks, relation, measures):
    """Means over all queries, and under "macro" means over relations of each relation's mean."""
    result = {"macro": {}}
    for measure, value in measures.items():
        result[measure], result["macro"][measure] = {}, {}
        for name, found in ranks.items():
            values = np.array([value(rank) for rank in found])
            parts = [values[[x == e for x in relation]].mean() for e in sorted(set(relation))]
            result[measure][name] = values.mean()
            result["macro"][measure][name] = np.mean(parts)
    return result


def relation_type(text, image, h, a, b, relations, similarity):
    """Top-1 and Top-3 of the first relation among the candidates of each pair."""
    names = ("tt", "ii", "ti", "it", "avg")
    ranks = {name: [] for name in names}
    for i, j, row in zip(a, b, relations, strict=True):
        scores = [pair_score(text, image, h, i, j, e, similarity) for e in row]
        for name in names:
            ranks[name].append(rank([s[name] for s in scores]))
    return by_relation(ranks, [row[0] for row in relations], {"top1": hit(1), "top3": hit(3)})


# --- Convolutions ---------------------------------------------------------------------------------


def same_padding(side, kernel, stride):
    """How many zeros go before a side, by "SAME": the output has ⌈side / stride⌉ places."""
    total = max((int(np.ceil(side / stride)) - 1) * stride + kernel - side, 0)
    return total // 2


def conv(x, kernel, stride=1):
    """One image (H, W, c) with kernel (k, k, c, d), zeros around it by "SAME"."""
    k, (height, width) = kernel.shape[0], x.shape[:2]
    top, left = same_padding(height, k, stride), same_padding(width, k, stride)
    out = np.zeros((-(-height // stride), -(-width // stride), kernel.shape[3]))
    for row, column, i, j in np.ndindex(*out.shape[:2], k, k):
        y, z = row * stride + i - top, column * stride + j - left
        if 0 <= y < height and 0 <= z < width:
            out[row, column] += x[y, z] @ kernel[i, j]
    return out


def depthwise_conv(x, kernel, stride=1):
    """One image (H, W, c), each channel with its own filter of kernel (k, k, 1, c)."""
    channels = [conv(x[..., c : c + 1], kernel[..., c : c + 1], stride) for c in range(x.shape[2])]
    return np.concatenate(channels, axis=2)


def batch_norm(x, p, epsilon=1e-3):
    return (x - p["mean"]) / np.sqrt(p["var"] + epsilon) * p["scale"] + p["bias"]


def relu6(x):
    return np.minimum(np.maximum(x, 0.0), 6.0)


def mb_conv(x, p, stride=1):
    """One image through expansion, depthwise convolution and projection, each with batch norm."""
    y = x
    if "expand_conv" in p:
        y = relu6(batch_norm(conv(y, p["expand_conv"]["kernel"]), p["bn0"]))
    y = relu6(batch_norm(depthwise_conv(y, p["depthwise_conv"]["kernel"], stride), p["bn1"]))
    y = batch_norm(conv(y, p["project_conv"]["kernel"]), p["bn2"])
    return x + y if x.shape == y.shape else y


def efficientnet_lite(x, p, strides):
    """One normalised image → its feature map; strides: of the blocks."""
    x = relu6(batch_norm(conv(x, p["conv_stem"]["kernel"], 2), p["bn0"]))
    for i, stride in enumerate(strides):
        x = mb_conv(x, p[f"blocks_{i}"], stride)
    return relu6(batch_norm(conv(x, p["conv_head"]["kernel"]), p["bn1"]))


# --- Controls -------------------------------------------------------------------------------------


def tf_idf(texts, fitted):
    """TF-IDF vectors of length one, a dictionary from words to weights for each text."""
    split = lambda text: re.findall(r"\w+", text.lower())  # noqa: E731
    vectors = []
    for text in texts:
        vector = {}
        for word in split(text):
            having = sum(word in split(other) for other in fitted)
            weight = math.log((1 + len(fitted)) / (1 + having)) + 1
            vector[word] = vector.get(word, 0) + weight
        norm = math.sqrt(sum(w * w for w in vector.values()))
        vectors.append({word: w / norm for word, w in vector.items()})
    return vectors


def overlap(x, y):
    return sum(weight * y.get(word, 0) for word, weight in x.items())


def class_words(text, names, counts):
    """The class with the largest share of its name's words in the text, the more frequent first."""

    def stems(x):
        words = [w[:-3] + "y" if w.endswith("ies") else w for w in re.findall("[a-z]+", x.lower())]
        words = [w[:-1] if re.search("[^s]s$", w) else w for w in words]
        words = [w[:-1] if w.endswith("e") else w for w in words]
        return {w for w in words if w not in ("and", "of", "th", "the", "or", "with")}

    def standing(c):
        words = stems(names[c])
        return sum(w in stems(text) for w in words) / len(words), counts[c]

    return max(range(len(names)), key=standing)


def regression_loss(w, b, x, y, penalty):
    """Penalised cross-entropy of a linear model, a mean over the rows of x (n, f)."""
    total = 0.0
    for i in range(len(x)):
        logits = [sum(x[i, f] * w[f, c] for f in range(len(w))) + b[c] for c in range(len(b))]
        total += math.log(sum(math.exp(z) for z in logits)) - logits[y[i]]
    return (total + penalty / 2 * float((w**2).sum())) / len(x)


def relation_means(side, rows, relation, relations):
    means = []
    for e in range(relations):
        mine = [i for i, r in zip(rows, relation, strict=True) if r == e]
        found = [side[e if len(side) > 1 else 0][i] for i in mine]
        means.append(unit(np.sum(found, axis=0)) if found else np.zeros(side.shape[-1]))
    return np.stack(means)


# --- Transformers ---------------------------------------------------------------------------------


def activation(name, x):
    """One number through an activation, by the formula of its paper."""
    cubic = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return {
        "gelu": lambda: x * (1 + math.erf(x / math.sqrt(2))) / 2,
        "gelu_new": lambda: x * (1 + np.tanh(cubic)) / 2,
        "gelu_pytorch_tanh": lambda: x * (1 + np.tanh(cubic)) / 2,
        "gelu_fast": lambda: x * (1 + np.tanh(cubic)) / 2,
        "quick_gelu": lambda: x / (1 + np.exp(-1.702 * x)),
        "relu": lambda: max(x, 0.0),
        "silu": lambda: x / (1 + np.exp(-x)),
        "swish": lambda: x / (1 + np.exp(-x)),
    }[name]()


def attention(query, key, value, mask=None, causal=False):
    """softmax(q·k/√d)·v of (n, T, heads, d): one query at a time over the keys that it sees."""
    n, tokens, heads, d = query.shape
    out = np.zeros(value.shape)
    for i in range(n):
        for h in range(heads):
            for t in range(tokens):
                seen = [s for s in range(tokens) if not (causal and s > t)]
                if mask is not None:
                    full = np.broadcast_to(mask, (n, heads, tokens, tokens))
                    seen = [s for s in seen if full[i, h, t, s]]
                logits = np.array([query[i, t, h] @ key[i, s, h] / np.sqrt(d) for s in seen])
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                for weight, s in zip(weights, seen, strict=True):
                    out[i, t, h] += weight * value[i, s, h]
    return out


def dense(x, params):
    """x W + b over the last axis."""
    return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params["bias"], np.float64)


def layer_norm(x, params, epsilon):
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    return centred / deviation * np.asarray(params["scale"]) + np.asarray(params["bias"])


def transformer_mlp(x, up, down, name):
    return dense(np.vectorize(lambda v: activation(name, v))(dense(x, up)), down)


def transformer_layer(x, params, *, heads, name, epsilon, pre_norm, mask=None, causal=False):
    """A layer with CLIP's names: x + A(norm(x)), x + M(norm(x)); post: norm(x + A(x)), ..."""
    own = params["self_attn"]
    norm = [lambda x, n=n: layer_norm(x, params[f"layer_norm{n}"], epsilon) for n in (1, 2)]

    def attend(x):
        split = lambda x: x.reshape(*x.shape[:2], heads, -1)  # noqa: E731
        q, k, v = (split(dense(x, own[f"{part}_proj"])) for part in "qkv")
        return dense(attention(q, k, v, mask, causal).reshape(x.shape), own["out_proj"])

    transform = lambda x: transformer_mlp(  # noqa: E731
        x, params["mlp"]["fc1"], params["mlp"]["fc2"], name
    )
    if pre_norm:
        x = x + attend(norm[0](x))
        return x + transform(norm[1](x))
    x = norm[0](x + attend(x))
    return norm[1](x + transform(x))


def attention_pooling(states, params, *, heads, name, epsilon):
    """SigLIP's head: a probe attends to the tokens (n, T, width), then an MLP with a residual."""
    n, _, width = states.shape
    kernels = np.split(np.asarray(params["attention"]["in_proj"]["kernel"], np.float64), 3, axis=1)
    biases = np.split(np.asarray(params["attention"]["in_proj"]["bias"], np.float64), 3)
    query = np.asarray(params["probe"], np.float64)[0, 0] @ kernels[0] + biases[0]
    size, pooled = width // heads, np.zeros((n, width))
    for i in range(n):
        keys, values = (states[i] @ kernels[k] + biases[k] for k in (1, 2))
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            logits = np.array([query[part] @ key[part] / np.sqrt(size) for key in keys])
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            pooled[i, part] = sum(w * v[part] for w, v in zip(weights, values, strict=True))
    out = dense(pooled, params["attention"]["out_proj"])
    normed = layer_norm(out, params["layernorm"], epsilon)
    return out + transformer_mlp(normed, params["mlp"]["fc1"], params["mlp"]["fc2"], name)


# --- Maps between embeddings of separate towers, and calibrated similarities ----------------------


def nearest_rotation(cross):
    """The orthogonal factor of a square matrix, by Newton's iteration for the polar factor."""
    r = np.array(cross, np.float64)
    for _ in range(100):
        r = (r + np.linalg.inv(r).T) / 2
    return r


def shrunk(covariance, shrinkage):
    d = len(covariance)
    return (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / d * np.eye(d)


def canonical_correlations(x, y, shrinkage=0.0):
    """Of matched rows (n, d), (n, d′): roots of the eigenvalues of Cx⁻¹ C Cy⁻¹ Cᵀ, falling.

    All blocks of the joint covariance are shrunk, those between the two towards 0.
    """
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    n = len(x)
    c_x, c_y = shrunk(x.T @ x / n, shrinkage), shrunk(y.T @ y / n, shrinkage)
    cross = (1 - shrinkage) * x.T @ y / n
    product = np.linalg.inv(c_x) @ cross @ np.linalg.inv(c_y) @ cross.T
    values = np.sort(np.linalg.eigvals(product).real)[::-1][: min(x.shape[1], y.shape[1])]
    return np.sqrt(np.maximum(values, 0))


def gaussian_kernel(x, landmarks, bandwidth):
    found = np.zeros((len(x), len(landmarks)))
    for i, row in enumerate(x):
        for j, landmark in enumerate(landmarks):
            found[i, j] = np.exp(-np.sum((row - landmark) ** 2) / (2 * len(row) * bandwidth))
    return found


def kernel_features(x, landmarks, bandwidth):
    """Features whose product is the kernel: k(x, L) times the inverse root of k(L, L), Cholesky."""
    lower = np.linalg.cholesky(gaussian_kernel(landmarks, landmarks, bandwidth))
    return gaussian_kernel(x, landmarks, bandwidth) @ np.linalg.inv(lower).T


def relative(x, anchors, power=1.0, kept=None):
    found = []
    for row in x:
        cosines = [cosine(row, anchor) for anchor in anchors]
        least = -1.0 if kept is None else sorted(cosines)[-min(kept, len(cosines))]
        raised = [np.sign(c) * abs(c) ** power if c >= least else 0.0 for c in cosines]
        found.append(unit(np.array(raised)))
    return np.array(found)


def csls(x, y, images, texts, k):
    """2 cos(x_i, y_j) less the mean cosine of each with its k nearest reference rows."""
    near = lambda row, others: np.mean(sorted(cosine(row, o) for o in others)[-k:])  # noqa: E731
    return np.array([[2 * cosine(a, b) - near(a, texts) - near(b, images) for b in y] for a in x])


def isotonic(values):
    """The nearest rising sequence: max over a ≤ i of the min over b ≥ i of the mean from a to b."""
    n = len(values)
    return np.array(
        [
            max(min(np.mean(values[a : b + 1]) for b in range(i, n)) for a in range(i + 1))
            for i in range(n)
        ]
    )


def calibration_error(probability, matched, weight, bins):
    """Σ over bins of equal width of the bin's weight times |mean probability − share matched|."""
    total = 0.0
    for b in range(bins):
        own = [i for i, p in enumerate(probability) if min(int(p * bins), bins - 1) == b]
        w = sum(weight[i] for i in own)
        if w > 0:
            gap = sum(weight[i] * (probability[i] - matched[i]) for i in own) / w
            total += w / sum(weight) * abs(gap)
    return total


# --- Training batches -----------------------------------------------------------------------------


def relation_batch(rng, items, pairs, relations, each, size):
    """Relations, pairs of each and the items that fill a batch, drawn from lists of all of them.

    items: the training split's; pairs: its (a, b, relation) triples. Returns the drawn triples and
    all items, the filling ones last.
    """
    known = sorted({e for _, _, e in pairs})
    drawn = []
    for e in rng.choice(known, relations, replace=False):
        own = [pair for pair in pairs if pair[2] == e]
        chosen = rng.choice(len(own), min(each, len(own)), replace=False)
        drawn += [own[i] for i in chosen]
    paired = sorted({item for a, b, _ in drawn for item in (a, b)})
    rest = [item for item in items if item not in paired]
    fill = rng.choice(len(rest), size - len(paired), replace=False)
    return drawn, paired + [rest[i] for i in fill]


def augment(images, rng, count, mine, shift=0, flip=False):
    """Images (n, H, W, 3), `mine` of the `count` of a batch, moved and mirrored by one index."""
    _, height, width, _ = images.shape
    margin = ((0, 0), (shift, shift), (shift, shift), (0, 0))
    padded = np.pad(images, margin, mode="edge")
    top, left = rng.integers(0, 2 * shift + 1, (2, count))[:, mine]
    rows, columns = np.arange(height) + top[:, None], np.arange(width) + left[:, None]
    if flip:
        columns = np.where(rng.random((count, 1))[mine] < 0.5, columns[:, ::-1], columns)
    return padded[np.arange(len(mine))[:, None, None], rows[:, :, None], columns[:, None, :]]
