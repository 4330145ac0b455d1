"""Made-up data for M3CoL: tables of two classes, and configurations of seconds."""

import importlib.util
import pathlib

import numpy as np
import pytest

from tests.toy import ROOT

CONFIG = ROOT / "configs" / "m3col.py"
VIEWS, ROWS = (6, 5, 4), {"tr": 40, "te": 20}
TABLES = {
    "epochs": 12,
    "validate_epochs": 3,
    "checkpoint_every": 6,
    "log_every": 3,
    "seeds": 2,
    "devices": 1,
    "model.width": 16,
    "model.dropout": 0.0,
    "optimizer.learning_rate": 3e-2,
    "optimizer.step_size": 6,
}
NEWS = {
    "epochs": 4,
    "devices": 1,
    "batch.size": 4,
    "micro_batch": 0,
    "model.image_pretrained": "",
    "model.text_pretrained": "",
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.image_size": 16,
    "model.patch_size": 8,
    "model.vocab_size": 300,
    "model.max_length": 16,
}


def configuration(source, options):
    spec = importlib.util.spec_from_file_location("m3col_config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(source)
    config.update_from_flattened_dict(options)
    return config


def write_tables(folder):
    """Two classes, seen a little in each of three views, in the layout of MOGONET."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, rows in ROWS.items():
        labels = np.arange(rows) % 2
        np.savetxt(folder / f"labels_{part}.csv", labels)
        for view, columns in enumerate(VIEWS, 1):
            table = rng.normal(size=(rows, columns)) + labels[:, None]
            np.savetxt(folder / f"{view}_{part}.csv", table, delimiter=",")
    return folder


def omics_config(tables, *, source="rosmap", **options):
    values = {"data.path": str(tables)} | TABLES
    values |= {name.replace("__", "."): value for name, value in options.items()}
    return configuration(source, values)


def news_config(news, **options):
    values = {"data.path": str(news), "data.dir": str(pathlib.Path(news).parent / "cache")} | NEWS
    values |= {name.replace("__", "."): value for name, value in options.items()}
    return configuration("n24news", values)


def check_summary(summary, count):
    assert "accuracy" in summary
    for name, measure in summary.items():
        if name == "which":
            continue
        assert set(measure) == {"mean", "std", "values"}, name
        assert len(measure["values"]) == count
        assert measure["mean"] == pytest.approx(np.mean(measure["values"]))
        assert 0 <= measure["mean"] <= 1
