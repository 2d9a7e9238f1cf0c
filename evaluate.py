"""Measures models on text they were not trained on.

    python evaluate.py [--models DIR]                            # table of a whole model set
    python evaluate.py perplexity --data FILE [--checkpoint FILE] [--json]
    python evaluate.py sentiment (--data FILE | --text TEXT) [--checkpoint FILE] [--json]
    python evaluate.py instructions --data FILE [--checkpoint FILE] [--json]

Bits per byte, the loss of a whole text in bits divided by its UTF-8 bytes, compares models with
different vocabularies. Perplexity, e to the nats per token, does not: longer tokens are harder to
predict.
"""

import argparse
import contextlib
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data_loader
import data_utils
import generation
import training
from data_loader import ByteRange, Instruction, Review, log0
from data_utils import EncodedInstruction, Split
from generation import BASE, COMMANDS, FULL_CLASSIFIER, LORA_CLASSIFIER, QLORA, REVIEW_LM
from lora import count_parameters, merge_lora
from model import GPTClassificationModel, GPTModel
from tokenizer import BPETokenizer
from training import Runtime

INSTRUCTION_CONTEXT = 256  # tokens of prompt and response
LINEAR_BASELINE = "linear_baseline.pth"
LINEAR, MAJORITY = "TF-IDF + logistic regression", "majority class"
JUDGED_RESPONSES = 100
MAX_WINDOW, BATCH_TOKENS = 512, 4096  # bound the memory of models with a long context
Metrics = dict[str, Any]


# ---- metrics of a model on data


