"""RCML and its baselines from data to eval.json, on a graph with planted relations."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.serialization import msgpack_restore

from rcml_jax.data.sources.folder import load as load_folder
from rcml_jax.data.tokenizer import train_tokenizer
from rcml_jax.errors import UserError
from rcml_jax.evaluation import controls
from rcml_jax.methods import build
from rcml_jax.methods.tower_tables import SENTENCE_WEIGHTS
from rcml_jax.models.towers.clip import small_clip_config
from rcml_jax.schema import validate
from rcml_jax.training import loop
from rcml_jax.training.checkpoint import read_params
from rcml_jax.training.workdir import load_config
from tests import reference
from tests.models.checkpoints_on_disk import make_model, save_checkpoint
from tests.toy import cache_of, read_metrics, tiny_config
from tests.training.test_loop import train

METHODS = ("rcml", "clip", "siglip", "unicl", "declip")
SCORES = ("tt", "ii", "ti", "it", "avg")


@pytest.fixture(scope="module")
def runs(catalogue, tmp_path_factory):
    """A trained work directory of each method, made when it is first asked for."""
    folder, made = tmp_path_factory.mktemp("methods"), {}

    def run(method):
        if method not in made:
            options = {"steps": 150, "log_every": 25, "validate_every": 150}
            options |= {"loss.learn_temperature": method == "unicl"}
            config = tiny_config(catalogue, method=method, **options)
            # At 1e-2 rounding decides whether CLIP's embeddings collapse to one.
            config.optimizer.learning_rate = 1e-3
            made[method] = folder / method, loop.train_and_evaluate(config, folder / method)
        return made[method]

    return run


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(runs, method):
    losses = [x["loss"] for x in read_metrics(runs(method)[0]) if x["kind"] == "train"]
    assert len(losses) == 6
    assert losses[-1] < 0.97 * losses[0]


def test_a_learned_temperature_is_learned(runs):
    assert "log_temperature" not in read_params(runs("clip")[0])
    learned = read_params(runs("unicl")[0])["log_temperature"]
    assert learned.shape == ()
    assert learned != np.float32(np.log(0.1))


def check_rates(scores):
    assert tuple(scores) == SCORES
    assert all(isinstance(rate, float) and 0 <= rate <= 1 for rate in scores.values())


def check_tasks(retrieval, relation_type):
    assert retrieval.keys() == {"queries", "hit@1", "hit@5", "mrr", "macro"}
    assert retrieval["queries"] == 40
    for measure in ("hit@1", "hit@5", "mrr"):
        check_rates(retrieval[measure])
        check_rates(retrieval["macro"][measure])
    for name in SCORES:
        hits = [retrieval[measure][name] for measure in ("hit@1", "mrr", "hit@5")]
        assert hits[0] <= hits[1]
        assert hits[0] <= hits[2]
    assert relation_type.keys() == {"pairs", "candidates", "top1", "top3", "macro"}
    assert relation_type["pairs"] == 40
    assert relation_type["candidates"] == 10
    for measure in ("top1", "top3"):
        check_rates(relation_type[measure])
        check_rates(relation_type["macro"][measure])
        assert all(relation_type["top1"][s] <= relation_type["top3"][s] for s in SCORES)


def check_gallery(found):
    """Every text is another one here, so that all scores have the same queries."""
    assert found.keys() == {"gallery", "queries", "hit@5", "r_precision", "map", "chance"}
    assert found["gallery"]["items"] == found["gallery"]["texts"] > 20
    assert set(found["queries"].values()) == {40}
    for measure in ("hit@5", "r_precision", "map"):
        check_rates(found[measure])
        check_rates(found["chance"][measure])


WORDS = ["words", "words_sentence", "words_relation_only", "words_and_relation"]


def check_controls(rows):
    first = ["chance", "relation_only", "query_only", "relation_frequency", "relation_one_hot"]
    assert list(rows) == [*first, *WORDS]
    assert set(rows) <= set(controls.LABELS)
    for name in ("chance", "relation_only", "query_only"):
        check_rates(rows[name]["retrieval"]["hit@5"])
        check_rates(rows[name]["retrieval_random"]["hit@5"])
    assert rows["chance"]["retrieval"]["hit@5"]["tt"] == pytest.approx(5 / 21)
    for name in WORDS:
        assert set(rows[name]["retrieval"]["hit@5"]) == {"tt"}
        assert 0 <= rows[name]["retrieval_random"]["macro"]["hit@5"]["tt"] <= 1
    # Every word that a sentence names is in the texts that it links: found without any training.
    assert rows["words_sentence"]["retrieval"]["hit@1"]["tt"] == 1
    assert rows["words_sentence"]["relation_type"]["top1"]["tt"] == 1
    # The one word that two texts share may be of another relation.
    assert rows["words"]["retrieval"]["hit@1"]["tt"] < 0.9
    assert rows["words"]["retrieval_random"]["hit@1"]["tt"] == 1
    check_rates(rows["relation_frequency"]["relation_type"]["top3"])
    assert abs(rows["relation_one_hot"]["relation_validity"]["accuracy"] - 0.5) < 0.02
    assert 0 <= rows["query_only"]["relation_validity"]["accuracy"] <= 1


@pytest.mark.parametrize("method", METHODS)
def test_eval_json_has_the_prescribed_structure(runs, method):
    workdir, result = runs(method)
    assert json.loads((workdir / "eval.json").read_text()) == result
    prescribed = ["method", "dataset", "split", "protocol", "retrieval", "relation_type"]
    assert list(result)[:8] == [*prescribed, "retrieval_all", "relation_validity"]
    extra = {"training_free_product", "retrieval_random", "controls"}
    extra |= {"gain_over_best_control"} | ({"variants"} if method != "rcml" else set())
    assert set(list(result)[8:]) == extra
    assert (result["method"], result["dataset"], result["split"]) == (method, "catalogue", "test")
    check_tasks(result["retrieval"], result["relation_type"])
    check_tasks(**result["training_free_product"])
    check_gallery(result["retrieval_all"])
    check_tasks(result["retrieval_random"], result["relation_type"])
    assert result["retrieval_random"] != result["retrieval"]
    # 22 relations are too many to rank them all.
    assert "relation_type_all" not in result
    check_controls(result["controls"])
    validity = result["relation_validity"]
    assert validity["pairs"] % 4 == 0
    assert 0 <= validity["accuracy"] <= 1
    protocol = result["protocol"]
    assert "chance of Hit@5 0.238" in protocol["retrieval"]
    assert protocol["ties"] == "count against the model"
    assert (protocol["split_seed"], protocol["disjoint"], protocol["seed"]) == (0, "pair", 42)


@pytest.mark.parametrize("method", ["clip", "siglip", "unicl"])
def test_baselines_report_the_better_way_to_score(runs, method):
    _, result = runs(method)
    variants = result["variants"]
    assert set(variants) == {"plain", "sentence", "added"}
    for variant in variants.values():
        check_tasks(variant["retrieval"], variant["relation_type"])
        check_gallery(variant["retrieval_all"])
    assert result["retrieval_all"] in [variant["retrieval_all"] for variant in variants.values()]
    assert variants["plain"] != variants["sentence"]
    for task, measure in (("retrieval", "hit@5"), ("relation_type", "top3")):
        best = max(variant[task][measure]["avg"] for variant in variants.values())
        assert result[task][measure]["avg"] == best
        assert result[task] in [variant[task] for variant in variants.values()]
    # Without the sentence nothing depends on the relation: ties, which count against the model.
    assert variants["plain"]["relation_type"]["top3"] == dict.fromkeys(SCORES, 0.0)
    tried = result["protocol"]["scoring"]["weights_on_validation"]
    assert len(tried) == len(SENTENCE_WEIGHTS)
    # The added sentence is compared with images, too.
    assert variants["added"]["relation_type"]["top3"]["ii"] > 0.0
    # Images do not see the appended one.
    assert variants["sentence"]["relation_type"]["top3"]["ii"] == 0.0


@pytest.mark.parametrize("method", ["clip", "siglip", "unicl"])
def test_related_items_are_no_negatives_of_a_baseline(catalogue, tmp_path, method):
    options = {"method": method, "loss.mask_related": True, "loss.chunk_size": 0}
    built = build(tiny_config(catalogue, **options), tmp_path)
    shared = next(built.batches())["shared"]
    related, labels = np.asarray(shared["related"]), np.asarray(shared["labels"])
    assert related.ndim == 2
    others = related & ~np.eye(len(labels), dtype=bool)
    if method == "unicl":
        others &= labels[:, None] != labels
    text, image = np.random.default_rng(0).normal(size=(2, len(labels), 5)).astype(np.float32)
    params = {"bias": jnp.float32(-1)}

    allowed = np.asarray(built._unrelated({k: jnp.asarray(v) for k, v in shared.items()}))
    np.testing.assert_array_equal(allowed, ~others)
    loss = {"clip": reference.clip, "siglip": reference.sigmoid, "unicl": reference.clip}[method]
    more = {"bias": -1.0} if method == "siglip" else {}
    if method == "unicl":
        more["targets"] = (labels[:, None] == labels) & (labels[:, None] >= 0) | np.eye(
            len(labels), dtype=bool
        )
    expected = loss(text, image, temperature=0.1, where=allowed, **more)
    found, _ = built.objective(params, {"text": text, "image": image}, {"shared": shared}, 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_planted_relations_are_learned(runs):
    """Texts share a word under a relation: far above the chance of 5 in 21."""
    _, result = runs("rcml")
    assert result["retrieval"]["hit@5"]["tt"] > 0.5


def test_all_methods_answer_the_same_queries(catalogue, tmp_path):
    tasks = []
    for method, seed in (("rcml", 1), ("clip", 2)):
        config = tiny_config(catalogue, method=method, seed=seed)
        (tmp_path / method).mkdir()
        task = build(config, tmp_path / method).task
        queries, types = task.retrieval_queries("test"), task.relation_queries("test")
        tasks.append([queries.query, queries.candidates, queries.relation, types.relations])
    for ours, theirs in zip(*tasks, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_frozen_towers_of_another_run_under_every_similarity_and_an_mlp(runs, catalogue, tmp_path):
    source, _ = runs("clip")
    options = {
        "steps": 2,
        "validate_every": 2,
        "model.freeze": "both",
        "model.init_from": str(source),
        "evaluation.similarity": "all",
        "evaluation.validity_probe": "mlp",
    }
    result = loop.train_and_evaluate(tiny_config(catalogue, **options), tmp_path / "run")
    ours, theirs = read_params(tmp_path / "run"), read_params(source)
    # CLIP's own logit scale belongs to no tower and has no gradient.
    jax.tree.map(np.testing.assert_array_equal, ours["towers"], theirs["towers"])
    assert not np.array_equal(ours["head"]["output"], np.eye(16))
    similarities = result["similarities"]
    assert list(similarities) == ["cosine", "dot", "euclidean", "manhattan", "chi_square"]
    for scores in similarities.values():
        check_tasks(**scores)
    assert similarities["cosine"]["retrieval"] == result["retrieval"]
    # Of vectors of length one these rank alike, but for rounding.
    for name in ("dot", "euclidean"):
        for score in SCORES:
            mine = similarities[name]["retrieval"]["mrr"][score]
            assert mine == pytest.approx(result["retrieval"]["mrr"][score], abs=0.03)
    assert result["relation_validity"]["probe"] == "mlp"


def test_a_baselines_similarities_are_of_the_better_way_in_each_task(runs, tmp_path):
    workdir, result = runs("clip")
    shutil.copytree(workdir, tmp_path / "run")
    config = load_config(workdir)
    config.evaluation.similarity = "all"
    again = loop.evaluate(config, tmp_path / "run")
    assert again["variants"] == result["variants"]
    for task in ("retrieval", "relation_type"):
        assert again["similarities"]["cosine"][task] == result[task]


def test_towers_of_other_sizes_are_not_taken(runs, catalogue, tmp_path):
    options = {"model.init_from": str(runs("clip")[0]), "model.width": 8}
    with pytest.raises(UserError, match=r"its towers have other sizes than config.model asks for"):
        loop.train_and_evaluate(tiny_config(catalogue, **options), tmp_path / "run")


def test_ablations_of_the_data_and_the_loss(catalogue, tmp_path):
    options = {
        "steps": 2,
        "validate_every": 2,
        "batch.inter_pairs": False,
        "loss.intra_modal_weight": 0.0,
        "data.relation_text": False,
    }
    config = tiny_config(catalogue, **options)
    result = loop.train_and_evaluate(config, tmp_path / "run")
    # One sentence for all: nothing tells the relations apart, and ties count against the model.
    assert result["relation_type"]["top3"] == dict.fromkeys(SCORES, 0.0)
    assert result["retrieval"]["hit@5"]["avg"] > 0
    method = build(config, tmp_path / "run")
    assert len(set(method.task.sentences)) == 1
    shared = next(method.batches())["shared"]
    np.testing.assert_array_equal(shared["intra"], [True])
    assert shared["pair_valid"].sum() == config.batch.size
    np.testing.assert_array_equal(shared["related"], np.eye(config.batch.size, dtype=bool))
    (line,) = [x for x in read_metrics(tmp_path / "run") if x["kind"] == "train"]
    assert line["tt"] == line["ii"] == 0.0


def test_sentences_have_noise_of_the_length_asked_for(catalogue, tmp_path):
    plain, noisy = (
        build(tiny_config(catalogue, batch__sentence_noise=length), tmp_path)
        for length in (0.0, 0.5)
    )
    batch, other = next(plain.batches()), next(noisy.batches())
    assert "sentence_noise" not in batch["shared"]
    noise = other["shared"]["sentence_noise"]
    assert noise.shape == (len(other["shared"]["relation_ids"]), 16)
    assert 0.3 < np.linalg.norm(noise, axis=1).mean() < 0.7
    np.testing.assert_array_equal(noise, next(noisy.batches())["shared"]["sentence_noise"])
    np.testing.assert_array_equal(batch["items"]["ids"], other["items"]["ids"])
    params = plain.init(jax.random.key(0), batch)
    # At first the sentence has next to no say.
    params["head"] = jax.tree.map(lambda x: 20 * x, params["head"])
    losses = [
        jax.jit(x.loss)(params, y, jax.random.key(1), 0.0)[0]
        for x, y in ((plain, batch), (noisy, other))
    ]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("method", ["rcml", "clip"])
def test_unseen_sentences_stand_beside_those_of_training(catalogue, tmp_path, method):
    built = build(tiny_config(catalogue, method=method), tmp_path)
    graph = built.task.graph
    turned = tuple(zip(graph.relations, (f"{s} too" for s in graph.relations), strict=True))
    # The last sentences are those of the next relation, so that what they reach must differ.
    wrong = (*graph.relations[1:], graph.relations[0])
    said = tuple((*seen, kept) for seen, kept in zip(turned, wrong, strict=True))
    graph = dataclasses.replace(graph, paraphrases=said, held_out=1).validate()
    built.task = dataclasses.replace(built.task, graph=graph)
    assert {built.task.sentence(3, k) for k in range(6)} == set(turned[3])
    assert built.task.sentences == list(graph.relations)
    batch = next(built.batches())
    params = built.init(jax.random.key(0), batch)
    tables, needed = {}, np.ones((22, 60), bool)
    for name, sentences in (("seen", None), ("kept", wrong)):
        found = built.tables(params, np.arange(60), needed, sentences)
        tables[name] = found["sentence" if method == "clip" else "relation"]
    # Under the next relation's sentence is what the next relation had.
    np.testing.assert_allclose(tables["kept"].text[0], tables["seen"].text[1], atol=1e-5)
    assert not np.allclose(tables["kept"].relation[0], tables["seen"].relation[0], atol=1e-3)
    result = built.evaluate(params)
    (unseen,) = result["unseen_sentences"]
    check_tasks(unseen["retrieval"], unseen["relation_type"])
    assert unseen["retrieval"]["queries"] == result["retrieval"]["queries"]
    # Without relation text there is nothing to say in other words.
    plain = tiny_config(catalogue, method=method, data__relation_text=False)
    built.config = plain
    assert built._unseen_sentences(params, np.arange(60), needed, None) == []


@pytest.mark.parametrize("disjoint", ["pair", "item", "relation"])
def test_masks_know_training_pairs_only(catalogue, tmp_path, disjoint):
    """Under a pair split the mask of the whole graph would give test pairs away."""
    options = {"data.disjoint": disjoint, "batch.relations": 2}
    task = build(tiny_config(catalogue, **options), tmp_path).task
    known = task.known_graph()
    train, test = task.splits.pairs("train"), task.splits.pairs("test")
    assert len(test) > 0
    assert known.related_values(train[:, 0], train[:, 1]).all()
    assert known.linked(*train.T).all()
    if disjoint == "item":  # no test pair has two training items
        assert not np.isin(task.splits.items("test"), task.splits.items("train")).any()
        return
    assert not known.linked(*test.T).any()
    units = {tuple(pair) for pair in train[:, :2].tolist()}
    hidden = [tuple(pair) not in units for pair in test[:, :2].tolist()]
    assert not known.related_values(test[hidden, 0], test[hidden, 1]).any()
    plan = next(task.batches())["shared"]
    assert plan["related"].shape == (16, 16)


def test_negatives_under_the_pairs_own_relation(catalogue, tmp_path):
    options = {"loss.negatives": "unlinked", "batch.relations": 2}
    method = build(tiny_config(catalogue, **options), tmp_path)
    batch = next(method.task.batches())
    shared = batch["shared"]
    assert shared["related"].shape == (3, 16, 16)
    np.testing.assert_array_equal(shared["related"][0], np.eye(16, dtype=bool))
    one = next(build(tiny_config(catalogue, **{"batch.relations": 2}), tmp_path).task.batches())
    any_relation = one["shared"]["related"]
    assert not (shared["related"] & ~any_relation).any()
    assert (any_relation & ~shared["related"].any(axis=0)).any()
    params = method.init(jax.random.key(0), batch)
    loss, metrics = method.loss(params, batch, jax.random.key(1), 0.0)
    assert np.isfinite(loss)
    assert metrics["pairs"] > 0
    with pytest.raises(UserError, match="negatives='none' is unknown"):
        validate(tiny_config(catalogue, **{"loss.negatives": "none"}))


def test_the_weights_of_the_loss(catalogue, tmp_path):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 16, 4, 6))
    z = jnp.asarray(z / np.linalg.norm(z, axis=-1, keepdims=True), jnp.float32)
    embedded = {"text": z[0], "image": z[1]}
    for intra, identification in ((0.0, 0.0), (0.5, 0.0), (0.25, 2.0)):
        options = {"loss.intra_modal_weight": intra, "loss.identification_weight": identification}
        method = build(tiny_config(catalogue, **options), tmp_path)
        batch = next(method.batches())
        loss, terms = method.objective({}, embedded, batch, 0.0)
        expected = (terms["ti"] + terms["it"]) / 2 + intra * (terms["tt"] + terms["ii"])
        assert terms["tt"] > 0
        if identification:
            expected += identification * terms["identification"]
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def pretrained(catalogue, tmp_path_factory):
    """A checkpoint directory of a CLIP, with its tokenizer beside it."""
    folder = tmp_path_factory.mktemp("pretrained")
    graph = load_folder(catalogue, cache_of(catalogue), log=lambda line: None)
    tokenizer = train_tokenizer([*graph.texts, *graph.relations], 300)
    sizes = {"width": 16, "layers": 1, "heads": 2, "embed_dim": 12, "image_size": 24}
    config = small_clip_config(
        vocab_size=300, eos_token_id=tokenizer.end_id, patch_size=8, max_length=12, **sizes
    )
    save_checkpoint(make_model(config, seed=3), folder, layout="flax")
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.mark.slow
def test_a_pretrained_directory_is_trained_on(catalogue, pretrained, tmp_path):
    options = {"steps": 2, "validate_every": 2, "model.pretrained": str(pretrained)}
    options |= {"optimizer.learning_rate": 1e-12, "model.dtype": "bfloat16"}
    assert train(tiny_config(catalogue, **options), tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert np.isfinite(lines[0]["loss"])
    assert 0 <= lines[1]["hit@5/avg"] <= 1
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (
        pretrained / "tokenizer.json"
    ).read_text()
    # At so small a rate the towers are still those of the checkpoint, in their own sizes.
    towers = read_params(tmp_path / "run")["towers"]
    theirs = msgpack_restore((pretrained / "flax_model.msgpack").read_bytes())
    assert towers["visual_projection"]["kernel"].shape == (16, 12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), towers, theirs)
    # float32 parameters under bfloat16 computation.
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(towers))


def test_the_checkpoint_as_it_is_stands_beside_the_run(catalogue, pretrained, tmp_path):
    config = tiny_config(catalogue, method="clip", model__pretrained=str(pretrained))
    method = build(config, tmp_path)
    params = method.init(jax.random.key(0), next(method.batches()))
    result = method.evaluate(params)
    tasks = {"retrieval", "relation_type", "retrieval_all", "retrieval_random"}
    assert set(result["pretrained_clip"]) == tasks
    # The plain table is the control, and the control does not change with the parameters.
    frozen = result["controls"]["frozen_towers"]["retrieval"]["mrr"]
    for name, value in result["variants"]["plain"]["retrieval"]["mrr"].items():
        assert frozen[name] == pytest.approx(value, abs=0.02)
    check_rates(result["controls"]["frozen_towers_sentence"]["retrieval"]["hit@5"])
    for task, found in result["pretrained_clip"].items():
        assert found == result[task]
    changed = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)
    other = method.evaluate(changed)
    assert other["pretrained_clip"] == result["pretrained_clip"]
    assert other["retrieval"] != result["retrieval"]
    for name in ("frozen_towers", "frozen_towers_sentence"):
        assert other["controls"][name] == result["controls"][name]
    assert other["controls"]["query_only"] != result["controls"]["query_only"]


def test_a_pretrained_directory_sets_image_size_and_text_length(catalogue, pretrained, tmp_path):
    config = tiny_config(catalogue, model__pretrained=str(pretrained))
    batch = next(build(config, tmp_path).batches())
    assert batch["items"]["images"].shape == (16, 24, 24, 3)
    assert batch["items"]["ids"].shape[1] <= 12


@pytest.mark.parametrize("method", ["rcml", "clip"])
def test_packed_texts_are_evaluated_as_padded_ones(catalogue, tmp_path, method):
    """Thirty items: the last chunk of 32 is filled up, and packing changes the order."""
    options = {"method": method, "batch__size": 16}
    padded, packed = (
        build(tiny_config(catalogue, **options, batch__texts_per_row=k), tmp_path) for k in (1, 4)
    )
    params = padded.init(jax.random.key(0), next(padded.batches()))
    jax.tree.map(
        np.testing.assert_array_equal,
        params,
        packed.init(jax.random.key(0), next(packed.batches())),
    )
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    items = np.random.default_rng(0).permutation(60)[:30]
    rows, (texts, _) = packed.reader(items)(np.arange(30).repeat([1] * 29 + [3]))
    assert texts.ends.shape == (8, 4)
    assert not np.array_equal(rows, np.sort(rows))
    needed = np.ones((len(padded.task.sentences), len(items)), bool)
    ours, theirs = (m.tables(params, items, needed) for m in (packed, padded))
    assert list(ours) == list(theirs)
    for name, table in theirs.items():
        np.testing.assert_allclose(ours[name].text, table.text, atol=1e-5)
        np.testing.assert_allclose(ours[name].image, table.image, atol=1e-5)
    for a, b in zip(
        packed.own_embeddings(params, items), padded.own_embeddings(params, items), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)
    texts = [padded.task.graph.texts[i] for i in items[:5]]  # one more than a row has
    ours, theirs = (m.embedder(params, ["both kind1"]).text(texts) for m in (packed, padded))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
