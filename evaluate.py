"""Measures models on text they were not trained on.

    python evaluate.py [--models DIR]                            # table of a whole model set
    python evaluate.py perplexity --data FILE [--checkpoint FILE] [--json]
    python evaluate.py sentiment (--data FILE | --text TEXT) [--checkpoint FILE] [--json]
    python evaluate.py instructions --data FILE [--checkpoint FILE] [--json]
    python evaluate.py questions [--data FILE] [--checkpoint FILE] [--json]

Bits per byte, the loss of a text in bits divided by its UTF-8 bytes, compares models with different
vocabularies. Perplexity, e to the nats per token, does not: longer tokens are harder to predict.
"""

import argparse
import contextlib
import copy
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import data_loader
import data_utils
import generation
import training
from data_loader import Corpus, Instruction, Review, log0
from data_utils import EncodedInstruction, Split
from generation import BASE, CLASSIFIERS, FULL_CLASSIFIER, LINEAR_BASELINE, QLORA
from lora import count_parameters
from model import GPTClassificationModel, GPTModel
from tokenizer import BPETokenizer
from training import HelpFormatter, Runtime

INSTRUCTION_CONTEXT = 256  # tokens of prompt and response
LINEAR, MAJORITY = "TF-IDF + logistic regression", "majority class"
JUDGED_RESPONSES, JUDGED_OF_LARGE = 100, 20  # the latter of models above `LARGE_MODEL`
QUESTIONS = data_loader.SAMPLES / "questions.jsonl"
ANSWER_TOKENS = 40
MAX_WINDOW, BATCH_TOKENS = 512, 4096  # limit the memory for models with a long context
Metrics = dict[str, Any]

# ---- metrics of a model on data


def measure(
    model: Any, tokenizer: BPETokenizer, checkpoint: dict, examples: Corpus | list, runtime: Runtime
) -> Metrics:
    """Metrics of what `load_model` returns: of a classifier on labelled reviews, or of a language
    model on a corpus, on reviews as text, or on responses to instructions."""
    if isinstance(model, GPTClassificationModel):
        return classifier_metrics(model, tokenizer, examples, checkpoint["labels"], runtime)
    if isinstance(examples, Corpus):
        chunks = data_utils.encode_documents(examples.read(), tokenizer)
        ids = np.concatenate([np.array(ids) for ids in chunks])
    elif isinstance(examples[0], Review):
        ids = data_utils.reviews_as_text(examples, tokenizer)
    else:
        encoded = data_utils.encode_instructions(examples, tokenizer, model.config.context_length)
        return response_metrics(model, tokenizer, encoded, runtime)
    return language_model_metrics(model, tokenizer, ids, runtime)


def classifier_metrics(
    model: Any, tokenizer: BPETokenizer, rows: list[Review], names: Sequence[str], runtime: Runtime
) -> Metrics:
    """Metrics of a classifier on labelled reviews; `names` are those of its labels."""
    texts, labels = [row.text for row in rows], np.array([row.label for row in rows])
    predicted = generation.class_probabilities(model, tokenizer, texts, runtime).argmax(1)
    return classification_metrics(predicted, labels, names)


