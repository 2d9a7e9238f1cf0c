"""The base model, end to end: tokenizer, training, checkpoint, sample.

    python main.py                                    # TinyShakespeare, eight minutes on two cores
    python main.py --preset tiny                      # thirty seconds, for a first look
    python main.py --data my_texts/ --steps 3000      # your own UTF-8 text
    torchrun --nproc_per_node=2 main.py --preset gpu  # several processes
    python main.py --pretrained smollm2-135m-instruct # a public model: fetch, convert, sample
    python main.py --pretrained gpt2 --steps 200      # and go on training it
    python main.py --init-from models/model_weights.pth --steps 600 --data my.txt

Writes `models/tokenizer.json`, `models/model_weights.pth` and `models/model_weights.log.jsonl`; a
public model goes to `models/NAME/`. After Ctrl-C, `--resume` continues the run.
"""

import argparse
import math
import shutil
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import training
from data_loader import PRETRAINED, find_data_dir, load_corpus, log0, open_pretrained
from data_utils import TokenBatches, prepare_token_ids, prepare_tokenizer
from evaluate import validation_metrics
from generation import BASE, continue_prompt, load_model, reconfigure
from model import GPTConfig, GPTModel, config_from_hf, weights_from_hf
from tokenizer import BPETokenizer
from training import TrainConfig, from_options

MAX_VALIDATION_TOKENS = 100_000  # of a large corpus; TinyShakespeare's validation split is smaller
SAMPLE_TOKENS = 250
CONTINUE_STEPS = 600  # default for a model of one's own
SPARE_TOKENS = 1024  # rows of an embedding without a token, such as those of Qwen3
MODELS = Path("models")
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
# The same for a trained model, whose architecture and tokenizer are given.
CONTINUE: dict[str, Any] = {
    "steps": None,
    "context_length": 256,
    "batch_size": 8,
    "resegment_probability": 0.0,
    "dropout": 0.0,
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "warmup_steps": 20,
    "eval_every": 50,
}


@training.report_errors
def main(argv: list[str] | None = None) -> int:
    """Trains and shows a sample; returns the exit code (130 or 143 when interrupted)."""
    args = _parse(argv)
    with training.start_runtime() as runtime:
        if args.pretrained:
            args.init_from = import_pretrained(args, runtime)
        if args.pretrained and args.steps is None:
            path = args.init_from
        else:
            with training.lock_output_dir(args.out_dir, runtime):
                training.check_output(args, runtime, BASE, "tokenizer.json")
                log0(f"runtime: {runtime.describe()}")
                path = run(args, runtime)
        if runtime.rank == 0:
            _show_sample(path)
    return 0


