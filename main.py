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
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import training
from data_loader import Corpus, find_data_dir, load_corpus, say
from data_utils import TokenBatches, prepare_token_ids, prepare_tokenizer
from evaluate import perplexity
from generation import continue_prompt, load_language_model
from model import GPTConfig, GPTModel
from tokenizer import BPETokenizer

MAX_VALIDATION_TOKENS = 100_000  # of a large corpus; TinyShakespeare's validation part is smaller
SAMPLE_PROMPT = "ROMEO:"
SAMPLE_TOKENS = 250
COMPILERS = ("g++", "clang++", "cl")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the batches are made of.

    Attributes:
        batch_size: Windows of text a step, over all processes.
        split_probability: Chance that a token is split into the two it was merged from, at the
            start; it falls to zero at the last step.

    Raises:
        ValueError: A value is out of range.
    """

    batch_size: int = 32
    split_probability: float = 0.2

    def __post_init__(self) -> None:
        training.check_range(self, 1, math.inf, "batch_size")
        training.check_range(self, 0, 1, "split_probability")


# What each preset changes of the dataclasses' defaults; `--help` shows those of "cpu".
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"steps": 1200, "weight_decay": 0.3},
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
        "n_head": 2,
        "n_embd": 128,
        "batch_size": 16,
        "steps": 200,
        "eval_every": 100,
        "warmup_steps": 20,
    },
}


@training.one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Trains and shows a sample; returns the exit code (130 or 143 when interrupted)."""
    args = _parse(argv)
    options = {**PRESETS[args.preset], **vars(args)}
    data_config = training.from_options(DataConfig, options)
    model_config = training.from_options(GPTConfig, options)
    train_config = training.from_options(training.TrainConfig, options)
    with training.start_runtime() as runtime, training.training_in(args.out_dir, runtime):
        corpus, tokenizer, train_ids, validation_ids = _prepare_data(
            args, model_config.vocab_size, runtime
        )
        model_config = replace(model_config, vocab_size=tokenizer.vocab_size)
        batches = TokenBatches(
            train_ids,
            tokenizer,
            context_length=model_config.context_length,
            seed=train_config.seed,
            steps=train_config.steps,
            **asdict(data_config),
        )
        model = _new_model(model_config, train_config.seed, args.compile, runtime)
        epochs = train_config.steps / batches.steps_per_epoch
        say(f"{len(train_ids):,} tokens, {train_config.steps} steps, {epochs:.1f} epochs")
        facts = {
            "dataset": corpus.name,
            "data_sha256": corpus.sha256,
            "data_config": asdict(data_config),
        }
        path = args.out_dir / "model_weights.pth"
        train_language_model(
            model,
            tokenizer,
            batches,
            validation_ids,
            train_config,
            runtime=runtime,
            path=path,
            facts=facts,
            resume=args.resume,
        )
        if runtime.rank == 0:
            tokenizer.save(path.with_name("tokenizer.json"))
            training.state_path(path).unlink(missing_ok=True)
            _report(path)
    return 0


