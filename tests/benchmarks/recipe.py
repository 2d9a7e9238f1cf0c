"""The recipe of `main.py` with other settings, compared on text held out from its training part.

    python tests/benchmarks/recipe.py --results FILE [--set dropout=0.05 vocab_size=1024 ...]

Trains on the first 90 % of TinyShakespeare's training part and measures on the rest of it, so that
the validation part remains a test; `--test` trains and measures as `main.py` does. Appends a JSON
line for each run; skips runs that the file has. A setting is an option of `main.py`, or one of:

    average=100       measure the mean weights of the last 100 steps; 0.99: a moving average
    late_context=512  in the last fifth of the steps, windows of 512 tokens, fewer to a batch
"""

import copy
import json
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import training
from data_loader import Corpus, corpus_from_path, find_data_dir, load_corpus
from data_utils import TokenBatches, prepare_token_ids, prepare_tokenizer
from evaluate import validation_metrics
from main import DataConfig, _parse
from model import GPTConfig, GPTModel
from training import Batch, Runtime, TrainConfig, from_options

CONFIGS = (DataConfig, TrainConfig, GPTConfig)
EXTRA = {"average": 0.0, "late_context": 0}  # settings that `main.py` lacks, and their "off"


class WeightAverage:
    """The mean of a model's weights, updated whenever the training asks for a batch."""

    def __init__(self, model: GPTModel, batches: Callable, average: float, steps: int):
        self.model, self.batches, self.average = model, batches, average
        self.mean, self.step = copy.deepcopy(model).eval().requires_grad_(False), 0
        self.start = steps - average if average >= 1 else 0

    def __call__(self, step: int, n_micro: int) -> list[Batch]:
        self.update(step)
        return self.batches(step, n_micro)

    def update(self, step: int) -> GPTModel:
        """Takes in the weights after `step` steps, once; returns the model with the mean."""
        if step > self.step:
            newest = max(1 - self.average, 1 / max(1, step - self.start))  # a plain mean at first
            weights = [p.detach() for p in self.model.parameters()]
            torch._foreach_lerp_([*self.mean.parameters()], weights, newest)
            self.step = step
        return self.mean


def parse_settings(settings: dict[str, object], steps: int, seed: int) -> Namespace:
    """The options of `main.py` and the extra ones, with these settings."""
    flags = [f"--steps={steps}", f"--seed={seed}"]
    for name in settings.keys() - EXTRA.keys():
        flag, value = name.replace("_", "-"), str(settings[name])
        flags.append(f"--no-{flag}" if value == "False" else f"--{flag}={value}")
    extra = {name: type(off)(settings.get(name, off)) for name, off in EXTRA.items()}
    return Namespace(**vars(_parse(flags)), **extra)


def measure(
    args: Namespace, corpus: Corpus, folder: Path, runtime: Runtime, build: Callable = GPTModel
) -> dict[str, object]:
    """Trains on the first 90 % of a corpus as `main.run` does; the best metrics on the rest."""
    data, config, shape = (from_options(kind, vars(args)) for kind in CONFIGS)
    tokenizer = prepare_tokenizer(corpus, args.vocab_size, folder)
    splits = zip(("train", "validation"), corpus.split())
    ids, held_out = (prepare_token_ids(*x, corpus, tokenizer, folder) for x in splits)
    length = max(args.context_length, args.late_context)
    torch.manual_seed(config.seed)
    model = build(replace(shape, vocab_size=tokenizer.vocab_size, context_length=length))
    windows = {**asdict(data), "seed": config.seed, "steps": config.steps}
    early = TokenBatches(ids, tokenizer, args.context_length, **windows)
    windows["batch_size"] = data.batch_size * args.context_length // length
    late = TokenBatches(ids, tokenizer, length, **windows)  # the same without `late_context`

    def batches(step: int, n_micro: int) -> list[Batch]:
        return (early if step < 0.8 * config.steps else late)(step, n_micro)

    def validate() -> dict[str, float]:
        return validation_metrics(average.update(average.step + 1), tokenizer, held_out, runtime)

    average = WeightAverage(model.to(runtime.device), batches, args.average, config.steps)
    options = {"runtime": runtime, "validate": validate, "path": folder / "run.pth", "metadata": {}}
    best, made = training.train(model, average, training.next_token_loss, config, **options)
    n_parameters = sum(p.numel() for p in model.parameters())
    return {"nats_per_byte": best["val_loss"], "best": best, "parameters": n_parameters, **made}


def main() -> None:
    """Runs what the results lack, and prints the mean over the seeds."""
    parser = ArgumentParser(description="Compare settings of the base recipe.")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--test", action="store_true", help="measure on the validation part")
    args, losses = parser.parse_args(), []
    settings = dict(sorted(setting.split("=") for setting in args.set))
    args.results.touch()
    with tempfile.TemporaryDirectory() as name, training.start_runtime() as runtime:
        corpus, text = load_corpus("tinyshakespeare", None, find_data_dir()), Path(name, "text.txt")
        if not args.test:
            text.write_text("".join(corpus.split()[0].read()), encoding="utf-8")
            corpus = corpus_from_path(text)
        for seed in args.seeds:
            key = {"settings": settings, "steps": args.steps, "test": args.test, "seed": seed}
            rows = map(json.loads, args.results.read_text().splitlines())
            row = next((row for row in rows if key.items() <= row.items()), None)
            if row is None:
                options = parse_settings(settings, args.steps, seed)
                row = key | measure(options, corpus, text.parent, runtime)
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            losses.append(row["nats_per_byte"])
    print(f"{settings}: {sum(losses) / len(losses):.4f} nats per byte, the mean of {losses}")


if __name__ == "__main__":
    main()