def run(args: argparse.Namespace, runtime: training.Runtime) -> Path:
    """Trains a base model and saves the weights with the lowest validation loss."""
    data_config, config = (from_options(kind, vars(args)) for kind in (DataConfig, TrainConfig))
    with training.rank_zero_first(runtime):
        corpus = load_corpus(args.dataset, args.data, find_data_dir(args.data_dir))
        cache, splits = args.out_dir / "cache", zip(("train", "validation"), corpus.split())
        if args.init_from:
            model, tokenizer, origin = _open_start(args)
        else:
            tokenizer, origin = prepare_tokenizer(corpus, args.vocab_size, cache), {}
            model = _new_model(args, tokenizer.vocab_size)
        train_ids, validation_ids = (
            prepare_token_ids(name, ranges, corpus, tokenizer, cache) for name, ranges in splits
        )
    model.to(runtime.device)
    if args.compile:
        model.compile()
    log0(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    batches = TokenBatches(
        train_ids,
        tokenizer,
        context_length=args.context_length,
        seed=config.seed,
        steps=config.steps,
        **asdict(data_config),
    )
    log0(f"{len(train_ids):,} tokens, {config.steps / batches.steps_per_epoch:.1f} epochs")
    if (n := len(validation_ids)) > MAX_VALIDATION_TOKENS:
        log0(f"validation: the first {MAX_VALIDATION_TOKENS:,} of {n:,} tokens")
        validation_ids = validation_ids[:MAX_VALIDATION_TOKENS]
    is_play = args.data is None
    metadata = {
        "model_config": asdict(model.config),
        "tokenizer_sha256": tokenizer.sha256,
        "dataset": corpus.name,
        "data_sha256": corpus.sha256,
        "data_config": asdict(data_config),
        "sample_prompt": "ROMEO:" if is_play else tokenizer.decode(validation_ids[:8].tolist()),
        **origin,
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
        contents = {**metadata, "metrics": best, "provenance": provenance}
        weights = model.state_dict()
        print(training.save_result(args.out_dir / BASE, "base", weights, tokenizer, **contents))
    return args.out_dir / BASE


def _new_model(args: argparse.Namespace, vocab_size: int) -> GPTModel:
    config = replace(from_options(GPTConfig, vars(args)), vocab_size=vocab_size)
    torch.manual_seed(args.seed)
    return GPTModel(config)


def _open_start(args: argparse.Namespace) -> tuple[GPTModel, BPETokenizer, dict[str, str]]:
    """The model to go on from, its tokenizer, and what a checkpoint records about it."""
    model, tokenizer, checkpoint = load_model(args.init_from, "base")
    if args.context_length > model.config.context_length:
        raise ValueError(f"--context-length must be at most {model.config.context_length}")
    reconfigure(model, model.config.context_length, args.dropout)
    origin = {"init_from": str(args.init_from), "init_from_sha256": checkpoint["weights_sha256"]}
    return model, tokenizer, origin


def import_pretrained(args: argparse.Namespace, runtime: training.Runtime) -> Path:
    """The checkpoint of a public model, fetched and converted unless it exists."""
    name, started = args.pretrained, time.perf_counter()
    folder = MODELS / Path(name).resolve().name.lower()
    if args.steps is None and args.out_dir != MODELS:
        folder = args.out_dir
    path = folder / BASE
    with training.lock_output_dir(folder, runtime), training.rank_zero_first(runtime):
        if path.is_file():
            recorded = training.load_checkpoint(path, "base").get("pretrained")
            if recorded != name:
                raise ValueError(f"{path} holds {recorded or 'a model of yours'}: use --out-dir")
            log0(f"using {path}")
            return path
        source = open_pretrained(name, find_data_dir(args.data_dir))
        try:
            config = config_from_hf(source.config)
            tokenizer = _open_tokenizer(source.tokenizer)
            if not 0 <= config.vocab_size - tokenizer.vocab_size < SPARE_TOKENS:
                sizes = f"{tokenizer.vocab_size:,} tokens, the model {config.vocab_size:,}"
                raise ValueError(f"the tokenizer has {sizes}")
            weights = weights_from_hf(source.tensors, config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} cannot be opened: {error}") from None
        tokenizer.save(folder / "tokenizer.json")
        provenance = training.provenance(runtime, time.perf_counter() - started)
        contents = {
            "kind": "base",
            "model_config": asdict(config),
            "weights": weights,
            "tokenizer_sha256": tokenizer.sha256,
            "pretrained": name,
            "chat_template": source.chat_template,
            "sample_prompt": "The capital of France is",
            "metrics": {},
            "provenance": provenance,
        }
        training.save_checkpoint(path, contents)
        log0(f"wrote {path}: {path.stat().st_size:,} bytes")
    return path


def _open_tokenizer(source: Path | dict[str, Any]) -> BPETokenizer:
    if isinstance(source, dict):
        return BPETokenizer.from_gguf(**source)
    if (source / "tokenizer.json").is_file():
        return BPETokenizer.load(source / "tokenizer.json")
    return BPETokenizer.load_gpt2(source / "vocab.json", source / "merges.txt")


def _show_sample(path: Path) -> None:
    model, tokenizer, checkpoint = load_model(path, "base")
    if best := checkpoint["metrics"]:
        print(
            f"best at step {best['step']}: {best['val_bits_per_byte']:.4f} bits per byte, "
            f"{best['val_nats_per_byte']:.4f} nats per byte, perplexity "
            f"{best['val_perplexity']:.2f} on {best['val_bytes']:,} bytes of validation text\n"
        )
    prompt = checkpoint["sample_prompt"]
    ids = continue_prompt(model, tokenizer, prompt, SAMPLE_TOKENS)
    print(prompt + "".join(tokenizer.decode_stream(ids)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False)
    start = first.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=PRESETS, default="cpu", help="recipe to start from")
    text = f"public model: {', '.join(PRETRAINED)}, an id on the hub, or a local folder"
    start.add_argument("--pretrained", metavar="NAME", help=text)
    text = "base model to go on training, with its tokenizer and architecture"
    start.add_argument("--init-from", type=Path, metavar="FILE", help=text)
    presets = (
        f"{name}: " + ", ".join(f"{k.replace('_', '-')} {v}" for k, v in options.items())
        for name, options in PRESETS.items()
    )
    parser = training.new_parser(
        "Train the tokenizer and the base model, and show a sample.",
        epilog="Presets change defaults: " + "; ".join(presets),
        parents=[first],
    )
    text = "torch.compile, which did not speed up our test machine"
    parser.add_argument("--compile", action="store_true", help=text)
    training.add_run_flags(
        parser, ("tinyshakespeare", "sample"), "a UTF-8 text file or a folder of them"
    )
    for config_class in (DataConfig, GPTConfig, TrainConfig):
        training.add_config_flags(parser, config_class)
    chosen, _ = first.parse_known_args(argv)
    trained = chosen.pretrained or chosen.init_from
    parser.set_defaults(**(CONTINUE if trained else PRESETS[chosen.preset]))
    if chosen.init_from:
        parser.set_defaults(steps=CONTINUE_STEPS)
    args = parser.parse_args(argv)
    if trained:
        given = {f.name for f in fields(GPTConfig)} - {"context_length", "dropout"}
        given = [name for name in given if getattr(args, name) != parser.get_default(name)]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')}: the model to go on from decides")
    if args.compile and not torch.cuda.is_available() and not any(map(shutil.which, COMPILERS)):
        raise ValueError("--compile needs a C++ compiler such as g++: install one or omit it")
    return args


if __name__ == "__main__":
    training.exit_process(main())