def language_model_metrics(
    model: GPTModel, tokenizer: BPETokenizer, ids: np.ndarray, runtime: Runtime
) -> Metrics:
    """Scores every token of a text (N,) once, with a context of at most MAX_WINDOW tokens."""
    if not len(ids):
        raise ValueError("there is no text to measure")
    n_bytes = data_utils.count_bytes(ids, tokenizer)
    length = min(model.config.context_length, MAX_WINDOW)
    windows = data_utils.scoring_windows(ids, length, tokenizer.end_id, BATCH_TOKENS // length)
    nats_per_token = training.mean_loss(model, windows, training.next_token_loss, runtime)
    nats_per_byte = nats_per_token * len(ids) / n_bytes
    perplexity = math.exp(min(nats_per_token, 700))  # e^710 exceeds a float
    metrics = {"bits_per_byte": nats_per_byte / math.log(2), "nats_per_byte": nats_per_byte}
    return {**metrics, "perplexity": perplexity, "tokens": len(ids), "bytes": n_bytes}


def validation_metrics(
    model: GPTModel, tokenizer: BPETokenizer, ids: np.ndarray, runtime: Runtime
) -> Metrics:
    """`language_model_metrics` as a training logs them; its "val_loss" is in nats per byte."""
    metrics = language_model_metrics(model, tokenizer, ids, runtime)
    return {"val_loss": metrics["nats_per_byte"], **{f"val_{k}": v for k, v in metrics.items()}}


def response_metrics(
    model: GPTModel, tokenizer: BPETokenizer, examples: list[EncodedInstruction], runtime: Runtime
) -> Metrics:
    """Loss on the responses alone, including the token that ends each."""
    batches = data_utils.instruction_batches(examples, tokenizer, model.config.context_length)
    nats = training.mean_loss(model, batches, training.next_token_loss, runtime)
    targets = np.concatenate([np.array(example.targets) for example in examples])
    responses = targets[targets != data_utils.IGNORE]
    n_bytes, perplexity = data_utils.count_bytes(responses, tokenizer), math.exp(min(nats, 700))
    bits = nats * len(responses) / n_bytes / math.log(2)
    return {"response_bits_per_byte": bits, "response_perplexity": perplexity, "n": len(examples)}


def classification_metrics(
    predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> Metrics:
    """How well predicted classes (N,) match labels (N,), indices into `names`; "ci95" is the 95 %
    interval of the accuracy (Wilson 1927), and the rows of "confusion" are labels."""
    from scipy.stats import binomtest
    from sklearn.metrics import confusion_matrix, f1_score

    n, n_right, classes = len(labels), int((predicted == labels).sum()), range(len(names))
    interval = binomtest(n_right, n).proportion_ci(method="wilson")
    macro_f1 = float(f1_score(labels, predicted, labels=classes, average="macro", zero_division=0))
    confusion = confusion_matrix(labels, predicted, labels=classes).tolist()
    metrics = {"accuracy": n_right / n, "ci95": [float(interval.low), float(interval.high)]}
    return metrics | {"macro_f1": macro_f1, "labels": list(names), "confusion": confusion, "n": n}


def _weights_for_answers(model: GPTModel) -> str:
    """Large models answer in bf16 on every machine, so that their answers differ little."""
    return "bf16" if count_parameters(model)[1] > generation.LARGE_MODEL else "fp32"


def stop_rate(model: GPTModel, tokenizer: BPETokenizer, rows: list[Instruction]) -> float:
    """Fraction of sampled responses that end by themselves within `MAX_RESPONSE_TOKENS`. Samples
    from a merged copy of the model, several times faster than from 4-bit weights."""
    weights = _weights_for_answers(model)
    judged = rows[: JUDGED_RESPONSES if weights == "fp32" else JUDGED_OF_LARGE]
    model = generation.prepare_for_inference(copy.deepcopy(model), weights)
    seeded = enumerate(tqdm(judged, "responses"))
    responses = (generation.generate_response(model, tokenizer, row, seed=i) for i, row in seeded)
    return float(np.mean([len(list(ids)) < generation.MAX_RESPONSE_TOKENS for ids in responses]))


def question_metrics(model: GPTModel, tokenizer: BPETokenizer, path: str | Path) -> Metrics:
    """Fraction of the questions of a file that greedy answers get right, overall and by "category":
    such an answer contains one of the "answers" as a whole word, and none of the "wrong" ones.
    Leaves the model prepared for inference."""
    rows = [row for _, row in data_loader.read_records(path, ("instruction", "answers"))]
    valid = [row for row in rows if isinstance(row, dict) and row.get("instruction")]
    lists = [words for row in valid for words in (row.get("answers"), row.get("wrong") or [])]
    if not rows or [*map(type, lists)] != [list] * 2 * len(rows):
        raise ValueError(f"{path}: rows need an instruction and a list of answers; wrong is a list")
    generation.prepare_for_inference(model, _weights_for_answers(model))
    answers, marks = [], defaultdict(list)
    options = {"temperature": 0.0, "max_new_tokens": ANSWER_TOKENS}
    for row in tqdm(rows, "questions"):
        task = Instruction(str(row["instruction"]), str(row.get("context") or ""))
        answer = tokenizer.decode(generation.generate_response(model, tokenizer, task, **options))
        is_right = _says(answer, row["answers"]) and not _says(answer, row.get("wrong") or [])
        marks["right"].append(is_right)
        if category := row.get("category"):
            marks[f"right: {category}"].append(is_right)
        answers.append(answer)
    fractions = {name: sum(values) / len(values) for name, values in marks.items()}
    return {**fractions, "n": len(answers), "answers": answers}


def _says(text: str, words: Sequence[Any]) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.I) for w in map(str, words) if w)


# ---- the linear baseline


