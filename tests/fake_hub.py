"""A local imitation of the Hugging Face Hub, enough for its own clients, that misbehaves on demand.

The two data sets have their real addresses and sizes. The reviews lie at the start of a Parquet
file as large as the real one; between them and the footer are zeros, which take no disk space.
"""

import json
import mmap
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs

import pyarrow
from pyarrow import parquet

from data_loader import DOWNLOADS

(POLARITY,) = DOWNLOADS["amazon_polarity_{}.jsonl"]["sources"]
(DOLLY,) = DOWNLOADS["databricks-dolly-15k.jsonl"]["sources"]
POLARITY_BYTES = 259_761_770  # size of the real file
GROUP = 1000  # rows of a row group, as in the real file


def make_shard(path: Path, rows: list[dict], n_groups: int = 0) -> None:
    """Writes reviews as a Parquet file of POLARITY_BYTES; `n_groups` repeats them."""
    table = pyarrow.Table.from_pylist(rows)
    with parquet.ParquetWriter(path, table.schema) as writer:
        for _ in range(n_groups or 1):
            writer.write_table(table, row_group_size=GROUP)
    with path.open("r+b") as file:
        content = path.stat().st_size
        file.seek(-8, 2)
        length = 8 + int.from_bytes(file.read(4), "little")
        file.seek(-length, 2)
        footer = file.read()
        file.truncate(content - length)
        file.seek(POLARITY_BYTES - length)
        file.write(footer)


def _path(address: str) -> str:
    """Path on the hub of a file in `HfFileSystem`."""
    repository, _, file = address.removeprefix("hf://").partition("@")
    return f"{repository}/resolve/{file}"


class Request(NamedTuple):
    """What a client asked for."""

    method: str
    path: str
    range: str | None
    authorization: str | None


class FakeHub(ThreadingHTTPServer):
    """Serves one shard of reviews and one Dolly file.

    Attributes:
        files: Path on the hub, `OWNER/NAME/resolve/REVISION/FILE` for those of models, and content.
        faults: Names, with an argument, of methods of `Handler`, or a status and the header
            Retry-After; each GET of a file takes the next one.
        rate: Bytes per second, over all connections.
        n_bytes: Bytes of files sent.
        requests: All of them, in order.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, shard: Path, dolly: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        with shard.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.files = {_path(POLARITY): content, _path(DOLLY): dolly}
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.faults: Iterator[str] = iter(())
        self.rate = float("inf")
        self.n_bytes = 0
        self.requests: list[Request] = []
        self.closed = threading.Event()
        self._clock, self._lock = 0.0, threading.Lock()

    def handle_error(self, *_: object) -> None:
        """A client has hung up."""

    def wait_for_turn(self, n: int) -> None:
        """Takes as long as n bytes do at the rate."""
        with self._lock:
            self.n_bytes += n
            self._clock = max(self._clock, time.monotonic()) + n / self.rate
            pause = self._clock - time.monotonic()
        self.closed.wait(max(pause, 0))


class Handler(BaseHTTPRequestHandler):
    """What the clients ask for: files, and a repository, its tree, or paths in it."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path, header = self.server, self.path.partition("?")[0].lstrip("/"), self.headers.get
        hub.requests.append(Request(self.command, path, header("Range"), header("Authorization")))
        if path.startswith("cdn/"):
            self.ok(hub.files[path.removeprefix("cdn/")])
        elif path in hub.files:
            fault, _, argument = next(hub.faults, "redirect").partition(" ")
            if fault.isdigit():
                self.answer(int(fault), **({"Retry-After": argument} if argument else {}))
            else:
                getattr(self, fault)(hub.files[path], *filter(None, [argument]))
        elif match := re.match(r"api/(?:models/)?(.+)/(revision|tree)/(\w+)/?(.*)", path):
            repository, kind, revision, folder = match.groups()
            infos = [i for i in self.infos(repository) if i["path"].startswith(folder)]
            siblings = [{"rfilename": info["path"]} for info in infos]
            name = repository.removeprefix("datasets/")
            about = {"id": name, "sha": revision, "siblings": siblings}
            self.json(infos if kind == "tree" else about)
        else:
            self.answer(404, **{"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        path = self.path.lstrip("/")
        size = len(self.server.files[path])
        self.redirect(b"", **{"X-Linked-Size": str(size), "X-Linked-ETag": f'"{size}"'})

    def do_POST(self) -> None:
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        infos = self.infos(self.path.removeprefix("/api/").partition("/paths-info")[0])
        self.json([info for info in infos if info["path"] in body["paths"]])

    def infos(self, repository: str) -> list[dict]:
        """Of the files in a repository, as the hub gives them."""
        files = (
            (p.removeprefix(f"{repository}/resolve/"), f) for p, f in self.server.files.items()
        )
        return [
            {"type": "file", "oid": "0" * 40, "size": len(f), "path": p.partition("/")[2]}
            for p, f in files
            if p not in self.server.files
        ]

    def json(self, value: object) -> None:
        """Answers with JSON."""
        self.answer(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A status, headers, and a body that may be shorter than the header says."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        step = int(min(1 << 16, max(1, self.server.rate / 20)))
        for start in range(0, len(body), step):
            self.server.wait_for_turn(len(body[start : start + step]))
            self.wfile.write(body[start : start + step])

    # ---- a file, whole or in part

    def redirect(self, _: bytes, **headers: str) -> None:
        """To the content network, which has another host name."""
        address = f"http://localhost:{self.server.server_port}/cdn{self.path}"
        commit = self.path.partition("/resolve/")[2].partition("/")[0]
        self.answer(302, Location=address, **{"X-Repo-Commit": commit, **headers})

    def ok(self, content: bytes) -> None:
        """Answers at once."""
        self.answer(*self.requested(content))

    def requested(self, content: bytes) -> tuple[int, bytes]:
        """Status and body for the header Range."""
        if not (span := self.headers.get("Range")):
            return 200, content[:]
        start, _, last = span.removeprefix("bytes=").partition("-")
        return 206, content[int(start) : int(last) + 1]

    def wrong(self, content: bytes) -> None:
        """Has other content of the same length."""
        status, body = self.requested(content)
        self.answer(status, body[::-1])

    def cut(self, content: bytes) -> None:
        """Sends half of the body, and hangs up."""
        status, body = self.requested(content)
        self.answer(status, body[: len(body) // 2], **{"Content-Length": str(len(body))})
        self.close_connection = True

    def late(self, content: bytes, seconds: str) -> None:
        """Thinks first."""
        self.server.closed.wait(float(seconds))
        self.ok(content)

    def silent(self, content: bytes) -> None:
        """Never answers."""
        self.late(content, "600")

    def trickle(self, content: bytes) -> None:
        """Sends a byte now and then."""
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.drip()

    def trickle_headers(self, _: bytes) -> None:
        """Never comes to the body."""
        self.send_response(200)
        self.flush_headers()
        self.wfile.write(b"X-Header: ")
        self.drip()

    def drip(self) -> None:
        """Until somebody hangs up."""
        while not self.server.closed.wait(0.05):
            self.wfile.write(b"x")

    def log_message(self, *_: object) -> None:
        """Is silent."""
