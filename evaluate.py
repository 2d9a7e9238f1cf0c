"""How good the models are, measured on text they were not trained on.

    python evaluate.py                                          # table of everything in models/
    python evaluate.py perplexity --data FILE [--checkpoint FILE] [--json]
    python evaluate.py sentiment --data FILE [--checkpoint FILE] [--json]
    python evaluate.py instructions --data FILE [--checkpoint FILE] [--json]

Bits per byte compares models with different vocabularies: the loss of a whole text in bits, divided
by its bytes in UTF-8. Perplexity, e to the loss per token, does not: longer tokens are harder to
guess.
"""

import argparse
import copy
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from tqdm import tqdm

from data_loader import (
    INSTRUCTION_SOURCES,
    REVIEW_SOURCES,
    WIZARD_OF_OZ,
    ByteRange,
    Instruction,
    Review,
    fetch,
    find_data_dir,
    load_corpus,
    load_instructions,
    load_reviews,
    own_text,
    read_instructions,
    read_reviews,
    read_text,
    written_whole,
)
from data_utils import (
    EncodedInstruction,
    Split,
    count_bytes,
    encode_instructions,
    encode_prompt,
    head_and_tail,
    instruction_batches,
    pad,
    reviews_as_text,
    scoring_windows,
    split_examples,
    split_reviews,
)
from generation import (
    continue_prompt,
    load_language_model,
    load_tokenizer,
    misfits_named,
    with_context,
)
from lora import (
    LoRAConfig,
    apply_lora,
    count_parameters,
    load_lora_state_dict,
    merge_lora,
    quantize_4bit,
)
from model import GPTClassificationModel, GPTConfig, GPTModel
from tokenizer import END_OF_TEXT, PAD, BPETokenizer
from training import (
    CPU,
    HelpFormatter,
    Runtime,
    load_checkpoint,
    mean_loss,
    new_parser,
    next_token_loss,
    one_line_errors,
    save_checkpoint,
    start_runtime,
)

FINETUNE_HINT = "python finetune_classifier.py"
INSTRUCTION_HINT = "python finetune_qlora_instructions.py"
COMMANDS = {  # what makes each file
    "lora_classifier_weights.pth": "python finetune_lora_classifier.py",
    "lora_instruction_weights.pth": f"{INSTRUCTION_HINT} --no-quantize",
    "full_instruction_weights.pth": f"{INSTRUCTION_HINT} --full",
}
INSTRUCTION_CONTEXT = 256  # tokens of prompt and response
INSTRUCTION_KINDS = ("base", "qlora_instruction", "lora_instruction", "full_instruction")
CLASSES = ("negative", "positive")
BASELINES = ("TF-IDF + logistic regression", "majority class")
LINEAR_BASELINE = "linear_baseline.pth"
REVIEW_MODEL = "review_model_weights.pth"  # language model that the classifiers start from
ANSWER_TOKENS = 200  # most that an answer may have
JUDGED_ANSWERS = 100


def perplexity(
    model: GPTModel, tokenizer: BPETokenizer, ids: np.ndarray, runtime: Runtime
) -> dict[str, float]:
    """Scores every token of a text once, in windows that advance by half a context.

    Args:
        model: In evaluation mode.
        tokenizer: The model's own.
        ids: Token ids of the text.
        runtime: Where to compute.

    Returns:
        "bits_per_byte", "nats_per_byte", "perplexity" (e to the nats per token), "tokens", "bytes".

    Raises:
        ValueError: The text is empty.
    """
    if not len(ids):
        raise ValueError("there is no text to measure")
    start = tokenizer.special_tokens[END_OF_TEXT]
    windows = scoring_windows(ids, model.config.context_length, start)
    nats_per_token = mean_loss(model, windows, next_token_loss, runtime)
    n_bytes = count_bytes(ids, tokenizer)
    nats_per_byte = nats_per_token * len(ids) / n_bytes
    return {
        "bits_per_byte": nats_per_byte / math.log(2),
        "nats_per_byte": nats_per_byte,
        "perplexity": math.exp(nats_per_token) if nats_per_token < 700 else math.inf,
        "tokens": len(ids),
        "bytes": n_bytes,
    }


