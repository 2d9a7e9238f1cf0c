"""The models that the clone carries: they load, fit together, and reach their recorded figures."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from data_loader import load_corpus, load_instructions, load_reviews
from data_utils import (
    CHAT_TEMPLATE,
    encode_instructions,
    reviews_as_text,
    split_examples,
)
from evaluate import (
    REPORT_COLUMNS,
    language_model_metrics,
    load_linear_baseline,
    markdown_table,
    measure,
    measure_file,
    response_metrics,
    table_cells,
)
from generation import load_model
from tokenizer import BPETokenizer
from training import Runtime, bfloat16_is_faster

MODELS = Path(__file__).parents[1] / "models" / "shipped"
LANGUAGE = ["model_weights", "review_lm_weights"]
CLASSIFIERS = ["finetuned_classifier_weights", "lora_classifier_weights"]
INSTRUCTIONS = [f"{method}_instruction_weights" for method in ("qlora", "lora", "full")]
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def here() -> Runtime:
    """As the scripts compute on this CPU."""
    cpu = torch.device("cpu")
    return Runtime(cpu, torch.bfloat16 if bfloat16_is_faster(cpu) else torch.float32)


def test_they_fit_in_25_mebibytes_and_have_their_logs():
    assert sum(path.stat().st_size for path in MODELS.iterdir() if path.is_file()) < 25 * 2**20
    for name in (*LANGUAGE, *CLASSIFIERS, *INSTRUCTIONS):
        lines = [json.loads(x) for x in (MODELS / f"{name}.log.jsonl").read_text().splitlines()]
        assert lines and "val_loss" in lines[-1]


def test_all_load_and_have_one_tokenizer(here: Runtime):
    tokenizer = BPETokenizer.load(MODELS / "tokenizer.json")
    found = [load_model(MODELS / f"{name}.pth") for name in LANGUAGE]
    found += [load_model(MODELS / f"{name}.pth") for name in CLASSIFIERS]
    found += [load_model(MODELS / f"{name}.pth", runtime=here) for name in INSTRUCTIONS]
    for _, own, checkpoint in found:
        assert own.sha256 == tokenizer.sha256 == checkpoint["tokenizer_sha256"]
        assert checkpoint["provenance"]["command"].startswith("python ")
    linear, _, _ = load_linear_baseline(MODELS / "linear_baseline.pth")
    assert linear.predict(["works great, I love it", "waste of money"]).tolist() == [1, 0]


def test_the_base_reaches_its_recorded_figure(data_dir: Path, tmp_path: Path, here: Runtime):
    path = MODELS / "model_weights.pth"
    _, _, checkpoint = load_model(path)
    corpus = load_corpus("tinyshakespeare", None, data_dir)
    validation = tmp_path / "validation.txt"
    validation.write_text("".join(corpus.split()[1].read()))
    found = measure_file("perplexity", path, validation, here)["nats_per_byte"]
    assert found == pytest.approx(checkpoint["metrics"]["val_nats_per_byte"], rel=1e-3)


def test_the_reviews_language_model_reaches_its_recorded_figure(data_dir: Path, here: Runtime):
    model, tokenizer, checkpoint = load_model(MODELS / "review_lm_weights.pth")
    reviews = load_reviews(checkpoint["dataset"], None, data_dir, checkpoint["rows"])
    ids = reviews_as_text(split_examples(reviews).validation, tokenizer)
    found = language_model_metrics(model, tokenizer, ids, here)["nats_per_byte"]
    assert found == pytest.approx(checkpoint["metrics"]["val_nats_per_byte"], rel=1e-3)


def test_the_linear_baseline_reaches_its_recorded_figure(data_dir: Path):
    linear, _, checkpoint = load_linear_baseline(MODELS / "linear_baseline.pth")
    reviews = load_reviews(checkpoint["dataset"], None, data_dir, checkpoint["rows"])
    test = split_examples(reviews).test
    accuracy = linear.score([row.text for row in test], [row.label for row in test])
    assert accuracy == pytest.approx(checkpoint["metrics"]["test"]["accuracy"], abs=1e-9)


@pytest.mark.parametrize("name", [CLASSIFIERS[0], *map(slow, CLASSIFIERS[1:])])
def test_the_classifiers_reach_their_recorded_figures(name: str, data_dir: Path, here: Runtime):
    model, tokenizer, checkpoint = load_model(MODELS / f"{name}.pth")
    reviews = load_reviews(checkpoint["dataset"], None, data_dir, checkpoint["rows"])
    assert reviews.metadata["data_sha256"] == checkpoint["data_sha256"]
    test = split_examples(reviews).test
    accuracy = measure(model, tokenizer, checkpoint, test, here)["accuracy"]
    # Another CPU may round a text at the boundary to the other side.
    assert accuracy == pytest.approx(checkpoint["metrics"]["test"]["accuracy"], abs=0.005)


@pytest.mark.parametrize("name", [INSTRUCTIONS[0], *map(slow, INSTRUCTIONS[1:])])
def test_the_instruction_model_reaches_its_recorded_figure(
    name: str, data_dir: Path, here: Runtime
):
    model, tokenizer, checkpoint = load_model(MODELS / f"{name}.pth", runtime=here)
    found = load_instructions(checkpoint["dataset"], None, data_dir, checkpoint["rows"])
    assert found.metadata["data_sha256"] == checkpoint["data_sha256"]
    assert checkpoint["chat_template"] == CHAT_TEMPLATE
    test = split_examples(found).test
    encoded = encode_instructions(test, tokenizer, model.config.context_length)
    figures = response_metrics(model, tokenizer, encoded, here)
    recorded = checkpoint["metrics"]["test"]["response_bits_per_byte"]
    assert figures["response_bits_per_byte"] == pytest.approx(recorded, rel=2e-3)


def test_the_model_card_quotes_the_report():
    rows = json.loads((MODELS / "report.json").read_text())
    card = (MODELS / "README.md").read_text(encoding="utf-8")
    for task, columns in REPORT_COLUMNS.items():
        assert markdown_table(table_cells(columns, rows[task])) in card


@pytest.mark.parametrize(
    ("task", "row", "file", "figure"),
    [
        ("sentiment", 0, "finetuned_classifier_weights.pth", "accuracy"),
        ("sentiment", 1, "lora_classifier_weights.pth", "accuracy"),
        ("sentiment", 2, "linear_baseline.pth", "accuracy"),
        ("instructions", 1, "full_instruction_weights.pth", "response_bits_per_byte"),
        ("instructions", 2, "lora_instruction_weights.pth", "response_bits_per_byte"),
        ("instructions", 3, "qlora_instruction_weights.pth", "response_bits_per_byte"),
    ],
)
def test_the_report_is_of_the_models_that_are_there(task: str, row: int, file: str, figure: str):
    reported = json.loads((MODELS / "report.json").read_text())[task][row]
    checkpoint = torch.load(MODELS / file, weights_only=True)
    assert reported["seconds"] == checkpoint["provenance"]["seconds"]
    assert reported[figure] == pytest.approx(checkpoint["metrics"]["test"][figure], rel=2e-3)