def language_model_metrics(
    model: GPTModel, tokenizer: BPETokenizer, ids: np.ndarray, runtime: Runtime
) -> Metrics:
    """Scores every token of a text (N,) once, in windows that advance by half a context or 256."""
    if not len(ids):
        raise ValueError("there is no text to measure")
    n_bytes = data_utils.count_bytes(ids, tokenizer)
    start = tokenizer.end_id
    length = min(model.config.context_length, MAX_WINDOW)
    windows = data_utils.scoring_windows(ids, length, start, max(1, BATCH_TOKENS // length))
    nats_per_token = training.mean_loss(model, windows, training.next_token_loss, runtime)
    nats_per_byte = nats_per_token * len(ids) / n_bytes
    return {
        "bits_per_byte": nats_per_byte / math.log(2),
        "nats_per_byte": nats_per_byte,
        "perplexity": math.exp(nats_per_token) if nats_per_token < 700 else math.inf,
        "tokens": len(ids),
        "bytes": n_bytes,
    }


def validation_metrics(
    model: GPTModel, tokenizer: BPETokenizer, ids: np.ndarray, runtime: Runtime
) -> Metrics:
    """`language_model_metrics` as a training logs them; its "val_loss" is in nats per byte."""
    metrics = language_model_metrics(model, tokenizer, ids, runtime)
    return {"val_loss": metrics["nats_per_byte"], **{f"val_{k}": v for k, v in metrics.items()}}


def text_metrics(
    model: GPTModel, tokenizer: BPETokenizer, byte_range: ByteRange, runtime: Runtime
) -> Metrics:
    """`language_model_metrics` on a part of a corpus."""
    chunks = data_utils.encode_documents(data_loader.read_text(byte_range), tokenizer)
    ids = np.concatenate([np.array(ids) for ids in chunks])
    return language_model_metrics(model, tokenizer, ids, runtime)


def classification_metrics(
    predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> Metrics:
    """How well predicted classes (N,) match labels (N,), indices into `names`; "ci95" is the 95 %
    interval of the accuracy (Wilson 1927), and the rows of "confusion" are labels."""
    from scipy.stats import binomtest
    from sklearn.metrics import confusion_matrix, f1_score

    n, classes = len(labels), list(range(len(names)))
    interval = binomtest(int((predicted == labels).sum()), n).proportion_ci(method="wilson")
    macro_f1 = f1_score(labels, predicted, labels=classes, average="macro", zero_division=0)
    return {
        "accuracy": float((predicted == labels).mean()),
        "ci95": [float(interval.low), float(interval.high)],
        "macro_f1": float(macro_f1),
        "labels": list(names),
        "confusion": confusion_matrix(labels, predicted, labels=classes).tolist(),
        "n": n,
    }


def classifier_metrics(
    model: GPTClassificationModel,
    tokenizer: BPETokenizer,
    rows: list[Review],
    names: Sequence[str],
    runtime: Runtime,
) -> Metrics:
    """`classification_metrics` of a classifier on labelled reviews."""
    texts, labels = [row.text for row in rows], np.array([row.label for row in rows])
    predicted = generation.class_probabilities(model, tokenizer, texts, runtime).argmax(1)
    return classification_metrics(predicted, labels, names)


def response_metrics(
    model: GPTModel, tokenizer: BPETokenizer, examples: list[EncodedInstruction], runtime: Runtime
) -> Metrics:
    """Loss on the responses alone, including their final `<|endoftext|>`."""
    batches = data_utils.instruction_batches(examples, tokenizer, model.config.context_length)
    nats = training.mean_loss(model, batches, training.next_token_loss, runtime)
    responses = np.concatenate([np.array(example.targets) for example in examples])
    responses = responses[responses != data_utils.IGNORE]
    n_bytes = data_utils.count_bytes(responses, tokenizer)
    return {
        "response_bits_per_byte": nats * len(responses) / n_bytes / math.log(2),
        "response_perplexity": math.exp(nats) if nats < 700 else math.inf,
        "n": len(examples),
    }


def instruction_metrics(
    model: GPTModel, tokenizer: BPETokenizer, rows: list[Instruction], runtime: Runtime
) -> Metrics:
    """`response_metrics` on examples that are not encoded yet."""
    examples = data_utils.encode_instructions(rows, tokenizer, model.config.context_length)
    return response_metrics(model, tokenizer, examples, runtime)


def stop_rate(model: GPTModel, tokenizer: BPETokenizer, rows: list[Instruction]) -> float:
    """Fraction of sampled responses that end by themselves within `MAX_RESPONSE_TOKENS`.

    Uses a merged copy: equivalent and several times faster than 4 bits.
    """
    judged, merged = rows[:JUDGED_RESPONSES], copy.deepcopy(model)
    merge_lora(merged)
    n_stopped = 0
    for seed, row in enumerate(tqdm(judged, desc="responses", unit="response")):
        length = len(list(generation.generate_response(merged, tokenizer, row, seed=seed)))
        n_stopped += length < generation.MAX_RESPONSE_TOKENS
    return n_stopped / len(judged)


# ---- the linear baseline


def fit_linear_baseline(split: Split[Review], names: Sequence[str]) -> dict[str, Any]:
    """Fits the classifier to beat, logistic regression on TF-IDF weights of words and word pairs:
    its "model", its "metrics" (see `baseline_metrics`) and its "provenance"."""
    linear, train = _new_linear_model(), [*split.train, *split.validation]
    started = time.perf_counter()
    linear.fit([row.text for row in train], [row.label for row in train])
    provenance = {
        "command": training.command_line(),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": training.peak_memory_bytes(torch.device("cpu")),
    }
    metrics = baseline_metrics(linear, split, names)
    return {"model": linear, "metrics": metrics, "provenance": provenance}


def _new_linear_model(words: list[str] | None = None) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    features = TfidfVectorizer(ngram_range=(1, 2), vocabulary=words)
    return make_pipeline(features, LogisticRegression(C=10, max_iter=1000))


def baseline_metrics(linear: Any, split: Split[Review], names: Sequence[str]) -> dict[str, Metrics]:
    """Metrics on the test split of the linear baseline and of guessing the largest class."""
    labels = np.array([row.label for row in split.test])
    seen = [row.label for row in (*split.train, *split.validation)]
    largest = np.full(len(labels), np.bincount(seen).argmax())
    guesses = {LINEAR: linear.predict([row.text for row in split.test]), MAJORITY: largest}
    return {name: classification_metrics(guess, labels, names) for name, guess in guesses.items()}


def save_linear_baseline(baseline: dict[str, Any], path: str | Path, data: dict[str, Any]) -> None:
    """Writes a fitted baseline as plain tensors and words, which run no code when loaded."""
    features, model = baseline["model"][0], baseline["model"][1]
    arrays = {"idf": features.idf_, "coef": model.coef_, "intercept": model.intercept_}
    contents = {
        "kind": "linear",
        "words": "\n".join(sorted(features.vocabulary_, key=features.vocabulary_.get)),
        "labels": baseline["metrics"][LINEAR]["labels"],
        **data,
        "metrics": {"test": baseline["metrics"][LINEAR]},
        "provenance": baseline["provenance"],
        "weights": {name: torch.tensor(a, dtype=torch.float32) for name, a in arrays.items()},
    }
    training.save_checkpoint(path, contents)


def load_linear_baseline(path: str | Path) -> tuple[Any, None, dict[str, Any]]:
    """A baseline that `save_linear_baseline` wrote, no tokenizer, and the checkpoint."""
    checkpoint = training.load_checkpoint(path, "linear", COMMANDS[FULL_CLASSIFIER])
    with generation.checkpoint_errors(Path(path), COMMANDS[FULL_CLASSIFIER]):
        weights = {name: tensor.double().numpy() for name, tensor in checkpoint["weights"].items()}
        linear = _new_linear_model(checkpoint["words"].split("\n"))
        features, model = linear[0], linear[1]
        features.idf_ = weights["idf"]
        model.coef_, model.intercept_ = weights["coef"], weights["intercept"]
        model.classes_ = np.arange(len(checkpoint["labels"]))
    return linear, None, checkpoint


# ---- the comparison of a model set


class Row(NamedTuple):
    """A row of the report."""

    model: str
    file: str
    measure: Callable  # the metrics of (model, tokenizer, checkpoint, data_dir, runtime)
    measured_on: str = ""  # else the name of the data set
    load: Callable = generation.load_model


def report(models: Path, data_dir: Path, runtime: Runtime) -> dict[str, list[Metrics]]:
    """Measures every checkpoint of a model set on its held-out data: for each task a row per model,
    with metrics and costs, or with a "problem" that names the command to run."""
    return {
        task: [_measure_row(row, models / row.file, data_dir, runtime) for row in rows]
        for task, rows in REPORT.items()
    }


def _measure_row(row: Row, path: Path, data_dir: Path, runtime: Runtime) -> Metrics:
    try:
        model, tokenizer, checkpoint = row.load(path, runtime=runtime)
        metrics = row.measure(model, tokenizer, checkpoint, data_dir, runtime)
    except (ValueError, OSError) as error:
        return {"model": row.model, "problem": str(error)}
    if row.file == LINEAR_BASELINE:
        trained = total = sum(tensor.numel() for tensor in checkpoint["weights"].values())
    else:
        trained, total = count_parameters(model)
    costs = {
        "trained_parameters": trained,
        "parameters": total,
        "file_bytes": checkpoint.get("path", path).stat().st_size,
        "seconds": checkpoint["provenance"]["seconds"],
        "peak_memory_bytes": checkpoint["provenance"]["peak_memory_bytes"],
    }
    if row.model == MAJORITY:
        costs = dict.fromkeys(costs, 0)  # a guess costs nothing
    measured_on = row.measured_on or checkpoint["dataset"]
    return {"model": row.model, "measured_on": measured_on, **metrics, **costs}


def _load_untouched_base(path, runtime):
    """The base of an instruction model, with the same context."""
    tuned = training.load_checkpoint(path, generation.INSTRUCTION_MODELS, COMMANDS[path.name])
    base_path = path.parent / tuned["base"]
    model, tokenizer, base = generation.load_model(base_path, "base")
    model = generation.reconfigure(model, tuned["model_config"]["context_length"])
    checkpoint = {**tuned, "provenance": base["provenance"], "path": base_path}
    return model.to(runtime.device), tokenizer, checkpoint


def _on_shakespeare(model, tokenizer, _, data_dir, runtime):
    play = data_loader.load_corpus("tinyshakespeare", None, data_dir)
    return text_metrics(model, tokenizer, play.split()[1], runtime)


def _on_oz(model, tokenizer, _, data_dir, runtime):
    book = data_loader.corpus_from_path(data_loader.fetch(data_loader.WIZARD_OF_OZ, data_dir))
    return text_metrics(model, tokenizer, book.split(1.0)[0], runtime)


def _on_reviews_as_text(model, tokenizer, checkpoint, data_dir, runtime):
    reviews = rebuild_split(checkpoint, data_loader.REVIEW_SOURCES, data_dir).test
    ids = data_utils.reviews_as_text(reviews, tokenizer)
    return language_model_metrics(model, tokenizer, ids, runtime)


def _on_reviews(model, tokenizer, checkpoint, data_dir, runtime):
    reviews = rebuild_split(checkpoint, data_loader.REVIEW_SOURCES, data_dir).test
    return classifier_metrics(model, tokenizer, reviews, checkpoint["labels"], runtime)


def _on_tasks(model, tokenizer, checkpoint, data_dir, runtime):
    tasks = rebuild_split(checkpoint, data_loader.INSTRUCTION_SOURCES, data_dir).test
    metrics = instruction_metrics(model, tokenizer, tasks, runtime)
    return {**metrics, "stops": stop_rate(model, tokenizer, tasks)}


def _baseline_row(name: str) -> Row:
    def measure(linear, _, checkpoint, data_dir, __):
        split = rebuild_split(checkpoint, data_loader.REVIEW_SOURCES, data_dir)
        return baseline_metrics(linear, split, checkpoint["labels"])[name]

    return Row(
        name, LINEAR_BASELINE, measure, load=lambda path, runtime: load_linear_baseline(path)
    )


def rebuild_split(checkpoint: dict[str, Any], sources: dict[str, Any], data_dir: Path) -> Split:
    """The splits of the data set that a checkpoint was trained on."""
    name, n_rows = checkpoint["dataset"], checkpoint["rows"]
    if name in sources:
        examples = data_loader.load_examples(sources, name, None, data_dir, n_rows)
        if examples.metadata["data_sha256"] == checkpoint["data_sha256"]:
            return data_utils.split_examples(examples)
    raise ValueError(f"its data set, {name}, is not available with the recorded content")


REPORT = {
    "language": [
        Row("base", BASE, _on_shakespeare, "TinyShakespeare, validation split"),
        Row("base", BASE, _on_oz, "The Wizard of Oz"),
        Row("base, pretrained further", REVIEW_LM, _on_reviews_as_text, "test reviews"),
    ],
    "sentiment": [
        Row("full fine-tuning", FULL_CLASSIFIER, _on_reviews),
        Row("LoRA", LORA_CLASSIFIER, _on_reviews),
        _baseline_row(LINEAR),
        _baseline_row(MAJORITY),
    ],
    "instructions": [
        Row("base, untouched", QLORA, _on_tasks, load=_load_untouched_base),
        Row("full fine-tuning", generation.FULL, _on_tasks),
        Row("LoRA", generation.LORA, _on_tasks),
        Row("QLoRA, 4-bit base", QLORA, _on_tasks),
    ],
}

COST_COLUMNS = {
    "trained parameters": "{trained_parameters:,}",
    "of": "{parameters:,}",
    "file": "{kb:,.0f} kB",
    "training": "{seconds:,.0f} s",
    "peak memory": "{gib:.2f} GiB",
}
ACCURACY_COLUMNS = {
    "accuracy": "{accuracy:.1%}",
    "95 % interval": "{ci95[0]:.1%} to {ci95[1]:.1%}",
    "macro F1": "{macro_f1:.3f}",
}
RESPONSE_COLUMNS = {
    "bits per byte of response": "{response_bits_per_byte:.4f}",
    "perplexity": "{response_perplexity:.2f}",
    "responses that stop": "{stops:.0%}",
}
REPORT_COLUMNS = {
    "language": {
        "measured on": "{measured_on}",
        "bits per byte": "{bits_per_byte:.4f}",
        "nats per byte": "{nats_per_byte:.4f}",
        "perplexity": "{perplexity:.2f}",
        **COST_COLUMNS,
    },
    "sentiment": {"measured on": "{measured_on}, {n:,} texts", **ACCURACY_COLUMNS, **COST_COLUMNS},
    "instructions": {
        "measured on": "{measured_on}, {n:,} responses",
        **RESPONSE_COLUMNS,
        **COST_COLUMNS,
    },
}
SENTIMENT_COLUMNS = {"texts": "{n:,}", **ACCURACY_COLUMNS}


def table_cells(columns: dict[str, str], rows: list[Metrics]) -> list[list[str]]:
    """Header and rows of a table as text: the model, then a format string for each column."""
    return [["model", *columns], *([row["model"], *_cells(columns, row)] for row in rows)]


def _cells(columns: dict[str, str], row: Metrics) -> list[str]:
    if "problem" in row:
        return [row["problem"], *[""] * (len(columns) - 1)]
    kb, gib = row.get("file_bytes", 0) / 1e3, row.get("peak_memory_bytes", 0) / 2**30
    cells = dict.fromkeys(columns, "")
    for name, template in columns.items():
        with contextlib.suppress(KeyError):  # not measured
            cells[name] = template.format(**row, kb=kb, gib=gib)
    return list(cells.values())


def sentiment_tables(rows: dict[str, Metrics]) -> str:
    """Metrics of classifiers by name, and the confusion matrix of the first one."""
    table = markdown_table(SENTIMENT_COLUMNS, [{"model": n, **row} for n, row in rows.items()])
    names, counts = (next(iter(rows.values()))[key] for key in ("labels", "confusion"))
    lines = [["label \\ prediction", *names], *([n, *map(str, c)] for n, c in zip(names, counts))]
    return f"{table}\n\n{_markdown(lines)}"


def markdown_table(columns: dict[str, str], rows: list[Metrics]) -> str:
    """`table_cells` as Markdown."""
    return _markdown(table_cells(columns, rows))


def _markdown(lines: list[list[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- command line


class Task(NamedTuple):
    """What `python evaluate.py NAME` measures."""

    text: str
    file: str  # default checkpoint
    kinds: tuple[str, ...]
    read: Callable
    measure: Callable
    data_help: str


TASKS = {
    "perplexity": Task(
        "a base model on a text",
        BASE,
        ("base",),
        lambda path: data_loader.corpus_from_path(path).split(1.0)[0],
        text_metrics,
        "text file, or a folder of .txt files",
    ),
    "sentiment": Task(
        "a classifier on labelled reviews",
        FULL_CLASSIFIER,
        generation.CLASSIFIERS,
        data_loader.read_reviews,
        classifier_metrics,
        "file of labelled texts",
    ),
    "instructions": Task(
        "an instruction model, or a base, on tasks with responses",
        QLORA,
        ("base", *generation.INSTRUCTION_MODELS),
        data_loader.read_instructions,
        instruction_metrics,
        "file of instructions or conversations",
    ),
}


def measure_file(
    name: str, checkpoint: Path, data: Path, runtime: Runtime, **columns: str | None
) -> Metrics:
    """Metrics of a checkpoint on a file; `name` is one of TASKS. `columns` are choices of columns
    of labelled texts."""
    task = TASKS[name]
    model, tokenizer, metadata = generation.load_model(checkpoint, task.kinds, runtime)
    if name == "sentiment":
        rows, labels = task.read(data, metadata["labels"], **columns)
        return task.measure(model, tokenizer, rows, labels, runtime)
    rows = task.read(data)
    if name == "instructions" and metadata["kind"] == "base" and model.config.position == "rotary":
        length = max(INSTRUCTION_CONTEXT, model.config.context_length)  # as the fine-tuned models
        model = generation.reconfigure(model, length).to(runtime.device)
    return task.measure(model, tokenizer, rows, runtime)


def judge_text(checkpoint: Path, text: str, runtime: Runtime) -> dict[str, Any]:
    """The label that a classifier gives a text, and the probability of each label."""
    model, tokenizer, metadata = generation.load_model(checkpoint, generation.CLASSIFIERS, runtime)
    (row,) = generation.class_probabilities(model, tokenizer, [text], runtime)
    probabilities = dict(zip(metadata["labels"], row.tolist()))
    return {"label": max(probabilities, key=probabilities.get), "probabilities": probabilities}


@training.report_errors
def main(argv: list[str] | None = None) -> int:
    """Command line: the comparison table, or one checkpoint on one file."""
    args = _parse(argv)
    with training.start_runtime() as runtime:
        if args.task is None:
            models = args.models or generation.default_model_set()
            log0(f"measuring {models}")
            rows = report(models, data_loader.find_data_dir(args.data_dir), runtime)
            if args.models or models.name != "shipped":  # which no default command changes
                with data_loader.atomic_write(models / "report.json") as file:
                    file.write(json.dumps(rows, indent=1).encode() + b"\n")
            print("\n\n".join(markdown_table(REPORT_COLUMNS[task], rows[task]) for task in rows))
            return 0
        file = TASKS[args.task].file
        checkpoint = args.checkpoint or (args.models and args.models / file)
        checkpoint = checkpoint or generation.default_path(file)
        if (text := getattr(args, "text", None)) is not None:
            metrics = judge_text(checkpoint, text, runtime)
        else:
            options = {k: v for k, v in vars(args).items() if k.endswith("_column")}
            metrics = measure_file(args.task, checkpoint, args.data, runtime, **options)
    if args.json:
        print(json.dumps(metrics))
    elif text is not None:
        print(metrics["label"])
        print(*(f"{p:.1%} {label}" for label, p in metrics["probabilities"].items()), sep="\n")
    elif args.task == "sentiment":
        print(sentiment_tables({checkpoint.name: metrics}))
    else:
        print(*(f"{k}: {v:,.4f}".removesuffix(".0000") for k, v in metrics.items()), sep="\n")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = training.new_parser("Measure the checkpoints of a model set.")
    add = parser.add_argument
    text = "model set (default: models if it has a base, else models/shipped)"
    add("--models", type=Path, help=text)
    add("--data-dir", type=Path, help="folder of data sets (default: $GPT_DATA_DIR, else data)")
    tasks = parser.add_subparsers(dest="task", metavar="TASK")
    for name, task in TASKS.items():
        options = {"help": task.text, "formatter_class": training.HelpFormatter}
        subparser = tasks.add_parser(name, **options)
        add = subparser.add_argument
        add("--models", type=Path, default=argparse.SUPPRESS, help=text)
        add("--checkpoint", type=Path, help=f"(default: {task.file} of the model set)")
        group = subparser.add_mutually_exclusive_group(required=True)
        group.add_argument("--data", type=Path, help=task.data_help)
        if name == "sentiment":
            group.add_argument("--text", help="one text to classify")
            add_column_flags(subparser)
        add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def add_column_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for the columns of labelled texts whose names are not known."""
    for role in ("text", "label"):
        text = f"column of --data that holds the {role}, if its name does not tell"
        parser.add_argument(f"--{role}-column", metavar="NAME", help=text)


if __name__ == "__main__":
    sys.exit(main())
