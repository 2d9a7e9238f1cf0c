"""What was fine-tuned on SmolLM2-135M-Instruct and comes with the clone, without that base."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from data_loader import load_instructions, load_reviews
from data_utils import encode_instructions, split_examples
from evaluate import (
    REPORT_COLUMNS,
    load_linear_baseline,
    markdown_table,
    measure,
    response_metrics,
    table_cells,
)
from generation import BASE, LORA_CLASSIFIER, QLORA, load_model
from model import config_from_hf
from tokenizer import BPETokenizer
from training import Runtime, bfloat16_is_faster

MODELS = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
ADAPTERS = (LORA_CLASSIFIER, QLORA)


@pytest.fixture(scope="module")
def here() -> Runtime:
    """As the scripts compute on this CPU."""
    cpu = torch.device("cpu")
    return Runtime(cpu, torch.bfloat16 if bfloat16_is_faster(cpu) else torch.float32)


@pytest.fixture
def base() -> None:
    """Skips a test where nobody has fetched the base, which does not come with the clone."""
    if not (MODELS / BASE).is_file():
        pytest.skip("needs `python main.py --pretrained smollm2-135m-instruct`")


def test_the_adapters_are_small_and_fit_one_base_and_tokenizer():
    found = [torch.load(MODELS / name, weights_only=True) for name in ADAPTERS]
    assert sum((MODELS / name).stat().st_size for name in ADAPTERS) < 15 * 2**20
    assert {x["base"] for x in found} == {BASE} and len({x["base_sha256"] for x in found}) == 1
    assert {t.dtype for x in found for t in x["weights"].values()} == {torch.float16}
    sha256 = BPETokenizer.load(MODELS / "tokenizer.json").sha256
    assert {x["tokenizer_sha256"] for x in found} == {sha256}
    trained = sum(t.numel() for t in found[0]["weights"].values())
    assert trained < 0.01 * 134_515_008 and found[0]["lora_config"]["r"] == 8
    assert found[1]["chat_template"].count("<|im_start|>") > 1
    for name in ADAPTERS:
        log = (MODELS / name).with_suffix(".log.jsonl").read_text().splitlines()
        assert "val_loss" in json.loads(log[-1])


def test_config_and_tokenizer_that_come_along_are_those_of_the_base(base: None):
    """Its package has the tensors only."""
    published = json.loads((MODELS / "config.json").read_text())
    checkpoint = torch.load(MODELS / BASE, weights_only=True, map_location="cpu", mmap=True)
    assert asdict(config_from_hf(published)) == checkpoint["model_config"]
    assert BPETokenizer.load(MODELS / "tokenizer.json").sha256 == checkpoint["tokenizer_sha256"]


def test_the_base_itself_is_not_committed():
    listed = subprocess.run(
        ["git", "ls-files", MODELS], cwd=MODELS, capture_output=True, text=True, check=True
    )
    names = [Path(line).name for line in listed.stdout.splitlines()]
    assert QLORA in names and BASE not in names


def test_the_report_is_of_these_models_and_the_card_quotes_it():
    rows = json.loads((MODELS / "report.json").read_text())
    card = (MODELS / "README.md").read_text(encoding="utf-8")
    for task, columns in REPORT_COLUMNS.items():
        made = [row for row in rows[task] if "problem" not in row]
        assert markdown_table(table_cells(columns, made)) in card
    for row, name, figure in (
        (rows["sentiment"][1], LORA_CLASSIFIER, "accuracy"),
        (rows["instructions"][3], QLORA, "response_bits_per_byte"),
    ):
        checkpoint = torch.load(MODELS / name, weights_only=True)
        assert row["seconds"] == checkpoint["provenance"]["seconds"]
        assert row[figure] == pytest.approx(checkpoint["metrics"]["test"][figure], rel=5e-3)


def test_lora_beats_the_linear_model_by_far():
    found = torch.load(MODELS / LORA_CLASSIFIER, weights_only=True)["metrics"]["test"]
    _, _, linear = load_linear_baseline(MODELS / "linear_baseline.pth")
    assert found["accuracy"] > linear["metrics"]["test"]["accuracy"] + 0.04


@pytest.mark.slow
def test_the_classifier_reaches_its_recorded_figure(base: None, data_dir: Path, here: Runtime):
    model, tokenizer, checkpoint = load_model(MODELS / LORA_CLASSIFIER)
    reviews = load_reviews(checkpoint["dataset"], None, data_dir, checkpoint["rows"])
    test = split_examples(reviews).test
    accuracy = measure(model, tokenizer, checkpoint, test, here)["accuracy"]
    assert accuracy == pytest.approx(checkpoint["metrics"]["test"]["accuracy"], abs=0.005)


@pytest.mark.slow
def test_the_instruction_model_reaches_its_recorded_figure(
    base: None, data_dir: Path, here: Runtime
):
    model, tokenizer, checkpoint = load_model(MODELS / QLORA, runtime=here)
    tasks = load_instructions(checkpoint["dataset"], None, data_dir, checkpoint["rows"])
    test = split_examples(tasks).test
    encoded = encode_instructions(test, tokenizer, model.config.context_length)
    figure = response_metrics(model, tokenizer, encoded, here)["response_bits_per_byte"]
    assert figure == pytest.approx(
        checkpoint["metrics"]["test"]["response_bits_per_byte"], rel=5e-3
    )
