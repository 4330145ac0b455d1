"""Untrained runs of the toy catalogue, made once: whole work directories for the report."""

import pytest

from rcml_jax.cli.report import main
from rcml_jax.report.runs import Models, read_sources
from tests.report.runs import (
    classification_lines,
    classification_result,
    relational_lines,
    relational_result,
    small_config,
    with_controls,
    write_relational,
    write_run,
)


@pytest.fixture(scope="session")
def rcml_dir(catalogue, tmp_path_factory):
    return write_relational(tmp_path_factory.mktemp("report") / "rcml", catalogue)


@pytest.fixture(scope="session")
def clip_dir(catalogue, tmp_path_factory):
    return write_relational(tmp_path_factory.mktemp("report") / "clip", catalogue, "clip")


@pytest.fixture(scope="session")
def opened(rcml_dir):
    """The RCML run with its model."""
    return Models().open(read_sources([rcml_dir]).runs[0])


@pytest.fixture(scope="session")
def opened_clip(clip_dir):
    return Models().open(read_sources([clip_dir]).runs[0])


def open_untrained(catalogue, path, method, **options):
    directory = write_relational(path, catalogue, method, **options)
    return Models().open(read_sources([directory]).runs[0])


@pytest.fixture(scope="session")
def opened_siglip(catalogue, tmp_path_factory):
    return open_untrained(catalogue, tmp_path_factory.mktemp("report") / "siglip", "siglip")


@pytest.fixture(scope="session")
def opened_declip(catalogue, tmp_path_factory):
    return open_untrained(catalogue, tmp_path_factory.mktemp("report") / "declip", "declip")


@pytest.fixture(scope="session")
def opened_frozen(catalogue, tmp_path_factory):
    """RCML on towers of two layers, of which the one of texts is frozen."""
    options = {"model__layers": 2, "model__freeze": "text"}
    path = tmp_path_factory.mktemp("report") / "frozen"
    return open_untrained(catalogue, path, "rcml", **options)


@pytest.fixture(scope="session")
def without_models(tmp_path_factory):
    """Directories of which a report needs no model: two runs, a classifier, a sweep, a study."""
    folder = tmp_path_factory.mktemp("report")
    for method in ("rcml", "clip"):
        result = relational_result(method)
        result = with_controls(result) if method == "rcml" else result
        write_run(folder / method, small_config(method), result, relational_lines())
    kinds = {"image": "image", "text": "text"}
    result = classification_result(kinds=kinds)
    write_run(folder / "m3col", small_config("m3col"), result, classification_lines())
    for beta in (0.0, 0.5, 1.0):
        config = small_config(model__beta=beta)
        write_run(folder / "beta" / f"{beta}" / "seed42", config, relational_result(base=beta / 2))
    study = {"method": "alignment", "precision": {}, "modality_gap": {}, "protocol": {"seed": 42}}
    write_run(folder / "study", small_config("alignment"), study)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def report(without_models, tmp_path_factory):
    """The page of runs without checkpoints."""
    out = tmp_path_factory.mktemp("report") / "out & about"
    return write_report(out, without_models.values())


@pytest.fixture(scope="session")
def whole_report(without_models, rcml_dir, clip_dir, tmp_path_factory):
    """The page with everything that is computed from the models of RCML and CLIP."""
    out = tmp_path_factory.mktemp("report") / "out & about"
    found = without_models | {"rcml": rcml_dir, "clip": clip_dir}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rcml_jax.report.relational.KINDS", 12)  # more items than t-SNE needs
        patch.setattr("rcml_jax.report.runs.REPEATS", 2)
        return write_report(out, found.values())


def write_report(out, workdirs):
    arguments = [part for path in workdirs for part in ("--workdir", str(path))]
    assert main(["report", *arguments, "--out", str(out)]) == 0
    return out
