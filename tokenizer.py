"""Byte-level byte-pair encoding (BPE), as in GPT-2.

Text is split into pre-tokens (words with their leading space, numbers, punctuation, white space),
written as UTF-8 bytes. The most frequent pair of adjacent symbols is merged into a new symbol until
the vocabulary is full (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes: Radford et
al. 2019, "Language Models are Unsupervised Multitask Learners"). Decoding restores the text.

`plain_bpe` is the whole idea; `BPETokenizer` learns the same merges hundreds of times faster. It
reads and writes the `tokenizer.json` of Hugging Face `tokenizers` and gives the same ids as that
library: for ours, and for GPT-2, SmolLM2, Llama 3 and Qwen, each of which splits text its own way.

    tokenizer = BPETokenizer.train([text], vocab_size=1024)
    assert tokenizer.decode(tokenizer.encode("To be, or not to be")) == "To be, or not to be"
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
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path

import regex

from data_loader import atomic_write

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
Merges = list[tuple[int, int, int]]  # (left id, right id, merged id), in the order learned


def plain_bpe(text: str, n_tokens: int) -> tuple[list[bytes], Merges]:
    """Learns tokens and merges the obvious way: count all pairs, merge the most frequent one."""
    vocab = [bytes([byte]) for byte in _BYTES]  # ids 0 to 255, in GPT-2's order
    words = [[_BYTE_IDS[byte] for byte in word.encode()] for word in _pre_tokens(text)]
    merges = []
    while len(vocab) < n_tokens and any(len(word) > 1 for word in words):
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))  # ties: smallest ids
        token = vocab[pair[0]] + vocab[pair[1]]
        if token not in vocab:  # two different pairs can make the same token
            vocab.append(token)
        merges.append((*pair, vocab.index(token)))
        words = [_replace_pair(word, *merges[-1]) for word in words]
    return vocab, merges


def _replace_pair(word: list[int], left: int, right: int, new_id: int) -> list[int]:
    """Replaces each occurrence of the pair, from left to right, by the new id."""
    merged: list[int] = []
    for symbol in word:
        if symbol == right and merged and merged[-1] == left:
            merged[-1] = new_id
        else:
            merged.append(symbol)
    return merged


class BPETokenizer:
    """Byte-level BPE with a vocabulary of bytes, merges and special tokens.

    Attributes:
        vocab: The bytes of each token id (V); a special token's entry is its name in UTF-8.
        merges: `(left id, right id, merged id)` in the order learned, which is the order applied.
        special_tokens: Name to id. Text never becomes one of these unless `encode` allows it, not
            even one that `tokenizers` recognises in any text, such as Qwen's `<think>`.
        end_id: Token that ends a text and separates it from the next; None if there is none.
        pad_id: Token that pads rows; `end_id` if there is no other.
        end_of_turn_id: Token that ends a message of a chat, or None."""

    def __init__(self, layout: dict):
        """`layout` is the content of a `tokenizer.json`."""
        self._family = _supported_family(layout)
        model, vocab = layout["model"], layout["model"]["vocab"]
        added = sorted(layout["added_tokens"], key=lambda token: token["id"])
        self.special_tokens = special = {token["content"]: token["id"] for token in added}
        if not {chr(byte) for byte in range(0x21, 0x7F)} <= vocab.keys() - special.keys():
            raise NotImplementedError("a printable ASCII character has no token")
        merges = [m.split(" ") if isinstance(m, str) else [*m] for m in model["merges"]]
        if merged := {left + right for left, right in merges} & special.keys():
            raise NotImplementedError(f"merges also produce special tokens: {sorted(merged)}")
        ids = {**vocab, **special}
        names = sorted(ids, key=ids.get)
        if [ids[name] for name in names] != [*range(len(names))]:
            raise NotImplementedError("token ids are not 0, 1, 2, ... without gaps")
        self.vocab = [n.encode() if n in special else bytes(_TO_BYTE[c] for c in n) for n in names]
        self.vocab_size = len(self.vocab)
        self.merges = [(ids[left], ids[right], ids[left + right]) for left, right in merges]
        self.end_id = special.get(END_OF_TEXT, special.get("<|end_of_text|>"))
        self.pad_id = special.get(PAD, special.get("<|finetune_right_pad_id|>", self.end_id))
        self.end_of_turn_id = special.get("<|im_end|>", special.get("<|eot_id|>"))
        self.chat_template: str | None = None  # Jinja, as the model publishes it
        self.text_template = "{}"  # wraps a text to classify
        self._ranks = {(left, right): rank for rank, (left, right, _) in enumerate(self.merges)}
        self._ids = {self.vocab[i]: i for name, i in ids.items() if name not in special}
        self._byte_ids = {token[0]: i for token, i in self._ids.items() if len(token) == 1}
        self._cached = lru_cache(_CACHE_SIZE)(self._merge)
        # `tokenizers` numbers added tokens after the vocabulary, unless the latter has them, too.
        vocab = {name: i for i, name in enumerate(names[: 1 + max(self._ids.values())])}
        # `transformers` saves truncation and padding of its last call, but does not read them.
        self._layout = {**layout, "added_tokens": added, "truncation": None, "padding": None}
        merges = [(names[left], names[right]) for left, right, _ in self.merges]  # shared strings
        self._layout["model"] = {**model, "vocab": vocab, "merges": merges}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learns merges, none of which spans two texts, until there are `vocab_size` tokens,
        including 256 bytes and 2 special tokens. Warns if the texts have too few pairs. Ties go to
        the smaller left id, then to the smaller right id, as in `tokenizers`."""
        if vocab_size < 258:
            raise ValueError(f"vocab_size {vocab_size}: the bytes and special tokens need 258")
        counts = Counter(itertools.chain.from_iterable(map(_pre_tokens, texts)))
        learned, merges = _learn_merges(counts, vocab_size - 2)
        tokens = ["".join([_TO_CHAR[b] for b in token]) for token in learned] + [END_OF_TEXT, PAD]
        if len(tokens) < vocab_size:
            few = f"the text has only {len(merges)} merges: {len(tokens)} tokens, not {vocab_size}"
            warnings.warn(few, stacklevel=2)
        vocab = {token: i for i, token in enumerate(tokens)}
        pairs = [(tokens[left], tokens[right]) for left, right, _ in merges]
        return cls(_new_layout(vocab, pairs, [END_OF_TEXT, PAD]))

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Turns text without lone surrogates into token ids. The name of a special token is plain
        text, too, unless `allow_special`. Bytes that a public vocabulary lacks (SmolLM2's: U+0004
        and other control characters) are skipped, as in `tokenizers`."""
        special = self.special_tokens if allow_special else {}
        names = map(regex.escape, sorted(special, key=len, reverse=True))
        ids: list[int] = []
        for chunk in regex.split(f"({'|'.join(names)})", text) if special else [text]:
            if chunk in special:
                ids.append(special[chunk])
            else:
                ids.extend(itertools.chain.from_iterable(map(self._cached, self._words(chunk))))
        return ids

    def encode_stream(self, chunks: Iterable[str]) -> Iterator[list[int]]:
        """Encodes a text that arrives in chunks, split anywhere: yields in lists the ids that
        `encode` gives for the whole. Holds one chunk in memory, more only if it has no words."""
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
        return self._spell(list(ids)).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields text as token ids arrive, holding back the bytes of an incomplete character."""
        return codecs.iterdecode((self._spell([i]) for i in ids), "utf-8", errors="replace")

    def _spell(self, ids: list[int]) -> bytes:
        if ids and not 0 <= min(unique := set(ids)) <= max(unique) < len(self.vocab):
            raise ValueError(f"a token id lies outside the vocabulary of {len(self.vocab)}")
        return b"".join(map(self.vocab.__getitem__, ids))

    def _words(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text) if self._layout.get("normalizer") else text
        return _pre_tokens(text, self._family)

    def _symbols(self, word: str) -> list[int]:
        return [self._byte_ids[byte] for byte in word.encode() if byte in self._byte_ids]

    def _merge(self, word: str) -> list[int]:
        """Applies the merges to one pre-token: lowest rank first, then leftmost. A heap over a
        linked list, so that a pre-token of n bytes takes O(n log n)."""
        if self._layout["model"].get("ignore_merges") and word.encode() in self._ids:
            return [self._ids[word.encode()]]  # Llama 3 looks up the whole pre-token first
        symbols, ranks = [*self._symbols(word), -1], self._ranks  # -1, in no pair, is both ends
        after = list(range(1, len(symbols) + 1))
        before = list(range(-1, len(symbols) - 1))
        heap = [(ranks[p], i) for i, p in enumerate(zip(symbols, symbols[1:])) if p in ranks]
        heapq.heapify(heap)
        while heap:
            rank, i = heapq.heappop(heap)
            j = after[i]
            if ranks.get((symbols[i], symbols[j])) != rank:
                continue  # an earlier merge consumed one of the two
            symbols[i], symbols[j] = self.merges[rank][2], -1
            h, k = before[i], after[j]
            after[i], before[k] = k, i
            if (left := ranks.get((symbols[h], symbols[i]))) is not None:
                heapq.heappush(heap, (left, h))
            if (right := ranks.get((symbols[i], symbols[k]))) is not None:
                heapq.heappush(heap, (right, i))
        return [symbol for symbol in symbols if symbol >= 0]

    def merge_steps(self, text: str) -> Iterator[tuple[int | None, list[int]]]:
        """Shows how the first pre-token of a text is encoded: yields the rank of each merge and the
        ids after it. Rank None marks the initial bytes and, in Llama 3, a look-up of the whole."""
        word = next(iter(self._words(text)), "")
        ids, ranks = self._symbols(word), self._ranks
        yield None, ids
        while pairs := [(ranks[p], i) for i, p in enumerate(zip(ids, ids[1:])) if p in ranks]:
            rank, i = min(pairs)
            ids = [*ids[:i], self.merges[rank][2], *ids[i + 2 :]]
            yield rank, ids
        if (encoded := self._merge(word)) != ids:
            yield None, encoded

    def _to_json(self) -> str:
        return json.dumps(self._layout, ensure_ascii=False, indent=1) + "\n"

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file that `save` writes: the identity that checkpoints record."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes a `tokenizer.json`, atomically."""
        with atomic_write(path) as file:
            file.write(self._to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Reads a `tokenizer.json` or, without one, GPT-2's `vocab.json` and `merges.txt` in its
        folder. Ids equal those of `tokenizers`, but text never becomes an added token and nothing
        is truncated or padded; where other ids would differ, raises ValueError with the reason."""
        path, advice = Path(path), ": restore the file, or create it with `python main.py`"
        try:
            if path.exists():
                return cls(json.loads(path.read_text(encoding="utf-8")))
            if (vocab_path := path.with_name("vocab.json")).exists():
                ids = json.loads(vocab_path.read_text(encoding="utf-8"))
                lines = path.with_name("merges.txt").read_text(encoding="utf-8").split("\n")
                merges = [line for line in lines if line and not line.startswith("#version")]
                merged = {merge.replace(" ", "") for merge in merges} | _TO_BYTE.keys()
                special = [token for token in ids if token not in merged]
                return cls(_new_layout(ids, merges, special))
        except NotImplementedError as error:
            raise ValueError(f"{path}: this tokenizer is not supported: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: no byte-level BPE, or damaged ({error}){advice}") from None
        raise FileNotFoundError(f"no tokenizer at {path}{advice}")


# ---- pre-tokens

# The patterns that split text, as published.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "gpt-2": _GPT2,
    # SmolLM2 splits off every digit first, so that the text before it ends there.
    "smollm": _GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])"),
    "llama-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
}
# The last safe cut, searched from the right: after a word or number, not before a combining mark.
_LAST_WORD_END = regex.compile(r"(?r)(?<=[\p{L}\p{N}])(?=[^\p{L}\p{N}\p{M}])")
_CACHE_SIZE = 1 << 17  # pre-tokens; most of a text is a few words that recur


@cache
def _patterns(family: str) -> tuple[re.Pattern, regex.Pattern]:
    """Patterns for ASCII, where Python's own `re` is almost twice as fast, and for any text."""
    pattern = _PATTERNS[family]
    in_ascii = pattern.replace(r"\p{L}+", "[A-Za-z]+").replace(r"\p{L}", "A-Za-z")
    # `regex` counts U+001C to U+001F as \s; `tokenizers`, like Unicode's White_Space, does not.
    any_text = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}")
    return re.compile(in_ascii.replace(r"\p{N}", r"\d"), re.ASCII), regex.compile(any_text)


