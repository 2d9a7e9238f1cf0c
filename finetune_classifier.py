"""Sentiment of Amazon reviews: the base model, every weight fine-tuned.

    python finetune_classifier.py                     # Amazon polarity, eight minutes on two cores
    python finetune_classifier.py --dataset sample    # the small bundled reviews
    python finetune_classifier.py --data FILE         # your own: JSONL, CSV or TSV

Needs `models/model_weights.pth` and `models/tokenizer.json` (`python main.py`). First the base goes
on as a language model on the training reviews, whose English is not Shakespeare's (as in ULMFiT,
Howard and Ruder 2018, https://arxiv.org/abs/1801.06146); the result, `review_model_weights.pth`, is
kept, and `finetune_lora_classifier.py` starts from it, too. Then a classification head reads the
last token's hidden state, and all weights learn from the labels, which a linear model has softened
(distillation; Hinton et al. 2015, https://arxiv.org/abs/1503.02531). Writes
`models/finetuned_classifier_weights.pth` and its log. Ctrl-C keeps a state that `--resume` goes on
from.
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.pipeline import Pipeline

import training
from data_loader import REVIEW_SOURCES, Review, find_data_dir, load_reviews, say
from data_utils import (
    Split,
    TokenBatches,
    review_training_batches,
    reviews_as_text,
    split_reviews,
)
from evaluate import (
    BASELINES,
    CLASSES,
    LINEAR_BASELINE,
    REVIEW_MODEL,
    baseline_figures,
    class_probabilities,
    classification_figures,
    linear_baseline,
    load_classifier,
    out_of_fold_probabilities,
    save_linear_baseline,
    sentiment_table,
)
from generation import copy_tokenizer, load_language_model, with_context
from lora import LoRAConfig, apply_lora, count_parameters, lora_state_dict
from main import train_language_model
from model import GPTClassificationModel, GPTModel
from tokenizer import BPETokenizer

LANGUAGE_BATCH = 32  # windows a step
LANGUAGE_SEED = 0  # not --seed: classifiers of all seeds start from one language model
LANGUAGE_EPOCHS = 6  # most passes; fewer where there are many reviews


@dataclass(frozen=True, kw_only=True)
class ReviewConfig:
    """How reviews are read.

    Attributes:
        batch_size: Reviews a step, over all processes.
        context_length: Tokens of a review that are read; the middle of a longer one is left out.
        dropout: Share of embeddings and block outputs zeroed in training.
        split_probability: Chance that a token is split into the two it was merged from.
        hide_probability: Chance that a token is hidden: `<|endoftext|>` stands in its place.
        teacher_share: Weight, beside the label, of the opinion of a linear model that was fitted to
            other reviews.
        epochs: Most passes over the reviews; `steps` may end the training sooner.
        language_steps: Most steps of the language model on the training reviews.

    Raises:
        ValueError: A value is out of range.
    """

    batch_size: int = 32
    context_length: int = 256
    dropout: float = 0.15
    split_probability: float = 0.1
    hide_probability: float = 0.15
    teacher_share: float = 0.5
    epochs: int = 4
    language_steps: int = 600

    def __post_init__(self) -> None:
        training.check_range(self, 1, math.inf, "batch_size", "epochs", "language_steps")
        training.check_range(self, 0, 1, "split_probability", "hide_probability")
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must lie in [0, 1], not {self.teacher_share}")


DEFAULTS = {
    "steps": 450,
    "learning_rate": 0.0004,  # embeddings that move fast remember the reviews word by word
    "muon_learning_rate": 0.007,
    "warmup_steps": 30,
    "decay_share": 0.9,
}


@dataclass(frozen=True)
class _Job:
    """A run's data, and where it starts from."""

    config: ReviewConfig
    train_config: training.TrainConfig
    data: dict[str, Any]  # name, number of rows and hash of the reviews
    split: Split[Review]
    tokenizer: BPETokenizer
    base: GPTModel
    language_facts: dict[str, Any]  # what the language model of the reviews is made from
    lora: LoRAConfig | None  # None: every weight is trained
    path: Path
    language_path: Path
    resume: bool
    runtime: training.Runtime


