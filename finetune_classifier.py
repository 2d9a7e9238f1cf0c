"""Fine-tunes every weight of the base model to classify the sentiment of Amazon reviews.

    python finetune_classifier.py                     # Amazon polarity, twelve minutes on one core
    python finetune_classifier.py --dataset sample    # the small bundled reviews
    python finetune_classifier.py --data FILE         # your own texts, with two or more labels

Needs a base model (`python main.py`; else the one in `models/shipped`). One from scratch is first
pretrained further on the training reviews, whose English is not Shakespeare's (ULMFiT, Howard and
Ruder 2018, https://arxiv.org/abs/1801.06146); the result, `review_lm_weights.pth`, is kept, and
`finetune_lora_classifier.py` starts from it, too. Then a classification head reads the hidden state
of the last token, and all weights learn from the labels. Writes
`models/finetuned_classifier_weights.pth` and its log. After Ctrl-C, `--resume` continues the run.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluate
import generation
import training
from data_loader import CATALOG, Review, find_data_dir, load_reviews, log0
from data_utils import TokenBatches, review_batches, reviews_as_text, split_examples
from evaluate import LINEAR_BASELINE, fit_linear_baseline
from generation import FULL_CLASSIFIER, LORA_CLASSIFIER, REVIEW_LM, class_probabilities, open_base
from lora import LoRAConfig, apply_lora, describe_training, lora_state_dict, resolve_targets
from model import GPTClassificationModel
from tokenizer import BPETokenizer
from training import Runtime, TrainConfig, next_token_loss, train

# For the language model. Its seed is not --seed: classifiers of all seeds start from one model.
LM_BATCHES = {"batch_size": 32, "seed": 0, "resegment_probability": 0.1, "max_epochs": 6}

RECIPE = {"steps": 450, "warmup_steps": 30, "decay_fraction": 0.9, "eval_every": 0}
# AdamW's rate is a tenth of the base's, so that the embeddings do not memorise.
RECIPE |= {"learning_rate": 0.0004, "muon_learning_rate": 0.007}
# For a public base, which knows the words: one pass, no further pretraining, a loss on the last
# token alone, after a text that asks for the label.
PUBLIC_RECIPE = {"steps": 100_000, "epochs": 1, "batch_size": 16, "grad_accumulation": 4}
PUBLIC_RECIPE |= {"warmup_steps": 20, "decay_fraction": 0.9, "eval_every": 0, "dropout": 0.0}
PUBLIC_RECIPE |= {"optimizer": "adamw", "learning_rate": 5e-5, "weight_decay": 0.0}
PUBLIC_RECIPE |= {"review_lm_steps": 0, "prefix_loss": 0, "text_template": "Review: {}\nSentiment:"}


@dataclass(frozen=True, kw_only=True)
class ReviewConfig:
    """How reviews are read.

    Attributes:
        batch_size: Reviews per step, over all processes.
        context_length: Tokens of a review that are read; longer ones lose their middle.
        dropout: Dropout rate of embeddings and block outputs.
        epochs: Maximum number of passes over the reviews; `steps` may end the training sooner.
        review_lm_steps: Maximum number of steps of the language model on the training reviews; 0
            starts from the base itself.
        prefix_loss: Fraction of the loss that is on the prefixes of the texts.
        text_template: What the model reads, with {} in place of the text."""

    batch_size: int = 32
    context_length: int = 256
    dropout: float = 0.15
    epochs: int = 4
    review_lm_steps: int = 600
    prefix_loss: float = 0.5
    text_template: str = "{}"

    def __post_init__(self) -> None:
        training.check_range(self, 1, math.inf, "batch_size", "epochs")
        training.check_range(self, 0, math.inf, "review_lm_steps")
        if not 0 <= self.prefix_loss <= 1 or self.text_template.count("{}") != 1:
            raise ValueError("prefix_loss must lie in [0, 1], and text_template contain {} once")


@training.report_errors
def main(argv: list[str] | None = None) -> int:
    """Fine-tunes every weight; returns the exit code (130 or 143 when interrupted)."""
    parser = make_parser("Fine-tune every weight of the base for sentiment.")
    run(generation.parse_for_base(parser, argv, RECIPE, PUBLIC_RECIPE))
    return 0


def run(args: argparse.Namespace, lora: LoRAConfig | None = None) -> None:
    """Trains every weight, or low-rank adapters, then calibrates, measures and saves."""
    config = training.from_options(ReviewConfig, vars(args))
    path = args.out_dir / (LORA_CLASSIFIER if lora else FULL_CLASSIFIER)
    with training.start_runtime() as runtime, training.lock_output_dir(args.out_dir, runtime):
        with training.rank_zero_first(runtime):
            training.check_output(args, path.name, LINEAR_BASELINE, start=REVIEW_LM)
            data_dir = find_data_dir(args.data_dir)
            columns = {"text_column": args.text_column, "label_column": args.label_column}
            reviews = load_reviews(args.dataset, args.data, data_dir, args.max_examples, **columns)
            split, labels = split_examples(reviews), reviews.labels
            baselines, linear = fit_linear_baseline(split, labels)  # first: peak memory only grows
            dtype = runtime.dtype if lora and not config.review_lm_steps else torch.float32
            base, tokenizer, origin = open_base(args, config.context_length, dtype)
            tokenizer.text_template = config.text_template
            log0(f"reviews: {reviews.name}, {split.sizes()}; labels: {', '.join(labels)}")
            # Early, so that a wrong target stops the run here; named as in the classifier.
            lora = lora and resolve_targets(nn.ModuleDict({"backbone": base}), lora)
            for file in (path.name, REVIEW_LM) if args.overwrite and not runtime.rank else ():
                training.state_path(args.out_dir / file).unlink(missing_ok=True)
        origin |= reviews.metadata
        if config.review_lm_steps:
            base, origin = _review_lm(base, tokenizer, split, config, origin, args, runtime)
        torch.manual_seed(args.seed)
        backbone = generation.reconfigure(base, config.context_length, config.dropout)
        model = GPTClassificationModel(backbone, len(labels)).to(runtime.device)
        if lora:
            apply_lora(model, lora)
        log0(f"{describe_training(model)}; runtime: {runtime.describe()}")
        metadata = {"model_config": asdict(backbone.config), **origin, "labels": labels}
        metadata |= {"review_config": asdict(config), "lora_config": lora and asdict(lora)}
        best, provenance = _train(model, tokenizer, split, config, metadata, path, args, runtime)
        if runtime.rank == 0:
            calibrate(model, tokenizer, split.validation, runtime)
            weights = lora_state_dict(model) if lora else model.state_dict()
            model.load_state_dict(training.half_precision(weights), strict=False)  # as saved
            metrics = evaluate.classifier_metrics(model, tokenizer, split.test, labels, runtime)
            print(evaluate.sentiment_tables({path.name: metrics, **baselines}))
            training.save_checkpoint(path.with_name(LINEAR_BASELINE), linear | reviews.metadata)
            kind = "lora_classifier" if lora else "classifier"
            metadata |= {"metrics": {**best, "test": metrics}, "provenance": provenance}
            print(training.save_result(path, kind, weights, **metadata))


def _review_lm(base, tokenizer, split, config, origin, args, runtime):
    """The base, pretrained further on the reviews or loaded from an earlier run; and its origin."""
    path, steps = args.out_dir / REVIEW_LM, config.review_lm_steps
    metadata = {"model_config": asdict(base.config), **origin, "review_lm_steps": steps}
    if not (cached := generation.cached_model(path, metadata)):
        if args.resume and not training.state_path(path).is_file():
            raise ValueError(f"{path} is missing or differs: give the same options, or --overwrite")
        model, length = base.to(runtime.device), base.config.context_length
        train_ids, ids = (reviews_as_text(x, tokenizer) for x in (split.train, split.validation))
        batches = TokenBatches(train_ids, tokenizer, length, steps=steps, **LM_BATCHES)
        log0(f"language model of the reviews: {batches.steps} steps on {len(train_ids):,} tokens")
        recipe = TrainConfig(steps=batches.steps, seed=LM_BATCHES["seed"])
        validate = partial(evaluate.validation_metrics, model, tokenizer, ids, runtime)
        rest = runtime, validate, path, metadata, args.resume
        best, provenance = train(model, batches, next_token_loss, recipe, *rest)
        if runtime.rank == 0:
            contents = {**metadata, "metrics": best, "provenance": provenance}
            print(training.save_result(path, "base", model.state_dict(), **contents))
        with training.rank_zero_first(runtime):  # rank 0 has saved it
            cached = generation.load_model(path, "base")
    return cached[0], {**origin, "base": REVIEW_LM, "base_sha256": cached[2]["weights_sha256"]}


def _train(model, tokenizer, split, config, metadata, path, args, runtime):
    """Trains on the labels; keeps the weights that rank the validation texts best. The area under
    the ROC curve, with several labels the mean of each against the rest, is less noisy than the
    error rate on few texts and, unlike the loss, unaffected by overconfidence."""
    from sklearn.metrics import log_loss, roc_auc_score

    texts, labels = [row.text for row in split.validation], [row.label for row in split.validation]

    def validate() -> dict[str, float]:
        probabilities = class_probabilities(model, tokenizer, texts, runtime)
        if not np.isfinite(probabilities).all():
            return {"val_auc": math.nan}
        scores = probabilities[:, 1] if probabilities.shape[1] == 2 else probabilities
        return {
            "val_loss": log_loss(labels, probabilities),
            "val_accuracy": float((probabilities.argmax(1) == labels).mean()),
            "val_auc": float(roc_auc_score(labels, scores, multi_class="ovr")),
        }

    length, size = config.context_length, config.batch_size
    batches = review_batches(split.train, tokenizer, length, size, args.seed)
    loss = partial(prefix_classification_loss, weight=config.prefix_loss)
    recipe = training.fine_tuning_config(vars(args), batches.steps_per_epoch)
    resume = args.resume and training.state_path(path).is_file()
    return train(model, batches, loss, recipe, runtime, validate, path, metadata, resume, "val_auc")


def prefix_classification_loss(
    model: GPTClassificationModel, batch: training.Batch, weight: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy in nats, `weight` of it over all prefixes, and the number of texts. At
    each token a causal model has read a prefix: all are examples. Their mean is weighted by
    position: a short prefix says less. The batch: token ids (B, T), lengths and labels (B,)."""
    ids, lengths, labels = batch
    B, T = ids.shape
    logits = model.classifier_head(model.backbone.hidden(ids)).float().flatten(0, 1)
    losses = F.cross_entropy(logits, labels.repeat_interleave(T), reduction="none").view(B, T)
    positions = torch.arange(1, T + 1, device=ids.device).expand(B, T)
    weights = positions * (positions <= lengths[:, None])
    prefixes = (losses * weights).sum(1) / weights.sum(1)
    last = losses.gather(1, lengths[:, None] - 1).squeeze(1)
    losses = weight * prefixes + (1 - weight) * last
    return losses.sum(), torch.tensor(B, device=ids.device)