def fit_linear_baseline(split: Split[Review], names: Sequence[str]) -> tuple[dict, dict]:
    """Fits the classifier to beat, logistic regression on TF-IDF weights of words and word pairs;
    returns `baseline_metrics`, and a checkpoint of plain tensors and words, which run no code."""
    linear, train = _new_linear_model(), [*split.train, *split.validation]
    started = time.perf_counter()
    linear.fit([row.text for row in train], [row.label for row in train])
    provenance = training.provenance(training.CPU, time.perf_counter() - started)
    metrics = baseline_metrics(linear, split, names)
    words = "\n".join(linear[0].get_feature_names_out())
    arrays = {"idf": linear[0].idf_, "coef": linear[1].coef_, "intercept": linear[1].intercept_}
    weights = {name: torch.tensor(a, dtype=torch.float32) for name, a in arrays.items()}
    contents = {"kind": "linear", "words": words, "labels": list(names), "weights": weights}
    return metrics, {**contents, "metrics": {"test": metrics[LINEAR]}, "provenance": provenance}


def baseline_metrics(linear: Any, split: Split[Review], names: Sequence[str]) -> dict[str, Metrics]:
    """Metrics on the test split of the linear baseline and of guessing the largest class."""
    texts, labels = [row.text for row in split.test], np.array([row.label for row in split.test])
    largest = np.bincount([row.label for row in (*split.train, *split.validation)]).argmax()
    guesses = {LINEAR: linear.predict(texts), MAJORITY: np.full_like(labels, largest)}
    return {name: classification_metrics(guess, labels, names) for name, guess in guesses.items()}


def load_linear_baseline(path: str | Path) -> tuple[Any, None, dict[str, Any]]:
    """The baseline of a checkpoint file, no tokenizer, and the checkpoint."""
    with generation.open_checkpoint(path, "linear") as checkpoint:
        arrays = {name: t.double().numpy() for name, t in checkpoint["weights"].items()}
        linear = _new_linear_model(checkpoint["words"].split("\n"))
        linear[0].idf_ = arrays["idf"]
        linear[1].coef_, linear[1].intercept_ = arrays["coef"], arrays["intercept"]
        linear[1].classes_ = np.arange(len(checkpoint["labels"]))
    return linear, None, checkpoint


def _new_linear_model(words: list[str] | None = None) -> Any:
    from sklearn import feature_extraction, linear_model, pipeline

    features = feature_extraction.text.TfidfVectorizer(ngram_range=(1, 2), vocabulary=words)
    return pipeline.make_pipeline(features, linear_model.LogisticRegression(C=10, max_iter=1000))


# ---- the comparison of a model set

PLAY, BOOK, UNTOUCHED = "TinyShakespeare, validation split", "The Wizard of Oz", "base, untouched"
REPORT = {  # model, file (UNTOUCHED: its base), and what it is measured on, if not its test split
    "language": [
        ("base", BASE, PLAY),
        ("base", BASE, BOOK),
        ("base, pretrained further", generation.REVIEW_LM, "test reviews"),
    ],
    "sentiment": [
        ("full fine-tuning", FULL_CLASSIFIER),
        ("LoRA", generation.LORA_CLASSIFIER),
        (LINEAR, LINEAR_BASELINE),
        (MAJORITY, LINEAR_BASELINE),
    ],
    "instructions": [
        (UNTOUCHED, QLORA),
        ("full fine-tuning", generation.FULL),
        ("LoRA", generation.LORA),
        ("QLoRA, 4-bit base", QLORA),
    ],
}


def _measure_row(models, data_dir, runtime, name, file, measured_on="") -> Metrics:
    """Metrics and costs of a checkpoint, or a "problem" that names the command to run."""
    path = models / file
    try:
        if file == LINEAR_BASELINE:
            linear, _, checkpoint = load_linear_baseline(path)
            split = rebuild_split(checkpoint, data_dir)
            metrics = baseline_metrics(linear, split, checkpoint["labels"])[name]
            trained = total = sum(tensor.numel() for tensor in checkpoint["weights"].values())
        else:
            with generation.open_checkpoint(path) as checkpoint:
                path = models / checkpoint["base"] if name == UNTOUCHED else path
                examples = _held_out(measured_on, checkpoint, data_dir)
            model, tokenizer, opened = generation.load_model(path, runtime=runtime)
            if name == UNTOUCHED:
                generation.reconfigure(model, checkpoint["model_config"]["context_length"])
                checkpoint["provenance"] = opened["provenance"]
            metrics = measure(model, tokenizer, checkpoint, examples, runtime)
            trained, total = count_parameters(model)
            if "response_perplexity" in metrics:
                metrics["stops"] = stop_rate(model, tokenizer, examples)
                metrics["right"] = question_metrics(model, tokenizer, QUESTIONS)["right"]
    except (ValueError, OSError) as error:
        return {"model": name, "problem": str(error)}
    costs = {"trained_parameters": trained, "parameters": total, "file_bytes": path.stat().st_size}
    costs |= {key: checkpoint["provenance"][key] for key in ("seconds", "peak_memory_bytes")}
    if name == MAJORITY:
        costs = dict.fromkeys(costs, 0)  # a guess costs nothing
    return {"model": name, "measured_on": measured_on or checkpoint["dataset"], **metrics, **costs}


