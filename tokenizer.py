"""Byte-level byte-pair encoding (BPE), as in GPT-2.

Text is split into pre-tokens (words with their leading space, numbers, punctuation, white space).
Each pre-token is written as UTF-8 bytes, and the most frequent pair of adjacent symbols is merged
into a new symbol until the vocabulary is full (Sennrich et al. 2016,
https://arxiv.org/abs/1508.07909; on bytes: Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners"). Every string can be encoded, and decoding restores it exactly.

`plain_bpe` is the whole idea; `BPETokenizer` learns the same merges a hundred times faster and
stores them in the `tokenizer.json` layout of Hugging Face `tokenizers`, which gives the same ids.
It also reads the tokenizers of GPT-2, SmolLM2, Llama 3 and Qwen, which split text differently.

    tokenizer = BPETokenizer.train([text], vocab_size=1024)
    tokenizer.save("models/tokenizer.json")
    ids = tokenizer.encode("To be, or not to be")
    assert tokenizer.decode(ids) == "To be, or not to be"
"""

import codecs
import contextlib
import hashlib
import heapq
import itertools
import json
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path

import regex

from data_loader import atomic_write

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
Merges = list[tuple[int, int, int]]  # (left id, right id, merged id), in the order learned


def plain_bpe(text: str, n_tokens: int) -> tuple[list[bytes], Merges]:
    """Learns a vocabulary the obvious way: count all pairs, merge the most frequent one, repeat."""
    vocab = [bytes([byte]) for byte in _BYTES_IN_ID_ORDER]
    words = [[_BYTE_IDS[byte] for byte in word.encode()] for word in _pre_tokens(text)]
    merges = []
    while len(vocab) < n_tokens:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))  # ties: smallest ids
        token = vocab[pair[0]] + vocab[pair[1]]
        if token not in vocab:  # two different pairs can make the same token
            vocab.append(token)
        merges.append((*pair, vocab.index(token)))
        words = [_replace_pair(word, pair, vocab.index(token)) for word in words]
    return vocab, merges


