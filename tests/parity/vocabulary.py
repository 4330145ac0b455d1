"""A small vocabulary in the format of CLIP's own: two files, and no real word list."""

import json
import pathlib

from tokenizers import pre_tokenizers

WORDS = (
    "red hearts heart both of them show a the same kind photo don 've ing 2024 ... !! été 漢字 🍎"
)


def write_vocabulary(folder: pathlib.Path, words: str = WORDS) -> pathlib.Path:
    """`vocab.json` and `merges.txt`: 256 bytes, the same at the end of a word, merges, specials.

    Each word is merged from its left, byte by byte, the last one with its "</w>".
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = {}
    for word in words.split():
        symbols = list(split.pre_tokenize_str(word)[0][0])
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            merges[symbols[0], symbols[1]] = None
            symbols[:2] = ["".join(symbols[:2])]
    tokens = [*alphabet, *(x + "</w>" for x in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder
