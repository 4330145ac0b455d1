"""Write a trained run as a directory that `transformers` (PyTorch) loads as CLIP.

    rcml-export --workdir runs/rcml --to exported/rcml
    rcml-export --workdir runs/rcml --to exported/rcml --push user/name
    rcml-export --to exported/rcml --push user/name --public

The best checkpoint of a run of rcml, clip, siglip, unicl or declip, its tokenizer and image
processor in Hugging Face's files, RCML's head in `relation_pooling.safetensors`, and a model card,
`README.md`, with the figures and the code to use both in PyTorch. Needs neither torch nor the data
set. `--push` also pushes the directory to the Hugging Face hub, as whoever is logged in there (`hf
auth login`, or HF_TOKEN), into a repository that is made private unless `--public` is given;
without `--workdir` a directory that was written before. `rcml-embed`, `rcml-search` and the others
take the directory or `user/name` as their `--workdir`.
"""

import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import processors

from rcml_jax.cli.commands import guard, take_option
from rcml_jax.data.relation_graph import INTRA_RELATION
from rcml_jax.data.tokenizer import Tokenizer
from rcml_jax.errors import UserError
from rcml_jax.export.card import model_card
from rcml_jax.methods import RELATIONAL
from rcml_jax.parsing import user_path
from rcml_jax.remote import pulled
from rcml_jax.training.checkpoint import best_step, read_params
from rcml_jax.training.workdir import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Export the run that the command line names."""
    return guard(_export, argv, __doc__)


def _export(argv: Sequence[str]) -> int:
    workdir, rest = take_option(argv, "workdir")
    target, rest = take_option(["", *rest], "to")
    repository, rest = take_option(["", *rest], "push")
    public = "--public" in rest
    rest = [argument for argument in rest if argument != "--public"]
    if workdir is None and repository is None:
        raise UserError("the export needs --workdir, the work directory of a run")
    if target is None:
        raise UserError("the export needs --to, a new directory to write to")
    if rest:
        raise UserError(
            f"unknown argument {rest[0]!r}; the export takes --workdir, --to, --push and --public"
        )
    if public and repository is None:
        raise UserError("--public is for the repository of --push; give that, too")
    # Imported here, so that a wrong option is said before Hugging Face's classes are loaded.
    from rcml_jax.export.hub import check_push, push

    if repository is not None:
        check_push(repository)  # before the work
    if workdir is not None:
        export_run(pulled(workdir), target)
        files = ", ".join(sorted(path.name for path in user_path(target).iterdir()))
        print(f"{target}: {files}")
    if repository is not None:
        print(push(user_path(target), repository, public=public))
    return 0


def write_tokenizer_files(
    directory: pathlib.Path, tokenizer_json: pathlib.Path, max_length: int
) -> Tokenizer:
    """Write what `AutoTokenizer` and `CLIPProcessor` need to give the same ids as `Tokenizer`.

    `tokenizer.json` with start and end tokens around every text, `tokenizer_config.json`,
    `special_tokens_map.json` and, for CLIP's own vocabulary, `vocab.json` and `merges.txt`, so that
    `CLIPTokenizer` and `CLIPTokenizerFast` read it, too. Texts are cut at `max_length` tokens; one
    that spells a special token gets the signs' ids. Returns the tokenizer that was read.

    Raises:
      UserError: `tokenizer_json` is missing or damaged, or has no start token.
    """
    tokenizer = Tokenizer.load(tokenizer_json)
    if tokenizer.start_id is None:
        raise UserError(
            f"the tokenizer {tokenizer_json} has no start token, as SigLIP's; only runs "
            "of CLIP's own towers are exported"
        )
    backend = tokenizers.Tokenizer.from_str(tokenizer_json.read_text("utf-8"))
    start, end, pad = (
        backend.id_to_token(i) for i in (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id)
    )
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B {end}",
        special_tokens=[(start, tokenizer.start_id), (end, tokenizer.end_id)],
    )
    state = json.loads(backend.to_str())
    special = {"bos_token": start, "eos_token": end, "pad_token": pad}
    if state["model"].get("unk_token"):
        special["unk_token"] = state["model"]["unk_token"]
    is_clip = start == "<|startoftext|>" and state["model"].get("end_of_word_suffix") == "</w>"
    settings = {
        "tokenizer_class": "CLIPTokenizer" if is_clip else "PreTrainedTokenizerFast",
        **special,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "split_special_tokens": True,
        # transformers sets the pre-tokenizer to what this says.
        "add_prefix_space": bool((state["pre_tokenizer"] or {}).get("add_prefix_space", False)),
        "clean_up_tokenization_spaces": False,
    }
    if is_clip:
        backend.model.save(str(directory))
    _write(directory / "tokenizer.json", state)
    _write(directory / "tokenizer_config.json", settings)
    _write(directory / "special_tokens_map.json", special)
    return tokenizer


def _write(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


_MATRICES = ("query", "key", "value", "output", "gate")


def export_run(workdir: pathlib.Path | str, target: pathlib.Path | str) -> None:
    """Write the best checkpoint of a work directory to a new directory, whole or not at all.

    Raises UserError for a run of another method or of towers that are not CLIP's, for one that is
    not finished, and where the target is not empty or cannot be written.
    """
    workdir, target = user_path(workdir), user_path(target).resolve()
    config = load_config(workdir)
    if config.method not in RELATIONAL:
        raise UserError(
            f"{workdir} is a run of {config.method}; only the towers of {', '.join(RELATIONAL)} "
            "are exported"
        )
    _check_finished(workdir, config.steps)
    _check_free(target)
    result = _read_result(workdir)
    params, step = read_params(workdir), best_step(workdir)
    with _new_directory(target) as directory:
        _write_files(directory, workdir, config, params, result, step)


def _check_finished(workdir: pathlib.Path, steps: int) -> None:
    """An evaluated run may be exported, and one that was trained to its last step."""
    saved = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
    if saved and max(saved) < steps and not (workdir / "eval.json").is_file():
        raise UserError(
            f"{workdir} is not finished: it stands at step {max(saved)} of {steps}; train it on "
            f"with rcml-train, or score what there is: rcml-eval --workdir {workdir}"
        )


def _read_result(workdir: pathlib.Path) -> dict | None:
    path = workdir / "eval.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); make it again: rcml-eval --workdir {workdir}"
        ) from error


def _check_free(target: pathlib.Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists already; give --to a new or an empty directory")


@contextlib.contextmanager
def _new_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory beside the target that takes its name in the end, or is removed."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {target}: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_files(
    directory: pathlib.Path,
    workdir: pathlib.Path,
    config: Any,
    params: Any,
    result: dict | None,
    step: int | None,
) -> None:
    # Imported here, so that a wrong option is said before Hugging Face's classes are loaded.
    from rcml_jax.export.towers import save_clip
    from rcml_jax.tasks.towers import inputs, towers_config

    temperature = _temperature(config, params)
    taken = inputs(config.model)
    path = workdir / "tokenizer.json"
    tokenizer = write_tokenizer_files(directory, path, taken.max_length)
    save_clip(
        directory,
        towers_config(config.model, tokenizer),
        params["towers"],
        start_id=tokenizer.start_id,
        end_id=tokenizer.end_id,
        pad_id=tokenizer.pad_id,
        temperature=temperature,
        framing=taken.framing,
        about={"method": config.method, "step": step},
    )
    if config.method == "rcml":
        _save_head(directory / "relation_pooling.safetensors", config.model, params["head"])
    card = model_card(config, params, result, temperature=temperature)
    card.save(directory / "README.md")
    # safetensors lets nobody else read its files.
    mode = (directory / "README.md").stat().st_mode
    for path in directory.iterdir():
        path.chmod(mode)


def _temperature(config: Any, params: Any) -> float:
    """The loss's temperature, learned or fixed."""
    if "log_temperature" in params:
        return float(np.exp(params["log_temperature"]))
    return config.loss.temperature


def _save_head(path: pathlib.Path, options: Any, head: Any) -> None:
    """The head's matrices and its prior; what is not learned, as JSON in the file's metadata."""
    tensors = {name: np.asarray(head[name], np.float32) for name in _MATRICES if name in head}
    prior = head.get("pooled_prior", options.pooled_prior)
    tensors["pooled_prior"] = np.asarray(prior, np.float32)
    fixed = {
        "beta": options.beta,
        "pooled_logit": options.pooled_logit,
        "intra_relation": INTRA_RELATION,
    }
    # One key: the file format has no order of several, and the same run is the same file.
    save_file(tensors, path, metadata={"options": json.dumps(fixed)})


if __name__ == "__main__":
    sys.exit(main())