def _replace_pair(word: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replaces each occurrence of the pair, from left to right, by the new id."""
    merged: list[int] = []
    i = 0
    while i < len(word):
        if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


class BPETokenizer:
    """Byte-level BPE with a vocabulary of bytes, merges and special tokens.

    Attributes:
        vocab: The bytes of each token id; a special token's entry is its name in UTF-8.
        merges: `(left id, right id, merged id)` in the order learned, which is the order applied.
        special_tokens: Name to id. Text never becomes one of these unless `encode` allows it, not
            even those that `tokenizers` finds in any text, such as Qwen's `<think>`.

    A public vocabulary may lack rare bytes (SmolLM2's: U+0004 and other control characters).
    Encoding skips them, as in `tokenizers`. With Qwen's, it first normalises text to NFC.
    """

    def __init__(
        self,
        vocab: list[bytes],
        merges: Merges,
        special_tokens: dict[str, int],
        layout: dict | None = None,
    ):
        """`layout` is the `tokenizer.json`, which may lack vocabulary and merges; default: ours."""
        self.vocab, self.merges, self.special_tokens = vocab, merges, special_tokens
        self.chat_template: str | None = None  # Jinja, as the model publishes it
        self.text_template = "{}"  # of a text to classify
        self._layout = layout or _LAYOUT
        self._family = _family(self._layout["pre_tokenizer"])
        self._ranks = {(left, right): rank for rank, (left, right, _) in enumerate(self.merges)}
        special_ids = set(special_tokens.values())
        self._ids = {token: i for i, token in enumerate(self.vocab) if i not in special_ids}
        self._byte_ids = {token[0]: i for token, i in self._ids.items() if len(token) == 1}
        self._cached = lru_cache(_CACHE_SIZE)(self._merge)

    @property
    def vocab_size(self) -> int:
        """Number of token ids (V), special tokens included."""
        return len(self.vocab)

    @property
    def end_id(self) -> int:
        """The token that ends a text and separates it from the next."""
        if (end := self._first_of(END_OF_TEXT, "<|end_of_text|>")) is None:
            raise ValueError("the tokenizer has no token <|endoftext|> or <|end_of_text|>")
        return end

    @property
    def pad_id(self) -> int:
        """The token that pads rows: `end_id` where there is no other."""
        pad = self._first_of(PAD, "<|finetune_right_pad_id|>")
        return self.end_id if pad is None else pad

    @property
    def end_of_turn_id(self) -> int | None:
        """The token that ends a message of a chat, if there is one."""
        return self._first_of("<|im_end|>", "<|eot_id|>")

    def _first_of(self, *names: str) -> int | None:
        return next((self.special_tokens[n] for n in names if n in self.special_tokens), None)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file that `save` writes: the identity that checkpoints record."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    # ---- training

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = (END_OF_TEXT, PAD),
    ) -> "BPETokenizer":
        """Learns merges from texts (no merge crosses from one into the next) until there are
        `vocab_size` tokens, 256 bytes and special tokens included, or no pairs, with a warning.

        The most frequent pair is merged first; ties go to the smaller left id, then to the smaller
        right id. `tokenizers` follows the same rule, so it learns the same merges.
        """
        n_ordinary = vocab_size - len(special_tokens)
        if n_ordinary < 256:
            least = 256 + len(special_tokens)
            raise ValueError(f"vocab_size {vocab_size}: the bytes and special tokens need {least}")
        counts: Counter[str] = Counter()
        for text in texts:
            _check_encodable(text)
            counts.update(_pre_tokens(text))
        vocab, merges = _learn_merges(counts, n_ordinary)
        if (n_tokens := len(vocab) + len(special_tokens)) < vocab_size:
            few = f"the text has only {len(merges)} merges: {n_tokens} tokens, not {vocab_size}"
            warnings.warn(few, stacklevel=2)
        ids = {name: len(vocab) + i for i, name in enumerate(special_tokens)}
        if len(ids | {_to_chars(token): 0 for token in vocab}) < n_tokens:
            raise ValueError("special tokens need names of their own, which are no learned tokens")
        return cls([*vocab, *(name.encode() for name in special_tokens)], merges, ids)

    # ---- text to ids and back

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Turns text without lone surrogates into token ids. The names of special tokens are text,
        too, but for those in `allowed_special` ("all": each), which become their single id."""
        _check_encodable(text)
        if isinstance(allowed_special, str):
            allowed_special = self.special_tokens if allowed_special == "all" else [allowed_special]
        if not allowed_special:
            return self._encode_ordinary(text)
        if unknown := sorted(set(allowed_special) - set(self.special_tokens)):
            raise ValueError(f"not special tokens of this tokenizer: {', '.join(unknown)}")
        names = sorted(allowed_special, key=len, reverse=True)
        chunks = regex.split("(" + "|".join(map(regex.escape, names)) + ")", text)
        ids: list[int] = []
        for i, chunk in enumerate(chunks):  # odd chunks are the names
            ids.extend([self.special_tokens[chunk]] if i % 2 else self._encode_ordinary(chunk))
        return ids

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[list[int]]:
        """Encodes a text that arrives in chunks, split anywhere: yields the ids that `encode` gives
        for the whole text, and holds about one chunk in memory (more only without a word)."""
        pending = ""
        for chunk in chunks:
            pending += chunk
            if (end := _LAST_WORD_END.search(pending)) is not None:
                yield self.encode(pending[: end.start()])
                pending = pending[end.start() :]
        if pending:
            yield self.encode(pending)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns token ids into text; bytes that are not valid UTF-8 become U+FFFD."""
        ids, vocab = list(ids), self.vocab
        self._check_ids(set(ids))
        return b"".join([vocab[i] for i in ids]).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields text as token ids arrive, holding back the bytes of an incomplete character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            self._check_ids({token_id})
            if text := decoder.decode(self.vocab[token_id]):
                yield text
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _check_ids(self, ids: set[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < len(self.vocab):
            raise ValueError(f"a token id lies outside the vocabulary of {len(self.vocab)}")

    def _encode_ordinary(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self._cached, self._words(text))))

    def _words(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text) if self._layout["normalizer"] else text
        return _pre_tokens(text, self._family)

    def _symbols(self, word: str) -> list[int]:
        return [self._byte_ids[byte] for byte in word.encode() if byte in self._byte_ids]

    def _merge(self, word: str) -> list[int]:
        """Applies the merges to one pre-token: lowest rank first, then leftmost.

        A heap over a linked list, so that a pre-token of n bytes takes O(n log n).
        """
        if self._layout["model"]["ignore_merges"] and word.encode() in self._ids:
            return [self._ids[word.encode()]]
        symbols, ranks = self._symbols(word), self._ranks
        n = len(symbols)
        after = list(range(1, n + 1))
        before = list(range(-1, n - 1))
        heap = [(ranks[p], i) for i, p in enumerate(zip(symbols, symbols[1:])) if p in ranks]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if j == n or ranks.get((symbols[i], symbols[j])) != rank:
                continue  # an earlier merge consumed one of the two
            symbols[i], symbols[j] = self.merges[rank][2], -1
            after[i] = k = after[j]
            if k < n:
                before[k] = i
                if (right := ranks.get((symbols[i], symbols[k]))) is not None:
                    heapq.heappush(heap, (right, i))
            h = before[i]
            if h >= 0 and (left := ranks.get((symbols[h], symbols[i]))) is not None:
                heapq.heappush(heap, (left, h))
        return [symbol for symbol in symbols if symbol >= 0]

    def merge_steps(self, text: str) -> Iterator[tuple[int | None, list[int]]]:
        """Encodes the first pre-token of a text merge by merge: yields the rank of each merge (None
        at first) and the token ids after it."""
        symbols = [i for word in self._words(text)[:1] for i in self._symbols(word)]
        yield None, symbols
        while ranks := [self._ranks[p] for p in zip(symbols, symbols[1:]) if p in self._ranks]:
            left, right, merged = self.merges[min(ranks)]
            symbols = _replace_pair(symbols, (left, right), merged)
            yield min(ranks), symbols

    # ---- files

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`, atomically."""
        with atomic_write(path) as file:
            file.write(self._to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Reads a `tokenizer.json` written by `save` or by Hugging Face `tokenizers`: the ids equal
        theirs but for added tokens, truncation and padding, and `save` keeps what they depend on.
        Raises ValueError with the reason if other ids would differ."""
        path, advice = Path(path), "create it with `python main.py`"
        if not path.exists():
            raise FileNotFoundError(f"no tokenizer at {path}: {advice}")
        with _refusing(f"{path} is not a byte-level BPE tokenizer.json", f": {advice}"):
            return cls._from_layout(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def load_gpt2(cls, vocab_path: str | Path, merges_path: str | Path) -> "BPETokenizer":
        """Reads the two files GPT-2 was published with: `vocab.json` and `merges.txt`, also known
        as `encoder.json` and `vocab.bpe`. Tokens that no merge produces are special tokens."""
        vocab_path, merges_path = Path(vocab_path), Path(merges_path)
        with _refusing(f"{vocab_path} and {merges_path} are not GPT-2's files"):
            ids = json.loads(vocab_path.read_text(encoding="utf-8"))
            lines = merges_path.read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
            made = {merge.replace(" ", "") for merge in merges} | _CHAR_TO_BYTE.keys()
            added = _added_tokens({token: i for token, i in ids.items() if token not in made})
            model = {"vocab": ids, "merges": merges}
            return cls._from_layout({**_LAYOUT, "added_tokens": added, "model": model})

    @classmethod
    def from_gguf(
        cls, tokens: Sequence[str], merges: Sequence[str], types: Sequence[int], pre: str
    ) -> "BPETokenizer":
        """Builds a tokenizer from the `tokenizer.ggml` metadata of a GGUF file: `tokens`, `merges`
        ("left right"), `token_type` (3 and 4 are special tokens) and `pre`, the name of the family.
        """
        if pre not in _STEPS:
            raise ValueError(f"the pre-tokenizer {pre} is not one of {', '.join(_STEPS)}")
        with _refusing("the GGUF metadata do not describe a byte-level BPE"):
            kinds = dict(zip(tokens, types, strict=True))
            vocab = {token: i for i, token in enumerate(tokens)}
            special = {token: i for token, i in vocab.items() if kinds[token] in (3, 4)}
            layout = {
                "added_tokens": _added_tokens(special),
                "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": _STEPS[pre]},
                "model": {"ignore_merges": pre == "llama-bpe", "vocab": vocab, "merges": merges},
            }
            return cls._from_layout(layout)

    @classmethod
    def _from_layout(cls, layout: dict) -> "BPETokenizer":
        """Builds a tokenizer from the content of a `tokenizer.json`, and checks its consistency."""
        _check_layout(layout)
        model, vocab = layout["model"], layout["model"]["vocab"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        special = {token["content"]: token["id"] for token in layout["added_tokens"]}
        if not set(_BYTE_TO_CHAR[0x21:0x7F]) <= vocab.keys() - special.keys():
            raise ValueError("a printable ASCII character has no token")
        if both := {left + right for left, right in merges} & special.keys():
            raise ValueError(f"merges also produce special tokens: {', '.join(sorted(both))}")
        tokens = {i: _to_bytes(token) for token, i in vocab.items() if token not in special}
        tokens |= {i: name.encode() for name, i in special.items()}
        if set(tokens) != set(range(len(vocab.keys() | special.keys()))):
            raise ValueError("token ids are not 0, 1, 2, ... without gaps")
        triples = [(vocab[left], vocab[right], vocab[left + right]) for left, right in merges]
        model = {**_LAYOUT["model"], **model, "vocab": {}, "merges": []}
        # `transformers` leaves the settings of its last call in the file, and ignores them, too.
        layout = {**_LAYOUT, **layout, "truncation": None, "padding": None, "model": model}
        return cls([tokens[i] for i in range(len(tokens))], triples, special, layout)

    def _to_json(self) -> str:
        names = {i: name for name, i in self.special_tokens.items()}
        chars = [names.get(i) or _to_chars(token) for i, token in enumerate(self.vocab)]
        # `tokenizers` numbers added tokens by their order after the vocabulary, unless it has them.
        n_vocab = 1 + max(self._ids.values())
        added = self._layout["added_tokens"] or _added_tokens(self.special_tokens)
        added = sorted(added, key=lambda token: token["id"])
        vocab = {token: i for i, token in enumerate(chars[:n_vocab])}
        merges = [[chars[left], chars[right]] for left, right, _ in self.merges]
        model = {**self._layout["model"], "vocab": vocab, "merges": merges}
        layout = {**self._layout, "added_tokens": added, "model": model}
        return json.dumps(layout, ensure_ascii=False, indent=1) + "\n"


# ---- pre-tokens

# The patterns that split text, as published, under the names that GGUF files use.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "gpt-2": _GPT2,  # for SmolLM2, digits are set apart before, as if the text ended there
    "smollm": _GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])"),
    "llama-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
}
# The last position where a pre-token surely ends: after a word or a number. A mark there belongs to
# the word, as NFC may merge the two.
_LAST_WORD_END = regex.compile(r"(?r)(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}\p{M}])")
_CACHE_SIZE = 1 << 17  # pre-tokens; text repeats few words often, so a full cache stays useful


@cache
def _patterns(family: str) -> tuple[re.Pattern, regex.Pattern]:
    """Patterns for ASCII, where Python's own `re` is almost twice as fast, and for any text."""
    pattern = _PATTERNS[family]
    in_ascii = pattern.replace(r"\p{L}+", "[A-Za-z]+").replace(r"\p{L}", "A-Za-z")
    # White space is spelled out as Unicode's White_Space property because `regex` counts the
    # control characters U+001C to U+001F as \s and `tokenizers` does not.
    any_text = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
    return re.compile(in_ascii.replace(r"\p{N}", r"\d"), re.ASCII), regex.compile(any_text)


def _pre_tokens(text: str, family: str = "gpt-2") -> list[str]:
    in_ascii, any_text = _patterns(family)
    return (in_ascii if text.isascii() else any_text).findall(text)


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_TO_CHAR = _byte_alphabet()
_CHAR_TO_BYTE = {char: byte for byte, char in enumerate(_BYTE_TO_CHAR)}
_BYTES_IN_ID_ORDER = [_CHAR_TO_BYTE[char] for char in sorted(_BYTE_TO_CHAR)]  # GPT-2's ids 0..255
_BYTE_IDS = {byte: i for i, byte in enumerate(_BYTES_IN_ID_ORDER)}


def _to_chars(token: bytes) -> str:
    return "".join([_BYTE_TO_CHAR[byte] for byte in token])


def _to_bytes(chars: str) -> bytes:
    return bytes([_CHAR_TO_BYTE[char] for char in chars])


# ---- fast training


def _learn_merges(counts: Counter[str], n_tokens: int) -> tuple[list[bytes], Merges]:
    """As `plain_bpe`, on distinct words with their counts.

    A merge updates the pair counts of the words that contain the pair, and no others. The heap may
    hold outdated counts: a count that grew is pushed again, one that shrank is corrected when it
    reaches the top.
    """
    vocab = [bytes([byte]) for byte in _BYTES_IN_ID_ORDER]
    ids = {token: i for i, token in enumerate(vocab)}
    words = [[_BYTE_IDS[byte] for byte in word.encode()] for word in counts]
    word_counts = list(counts.values())
    pair_counts: Counter[tuple[int, int]] = Counter()
    words_with: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += word_counts[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges: Merges = []
    while len(vocab) < n_tokens and heap:
        negative_count, pair = heapq.heappop(heap)
        if (count := pair_counts[pair]) != -negative_count:
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        token = vocab[pair[0]] + vocab[pair[1]]
        new_id = ids.setdefault(token, len(vocab))  # two pairs can make the same token
        if new_id == len(vocab):
            vocab.append(token)
        merges.append((*pair, new_id))
        changes: defaultdict[tuple[int, int], int] = defaultdict(int)
        for i in words_with.pop(pair):
            word, count = words[i], word_counts[i]
            for old_pair in zip(word, word[1:]):
                changes[old_pair] -= count
            words[i] = word = _replace_pair(word, pair, new_id)
            for new_pair in zip(word, word[1:]):
                changes[new_pair] += count
                words_with[new_pair].add(i)
        for changed, change in changes.items():
            pair_counts[changed] += change
            if change > 0:
                heapq.heappush(heap, (-pair_counts[changed], changed))
    return vocab, merges


# ---- validation


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character "
            f"{error.start}, which UTF-8 cannot hold: remove it, or read the file as UTF-8"
        ) from None


@contextlib.contextmanager
def _refusing(what: str, advice: str = "") -> Iterator[None]:
    """Turns the errors of malformed content into one ValueError."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{what} ({error}){advice}") from None


# ---- the layout of tokenizer.json

_BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
_GPT2_SPLIT = {**_BYTE_LEVEL, "add_prefix_space": False}
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_NO_SPLIT = {**_GPT2_SPLIT, "use_regex": False}
_STEPS = {  # of the families' pre-tokenizers
    "gpt-2": [_GPT2_SPLIT],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2_SPLIT],
    "llama-bpe": [{**_SPLIT, "pattern": {"Regex": _PATTERNS["llama-bpe"]}}, _NO_SPLIT],
    "qwen2": [{**_SPLIT, "pattern": {"Regex": _PATTERNS["qwen2"]}}, _NO_SPLIT],
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of added tokens
_OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
_SWITCHES = ("fuse_unk", "byte_fallback", "ignore_merges")
_LAYOUT = {
    **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": []},
    **{"normalizer": None, "pre_tokenizer": _GPT2_SPLIT, "post_processor": None},
    "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
    "model": {"type": "BPE", **dict.fromkeys(_OPTIONS), **dict.fromkeys(_SWITCHES, False)},
}


def _added_tokens(special: dict[str, int]) -> list[dict]:
    flags = {**dict.fromkeys(_FLAGS, False), "special": True}
    return [{"id": i, "content": name, **flags} for name, i in special.items()]


def _family(pre_tokenizer: dict | None) -> str:
    """The family that splits text that way; `trim_offsets` changes no ids."""

    def comparable(steps: list[dict]) -> list[dict]:
        return [{"use_regex": True, **step, "trim_offsets": True} for step in steps]

    pre_tokenizer = pre_tokenizer or {"type": "None"}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    for family in _STEPS:
        if comparable(steps) == comparable(_STEPS[family]):
            return family
    kinds = ", ".join(step["type"] for step in steps)
    raise ValueError(f"the pre-tokenizer {kinds} is not that of {', '.join(_STEPS)}")


def _check_layout(layout: dict) -> None:
    """Rejects features of `tokenizers` that this tokenizer lacks: better no ids than wrong ids."""
    model, normalizer = layout["model"], layout.get("normalizer")
    if model.get("type", "BPE") != "BPE" or normalizer not in (None, {"type": "NFC"}):
        raise ValueError("models other than BPE and normalizers other than NFC are not supported")
    if on := [n for n in (*_OPTIONS, "byte_fallback") if model.get(n)]:
        raise ValueError(f"{', '.join(on)}: not supported")
    for token in layout["added_tokens"]:
        flags = [n for n in _FLAGS if token.get(n) and (n != "normalized" or normalizer)]
        is_markup = re.fullmatch(r"<.+>|\[.+\]", token["content"])
        if flags or not (token["content"] if token.get("special") else is_markup):
            raise ValueError(f"the added token {token['content']!r} would change ordinary text")
