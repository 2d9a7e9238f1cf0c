"""Text to tensors: the shared vocabulary, token files, windows, splits and batches.

Shapes: B batch, T time (tokens).
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_loader import (
    PIECE_BYTES,
    ByteRange,
    Corpus,
    Example,
    Examples,
    Instruction,
    Review,
    file_sha256,
    read_text,
    sample_texts,
    say,
    written_whole,
)
from tokenizer import END_OF_TEXT, PAD, BPETokenizer

IGNORE = -100  # target that carries no loss: `ignore_index` of PyTorch's cross entropy
TOKENIZER_TEXT_BYTES = 32 << 20  # of the training text the tokenizer learns from
SAMPLE_WEIGHT = 3  # how often the bundled reviews and instructions count in the vocabulary


def prepare_tokenizer(corpus: Corpus, vocab_size: int, cache_dir: Path) -> BPETokenizer:
    """The one vocabulary for everything: learned from the training part of the corpus and the
    bundled reviews and instructions, so that these compress as well; kept in `cache_dir` for the
    next time.
    """
    samples = sample_texts()
    key = hashlib.sha256(
        "\0".join([corpus.sha256, str(vocab_size), str(SAMPLE_WEIGHT), *samples]).encode()
    ).hexdigest()[:16]
    if path := _held(cache_dir, f"tokenizer-{key}", ".json"):
        say(f"tokenizer: from {path}")
        return BPETokenizer.load(path)
    share = min(0.9, TOKENIZER_TEXT_BYTES / sum(path.stat().st_size for path in corpus.paths))
    if share < 0.9:
        say(f"tokenizer: learning from the first {TOKENIZER_TEXT_BYTES >> 20} MiB of the text")
    texts = itertools.chain(SAMPLE_WEIGHT * samples, *map(read_text, corpus.split(share)[0]))
    tokenizer = BPETokenizer.train(texts, vocab_size)
    cache_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(cache_dir / f"tokenizer-{key}-{tokenizer.sha256[:16]}.json")
    return tokenizer


def _held(cache_dir: Path, stem: str, suffix: str) -> Path | None:
    """The file in the cache whose name starts like this and ends with the hash of its content."""
    for path in cache_dir.glob(f"{stem}-*{suffix}"):
        if path.stem == f"{stem}-{file_sha256(path)[:16]}":
            return path
        say(f"{path} is damaged: making it anew")
        path.unlink()
    return None


# ---- token files


def prepare_token_ids(
    name: str, parts: list[ByteRange], corpus: Corpus, tokenizer: BPETokenizer, cache_dir: Path
) -> np.ndarray:
    """Token ids of a part of the corpus, as a memory-mapped file that is written once.

    Args:
        name: Of the part, such as "train".
        parts: Its bytes; `<|endoftext|>` stands between two files.
        corpus: Names the file, together with the tokenizer.
        tokenizer: Encodes piece by piece: memory does not grow with the text.
        cache_dir: Where the file is kept.
    """
    stem = f"{name}-{corpus.sha256[:16]}-{tokenizer.sha256[:16]}"
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    path = _held(cache_dir, stem, ".bin")
    if path:
        say(f"{name} tokens: from {path}")
    else:
        unnamed = cache_dir / f"{stem}.bin"
        end = np.array([tokenizer.special_tokens[END_OF_TEXT]], dtype=dtype)
        with written_whole(unnamed) as file:
            for i, part in enumerate(parts):
                if i:
                    file.write(end.data)
                pieces = -(-(part.stop - part.start) // PIECE_BYTES)
                text = tqdm(read_text(part), f"{name} tokens", pieces, unit="MiB")
                for ids in tokenizer.encode_stream(text):
                    file.write(np.array(ids, dtype=dtype).data)
        path = unnamed.replace(cache_dir / f"{stem}-{file_sha256(unnamed)[:16]}.bin")
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


# ---- batches


class TokenBatches:
    """Random windows of a token file for language modelling, with subword regularisation.

    Each epoch goes once over the windows that tile the text from a random offset, in random order,
    less a last batch that is not full; a window that splitting makes longer loses its tail. Batches
    follow from seed and step alone.

    Subword regularisation (https://arxiv.org/abs/1910.13267) shows the model other spellings of the
    same text: each token made by a merge is split, with a probability, into the two it was made of,
    and these in turn (as in StochasTok, https://arxiv.org/abs/2506.01687). On a small corpus, read
    many times, it delays over-fitting. The probability falls linearly to zero at the last step, so
    that the model ends on the spelling it will be used with.
    """

    def __init__(
        self,
        ids: np.ndarray,
        tokenizer: BPETokenizer,
        context_length: int,
        batch_size: int,
        seed: int,
        split_probability: float = 0.0,
        steps: int = 1,
    ):
        if len(ids) <= context_length:
            raise ValueError(
                f"the training text has {len(ids)} tokens, too few for a context of "
                f"{context_length}: use a longer text, or train the base with a smaller "
                "--context-length"
            )
        self.ids, self.context_length, self.seed = ids, context_length, seed
        self.split_probability, self.steps = split_probability, steps
        self.halves = merge_halves(tokenizer)
        self.n_windows = max(1, (len(ids) - 1) // context_length - 1)
        self.batch_size = min(batch_size, self.n_windows)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0))

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over the text."""
        return self.n_windows // self.batch_size

    def __call__(self, step: int, parts: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets of a step, each (B, T), cut into `parts` along B."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self._starts(epoch))
        starts = self._epoch[1][place * self.batch_size : (place + 1) * self.batch_size]
        rng = np.random.default_rng([self.seed, 1, step])
        T = self.context_length
        probability = self.split_probability * max(0.0, 1 - step / self.steps)
        rows = [
            split_tokens(self.ids[s : s + T + 1].astype(np.int64), self.halves, probability, rng)
            for s in starts
        ]
        tokens = torch.from_numpy(np.stack([row[: T + 1] for row in rows]))
        return [(part[:, :-1], part[:, 1:]) for part in tokens.tensor_split(parts)]

    def _starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch start, in the order they are used."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        spare = len(self.ids) - 1 - self.n_windows * self.context_length
        offset = rng.integers(min(spare, self.context_length) + 1)
        return offset + self.context_length * rng.permutation(self.n_windows)


def merge_halves(tokenizer: BPETokenizer) -> np.ndarray:
    """(V, 2): the two tokens each token was merged from, or -1."""
    halves = np.full((tokenizer.vocab_size, 2), -1)
    for left, right, merged in reversed(tokenizer.merges):
        halves[merged] = left, right
    return halves


def split_tokens(
    ids: np.ndarray, halves: np.ndarray, probability: float, rng: np.random.Generator
) -> np.ndarray:
    """Splits each token with a probability into its two halves, and these in turn.

    Decodes to the same text; the same ids when the probability is 0.
    """
    fresh = np.ones(len(ids), dtype=bool)
    while probability > 0:
        chosen = fresh & (halves[ids, 0] >= 0) & (rng.random(len(ids)) < probability)
        if not chosen.any():
            break
        counts = 1 + chosen
        places = (np.cumsum(counts) - counts)[chosen]
        split = np.repeat(ids, counts)
        split[places], split[places + 1] = halves[ids[chosen]].T
        ids, fresh = split, np.repeat(chosen, counts)
    return ids


def scoring_windows(
    ids: np.ndarray, context_length: int, start_id: int, batch_size: int = 32
) -> list[tuple[Tensor, Tensor]]:
    """Windows that score every token of a text exactly once, most of them with a long context.

    Windows of `context_length` tokens advance by half a context; each scores the tokens that no
    earlier one did, so that all but the first window's have at least half a context before them.
    The first token is predicted from `start_id`.

    Returns:
        Batches of inputs and targets (B, T), targets that were scored before being IGNORE.
    """
    sequence = np.concatenate([[start_id], ids]).astype(np.int64)
    n, T = len(ids), min(context_length, len(ids))
    starts = [*range(0, n - T, max(1, context_length // 2)), n - T]
    inputs = np.stack([sequence[s : s + T] for s in starts])
    targets = np.stack([sequence[s + 1 : s + T + 1] for s in starts])
    for row in range(1, len(starts)):
        targets[row, : starts[row - 1] + T - starts[row]] = IGNORE
    return list(
        zip(torch.from_numpy(inputs).split(batch_size), torch.from_numpy(targets).split(batch_size))
    )


def count_bytes(ids: np.ndarray, tokenizer: BPETokenizer) -> int:
    """Bytes of text that token ids stand for; special tokens stand for none."""
    lengths = np.array([len(token) for token in tokenizer.vocab])
    lengths[list(tokenizer.special_tokens.values())] = 0
    return int(lengths[ids].sum())


# ---- data sets in parts


TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1


@dataclass(frozen=True)
class Split(Generic[Example]):
    """The three parts of a data set; what is alike stands in one of them."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def split_examples(examples: Examples[Example]) -> Split[Example]:
    """Cuts a fifth off for testing and a tenth of the rest for validation.

    The parts have equal shares of each group of rows, by a seeded draw; rows with the same key stay
    together. Where the last fifth is the test part as it stands, it loses rows whose key stands
    before it.

    Raises:
        ValueError: A part would be empty.
    """
    rng = np.random.default_rng(0)
    if examples.has_test_part:
        cut = round((1 - TEST_SHARE) * len(examples.rows))
        rest, known = examples.rows[:cut], {row.key for row in examples.rows[:cut]}
        test = [row for row in examples.rows[cut:] if row.key not in known]
    else:
        rest, test = _draw(examples.rows, TEST_SHARE, rng)
    train, validation = _draw(rest, VALIDATION_SHARE, rng)
    if not (train and validation and test):
        raise ValueError(f"{examples.name} has too few rows to split: {len(examples.rows)}")
    return Split(train, validation, test)


def _draw(
    rows: list[Example], share: float, rng: np.random.Generator
) -> tuple[list[Example], list[Example]]:
    """Draws a share of the keys, each 1/share-th of a list by group; rows keep their order."""
    firsts = {row.key: row for row in reversed(rows)}
    ordered = sorted(firsts)
    keys = [ordered[i] for i in rng.permutation(len(ordered))]
    by_group = sorted(keys, key=lambda key: firsts[key].group)
    counts = np.floor(np.arange(len(keys) + 1) * share + rng.random())
    drawn = {key for key, count in zip(by_group, np.diff(counts)) if count}
    return [r for r in rows if r.key not in drawn], [r for r in rows if r.key in drawn]


# ---- reviews


def split_reviews(reviews: Examples[Review]) -> Split[Review]:
    """As `split_examples`, always the same.

    Raises:
        ValueError: A part would not have both labels.
    """
    split = split_examples(reviews)
    for name, part in vars(split).items():
        if len({row.label for row in part}) < 2:
            raise ValueError(
                f"{reviews.name} has too few rows: its {name} part, {len(part)} rows, needs both "
                "labels"
            )
    return split


def reviews_as_text(reviews: list[Review], tokenizer: BPETokenizer) -> np.ndarray:
    """Token ids of reviews, one after the other, for a language model; each ends with
    `<|endoftext|>`."""
    end = [tokenizer.special_tokens[END_OF_TEXT]]
    return np.concatenate(
        [part for ids in encode_reviews(reviews, tokenizer) for part in (ids, end)]
    )


def head_and_tail(ids: np.ndarray, length: int) -> np.ndarray:
    """A text that is longer than `length` tokens without its middle: opinions stand at the ends."""
    if len(ids) <= length:
        return ids
    head = (length + 1) // 2
    return np.concatenate([ids[:head], ids[len(ids) - (length - head) :]])


def pad(rows: Sequence[np.ndarray], pad_id: int, most: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), filled up on the right, and lengths (B,).

    T is the longest row, rounded up to a multiple of 32 where that is not above `most`: with few
    shapes the kernels and the memory for them are used again, which on a CPU saves gigabytes.
    """
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    ids = torch.full((len(rows), max(longest, min(most, -(-longest // 32) * 32))), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row)
    return ids, lengths


class ExampleBatches:
    """Batches of examples: each epoch goes once over them, in random order, less a last batch that
    is not full.

    Examples of similar length go together, so that little is padding. Batches follow from seed and
    step alone.
    """

    POOL = 8  # batches that are sorted by length together

    def __init__(
        self,
        lengths: Sequence[int],
        collate: Callable[[np.ndarray, np.random.Generator], tuple[Tensor, ...]],
        batch_size: int,
        seed: int,
    ):
        """Groups the examples anew for each epoch.

        Args:
            lengths: Of the examples, in tokens.
            collate: Makes tensors whose first dimension is B of the examples with given numbers.
            batch_size: Examples a step (B).
            seed: Of the order and of what `collate` draws.
        """
        self.lengths, self.collate, self.seed = np.array(lengths), collate, seed
        self.batch_size = min(batch_size, len(lengths))
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over the examples."""
        return len(self.lengths) // self.batch_size

    def __call__(self, step: int, parts: int = 1) -> list[tuple[Tensor, ...]]:
        """Tensors of a step, cut into `parts` along B."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self._groups(epoch))
        rng = np.random.default_rng([self.seed, 1, step])
        tensors = self.collate(self._epoch[1][place], rng)
        return list(zip(*(tensor.tensor_split(parts) for tensor in tensors)))

    def _groups(self, epoch: int) -> list[np.ndarray]:
        """Examples of each batch of an epoch."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        order = rng.permutation(len(self.lengths))[: self.steps_per_epoch * self.batch_size]
        pool = self.POOL * self.batch_size
        chunks = [order[i : i + pool] for i in range(0, len(order), pool)]
        by_length = [c[np.argsort(self.lengths[c], kind="stable")] for c in chunks]
        return list(rng.permutation(np.concatenate(by_length).reshape(-1, self.batch_size)))


def review_training_batches(
    reviews: list[Review],
    targets: np.ndarray,
    tokenizer: BPETokenizer,
    context_length: int,
    batch_size: int,
    seed: int,
    split_probability: float = 0.0,
    hide_probability: float = 0.0,
) -> ExampleBatches:
    """Batches of token ids (B, T), lengths (B,) and class probabilities to learn (B, classes).

    Each epoch has other versions of the texts, whose `targets` (N, classes) stay the same.
    Tokens are split at random as in `TokenBatches`, and some are hidden behind `<|endoftext|>`
    (word dropout, Iyyer et al. 2015, https://aclanthology.org/P15-1162), so that no single word is
    relied on.
    """
    rows, halves = encode_reviews(reviews, tokenizer), merge_halves(tokenizer)
    learned = torch.tensor(targets, dtype=torch.float32)
    end, pad_id = (tokenizer.special_tokens[name] for name in (END_OF_TEXT, PAD))

    def version(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A text with some tokens split, its middle left out, and some tokens hidden."""
        ids = split_tokens(ids, halves, split_probability, rng)
        ids = head_and_tail(ids, context_length)
        return np.where(rng.random(len(ids)) < hide_probability, end, ids)

    def collate(chosen: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Padded texts and what is to be learned of them."""
        ids, lengths = pad([version(rows[i], rng) for i in chosen], pad_id, context_length)
        return ids, lengths, learned[chosen]

    return ExampleBatches([len(ids) for ids in rows], collate, batch_size, seed)


def encode_reviews(reviews: list[Review], tokenizer: BPETokenizer) -> list[np.ndarray]:
    """Token ids of each text."""
    return [np.array(tokenizer.encode(review.text)) for review in reviews]


# ---- instructions


# The prompt template, in the order of the parts; an empty context is left out with its heading.
# What a user writes stands between the headings and can become neither one nor `<|endoftext|>`.
INSTRUCTION_HEADING, CONTEXT_HEADING = "### Instruction\n", "\n\n### Context\n"
RESPONSE_HEADING = "\n\n### Response\n"
MIN_PROMPT = 32  # tokens of a long instruction and context that are kept in any case


@dataclass(frozen=True)
class EncodedInstruction:
    """Token ids of a prompt and of its response, which ends with `<|endoftext|>` unless cut."""

    prompt: list[int]
    response: list[int]


def user_text(text: str) -> str:
    """Text from outside, unable to imitate a heading of the template."""
    return re.sub("#{3,}", lambda found: " ".join(found[0]), text)


def encode_prompt(
    instruction: str, context: str, tokenizer: BPETokenizer, max_tokens: int | None = None
) -> list[int]:
    """Token ids of a prompt, up to where the response begins.

    With `max_tokens`, the ends of context and then of instruction are left out, never a heading.
    """
    task, text = (tokenizer.encode(user_text(part.strip())) for part in (instruction, context))
    headings = [
        tokenizer.encode(h) for h in (INSTRUCTION_HEADING, CONTEXT_HEADING, RESPONSE_HEADING)
    ]
    if max_tokens is not None:
        room = max(0, max_tokens - len(headings[0]) - len(headings[2]))
        task = task[:room]
        text = text[: max(0, room - len(task) - len(headings[1]))]
    return headings[0] + task + (headings[1] + text if text else []) + headings[2]


def encode_instruction(
    row: Instruction, tokenizer: BPETokenizer, context_length: int
) -> EncodedInstruction:
    """Token ids of an example, at most `context_length` of inputs.

    Too long an example loses the end of its context, then of its instruction down to `MIN_PROMPT`
    tokens, and only then the end of its response.
    """
    response = tokenizer.encode(row.response.strip())
    bare = len(encode_prompt("", "", tokenizer))
    room = max(context_length - len(response), bare + MIN_PROMPT)
    prompt = encode_prompt(row.instruction, row.context, tokenizer, room)
    response = [*response, tokenizer.special_tokens[END_OF_TEXT]]
    return EncodedInstruction(prompt, response[: max(0, context_length + 1 - len(prompt))])


def encode_instructions(
    rows: list[Instruction], tokenizer: BPETokenizer, context_length: int
) -> list[EncodedInstruction]:
    """Token ids of examples; says how many have no room for a response and are left out.

    Raises:
        ValueError: None is left.
    """
    encoded = [encode_instruction(row, tokenizer, context_length) for row in rows]
    usable = [example for example in encoded if example.response]
    if len(usable) < len(encoded):
        say(f"{len(encoded) - len(usable):,} examples left out: no room for a response")
    if not usable:
        raise ValueError(f"a context of {context_length} tokens has no room for a response")
    return usable


def collate_instructions(
    examples: Sequence[EncodedInstruction], tokenizer: BPETokenizer, context_length: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T); prompt and padding carry no loss (IGNORE)."""
    rows = [np.array(example.prompt + example.response) for example in examples]
    ids, lengths = pad(rows, tokenizer.special_tokens[PAD], context_length + 1)
    targets = ids[:, 1:].clone()
    places = torch.arange(1, ids.shape[1])
    starts = torch.tensor([len(example.prompt) for example in examples])
    targets[(places < starts[:, None]) | (places >= lengths[:, None])] = IGNORE
    return ids[:, :-1], targets


def instruction_batches(
    examples: list[EncodedInstruction],
    tokenizer: BPETokenizer,
    context_length: int,
    batch_size: int = 32,
) -> list[tuple[Tensor, Tensor]]:
    """Fixed batches for measuring, shortest first."""
    ordered = sorted(examples, key=lambda example: len(example.prompt) + len(example.response))
    return [
        collate_instructions(ordered[i : i + batch_size], tokenizer, context_length)
        for i in range(0, len(ordered), batch_size)
    ]


def instruction_training_batches(
    examples: list[EncodedInstruction],
    tokenizer: BPETokenizer,
    context_length: int,
    batch_size: int,
    seed: int,
) -> ExampleBatches:
    """Batches of inputs and targets (B, T)."""

    def collate(chosen: np.ndarray, _: np.random.Generator) -> tuple[Tensor, ...]:
        """Inputs and targets of some examples."""
        return collate_instructions([examples[i] for i in chosen], tokenizer, context_length)

    lengths = [len(example.prompt) + len(example.response) for example in examples]
    return ExampleBatches(lengths, collate, batch_size, seed)
