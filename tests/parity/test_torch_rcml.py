"""The PyTorch RCML of benchmarks/peers.py beside ours: the same weights, losses and gradients."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from rcml_jax.losses.rcml import relation_contrastive
from rcml_jax.models.rcml import RCML

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from benchmarks import item_batches, peer_batches, peers, torch_rcml  # noqa: E402

TOLERANCE = 1e-4
OPTIONS = {"temperature": 0.1, "intra_modal_weight": 0.5}
BETA = 0.6
ITEMS, LENGTH, END, PAD = 10, 9, 59, 0
CONFIG = transformers.CLIPConfig(
    text_config={
        "vocab_size": END + 1,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 12,
        "eos_token_id": END,
        "pad_token_id": PAD,
    },
    vision_config={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    },
    projection_dim=20,
)
SHARED = {
    # The self pairs, then two relations of which one is short of a pair.
    "intra": np.array([True, False, False]),
    "anchor": np.array([[0, 3, 0], [0, 2, 4], [6, 8, 0]], np.int32),
    "positive": np.array([[0, 3, 0], [1, 3, 5], [7, 9, 0]], np.int32),
    "pair_valid": np.array([[1, 1, 0], [1, 1, 1], [1, 1, 0]], bool),
}


def related():
    """The batch's pairs, and one of the graph that the batch does not have."""
    matrix = np.eye(ITEMS, dtype=bool)
    matrix[SHARED["anchor"], SHARED["positive"]] = True
    matrix[1, 8] = True
    return matrix | matrix.T


def texts(rng, count):
    """Ids (count, LENGTH) of texts of every length, padded, and their mask."""
    ends = np.linspace(2, LENGTH - 1, count).astype(int)[:, None]
    places = np.arange(LENGTH)
    ids = np.where(places < ends, rng.integers(3, END - 1, (count, LENGTH)), PAD)
    return np.where(places == ends, END, ids).astype(np.int32), places <= ends


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    ids, mask = texts(rng, ITEMS)
    relation_ids, relation_mask = texts(rng, len(SHARED["intra"]))
    side = CONFIG.vision_config.image_size
    return SHARED | {
        "ids": ids,
        "mask": mask,
        "relation_ids": relation_ids,
        "relation_mask": relation_mask,
        "images": rng.standard_normal((ITEMS, side, side, 3)).astype(np.float32),
        "related": related(),
    }


@pytest.fixture(scope="module")
def ours(batch):
    """The model, and parameters in which no bias is 0, no norm 1 and no matrix the identity."""
    model = RCML(CONFIG, FrozenDict(beta=BETA))
    inputs = batch["relation_ids"][:1], batch["ids"][:1], batch["images"][:1]
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: small_noise(rng, x.shape), shapes)


