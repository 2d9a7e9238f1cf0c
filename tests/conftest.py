"""Fixtures small enough to build in a blink; everything is written below `tmp_path`."""

import contextlib
import os
import subprocess
import sys
import tempfile

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.mkdtemp(prefix="hypothesis-")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evaluate
import finetune_classifier
import finetune_lora_classifier
import finetune_qlora_instructions
import generation
import training
from data_loader import SAMPLES
from lora import merge_lora
from model import GPTConfig, GPTModel
from tokenizer import BPETokenizer
from training import Runtime, save_checkpoint

generation.MAX_RESPONSE_TOKENS = 30  # each training of an instruction model samples responses
evaluate.ANSWER_TOKENS = 2  # the report asks every instruction model 80 questions

# Options of trainings that take a second.
TINY_SENTIMENT = """--context-length 24 --batch-size 8 --steps 12 --review-lm-steps 6
    --eval-every 4""".split()  # noqa: SIM905
TINY_LORA = [*TINY_SENTIMENT, "--target-modules", "token_embedding", "qkv"]
TINY_INSTRUCTIONS = """--context-length 64 --batch-size 8 --steps 12 --eval-every 4
    --r 2""".split()  # noqa: SIM905


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the browser tests put their pictures."""
    parser.addoption("--screenshots", help="folder for the screenshots of the browser tests")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The whole quick suite runs in two processes; tests with a marker need the machine alone."""
    is_whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return 2 if is_whole and "and not slow" in config.option.markexpr else 0


PLAY = (SAMPLES / "play.txt").read_text(encoding="utf-8")


@contextlib.contextmanager
def unsaved() -> Iterator[None]:
    """A training that cannot save its result leaves the state to resume."""

    def full_disk(path: Path, checkpoint: dict[str, Any]) -> None:
        if checkpoint["kind"] != "resume":
            raise OSError("no space left")
        save_checkpoint(path, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_checkpoint", full_disk)
        yield


def run_under_torchrun(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in two processes with a thread each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, *launcher, script, *arguments],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="session")
def play() -> str:
    """The bundled play, in TinyShakespeare's format."""
    return PLAY


@pytest.fixture(scope="session")
def tokenizer() -> BPETokenizer:
    """400 tokens learned from the bundled play; shared, so do not change it."""
    return BPETokenizer.train([PLAY], vocab_size=400)


@pytest.fixture
def model(tokenizer: BPETokenizer) -> GPTModel:
    """A two-layer model with random weights everywhere (a fresh one starts with zero logits)."""
    return randomised(GPTModel(tiny_config(tokenizer.vocab_size)))


@pytest.fixture
def runtime() -> Runtime:
    """CPU in full precision."""
    return Runtime(torch.device("cpu"), torch.float32)


def tiny_config(vocab_size: int, **changes: object) -> GPTConfig:
    """Two layers of two heads, context of 16 tokens."""
    shape = {"context_length": 16, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.0}
    return GPTConfig(vocab_size=vocab_size, **{**shape, **changes})


def randomised(model: GPTModel, seed: int = 0) -> GPTModel:
    """The model in evaluation mode, every parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def dequantized(layer: nn.Linear) -> nn.Linear:
    """A plain layer with the weights of one that may have 4 bits."""
    wrapped = nn.Sequential(layer)
    merge_lora(wrapped)
    return wrapped[0]


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    """A text file of one's own."""
    path = tmp_path / "own.txt"
    path.write_text(PLAY[:20_000], encoding="utf-8")
    return path


def save_base(path: Path, model: GPTModel, tokenizer: BPETokenizer) -> None:
    """Writes a base checkpoint with its tokenizer beside it."""
    checkpoint = {
        "kind": "base",
        "model_config": asdict(model.config),
        "weights": model.state_dict(),
        "tokenizer_sha256": tokenizer.sha256,
        "provenance": {"seconds": 1.0, "peak_memory_bytes": 2**30},
    }
    save_checkpoint(path, checkpoint)
    tokenizer.save(path.with_name("tokenizer.json"))


@pytest.fixture
def base_checkpoint(tmp_path: Path, model: GPTModel, tokenizer: BPETokenizer) -> Path:
    """A base checkpoint of random weights with its tokenizer beside it."""
    path = tmp_path / "checkpoints" / "model_weights.pth"
    save_base(path, model, tokenizer)
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets that GPT_DATA_DIR names."""
    folder = os.environ.get("GPT_DATA_DIR")
    if not folder:
        pytest.skip("set GPT_DATA_DIR to a folder with the real data sets")
    return Path(folder)


@pytest.fixture(scope="session")
def all_models(tmp_path_factory: pytest.TempPathFactory, tokenizer: BPETokenizer) -> Path:
    """Folder with a tiny model of each kind, made by the scripts."""
    folder = tmp_path_factory.mktemp("models")
    config = tiny_config(tokenizer.vocab_size, n_embd=64, context_length=64)
    save_base(folder / "model_weights.pth", randomised(GPTModel(config)), tokenizer)
    paths = ["--base", str(folder / "model_weights.pth"), "--out-dir", str(folder)]
    common = [*paths, "--dataset", "sample", "--max-examples", "80"]
    assert finetune_classifier.main([*common, *TINY_SENTIMENT]) == 0
    assert finetune_lora_classifier.main([*common, *TINY_LORA]) == 0
    assert finetune_qlora_instructions.main([*common, *TINY_INSTRUCTIONS]) == 0
    return folder
