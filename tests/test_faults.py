"""What life does to trainings: killed processes, full disks, two at once, senseless numbers."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import PLAY, TINY_INSTRUCTIONS, TINY_LORA, TINY_SENTIMENT, unsaved
from streamlit.testing.v1 import AppTest

import app
import evaluate
import finetune_classifier
import finetune_lora_classifier
import finetune_qlora_instructions
import main
import training
from data_loader import Corpus
from data_utils import prepare_token_ids
from generation import continue_prompt
from model import GPTModel
from tokenizer import BPETokenizer
from training import load_checkpoint, save_checkpoint, state_path

ROOT = Path(__file__).parents[1]
TINY_BASE = """--n-layer 1 --n-head 1 --n-embd 16 --context-length 16 --batch-size 4 --steps 150
    --eval-every 5 --vocab-size 300""".split()  # noqa: SIM905
FREQUENT = "--steps 60 --epochs 1000 --eval-every 5".split()  # noqa: SIM905
SAMPLE = ["--dataset", "sample", "--max-examples", "80"]
TRAININGS = {  # file: script, kind, options
    "model_weights.pth": (main, "base", TINY_BASE),
    "finetuned_classifier_weights.pth": (
        finetune_classifier,
        "classifier",
        [*SAMPLE, *TINY_SENTIMENT, *FREQUENT],
    ),
    "lora_classifier_weights.pth": (
        finetune_lora_classifier,
        "lora_classifier",
        [*SAMPLE, *TINY_LORA, *FREQUENT],
    ),
    "qlora_instruction_weights.pth": (
        finetune_qlora_instructions,
        "qlora_instruction",
        [*SAMPLE, *TINY_INSTRUCTIONS, *FREQUENT],
    ),
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(PLAY[:6000])
    return path


def options_of(name: str, all_models: Path, own: Path, out: Path, *more: str) -> list[str]:
    _, kind, options = TRAININGS[name]
    source = (
        ["--data", str(own)]
        if kind == "base"
        else ["--base", str(all_models / "model_weights.pth")]
    )
    return [*source, *options, "--out-dir", str(out), *more]


Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a script in a process of its own, with one thread; none of them outlives the test."""
    started: list[subprocess.Popen] = []

    def start(name: str, options: list[str], launcher: tuple[str, ...] = ()) -> subprocess.Popen:
        command = [sys.executable, *launcher, f"{TRAININGS[name][0].__name__}.py", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        said = (tmp_path / f"stderr{len(started)}.txt").open("w")
        started.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        )
        started[-1].said = Path(said.name)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    assert path.exists(), process.said.read_text()


# ---- kill


def kill_somewhere(
    process: subprocess.Popen, folder: Path, seconds: float, rng: random.Random
) -> int:
    """Kills at a random moment, or while the n-th file is being written; returns the exit code."""
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
    else:
        for _ in range(rng.randint(1, 8)):
            for there in (True, False):  # one that begins, then its end
                while any(folder.glob("*.part")) != there and process.poll() is None:
                    time.sleep(0.0002)
                if there and rng.random() < 0.3:
                    break
    process.kill()
    return process.wait(timeout=120)


def assert_whole(folder: Path) -> None:
    """Every file that bears its final name can be read to the end."""
    for path in folder.glob("*.pth"):
        kind = torch.load(path, weights_only=True)["kind"]
        load_checkpoint(path, kind)
    for path in folder.glob("*.log.jsonl"):
        assert all(map(json.loads, path.read_text().splitlines()))
    for path in folder.glob("tokenizer.json"):
        BPETokenizer.load(path)


