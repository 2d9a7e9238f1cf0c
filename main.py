"""The base model, end to end: tokenizer, training, checkpoint, sample.

    python main.py                                    # TinyShakespeare, ten minutes on two cores
    python main.py --preset tiny                      # thirty seconds, for a first look
    python main.py --data my_texts/ --steps 3000      # your own UTF-8 text
    torchrun --nproc_per_node=2 main.py --preset gpu  # several processes

Writes `models/tokenizer.json`, `models/model_weights.pth` and `models/model_weights.log.jsonl`.
Ctrl-C keeps a state that `--resume` goes on from.
"""

import argparse
import math
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_loader import Corpus, find_data_dir, load_corpus, say
from data_utils import TokenBatches, prepare_token_ids, prepare_tokenizer
from evaluate import perplexity
from generation import continue_prompt
from model import GPTConfig, GPTModel
from tokenizer import BPETokenizer
from training import (
    FORMAT_VERSION,
    HelpFormatter,
    Runtime,
    TrainConfig,
    TrainResult,
    add_config_flags,
    given_flags,
    next_token_loss,
    one_line_errors,
    peak_memory_bytes,
    save_checkpoint,
    start_runtime,
    train,
)

MAX_VALIDATION_TOKENS = 500_000  # of a large corpus; TinyShakespeare's validation part is smaller
SAMPLE_PROMPT = "ROMEO:"
SAMPLE_TOKENS = 250


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the batches are made of.

    Attributes:
        vocab_size: Tokens in the vocabulary.
        batch_size: Windows of text a step, over all processes.
        split_probability: Chance that a token is split into the two it was merged from.

    Raises:
        ValueError: A value is out of range.
    """

    vocab_size: int = 2048
    batch_size: int = 16
    split_probability: float = 0.1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if not 0 <= self.split_probability < 1:
            raise ValueError(f"split_probability must lie in [0, 1), not {self.split_probability}")


# What each preset changes; the dataclasses' own defaults are the recipe for two CPU cores.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"steps": 1800, "eval_every": 300},
    "gpu": {
        "n_layer": 8,
        "n_head": 6,
        "n_embd": 384,
        "context_length": 512,
        "dropout": 0.2,
        "batch_size": 64,
        "steps": 4000,
        "eval_every": 250,
    },
    "tiny": {
        "n_layer": 2,
        "n_embd": 128,
        "vocab_size": 1024,
        "steps": 300,
        "eval_every": 100,
        "warmup_steps": 20,
    },
}


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Trains and shows a sample; returns the exit code (130 or 143 when interrupted)."""
    args = _parse(argv)
    options = {**PRESETS[args.preset], **vars(args)}
    data_config = DataConfig(**_fields(DataConfig, options))
    train_config = TrainConfig(**_fields(TrainConfig, options))
    command = shlex.join(["python", "main.py", *(sys.argv[1:] if argv is None else argv)])
    with start_runtime() as runtime:
        return _run(args, options, data_config, train_config, runtime, command)


def _fields(config_class: type, options: dict[str, Any]) -> dict[str, Any]:
    return given_flags(argparse.Namespace(**options), config_class)


def _run(
    args: argparse.Namespace,
    options: dict[str, Any],
    data_config: DataConfig,
    train_config: TrainConfig,
    runtime: Runtime,
    command: str,
) -> int:
    corpus, tokenizer, train_ids, validation_ids = _prepare(args, data_config, runtime)
    model_config = GPTConfig(**{**_fields(GPTConfig, options), "vocab_size": tokenizer.vocab_size})
    torch.manual_seed(train_config.seed)
    model = GPTModel(model_config).to(runtime.device)
    if args.compile:
        model.compile()
    batches = TokenBatches(
        train_ids,
        tokenizer,
        model_config.context_length,
        data_config.batch_size,
        train_config.seed,
        data_config.split_probability,
    )
    if runtime.rank == 0:
        _describe(corpus, tokenizer, train_ids, model, batches, train_config, runtime)
    facts = {
        "data_sha256": corpus.sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "model_config": asdict(model_config),
        "data_config": asdict(data_config),
    }

    def validate() -> dict[str, float]:
        figures = perplexity(model, tokenizer, validation_ids, runtime)
        return {"val_loss": figures["nats_per_byte"], **figures}

    path = args.out_dir / "model_weights.pth"
    result = train(
        model,
        batches,
        next_token_loss,
        train_config,
        runtime=runtime,
        validate=validate,
        run_path=path.with_suffix(""),
        facts=facts,
        resume=args.resume,
    )
    if result.interrupted:
        if runtime.rank == 0:
            flag = "" if args.resume else " --resume"
            say(f"interrupted; continue with: {command}{flag}")
        return 128 + result.interrupted
    if runtime.rank == 0:
        _save(path, result, facts, tokenizer, corpus, runtime, train_config, command)
        model.load_state_dict(result.best_weights)
        _report(path, model.eval(), tokenizer, result)
    return 0


