"""A tokenizer in the files that `transformers` reads."""

import json
import pathlib

import tokenizers
from tokenizers import processors

from rcml_jax.data.text import Tokenizer


def write_tokenizer_files(
    directory: pathlib.Path, tokenizer_json: pathlib.Path, max_length: int
) -> Tokenizer:
    """Write what `AutoTokenizer` and `CLIPProcessor` need to give the same ids as `Tokenizer`.

    `tokenizer.json` with start and end tokens around every text, `tokenizer_config.json`,
    `special_tokens_map.json` and, for CLIP's own vocabulary, `vocab.json` and `merges.txt`, so that
    `CLIPTokenizer` and `CLIPTokenizerFast` read it, too. Texts are cut at `max_length` tokens; one
    that spells a special token gets the signs' ids. Returns the tokenizer that was read.

    Raises:
      UserError: `tokenizer_json` is missing or damaged.
    """
    tokenizer = Tokenizer.load(tokenizer_json)
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
