"""The alignment study as a command: a file of embeddings, and towers that are trained first."""

import importlib.util
import json
import re

import numpy as np
import pytest

from rcml_jax.cli import commands
from rcml_jax.methods import alignment
from rcml_jax.models.frozen import load_towers
from rcml_jax.tasks import frozen_embeddings
from tests.data.imagetext import jpeg
from tests.data.sources.test_captions import write_flickr
from tests.models import towers
from tests.toy import ROOT, TINY, arguments, write_catalogue

CONFIG = ROOT / "configs" / "alignment.py"
SIMILARITIES = {"cosine", "dot", "euclidean", "manhattan", "chi_square"}
DIRECTIONS = {"image_to_text", "text_to_image"}
INTERVALS = {"r@1", "r@5", "r@10", "mrr", "map@10", "median_rank"}
MEASURES = {"p@1", "p@5", "p@10", "r@1", "r@5", "r@10", "mrr", "map@10", "median_rank", "queries"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Texts are their image turned by a rotation, moved and blurred: two texts an image."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(60, 8)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    rows = np.repeat(np.arange(60), 2)
    text = (image @ rotation)[rows] + 0.05 * rng.normal(size=(120, 8)) + 1.0
    path = tmp_path_factory.mktemp("embeddings") / "pairs.npz"
    np.savez(path, image=image, text=text.astype(np.float32), image_of_text=rows)
    return path


def run(file, workdir, *more):
    return commands.evaluate(
        ["eval", f"--config={CONFIG}:npz,path={file}", f"--workdir={workdir}", *more]
    )


def check_measures(measures):
    assert set(measures) == MEASURES | {"interval"}
    assert set(measures["interval"]) == INTERVALS
    assert all(0 <= measures[name] <= 1 for name in MEASURES - {"median_rank", "queries"})


def test_a_file_of_embeddings(file, tmp_path, capsys):
    learned = "--config.evaluation.learned=procrustes,cca,two_tower,mlp_mse"
    assert run(file, tmp_path / "run", learned) == 0
    out = capsys.readouterr().out
    for text in (
        "image to text on npz",
        "npz, cosine",
        "npz, procrustes (learned)",
        "modality gap",
    ):
        assert text in out
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert result["method"] == "alignment"
    assert set(result["sources"]) == {"npz"}
    assert set(result["precision"]) == DIRECTIONS
    for found in result["precision"].values():
        assert set(found) == SIMILARITIES
        for measures in found.values():
            check_measures(measures)
    assert {"centroid", "wasserstein2", "matched_cosine", "random_cosine", "effective_rank"} < set(
        result["modality_gap"]
    )
    assert set(result["calibration"]) == {"none", "centred", "whitened"}
    assert set(result["learned"]) == {"procrustes", "cca", "two_tower", "mlp_mse"}
    for found in (*result["learned"].values(), *result["calibration"].values()):
        for direction in DIRECTIONS:
            check_measures(found[direction])
    # The rotation is no secret to Procrustes, and none of the fixed similarities sees it.
    fixed = max(x["r@1"] for x in result["precision"]["image_to_text"].values())
    assert result["learned"]["procrustes"]["image_to_text"]["r@1"] > fixed + 0.3
    assert result["precision"]["image_to_text"]["cosine"]["queries"] == 12
    assert result["precision"]["text_to_image"]["cosine"]["queries"] == 24


def test_maps_by_pairs_over_seeds(file, tmp_path, capsys):
    options = {
        "learned": "procrustes,two_tower_sigmoid",
        "pair_counts": "20,40,9999",
        "learner_seeds": 2,
        "learner_steps": 20,
        "bootstrap": 0,
        "similarity": "cosine,euclidean",
        "negative_level": 0.9,
    }
    assert run(file, tmp_path, *(f"--config.evaluation.{k}={v}" for k, v in options.items())) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in ("before and after", "cone", "by similarity", "below zero", "training pairs", "± "):
        assert text in out, text
    result = json.loads((tmp_path / "eval.json").read_text())
    assert set(result["by_pairs"]) == {"procrustes", "two_tower_sigmoid"}
    for name, found in result["by_pairs"].items():
        assert set(found) == {"20", "40"}
        for row in found.values():
            assert row["seeds"] == [42, 43]
            for direction in DIRECTIONS:
                values = row[direction]["values"]["mrr"]
                assert len(values) == 2
                assert row[direction]["mrr"] == pytest.approx(np.mean(values))
                assert row[direction]["std"]["mrr"] == pytest.approx(np.std(values, ddof=1))
        learned = result["learned"][name]
        assert {"centroid", "wasserstein2"} < set(learned)
        assert set(learned["similarities"]) == {"cosine", "euclidean"}
        # The map's own score is the dot product of vectors of unit length; two seeds' mean.
        for found in learned["similarities"].values():
            for direction in DIRECTIONS:
                own = learned[direction]
                first = own["values"]["mrr"][0] if "values" in own else own["mrr"]
                assert found[direction]["mrr"] == pytest.approx(first)
    # In closed form all pairs give one result; 20 of them are enough for 8 dimensions.
    assert result["learned"]["procrustes"]["seeds"] == [42]
    assert result["by_pairs"]["procrustes"]["20"]["text_to_image"]["r@1"] > 0.8
    apart = result["calibration"]["none"]["wasserstein2"]
    assert result["learned"]["procrustes"]["wasserstein2"] < 0.5 * apart
    # Means are taken out before the maps; the logit's bias, -10, is no part of the gap.
    assert result["learned"]["two_tower_sigmoid"]["centroid"] < 0.8
    signed = result["signed"]
    spaces = {"cosine", "centred", "whitened", "csls", "centred_csls"}
    moved = [
        f"{name}, {space}"
        for name in ("procrustes", "two_tower_sigmoid")
        for space in spaces - {"cosine"}
    ]
    assert set(signed) == spaces | {"procrustes", "two_tower_sigmoid", *moved}
    for name, row in signed.items():
        # Fitted and looked at on twelve images each.
        assert row["unrelated_negative"]["shifted"] == pytest.approx(0.9, abs=0.15), name
        assert row["text_to_image"]["r@10"] > 0
    assert signed["cosine"]["unrelated_negative"]["plain"] < 0.9
    assert signed["procrustes"]["matched_positive"]["shifted"] > 0.9
    for direction in DIRECTIONS:
        same = result["precision"][direction]["cosine"]["r@10"]
        assert signed["cosine"][direction]["r@10"] == same


def evaluate(source, workdir, **options):
    options = {"evaluation.learned": "", "evaluation.similarity": "cosine"} | options
    values = [f"--config.{name.replace('__', '.')}={value}" for name, value in options.items()]
    return commands.evaluate(
        ["eval", f"--config={CONFIG}:{source}", f"--workdir={workdir}", *values]
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("clip", "vit", "bert"):
        (root / name).mkdir()
        getattr(towers, f"save_{name}")(root / name)
    return root


def test_captions_through_towers_of_checkpoints(checkpoints, tmp_path, capsys):
    words = ["a", "man", "is", "eating", "food"]

    def caption(number, place):
        return " ".join(words[(number // 5**i + place) % 5] for i in range(3))

    data = write_flickr(tmp_path / "flickr", karpathy=False, images=40, caption=caption)
    names = f"{checkpoints / 'clip'},{checkpoints / 'vit'}+{checkpoints / 'bert'}"
    source, workdir = f"flickr30k,path={data}", tmp_path / "run"
    assert evaluate(source, workdir, towers__names=names) == 0
    result = json.loads((workdir / "eval.json").read_text())
    assert list(result["sources"]) == ["clip", "vit+bert"]
    assert (result["images"], result["texts"], result["widths"]) == (8, 16, [8, 8])
    stored = sorted((workdir / "embeddings").glob("*/*.npy"))
    assert sorted(path.name for path in stored) == ["image.npy"] * 2 + ["text.npy"] * 2
    # Embedded once: what is stored is what is read.
    before = [path.stat().st_mtime_ns for path in stored]
    assert evaluate(source, workdir, towers__names=names, evaluation__gallery="all") == 0
    assert [path.stat().st_mtime_ns for path in stored] == before
    whole = json.loads((workdir / "eval.json").read_text())
    assert (whole["images"], whole["texts"]) == (40, 80)
    assert whole["precision"]["text_to_image"]["cosine"]["queries"] == 80
    assert whole["sources"]["clip"]["calibration"] == result["sources"]["clip"]["calibration"]
    # With another photograph under the same name the images are embedded anew, not the texts.
    (data / "flickr30k-images" / "3.jpg").write_bytes(jpeg(250))
    assert evaluate(source, workdir, towers__names=names) == 0
    assert len(list((workdir / "embeddings").glob("*/image.npy"))) == 4
    assert len(list((workdir / "embeddings").glob("*/text.npy"))) == 2
    assert [path.stat().st_mtime_ns for path in stored] == before
    assert "figures" in capsys.readouterr().out or not importlib.util.find_spec("matplotlib")


@pytest.mark.parametrize("names", ["clip", "vit+bert"])
def test_texts_without_their_padding_embed_the_same(checkpoints, names, monkeypatch):
    monkeypatch.setattr(frozen_embeddings, "_LENGTH_STEP", 2)
    paths = "+".join(str(checkpoints / name) for name in names.split("+"))
    tower = load_towers(paths)[1]
    texts = ["a man", "a man is eating food", "food"]
    blocks = frozen_embeddings.TextBlocks(tower, texts, tower.size)
    ids, mask = blocks._tokenizer.encode(texts, tower.size)
    assert 0 < mask.sum() < mask.size
    found = blocks.block(0, 3)
    assert found.shape == (3, tower.width)
    # Sums over fewer terms round otherwise.
    np.testing.assert_allclose(found, tower.embed(ids, mask), rtol=1e-4, atol=1e-4)


def test_a_run_of_ours_is_a_source(tmp_path):
    catalogue, trained = write_catalogue(tmp_path / "catalogue"), tmp_path / "trained"
    args = arguments(catalogue, trained, method="clip", steps=2, validate_every=2)
    assert commands.train(["train", *args]) == 0
    assert evaluate(f"runs,path={trained}", tmp_path / "study") == 0
    result = json.loads((tmp_path / "study" / "eval.json").read_text())
    assert list(result["sources"]) == ["trained"]
    assert result["widths"] == [16, 16]


@pytest.mark.skipif(not importlib.util.find_spec("optuna"), reason="no optuna")
def test_options_are_searched_by_the_first_seed(file, tmp_path, capsys):
    options = {"learned": "bilinear", "search_trials": 4, "learner_seeds": 2, "learner_steps": 9}
    options |= {"bootstrap": 0, "similarity": "cosine"}
    assert run(file, tmp_path, *(f"--config.evaluation.{k}={v}" for k, v in options.items())) == 0
    assert "4 of 4 trials" in capsys.readouterr().err
    found = json.loads((tmp_path / "eval.json").read_text())["learned"]["bilinear"]
    assert found["search"]["trials"] == 4
    assert set(found["options"]) == {"patience", "learning_rate", "weight_decay"}
    assert len(found["text_to_image"]["values"]["mrr"]) == 2


@pytest.mark.skipif(not importlib.util.find_spec("optuna"), reason="no optuna")
def test_options_are_fixed_by_name(file, tmp_path):
    fixed = "bilinear: learning_rate=2e-3,steps=7,batch_size=16; cca:shrinkage=0.5"
    options = {"learned": "bilinear,cca,two_tower", "learner_steps": 9, "bootstrap": 0}
    options |= {"learner_options": fixed, "similarity": "cosine", "pair_counts": "12,20"}
    for trials in (0, 2):
        asked = options | {"search_trials": trials}
        args = [f"--config.evaluation.{k}={v}" for k, v in asked.items()]
        assert run(file, tmp_path / str(trials), *args) == 0
        result = json.loads((tmp_path / str(trials) / "eval.json").read_text())
        by_pairs = {name: found["20"] for name, found in result["by_pairs"].items()}
        for found in (result["learned"], by_pairs):
            chosen = found["bilinear"]["options"]
            assert (chosen["learning_rate"], chosen["steps"], chosen["batch_size"]) == (2e-3, 7, 16)
            assert ("weight_decay" in chosen) == bool(trials)
            assert found["cca"]["grid"] == {"shrinkage": 0.5}
            assert "steps" not in found["two_tower"]["options"]
        assert result["by_pairs"]["bilinear"]["12"]["options"]["batch_size"] == 12
        assert result["learned"]["bilinear"]["validation"]["step"] in (0, 7)


def test_an_interrupted_study_goes_on(file, tmp_path, monkeypatch):
    options = ["--config.evaluation.learned=procrustes,cca", "--config.evaluation.pair_counts=20"]
    options += ["--config.evaluation.similarity=cosine"]
    copy, workdir = tmp_path / "pairs.npz", tmp_path / "study"
    copy.write_bytes(file.read_bytes())
    assert run(copy, tmp_path / "whole", *options) == 0
    original, asked = alignment._learned, []

    def learned(name, *rest, **more):
        asked.append((name, more.get("pairs")))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(name, *rest, **more)

    monkeypatch.setattr(alignment, "_learned", learned)
    assert run(copy, workdir, *options) == 130
    assert run(copy, workdir, *options) == 0
    assert asked == [("procrustes", None), ("procrustes", 20), *[("cca", None)] * 2, ("cca", 20)]
    one, two = ((tmp_path / name / "eval.json").read_text() for name in ("whole", "study"))
    assert one == two
    # Another similarity concerns what is fitted to all pairs alone.
    assert run(copy, workdir, *options[:-1], "--config.evaluation.similarity=dot,cosine") == 0
    assert asked[5:] == [("procrustes", None), ("cca", None)]
    # Other embeddings in the same file are fitted anew.
    pairs = dict(np.load(copy))
    np.savez(copy, **pairs | {"image": pairs["image"] + 1})
    assert run(copy, workdir, *options) == 0
    assert len(asked) == 11


def test_texts_that_share_an_image_share_its_row(tmp_path):
    animals = ("cat", "dog")
    caption = lambda n, k: f"a {animals[n % 2]}, caption {k} of {n}"  # noqa: E731
    copy = write_flickr(tmp_path / "copy", images=90, caption=caption)
    captions = json.loads((copy / "dataset_flickr30k.json").read_text())
    for number, entry in enumerate(captions["images"]):
        entry["split"] = ("train", "val", "test")[number % 3]
    (copy / "dataset_flickr30k.json").write_text(json.dumps(captions))
    small = TINY | {"batch.relations": 2, "steps": 2, "validate_every": 2, "method": "clip"}
    small |= {"data.disjoint": "item", "data.dir": tmp_path / "cache"}
    args = [f"--config.{key}={value}" for key, value in small.items()]
    config = f"--config={ROOT / 'configs' / 'rcml.py'}:flickr8k,path={copy}"
    trained = tmp_path / "trained"
    assert commands.train(["train", config, f"--workdir={trained}", *args]) == 0
    assert evaluate(f"runs,path={trained}", tmp_path / "study") == 0
    result = json.loads((tmp_path / "study" / "eval.json").read_text())
    assert (result["images"], result["texts"]) == (30, 60)
    found = alignment._runs(str(trained))["trained"]()
    for pairs in found:
        np.testing.assert_array_equal(pairs.image_of_text, np.repeat(np.arange(30), 2))


def test_the_same_study_again_is_the_same(file, tmp_path):
    options = ["--config.evaluation.learned=procrustes", "--config.evaluation.similarity=cosine"]
    for name in ("one", "two"):
        assert run(file, tmp_path / name, *options) == 0
    one, two = ((tmp_path / name / "eval.json").read_text() for name in ("one", "two"))
    assert one == two
    # A work directory of the study needs no configuration file.
    (tmp_path / "one" / "eval.json").unlink()
    assert commands.evaluate(["eval", f"--workdir={tmp_path / 'one'}"]) == 0
    assert (tmp_path / "one" / "eval.json").read_text() == two


def test_mistakes_are_one_sentence(file, tmp_path, capsys):
    broken = tmp_path / "broken.npz"
    arrays = dict(np.load(file))
    arrays["image"][3, 2] = np.nan
    np.savez(broken, **arrays)
    given = "--config.evaluation.learner_options"
    for args, text in (
        ((broken, tmp_path / "a"), "row 3"),
        ((tmp_path / "none.npz", tmp_path / "b"), "there is no file"),
        ((file, tmp_path / "c", "--config.evaluation.similarity=jaccard"), "choose all, or any"),
        ((file, tmp_path / "d", "--config.evaluation.learned=forest"), "choose all, or any"),
        ((file, tmp_path / "f", "--config.evaluation.pair_counts=50,no"), "whole numbers above 1"),
        ((file, tmp_path / "e", "--config.evaluation.memry_mb=1"), "memory_mb"),
        ((file, tmp_path / "g", f"{given}=forest:width=3"), "'forest', which is not among"),
        ((file, tmp_path / "h", f"{given}=cca:width=3;cca:width=4"), "names cca twice"),
        ((file, tmp_path / "m", f"{given}=cca:width=3,width=4"), "an option is given twice"),
        ((file, tmp_path / "n", f"{given}=cca:shrinkage=Infinity"), "must be a number"),
        ((file, tmp_path / "i", f"{given}=cca:width"), "is not of the form LEARNER:NAME=NUMBER"),
        ((file, tmp_path / "j", f"{given}=cca:width=x"), "is not of the form LEARNER:NAME=NUMBER"),
        (
            (file, tmp_path / "k", f"{given}=cca:widht=3"),
            "options, cca: option 'widht' is unknown",
        ),
        ((file, tmp_path / "l", f"{given}=cca:shrinkage=2"), "from 0 to 1"),
    ):
        assert run(*args) == 2
        check_error(capsys, text)


def check_error(capsys, text):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(text, err)


def test_mistakes_about_sources_are_one_sentence(checkpoints, tmp_path, capsys):
    for source, options, text in (
        ("flickr30k,path=x", {}, "needs towers"),
        ("flickr30k,path=x", {"towers.names": checkpoints / "clip"}, "There is no directory"),
        ("flickr8k,path=x", {"towers.names": checkpoints / "clip"}, "no directory x; get Flickr8k"),
        ("coco", {"towers.names": checkpoints / "vit"}, "no text tower"),
        ("openmoji", {"towers.names": "/no/such"}, "cannot load"),
        ("runs", {}, "needs a path"),
        ("runs,path=nowhere", {}, "train first"),
        ("npz,path=x", {"towers.names": "clip"}, "takes no towers"),
        ("npz,path=x", {"evaluation.gallery": "some"}, "choose one of test, all"),
        ("flicker", {}, "no data source 'flicker'"),
    ):
        assert evaluate(source, tmp_path / "run", **options) == 2
        check_error(capsys, text)
        assert not (tmp_path / "run" / "eval.json").exists()


def test_other_methods_take_no_configuration(tmp_path, capsys):
    args = ["eval", f"--config={ROOT / 'configs' / 'rcml.py'}", f"--workdir={tmp_path / 'run'}"]
    assert commands.evaluate(args) == 2
    assert "only for the alignment study" in capsys.readouterr().err


@pytest.mark.slow
def test_towers_are_trained_first(tmp_path):
    relational = {name: value for name, value in TINY.items() if not name.startswith("data.")}
    options = [
        f"--config.runs.{run}.{name}={value}"
        for run in ("rcml", "clip")
        for name, value in relational.items()
    ]
    classifier = {"epochs": 1, "devices": 1, "model.width": 16, "model.layers": 1, "model.heads": 2}
    classifier |= {"optimizer.warmup_steps": 1}
    options += [
        f"--config.runs.apart_{side}.{name}={value}"
        for side in ("image", "text")
        for name, value in classifier.items()
    ]
    args = ["eval", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", *options]
    assert commands.evaluate([*args, "--config.evaluation.learned=procrustes"]) == 0
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert list(result["sources"]) == ["rcml", "clip", "apart"]
    assert result["images"] == result["texts"] == 383
    runs = sorted(path.name for path in (tmp_path / "run" / "runs").iterdir())
    assert runs == ["apart_image", "apart_text", "clip", "rcml"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image": lambda x: np.where(np.arange(60)[:, None] == 3, 0, x)}, "only zeros.*row 3"),
        ({"text": lambda x: np.where(np.arange(120)[:, None] == 5, np.inf, x)}, "row 5"),
        ({"image_of_text": lambda x: np.where(x == 7, 8, x)}, "no relevant item: image 7"),
        ({"image_of_text": lambda x: np.where(x == 7, 77, x)}, r"image_of_text\[14\] is 77"),
        ({"image_of_text": lambda x: x[:9]}, "one integer for each"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_by_its_own_rows(file, change, text, tmp_path, capsys):
    arrays = {name: change.get(name, lambda x: x)(x) for name, x in np.load(file).items()}
    broken = tmp_path / "broken.npz"
    np.savez(broken, **arrays)
    assert run(broken, tmp_path / "run") == 2
    check_error(capsys, text)
