"""Files that time, disks and people have damaged: each is refused in a line that names it, or gives
exactly what the whole file gives. Never a traceback, a hang, foreign code, or another model."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PLAY, TINY_INSTRUCTIONS, TINY_LORA, unsaved

import app
import evaluate
import finetune_lora_classifier
import finetune_qlora_instructions
import generation
import main
from data_loader import SAMPLES
from training import load_checkpoint, report_errors

BASE, TOKENIZER = "model_weights.pth", "tokenizer.json"
FULL, LORA = "finetuned_classifier_weights.pth", "lora_classifier_weights.pth"
REVIEW_LM, LINEAR = "review_lm_weights.pth", "linear_baseline.pth"
QLORA = "qlora_instruction_weights.pth"
SECONDS = 60  # no case may take longer
TINY_BASE = """--n-layer 1 --n-head 1 --n-embd 16 --context-length 16 --batch-size 4 --steps 9
    --eval-every 3 --vocab-size 300""".split()  # noqa: SIM905


def generated(folder: Path) -> int:
    path = str(folder / BASE)
    return generation.main(["--checkpoint", path, "--prompt", "the king", "--max-new-tokens", "12"])


def judged(folder: Path, name: str) -> int:
    options = ["--checkpoint", str(folder / name), "--data", str(SAMPLES / "reviews.jsonl")]
    return evaluate.main(["sentiment", *options, "--json"])


def answered(folder: Path) -> int:
    options = ["--checkpoint", str(folder / QLORA), "--data", str(SAMPLES / "instructions.jsonl")]
    return evaluate.main(["instructions", *options, "--json"])


@report_errors
def weighed(argv: list[str]) -> int:
    linear, _, _ = evaluate.load_linear_baseline(Path(argv[0]) / LINEAR)
    print(linear.predict_proba(["good value", "bad idea"]).tolist())
    return 0


def trained(folder: Path, *more: str) -> int:
    """The base, into the folder itself; prints what came out."""
    out = folder / "base"
    code = main.main(["--data", str(folder / "own.txt"), "--out-dir", str(out), *TINY_BASE, *more])
    return code or _show(out / BASE, "base")


def fine_tuned(folder: Path) -> int:
    common = ["--dataset", "sample", "--max-examples", "80", "--base", str(folder / BASE)]
    options = [*common, "--out-dir", str(folder), *TINY_INSTRUCTIONS, "--resume"]
    code = finetune_qlora_instructions.main(options)
    return code or _show(folder / QLORA, "qlora_instruction")


def adapted(folder: Path) -> int:
    common = ["--dataset", "sample", "--max-examples", "80", "--base", str(folder / BASE)]
    options = [*common, "--out-dir", str(folder), *TINY_LORA, "--resume"]
    code = finetune_lora_classifier.main(options)
    return code or _show(folder / LORA, "lora_classifier")


def _show(path: Path, kind: str) -> int:
    print("\nRESULT", load_checkpoint(path, kind)["weights_sha256"])
    return 0


READERS: dict[str, Callable[[Path], int]] = {
    BASE: generated,
    TOKENIZER: generated,
    FULL: lambda folder: judged(folder, FULL),
    LORA: lambda folder: judged(folder, LORA),
    REVIEW_LM: lambda folder: judged(folder, LORA),
    LINEAR: lambda folder: weighed([str(folder)]),
    QLORA: answered,
    "base/model_weights.resume.pth": lambda folder: trained(folder, "--resume"),
    "base/cache/train.bin": lambda folder: trained(folder, "--overwrite"),
    "base/cache/tokenizer.json": lambda folder: trained(folder, "--overwrite"),
    "base/model_weights.resume.log.jsonl": lambda folder: trained(folder, "--resume"),
    "qlora_instruction_weights.resume.pth": fine_tuned,
    "lora_classifier_weights.resume.pth": adapted,
}


@pytest.fixture(scope="module")
def whole(all_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind, and states to resume."""
    folder = tmp_path_factory.mktemp("whole") / "models"
    shutil.copytree(all_models, folder)
    (folder / "own.txt").write_text(PLAY[:6000])
    common = ["--dataset", "sample", "--max-examples", "80", "--base", str(folder / BASE)]
    with unsaved():
        options = [*common, "--out-dir", str(folder), *TINY_INSTRUCTIONS]
        assert finetune_qlora_instructions.main(options) == 2
    with unsaved():
        options = [*common, "--out-dir", str(folder), *TINY_LORA]
        assert finetune_lora_classifier.main(options) == 2
    with unsaved():
        assert trained(folder) == 2
    return folder


def locate(folder: Path, name: str) -> Path:
    """Files of the cache have hashes in their names."""
    path = Path(name)
    (found,) = folder.glob(f"{path.parent}/{path.stem}-*{path.suffix}" if "cache" in name else name)
    return found


class TooLong(BaseException):
    """A reader hangs. No `except Exception` catches it."""


