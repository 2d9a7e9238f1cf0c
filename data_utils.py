"""Text to tensors: vocabulary, token files, windows, splits, templates, masks and batches. Shapes:
B batch, T time (tokens), V vocabulary; N tokens of a whole text."""

import functools
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data_loader
from data_loader import DOCUMENT_END, Corpus, Example, Examples, Instruction, Review, log0
from tokenizer import BPETokenizer

IGNORE = -100  # target that carries no loss: `ignore_index` of PyTorch's cross entropy
TOKENIZER_CHARACTERS = 32 << 20  # of the text, at most, that the tokenizer learns from
SAMPLE_WEIGHT = 3  # copies of the bundled samples that the tokenizer learns from

# ---- a corpus becomes token ids, once


def prepare_tokenizer(corpus: Corpus, vocab_size: int, cache_dir: str | Path) -> BPETokenizer:
    """Trains the tokenizer of all models, or loads it from `cache_dir`. It learns from the training
    split and from the bundled samples, so that reviews and instructions compress well, too."""
    samples = SAMPLE_WEIGHT * sample_texts()

    def train(path: Path) -> None:
        fraction = min(0.9, TOKENIZER_CHARACTERS / corpus.size)
        if fraction < 0.9:
            log0(f"tokenizer: learning from the first {TOKENIZER_CHARACTERS:,} characters")
        chunks = corpus.split(fraction)[0].read()
        documents = (text for chunk in chunks for text in chunk.split(DOCUMENT_END))
        BPETokenizer.train(itertools.chain(samples, documents), vocab_size).save(path)

    key = "\0".join([corpus.sha256, str(vocab_size), *samples])
    stem = f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return BPETokenizer.load(_cached_file(cache_dir, stem, ".json", train))


def sample_texts() -> list[str]:
    """The bundled reviews and instructions as plain text."""
    reviews, _ = data_loader.read_reviews(data_loader.SAMPLES / "reviews.jsonl")
    tasks = data_loader.read_instructions(data_loader.SAMPLES / "instructions.jsonl")
    turns = ("".join(f"{part}\n" for part in turn if part) for task in tasks for turn in task.turns)
    return ["\n".join(f"{review.text}\n" for review in reviews), "\n".join(turns)]