@training.one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Fine-tunes every weight; returns the exit code (130 or 143 when interrupted)."""
    parser = make_parser("Fine-tune every weight of the base for sentiment.", DEFAULTS)
    run(parser.parse_args(argv, argparse.Namespace(**DEFAULTS)))
    return 0


def run(args: argparse.Namespace, lora: LoRAConfig | None = None) -> None:
    """Prepares, trains, saves, reloads and measures a classifier."""
    with training.start_runtime() as runtime, training.training_in(args.out_dir, runtime):
        with training.first_process_first(runtime):
            job = _prepare(args, lora, runtime)
            baseline = _fit_baseline(job) if runtime.rank == 0 else None
            language_model = _held_language_model(job)
        targets = softened_labels(job.split.train, job.config.teacher_share)
        model, facts = _new_classifier(language_model or _train_language_model(job), job)
        best, made = _train_classifier(model, targets, facts, job)
        if runtime.rank == 0:
            _finish(model, best, {**facts, "made": made}, baseline, job)


def _prepare(args: argparse.Namespace, lora: LoRAConfig | None, runtime: training.Runtime) -> _Job:
    """Reads everything, so that what is wrong with it is found before the training."""
    config = training.from_options(ReviewConfig, vars(args))
    base, tokenizer, checkpoint = load_language_model(args.base)
    with_context(base, config.context_length, config.dropout)  # refused before the training
    reviews = load_reviews(args.dataset, args.data, find_data_dir(args.data_dir), args.max_examples)
    split = split_reviews(reviews)
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in vars(split).items())
    say(f"reviews: {reviews.name}, {sizes}; runtime: {runtime.describe()}")
    train_config = training.fine_tuning_config(vars(args), config, len(split.train))
    name = "lora_classifier_weights.pth" if lora else "finetuned_classifier_weights.pth"
    path, language_path = args.out_dir / name, args.out_dir / REVIEW_MODEL
    copy_tokenizer(tokenizer, args.out_dir)
    states = [training.state_path(p) for p in (path, language_path)]
    if not args.resume and runtime.rank == 0:
        states[0].unlink(missing_ok=True)  # of a run that was given up
    elif args.resume and not any(state.is_file() for state in states):
        raise FileNotFoundError(f"there is no {states[0]} to resume: leave --resume out")
    return _Job(
        config=config,
        train_config=train_config,
        data=reviews.facts,
        split=split,
        tokenizer=tokenizer,
        base=base,
        language_facts={
            "base": training.relative_path(args.base, args.out_dir),
            "base_sha256": checkpoint["weights_sha256"],
            **reviews.facts,
            "language_steps": config.language_steps,
            "split_probability": config.split_probability,
        },
        lora=lora,
        path=path,
        language_path=language_path,
        resume=args.resume,
        runtime=runtime,
    )


def _fit_baseline(job: _Job) -> tuple[Pipeline, dict[str, Any]]:
    """The linear baseline, and what it cost; fitted first, since memory is counted by its peak."""
    started = time.perf_counter()
    linear = linear_baseline([*job.split.train, *job.split.validation])
    return linear, {
        "command": training.command_line(),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": training.peak_memory_bytes(torch.device("cpu")),
    }


# ---- the language model of the reviews


def _held_language_model(job: _Job) -> GPTModel | None:
    """The language model on disk, if it is the one that this run would make."""
    if not job.language_path.is_file():
        return None
    try:
        model, _, checkpoint = load_language_model(job.language_path)
    except ValueError as error:
        say(f"making it anew: {error}")
        return None
    if job.language_facts.items() <= checkpoint.items():
        say(f"language model of the reviews: from {job.language_path}")
        return model
    say(f"making {job.language_path} anew, for other data, another base or other options")
    return None


def _train_language_model(job: _Job) -> GPTModel:
    """The base, trained in place on the texts of the training reviews, and saved.

    Raises:
        ValueError: There is a classifier to resume, which started from another language model.
    """
    states = [training.state_path(path) for path in (job.path, job.language_path)]
    if job.resume and states[0].is_file() and not states[1].is_file():
        raise ValueError(
            f"{states[0]} did not start from {job.language_path}: give the same options, or start "
            "over without --resume"
        )
    model = job.base.to(job.runtime.device)
    texts = [
        reviews_as_text(rows, job.tokenizer) for rows in (job.split.train, job.split.validation)
    ]
    batches = TokenBatches(
        texts[0],
        job.tokenizer,
        context_length=model.config.context_length,
        batch_size=LANGUAGE_BATCH,
        seed=LANGUAGE_SEED,
        split_probability=job.config.split_probability,
    )
    steps = min(job.config.language_steps, LANGUAGE_EPOCHS * batches.steps_per_epoch)
    batches.steps = steps  # known only now: it follows from the length of the text
    say(f"language model of the reviews: {steps} steps on {len(texts[0]):,} tokens")
    train_language_model(
        model,
        job.tokenizer,
        batches,
        texts[1],
        training.TrainConfig(steps=steps, seed=LANGUAGE_SEED),
        runtime=job.runtime,
        path=job.language_path,
        facts=job.language_facts,
        resume=job.resume and states[1].is_file(),
    )
    return model


# ---- the classifier


def _new_classifier(
    language_model: GPTModel, job: _Job
) -> tuple[GPTClassificationModel, dict[str, Any]]:
    """A classifier on top of a language model, and what there is to know of it."""
    torch.manual_seed(job.train_config.seed)
    backbone = with_context(language_model, job.config.context_length, job.config.dropout)
    base_sha256 = training.weights_sha256(training.half_precision(backbone.state_dict()))
    model = GPTClassificationModel(backbone, len(CLASSES)).to(job.runtime.device)
    facts = {
        "base_sha256": base_sha256,
        "tokenizer_sha256": job.tokenizer.sha256,
        **job.data,
        "model_config": asdict(backbone.config),
        "review_config": asdict(job.config),
    }
    if job.lora:
        apply_lora(model, job.lora)
        facts["lora_config"] = asdict(job.lora)
    trained, total = count_parameters(model)
    say(f"{job.path.stem}: trains {trained:,} of {total:,} parameters ({trained / total:.2%})")
    return model, facts


def _train_classifier(
    model: GPTClassificationModel, targets: np.ndarray, facts: dict[str, Any], job: _Job
) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains on the labels; keeps the weights that rank the validation texts best.

    The share of pairs of a positive and a negative text in the wrong order (1 - area under the ROC
    curve) is less noisy on few texts than the error, and, other than the loss, does not mind the
    overconfidence that grows with training.
    """
    split, config = job.split, job.config
    texts, labels = [row.text for row in split.validation], [row.label for row in split.validation]

    def validate() -> dict[str, float]:
        """Figures of the model as it is."""
        found = class_probabilities(model, job.tokenizer, texts, job.runtime)
        if not np.isfinite(found).all():
            return {"val_disorder": math.nan}
        return {
            "val_loss": log_loss(labels, found),
            "val_accuracy": float((found.argmax(1) == labels).mean()),
            "val_disorder": 1 - float(roc_auc_score(labels, found[:, 1])),
        }

    batches = review_training_batches(
        split.train,
        targets,
        job.tokenizer,
        context_length=config.context_length,
        batch_size=config.batch_size,
        seed=job.train_config.seed,
        split_probability=config.split_probability,
        hide_probability=config.hide_probability,
    )
    return training.train(
        model,
        batches,
        training.prefix_classification_loss,
        job.train_config,
        runtime=job.runtime,
        validate=validate,
        criterion="val_disorder",
        path=job.path,
        facts=facts,
        resume=job.resume and training.state_path(job.path).is_file(),
    )


