"""The base model, end to end: tokenizer, training, checkpoint, sample.

    python main.py                                    # TinyShakespeare, eight minutes on two cores
    python main.py --preset tiny                      # thirty seconds, for a first look
    python main.py --data my_texts/ --steps 3000      # your own UTF-8 text
    torchrun --nproc_per_node=2 main.py --preset gpu  # several processes

Writes `models/tokenizer.json`, `models/model_weights.pth` and `models/model_weights.log.jsonl`.
After Ctrl-C, `--resume` continues the run.
"""

import argparse
import math
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import training
from data_loader import find_data_dir, load_corpus, log0
from data_utils import TokenBatches, prepare_token_ids, prepare_tokenizer
from evaluate import validation_metrics
from generation import BASE, continue_prompt, load_model
from model import GPTConfig, GPTModel
from training import TrainConfig, from_options

MAX_VALIDATION_TOKENS = 100_000  # of a large corpus; TinyShakespeare's validation split is smaller
SAMPLE_PROMPT, SAMPLE_TOKENS = "ROMEO:", 250
COMPILERS = ("g++", "clang++", "cl")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How batches are made.

    Attributes:
        batch_size: Windows of text per step, over all processes.
        resegment_probability: Probability that a token is split into the two it was merged from,
            at the first step; it falls to zero at the last one.
    """

    batch_size: int = 32
    resegment_probability: float = 0.2

    def __post_init__(self) -> None:
        training.check_range(self, 1, math.inf, "batch_size")
        training.check_range(self, 0, 1, "resegment_probability")


# What each preset changes of the dataclasses' defaults; `--help` shows those of the chosen one.
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


@training.report_errors
def main(argv: list[str] | None = None) -> int:
    """Trains and shows a sample; returns the exit code (130 or 143 when interrupted)."""
    args = _parse(argv)
    with training.start_runtime() as runtime, training.lock_output_dir(args.out_dir, runtime):
        log0(f"runtime: {runtime.describe()}")
        run(args, runtime)
        if runtime.rank == 0:
            _show_result(args.out_dir / BASE)
    return 0


def run(args: argparse.Namespace, runtime: training.Runtime) -> None:
    """Trains a base model and saves the weights with the lowest validation loss."""
    kinds = (DataConfig, GPTConfig, TrainConfig)
    data_config, model_config, config = (from_options(kind, vars(args)) for kind in kinds)
    with training.rank_zero_first(runtime):
        corpus = load_corpus(args.dataset, args.data, find_data_dir(args.data_dir))
        cache, splits = args.out_dir / "cache", zip(("train", "validation"), corpus.split())
        tokenizer = prepare_tokenizer(corpus, model_config.vocab_size, cache)
        train_ids, validation_ids = (
            prepare_token_ids(name, ranges, corpus, tokenizer, cache) for name, ranges in splits
        )
    batches = TokenBatches(
        train_ids,
        tokenizer,
        context_length=model_config.context_length,
        seed=config.seed,
        steps=config.steps,
        **asdict(data_config),
    )
    log0(f"{len(train_ids):,} tokens, {config.steps / batches.steps_per_epoch:.1f} epochs")
    if (n := len(validation_ids)) > MAX_VALIDATION_TOKENS:
        log0(f"validation: the first {MAX_VALIDATION_TOKENS:,} of {n:,} tokens")
        validation_ids = validation_ids[:MAX_VALIDATION_TOKENS]
    model = _new_model(replace(model_config, vocab_size=tokenizer.vocab_size), args, runtime)
    metadata = {
        "model_config": asdict(model.config),
        "tokenizer_sha256": tokenizer.sha256,
        "dataset": corpus.name,
        "data_sha256": corpus.sha256,
        "data_config": asdict(data_config),
    }
    best, provenance = training.train(
        model,
        batches,
        training.next_token_loss,
        config,
        runtime=runtime,
        validate=partial(validation_metrics, model, tokenizer, validation_ids, runtime),
        path=args.out_dir / BASE,
        metadata=metadata,
        resume=args.resume,
    )
    if runtime.rank == 0:
        tokenizer.save(args.out_dir / "tokenizer.json")
        contents = {"weights": model.state_dict(), "metrics": best, "provenance": provenance}
        print(training.save_result(args.out_dir / BASE, "base", **metadata, **contents))


def _new_model(config: GPTConfig, args: argparse.Namespace, runtime: training.Runtime) -> GPTModel:
    torch.manual_seed(args.seed)
    model = GPTModel(config).to(runtime.device)
    if args.compile:
        model.compile()
    log0(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    return model


def _show_result(path: Path) -> None:
    model, tokenizer, checkpoint = load_model(path, "base")
    best = checkpoint["metrics"]
    print(
        f"best at step {best['step']}: {best['val_bits_per_byte']:.4f} bits per byte, "
        f"{best['val_nats_per_byte']:.4f} nats per byte, perplexity {best['val_perplexity']:.2f} "
        f"on {best['val_bytes']:,} bytes of validation text\n"
    )
    ids = continue_prompt(model, tokenizer, SAMPLE_PROMPT, SAMPLE_TOKENS)
    print(SAMPLE_PROMPT + "".join(tokenizer.decode_stream(ids)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    preset = argparse.ArgumentParser(add_help=False)
    preset.add_argument("--preset", choices=PRESETS, default="cpu", help="recipe to start from")
    presets = (
        f"{name}: " + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in options.items())
        for name, options in PRESETS.items()
    )
    parser = training.new_parser(
        "Train the tokenizer and the base model, and show a sample.",
        epilog="Presets change defaults: " + "; ".join(presets),
        parents=[preset],
    )
    text = "torch.compile, which did not speed up our test machine"
    parser.add_argument("--compile", action="store_true", help=text)
    training.add_run_flags(
        parser, ("tinyshakespeare", "sample"), "a UTF-8 text file or a folder of them"
    )
    for config_class in (DataConfig, GPTConfig, TrainConfig):
        training.add_config_flags(parser, config_class)
    parser.set_defaults(**PRESETS[preset.parse_known_args(argv)[0].preset])
    args = parser.parse_args(argv)
    if args.compile and not torch.cuda.is_available() and not any(map(shutil.which, COMPILERS)):
        raise ValueError("--compile needs a C++ compiler such as g++: install one or omit it")
    return args


if __name__ == "__main__":
    training.exit_process(main())