def _held_out(measured_on, checkpoint, data_dir):
    if measured_on == PLAY:
        return data_loader.load_corpus("tinyshakespeare", None, data_dir).split()[1]
    if measured_on == BOOK:
        return data_loader.corpus_from_path(data_loader.fetch("wizard_of_oz.txt", data_dir))
    return rebuild_split(checkpoint, data_dir).test


def rebuild_split(checkpoint: dict[str, Any], data_dir: str | Path) -> Split:
    """The splits of the data set that a checkpoint was trained on."""
    task, load = "reviews", data_loader.load_reviews
    if checkpoint["kind"] in generation.INSTRUCTION_MODELS:
        task, load = "instructions", data_loader.load_instructions
    if (name := checkpoint["dataset"]) in data_loader.CATALOG[task]:
        examples = load(name, None, data_dir, checkpoint["rows"])
        if examples.metadata["data_sha256"] == checkpoint["data_sha256"]:
            return data_utils.split_examples(examples)
    raise ValueError(f"its data set, {name}, is not available with the recorded content")


# ---- tables

ACCURACY_COLUMNS = {"accuracy": "{accuracy:.1%}", "95 % interval": "{ci95[0]:.1%} to {ci95[1]:.1%}"}
ACCURACY_COLUMNS |= {"macro F1": "{macro_f1:.3f}"}
RESPONSE_COLUMNS = {"bits per byte of response": "{response_bits_per_byte:.4f}"}
RESPONSE_COLUMNS |= {"perplexity": "{response_perplexity:.2f}"}
RESPONSE_COLUMNS |= {"responses that stop": "{stops:.0%}", "right answers": "{right:.0%}"}
LANGUAGE_COLUMNS = {"bits per byte": "{bits_per_byte:.4f}", "nats per byte": "{nats_per_byte:.4f}"}
LANGUAGE_COLUMNS |= {"perplexity": "{perplexity:.2f}"}
COSTS = {"trained parameters": "{trained_parameters:,}", "of": "{parameters:,}"}
COSTS |= {"file": "{kb:,.0f} kB", "training": "{seconds:,.0f} s", "peak memory": "{gib:.2f} GiB"}
REPORT_COLUMNS = {
    "language": {"measured on": "{measured_on}"} | LANGUAGE_COLUMNS | COSTS,
    "sentiment": {"measured on": "{measured_on}, {n:,} texts"} | ACCURACY_COLUMNS | COSTS,
    "instructions": {"measured on": "{measured_on}, {n:,} responses"} | RESPONSE_COLUMNS | COSTS,
}


def table_cells(columns: dict[str, str], rows: list[Metrics]) -> list[list[str]]:
    """Header and rows of a table as text: the model, then `columns`, format strings by title."""
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


