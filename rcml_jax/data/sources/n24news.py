"""N24News: news images with a headline, a caption, an abstract and an article, 24 sections.

From github.com/billywzh717/N24News (Wang et al., LREC 2022). Layout of the directory:

- `news/nytimes_train.json`, `nytimes_dev.json`, `nytimes_test.json`: a list of records with
  `headline`, `caption`, `abstract`, `article`, `section` and `image_id`;
- `imgs/<image_id>.jpg`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rcml_jax.data import N24NEWS_TEXTS, imagetext
from rcml_jax.data.classification import ClassificationData
from rcml_jax.errors import UserError
from rcml_jax.parsing import TextGate, read_json

NAME = "n24news"
_FILES = tuple(f"news/nytimes_{part}.json" for part in ("train", "dev", "test"))  # as SPLITS
_REMEDY = (
    "get N24News from github.com/billywzh717/N24News, so that DIRECTORY/news has "
    "nytimes_train.json, nytimes_dev.json and nytimes_test.json and DIRECTORY/imgs the images "
    "<image_id>.jpg, and name it with --config m3col:n24news,path=DIRECTORY"
)


def from_config(data: Any, cache: Path) -> ClassificationData:
    """The data of `config.data`: `path`, `text` and `strict`."""
    return load(data.path, text=data.text, strict=data.strict, cache=cache)


def load(
    directory: str | Path,
    *,
    text: str = "headline",
    strict: bool = False,
    cache: str | Path | None = None,
    log: Callable[[str], None] | None = None,
) -> ClassificationData:
    """The images, one of the texts of N24NEWS_TEXTS, and the section as the class.

    Modalities: "image" (files, opened when they are asked for) and "text". The classes are the
    sections of the train file, sorted; dev is the validation split. Records without an image
    that can be decoded, or with an empty text, are skipped and counted in one line to `log`
    (default: standard error); with `strict` they are an error. What was found out about the
    images is kept in `cache`, if one is given.

    Raises:
      UserError: another `text`, a missing or malformed file, a record that lacks a field, a
        section that train lacks, or a split with more than half of its images missing.
    """
    if text not in N24NEWS_TEXTS:
        raise UserError(f"N24News has no text {text!r}; choose one of {', '.join(N24NEWS_TEXTS)}.")
    folder = imagetext.require_files(directory, _FILES, title="N24News", remedy=_REMEDY)
    gate, records = TextGate(strict), []
    for split, name in enumerate(_FILES):
        for number, entry in enumerate(_read(folder / name), 1):
            where = f"{name}, record {number}"
            section = _value(entry, "section", where, gate)
            if not section:
                raise UserError(f"{where}: 'section' is empty; fill it in or remove the record.")
            image = folder / "imgs" / f"{_value(entry, 'image_id', where, gate)}.jpg"
            records.append(
                imagetext.Record(
                    where=where,
                    split=split,
                    label=section,
                    image=str(image),
                    text=_value(entry, text, where, gate),
                    text_from=repr(text),
                )
            )
    return imagetext.assemble(
        NAME,
        records,
        label_field="section",
        images=str(folder / "imgs" / "<image_id>.jpg"),
        texts=f"in the field {text!r} (or choose another of {', '.join(N24NEWS_TEXTS)})",
        gate=gate,
        cache=cache,
        log=log,
    )


def _read(path: Path) -> list:
    with imagetext.reading(path):
        content = path.read_text("utf-8-sig")
    try:
        entries = read_json(content)
    except ValueError as error:  # ValueError's text has line and column
        raise UserError(f"{path} is malformed JSON ({error}); get the file anew.") from error
    if not isinstance(entries, list):
        raise UserError(f"{path} is no list of records ([{{...}}, ...]); get the file anew.")
    return entries


def _value(entry: Any, field: str, where: str, gate: TextGate) -> str:
    """A field as text, empty for null."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no JSON object; write {{...}} for every record.")
    if field not in entry:
        raise UserError(f"{where} has no {field!r}; add the field or remove the record.")
    value = "" if entry[field] is None else entry[field]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: {field!r} is neither text nor a number; correct it.")
    return gate(str(value), f"{where}, {field!r}").strip()