def _pre_tokens(text: str, family: str = "gpt-2") -> list[str]:
    in_ascii, any_text = _patterns(family)
    return (in_ascii if text.isascii() else any_text).findall(text)


# GPT-2 numbers the printable bytes first. In files, characters from U+0100 stand for the others.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = [*_PRINTABLE, *sorted({*range(256)} - {*_PRINTABLE})]  # in the order of their ids
_BYTE_IDS = {byte: i for i, byte in enumerate(_BYTES)}
_TO_CHAR = dict(zip(_BYTES, map(chr, [*_PRINTABLE, *range(0x100, 0x200)])))
_TO_BYTE = {char: byte for byte, char in _TO_CHAR.items()}


# ---- fast training


def _learn_merges(counts: Counter[str], n_tokens: int) -> tuple[list[bytes], Merges]:
    """As `plain_bpe`, on distinct words with their counts. A merge updates only the pair counts of
    the words with that pair. Counts in the heap may be too high: the top is corrected first."""
    vocab = [bytes([byte]) for byte in _BYTES]
    ids = {token: i for i, token in enumerate(vocab)}
    words: list[list[int]] = [[] for _ in counts]  # empty at first, so that all of them change
    changed = [(i, [_BYTE_IDS[byte] for byte in word.encode()]) for i, word in enumerate(counts)]
    frequencies, pair_counts = list(counts.values()), Counter[tuple[int, int]]()
    words_with: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    heap, merges = [], []  # of (-count, pair)
    while True:
        changes: defaultdict[tuple[int, int], int] = defaultdict(int)
        for i, new in changed:
            for pair in zip(words[i], words[i][1:]):
                changes[pair] -= frequencies[i]
            for pair in zip(new, new[1:]):
                changes[pair] += frequencies[i]
                words_with[pair].add(i)
            words[i] = new
        for pair, change in changes.items():
            pair_counts[pair] += change
            if change > 0:
                heapq.heappush(heap, (-pair_counts[pair], pair))
        while heap and -heap[0][0] != (count := pair_counts[heap[0][1]]):
            heapq.heapreplace(heap, (-count, heap[0][1]))
        if len(vocab) >= n_tokens or not heap or heap[0][0] == 0:
            return vocab, merges
        _, pair = heapq.heappop(heap)
        token = vocab[pair[0]] + vocab[pair[1]]
        new_id = ids.setdefault(token, len(vocab))  # two pairs can make the same token
        if new_id == len(vocab):
            vocab.append(token)
        merges.append((*pair, new_id))
        changed = [(i, _replace_pair(words[i], *pair, new_id)) for i in words_with.pop(pair)]


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
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of added tokens
_BPE_OPTIONS = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")