def outcome(read: Callable[[Path], int], folder: Path) -> tuple[int, str, str]:
    """Exit code, what was printed as a result, and the errors said."""

    def too_long(*_: object) -> None:
        raise TooLong

    said, printed = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
            code = read(folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    result = printed.getvalue().split("\nRESULT")[-1]
    return code, result, said.getvalue()


@pytest.fixture(scope="module")
def expected(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each reader makes of the whole file."""
    found = {}
    for name, read in READERS.items():
        folder = tmp_path_factory.mktemp("expected") / "models"
        shutil.copytree(whole, folder)
        code, found[name], said = outcome(read, folder)
        assert code == 0, said
    return found


# ---- damages: each changes a file; `random` is seeded by the case


def truncated(share: float) -> Callable[[Path, random.Random], None]:
    return lambda path, _: os.truncate(path, int(share * path.stat().st_size))


def without_last(n: int) -> Callable[[Path, random.Random], None]:
    return lambda path, _: os.truncate(path, max(0, path.stat().st_size - n))


def flipped(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def scrambled(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    content[start : start + 64] = rng.randbytes(64)
    path.write_bytes(content)


def replaced(content: bytes) -> Callable[[Path, random.Random], None]:
    return lambda path, _: path.write_bytes(content) and None


def swapped(other: str) -> Callable[[Path, random.Random], None]:
    """By a file of another kind."""

    def swap(path: Path, _: random.Random) -> None:
        folder = next(parent for parent in path.parents if parent.name == "models")
        if locate(folder, other) != path:
            shutil.copy(locate(folder, other), path)

    return swap


def rewritten(change: Callable[[dict], None]) -> Callable[[Path, random.Random], None]:
    """A checkpoint saved anew, with valid check sums, after a change."""

    def rewrite(path: Path, _: random.Random) -> None:
        if path.suffix == ".pth":
            checkpoint = torch.load(path, weights_only=True)
            change(checkpoint)
            torch.save(checkpoint, path)
        else:
            path.write_bytes(b"[" + path.read_bytes())

    return rewrite


def older_format(checkpoint: dict) -> None:
    checkpoint["format"] = 1


def one_bit(checkpoint: dict) -> None:
    tensor = next(iter(checkpoint["weights"].values()))
    tensor.view(torch.uint8).view(-1)[0] ^= 1


def without_weights(checkpoint: dict) -> None:
    del checkpoint["weights"]


def other_shapes(checkpoint: dict) -> None:
    checkpoint["weights"] = {n: t.flatten()[:1] for n, t in checkpoint["weights"].items()}


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("exploded",)


def bomb(path: Path, _: random.Random) -> None:
    torch.save({"format": 3, "kind": "base", "weights": Bomb()}, path)


def directory(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "emptied": truncated(0),
    "cut to 1 %": truncated(0.01),
    "cut to 20 %": truncated(0.2),
    "cut to half": truncated(0.5),
    "cut to 90 %": truncated(0.9),
    "cut by 200": without_last(200),
    "cut by 20": without_last(20),
    "cut by 1": without_last(1),
    **{f"flipped {i}": flipped for i in range(8)},
    "scrambled 0": scrambled,
    "scrambled 1": scrambled,
    "zeros": replaced(bytes(1000)),
    "text": replaced(b"to be or not to be\n" * 10),
    "JSON": replaced(b'{"format": 3, "kind": "base"}\n'),
    "numbers": replaced(b"1\n2\n3\n"),
    "binary": replaced(bytes(range(256)) * 8),
    **{f"swapped for {name}": swapped(name) for name in (BASE, LORA, QLORA, TOKENIZER, LINEAR)},
    "older format": rewritten(older_format),
    "one bit": rewritten(one_bit),
    "no weights": rewritten(without_weights),
    "other shapes": rewritten(other_shapes),
    "pickle that runs code": bomb,
    "directory": directory,
}
GOOD = {(FULL, f"swapped for {LORA}"), (QLORA, f"swapped for {BASE}")}  # evaluate.py reads either
CASES = [(name, damage) for name in READERS for damage in DAMAGES if (name, damage) not in GOOD]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(*case, marks=[] if place % 7 == 0 else [pytest.mark.slow])
        for place, case in enumerate(CASES)
    ],
)
def test_a_damaged_file_is_refused_by_name_or_changes_nothing(
    name: str,
    damage: str,
    whole: Path,
    expected: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    assert len(CASES) >= 300
    folder = tmp_path / "models"
    shutil.copytree(whole, folder)
    path = locate(folder, name)
    DAMAGES[damage](path, random.Random(f"{name} {damage}"))
    monkeypatch.chdir(tmp_path)
    code, result, said = outcome(READERS[name], folder)
    assert not (tmp_path / "exploded").exists(), "code ran"
    assert "Traceback" not in said
    if code == 0:
        assert result == expected[name], "another model"
    else:
        errors = [line for line in said.split("\n") if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and said.endswith(errors[0] + "\n")
        assert path.name in errors[0]


@pytest.mark.parametrize("damage", [name for name in DAMAGES if "directory" not in name])
def test_a_damaged_log_shows_the_lines_that_are_whole(damage: str, whole: Path, tmp_path: Path):
    folder = tmp_path / "models"
    shutil.copytree(whole, folder)
    path = folder / "lora_classifier_weights.log.jsonl"
    lines = path.read_bytes().split(b"\n")
    DAMAGES[damage](path, random.Random(damage))
    kept = [line for line in path.read_bytes().split(b"\n") if line in lines]
    rows = app.read_log(path)
    assert all({"step", "seconds"} <= row.keys() for row in rows)
    assert [json.loads(line) for line in kept if line] == [r for r in rows if known(r, lines)]


def known(row: dict, lines: list[bytes]) -> bool:
    return any(json.loads(line) == row for line in lines if line)