def small_noise(rng, shape):
    """Around 1 for the norms' scales and biases, around 0 for matrices."""
    middle = 0.0 if len(shape) > 1 else 0.5
    return (middle + 0.2 * rng.standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module")
def peer(ours):
    return torch_rcml.load(torch_rcml.TorchRCML(CONFIG, beta=BETA), ours[1])


def tensors(batch):
    """The factored form's batch."""
    names = ("ids", "mask", "relation_ids", "relation_mask", "related", *SHARED)
    found = {name: torch.from_numpy(batch[name]) for name in names}
    found |= {name: found[name].long() for name in ("anchor", "positive")}
    return found | {"pixels": torch.from_numpy(batch["images"]).permute(0, 3, 1, 2)}


@pytest.fixture(scope="module")
def our_embeddings(batch, ours):
    model, params = ours
    return jax.jit(model.apply)(
        {"params": params}, batch["relation_ids"], batch["ids"], batch["images"], batch["intra"]
    )


def our_loss(model, batch, params):
    inputs = (batch[name] for name in ("relation_ids", "ids", "images", "intra"))
    out = model.apply({"params": params}, *inputs)
    text, image = (jnp.swapaxes(out[name], 0, 1) for name in ("text", "image"))
    names = ("pair_valid", "related", "intra")
    arguments = {name: batch[name] for name in names} | {"valid": jnp.ones(len(batch["ids"]), bool)}
    pairs = batch["anchor"], batch["positive"]
    return relation_contrastive(text, image, *pairs, **arguments, **OPTIONS)[0]


def assert_same_loss_and_gradients(model, params, batch, peer, loss):
    loss_of = functools.partial(our_loss, model, batch)
    value, grads = jax.jit(jax.value_and_grad(loss_of))(params)
    peer.zero_grad()
    loss.backward()
    assert loss.item() == pytest.approx(float(value), abs=TOLERANCE)
    expected = torch_rcml.torch_layout(grads)
    found = {name: p.grad for name, p in peer.named_parameters()}
    assert found.keys() == expected.keys()
    assert found.pop("clip.logit_scale") is None  # neither loss has it
    assert not expected.pop("clip.logit_scale").any()
    for name, grad in found.items():
        np.testing.assert_allclose(
            grad.numpy(), expected[name], atol=TOLERANCE, rtol=TOLERANCE, err_msg=name
        )
    heads = [np.abs(expected[f"{name}.weight"]).max() for name in ("query", "key", "value")]
    assert min(heads) > 10 * TOLERANCE  # or their agreement would show nothing


def test_the_factored_form_is_ours(batch, ours, peer):
    loss = torch_rcml.items_loss(peer, tensors(batch), **OPTIONS)
    assert_same_loss_and_gradients(*ours, batch, peer, loss)


@torch.no_grad()
def test_the_factored_embeddings_are_ours(batch, peer, our_embeddings):
    found = peer.embed_items(tensors(batch))
    for name, embedded in zip(("text", "image"), found, strict=True):
        np.testing.assert_allclose(embedded.numpy(), our_embeddings[name], atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_the_plain_embeddings_are_ours_under_each_pairs_own_relation(batch, peer, our_embeddings):
    plain = peer_batches.plain_batch(tensors(batch))
    relation, place = np.nonzero(batch["pair_valid"])
    rows = np.concatenate([batch[name][relation, place] for name in ("anchor", "positive")])
    assert len(plain["ids"]) == len(rows) == 2 * len(plain["relation_ids"]) == 14
    for name, found in zip(("text", "image"), peer.embed_pairs(plain), strict=True):
        expected = np.asarray(our_embeddings[name])[rows, np.tile(relation, 2)]
        np.testing.assert_allclose(found.numpy(), expected, atol=TOLERANCE, rtol=0)


def test_the_plain_loss_is_ours_under_one_relation(batch, ours, peer):
    # Ten distinct items in five pairs: their candidates are then the batch's items, each once.
    pairs = {
        "anchor": np.arange(0, 10, 2, dtype=np.int32)[None],
        "positive": np.arange(1, 10, 2, dtype=np.int32)[None],
        "pair_valid": np.ones((1, 5), bool),
        "intra": np.zeros(1, bool),
    }
    one = {name: batch[name][1:2] for name in ("relation_ids", "relation_mask")}
    batch = batch | pairs | one
    loss = torch_rcml.pairs_loss(peer, peer_batches.plain_batch(tensors(batch)), **OPTIONS)
    assert_same_loss_and_gradients(*ours, batch, peer, loss)


@torch.no_grad()
def test_the_plain_negatives_keep_their_own_relation(batch, ours, peer):
    model, params = ours
    plain = peer_batches.plain_batch(tensors(batch))
    found = torch_rcml.pairs_loss(peer, plain, **OPTIONS).item()
    # Our loss of the 2B rows as if each were an item of its own, in which the relation no longer
    # matters: self pairs and inter-sample ones are two "relations" of the same embeddings.
    text, image = (x.numpy()[None].repeat(2, 0) for x in peer.embed_pairs(plain))
    count = len(plain["intra"])
    anchor = np.tile(np.arange(count), (2, 1))
    intra = plain["intra"].numpy()
    expected = jax.jit(functools.partial(relation_contrastive, **OPTIONS))(
        text,
        image,
        anchor,
        anchor + count,
        pair_valid=np.stack([intra, ~intra]),
        related=plain["related"].numpy(),
        valid=np.ones(2 * count, bool),
        intra=np.array([True, False]),
    )[0]
    assert found == pytest.approx(float(expected), abs=TOLERANCE)
    # Eq. 2 has the negatives under the anchor's relation, and is another number.
    by_eq_2 = jax.jit(functools.partial(our_loss, model, batch))(params)
    assert abs(found - float(by_eq_2)) > 100 * TOLERANCE


def test_a_step_trains(batch, ours):
    model = torch_rcml.load(torch_rcml.TorchRCML(CONFIG, beta=BETA), ours[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    full = tensors(batch)
    step = torch_rcml.step_function(
        lambda: torch_rcml.items_loss(model, full, **OPTIONS), optimizer
    )
    losses = [float(step()) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture(scope="module")
def workload():
    return peer_batches.build_workload(small=True)


def test_the_workload_has_32_pairs_under_11_relations(workload):
    shared, factored, plain = workload.ours["shared"], workload.factored, workload.plain
    assert shared["pair_valid"].sum() == 32
    assert len(shared["intra"]) == 11
    assert shared["intra"].sum() == 1
    live = shared["pair_valid"] & ~shared["intra"][:, None]
    items = np.concatenate([shared["anchor"][live], shared["positive"][live]])
    assert sorted(items) == list(range(workload.items)) == list(range(60))
    assert plain["ids"].shape == (64, workload.limit)
    assert plain["relation_ids"].shape == (32, workload.limit)
    np.testing.assert_array_equal(factored["ids"], workload.ours["items"]["ids"])
    longest = factored["mask"].sum(1).max()
    assert longest == max(workload.title_lengths)
    assert longest <= factored["ids"].shape[1] <= workload.limit
    # Trimming takes padding away and nothing else.
    first = shared["anchor"][0, 0]
    length = workload.title_lengths[first]
    assert plain["mask"][0].sum() == length
    np.testing.assert_array_equal(plain["ids"][0, :length], factored["ids"][first, :length])


def test_titles_are_of_realistic_lengths():
    lengths = item_batches.title_lengths(np.random.default_rng(0), 100_000, 77)
    assert np.median(lengths) == item_batches.MEDIAN_TITLE
    assert (lengths.min() >= 4, lengths.max()) == (True, 77)
    assert np.mean(lengths == 77) < 0.01


@pytest.mark.slow
def test_all_parts_run_on_small_towers(tmp_path, capsys):
    path = tmp_path / "peers.json"
    peers.main(["--small", "--repeats", "1", "--json", str(path)])
    out = capsys.readouterr().out
    assert "plain PyTorch" in out
    assert json.loads(path.read_text())["parts"].keys() >= {"training", "embedding"}
