"""Small vocabularies in the formats of CLIP's, SigLIP's and SigLIP 2's, without real word lists."""

import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

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


def write_siglip_vocabulary(folder: pathlib.Path, texts: Iterable[str]) -> pathlib.Path:
    """`spiece.model` with SigLIP's special ids, and the files that name its tokenizer."""
    import sentencepiece

    lines = [text.lower() for text in texts if text.strip() and "\0" not in text]
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            vocab_size=200,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    _write_configs(folder, "SiglipTokenizer")
    return folder


def write_siglip2_vocabulary(folder: pathlib.Path, texts: Iterable[str]) -> pathlib.Path:
    """`tokenizer.json` in the manner of Gemma's, which SigLIP 2 has."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_configs(folder, "GemmaTokenizer")
    return folder


def _write_configs(folder: pathlib.Path, tokenizer_class: str) -> None:
    config = {"tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip"}), "utf-8")