def softened_labels(rows: list[Review], teacher_share: float) -> np.ndarray:
    """Class probabilities (N, classes) to learn: the label, mixed with the linear model's opinion.

    The teacher knows words that the small model has seen too rarely, and its doubts say which
    labels to doubt. It has not seen the label of the text it judges, or it would repeat it.
    """
    labels = np.array([row.label for row in rows])
    hard = np.eye(len(CLASSES))[labels]
    if not teacher_share or np.bincount(labels, minlength=len(CLASSES)).min() < 2:
        return hard
    say(f"labels: mixed with a linear model's opinion, {teacher_share:.0%}")
    return (1 - teacher_share) * hard + teacher_share * out_of_fold_probabilities(rows)


def calibrate(
    model: GPTClassificationModel,
    tokenizer: BPETokenizer,
    rows: list[Review],
    runtime: training.Runtime,
) -> None:
    """Makes probabilities mean what they say, by scaling and shifting the head's logits.

    Training drives probabilities towards 0 and 1, and may come to favour a class. A logistic
    regression on the log odds of texts it has not seen corrects both (Platt 1999). It is left out
    where the odds of the validation part say nothing.
    """
    found = class_probabilities(model, tokenizer, [row.text for row in rows], runtime)
    log_odds = np.diff(np.log(np.maximum(found, 1e-9)))
    fit = LogisticRegression().fit(log_odds, [row.label for row in rows])
    scale, shift = fit.coef_.item(), fit.intercept_.item()
    if scale > 0:
        head = model.classifier_head
        with torch.no_grad():
            head.weight *= scale
            head.bias *= scale
            head.bias[1] += shift


