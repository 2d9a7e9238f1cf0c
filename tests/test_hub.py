"""Data sets of the Hugging Face Hub, from a local imitation: the real rows, faults, Ctrl-C."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_INSTRUCTIONS, TINY_SENTIMENT
from fake_hub import GROUP, FakeHub, make_shard
from huggingface_hub import HfFileSystem, constants

import data_loader
from data_loader import SourceError, load_instructions, load_reviews

ROOT = Path(__file__).parents[1]
WORDS = "good bad fine poor plot song book film read watch long short loud dull great".split()  # noqa: SIM905
REVIEWS = [
    {
        "label": i % 2,
        "title": None if i % 10 == 3 else f"title {i}",
        "content": " ".join(WORDS[(i * k) % 15] for k in range(1, 9)) + f" / é {i}",
    }
    for i in range(3 * GROUP)
]
TASKS = [
    {"instruction": f"Add {i} and 1.", "context": "", "response": f"{i + 1}", "category": "qa"}
    for i in range(300)
]
DOLLY = "".join(json.dumps(task) + "\n" for task in TASKS).encode()
SHA256 = hashlib.sha256(DOLLY).hexdigest()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reviews, followed by 8 MB of rows that no test loads."""
    path = tmp_path_factory.mktemp("shard") / "shard.parquet"
    rng = np.random.default_rng(0)
    make_shard(path, REVIEWS + [{**row, "content": rng.bytes(150).hex()} for row in REVIEWS * 9])
    return path


@contextlib.contextmanager
def serve(shard: Path) -> Iterator[FakeHub]:
    """The imitation, as long as it is needed."""
    with FakeHub(shard, DOLLY) as hub:
        threading.Thread(target=hub.serve_forever, args=[0.02], daemon=True).start()
        yield hub
        hub.closed.set()
        hub.shutdown()


@pytest.fixture
def hub(shard: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The imitation; this process asks it, and does not wait long."""
    dolly = data_loader.DOWNLOADS["databricks-dolly-15k.jsonl"]
    monkeypatch.setitem(dolly, "sha256", SHA256)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for name in ("HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(shard) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        HfFileSystem.clear_instance_cache()
        yield hub


Load = Callable[[Path], list]
LOADS: dict[str, Load] = {
    "amazon_polarity": lambda folder: load_reviews("amazon_polarity", None, folder, 1500).rows,
    "dolly": lambda folder: load_instructions("dolly", None, folder, 100).rows,
}


@pytest.fixture(params=["amazon_polarity", pytest.param("dolly", marks=pytest.mark.slow)])
def load(request: pytest.FixtureRequest) -> Load:
    """Loads one of the two data sets."""
    return LOADS[request.param]


def script(hub: FakeHub, folder: Path, code: str, **environment: str) -> subprocess.Popen:
    """Starts Python code in the repository, with the imitation for a hub."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")},
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "600",  # else a wait ends without Ctrl-C
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    code = f"""
import signal, data_loader
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
data_loader.DOWNLOADS["databricks-dolly-15k.jsonl"]["sha256"] = {SHA256!r}
{code}"""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)


LOAD = """
import time
for name in ("amazon_cells_labelled.txt", "amazonReviewSnippets_GroundTruth.txt"):
    data_loader.DOWNLOADS[name]["sources"] = ["http://127.0.0.1:9/"]
def main(argv=None):
    started = time.monotonic()
    rows = data_loader.load_reviews("auto", None, data_loader.Path("FOLDER"), N_ROWS).rows
    print(len(rows), f"loaded in {time.monotonic() - started:.1f} s")
    return 0
"""
EXIT = """
from training import exit_process, report_errors
exit_process(report_errors(main)())"""


def load_auto(
    hub: FakeHub, folder: Path, n_rows: int = 100, ending: str = EXIT, **environment: str
) -> subprocess.Popen:
    """Loads `auto` and ends as a script does; prints the number of rows and the seconds."""
    code = LOAD.replace("FOLDER", str(folder)).replace("N_ROWS", str(n_rows))
    return script(hub, folder, code + ending, **environment)


# ---- the rows


def test_the_first_reviews_come_from_the_start_of_the_shard(hub: FakeHub, tmp_path: Path):
    """The rows themselves are the oracle: what went into the Parquet file comes out."""
    found = load_reviews("amazon_polarity", None, tmp_path, 1500)
    texts = ["\n".join(filter(None, (r["title"], r["content"]))) for r in REVIEWS[:1500]]
    assert [review.text for review in found.rows] == texts
    assert [review.label for review in found.rows] == [i % 2 for i in range(1500)]
    (path,) = tmp_path.iterdir()
    assert path.name == "amazon_polarity_1500.jsonl"
    assert [json.loads(line) for line in path.open(encoding="utf-8")] == REVIEWS[:1500]
    assert hub.n_bytes < 5_000_000
    n_requests = len(hub.requests)
    assert load_reviews("amazon_polarity", None, tmp_path, 1400).rows == found.rows[:1400]
    assert len(hub.requests) == n_requests, "rows that are there are not fetched again"