def prepare_token_ids(
    split: str, part: Corpus, corpus: Corpus, tokenizer: BPETokenizer, cache_dir: str | Path
) -> np.ndarray:
    """Token ids (N,) of a split of the corpus, memory-mapped from a file written once in chunks."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32

    def encode(path: Path) -> None:
        n_chunks = -(-(part.stop - part.start) // data_loader.CHUNK_BYTES)
        text = tqdm(part.read(), f"{split} tokens", n_chunks, unit="chunk")
        with data_loader.atomic_write(path) as file:
            for ids in encode_documents(text, tokenizer):
                file.write(np.array(ids, dtype).data)

    stem = f"{split}-{corpus.sha256[:16]}-{tokenizer.sha256[:16]}"
    path = _cached_file(cache_dir, stem, ".bin", encode)
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def encode_documents(chunks: Iterable[str], tokenizer: BPETokenizer) -> Iterator[list[int]]:
    """Yields the token ids of a text in chunks, with `<|endoftext|>` between its documents."""
    pieces = (p for chunk in chunks for p in re.split(f"({DOCUMENT_END})", chunk) if p)
    for is_end, document in itertools.groupby(pieces, lambda piece: piece == DOCUMENT_END):
        yield from [[tokenizer.end_id]] if is_end else tokenizer.encode_stream(document)


def _cached_file(folder, stem: str, suffix: str, create: Callable[[Path], None]) -> Path:
    """The file whose name is `stem` with the hash of its content; `create` writes a missing one."""
    for path in Path(folder).glob(f"{stem}-*{suffix}"):
        if path.stem == f"{stem}-{data_loader.file_sha256(path)[:16]}":
            log0(f"using {path}")
            return path
        log0(f"{path} is damaged: recreating it")
        path.unlink()
    create(path := Path(folder, stem + suffix))
    return path.replace(path.with_stem(f"{stem}-{data_loader.file_sha256(path)[:16]}"))


# ---- token ids become windows


class TokenBatches:
    """Random windows of a text for language modelling, a function of (seed, step). An epoch visits
    the windows that tile the text from a random offset, in random order, without the incomplete
    last batch. Subword regularisation (https://arxiv.org/abs/1910.13267), see `resegment`, shows
    several segmentations of the same text, which delays over-fitting. Its probability falls
    linearly to zero at the last step, so training ends on the segmentation used later."""

    def __init__(
        self,
        ids: np.ndarray,
        tokenizer: BPETokenizer,
        context_length: int,
        batch_size: int,
        seed: int,
        resegment_probability: float = 0.0,
        steps: int = 1,
        max_epochs: int | None = None,
    ):
        if len(ids) <= context_length:
            sizes = f"{len(ids)} tokens, too few for a context of {context_length}"
            advice = "use a longer text, or train the base with a smaller --context-length"
            raise ValueError(f"the training text has {sizes}: {advice}")
        self.ids, self.context_length, self.seed = ids, context_length, seed
        self.resegment_probability, self.children = resegment_probability, merge_children(tokenizer)
        self.n_windows = max(1, (len(ids) - 1) // context_length - 1)  # one fewer, for the offset
        self.batch_size = min(batch_size, self.n_windows)
        self.steps_per_epoch = self.n_windows // self.batch_size
        self.steps = steps if max_epochs is None else min(steps, max_epochs * self.steps_per_epoch)
        self._starts = functools.lru_cache(maxsize=1)(self._starts)  # once per epoch

    def __call__(self, step: int, n_micro: int = 1) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets of a step, each (B, T), split into micro-batches along B."""
        epoch, index = divmod(step, self.steps_per_epoch)
        starts = self._starts(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        rng = np.random.default_rng([self.seed, 1, step])
        probability = self.resegment_probability * max(0.0, 1 - step / self.steps)
        n = self.context_length + 1
        windows = [self.ids[start : start + n].astype(np.int64) for start in starts]
        rows = [resegment(ids, self.children, probability, rng)[:n] for ids in windows]
        tokens = torch.from_numpy(np.stack(rows))
        return [(chunk[:, :-1], chunk[:, 1:]) for chunk in tokens.tensor_split(n_micro)]

    def _starts(self, epoch: int) -> np.ndarray:
        """Where the windows of an epoch start, in the order they are used."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        spare = len(self.ids) - 1 - self.n_windows * self.context_length
        offset = rng.integers(min(spare, self.context_length) + 1)
        return offset + self.context_length * rng.permutation(self.n_windows)


def merge_children(tokenizer: BPETokenizer) -> np.ndarray:
    """(V, 2): the two tokens that each token was merged from, or -1."""
    children = np.full((tokenizer.vocab_size, 2), -1)
    for left, right, merged in reversed(tokenizer.merges):
        children[merged] = left, right
    return children


def resegment(
    ids: np.ndarray, children: np.ndarray, probability: float, rng: np.random.Generator
) -> np.ndarray:
    """Splits tokens at random into the two they were merged from, and these in turn; the result
    decodes to the same text (StochasTok, https://arxiv.org/abs/2506.01687)."""
    is_new = np.ones(len(ids), dtype=bool)
    while probability > 0:
        chosen = is_new & (children[ids, 0] >= 0) & (rng.random(len(ids)) < probability)
        if not chosen.any():
            break
        counts = 1 + chosen
        positions = (np.cumsum(counts) - counts)[chosen]
        split = np.repeat(ids, counts)
        split[positions], split[positions + 1] = children[ids[chosen]].T
        ids, is_new = split, np.repeat(chosen, counts)
    return ids


def scoring_windows(
    ids: np.ndarray, context_length: int, start_id: int, batch_size: int = 32
) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets (B, T) that score every token of a text exactly once. Windows advance by
    half a context, and IGNORE marks what an earlier one scored, so after the first window every
    token has at least half a context before it. The first token is predicted from `start_id`."""
    sequence = np.concatenate([[start_id], ids]).astype(np.int64)
    n, T = len(ids), min(context_length, len(ids))
    starts = [*range(0, n - T, max(1, context_length // 2)), n - T]
    inputs = np.stack([sequence[s : s + T] for s in starts])
    targets = np.stack([sequence[s + 1 : s + T + 1] for s in starts])
    for row in range(1, len(starts)):
        targets[row, : starts[row - 1] + T - starts[row]] = IGNORE
    return list(zip(*(torch.from_numpy(x).split(batch_size) for x in (inputs, targets))))


def count_bytes(ids: np.ndarray, tokenizer: BPETokenizer) -> int:
    """Bytes of text that token ids represent; special tokens represent none."""
    lengths = np.array([len(token) for token in tokenizer.vocab])
    lengths[list(tokenizer.special_tokens.values())] = 0
    return int(lengths[ids].sum())


# ---- rows become splits

TEST_FRACTION, VALIDATION_FRACTION = 0.2, 0.1


@dataclass(frozen=True)
class Split(Generic[Example]):
    """The splits of a data set; rows with equal keys never span two of them."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]

    def sizes(self) -> str:
        """For the log: "3,600 train, 400 validation, 1,000 test"."""
        return ", ".join(f"{len(rows):,} {name}" for name, rows in vars(self).items())


def split_examples(examples: Examples[Example]) -> Split[Example]:
    """Takes a fifth for testing and a tenth of the rest for validation, always the same, stratified
    by label; rows with equal keys stay together. With `has_test_split` the last fifth is the test
    split, without rows whose keys occur before it. Each split of reviews must have every label."""
    rng = np.random.default_rng(0)
    if examples.has_test_split:
        cut = round((1 - TEST_FRACTION) * len(examples.rows))
        rest, rest_keys = examples.rows[:cut], {row.key for row in examples.rows[:cut]}
        test = [row for row in examples.rows[cut:] if row.key not in rest_keys]
    else:
        rest, test = _sample(examples.rows, TEST_FRACTION, rng)
    train, validation = _sample(rest, VALIDATION_FRACTION, rng)
    if not (train and validation and test):
        raise ValueError(f"{examples.name} has too few rows to split: {len(examples.rows)}")
    split, counts = Split(train, validation, test), Counter(row.label for row in examples.rows)
    if examples.labels and len(counts) < 2:
        names = ", ".join(examples.labels[label] for label in counts)
        raise ValueError(f"{examples.name} has the label {names} only: a classifier needs two")
    for name, rows in vars(split).items():
        for label in {*range(len(examples.labels))} - {row.label for row in rows}:
            few = f"{examples.labels[label]!r}: {counts[label]:,}, none of them in the {name} split"
            if counts[label] < 2 and examples.labels != data_loader.LABELS:
                few += f" (if it is a header, {data_loader.HINT})"
            raise ValueError(f"{examples.name} has too few rows with the label {few}")
    return split


def _sample(rows: list[Example], fraction: float, rng: np.random.Generator):
    """Splits rows into the rest and a sample of `fraction` of the keys: shuffled, then sorted by
    label, and taken at equal distances (systematic sampling), which stratifies by label."""
    first_rows = {row.key: row for row in reversed(rows)}
    ordered = sorted(first_rows)
    shuffled = [ordered[i] for i in rng.permutation(len(ordered))]
    keys = sorted(shuffled, key=lambda key: first_rows[key].label)
    counts = np.floor(np.arange(len(keys) + 1) * fraction + rng.random())
    sampled = {key for key, count in zip(keys, np.diff(counts)) if count}
    return [r for r in rows if r.key not in sampled], [r for r in rows if r.key in sampled]


# ---- reviews


def reviews_as_text(reviews: list[Review], tokenizer: BPETokenizer) -> np.ndarray:
    """Token ids of all reviews, each followed by `<|endoftext|>`, for a language model."""
    return np.concatenate([[*tokenizer.encode(r.text), tokenizer.end_id] for r in reviews])


def review_batches(
    reviews: list[Review], tokenizer: BPETokenizer, context_length: int, batch_size: int, seed: int
) -> "ExampleBatches":
    """Training batches of token ids (B, T), lengths (B,) and labels (B,)."""
    rows = [encode_text(review.text, tokenizer, context_length) for review in reviews]
    labels = torch.tensor([review.label for review in reviews])

    def collate(indices: np.ndarray) -> tuple[Tensor, ...]:
        texts = [rows[i] for i in indices]
        return *pad_batch(texts, tokenizer.pad_id, context_length), labels[indices]

    return ExampleBatches(map(len, rows), collate, batch_size, seed)


def text_batches(
    texts: list[str], tokenizer: BPETokenizer, context_length: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Indices of up to 64 texts, their token ids (B, T) and lengths (B,), shortest texts first."""
    rows = [encode_text(text, tokenizer, context_length) for text in texts]
    for indices in _by_length(rows, 64):
        yield indices, *pad_batch([rows[i] for i in indices], tokenizer.pad_id, context_length)


def encode_text(text: str, tokenizer: BPETokenizer, max_length: int) -> np.ndarray:
    """Token ids (T,) of a text to classify, inside the text template of the tokenizer; without the
    middle of a longer text, because opinions cluster at the start and the end."""
    ids = np.array(tokenizer.encode(tokenizer.text_template.replace("{}", text)))
    head = (max_length + 1) // 2
    return np.delete(ids, slice(head, max(head, head + len(ids) - max_length)))


# ---- instructions

# How a conversation becomes text with models trained from scratch; public ones bring their own.
CHAT_TEMPLATE = (data_loader.ASSETS / "chat_template.jinja").read_text("utf-8").strip()
MIN_PROMPT = 32  # tokens of a long instruction and context that are always kept


@dataclass(frozen=True)
class EncodedInstruction:
    """Token ids of an example, and its targets, not yet shifted: these ids, or IGNORE (no loss)."""

    ids: list[int]
    targets: list[int]

    def __len__(self) -> int:
        return len(self.ids)


def encode_instructions(
    rows: list[Instruction], tokenizer: BPETokenizer, context_length: int
) -> list[EncodedInstruction]:
    """Token ids of examples; those without room for a response are skipped. Logs what is lost."""
    encoded = [encode_instruction(row, tokenizer, context_length) for row in rows]
    usable = [example for example in encoded if set(example.targets) != {IGNORE}]
    if len(usable) < len(encoded):
        log0(f"skipped {len(encoded) - len(usable):,} examples: no room for a response")
    if not usable:
        raise ValueError(f"a context of {context_length} tokens has no room for a response")
    responses = (sum(a == IGNORE != b for a, b in itertools.pairwise(x.targets)) for x in encoded)
    if n := sum(len(row.turns) > n_responses > 0 for row, n_responses in zip(rows, responses)):
        log0(f"{n:,} conversations lost their oldest turns: too long for the context")
    return usable


def encode_instruction(
    row: Instruction, tokenizer: BPETokenizer, context_length: int
) -> EncodedInstruction:
    """Token ids of an example in the tokenizer's chat template or ours: at most `context_length`
    inputs, hence one id more. Every response carries loss, with the token that ends it. A long
    example loses its oldest turns, then the end of its context, then of its instruction down to
    `MIN_PROMPT` tokens, and only then the end of its response. A system text loses what exceeds
    half the context. With an empty last response, the ids are the prompt that a model answers."""
    turns, n = row.turns, context_length + 1
    while len(example := _encode_turns(row.system, turns, tokenizer, n)) > n and len(turns) > 1:
        turns = turns[1:]
    return EncodedInstruction(example.ids[:n], example.targets[:n])


def _encode_turns(system, turns, tokenizer, n):
    """Fills the template with marks and replaces these by the ids of the texts, so that no text can
    spell a heading or a control token; a single turn of more than `n` tokens is truncated."""
    template = tokenizer.chat_template or CHAT_TEMPLATE
    is_ours = "### Instruction" in template
    texts, messages = [], []

    def mark(text: str, is_response: bool = False) -> str:
        text = escape_headings(text.strip()) if is_ours else text.strip()
        texts.append((tokenizer.encode(text), is_response))
        return f"\ue000{len(texts) - 1}\ue001" if text else ""

    if system.strip():
        messages.append({"role": "system", "content": mark(system)})
        del texts[0][0][n // 2 :]
    for task, context, response in turns:
        if not is_ours:  # published templates know no context
            task, context = f"{task.strip()}\n\n{context}", ""
        messages.append({"role": "user", "content": mark(task), "context": mark(context)})
        (task_ids, _), (context_ids, _) = texts[-2:]
        if response.strip():
            messages.append({"role": "assistant", "content": mark(response, is_response=True)})
    options = {"add_generation_prompt": not response.strip(), "enable_thinking": False}
    options["eos_token"] = tokenizer.vocab[tokenizer.end_id].decode()
    filled = _compile_template(template).render(messages=messages, **options)
    parts = [  # of the template, and at odd positions the numbers of texts
        texts[int(part)] if i % 2 else (tokenizer.encode(part, allow_special=True), False)
        for i, part in enumerate(re.split("\ue000(\\d+)\ue001", filled))
    ]
    if len(turns) == 1 and (excess := sum(len(ids) for ids, _ in parts) - n) > 0:
        heading = tokenizer.encode("\n\n### Context\n") if context_ids else []
        left = max(len(task_ids) + len(context_ids) - excess, MIN_PROMPT - len(heading), 0)
        del task_ids[left:]
        if context_ids and left <= len(task_ids):
            return _encode_turns(system, [(turns[0][0], "", response)], tokenizer, n)
        del context_ids[left - len(task_ids) :]
    ids, targets, is_end = [], [], False
    for part, is_response in parts:
        n_learned = len(part) if is_response else int(is_end)
        ids += part
        targets += part[:n_learned] + [IGNORE] * len(part[n_learned:])
        is_end = is_response
    return EncodedInstruction(ids, targets)


@functools.cache
def _compile_template(template):
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # slow to import

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)


def escape_headings(text: str) -> str:
    """Text that cannot imitate a heading of our template."""
    heading = r"(?i)(?<!#)#{3,}(?=\s*(?:system|instruction|context|response)\b)"
    return re.sub(heading, lambda match: " ".join(match[0]), text)


def collate_instructions(
    examples: Sequence[EncodedInstruction], tokenizer: BPETokenizer, context_length: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T); prompts and padding carry no loss (IGNORE)."""
    ids, _ = pad_batch([x.ids for x in examples], tokenizer.pad_id, context_length + 1)
    targets, _ = pad_batch([x.targets for x in examples], IGNORE, context_length + 1)
    return ids[:, :-1], targets[:, 1:]


def instruction_batches(
    examples: list[EncodedInstruction], tokenizer: BPETokenizer, context_length: int
) -> list[tuple[Tensor, Tensor]]:
    """Fixed batches of up to 8 for measuring, shortest examples first."""
    batches = [[examples[i] for i in indices] for indices in _by_length(examples, 8)]
    return [collate_instructions(batch, tokenizer, context_length) for batch in batches]


# ---- examples become batches


class ExampleBatches:
    """Batches of examples, a function of (seed, step): each epoch visits them in random order,
    without the incomplete last batch. Examples of similar length, in tokens, share a batch, which
    saves padding. `collate(indices)` returns a tuple of tensors whose first dimension is B."""

    def __init__(self, lengths: Iterable[int], collate: Callable, batch_size: int, seed: int):
        self.lengths, self.collate, self.seed = np.array([*lengths]), collate, seed
        self.batch_size = min(batch_size, len(self.lengths))
        self.steps_per_epoch = len(self.lengths) // self.batch_size
        self._groups = functools.lru_cache(maxsize=1)(self._groups)  # once per epoch

    def __call__(self, step: int, n_micro: int = 1) -> list[tuple[Tensor, ...]]:
        """Tensors of a step in up to `n_micro` micro-batches, each padded by itself."""
        epoch, index = divmod(step, self.steps_per_epoch)
        parts = np.array_split(self._groups(epoch)[index], n_micro)
        return [self.collate(part) for part in parts if len(part)]

    def _groups(self, epoch: int) -> list[np.ndarray]:
        """Indices of the examples of each batch of an epoch."""
        rng = np.random.default_rng([self.seed, 0, epoch])
        order = rng.permutation(len(self.lengths))[: self.steps_per_epoch * self.batch_size]
        pools = np.arange(len(order)) // (8 * self.batch_size)  # of 8 batches
        order = order[np.lexsort((self.lengths[order], pools))]  # by length within each pool
        return list(rng.permutation(order.reshape(-1, self.batch_size)))


def _by_length(rows: Sequence, batch_size: int) -> Sequence[Tensor]:
    """Indices of rows in batches, shortest rows first."""
    return torch.tensor([*map(len, rows)]).argsort(stable=True).split(batch_size) if rows else ()


def pad_batch(rows: Sequence[Sequence], pad_id: int, max_length: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, T), padded on the right, and lengths (B,). T is the longest row, rounded up to
    a multiple of 16, but not above `max_length`: few different shapes let a CPU reuse memory."""
    ids = pad_sequence([torch.as_tensor(row) for row in rows], True, pad_id)
    longest = ids.shape[1]
    T = max(longest, min(max_length, -(-longest // 16) * 16))
    return F.pad(ids, (0, T - longest), value=pad_id), torch.tensor([*map(len, rows)])
