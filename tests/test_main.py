"""`main.py` from text to checkpoint, as a person runs it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_under_torchrun, unsaved

import evaluate
import generation
import main
from tokenizer import BPETokenizer
from training import load_checkpoint

ROOT = Path(__file__).parents[1]
TINY = """--vocab-size 300 --n-layer 1 --n-embd 16 --n-head 2 --context-length 16 --batch-size 4
    --steps 40 --eval-every 10 --warmup-steps 5""".split()  # noqa: SIM905


def options(text: Path, out_dir: Path, *more: str) -> list[str]:
    return ["--data", str(text), "--out-dir", str(out_dir), *TINY, *more]


def weights(out_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out_dir / "model_weights.pth", "base")["weights"]


@pytest.fixture
def trained(own_text: Path, tmp_path: Path) -> Path:
    """Folder of a finished run."""
    assert main.main(options(own_text, tmp_path / "out")) == 0
    return tmp_path / "out"


def test_a_run_leaves_a_checkpoint_that_everything_else_reads(
    own_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trained = tmp_path / "out"
    assert main.main(options(own_text, trained)) == 0
    shown = capsys.readouterr().out
    assert "bits per byte" in shown and "\nROMEO:" not in shown  # but its own text
    names = sorted(path.name for path in trained.iterdir() if path.name != ".training.lock")
    assert names == ["cache", "model_weights.log.jsonl", "model_weights.pth", "tokenizer.json"]
    checkpoint = load_checkpoint(trained / "model_weights.pth", "base")
    tokenizer = BPETokenizer.load(trained / "tokenizer.json")
    assert checkpoint["tokenizer_sha256"] == tokenizer.sha256
    assert checkpoint["dataset"] == "own.txt" and checkpoint["data_sha256"]

    path = str(trained / "model_weights.pth")
    assert generation.main(["--checkpoint", path, "--max-new-tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 5
    validation = own_text.with_name("validation.txt")
    validation.write_text(own_text.read_text()[int(0.9 * 20_000) :])
    found = evaluate.main(["perplexity", "--checkpoint", path, "--data", str(validation), "--json"])
    assert found == 0
    measured = json.loads(capsys.readouterr().out)["nats_per_byte"]
    # Validation ran under bfloat16 where the hardware prefers it, and so does the measurement.
    assert measured == pytest.approx(checkpoint["metrics"]["val_nats_per_byte"], rel=1e-3)


def test_the_log_has_what_the_curves_need(trained: Path):
    lines = [json.loads(line) for line in (trained / "model_weights.log.jsonl").open()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    for line in lines:
        assert {"tokens", "seconds", "loss", "learning_rate", "val_loss"} <= line.keys()
    assert lines[-1]["tokens"] == 40 * 4 * 16


def test_a_second_run_reuses_tokenizer_and_ids(
    trained: Path, own_text: Path, capsys: pytest.CaptureFixture[str]
):
    first = weights(trained)
    capsys.readouterr()
    assert main.main(options(own_text, trained)) == 0
    said = capsys.readouterr().err
    for name in ("tokenizer", "train", "validation"):
        assert said.count(f"using {trained / 'cache' / name}-") == 1
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(trained).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nothing.txt"], "no such file or folder: nothing.txt"),
        (["--n-head", "3"], "not a multiple of n_head 3"),
        (["--vocab-size", "100"], "vocab_size 100: the bytes"),
        (["--context-length", "100000"], "train the base with a smaller --context-length"),
        (["--resegment-probability", "1"], "resegment_probability must lie in [0, 1)"),
        (["--steps", "0"], "steps must lie in [1, inf), not 0"),
        (["--resume"], "to resume: omit --resume"),
    ],
)
def test_mistakes_are_one_line(
    own_text: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    assert main.main(options(own_text, tmp_path / "out", *arguments)) == 2
    (line,) = [x for x in capsys.readouterr().err.split("\n") if x.startswith("error: ")]
    assert message in line


def test_resuming_with_other_options_names_the_difference(
    own_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    arguments = options(own_text, tmp_path / "out")
    with unsaved():
        assert main.main(arguments) == 2
    other_text = tmp_path / "other.txt"
    other_text.write_text(own_text.read_text() + "Exeunt.")
    for more, differences in (
        (["--steps", "41"], ["train_config.steps was 40, is 41"]),
        (["--n-layer", "3"], ["model_config.n_layer was 1, is 3"]),
        (["--vocab-size", "310"], ["tokenizer_sha256 was ", "model_config.vocab_size was 300"]),
        (["--data", str(other_text)], ["data_sha256 was "]),
    ):
        capsys.readouterr()
        assert main.main([*arguments, *more, "--resume"]) == 2
        said = capsys.readouterr().err
        assert all(difference in said for difference in differences), said


@pytest.mark.slow
def test_a_gigabyte_trains_in_bounded_memory(tmp_path: Path, play: str):
    words, random_order = play.split(" "), random.Random(0)
    block = ""
    for _ in range(15):
        random_order.shuffle(words)
        block += " ".join(words) + "\n"
    with (tmp_path / "big.txt").open("w") as file:
        while file.tell() < 1_000_000_000:
            file.write(block)
    arguments = ["--data", str(tmp_path / "big.txt"), "--out-dir", str(tmp_path / "out")]
    command = [sys.executable, "main.py", *arguments, "--preset", "tiny", "--steps", "50"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    made = load_checkpoint(tmp_path / "out" / "model_weights.pth", "base")["provenance"]
    print(f"peak resident memory {made['peak_memory_bytes'] / 2**30:.2f} GiB")
    assert made["peak_memory_bytes"] < 1.5 * 2**30


def test_a_mistake_under_torchrun_is_one_line(tmp_path: Path):
    done = run_under_torchrun("main.py", "--data", str(tmp_path / "none.txt"))
    assert done.returncode != 0
    assert done.stderr.count("error: no such file or folder") == 1