def test_dolly_is_fetched_whole_and_once(hub: FakeHub, tmp_path: Path):
    few = load_instructions("dolly", None, tmp_path, 5).rows
    assert [task.instruction for task in few] == [task["instruction"] for task in TASKS[:5]]
    assert (tmp_path / "databricks-dolly-15k.jsonl").read_bytes() == DOLLY
    n_requests = len(hub.requests)
    assert len(load_instructions("dolly", None, tmp_path, 10_000).rows) == len(TASKS)
    assert len(hub.requests) == n_requests
    (tmp_path / "databricks-dolly-15k.jsonl").write_bytes(DOLLY[:-10])
    with pytest.raises(ValueError, match=r"dolly-15k\.jsonl is damaged or another file"):
        load_instructions("dolly", None, tmp_path, 5)


def test_scripts_train_on_rows_of_the_hub(hub: FakeHub, base_checkpoint: Path, tmp_path: Path):
    hub.faults = iter(["429 1", "500"])
    paths = ["--base", str(base_checkpoint), "--data-dir", str(tmp_path / "data")]
    few = ["--max-examples", "80", "--steps", "2"]
    trainings = {
        "amazon_polarity": ("finetune_classifier", TINY_SENTIMENT),
        "dolly": ("finetune_qlora_instructions", TINY_INSTRUCTIONS),
    }
    processes = {}
    for data, (name, options) in trainings.items():
        more = [*paths, "--out-dir", str(tmp_path / name), *options, *few]
        code = f"""
import generation, training, {name} as script
generation.MAX_RESPONSE_TOKENS = 3
training.exit_process(script.main({more!r}))"""
        processes[data] = script(hub, tmp_path, code)
    for data, process in processes.items():
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert f"data set: {data}, from " in err, err[:1500]


# ---- faults


PASSING = (["429"], ["429 1"], ["500", "503"], ["cut"], ["silent"])


