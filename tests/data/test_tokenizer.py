import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, CLIPTokenizerFast

from rcml_jax.data.packing import LENGTHS
from rcml_jax.data.tokenizer import SPECIAL_TOKENS, StoredTexts, Tokenizer, train_tokenizer
from rcml_jax.errors import UserError
from tests.parity.vocabulary import write_siglip2_vocabulary

TEXTS = [
    "red heart",
    "smiling face with heart-eyes",
    "flag: São Tomé & Príncipe",
    "both of them show a heart",
    "they are the same kind of thing: food fruit",
] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


def test_special_tokens_have_fixed_ids(tokenizer):
    assert (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id) == (0, 1, 3)
    assert SPECIAL_TOKENS[tokenizer.end_id] == "<end>"
    assert tokenizer.end_id != 2
    assert tokenizer.vocab_size <= 320


def words(*names):
    return Tokenizer(tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)})))


def test_the_mask_is_neither_end_nor_padding(tokenizer):
    assert SPECIAL_TOKENS[tokenizer.mask_id] == "<unused>"
    assert words("<|startoftext|>", "<|endoftext|>").mask_id == 0
    assert words("[PAD]", "[CLS]", "[SEP]", "[MASK]").mask_id == 3
    assert words("[PAD]", "[CLS]", "[SEP]").mask_id == 1  # the start token
    assert words("<pad>", "<eos>", "<mask>").mask_id == 2
    assert words("</s>", "<pad>", "<unk>").mask_id == 2
    with pytest.raises(UserError, match=r"no token to mask others with .* which DeCLIP needs"):
        _ = words("<pad>", "<eos>").mask_id


def test_texts_come_back_lower_cased_with_clean_spaces(tokenizer):
    ids, mask = tokenizer.encode(["  Red \n HEART ", "São 漢字 🍎", ""], 77)
    assert [tokenizer.decode(row) for row in ids] == ["red heart", "são 漢字 🍎", ""]
    for row, keep in zip(ids, mask, strict=True):
        length = keep.sum()
        assert row[0] == tokenizer.start_id
        assert row[length - 1] == tokenizer.end_id
        assert np.all(row[length:] == tokenizer.pad_id)
        assert np.all(keep == (np.arange(len(row)) < length))
    assert ids.dtype == mask.dtype == np.int32


def test_a_text_cannot_spell_a_special_token(tokenizer):
    ids, _ = tokenizer.encode(["a <end> b <pad> <start>"], 77)
    assert np.sum(ids == tokenizer.end_id) == 1
    assert np.sum(ids == tokenizer.start_id) == 1
    assert tokenizer.decode(ids[0]) == "a <end> b <pad> <start>"


def test_the_end_is_kept_under_truncation(tokenizer):
    long = " ".join(["heart"] * 200)
    ids, mask = tokenizer.encode([long, "red"], 12)
    assert ids.shape == (2, 12)
    assert ids[0, -1] == tokenizer.end_id
    assert mask[0].all()
    whole, _ = tokenizer.encode([long], 300)
    np.testing.assert_array_equal(ids[0, :-1], whole[0, :11])
    with pytest.raises(UserError, match="no room"):
        tokenizer.encode(["red"], 1)


def test_the_width_is_the_smallest_fixed_length_that_fits(tokenizer):
    one = len(tokenizer._bodies(["heart"])[0])
    assert one == 1
    for words in range(0, 90):
        ids, _ = tokenizer.encode([" ".join(["heart"] * words), "red"], 77)
        fits = [n for n in LENGTHS if n >= min(max(words, 1) + 2, 77)]
        assert ids.shape[1] == fits[0]
    assert tokenizer.encode(["heart " * 30], 20)[0].shape[1] == 20
    assert tokenizer.encode(["heart " * 17], 20)[0].shape[1] == 20
    assert tokenizer.encode(["heart"], 20, lengths=())[0].shape[1] == 20
    assert tokenizer.encode([], 20)[0].shape == (0, 8)


def test_the_suffix_is_cut_where_the_limit_ends(tokenizer):
    ids, _ = tokenizer.encode_with_suffix(["red heart", "Face."], ["both of them", "thing"], 77)
    assert tokenizer.decode(ids[0]) == "red heart. both of them"
    assert tokenizer.decode(ids[1]) == "face. thing"
    cut, _ = tokenizer.encode_with_suffix(["red heart"], ["both of them " * 50], 8)
    np.testing.assert_array_equal(cut[0, :7], ids[0, :7])
    assert cut[0, 7] == tokenizer.end_id


def test_training_is_deterministic_and_the_memory_changes_nothing(tokenizer):
    again = train_tokenizer(TEXTS, 320)
    for _ in range(2):
        for a, b in zip(tokenizer.encode(TEXTS, 32), again.encode(TEXTS, 32), strict=True):
            np.testing.assert_array_equal(a, b)
    assert again._tokenizer.to_str() == tokenizer._tokenizer.to_str()
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(TEXTS, 100)