def calibrate(
    model: GPTClassificationModel, tokenizer: BPETokenizer, rows: list[Review], runtime: Runtime
) -> None:
    """Scales and, where the head has a bias, shifts the logits so that probabilities match
    frequencies. Training drives probabilities towards 0 and 1, and may favour a class. One scale
    and a shift for each class, which minimise the cross entropy of validation texts, correct both
    (Platt 1999, "Probabilistic outputs for support vector machines"; Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). It is skipped where the logits carry no information."""
    from scipy import optimize, special

    probabilities = class_probabilities(model, tokenizer, [row.text for row in rows], runtime)
    logits, labels = np.log(np.maximum(probabilities, 1e-9)), [row.label for row in rows]
    head = model.classifier_head

    def loss(parameters: np.ndarray) -> float:
        scale, shift = parameters[0], parameters[1:] * (head.bias is not None)
        nats = -special.log_softmax(scale * logits + shift, axis=1)[range(len(rows)), labels]
        return scale**2 / 2 + nats.sum()  # keeps it finite, if labels are separable

    scale, *shift = optimize.minimize(loss, [1.0, *np.zeros(logits.shape[1])]).x
    if scale > 0:
        with torch.no_grad():
            head.weight *= scale
            if head.bias is not None:
                head.bias.mul_(scale).add_(torch.tensor(shift).to(head.bias))


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags that full fine-tuning and LoRA share."""
    parser = training.new_parser(description)
    training.add_run_flags(parser, CATALOG["reviews"], "file of labelled texts", 20_000)
    evaluate.add_column_flags(parser)
    for config_class in (ReviewConfig, TrainConfig):
        training.add_config_flags(parser, config_class)
    return parser


if __name__ == "__main__":
    training.exit_process(main())
