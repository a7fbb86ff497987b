"""Whatever a tokenizer.json does to a text, its pieces have the tokens of the whole."""

import functools
import random

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from alibi_jax.data import documents
from alibi_jax.data.tokenizers import ByteTokenizer, load_tokenizer_file, train_bpe, train_words

SAMPLE = "the quick brown fox Über 日本語。 naïve 12345 don't e.g. \u0301x ﬁn 🙂 – \u2003"
SPACES = (" ", " ", " ", "  ", "\n", "\n\n", "\t", " \n ")
RANDOM = random.Random(0)
TEXT = "".join(RANDOM.choice(SAMPLE.split(" ")) + RANDOM.choice(SPACES) for _ in range(2000))
TEXT += "かきくけこ、" * 200 + " " + "x" * 999 + " " + "7" * 999 + " end "
SPECIAL = ["<unk>", "</s>"]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NMT_NFKC = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
ACCENTS = normalizers.Sequence(
    [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
)


def byte_level(add_prefix_space=False, use_regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def metaspace(scheme, split=True):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


MODELS = {
    "BPE": (
        functools.partial(models.BPE, unk_token="<unk>"),
        functools.partial(trainers.BpeTrainer, max_token_length=9),
    ),
    "Unigram": (
        models.Unigram,
        functools.partial(trainers.UnigramTrainer, unk_token="<unk>"),
    ),
    "WordPiece": (
        functools.partial(models.WordPiece, unk_token="<unk>"),
        trainers.WordPieceTrainer,
    ),
}
# Model, normalizer, pre-tokenizer, and whether documents can be cut at all.
PIPELINES = {
    "Llama 2": (
        "BPE",
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        False,
    ),
    "Llama 3": (
        "BPE",
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), byte_level(use_regex=False)]
        ),
        True,
    ),
    "GPT-2": ("BPE", None, byte_level(), True),
    "GPT-2, space before": ("BPE", None, byte_level(add_prefix_space=True), True),
    "bytes without words": ("BPE", None, byte_level(use_regex=False), False),
    "strip": ("BPE", normalizers.Strip(), byte_level(), False),
    "Mistral": ("BPE", None, metaspace("first", split=False), False),
    "Metaspace": ("BPE", None, metaspace("first"), True),
    "T5": ("Unigram", NMT_NFKC, metaspace("always"), True),
    "Unigram without words": ("Unigram", normalizers.NFKC(), None, False),
    "BERT": (
        "WordPiece",
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        True,
    ),
    "without accents": ("WordPiece", ACCENTS, pre_tokenizers.Whitespace(), True),
    "added words": ("BPE", None, byte_level(), True),
    "lines": ("BPE", None, pre_tokenizers.Split(Regex(r"[^\n]*\n*"), "isolated"), False),
}


@functools.cache
def pipeline(name):
    """Return a tokenizer of the `tokenizers` library, trained on the text."""
    model, normalizer, pre_tokenizer, _ = PIPELINES[name]
    empty, trainer = MODELS[model]
    tokenizer = tokenizers.Tokenizer(empty())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([TEXT[i : i + 200] for i in range(0, 8000, 200)], trainer)
    if name == "added words":
        tokenizer.add_tokens(["brown fox", "  ", AddedToken("e.g.", lstrip=True, rstrip=True)])
    return tokenizer


@pytest.mark.parametrize("name", PIPELINES)
def test_pieces_have_the_tokens_of_the_whole(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "PIECE_LENGTH", 700)
    whole = pipeline(name).encode(TEXT, add_special_tokens=False)
    pipeline(name).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer_file(tmp_path / "tokenizer.json")
    pieces = list(documents.bounded_pieces([TEXT], tokenizer.may_cut))
    assert (len(pieces) > 5) == PIPELINES[name][-1]
    assert "".join(pieces) == TEXT
    ids, ends, before = [], [], 0
    for piece, encoded in zip(pieces, tokenizer.encode_with_ends(pieces), strict=True):
        ids += encoded.ids.tolist()
        ends += (before + encoded.ends).tolist()
        before += len(piece.encode())
    assert ids == whole.ids
    furthest = [max(stop for _, stop in whole.offsets[: i + 1]) for i in range(0, len(ids), 50)]
    assert ends[::50] == [len(TEXT[:stop].encode()) for stop in furthest]


@given(st.text(alphabet="ab \n.,1é"))
def test_tokens_stand_for_all_bytes_up_to_their_end(tokenizer_of_ends, text):
    for tokenizer in tokenizer_of_ends:
        (encoded,) = tokenizer.encode_with_ends([text])
        assert len(encoded.ids) == len(encoded.ends)
        steps = [b - a for a, b in zip([0, *encoded.ends], encoded.ends, strict=False)]
        assert min(steps, default=0) >= 0 and sum(steps) <= len(text.encode())


@pytest.fixture(scope="module")
def tokenizer_of_ends(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    train_bpe(iter([TEXT]), 300, folder / "bpe.json")
    train_words(iter([TEXT]), 300, folder / "words.json")
    return [ByteTokenizer(), *(load_tokenizer_file(folder / f"{n}.json") for n in ("bpe", "words"))]


def test_ends_counted_by_hand(tokenizer_of_ends):
    of_bytes, bpe, words = tokenizer_of_ends
    text = " é  b\n"  # 1 + 2 + 2 + 1 + 1 bytes
    assert next(of_bytes.encode_with_ends([text])).ends.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert next(words.encode_with_ends([text])).ends.tolist() == [3, 6, 7]
    # Three of the four bytes of a character that no merge knows stand for nothing more.
    assert next(bpe.encode_with_ends(["𝄞"])).ends.tolist() == [4, 4, 4, 4]


def test_half_a_word_that_has_no_token_refuses_no_text(tmp_path):
    """Cuts are tried on some characters about them, which begin and end within words."""
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "</s>"]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer_file(tmp_path / "tokenizer.json")
    text = " ".join(random.Random(0).choices(words[:-1], k=3000))
    pieces = list(documents.bounded_pieces([text], loaded.may_cut))
    assert "".join(pieces) == text
    assert sum(len(ids) for ids, _ in loaded.encode_with_ends(pieces)) == 3000