def log_of(folder: Path, name: str) -> list[dict]:
    lines = (folder / name).with_suffix(".log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in lines]


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("model_weights.pth", 1),
        *(pytest.param(name, 20, marks=pytest.mark.slow) for name in TRAININGS),
    ],
)
def test_killed_trainings_end_with_the_same_weights(
    name: str, kills: int, all_models: Path, own: Path, tmp_path: Path, start: Start
):
    kind = TRAININGS[name][1]
    expected, folder = tmp_path / "expected", tmp_path / "killed"
    begun = time.monotonic()
    process = start(name, options_of(name, all_models, own, expected))
    assert process.wait(timeout=120) == 0, process.said.read_text()
    seconds = time.monotonic() - begun
    whole = load_checkpoint(expected / name, kind)
    folder.mkdir()
    save_checkpoint(folder / name, {**whole, "metrics": "of an older run"})
    rng, killed = random.Random(name), 0
    while killed < kills:
        resume = ["--resume"] * any(folder.glob("*.resume.pth"))
        process = start(name, options_of(name, all_models, own, folder, *resume))
        code = kill_somewhere(process, folder, seconds, rng)
        assert code in (0, -signal.SIGKILL), process.said.read_text()
        killed += code != 0
        assert_whole(folder)
        assert (folder / name).exists(), "the older checkpoint is lost"
        if not code:
            (folder / "review_lm_weights.pth").unlink(missing_ok=True)
    resume = ["--resume"] * any(folder.glob("*.resume.pth"))
    process = start(name, options_of(name, all_models, own, folder, *resume))
    assert process.wait(timeout=120) == 0, process.said.read_text()
    found = load_checkpoint(folder / name, kind)
    assert found["weights_sha256"] == whole["weights_sha256"]
    assert found["metrics"] == whole["metrics"]
    assert log_of(folder, name) == log_of(expected, name)
    assert not list(folder.glob("*.resume.*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".pth", ".jsonl", ".json")
    }


@pytest.mark.parametrize("name", TRAININGS)
def test_the_state_of_an_unfinished_run_is_not_overwritten(
    name: str, all_models: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Nor are weights and log of a finished one, until the new result is whole."""
    script, _, _ = TRAININGS[name]
    steps = ["--steps", "6", *(["--review-lm-steps", "3"] if "classifier" in name else [])]
    options = options_of(name, all_models, own, tmp_path / "out", *steps)
    assert script.main(options) == 0
    finished = contents(tmp_path / "out")
    capsys.readouterr()
    with unsaved():
        assert script.main([*options, "--seed", "1"]) == 2
    first_line = capsys.readouterr().err.split("\n")[0]
    log = Path(name).with_suffix(".log.jsonl").name
    assert first_line.startswith(f"will replace {name}, ") and log in first_line
    before = contents(tmp_path / "out")
    assert {
        n: before[n] for n in finished if n != "linear_baseline.pth"
    }.items() <= finished.items()
    assert before.keys() - finished.keys() == {
        state_path(name).name,
        state_path(name, ".log.jsonl").name,
    }
    assert script.main(options) == 2
    said = capsys.readouterr().err
    assert f"{state_path(name)} is an unfinished run: add --resume or --overwrite" in said
    assert said.count("\n") == 1 and contents(tmp_path / "out") == before
    if "classifier" in name:  # the language model that it starts from may be unfinished, too
        state_path(tmp_path / "out" / "review_lm_weights.pth").write_bytes(b"158 steps")
    assert script.main([*options, "--overwrite"]) == 0
    assert contents(tmp_path / "out").keys() == finished.keys()


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("model_weights.pth", signal.SIGINT),
        ("qlora_instruction_weights.pth", signal.SIGTERM),
        pytest.param("finetuned_classifier_weights.pth", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("lora_classifier_weights.pth", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_a_state_and_the_command_to_resume(
    name: str, sent: signal.Signals, all_models: Path, own: Path, tmp_path: Path, start: Start
):
    endless = ["--steps", "1000000", *(["--epochs", "1000000"] if "model_w" not in name else [])]
    process = start(name, options_of(name, all_models, own, tmp_path / "out", *endless))
    state = (tmp_path / "out" / name).with_suffix(".resume.pth")
    wait_for(state, process)
    process.send_signal(sent)
    assert process.wait(timeout=60) == 128 + sent
    said = process.said.read_text()
    last = said.strip().split("\n")[-1]
    assert last.startswith(f"interrupted; continue with: python {TRAININGS[name][0].__name__}.py ")
    assert last.endswith(" --resume") and "Traceback" not in said
    load_checkpoint(state, "resume")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "moment", [(evaluate, "validation_metrics"), (training, "save_checkpoint")]
)
def test_an_interruption_at_the_very_end_is_not_lost(
    sent: signal.Signals,
    moment: tuple[ModuleType, str],
    all_models: Path,
    own: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Between the two phases of a fine-tuning, where the second would swallow it.

    In the last validation of the first, or while its last state is written.
    """
    act, last_step = getattr(*moment), 6

    def interrupted(*arguments: Any) -> Any:
        saving = moment[1] == "save_checkpoint"
        if not saving or arguments[1].get("step") == last_step:
            os.kill(os.getpid(), sent)
        return act(*arguments)

    name, out = "lora_classifier_weights.pth", tmp_path / "out"
    options = options_of(name, all_models, own, out)
    with monkeypatch.context() as patch:
        patch.setattr(*moment, interrupted)
        assert finetune_lora_classifier.main(options) == 128 + sent
    assert not (out / name).exists()
    assert finetune_lora_classifier.main([*options, "--resume"]) == 0
    assert (out / name).exists()


# ---- disk


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets this process write files of so many bytes only; not pytest, which may write to one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_token_ids_that_do_not_fit_on_the_disk_are_not_kept(
    own: Path, tokenizer: BPETokenizer, tmp_path: Path
):
    corpus = Corpus("own", (own,))
    with largest_file(3_000), pytest.raises(OSError, match=r"cannot write .*train-"):
        prepare_token_ids("train", corpus.split()[0], corpus, tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("size", [0, 1_000, 20_000, 50_000])
@pytest.mark.parametrize("name", TRAININGS)
def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoint(
    name: str,
    size: int,
    all_models: Path,
    own: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    script, kind, _ = TRAININGS[name]
    folder = tmp_path / "models"
    save_checkpoint(folder / name, {"format": 3, "kind": kind, "weights": {"old": torch.ones(3)}})
    older = (folder / name).read_bytes()
    steps = ["--steps", "6", "--review-lm-steps", "3"][: 2 if script is main else None]
    options = options_of(name, all_models, own, folder, *steps[: 4 if "class" in name else 2])
    with largest_file(size):
        code = script.main(options)
    errors = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1
    assert (folder / name).read_bytes() == older
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("place", ["/proc/models", "a file", "its name is a folder"])
def test_an_unwritable_path_is_one_line(
    name: str,
    place: str,
    all_models: Path,
    own: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    out = Path(place) if place.startswith("/") else tmp_path / place
    if place == "a file":
        out.write_text("")
    elif place == "its name is a folder":
        (out / name).mkdir(parents=True)
    steps = ["--steps", "2", *(["--review-lm-steps", "2"] if "classifier" in name else [])]
    assert TRAININGS[name][0].main(options_of(name, all_models, own, out, *steps)) == 2
    said = capsys.readouterr().err
    errors = [line for line in said.split("\n") if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Makes a folder read-only, for root, too, whom permissions do not stop."""
    mounted: list[Path] = []

    def protect(folder: Path) -> None:
        folder.chmod(0o555)
        if os.geteuid() == 0:
            for options in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
                done = subprocess.run(["mount", *options], capture_output=True)
                if done.returncode:
                    pytest.skip("root may not mount here: run as another user")
                mounted.append(folder)

    yield protect
    for folder in mounted[:1]:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_read_only_folder_is_one_line_and_keeps_its_checkpoint(
    name: str,
    all_models: Path,
    own: Path,
    tmp_path: Path,
    read_only: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / name).write_bytes(b"older")
    read_only(folder)
    assert TRAININGS[name][0].main(options_of(name, all_models, own, folder)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(folder) in said and said.count("\n") == 1
    assert (folder / name).read_bytes() == b"older"


# ---- several processes


def test_a_second_training_in_a_folder_is_refused(
    all_models: Path, own: Path, tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
):
    name, folder = "model_weights.pth", tmp_path / "out"
    long = options_of(name, all_models, own, folder, "--steps", "1000000")
    first = start(name, long)
    wait_for(folder / "model_weights.resume.pth", first)
    for second in ("model_weights.pth", "lora_classifier_weights.pth"):
        assert TRAININGS[second][0].main(options_of(second, all_models, own, folder)) == 2
        assert f"error: another training is running in {folder}" in capsys.readouterr().err
    first.kill()
    first.wait()
    again = options_of(name, all_models, own, folder, "--steps", "3")
    assert main.main(again) == 2
    assert "model_weights.resume.pth is an unfinished run" in capsys.readouterr().err
    assert main.main([*again, "--overwrite"]) == 0


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.slow
def test_a_killed_worker_ends_the_job_which_resumes(
    all_models: Path, own: Path, tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
):
    name, folder = "model_weights.pth", tmp_path / "out"
    options = options_of(name, all_models, own, folder, "--steps", "300", "--batch-size", "5")
    job = start(name, options, TORCHRUN)
    state = folder / "model_weights.resume.pth"
    wait_for(state, job)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    assert job.wait(timeout=60) != 0
    load_checkpoint(state, "resume")
    assert main.main([*options, "--resume"]) == 2
    assert "world_size was 2, is 1" in capsys.readouterr().err
    job = start(name, [*options, "--resume"], TORCHRUN)
    assert job.wait(timeout=120) == 0, job.said.read_text()
    assert load_checkpoint(folder / name, "base")["provenance"]["command"].startswith("torchrun")
    assert not state.exists()


def test_the_app_reads_whole_models_while_they_are_overwritten(
    base_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "MODELS", base_checkpoint.parent)
    checkpoint, done = load_checkpoint(base_checkpoint, "base"), threading.Event()

    def overwrite() -> None:
        sign = 1
        while not done.is_set():
            sign = -sign
            weights = {n: sign * w for n, w in checkpoint["weights"].items()}
            save_checkpoint(base_checkpoint, {**checkpoint, "weights": weights})

    writer, seen = threading.Thread(target=overwrite), set()
    writer.start()
    try:
        while len(seen) < 2 and writer.is_alive():
            model, _, _ = app.loaded("model_weights.pth")
            seen.add(sign_of(model, checkpoint["weights"]))
        for _ in range(30):
            model, _, _ = app.loaded("model_weights.pth")
            seen.add(sign_of(model, checkpoint["weights"]))
        assert writer.is_alive()
    finally:
        done.set()
        writer.join()
    assert seen == {1, -1}


def sign_of(model: GPTModel, weights: dict[str, torch.Tensor]) -> int:
    """1 or -1 for a model of all these weights, or of all of them negated; else 0."""
    for sign in (1, -1):
        if all(torch.equal(p, sign * weights[n]) for n, p in model.named_parameters()):
            return sign
    return 0


# ---- numbers


@pytest.mark.parametrize("name", TRAININGS)
def test_a_rate_of_zero_changes_nothing_and_a_huge_batch_is_no_error(
    name: str, all_models: Path, own: Path, tmp_path: Path
):
    script, kind, _ = TRAININGS[name]
    still = "--learning-rate 0 --muon-learning-rate 0 --batch-size 5000 --eval-every 1".split()  # noqa: SIM905
    found = []
    for steps in ("1", "2"):
        out = tmp_path / steps
        assert script.main(options_of(name, all_models, own, out, *still, "--steps", steps)) == 0
        found.append(load_checkpoint(out / name, kind)["weights_sha256"])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", TRAININGS)
def test_an_absurd_rate_ends_in_one_line_or_in_finite_weights(
    name: str, all_models: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    script, kind, _ = TRAININGS[name]
    absurd = "--learning-rate 1e30 --muon-learning-rate 1e30 --steps 8".split()  # noqa: SIM905
    code = script.main(options_of(name, all_models, own, tmp_path / "out", *absurd))
    said = capsys.readouterr().err
    if code == 0:
        weights = load_checkpoint(tmp_path / "out" / name, kind)["weights"].values()
        assert all(w.isfinite().all() for w in weights)
    else:
        assert code == 2 and said.count("\nerror: ") == 1 and "Traceback" not in said


# ---- memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_memory_stays_flat_over_2000_steps(all_models: Path, own: Path, tmp_path: Path):
    held = []
    for run in range(5):
        options = options_of("model_weights.pth", all_models, own, tmp_path / "out")
        assert main.main([*options, "--steps", "500", "--eval-every", "100"]) == 0
        held.append(resident_bytes())
        print(f"run {run}: {held[-1] / 2**20:.1f} MiB")
    assert held[-1] - held[0] < 10 * 2**20  # 5 KiB a step would be too much


@pytest.mark.slow
def test_memory_stays_flat_over_200_generations(model: GPTModel, tokenizer: BPETokenizer):
    held = []
    for seed in range(220):
        assert len(list(continue_prompt(model, tokenizer, "the king", 40, seed=seed))) <= 40
        held.append(resident_bytes())
    print(f"{held[20] / 2**20:.1f} to {held[-1] / 2**20:.1f} MiB")
    assert held[-1] - held[20] < 5 * 2**20


@pytest.mark.slow
def test_memory_stays_flat_over_100_reruns_of_the_app(
    all_models: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "MODELS", all_models)
    script, held = "import app\napp.generate_page()", []
    page = AppTest.from_string(script, default_timeout=30).run()
    for place in range(120):
        (slider,) = [slider for slider in page.slider if slider.label == "Temperature"]
        page = slider.set_value(0.05 * (place % 40)).run()
        assert not page.exception
        held.append(resident_bytes())
    print(f"{held[20] / 2**20:.1f} to {held[-1] / 2**20:.1f} MiB")
    assert held[-1] - held[20] < 20 * 2**20
