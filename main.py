"""The base model, end to end: tokenizer, training, checkpoint, sample.

    python main.py                                    # TinyShakespeare, eight minutes on two cores
    python main.py --preset tiny                      # thirty seconds, for a first look
    python main.py --data my_texts/ --steps 3000      # your own text
    torchrun --nproc_per_node=2 main.py --preset gpu  # several processes
    python main.py --pretrained smollm2-135m-instruct # a public model: fetch, convert, sample
    python main.py --pretrained gpt2 --steps 200      # and train it further
    python main.py --init-from models/model_weights.pth --data my.txt  # train a base further

Writes `models/tokenizer.json`, `models/model_weights.pth` and `models/model_weights.log.jsonl`; a
public model goes to `models/NAME/`. After Ctrl-C, `--resume` continues the run.
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import data_loader
import training
from data_loader import Corpus, find_data_dir, load_corpus, log0
from data_utils import TokenBatches, prepare_token_ids, prepare_tokenizer
from evaluate import validation_metrics
from generation import BASE, continue_prompt, load_model, place_tokenizer, reconfigure
from model import GPTConfig, GPTModel, config_from_hf, weights_from_hf
from tokenizer import BPETokenizer
from training import TrainConfig, from_options, next_token_loss, train

MAX_VALIDATION_TOKENS = 100_000  # of a large corpus; TinyShakespeare's validation split is smaller
PUBLIC_PROMPT, SAMPLE_TOKENS = "The capital of France is", 250
BEST = (
    "best at step {step}: {val_bits_per_byte:.4f} bits per byte, {val_nats_per_byte:.4f} nats per "
    "byte, perplexity {val_perplexity:.2f} on {val_bytes:,} bytes of validation text\n"
)
SPARE_TOKENS = 1024  # upper limit of rows without a token; Qwen3 pads its embedding with some
MODELS = Path("models")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How batches are made.

    Attributes:
        batch_size: Windows of text per step, over all processes.
        resegment_probability: Probability that a token is split into the two it was merged from,
            at the first step; it falls to zero at the last one."""

    batch_size: int = 16
    resegment_probability: float = 0.2

    def __post_init__(self) -> None:
        training.check_range(self, 1, math.inf, "batch_size")
        training.check_range(self, 0, 1, "resegment_probability")


PRESETS = {  # options that each one sets; `--help` shows the resulting defaults
    "cpu": "--steps 1200 --weight-decay 0.6",
    "gpu": "--n-layer 8 --n-head 6 --n-embd 384 --context-length 512 --dropout 0.2 --batch-size 64"
    " --steps 4000 --eval-every 250",
    "tiny": "--n-layer 2 --n-head 2 --n-embd 128 --context-length 128 --steps 200 --eval-every 100"
    " --warmup-steps 20",
}
# The same for a trained model, which brings its tokenizer and architecture.
CONTINUE = (
    "--steps 600 --batch-size 8 --resegment-probability 0 --dropout 0 --optimizer adamw"
    " --learning-rate 1e-4 --warmup-steps 20 --eval-every 50"
)
CONTINUE_CONTEXT = 256  # tokens, or the model's context if that is shorter


@training.report_errors
def main(argv: list[str] | None = None) -> int:
    """Trains and shows a sample; returns the exit code (130 or 143 when interrupted)."""
    args = _parse(argv)
    with training.start_runtime() as runtime:
        if args.pretrained is not None:
            args.init_from = path = import_pretrained(args, runtime)
        if args.steps is not None:  # else --pretrained only converts
            with training.lock_output_dir(args.out_dir, runtime):
                path = run(args, runtime)
        if runtime.rank == 0:
            _show_sample(path)
    return 0


