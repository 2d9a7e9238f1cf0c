"""Byte-level byte-pair encoding (BPE), as in GPT-2.

Text is split into pre-tokens (words with their leading space, numbers, punctuation, white space).
Each pre-token is written as UTF-8 bytes, and the most frequent pair of adjacent symbols is merged
into a new symbol until the vocabulary is full (Sennrich et al. 2016,
https://arxiv.org/abs/1508.07909; on bytes: Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners"). Every string can be encoded, and decoding restores it exactly.

`plain_bpe` is the whole idea; `BPETokenizer` learns the same merges a hundred times faster and
stores them in the `tokenizer.json` layout of Hugging Face `tokenizers`, which gives the same ids.
It also reads the tokenizers of GPT-2, SmolLM2, Llama 3 and Qwen2/3, which split text differently:

    tokenizer = BPETokenizer.train([text], vocab_size=1024)
    tokenizer.save("models/tokenizer.json")
    ids = tokenizer.encode("To be, or not to be")
    assert tokenizer.decode(ids) == "To be, or not to be"
"""

import codecs
import hashlib
import heapq
import itertools
import json
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import regex

from data_loader import atomic_write

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>")  # the latter: Llama 3
_PAD_NAMES = (PAD, "<|finetune_right_pad_id|>", "<pad>", "[PAD]")
_END_OF_TURN_NAMES = ("<|im_end|>", "<|eot_id|>")  # ChatML (SmolLM2, Qwen), Llama 3
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

    A public vocabulary may lack bytes that its texts hardly had (SmolLM2: U+0004 and a few more
    control characters). As in `tokenizers`, encoding skips them.
    """

    def __init__(
        self,
        vocab: Sequence[bytes],
        merges: Iterable[tuple[int, int, int]],
        special_tokens: dict[str, int],
        *,
        layout: dict | None = None,
        ignore_merges: bool = False,
    ):
        """`layout`: sections of the `tokenizer.json` that differ from ours. `ignore_merges`: a
        pre-token that is a token needs no merges (Llama 3)."""
        self.vocab = list(vocab)
        self.merges = list(merges)
        self.special_tokens = dict(special_tokens)
        self._layout = {**_LAYOUT, **(layout or {})}
        self._pre = _pre_tokenizer_name(self._layout["pre_tokenizer"])
        self._ignore_merges = ignore_merges
        self._ranks = {(left, right): rank for rank, (left, right, _) in enumerate(self.merges)}
        special_ids = set(special_tokens.values())
        self._ids = {token: i for i, token in enumerate(self.vocab) if i not in special_ids}
        self._byte_ids = {b: self._ids[bytes([b])] for b in range(256) if bytes([b]) in self._ids}
        self._cache = _WordCache(self._merge)

    @property
    def vocab_size(self) -> int:
        """Number of token ids (V), special tokens included."""
        return len(self.vocab)

    @property
    def end_id(self) -> int:
        """The token between texts, which ends each of them."""
        if (end := self._first_special(_END_NAMES)) is None:
            raise ValueError(
                f"the tokenizer lacks a token that ends texts: {' or '.join(_END_NAMES)}"
            )
        return end

    @property
    def pad_id(self) -> int:
        """The token that fills up shorter rows: without one of its own, the end of text."""
        pad = self._first_special(_PAD_NAMES)
        return self.end_id if pad is None else pad

    @property
    def end_of_turn_id(self) -> int | None:
        """The token that ends a message in a chat; None if the tokenizer has none."""
        return self._first_special(_END_OF_TURN_NAMES)

    def _first_special(self, names: Sequence[str]) -> int | None:
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
        """Learns merges from texts.

        The most frequent pair is merged first; ties go to the smaller left id, then to the smaller
        right id. `tokenizers` follows the same rule, so it learns the same merges.

        Args:
            texts: Chunks of text; no merge crosses from one into the next.
            vocab_size: 256 bytes, merges and special tokens together. If the texts have too few
                pairs to merge, the tokenizer is smaller, and a warning says so.
            special_tokens: Names that get the last ids.
        """
        if "" in special_tokens or len(set(special_tokens)) < len(special_tokens):
            raise ValueError("a special token has no name, or the name of another")
        n_ordinary = vocab_size - len(special_tokens)
        if n_ordinary < 256:
            raise ValueError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} "
                f"special tokens need {256 + len(special_tokens)}"
            )
        counts: Counter[str] = Counter()
        for text in texts:
            _check_encodable(text)
            counts.update(_pre_tokens(text))
        vocab, merges = _learn_merges(counts, n_ordinary)
        if len(vocab) < n_ordinary:
            warnings.warn(
                f"the text has only {len(merges)} merges: the vocabulary has "
                f"{len(vocab) + len(special_tokens)} tokens, not {vocab_size}",
                stacklevel=2,
            )
        if clash := sorted(set(map(_to_chars, vocab)) & set(special_tokens)):
            raise ValueError(f"special tokens are also learned from text: {', '.join(clash)}")
        ids = {name: len(vocab) + i for i, name in enumerate(special_tokens)}
        return cls([*vocab, *(name.encode() for name in special_tokens)], merges, ids)

    # ---- text to ids and back

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Turns text into token ids, without adding any.

        Args:
            text: Any string without lone surrogates.
            allowed_special: Names of special tokens that are encoded as their single id, or "all".
                By default the names are ordinary text.
        """
        _check_encodable(text)
        if allowed_special == "all":
            allowed_special = self.special_tokens
        elif isinstance(allowed_special, str):
            raise ValueError(f'allowed_special is "all" or a list: not {allowed_special!r}')
        if not allowed_special:
            return self._encode_ordinary(text)
        unknown = sorted(set(allowed_special) - set(self.special_tokens))
        if unknown:
            raise ValueError(f"not special tokens of this tokenizer: {', '.join(unknown)}")
        names = sorted(allowed_special, key=len, reverse=True)
        chunks = regex.split("(" + "|".join(map(regex.escape, names)) + ")", text)
        ids: list[int] = []
        for i, chunk in enumerate(chunks):  # odd chunks are the names
            ids.extend([self.special_tokens[chunk]] if i % 2 else self._encode_ordinary(chunk))
        return ids

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[list[int]]:
        """Encodes a text that arrives in chunks, split anywhere: yields the ids that `encode` gives
        for the whole text, and holds about one chunk in memory (more only without white space).
        """
        pending = ""
        for chunk in chunks:
            pending += chunk
            if (end := _patterns(self._pre).last_word_end.search(pending)) is not None:
                yield self.encode(pending[: end.start()])
                pending = pending[end.start() :]
        if pending:
            yield self.encode(pending)

    def decode(self, ids: Iterable[int]) -> str:
        """Turns token ids into text; bytes that are not valid UTF-8 become U+FFFD."""
        ids, vocab = list(ids), self.vocab
        used = set(ids)
        if used and not 0 <= min(used) <= max(used) < len(vocab):
            raise ValueError(f"a token id lies outside the vocabulary of {len(vocab)}")
        return b"".join([vocab[i] for i in ids]).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields text as token ids arrive, holding back the bytes of an incomplete character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            if not 0 <= token_id < len(self.vocab):
                raise ValueError(
                    f"token id {token_id} lies outside the vocabulary of {len(self.vocab)}"
                )
            if text := decoder.decode(self.vocab[token_id]):
                yield text
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _encode_ordinary(self, text: str) -> list[int]:
        words = self._words(text)
        return list(itertools.chain.from_iterable(map(self._cache.__getitem__, words)))

    def _words(self, text: str) -> list[str]:
        if self._layout["normalizer"]:
            text = unicodedata.normalize("NFC", text)
        return _pre_tokens(text, self._pre)

    def _merge(self, word: str) -> list[int]:
        """Applies the merges to one pre-token: lowest rank first, then leftmost.

        A heap over a linked list, so that a pre-token of n bytes takes O(n log n).
        """
        if self._ignore_merges and (whole := self._ids.get(word.encode())) is not None:
            return [whole]
        symbols = [self._byte_ids[byte] for byte in word.encode() if byte in self._byte_ids]
        ranks, n = self._ranks, len(symbols)
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
        word = "".join(self._words(text)[:1]).encode()
        symbols = [self._byte_ids[byte] for byte in word if byte in self._byte_ids]
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
        """Reads a `tokenizer.json` written by `save` or by Hugging Face `tokenizers`.

        `encode` gives the ids of `tokenizers.Tokenizer.encode(text, add_special_tokens=False)`, but
        for added tokens (see `special_tokens`). `save` keeps the sections that change no ids here.

        Raises:
            ValueError: The file is not a byte-level BPE of a known kind; the message says why.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            _check_layout(data)
            merges = [m.split(" ") if isinstance(m, str) else m for m in data["model"]["merges"]]
            layout = {name: data[name] for name in _LAYOUT if name in data}
            layout["added_tokens"] = sorted(data["added_tokens"], key=lambda token: token["id"])
            special = {token["content"]: token["id"] for token in layout["added_tokens"]}
            ignore_merges = bool(data["model"].get("ignore_merges"))
            return cls._from_strings(data["model"]["vocab"], merges, special, layout, ignore_merges)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"no tokenizer at {path}: create it with `python main.py`"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a byte-level BPE tokenizer.json ({error}): create it with "
                "`python main.py`"
            ) from None

    @classmethod
    def from_gguf(
        cls, tokens: Sequence[str], merges: Sequence[str], types: Sequence[int], pre: str
    ) -> "BPETokenizer":
        """Builds a tokenizer from the metadata of a GGUF file.

        Args:
            tokens: `tokenizer.ggml.tokens`, in the order of their ids.
            merges: `tokenizer.ggml.merges`, each "left right".
            types: `tokenizer.ggml.token_type`: 3 (control) and 4 (user-defined) are special tokens.
            pre: `tokenizer.ggml.pre`: gpt-2, smollm, llama-bpe or qwen2.
        """
        if pre not in _SPLITS:
            raise ValueError(f"the pre-tokenizer {pre} is not one of {', '.join(_SPLITS)}")
        vocab = {token: i for i, token in enumerate(tokens)}
        special = {token: vocab[token] for token, kind in zip(tokens, types) if kind in (3, 4)}
        steps = [*_SPLITS[pre], _byte_level(use_regex=pre in ("gpt-2", "smollm"))]
        layout = {
            "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        }
        pairs = [merge.split(" ") for merge in merges]
        return cls._from_strings(vocab, pairs, special, layout, pre == "llama-bpe")

    @classmethod
    def load_gpt2(cls, vocab_path: str | Path, merges_path: str | Path) -> "BPETokenizer":
        """Reads the two files GPT-2 was published with: `vocab.json` and `merges.txt`, also known
        as `encoder.json` and `vocab.bpe`. Tokens that no merge produces are special tokens."""
        try:
            vocab = json.loads(Path(vocab_path).read_text(encoding="utf-8"))
            lines = Path(merges_path).read_text(encoding="utf-8").split("\n")
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            produced = {left + right for left, right in merges} | set(_CHAR_TO_BYTE)
            special = {token: i for token, i in vocab.items() if token not in produced}
            return cls._from_strings(vocab, merges, special)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{vocab_path} and {merges_path} are not GPT-2's files: {error}"
            ) from None

    @classmethod
    def _from_strings(
        cls,
        vocab: dict[str, int],
        merges: Sequence[Sequence[str]],
        special: dict[str, int],
        layout: dict | None = None,
        ignore_merges: bool = False,
    ) -> "BPETokenizer":
        """Builds a tokenizer from tokens in the printable alphabet, and checks its consistency."""
        ordinary = vocab.keys() - special.keys()
        if missing := {char for char in _BYTE_TO_CHAR[0x21:0x7F] if char not in ordinary}:
            raise ValueError(f"characters without a token: {' '.join(sorted(missing))}")
        if both := {left + right for left, right in merges} & special.keys():
            raise ValueError(f"merges also produce special tokens: {', '.join(sorted(both))}")
        try:
            tokens = {vocab[t]: bytes(map(_CHAR_TO_BYTE.__getitem__, t)) for t in ordinary}
            triples = [(vocab[left], vocab[right], vocab[left + right]) for left, right in merges]
        except KeyError as error:
            raise ValueError(
                f"a token or merge has {error}, which is not in the vocabulary"
            ) from None
        tokens |= {i: name.encode() for name, i in special.items()}
        if set(tokens) != set(range(len(vocab.keys() | special.keys()))):
            raise ValueError("token ids are not 0, 1, 2, ... without gaps")
        in_order = [tokens[i] for i in range(len(tokens))]
        return cls(in_order, triples, special, layout=layout, ignore_merges=ignore_merges)

    def _to_json(self) -> str:
        names = {i: name for name, i in self.special_tokens.items()}
        chars = {i: names.get(i) or _to_chars(token) for i, token in enumerate(self.vocab)}
        # `tokenizers` gives added tokens the ids after the vocabulary, if they are not part of it.
        n_vocab = 1 + max(self._ids.values())
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": self._ignore_merges,
            "vocab": {token: i for i, token in chars.items() if i < n_vocab},
            "merges": [[chars[left], chars[right]] for left, right, _ in self.merges],
        }
        added = [
            {"id": i, "content": name, **flags, "special": True}
            for i, name in sorted(names.items())
        ]
        head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
        layout = {**head, **self._layout, "model": model}
        return json.dumps(layout, ensure_ascii=False, indent=1) + "\n"


# ---- pre-tokens

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_LLAMA3 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How the families split text, as published, under the names that GGUF files use. SmolLM2 sets
# digits apart before GPT-2's pattern runs: here in one pattern, where a digit ends the text.
_PATTERNS = {
    "gpt-2": rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
    "smollm": rf"{_CONTRACTIONS}|\p{{N}}| ?\p{{L}}+| ?[^\s\p{{L}}\p{{N}}]+"
    r"|\s+(?![^\s\p{N}])|\s+",
    "llama-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
}
_CACHE_SIZE = 1 << 17  # pre-tokens; text repeats few words often, so a full cache stays useful
_CACHED_LENGTH = 64  # characters; longer pre-tokens are hardly ever repeated


class _Patterns(NamedTuple):
    """A pattern compiled for any text, for ASCII alone, and the last place to cut a text."""

    any_text: regex.Pattern
    ascii: re.Pattern  # Python's own `re` is almost twice as fast, but lacks \p
    last_word_end: regex.Pattern


@cache
def _patterns(name: str) -> _Patterns:
    # White space is spelled out as Unicode's White_Space property because `regex` counts the
    # control characters U+001C to U+001F as \s and `tokenizers` does not.
    pattern = _PATTERNS[name]
    any_text = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
    in_ascii = pattern.replace(r"\p{L}+", "[A-Za-z]+").replace(r"\p{L}", "A-Za-z")
    # A pre-token surely ends before white space that follows other text. Those of Llama 3 and Qwen
    # may have line ends behind punctuation, but nothing behind these.
    word_end = r"(?<=\P{White_Space})(?=\p{White_Space})"
    if r"[\r\n]" in pattern:
        word_end = r"(?<=\P{White_Space})(?=[^\P{White_Space}\r\n])|(?<=[\r\n])(?=\P{White_Space})"
    return _Patterns(
        regex.compile(any_text),
        re.compile(in_ascii.replace(r"\p{N}", r"\d"), re.ASCII),
        regex.compile(f"(?r){word_end}"),
    )


def _pre_tokens(text: str, name: str = "gpt-2") -> list[str]:
    patterns = _patterns(name)
    return (patterns.ascii if text.isascii() else patterns.any_text).findall(text)


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
    return "".join(_BYTE_TO_CHAR[byte] for byte in token)


class _WordCache(dict[str, list[int]]):
    """Token ids of pre-tokens, computed on first use."""

    def __init__(self, encode: Callable[[str], list[int]]):
        super().__init__()
        self.encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self.encode(word)
        if len(word) <= _CACHED_LENGTH and len(self) < _CACHE_SIZE:
            self[word] = ids
        return ids


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


# ---- the layout of `tokenizer.json`


def _byte_level(use_regex: bool = True, add_prefix_space: bool = False) -> dict:
    flags = {"trim_offsets": True, "use_regex": use_regex, "add_prefix_space": add_prefix_space}
    return {"type": "ByteLevel", **flags}


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_SPLITS: dict[str, list[dict]] = {  # what comes before ByteLevel
    "gpt-2": [],
    "smollm": [{"type": "Digits", "individual_digits": True}],
    "llama-bpe": [_split(_PATTERNS["llama-bpe"])],
    "qwen2": [_split(_PATTERNS["qwen2"])],
}
_LAYOUT = {  # ours
    "normalizer": None,
    "pre_tokenizer": _byte_level(),
    "post_processor": None,
    "decoder": _byte_level(add_prefix_space=True),
}


def _pre_tokenizer_name(pre: dict | None) -> str:
    """The name in `_PATTERNS` of a `pre_tokenizer` section."""
    steps = (pre or {}).get("pretokenizers", [pre or {"type": "missing"}])
    steps = [{**_byte_level(), **s} if s["type"] == "ByteLevel" else s for s in steps]
    for name, splits in _SPLITS.items():
        last = _byte_level(use_regex=name in ("gpt-2", "smollm"))
        if [{**step, "trim_offsets": True} for step in steps] == [
            {**step, "trim_offsets": True} for step in [*splits, last]
        ]:
            return name
    kinds = ", ".join(step["type"] for step in steps)
    raise ValueError(f"the pre-tokenizer ({kinds}) is not that of {', '.join(_SPLITS)}")


def _check_layout(data: dict) -> None:
    """Rejects features of `tokenizers` that this tokenizer lacks: better no ids than wrong ids."""
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"the model is {model['type']}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise ValueError(f"the model option {name} is not supported")
    if data.get("normalizer") not in (None, {"type": "NFC"}) or data.get("truncation"):
        raise ValueError("truncation and normalizers other than NFC are not supported")
    has_fallback = model.get("unk_token") or model.get("byte_fallback")
    if has_fallback and not _CHAR_TO_BYTE.keys() <= model["vocab"].keys():
        raise ValueError("unk_token and byte_fallback are not supported")
    for token in data["added_tokens"]:
        name, flags = token["content"], ["lstrip", "rstrip", "single_word"]
        flags += ["normalized"] if data.get("normalizer") else []
        if on := [flag for flag in flags if token.get(flag)]:
            raise ValueError(f"the added token {name!r} is {' and '.join(on)}: not supported")
        if not token.get("special") and not re.fullmatch(r"<.+>|\[.+\]", name):
            raise ValueError(f"the added token {name!r} would replace ordinary text")