def measure_file(checkpoint: Path, parts: list[ByteRange], runtime: Runtime) -> dict[str, float]:
    """Perplexity of a base checkpoint on text files; see `perplexity`."""
    model, tokenizer, _ = load_language_model(checkpoint)
    ids = _encode_parts(parts, tokenizer)
    return perplexity(model.to(runtime.device), tokenizer, ids, runtime)


def _encode_parts(parts: list[ByteRange], tokenizer: BPETokenizer) -> np.ndarray:
    pieces = itertools.chain.from_iterable(map(read_text, parts))
    return np.concatenate([np.array(piece) for piece in tokenizer.encode_stream(pieces)])


# ---- sentiment


def classification_figures(predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How well predicted classes (N,) match labels (N,).

    Returns:
        "accuracy"; "ci95", its 95 % interval (Wilson 1927); "macro_f1", the mean of both classes'
        F1; "confusion", row: label, column: prediction; "n", the number of texts.
    """
    n, accuracy = len(labels), float((predicted == labels).mean())
    z = 1.96
    middle = (accuracy + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(accuracy * (1 - accuracy) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    classes = list(range(len(CLASSES)))
    return {
        "accuracy": accuracy,
        "ci95": [middle - half, middle + half],
        "macro_f1": float(
            f1_score(labels, predicted, labels=classes, average="macro", zero_division=0)
        ),
        "confusion": confusion_matrix(labels, predicted, labels=classes).tolist(),
        "n": n,
    }


@torch.inference_mode()
def class_probabilities(
    model: GPTClassificationModel, tokenizer: BPETokenizer, texts: list[str], runtime: Runtime
) -> np.ndarray:
    """Probabilities (N, classes) of texts, in their order; model in evaluation mode.

    A text longer than the model's context is read without its middle.
    """
    T, pad_id = model.backbone.config.context_length, tokenizer.special_tokens[PAD]
    rows = [head_and_tail(np.array(tokenizer.encode(text)), T) for text in texts]
    order = np.argsort([len(row) for row in rows], kind="stable")
    found = np.empty((len(texts), len(CLASSES)))
    for start in range(0, len(texts), 64):  # texts of like length together
        chosen = order[start : start + 64]
        ids, lengths = pad([rows[i] for i in chosen], pad_id, T)
        with runtime.autocast():
            logits = model(ids.to(runtime.device), lengths.to(runtime.device))
        found[chosen] = logits.cpu().double().softmax(dim=-1).numpy()
    return found


def linear_baseline(train: list[Review]) -> Pipeline:
    """The classifier to beat: logistic regression on TF-IDF weights of words and word pairs."""
    return _linear_model().fit([r.text for r in train], [r.label for r in train])


def _linear_model() -> Pipeline:
    features = TfidfVectorizer(ngram_range=(1, 2))
    return make_pipeline(features, LogisticRegression(C=10, max_iter=1000))


def out_of_fold_probabilities(rows: list[Review], folds: int = 5) -> np.ndarray:
    """Class probabilities (N, classes) of labelled texts, by linear models that did not see them.

    The rows are cut into `folds` parts, or into as many as the smaller class has rows; each part is
    judged by a `linear_baseline` of the others (which may know a text that stands there twice).

    Raises:
        ValueError: A class has fewer than two rows.
    """
    labels = np.array([row.label for row in rows])
    folds = min(folds, int(np.bincount(labels, minlength=len(CLASSES)).min()))
    texts = [row.text for row in rows]
    return cross_val_predict(_linear_model(), texts, labels, cv=folds, method="predict_proba")


def baseline_figures(
    linear: Pipeline, train: list[Review], test: list[Review]
) -> dict[str, dict[str, Any]]:
    """Figures on the test part of the linear baseline and of guessing the larger class."""
    labels = np.array([r.label for r in test])
    found = linear.predict([r.text for r in test])
    larger = np.full(len(test), 2 * sum(r.label for r in train) > len(train), dtype=int)
    return {
        name: classification_figures(predicted, labels)
        for name, predicted in zip(BASELINES, (found, larger))
    }


def save_linear_baseline(linear: Pipeline, path: Path, facts: dict[str, Any]) -> None:
    """Writes a fitted baseline as plain tensors and words, which run no code when read."""
    features, model = linear[0], linear[-1]
    words = sorted(features.vocabulary_, key=features.vocabulary_.get)
    arrays = {"idf": features.idf_, "coef": model.coef_, "intercept": model.intercept_}
    weights = {name: torch.tensor(a, dtype=torch.float32) for name, a in arrays.items()}
    header = {"kind": "linear", "words": "\n".join(words)}
    save_checkpoint(path, {**header, **facts, "weights": weights})


def load_linear_baseline(path: Path) -> tuple[Pipeline, dict[str, Any]]:
    """A baseline that `save_linear_baseline` wrote, and the checkpoint's facts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or of another kind.
    """
    checkpoint = load_checkpoint(path, "linear", FINETUNE_HINT)
    with misfits_named(path, FINETUNE_HINT):
        weights = {name: tensor.double().numpy() for name, tensor in checkpoint["weights"].items()}
        words = checkpoint["words"].split("\n")
        features = TfidfVectorizer(ngram_range=(1, 2), vocabulary=words)
        features.idf_ = weights["idf"]
        model = LogisticRegression()
        model.coef_, model.intercept_ = weights["coef"], weights["intercept"]
        model.classes_ = np.arange(len(CLASSES))
    return make_pipeline(features, model), checkpoint


def sentiment_table(figures: dict[str, dict[str, Any]]) -> str:
    """Figures of several classifiers on the same texts, as Markdown."""
    n = max(f["n"] for f in figures.values())
    rows = [
        f"| on {n:,} test reviews | accuracy | 95 % interval | macro F1 | "
        "true neg. | false pos. | false neg. | true pos. |",
        "|" + "---|" * 8,
    ]
    for name, f in figures.items():
        low, high = f["ci95"]
        counts = " | ".join(str(count) for row in f["confusion"] for count in row)
        rows.append(
            f"| {name} | {f['accuracy']:.1%} | {low:.1%} to {high:.1%} | {f['macro_f1']:.3f} | "
            f"{counts} |"
        )
    return "\n".join(rows)


def load_classifier(path: Path) -> tuple[GPTClassificationModel, BPETokenizer, dict[str, Any]]:
    """A sentiment classifier, fully fine-tuned or an adapter on its base, in evaluation mode.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or of another kind, or made from another base or tokenizer.
    """
    hint = COMMANDS.get(path.name, FINETUNE_HINT)
    checkpoint = load_checkpoint(path, ("classifier", "lora_classifier"), hint)
    with misfits_named(path, hint):
        tokenizer = load_tokenizer(path, checkpoint)
        model = GPTClassificationModel(
            GPTModel(GPTConfig(**checkpoint["model_config"])), len(CLASSES)
        )
        if checkpoint["kind"] == "classifier":
            model.load_state_dict(checkpoint["weights"])
        else:
            base = _base_of(path, checkpoint, path.with_name(REVIEW_MODEL), hint)
            if (origin := path.parent / base["base"]).is_file():
                _base_of(path, base, origin, hint)
            model.backbone.load_state_dict(base["weights"])
            apply_lora(model, LoRAConfig(**checkpoint["lora_config"]))
            load_lora_state_dict(model, checkpoint["weights"])
    return model.eval(), tokenizer, checkpoint


def _base_of(path: Path, adapter: dict[str, Any], base_path: Path, hint: str) -> dict[str, Any]:
    """The checkpoint that an adapter was trained on.

    Raises:
        ValueError: The one at `base_path` is another one.
    """
    base = load_checkpoint(base_path, "base", hint)
    if base["weights_sha256"] != adapter["base_sha256"]:
        raise ValueError(
            f"{path} was trained on another base than {base_path}: put the right one back, or "
            f"train again with `{hint}`"
        )
    return base


def measure_reviews(checkpoint: Path, data: Path, runtime: Runtime) -> dict[str, Any]:
    """Figures of a sentiment classifier on a file of labelled texts; see `read_reviews`."""
    reviews = read_reviews(data)
    model, tokenizer, _ = load_classifier(checkpoint)
    texts = [review.text for review in reviews]
    found = class_probabilities(model.to(runtime.device), tokenizer, texts, runtime)
    return classification_figures(found.argmax(1), np.array([review.label for review in reviews]))


# ---- instructions


def response_figures(
    model: GPTModel,
    tokenizer: BPETokenizer,
    examples: list[EncodedInstruction],
    runtime: Runtime,
) -> dict[str, float]:
    """Loss on the responses alone, their final `<|endoftext|>` included; model in evaluation mode.

    Returns:
        "response_bits_per_byte"; "response_perplexity", e to the nats per token; "n", examples.
    """
    batches = instruction_batches(examples, tokenizer, model.config.context_length)
    nats = mean_loss(model, batches, next_token_loss, runtime)
    responses = np.concatenate([np.array(example.response) for example in examples])
    bits = nats * len(responses) / count_bytes(responses, tokenizer) / math.log(2)
    return {
        "response_bits_per_byte": bits,
        "response_perplexity": math.exp(nats) if nats < 700 else math.inf,
        "n": len(examples),
    }


def answer(
    model: GPTModel,
    tokenizer: BPETokenizer,
    instruction: str,
    context: str = "",
    **sampling: Any,
) -> Iterator[int]:
    """Yields the token ids of an answer; see `continue_prompt`. A long context is cut."""
    room = model.config.context_length // 2
    prompt = encode_prompt(instruction, context, tokenizer, room)
    return continue_prompt(model, tokenizer, prompt, ANSWER_TOKENS, **sampling)


def share_that_stops(model: GPTModel, tokenizer: BPETokenizer, rows: list[Instruction]) -> float:
    """Share of answers that end by themselves within `ANSWER_TOKENS` tokens.

    Asked of a copy whose adapters are merged: the same function, several times as fast as 4 bits.
    """
    judged, merged = rows[:JUDGED_ANSWERS], copy.deepcopy(model)
    merge_lora(merged)
    lengths = [
        sum(1 for _ in answer(merged, tokenizer, row.instruction, row.context, seed=seed))
        for seed, row in enumerate(tqdm(judged, desc="answers", unit="answer"))
    ]
    return sum(length < ANSWER_TOKENS for length in lengths) / len(judged)


def load_instruction_model(
    path: Path, runtime: Runtime = CPU
) -> tuple[GPTModel, BPETokenizer, dict[str, Any]]:
    """A model that follows instructions, in evaluation mode: all of it, or an adapter on its base.

    For QLoRA, the base beside the file is quantised again, to the very same values.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or of another kind, or made from another base or tokenizer.
    """
    hint = COMMANDS.get(path.name, INSTRUCTION_HINT)
    checkpoint = load_checkpoint(path, INSTRUCTION_KINDS[1:], hint)
    with misfits_named(path, hint):
        tokenizer = load_tokenizer(path, checkpoint)
        model = GPTModel(GPTConfig(**checkpoint["model_config"]))
        if checkpoint["kind"] == "full_instruction":
            model.load_state_dict(checkpoint["weights"])
            return model.to(runtime.device).eval(), tokenizer, checkpoint
        base = _base_of(path, checkpoint, path.parent / checkpoint["base"], hint)
        model.load_state_dict(base["weights"])
        model.to(runtime.device)
        if checkpoint["kind"] == "qlora_instruction":
            quantize_4bit(model, getattr(torch, checkpoint["compute_dtype"].split(".")[-1]))
        apply_lora(model, LoRAConfig(**checkpoint["lora_config"]))
        load_lora_state_dict(model, checkpoint["weights"])
    return model.eval(), tokenizer, checkpoint


def measure_instructions(checkpoint: Path, data: Path, runtime: Runtime) -> dict[str, float]:
    """Figures of an instruction model, or of a base, on a file; see `read_instructions`."""
    rows = read_instructions(data)
    if load_checkpoint(checkpoint, INSTRUCTION_KINDS, INSTRUCTION_HINT)["kind"] == "base":
        model, tokenizer, _ = load_language_model(checkpoint)
        if model.config.position == "rotary":  # as long texts as the fine-tuned ones
            model = with_context(model, max(INSTRUCTION_CONTEXT, model.config.context_length), 0.0)
    else:
        model, tokenizer, _ = load_instruction_model(checkpoint, runtime)
    model.to(runtime.device)
    encoded = encode_instructions(rows, tokenizer, model.config.context_length)
    return response_figures(model, tokenizer, encoded, runtime)


# ---- the comparison of everything


def report(models: Path, data_dir: Path, runtime: Runtime) -> dict[str, list[dict[str, Any]]]:
    """Measures every checkpoint in a folder on its held-out data.

    Returns:
        Rows for "language", "sentiment" and "instructions". Each has "model", and either
        "measured_on" and figures, or "problem": what is missing, and the command that mends it.
    """
    return {
        "language": _language_rows(models, data_dir, runtime),
        "sentiment": _sentiment_rows(models, data_dir, runtime),
        "instructions": _instruction_rows(models, data_dir, runtime),
    }


def _row(model: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"model": model, **measure()}
    except (ValueError, OSError) as error:
        return {"model": model, "problem": str(error)}


def _costs(path: Path, checkpoint: dict[str, Any], parameters: tuple[int, int]) -> dict[str, Any]:
    """What it took to make a checkpoint; `parameters` are those trained, and all of them."""
    return {
        "trained_parameters": parameters[0],
        "parameters": parameters[1],
        "file_bytes": path.stat().st_size,
        "seconds": checkpoint["made"]["seconds"],
        "peak_memory_bytes": checkpoint["made"]["peak_memory_bytes"],
    }


def _language_rows(models: Path, data_dir: Path, runtime: Runtime) -> list[dict[str, Any]]:
    """The base, in and out of domain, and what the classifiers start from."""

    def measure(name: str, place: str, find: Callable) -> dict[str, Any]:
        """Figures of a language model on a text, and its costs."""
        hint = "python main.py" if name == "model_weights.pth" else FINETUNE_HINT
        model, tokenizer, checkpoint = load_language_model(models / name, hint)
        ids = find(tokenizer, checkpoint)
        figures = perplexity(model.to(runtime.device), tokenizer, ids, runtime)
        costs = _costs(models / name, checkpoint, count_parameters(model))
        return {"measured_on": place, **figures, **costs}

    def shakespeare(tokenizer: BPETokenizer, _: dict[str, Any]) -> np.ndarray:
        """The part of TinyShakespeare that the base was not trained on."""
        validation = load_corpus("tinyshakespeare", None, data_dir).split()[1]
        return _encode_parts(validation, tokenizer)

    def wizard(tokenizer: BPETokenizer, _: dict[str, Any]) -> np.ndarray:
        """A book that no model has seen."""
        whole = own_text(fetch(WIZARD_OF_OZ, data_dir)).split(1.0)[0]
        return _encode_parts(whole, tokenizer)

    def reviews(tokenizer: BPETokenizer, checkpoint: dict[str, Any]) -> np.ndarray:
        """The reviews that the language model was not trained on."""
        parts = _split_again(checkpoint, load_reviews, split_reviews, data_dir)
        return reviews_as_text(parts.test, tokenizer)

    rows = (
        ("base", "model_weights.pth", "TinyShakespeare, validation part", shakespeare),
        ("base", "model_weights.pth", "The Wizard of Oz", wizard),
        ("after training reviews", REVIEW_MODEL, "test reviews", reviews),
    )
    return [_row(name, functools.partial(measure, *more)) for name, *more in rows]


def _split_again(
    checkpoint: dict[str, Any], load: Callable, split: Callable, data_dir: Path
) -> Split:
    """The parts of the data set that a checkpoint was trained on."""
    name = checkpoint["dataset"]
    if name in (REVIEW_SOURCES | INSTRUCTION_SOURCES):
        examples = load(name, None, data_dir, checkpoint["rows"])
        if examples.sha256 == checkpoint["data_sha256"]:
            return split(examples)
    raise ValueError(f"the data set {name} that it was trained on is not at hand")


def _sentiment_rows(models: Path, data_dir: Path, runtime: Runtime) -> list[dict[str, Any]]:
    """Both classifiers and the baselines, on the same texts."""

    def measure(path: Path) -> dict[str, Any]:
        """Figures of a classifier on its test part, and its costs."""
        model, tokenizer, checkpoint = load_classifier(path)
        test = _split_again(checkpoint, load_reviews, split_reviews, data_dir).test
        texts, labels = [r.text for r in test], np.array([r.label for r in test])
        found = class_probabilities(model.to(runtime.device), tokenizer, texts, runtime)
        figures = classification_figures(found.argmax(1), labels)
        costs = _costs(path, checkpoint, count_parameters(model))
        return {"measured_on": checkpoint["dataset"], **figures, **costs}

    def measure_baseline(name: str) -> dict[str, Any]:
        """Figures and costs of the linear model, or of guessing."""
        linear, checkpoint = load_linear_baseline(models / LINEAR_BASELINE)
        parts = _split_again(checkpoint, load_reviews, split_reviews, data_dir)
        figures = baseline_figures(linear, [*parts.train, *parts.validation], parts.test)[name]
        n = sum(t.numel() for t in checkpoint["weights"].values())
        costs = _costs(models / LINEAR_BASELINE, checkpoint, (n, n))
        if name != BASELINES[0]:
            costs = dict.fromkeys(costs, 0)  # a guess takes nothing
        return {"measured_on": checkpoint["dataset"], **figures, **costs}

    return [
        _row("full fine-tuning", lambda: measure(models / "finetuned_classifier_weights.pth")),
        _row("LoRA", lambda: measure(models / "lora_classifier_weights.pth")),
        *(_row(name, functools.partial(measure_baseline, name)) for name in BASELINES),
    ]


def _instruction_rows(models: Path, data_dir: Path, runtime: Runtime) -> list[dict[str, Any]]:
    """The untouched base, and what the three ways of fine-tuning made of it."""

    def figures(model: GPTModel, tokenizer: BPETokenizer, tuned: dict[str, Any]) -> dict[str, Any]:
        """On the test part of a fine-tuned checkpoint's data set."""
        test = _split_again(tuned, load_instructions, split_examples, data_dir).test
        encoded = encode_instructions(test, tokenizer, model.config.context_length)
        found = response_figures(model, tokenizer, encoded, runtime)
        stops = share_that_stops(model, tokenizer, test)
        return {"measured_on": tuned["dataset"], **found, "stops": stops}

    def measure(path: Path) -> dict[str, Any]:
        """Figures of a fine-tuned model on its test part, and its costs."""
        model, tokenizer, checkpoint = load_instruction_model(path, runtime)
        costs = _costs(path, checkpoint, count_parameters(model))
        return {**figures(model, tokenizer, checkpoint), **costs}

    def measure_base(adapter: Path) -> dict[str, Any]:
        """Figures of the base that an adapter was trained on."""
        tuned = load_checkpoint(adapter, INSTRUCTION_KINDS[1:], INSTRUCTION_HINT)
        path = adapter.parent / tuned["base"]
        checkpoint = _base_of(adapter, tuned, path, INSTRUCTION_HINT)
        model, tokenizer, _ = load_language_model(path)
        model = with_context(model, tuned["model_config"]["context_length"], 0.0)
        costs = _costs(path, checkpoint, count_parameters(model))
        return {**figures(model.to(runtime.device), tokenizer, tuned), **costs}

    paths = {name: models / f"{name}_instruction_weights.pth" for name in ("full", "lora", "qlora")}
    names = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA, 4-bit base"}
    return [
        _row("base, untouched", lambda: measure_base(paths["qlora"])),
        *(_row(names[name], functools.partial(measure, path)) for name, path in paths.items()),
    ]


COLUMNS = {
    "language": {
        "measured on": "{measured_on}",
        "bits per byte": "{bits_per_byte:.4f}",
        "nats per byte": "{nats_per_byte:.4f}",
        "perplexity": "{perplexity:.2f}",
    },
    "sentiment": {
        "measured on": "{measured_on}, {n:,} texts",
        "accuracy": "{accuracy:.1%}",
        "95 % interval": "{ci95[0]:.1%} to {ci95[1]:.1%}",
        "macro F1": "{macro_f1:.3f}",
    },
    "instructions": {
        "measured on": "{measured_on}, {n:,} responses",
        "bits per byte of response": "{response_bits_per_byte:.4f}",
        "perplexity": "{response_perplexity:.2f}",
        "answers that stop": "{stops:.0%}",
    },
}
COST_COLUMNS = {
    "trained parameters": "{trained_parameters:,}",
    "of": "{parameters:,}",
    "file": "{kb:,.0f} kB",
    "training": "{seconds:,.0f} s",
    "peak memory": "{gib:.2f} GiB",
}


def report_tables(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The rows of `report` as Markdown tables."""
    tables = []
    for task in COLUMNS:
        header, *lines = report_cells(task, rows[task])
        lines = [header, ["---"] * len(header), *lines]
        tables.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(tables)


def report_cells(task: str, rows: list[dict[str, Any]]) -> list[list[str]]:
    """The header of a task's table, and its rows, as text."""
    columns = {**COLUMNS[task], **COST_COLUMNS}
    lines = [["model", *columns]]
    for row in rows:
        if "problem" in row:
            cells = [row["problem"], *[""] * (len(columns) - 1)]
        else:
            sizes = {"kb": row["file_bytes"] / 1e3, "gib": row["peak_memory_bytes"] / 2**30}
            cells = [form.format(**row, **sizes) for form in columns.values()]
        lines.append([row["model"], *cells])
    return lines


# ---- command line


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Command line: the table, or one checkpoint on one file."""
    args = _parse(argv)
    with start_runtime() as runtime:
        if args.task is None:
            rows = report(args.models, find_data_dir(args.data_dir), runtime)
            if args.models.is_dir():
                with written_whole(args.models / "report.json") as file:  # the app may be reading
                    file.write(json.dumps(rows, indent=1).encode() + b"\n")
            print(report_tables(rows))
            return 0
        if args.task == "perplexity":
            figures = measure_file(args.checkpoint, own_text(args.data).split(1.0)[0], runtime)
        elif args.task == "sentiment":
            figures = measure_reviews(args.checkpoint, args.data, runtime)
        else:
            figures = measure_instructions(args.checkpoint, args.data, runtime)
    if args.json:
        print(json.dumps(figures))
    elif args.task == "sentiment":
        print(sentiment_table({args.checkpoint.name: figures}))
    else:
        print(*(f"{k}: {v:,.4f}".removesuffix(".0000") for k, v in figures.items()), sep="\n")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("Measure the checkpoints in models/.")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of checkpoints")
    parser.add_argument(
        "--data-dir", type=Path, help="folder of data sets; else $GPT_DATA_DIR, else data"
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK")
    for name, what, checkpoint, data in (
        ("perplexity", "a base model on a text", "model_weights", "UTF-8 text file"),
        (
            "sentiment",
            "a classifier on labelled reviews",
            "finetuned_classifier_weights",
            "JSONL, CSV or TSV file with text, or title and content, and label",
        ),
        (
            "instructions",
            "an instruction model, or a base, on tasks with answers",
            "qlora_instruction_weights",
            "JSONL file with instruction, context and response",
        ),
    ):
        task = tasks.add_parser(name, help=what, formatter_class=HelpFormatter)
        default = Path(f"models/{checkpoint}.pth")
        task.add_argument("--checkpoint", type=Path, default=default, help="what to measure")
        task.add_argument("--data", type=Path, required=True, help=data)
        task.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
