"""Texts to token ids: a small trainable tokenizer, and those of pretrained checkpoints."""

import hashlib
import importlib.util
import json
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from rcml_jax.data.packing import LENGTHS
from rcml_jax.data.stages import mapped_rows
from rcml_jax.errors import UserError
from rcml_jax.files import write_whole
from rcml_jax.log import log_line

# The end id must not be 2: Hugging Face's CLIP takes `eos_token_id == 2` for an old checkpoint
# and then looks for the highest id instead of the end token.
SPECIAL_TOKENS = ("<pad>", "<start>", "<unused>", "<end>")
# The names of the start, end and padding tokens in our own, CLIP's, BERT's, RoBERTa's, SigLIP 2's
# and SigLIP's files; "": texts have no start token.
_KNOWN = (
    ("<start>", "<end>", "<pad>"),
    ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>"),
    ("[CLS]", "[SEP]", "[PAD]"),
    ("<s>", "</s>", "<pad>"),
    ("", "<eos>", "<pad>"),
    ("", "</s>", "</s>"),
)
# What hides a token, in BERT's, RoBERTa's and SigLIP 2's, our own, CLIP's and SigLIP's files.
_MASKS = ("[MASK]", "<mask>", "<unused>", "<|startoftext|>", "<unk>")
_BY_TRANSFORMERS = ("siglip",)  # model types whose normalisation is not in tokenizer.json alone
_MEMO_TEXTS = 500_000
_TEXTS_AT_ONCE = 10_000  # of which a digest is made
# CLIP's split into words, contractions, single digits and runs of signs.
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Texts to ids with a start and an end token, padded to one of a few fixed lengths.

    SigLIP's texts have no start token, and `start_id` is None. Wraps a `tokenizers.Tokenizer`; its
    own post-processing, padding and truncation are not used.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, source: str = "tokenizer"):
        for names in _KNOWN:
            ids: list = [tokenizer.token_to_id(name) if name else -1 for name in names]
            if None not in ids:
                break
        else:
            raise UserError(
                f"{source} has no known start, end and padding tokens; use a tokenizer of the "
                "CLIP, SigLIP or BERT family, or train one."
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # A text that spells "<end>" gets the signs' ids, not the token's.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        start, self.end_id, self.pad_id = ids
        self.start_id: int | None = start if start >= 0 else None
        self._memo: dict[str, np.ndarray] = {}

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the rows that an embedding table needs."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def mask_id(self) -> int:
        """The id that replaces a masked token in training.

        It is the mask token of BERT, RoBERTa or SigLIP 2, our own unused token, SigLIP's unknown
        token, or CLIP's start token, which stands nowhere else in a text. Raises UserError where
        there is none of them.
        """
        known = (self._tokenizer.token_to_id(name) for name in _MASKS)
        found = next((number for number in known if number is not None), self.start_id)
        if found is None:
            raise UserError(
                f"the tokenizer has no token to mask others with ({', '.join(_MASKS)}), which "
                "DeCLIP needs; use a tokenizer of the CLIP, SigLIP or BERT family"
            )
        return found

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """A tokenizer from a `tokenizer.json`; UserError where it is missing or damaged."""
        path = Path(path)
        try:
            return cls(tokenizers.Tokenizer.from_str(path.read_text("utf-8")), source=str(path))
        except FileNotFoundError:
            raise UserError(f"There is no tokenizer file {path}; check the path.") from None
        except UserError:
            raise
        except Exception as error:  # the Rust library raises plain Exception
            raise _damaged(path, error) from error

    @classmethod
    def from_pretrained_dir(cls, folder: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint: `tokenizer.json`, or CLIP's `vocab.json`, `merges.txt`.

        SigLIP's is read by transformers' `AutoTokenizer` and changes texts as in training: SigLIP's
        to lower case without ASCII punctuation, SigLIP 2's to lower case.

        Raises:
          UserError: the folder has neither, or a file is damaged.
        """
        folder = Path(folder)
        if _model_type(folder) in _BY_TRANSFORMERS:
            return cls(_by_transformers(folder), source=str(folder))
        if (folder / "tokenizer.json").is_file():
            return cls.load(folder / "tokenizer.json")
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        if not (vocab.is_file() and merges.is_file()):
            raise UserError(
                f"{folder} has neither tokenizer.json nor vocab.json with merges.txt; copy the "
                "checkpoint's tokenizer files into it."
            )
        return cls(_clip_tokenizer(vocab, merges), source=str(folder))

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that `load` reads back, whole or not at all."""
        write_whole(Path(path), self._tokenizer.to_str(pretty=True))

    def digest(self) -> str:
        """Changes with whatever this tokenizer makes of a text."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the special tokens."""
        special = {self.pad_id, self.start_id, self.end_id} - {None}
        kept = [int(i) for i in ids if int(i) not in special]
        text = self._tokenizer.decode(kept)
        if getattr(self._tokenizer.model, "end_of_word_suffix", None) == "</w>":
            text = text.replace("</w>", " ")  # CLIP's vocabulary has no decoder for it
        return text.strip()

    def encode(
        self, texts: Sequence[str], max_length: int, lengths: Sequence[int] = LENGTHS
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of texts, both (n, T) int32: start, the text, end, then padding.

        A text is cut so that start and end fit into `max_length`. T is the smallest of `lengths`
        (those above `max_length` are dropped, and `max_length` is always one) that fits the
        longest of the texts.
        """
        return self.frame(*self.bodies(texts, max_length), max_length, lengths)

    def bodies(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of texts without special tokens, padded with 0 (n, m), and their numbers (n,).

        m is what fits into `max_length` beside the start and end tokens.
        """
        if max_length < 2:
            raise UserError(f"A text length of {max_length} has no room for start and end tokens.")
        bodies = np.zeros((len(texts), max_length - (1 if self.start_id is None else 2)), np.int32)
        found = [body[: bodies.shape[1]] for body in self._bodies(texts)]
        for row, body in zip(bodies, found, strict=True):
            row[: len(body)] = body
        return bodies, np.array([len(body) for body in found], int)

    def frame(
        self,
        bodies: np.ndarray,
        counts: np.ndarray,
        max_length: int,
        lengths: Sequence[int] = LENGTHS,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `encode` returns for texts of which `bodies` (n, m) has the first `counts` (n,) ids.

        None has more than fit into `max_length`.
        """
        start = 0 if self.start_id is None else 1
        ends = counts + start
        longest = int(ends.max(initial=start)) + 1
        fixed = sorted({length for length in lengths if length < max_length} | {max_length})
        width = next(length for length in fixed if length >= longest)
        ids = np.full((len(bodies), width), self.pad_id, np.int32)
        columns = np.arange(width)
        # Both run through texts and their tokens in the same order.
        own = (columns >= start) & (columns < ends[:, None])
        ids[own] = bodies[np.arange(bodies.shape[1]) < counts[:, None]]
        if start:
            ids[:, 0] = self.start_id
        ids[np.arange(len(ids)), ends] = self.end_id
        return ids, (columns <= ends[:, None]).astype(np.int32)

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """Number of tokens of each text (n,) int64, uncut, with its start and end tokens."""
        around = 1 if self.start_id is None else 2
        return np.array([len(body) + around for body in self._bodies(texts)], np.int64)

    def encode_with_suffix(
        self,
        texts: Sequence[str],
        suffixes: Sequence[str],
        max_length: int,
        lengths: Sequence[int] = LENGTHS,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode` of "text. sentence", row by row, cut where the limit ends."""
        joined = [
            f"{text.rstrip().rstrip('.')}. {suffix}"
            for text, suffix in zip(texts, suffixes, strict=True)
        ]
        return self.encode(joined, max_length, lengths)

    def _bodies(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without special tokens, from memory where they are known."""
        memo = self._memo
        known = [memo.get(text) for text in texts]
        missing = list(dict.fromkeys(t for t, k in zip(texts, known, strict=True) if k is None))
        if not missing:
            return [k for k in known if k is not None]
        encodings = self._tokenizer.encode_batch_fast(missing, add_special_tokens=False)
        fresh = {
            text: np.array(encoding.ids, np.int32)
            for text, encoding in zip(missing, encodings, strict=True)
        }
        if len(memo) + len(fresh) > _MEMO_TEXTS:
            memo.clear()
        memo.update(fresh)
        return [fresh[t] if k is None else k for t, k in zip(texts, known, strict=True)]

    def __getstate__(self) -> dict:
        return {"tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict) -> None:
        Tokenizer.__init__(self, tokenizers.Tokenizer.from_str(state["tokenizer"]))


class StoredTexts:
    """Token ids of a task's texts, made once and mapped from a file, for items 0 to N − 1.

    Called with item numbers (n,) it returns what `Tokenizer.encode` does of their texts.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        max_length: int,
    ):
        """Open the file, or write what it lacks; its name has a digest of tokenizer and texts.

        Raises UserError where it cannot be written.
        """
        self._tokenizer, self._max_length = tokenizer, max_length
        rows = _TextRows(tokenizer, texts, max_length)
        digest = hashlib.sha256(f"{tokenizer.digest()} {max_length} {len(texts)}".encode())
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[start : start + _TEXTS_AT_ONCE]
            digest.update(json.dumps(part).encode())
        path = directory / f"{name}-{digest.hexdigest()[:16]}.npy"
        self._rows = mapped_rows(path, rows, log=log_line)

    def __call__(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of the texts of items (n,), both (n, T) int32."""
        rows = self._rows[items]
        return self._tokenizer.frame(rows[:, 1:], rows[:, 0].astype(int), self._max_length)


class _TextRows:
    """Of each text the number of its own tokens and their ids, as `stored_rows` takes rows."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], max_length: int):
        self._tokenizer, self._texts, self._max_length = tokenizer, texts, max_length
        self.shape = (1 + tokenizer.bodies([], max_length)[0].shape[1],)
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32

    def __len__(self) -> int:
        return len(self._texts)

    def block(self, start: int, stop: int) -> np.ndarray:
        bodies, counts = self._tokenizer.bodies(self._texts[start:stop], self._max_length)
        return np.concatenate([counts[:, None], bodies], axis=1)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer learned from texts: lower case, white space cleaned.

    The vocabulary has at most `vocab_size` entries: 4 special tokens, 256 bytes and the merges.
    The same texts give the same tokenizer.

    Raises:
      UserError: `vocab_size` is too small for the bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < least:
        raise UserError(f"A vocabulary of {vocab_size} is too small; use {least} at least.")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Lowercase(),
        ]
    )
    # The space before the first word: it then has the same ids as in the middle of a text.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer)


def _clip_tokenizer(vocab_path: Path, merges_path: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer, as transformers makes it of its two files."""
    from transformers import CLIPTokenizerFast

    try:
        is_clip = "<|startoftext|>" in json.loads(vocab_path.read_text("utf-8"))
        fast = CLIPTokenizerFast(str(vocab_path), str(merges_path)) if is_clip else None
    except Exception as error:  # the Rust library raises plain Exception
        raise _damaged(vocab_path.parent, error) from error
    if fast is None:
        raise UserError(
            f"{vocab_path} is not CLIP's vocabulary, and only CLIP's is read without a "
            "tokenizer.json; save the tokenizer again with save_pretrained."
        )
    # A copy: transformers changes how its own one decodes.
    return tokenizers.Tokenizer.from_str(fast.backend_tokenizer.to_str())


def _model_type(folder: Path) -> str:
    """What the checkpoint's `config.json` says it is, "" where it says nothing."""
    try:
        return str(json.loads((folder / "config.json").read_text("utf-8")).get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _by_transformers(folder: Path) -> tokenizers.Tokenizer:
    """A SigLIP's tokenizer: the fast one of a SigLIP 2, or one made of SigLIP's `spiece.model`."""
    from transformers import AutoTokenizer

    if (folder / "spiece.model").is_file() and not importlib.util.find_spec("sentencepiece"):
        raise UserError(
            "SigLIP's tokenizer needs a package that is missing; pip install 'rcml_jax[siglip]'."
        )
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer = getattr(found, "backend_tokenizer", None)
        if tokenizer is None:  # transformers has no fast tokenizer for SigLIP
            return _siglip_tokenizer(Path(found.vocab_file))
    except Exception as error:  # of many kinds
        raise _damaged(folder, error) from error
    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
    return tokenizer


def _siglip_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """SigLIP's SentencePiece model behind what `SiglipTokenizer` does to a text before."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # made at its import, which its types leave out
    model = messages.ModelProto.FromString(path.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, model.trainer_spec.unk_id, False))
    replace = lambda pattern, text: normalizers.Replace(tokenizers.Regex(pattern), text)  # noqa: E731
    charsmap = model.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("▁", " "),
            normalizers.Lowercase(),
            normalizers.Prepend("▁"),
            replace("[" + "".join(f"\\{sign}" for sign in string.punctuation) + "]", ""),
            replace(r"\s+", " "),
            *([normalizers.Precompiled(charsmap)] if charsmap else []),
            replace(" {2,}", " "),
            normalizers.Replace(" ", "▁"),
            replace(r"▁+\z", ""),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"The tokenizer in {path} is damaged ({error}); copy or train it anew.")