def _prepare(
    args: argparse.Namespace, config: DataConfig, runtime: Runtime
) -> tuple[Corpus, BPETokenizer, np.ndarray, np.ndarray]:
    """Corpus, tokenizer and token ids; made by one process, then read by the others."""
    if runtime.rank:
        dist.barrier()
    corpus = load_corpus(args.dataset, args.data, find_data_dir(args.data_dir))
    cache = args.out_dir / "cache"
    tokenizer = prepare_tokenizer(corpus, config.vocab_size, cache)
    train_part, validation_part = corpus.split()
    train_ids = prepare_token_ids("train", train_part, corpus, tokenizer, cache)
    validation_ids = prepare_token_ids("validation", validation_part, corpus, tokenizer, cache)
    if runtime.rank == 0 and runtime.world_size > 1:
        dist.barrier()
    if not len(validation_ids):
        raise ValueError(f"the text {corpus.name} is too short to split: use a longer one")
    if len(validation_ids) > MAX_VALIDATION_TOKENS:
        say(f"validation: the first {MAX_VALIDATION_TOKENS:,} of {len(validation_ids):,} tokens")
    return corpus, tokenizer, train_ids, validation_ids[:MAX_VALIDATION_TOKENS]


def _describe(
    corpus: Corpus,
    tokenizer: BPETokenizer,
    train_ids: np.ndarray,
    model: GPTModel,
    batches: TokenBatches,
    config: TrainConfig,
    runtime: Runtime,
) -> None:
    n_parameters = sum(p.numel() for p in model.parameters())
    epochs = config.steps / batches.steps_per_epoch
    say(f"runtime: {runtime.describe()}")
    say(
        f"text: {corpus.name}, {len(train_ids):,} training tokens of {tokenizer.vocab_size:,} kinds"
    )
    say(f"model: {n_parameters / 1e6:.2f} M parameters, {config.steps} steps, {epochs:.1f} epochs")


def _save(
    path: Path,
    result: TrainResult,
    facts: dict[str, Any],
    tokenizer: BPETokenizer,
    corpus: Corpus,
    runtime: Runtime,
    config: TrainConfig,
    command: str,
) -> None:
    made = {
        "command": command,
        "dataset": corpus.name,
        "runtime": runtime.describe(),
        "seconds": result.seconds,
        "peak_memory_bytes": peak_memory_bytes(runtime.device),
        "train_config": asdict(config),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    checkpoint = {
        "format": FORMAT_VERSION,
        "kind": "base",
        **facts,
        "weights": result.best_weights,
        "metrics": result.best,
        "made": made,
    }
    tokenizer.save(path.with_name("tokenizer.json"))
    save_checkpoint(path, checkpoint)
    path.with_suffix(".resume.pth").unlink(missing_ok=True)


def _report(path: Path, model: GPTModel, tokenizer: BPETokenizer, result: TrainResult) -> None:
    best = result.best
    print(
        f"best at step {best['step']}: {best['bits_per_byte']:.4f} bits per byte, "
        f"{best['nats_per_byte']:.4f} nats per byte, perplexity {best['perplexity']:.2f} on "
        f"{best['bytes']:,} bytes of validation text"
    )
    print(f"wrote {path} after {math.ceil(result.seconds)} s of training\n")
    ids = continue_prompt(model, tokenizer, SAMPLE_PROMPT, SAMPLE_TOKENS)
    print(SAMPLE_PROMPT + "".join(tokenizer.decode_stream(ids)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the tokenizer and the base model, and show a sample.",
        formatter_class=HelpFormatter,
        epilog="Presets change defaults: "
        + "; ".join(
            f"{name}: " + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in preset.items())
            for name, preset in PRESETS.items()
        ),
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu", help="recipe to start from")
    add(
        "--dataset",
        choices=("auto", "tinyshakespeare", "sample"),
        default="auto",
        help="auto: TinyShakespeare, else the bundled sample",
    )
    add("--data", type=Path, help="a UTF-8 text file or a folder of .txt files, instead")
    add("--data-dir", type=Path, help="folder of downloads; else $GPT_DATA_DIR, else data")
    add("--out-dir", type=Path, default=Path("models"), help="where to write")
    add("--resume", action="store_true", help="go on from an interrupted run with the same options")
    add("--compile", action="store_true", help="torch.compile: faster steps after a slow start")
    for config_class in (DataConfig, GPTConfig, TrainConfig):
        skip = "vocab_size" if config_class is GPTConfig else ""
        add_config_flags(parser, config_class, PRESETS["cpu"], skip)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