@pytest.mark.parametrize("faults", PASSING, ids=str)
def test_passing_trouble_is_survived(hub: FakeHub, faults: list[str], load: Load, tmp_path: Path):
    hub.faults = iter(faults)
    assert load(tmp_path)
    assert next(hub.faults, None) is None


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("401", "401"),
        ("404", "404 Not Found"),
        ("500", "500 Internal Server Error"),
        ("cut", "HTTPProtocolError|bytes|peer closed"),
        ("silent", "timed out"),
        ("wrong", "unexpected content|Parquet|Thrift"),
    ],
)
def test_lasting_trouble_is_one_line_with_the_reason(
    hub: FakeHub, fault: str, reason: str, load: Load, tmp_path: Path
):
    hub.faults = itertools.repeat(fault)
    line = rf"^hf://.* cannot be downloaded \(.*({reason}).*\); .* supply \S*jsonl yourself$"
    with pytest.raises(SourceError, match=line):
        load(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_rows_that_are_there_have_to_do(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    hub.faults = itertools.repeat("404")
    for name, rows in (("amazon_polarity_3", REVIEWS[:3]), ("dolly_3", TASKS[:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        assert len(LOADS[name.removesuffix("_3")](tmp_path)) == 3
        said = capsys.readouterr().err
        assert "404" in said and "using the 3 rows" in said


# ---- the environment


@pytest.mark.slow
def test_offline_variables_and_a_dead_proxy(hub: FakeHub, tmp_path: Path):
    """The hub is not asked; the samples do, and the reason is given."""
    environments = [{"HF_HUB_OFFLINE": "1"}, {"http_proxy": "http://127.0.0.1:9"}]
    processes = [load_auto(hub, tmp_path, ending="main()", **e) for e in environments]
    for process, environment in zip(processes, environments, strict=True):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.startswith("100 "), err
        assert "data set: sample" in err
        reason = "ConnectError.*refused" if "http_proxy" in environment else "offline mode"
        assert re.search(f"amazon_polarity is not available: hf:.*{reason}", err)
    assert hub.requests == []


def test_the_token_goes_to_the_hub_alone(
    hub: FakeHub, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The content network, to which the hub redirects, does not get it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    load(tmp_path)
    tokens = {request.path.startswith("cdn/"): request.authorization for request in hub.requests}
    assert tokens == {False: "Bearer hf_secret", True: None}


# ---- Ctrl-C and the end of the process


def interrupt(hub: FakeHub, process: subprocess.Popen, is_time: Callable[[], bool]) -> None:
    """Presses Ctrl-C at the first moment that will do, when the hub stops sending: without it, the
    process would wait for minutes. It exits with 130; pressed again at once, it changes nothing."""
    while not is_time():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    hub.rate = min(hub.rate, 1.0)
    time.sleep(0.3)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err, err
    print(f"stopped after {time.monotonic() - started:.2f} s")


@pytest.mark.parametrize(
    "state",
    [
        "trickle",
        *(
            pytest.param(state, marks=pytest.mark.slow)
            for state in ("429 600", "silent", "trickle_headers", "crawl")
        ),
    ],
)
def test_ctrl_c_is_heard_while_the_hub_dawdles(hub: FakeHub, state: str, tmp_path: Path):
    if state == "crawl":
        hub.rate = 1_000.0
    else:
        hub.faults = itertools.repeat(state)
    process = load_auto(hub, tmp_path)
    interrupt(hub, process, lambda: bool(hub.requests))


WAITS = {
    "name server": """
import hashlib, socket
def look_up(*_, **__):  # in C, for many seconds, as one that no server answers
    open("STARTED", "w").close()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
socket.getaddrinfo = look_up
main = lambda argv: data_loader.fetch("wizard_of_oz.txt", "FOLDER")""",
    "package": """
data_loader.PIP = ["slow_pip", "STARTED"]
main = lambda argv: data_loader.fetch("amazonReviewSnippets_GroundTruth.txt", "FOLDER")""",
    "model": """
main = lambda argv: data_loader.open_pretrained("some/model", "FOLDER")""",
}


SLOW_WAITS = [pytest.param(wait, marks=pytest.mark.slow) for wait in ("name server", "package")]


@pytest.mark.parametrize("wait", ["model", *SLOW_WAITS])
def test_ctrl_c_is_heard_in_every_wait(hub: FakeHub, wait: str, tmp_path: Path):
    """A terminal would interrupt pip, too; an editor does not."""
    hub.rate = 1e6
    hub.files["some/model/resolve/main/model.safetensors"] = bytes(100_000_000)
    started, temporary = tmp_path / "started", tmp_path / "temporary"
    temporary.mkdir()
    pip = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
    (tmp_path / "slow_pip.py").write_text(pip)
    code = WAITS[wait].replace("FOLDER", str(tmp_path)).replace("STARTED", str(started))
    environment = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(temporary)}
    process = script(hub, tmp_path, code + EXIT, **environment)
    interrupt(hub, process, lambda: started.exists() or hub.n_bytes > 100_000)
    assert not list(temporary.iterdir())


@pytest.fixture(scope="module")
def large_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """900,000 reviews in 260 MB, as in the real file."""
    rng = np.random.default_rng(0)
    contents = [rng.bytes(138).hex() for _ in range(GROUP)]
    rows = [{"label": i % 2, "title": f"t {i}", "content": c} for i, c in enumerate(contents)]
    path = tmp_path_factory.mktemp("large") / "shard.parquet"
    make_shard(path, rows, n_groups=900)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("megabits", [20, 100])
def test_no_process_aborts_after_the_rows_of_a_large_shard(
    megabits: int, large_shard: Path, tmp_path: Path
):
    with serve(large_shard) as hub:
        hub.rate = megabits * 1e6 / 8
        for run in range(20):
            hub.n_bytes, started = 0, time.monotonic()
            process = load_auto(hub, tmp_path / f"{run}", 20_000)
            out, err = process.communicate(timeout=120)
            seconds = time.monotonic() - started
            print(f"{megabits} Mbit/s: {hub.n_bytes:,} bytes, {seconds:.1f} s, {out.strip()}")
            assert process.returncode == 0 and out.split()[0] == "20000", err
            assert hub.n_bytes < 10_000_000


@pytest.mark.slow
@pytest.mark.parametrize("megabits", [0.8, 8, 20, 100])
def test_ctrl_c_is_heard_while_a_large_shard_loads(
    megabits: float, large_shard: Path, tmp_path: Path
):
    rate = megabits * 1e6 / 8
    for run in range(3):
        with serve(large_shard) as hub:
            hub.rate = rate
            process = load_auto(hub, tmp_path / f"{run}", 20_000)
            interrupt(hub, process, lambda hub=hub: hub.n_bytes > min(2e6, rate))