def run(args: argparse.Namespace, runtime: training.Runtime) -> Path:
    """Trains a base model and saves the weights with the lowest validation loss."""
    data_config, config = (from_options(kind, vars(args)) for kind in (DataConfig, TrainConfig))
    with training.rank_zero_first(runtime):
        training.check_output(args, BASE, "tokenizer.json")
        log0(f"runtime: {runtime.describe()}")
        corpus = load_corpus(args.dataset, args.data, find_data_dir(args.data_dir))
        cache, splits = args.out_dir / "cache", zip(("train", "validation"), corpus.split())
        model, tokenizer, origin = _open_model(args, corpus, cache)
        train_ids, validation_ids = (
            prepare_token_ids(name, part, corpus, tokenizer, cache) for name, part in splits
        )
    windows = {**asdict(data_config), "context_length": args.context_length}
    model.to(runtime.device)
    log0(f"model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    batches = TokenBatches(train_ids, tokenizer, seed=config.seed, steps=config.steps, **windows)
    log0(f"{len(train_ids):,} tokens, {config.steps / batches.steps_per_epoch:.1f} epochs")
    if (n := len(validation_ids)) > MAX_VALIDATION_TOKENS:
        log0(f"validation: the first {MAX_VALIDATION_TOKENS:,} of {n:,} tokens")
        validation_ids = validation_ids[:MAX_VALIDATION_TOKENS]
    prompt = tokenizer.decode(validation_ids[:8].tolist()) if args.data else "ROMEO:"
    metadata = {"model_config": asdict(model.config), "tokenizer_sha256": tokenizer.sha256}
    metadata |= {"dataset": corpus.name, "data_sha256": corpus.sha256, "data_config": windows}
    metadata |= {"sample_prompt": prompt, **origin}
    path = args.out_dir / BASE
    validate = partial(validation_metrics, model, tokenizer, validation_ids, runtime)
    rest = runtime, validate, path, metadata, args.resume
    best, provenance = train(model, batches, next_token_loss, config, *rest)
    if runtime.rank == 0:
        metadata |= {"metrics": best, "provenance": provenance}
        print(training.save_result(path, "base", model.state_dict(), tokenizer, **metadata))
    return path


def _open_model(
    args: argparse.Namespace, corpus: Corpus, cache: Path
) -> tuple[GPTModel, BPETokenizer, dict[str, Any]]:
    """The model to train, new or from `--init-from`, its tokenizer, and a record of its origin."""
    if args.init_from is None:
        tokenizer = prepare_tokenizer(corpus, args.vocab_size, cache)
        config = replace(from_options(GPTConfig, vars(args)), vocab_size=tokenizer.vocab_size)
        torch.manual_seed(args.seed)
        return GPTModel(config), tokenizer, {}
    model, tokenizer, checkpoint = load_model(args.init_from, "base")
    length = model.config.context_length
    reconfigure(model, length, args.dropout)
    if args.context_length is None:
        args.context_length = min(CONTINUE_CONTEXT, length)
    if not 1 <= args.context_length <= length:
        raise ValueError(f"--context-length must lie in [1, {length}]")
    origin = {"init_from": str(args.init_from), "init_from_sha256": checkpoint["weights_sha256"]}
    origin["public_base"] = checkpoint.get("pretrained") or checkpoint.get("public_base")
    return model, tokenizer, {**origin, "chat_template": checkpoint.get("chat_template")}


def import_pretrained(args: argparse.Namespace, runtime: training.Runtime) -> Path:
    """The checkpoint of a public model, fetched and converted unless it exists."""
    started, source = time.perf_counter(), data_loader.pretrained_id(args.pretrained)
    is_result = args.steps is None and args.out_dir != MODELS  # with --steps, training writes there
    path = (args.out_dir if is_result else MODELS / Path(source).name.lower()) / BASE
    with training.lock_output_dir(path.parent, runtime), training.rank_zero_first(runtime):
        if path.is_file():
            held = training.load_checkpoint(path, "base", training.command_line())
            if (held := held.get("pretrained", "a model of yours")) != source:
                raise ValueError(f"{path} holds {held}: move it, or use --out-dir without --steps")
            log0(f"using {path}: delete it to convert {source} again")
            return path
        note = training.dependents(path.parent, [BASE])
        published = data_loader.open_pretrained(source, find_data_dir(args.data_dir), note)
        try:
            config = config_from_hf(published.config)
            tokenizer = BPETokenizer.load(published.folder / "tokenizer.json")
            n_tokens, n_rows = tokenizer.vocab_size, config.vocab_size
            if n_rows != n_tokens and (n_rows % 64 or not 0 < n_rows - n_tokens < SPARE_TOKENS):
                raise ValueError(f"the tokenizer has {n_tokens:,} tokens, the model {n_rows:,}")
            if tokenizer.end_id is None:
                raise ValueError("the tokenizer has no token <|endoftext|> or <|end_of_text|>")
            config = replace(config, vocab_size=n_tokens)
            weights = weights_from_hf(published.tensors, config)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(f"{source} cannot be opened: {error}") from None
        if n_rows > n_tokens:
            log0(f"leaving out {n_rows - n_tokens} rows of the embedding, which stand for no token")
        place_tokenizer(tokenizer, path.parent)
        contents = {"kind": "base", "model_config": asdict(config), "weights": weights}
        contents |= {"tokenizer_sha256": tokenizer.sha256, "pretrained": source, "metrics": {}}
        contents |= {"provenance": training.provenance(runtime, time.perf_counter() - started)}
        contents |= {"chat_template": published.chat_template, "sample_prompt": PUBLIC_PROMPT}
        training.save_checkpoint(path, contents)
        log0(f"wrote {path}: {path.stat().st_size:,} bytes")
    return path


def _show_sample(path: Path) -> None:
    model, tokenizer, checkpoint = load_model(path, "base")
    if checkpoint["metrics"]:
        print(BEST.format(**checkpoint["metrics"]))
    prompt = checkpoint["sample_prompt"]
    ids = continue_prompt(model, tokenizer, prompt, SAMPLE_TOKENS)
    print(prompt + "".join(tokenizer.decode_stream(ids)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    first = argparse.ArgumentParser(add_help=False)
    start = first.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=PRESETS, default="cpu", help="recipe to start from")
    text = f"public model: {', '.join(data_loader.PRETRAINED)}, an id on the hub, or a local folder"
    start.add_argument("--pretrained", metavar="NAME", help=text)
    text = "base model to train further, with its tokenizer and architecture"
    start.add_argument("--init-from", type=Path, metavar="FILE", help=text)
    parser = training.new_parser(
        "Train the tokenizer and the base model, and show a sample.",
        epilog="Presets: " + "; ".join(f"{name}: {text}" for name, text in PRESETS.items()),
        parents=[first],
    )
    training.add_run_flags(parser, ("tinyshakespeare", "sample"), "a text file or a folder of them")
    for config_class in (DataConfig, GPTConfig, TrainConfig):
        training.add_config_flags(parser, config_class)
    chosen, _ = first.parse_known_args(argv)  # they choose the defaults of the other flags
    is_trained = (chosen.pretrained, chosen.init_from) != (None, None)
    preset = CONTINUE if is_trained else PRESETS[chosen.preset]
    parser.set_defaults(**vars(parser.parse_args(preset.split())))
    fixed = {f.name for f in fields(GPTConfig)} - {"dropout"} if is_trained else set()
    parser.set_defaults(**dict.fromkeys(fixed))
    if chosen.pretrained is not None:
        parser.set_defaults(steps=None)
    args = parser.parse_args(argv)
    for name in sorted(fixed - {"context_length"}):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: already set by the trained model")
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))  # so that no default applies
    given = {n for n, v in vars(parser.parse_args(argv, blank)).items() if v is not None}
    if args.steps is None and (idle := given - {"pretrained", "out_dir", "data_dir"}):
        raise ValueError(f"--{min(idle).replace('_', '-')} with --pretrained needs --steps")
    return args


if __name__ == "__main__":
    training.exit_process(main())