def markdown_table(lines: list[list[str]]) -> str:
    """The first line is the header."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sentiment_tables(rows: dict[str, Metrics]) -> str:
    """Metrics of classifiers by name, and the confusion matrix of the first one."""
    columns, first = {"texts": "{n:,}"} | ACCURACY_COLUMNS, next(iter(rows.values()))
    lines = table_cells(columns, [{"model": name, **row} for name, row in rows.items()])
    confusion = [["label \\ prediction", *first["labels"]]]
    confusion += [[n, *map(str, c)] for n, c in zip(first["labels"], first["confusion"])]
    return f"{markdown_table(lines)}\n\n{markdown_table(confusion)}"


# ---- command line

ANSWER = ("base", *generation.INSTRUCTION_MODELS)
TASKS = {  # what is measured, what its files hold, default checkpoint, kinds of checkpoints
    "perplexity": ("a base model on a text", "text, or a folder of .txt files", BASE, ("base",)),
    "sentiment": ("a classifier on reviews", "labelled texts", FULL_CLASSIFIER, CLASSIFIERS),
    "instructions": ("responses to tasks", "instructions or conversations", QLORA, ANSWER),
    "questions": ("answers to questions", "questions (default: our 80)", QLORA, ANSWER),
}


def measure_file(
    task: str, path: str | Path, data: str | Path | None, runtime: Runtime, **columns: str | None
) -> Metrics:
    """Metrics of the checkpoint at `path` on a file; `columns` are those of `read_reviews`."""
    model, tokenizer, checkpoint = generation.load_model(path, TASKS[task][-1], runtime)
    if task == "questions":
        return question_metrics(model, tokenizer, data or QUESTIONS)
    if task == "perplexity":
        examples = data_loader.corpus_from_path(data)
    elif task == "sentiment":
        examples, _ = data_loader.read_reviews(data, checkpoint["labels"], **columns)
    else:
        examples = data_loader.read_instructions(data)
        if checkpoint["kind"] == "base" and model.config.position == "rotary":  # as if fine-tuned
            generation.reconfigure(model, max(INSTRUCTION_CONTEXT, model.config.context_length))
    return measure(model, tokenizer, checkpoint, examples, runtime)


def classify_text(path: str | Path, text: str, runtime: Runtime) -> Metrics:
    """The most probable label of a text, and the probabilities of all."""
    if not text.strip():
        raise ValueError("--text is empty")
    model, tokenizer, checkpoint = generation.load_model(path, CLASSIFIERS, runtime)
    (row,) = generation.class_probabilities(model, tokenizer, [text], runtime)
    scores = dict(zip(checkpoint["labels"], row.tolist()))
    return {"label": max(scores, key=scores.get), "probabilities": scores}


@training.report_errors
def main(argv: list[str] | None = None) -> int:
    """Command line: the comparison table, or one checkpoint on one file or text."""
    args = _parse(argv)
    with training.start_runtime() as runtime:
        if args.task is None:
            _write_report(args, runtime)
            return 0
        path = args.checkpoint or generation.default_path(TASKS[args.task][2], args.models)
        if args.text is not None:
            metrics = classify_text(path, args.text, runtime)
        else:
            columns = {k: v for k, v in vars(args).items() if k.endswith("_column")}
            metrics = measure_file(args.task, path, args.data, runtime, **columns)
    if args.json:
        print(json.dumps(metrics))
    elif args.text is not None:
        scores = metrics["probabilities"].items()
        print(metrics["label"], *(f"{score:.1%} {label}" for label, score in scores), sep="\n")
    elif args.task == "sentiment":
        print(sentiment_tables({path.name: metrics}))
    else:
        numbers = {name: value for name, value in metrics.items() if name != "answers"}
        print(*(f"{k}: {v:,.4f}".removesuffix(".0000") for k, v in numbers.items()), sep="\n")
    return 0


def _write_report(args: argparse.Namespace, runtime: Runtime) -> None:
    models = args.models or generation.default_model_set()
    if not models.is_dir():
        raise FileNotFoundError(f"no folder {models}: use --models models/NAME")
    log0(f"measuring {models}")
    where = models, data_loader.find_data_dir(args.data_dir), runtime
    rows = {task: [_measure_row(*where, *row) for row in part] for task, part in REPORT.items()}
    tables = (table_cells(REPORT_COLUMNS[task], rows[task]) for task in rows)
    print(*map(markdown_table, tables), sep="\n\n")
    if args.models or models.name != "shipped":  # which no default command changes
        path, content = models / "report.json", json.dumps(rows, indent=1).encode() + b"\n"
        if path.is_file() and b'"measured_on"' not in content:
            raise ValueError(f"nothing could be measured: {path} stays as it was")
        with data_loader.atomic_write(path) as file:
            file.write(content)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    text = "model set (default: models if it has a base, else models/shipped)"
    shared.add_argument("--models", type=Path, help=text)
    parser = training.new_parser("Measure the checkpoints of a model set.", parents=[shared])
    parser.add_argument("--data-dir", type=Path, help="folder (default: $GPT_DATA_DIR, else data)")
    tasks = parser.add_subparsers(dest="task", metavar="TASK")
    for name, (text, data_text, file, _) in TASKS.items():
        one = tasks.add_parser(name, help=text, parents=[shared], formatter_class=HelpFormatter)
        one.add_argument("--checkpoint", type=Path, help=f"(default: {file} of the model set)")
        data = one.add_mutually_exclusive_group(required=name != "questions")
        data.add_argument("--data", type=Path, help=f"file of {data_text}")
        if name == "sentiment":
            data.add_argument("--text", help="one text to classify")
            add_column_flags(one)
        one.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv, argparse.Namespace(models=None, text=None))  # where not given


def add_column_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that name the columns of labelled texts."""
    for role in ("text", "label"):
        text = f"column of --data that holds the {role}, if its name does not tell"
        parser.add_argument(f"--{role}-column", metavar="NAME", help=text)


if __name__ == "__main__":
    training.exit_process(main())