def _new_layout(vocab: dict[str, int], merges: Sequence, special: Sequence) -> dict:
    """The content of a `tokenizer.json` like GPT-2's; `special` are the names of special tokens."""
    flags = {**dict.fromkeys(_TOKEN_FLAGS, False), "special": True}
    added = [{"id": vocab[name], "content": name, **flags} for name in special]
    layout = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    layout |= {"normalizer": None, "pre_tokenizer": _GPT2_SPLIT, "post_processor": None}
    model = {"type": "BPE", **dict.fromkeys(_BPE_OPTIONS), "fuse_unk": False}
    model |= {"byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges}
    return {**layout, "decoder": {**_BYTE_LEVEL, "add_prefix_space": True}, "model": model}


def _supported_family(layout: dict) -> str:
    """The family, a key of `_PATTERNS`. Rejects what we would encode differently."""
    model, normalizer = layout["model"], layout.get("normalizer")
    if (kind := model.get("type", "BPE")) != "BPE":
        raise NotImplementedError(f"the model is {kind}, not BPE")
    if normalizer not in (None, {"type": "NFC"}):
        raise NotImplementedError(f"the normalizer is {normalizer['type']}, not NFC")
    if on := [n for n in (*_BPE_OPTIONS, "byte_fallback") if model.get(n)]:
        raise NotImplementedError(f"the model has {', '.join(on)}")
    for token in layout["added_tokens"]:
        name = token["content"]
        looks_special = token.get("special") or re.fullmatch(r"<.+>|\[.+\]", name)
        flags = [n for n in _TOKEN_FLAGS if token.get(n) and (n != "normalized" or normalizer)]
        if not name or not looks_special or flags:
            raise NotImplementedError(f"the added token {name!r} would change ordinary text")
    pre_tokenizer = layout.get("pre_tokenizer") or {"type": "None"}
    steps = [  # `trim_offsets` changes no ids
        {**_BYTE_LEVEL, **step, "trim_offsets": True} if step["type"] == "ByteLevel" else step
        for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    ]
    for family, known in _STEPS.items():
        if steps == known:
            return family
    kinds = ", ".join(step["type"] for step in steps)
    raise NotImplementedError(f"the pre-tokenizer {kinds} is not that of {', '.join(_STEPS)}")