def _new_model(config: GPTConfig, seed: int, compiled: bool, runtime: training.Runtime) -> GPTModel:
    torch.manual_seed(seed)
    model = GPTModel(config).to(runtime.device)
    if compiled:
        model.compile()
    say(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    return model


def _prepare_data(
    args: argparse.Namespace, vocab_size: int, runtime: training.Runtime
) -> tuple[Corpus, BPETokenizer, np.ndarray, np.ndarray]:
    """Corpus, tokenizer and token ids; made by the first process, then read by the others."""
    say(f"runtime: {runtime.describe()}")
    with training.first_process_first(runtime):
        corpus = load_corpus(args.dataset, args.data, find_data_dir(args.data_dir))
        cache = args.out_dir / "cache"
        tokenizer = prepare_tokenizer(corpus, vocab_size, cache)
        train_ids, validation_ids = (
            prepare_token_ids(name, part, corpus, tokenizer, cache)
            for name, part in zip(("train", "validation"), corpus.split())
        )
    if len(validation_ids) > MAX_VALIDATION_TOKENS:
        say(f"validation: the first {MAX_VALIDATION_TOKENS:,} of {len(validation_ids):,} tokens")
    return corpus, tokenizer, train_ids, validation_ids[:MAX_VALIDATION_TOKENS]


def train_language_model(
    model: GPTModel,
    tokenizer: BPETokenizer,
    batches: TokenBatches,
    validation_ids: np.ndarray,
    config: training.TrainConfig,
    *,
    runtime: training.Runtime,
    path: Path,
    facts: dict[str, Any],
    resume: bool,
) -> None:
    """Trains a language model in place and saves it: the weights that are best in nats per byte.

    Args:
        model: Ends with the weights that were saved, in half precision.
        tokenizer: The model's own.
        batches: Inputs and targets of each step.
        validation_ids: Token ids of the text that the weights are judged by.
        config: How to train.
        runtime: Where.
        path: Of the checkpoint; log and resumable state lie beside it.
        facts: What the checkpoint tells of data and origin.
        resume: Whether to go on from the resumable state, which stays for the caller to remove.
    """

    def validate() -> dict[str, float]:
        """Figures of the model as it is."""
        figures = perplexity(model, tokenizer, validation_ids, runtime)
        named = {f"val_{name}": value for name, value in figures.items()}
        return {"val_loss": figures["nats_per_byte"], **named}

    facts = {"tokenizer_sha256": tokenizer.sha256, "model_config": asdict(model.config), **facts}
    best, made = training.train(
        model,
        batches,
        training.next_token_loss,
        config,
        runtime=runtime,
        validate=validate,
        path=path,
        facts=facts,
        resume=resume,
    )
    weights = training.half_precision(model.state_dict())
    model.load_state_dict(weights)
    if runtime.rank == 0:
        more = {"weights": weights, "metrics": best, "made": made}
        training.save_checkpoint(path, {"kind": "base", **facts, **more})


def _report(path: Path) -> None:
    model, tokenizer, checkpoint = load_language_model(path)
    best, made = checkpoint["metrics"], checkpoint["made"]
    print(
        f"best at step {best['step']}: {best['val_bits_per_byte']:.4f} bits per byte, "
        f"{best['val_nats_per_byte']:.4f} nats per byte, perplexity {best['val_perplexity']:.2f} "
        f"on {best['val_bytes']:,} bytes of validation text"
    )
    seconds, memory = math.ceil(made["seconds"]), made["peak_memory_bytes"] / 2**30
    print(f"wrote {path}: {seconds} s of training, {memory:.2f} GiB at most\n")
    ids = continue_prompt(model, tokenizer, SAMPLE_PROMPT, SAMPLE_TOKENS)
    print(SAMPLE_PROMPT + "".join(tokenizer.decode_stream(ids)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    presets = (
        f"{name}: " + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in preset.items())
        for name, preset in PRESETS.items()
    )
    parser = training.new_parser(
        "Train the tokenizer and the base model, and show a sample.",
        "Presets change defaults: " + "; ".join(presets),
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu", help="recipe to start from")
    add("--compile", action="store_true", help="torch.compile: faster steps after a slow start")
    training.add_run_flags(
        parser, ("tinyshakespeare", "sample"), "a UTF-8 text file or a folder of them"
    )
    for config_class in (DataConfig, GPTConfig, training.TrainConfig):
        training.add_config_flags(parser, config_class, PRESETS["cpu"])
    args = parser.parse_args(argv)
    if args.compile and not torch.cuda.is_available() and not any(map(shutil.which, COMPILERS)):
        raise ValueError("--compile needs a C++ compiler such as g++: install one or leave it out")
    return args


if __name__ == "__main__":
    training.leave(main())