def test_save_load_and_pickle(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    texts = [*TEXTS, "an <end> in a text"]
    expected = tokenizer.encode(texts, 32)[0]
    for copy in (
        Tokenizer.load(tmp_path / "tokenizer.json"),
        Tokenizer.from_pretrained_dir(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        np.testing.assert_array_equal(copy.encode(texts, 32)[0], expected)
        assert copy.vocab_size == tokenizer.vocab_size
        assert copy.end_id == tokenizer.end_id


def words_alone(size):
    """A tokenizer without a start token, as SigLIP's, whose ids end at a number."""
    vocabulary = {"<eos>": 0, "<pad>": 1, "heart": 2, "red": size - 1}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(model)


@pytest.mark.parametrize(("size", "dtype"), [(0, np.uint16), (2**16, np.uint16), (2**17, np.int32)])
def test_stored_texts_are_the_ids_of_the_texts(tokenizer, tmp_path, size, dtype):
    own = words_alone(size) if size else tokenizer
    texts = [*TEXTS, "", "heart " * 40, "red heart"]
    rng = np.random.default_rng(0)
    for length in (2, 12, 77):
        stored = StoredTexts(tmp_path, "toy", own, texts, length)
        assert stored._rows[:0].dtype == dtype
        for count in (0, 1, 7, 30):
            items = rng.integers(len(texts), size=count)
            expected = own.encode([texts[i] for i in items], length)
            for a, b in zip(stored(items), expected, strict=True):
                np.testing.assert_array_equal(a, b)
                assert a.dtype == b.dtype == np.int32


def test_texts_are_tokenized_once(tokenizer, tmp_path, monkeypatch):
    items = np.array([3, 0])
    expected = StoredTexts(tmp_path, "toy", tokenizer, TEXTS, 16)(items)
    (path,) = tmp_path.glob("*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "_bodies", lambda self, texts: list(texts) and 1 / 0)
        same = StoredTexts(tmp_path, "toy", train_tokenizer(TEXTS, 320), TEXTS, 16)(items)
        for a, b in zip(same, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        with pytest.raises(ZeroDivisionError):
            StoredTexts(tmp_path, "toy", tokenizer, TEXTS[::-1], 16)
    # Another tokenizer, other texts or another length are another file.
    StoredTexts(tmp_path, "toy", train_tokenizer(TEXTS, 300), TEXTS, 16)
    StoredTexts(tmp_path, "toy", tokenizer, ["a", *TEXTS[1:]], 16)
    StoredTexts(tmp_path, "toy", tokenizer, TEXTS, 17)
    assert len(list(tmp_path.glob("*.npy"))) == 4
    assert path.is_file()


def test_damaged_and_missing_files_are_user_errors(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"no tokenizer file.*tokenizer\.json"):
        Tokenizer.load(path)
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.json"):
        Tokenizer.from_pretrained_dir(tmp_path)
    for content in (b"{", b"{}", b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            Tokenizer.load(path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    with pytest.raises(UserError, match="no known start, end and padding"):
        Tokenizer.load(path)
    path.unlink()
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.from_pretrained_dir(tmp_path)


def clip_files(folder):
    """A small vocabulary in CLIP's layout: bytes, bytes that end words, merges, special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = ["h e", "r e", "re d</w>", "he a", "r t</w>", "hea rt</w>", "# #</w>"]
    entries = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in merges)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({e: i for i, e in enumerate(entries)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return entries


def test_clips_vocabulary_gives_transformers_ids(tmp_path):
    entries = clip_files(tmp_path)
    ours = Tokenizer.from_pretrained_dir(tmp_path)
    theirs = CLIPTokenizerFast(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    texts = ["Red  HEART", "it's 2024 — São, ##!", "heart-red\n he", "", "漢字 🍎", "red " * 40]
    expected = theirs(texts, padding="max_length", truncation=True, max_length=32)
    ids, mask = ours.encode(texts, 32, lengths=())
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert (ours.vocab_size, ours.end_id) == (len(entries), len(entries) - 1)
    assert ours.decode(ids[0]) == "red heart"
    # A saved tokenizer.json of transformers gives the same.
    (tmp_path / "saved").mkdir()
    theirs.save_pretrained(str(tmp_path / "saved"))
    saved = Tokenizer.from_pretrained_dir(tmp_path / "saved")
    np.testing.assert_array_equal(saved.encode(texts, 32, lengths=())[0], ids)


@pytest.mark.parametrize("length", [8, 64])
def test_siglip_2s_tokenizer_gives_transformers_ids(tmp_path, length):
    """Gemma's, without a start token; SigLIP 2 was trained on texts in lower case."""
    write_siglip2_vocabulary(tmp_path, TEXTS)
    ours = Tokenizer.from_pretrained_dir(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.start_id is None
    assert (ours.end_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)
    texts = [*dict.fromkeys(TEXTS), "Red  HEART", ""]
    ids, mask = ours.encode(texts, length, lengths=())
    # Its files add a start and no end token; SigLIP's processor asks for the reverse.
    bodies = [theirs(x.lower(), add_special_tokens=False)["input_ids"][: length - 1] for x in texts]
    expected = theirs.pad(
        {"input_ids": [[*body, theirs.eos_token_id] for body in bodies]},
        padding="max_length",
        max_length=length,
        padding_side="right",
    )
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])
    assert (mask.sum(1) == length).any() == (length == 8)
