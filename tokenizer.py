"""Byte-level byte-pair encoding (BPE), as in GPT-2.

Text is split into pre-tokens (words with their leading space, numbers, punctuation, white space).
Each pre-token is written as UTF-8 bytes, and the most frequent pair of adjacent symbols is merged
into a new symbol until the vocabulary is full (Sennrich et al. 2016,
https://arxiv.org/abs/1508.07909; on bytes: Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners"). Every string can be encoded, and decoding restores it exactly.

`plain_bpe` is the whole idea; `BPETokenizer` learns the same merges a hundred times faster and
stores them in the `tokenizer.json` layout of Hugging Face `tokenizers`, which gives the same ids:

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
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cached_property
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
        special_tokens: Name to id. Text never becomes one of these unless `encode` allows it.
    """

    def __init__(
        self,
        vocab: Sequence[bytes],
        merges: Iterable[tuple[int, int, int]],
        special_tokens: dict[str, int],
    ):
        self.vocab = list(vocab)
        self.merges = list(merges)
        self.special_tokens = dict(special_tokens)
        self._ranks = {(left, right): rank for rank, (left, right, _) in enumerate(merges)}
        special_ids = set(special_tokens.values())
        ids = {token: i for i, token in enumerate(self.vocab) if i not in special_ids}
        self._byte_ids = [ids[bytes([byte])] for byte in range(256)]
        self._cache = _WordCache(self._merge)

    @property
    def vocab_size(self) -> int:
        """Number of token ids (V), special tokens included."""
        return len(self.vocab)

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
        ids = {name: len(vocab) + i for i, name in enumerate(special_tokens)}
        return cls([*vocab, *(name.encode() for name in special_tokens)], merges, ids)

    # ---- text to ids and back

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Turns text into token ids.

        Args:
            text: Any string without lone surrogates.
            allowed_special: Names of special tokens that are encoded as their single id. By
                default the names are ordinary text.
        """
        _check_encodable(text)
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
            if (end := _LAST_WORD_END.search(pending)) is not None:
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
            if text := decoder.decode(self.vocab[token_id]):
                yield text
        if rest := decoder.decode(b"", final=True):
            yield rest

    def _encode_ordinary(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self._cache.__getitem__, _pre_tokens(text))))

    def _merge(self, word: str) -> list[int]:
        """Applies the merges to one pre-token: lowest rank first, then leftmost.

        A heap over a linked list, so that a pre-token of n bytes takes O(n log n).
        """
        symbols = [self._byte_ids[byte] for byte in word.encode()]
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
        symbols = [self._byte_ids[byte] for word in _pre_tokens(text)[:1] for byte in word.encode()]
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

        Raises:
            ValueError: The file is not a byte-level BPE of GPT-2's kind; the message says why.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            _check_layout(data)
            merges = [m.split(" ") if isinstance(m, str) else m for m in data["model"]["merges"]]
            special = {t["content"]: t["id"] for t in data["added_tokens"]}
            return cls._from_strings(data["model"]["vocab"], merges, special)
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
        cls, vocab: dict[str, int], merges: Sequence[Sequence[str]], special: dict[str, int]
    ) -> "BPETokenizer":
        """Builds a tokenizer from tokens in the printable alphabet, and checks its consistency."""
        tokens = {
            i: bytes(_CHAR_TO_BYTE[c] for c in t) for t, i in vocab.items() if t not in special
        }
        tokens |= {i: name.encode() for name, i in special.items()}
        if set(tokens) != set(range(len(vocab.keys() | special.keys()))):
            raise ValueError("token ids are not 0, 1, 2, ... without gaps")
        if missing := set(_CHAR_TO_BYTE) - (vocab.keys() - special.keys()):
            raise ValueError(f"{len(missing)} of the 256 bytes have no token")
        if both := {left + right for left, right in merges} & special.keys():
            raise ValueError(f"merges also produce special tokens: {', '.join(sorted(both))}")
        triples = [(vocab[left], vocab[right], vocab[left + right]) for left, right in merges]
        return cls([tokens[i] for i in range(len(tokens))], triples, special)

    def _to_json(self) -> str:
        special_ids = set(self.special_tokens.values())
        chars = {i: _to_chars(t) for i, t in enumerate(self.vocab) if i not in special_ids}
        byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in chars.items()},
            "merges": [[chars[left], chars[right]] for left, right, _ in self.merges],
        }
        layout = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": name, **flags, "special": True}
                for name, i in sorted(self.special_tokens.items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": {**byte_level, "add_prefix_space": False},
            "post_processor": None,
            "decoder": {**byte_level, "add_prefix_space": True},
            "model": model,
        }
        return json.dumps(layout, ensure_ascii=False, indent=1) + "\n"


# ---- pre-tokens

# GPT-2's pre-tokenization. White space is spelled out as Unicode's White_Space property because
# `regex` counts the control characters U+001C to U+001F as \s and `tokenizers` does not.
_PRE_TOKEN = regex.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+"
    r"|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+"
)
# The same for ASCII alone, where Python's own `re` is almost twice as fast.
_ASCII_PRE_TOKEN = re.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+"
    r"|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
# The last position where a pre-token surely ends: before white space that follows other text.
_LAST_WORD_END = regex.compile(r"(?r)(?<=\P{White_Space})(?=\p{White_Space})")
_CACHE_SIZE = 1 << 17  # pre-tokens; text repeats few words often, so a full cache stays useful
_CACHED_LENGTH = 64  # characters; longer pre-tokens are hardly ever repeated


def _pre_tokens(text: str) -> list[str]:
    return (_ASCII_PRE_TOKEN if text.isascii() else _PRE_TOKEN).findall(text)


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


def _check_layout(data: dict) -> None:
    """Rejects features of `tokenizers` that this tokenizer lacks: better no ids than wrong ids."""
    model, pre = data["model"], data["pre_tokenizer"]
    post = data.get("post_processor")
    if model.get("type", "BPE") != "BPE" or not pre or pre.get("type") != "ByteLevel":
        raise ValueError("the model is not BPE over a ByteLevel pre-tokenizer")
    if pre.get("add_prefix_space") or not pre.get("use_regex", True) or data.get("normalizer"):
        raise ValueError("add_prefix_space, use_regex=false and normalizers are not supported")
    if data.get("truncation") or (post and post.get("type") != "ByteLevel"):
        raise ValueError("truncation and post-processors that add tokens are not supported")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "ignore_merges"):
        if model.get(name):
            raise ValueError(f"the model option {name} is not supported")