def _finish(
    model: GPTClassificationModel,
    best: dict[str, float],
    facts: dict[str, Any],
    baseline: tuple[Pipeline, dict[str, Any]],
    job: _Job,
) -> None:
    """Measures the best weights on the test part, saves them, and checks the file.

    Raises:
        OSError: What was saved does not give the same predictions.
    """
    calibrate(model, job.tokenizer, job.split.validation, job.runtime)
    model.load_state_dict(training.half_precision(model.state_dict()))
    texts = [row.text for row in job.split.test]
    found = class_probabilities(model, job.tokenizer, texts, job.runtime)
    labels = np.array([row.label for row in job.split.test])
    figures = classification_figures(found.argmax(1), labels)
    metrics = {**best, "test": figures}
    weights = training.half_precision(lora_state_dict(model) if job.lora else model.state_dict())
    kind = "lora_classifier" if job.lora else "classifier"
    content = {"kind": kind, **facts, "weights": weights, "metrics": metrics}
    training.save_checkpoint(job.path, content)
    again = load_classifier(job.path)[0].to(job.runtime.device)
    if not np.array_equal(class_probabilities(again, job.tokenizer, texts, job.runtime), found):
        raise OSError(f"{job.path} does not give the predictions that were saved: try again")
    for path in (job.path, job.language_path):
        training.state_path(path).unlink(missing_ok=True)
    linear, linear_made = baseline
    baselines = baseline_figures(linear, [*job.split.train, *job.split.validation], job.split.test)
    linear_facts = {**job.data, "metrics": {"test": baselines[BASELINES[0]]}, "made": linear_made}
    save_linear_baseline(linear, job.path.with_name(LINEAR_BASELINE), linear_facts)
    print(
        sentiment_table({job.path.name: figures, **baselines}),
        f"best at step {best['step']} of {job.train_config.steps}; wrote {job.path}: "
        f"{job.path.stat().st_size:,} bytes, {math.ceil(facts['made']['seconds'])} s of training, "
        f"{facts['made']['peak_memory_bytes'] / 2**30:.2f} GiB at most",
        sep="\n",
    )


def make_parser(description: str, defaults: dict[str, Any]) -> argparse.ArgumentParser:
    """The flags that every way of fine-tuning a classifier has."""
    parser = training.new_parser(description)
    training.add_run_flags(parser, REVIEW_SOURCES, "labelled reviews in JSONL, CSV or TSV", 20_000)
    for config_class in (ReviewConfig, training.TrainConfig):
        shown = {"eval_every": "a pass over the reviews", **defaults}
        training.add_config_flags(parser, config_class, shown)
    return parser


if __name__ == "__main__":
    training.leave(main())
