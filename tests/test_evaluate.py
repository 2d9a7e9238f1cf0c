"""Perplexity and bits per byte against hand-worked values and a plain loop."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch import nn

import data_loader
import evaluate
import generation
from model import GPTModel
from tokenizer import BPETokenizer
from training import Runtime, load_checkpoint

QUESTION = '{"instruction": "Name a fish.", "answers": ["cod"]}\n'


def test_a_model_that_guesses_evenly(tokenizer: BPETokenizer, runtime: Runtime):
    uniform = GPTModel(tiny_config(400)).eval()  # a fresh head is all zeros
    text = "Speak, speak. " * 20
    ids = np.array(tokenizer.encode(text))
    found = evaluate.language_model_metrics(uniform, tokenizer, ids, runtime)
    assert found["perplexity"] == pytest.approx(400, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(math.log2(400) * len(ids) / len(text), rel=1e-5)
    assert found["tokens"] == len(ids) and found["bytes"] == len(text)


def test_perplexity_equals_a_plain_loop(
    model: GPTModel, tokenizer: BPETokenizer, play: str, runtime: Runtime
):
    ids = tokenizer.encode(play[:400])
    sequence = [tokenizer.end_id, *ids]
    nats, T = 0.0, model.config.context_length
    for position in range(1, len(sequence)):
        # Windows start every half context; the last one ends with the text.
        covered = next(
            s for s in [*range(0, len(ids) - T, T // 2), len(ids) - T] if s + T >= position
        )
        with torch.no_grad():
            logits = model(torch.tensor([sequence[covered:position]]))[0, -1]
        nats -= logits.log_softmax(-1)[sequence[position]].item()
    found = evaluate.language_model_metrics(model, tokenizer, np.array(ids), runtime)
    assert found["nats_per_byte"] == pytest.approx(nats / 400, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / 400 / math.log(2), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)


def test_every_byte_of_a_file_counts(
    base_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = "“Oz”\n\u2028 naïve \U0001f9c2 end<|endoftext|>" * 30
    (tmp_path / "oz.txt").write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    content = text.replace("<|endoftext|>", "").encode()
    options = ["--checkpoint", str(base_checkpoint), "--data", str(tmp_path / "oz.txt")]
    assert evaluate.main(["perplexity", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"bits_per_byte", "nats_per_byte", "perplexity", "tokens", "bytes"}
    assert found["bytes"] == len(content)
    models = ["--models", str(base_checkpoint.parent)]
    for before, after in (([], options), (models, options[2:]), ([], [*models, *options[2:]])):
        assert evaluate.main([*before, "perplexity", *after]) == 0
        assert f"bytes: {len(content):,}\n" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"\xff" + bytes(9), b"a\0b"])
def test_bad_files_are_one_line(
    base_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    options = ["--checkpoint", str(base_checkpoint), "--data", str(path)]
    assert evaluate.main(["perplexity", *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "bad.txt" in message and message.count("\n") == 1


def test_the_table_names_the_command_for_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--models", str(tmp_path), "--data-dir", str(tmp_path)]
    assert evaluate.main(options) == 0
    table = capsys.readouterr().out
    for script in ("main", "finetune_classifier", "finetune_lora_classifier"):
        assert f"`python {script}.py`" in table
    for options in ("", " --no-quantize", " --full"):
        assert f"`python finetune_qlora_instructions.py{options}`" in table
    rows = json.loads((tmp_path / "report.json").read_text())
    assert all("problem" in row for part in rows.values() for row in part)


def test_a_model_set_that_is_not_there_is_not_created(tmp_path: Path, capsys):
    assert evaluate.main(["--models", str(tmp_path / "smollm2")]) == 2
    assert "use --models models/NAME" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_shipped_report_is_not_rewritten_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # where models/ has no base
    (tmp_path / "models" / "shipped").mkdir(parents=True)
    assert evaluate.main(["--data-dir", str(tmp_path)]) == 0
    assert not list((tmp_path / "models" / "shipped").iterdir())
    assert evaluate.main(["--data-dir", str(tmp_path), "--models", "models/shipped"]) == 0
    assert (tmp_path / "models" / "shipped" / "report.json").is_file()


def test_a_report_is_not_replaced_by_one_that_measured_nothing(
    base_checkpoint: Path, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options, path = (
        ["--models", str(base_checkpoint.parent)],
        base_checkpoint.parent / "report.json",
    )
    assert evaluate.main([*options, "--data-dir", data]) == 0
    report = path.read_bytes()
    texts = [tmp_path / name for name in ("wizard_of_oz.txt", "tinyshakespeare.txt")]
    texts[0].write_text("not the book")
    assert evaluate.main([*options, "--data-dir", data]) == 0
    first, second, _ = json.loads(path.read_bytes())["language"]
    assert first == json.loads(report)["language"][0] and "is damaged" in second["problem"]
    path.write_bytes(report)
    texts[1].write_text("not the play")
    capsys.readouterr()
    assert evaluate.main([*options, "--data-dir", data]) == 2
    said = capsys.readouterr()
    assert "wizard_of_oz.txt is damaged" in said.out and path.read_bytes() == report
    assert f"error: nothing could be measured: {path} stays as it was\n" in said.err


@pytest.fixture
def data(tmp_path: Path, play: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Data directory with a short play and a book."""
    texts = {"tinyshakespeare.txt": play[:5000], "wizard_of_oz.txt": "Dorothy " * 99}
    for name, content in texts.items():
        sha256 = data_loader.hashlib.sha256(content.encode()).hexdigest()
        (tmp_path / name).write_text(content)
        monkeypatch.setitem(data_loader.DOWNLOADS, name, {"sha256": sha256, "sources": []})
    return str(tmp_path)


def test_the_table_measures_in_and_out_of_domain(
    base_checkpoint: Path, data: str, capsys: pytest.CaptureFixture[str]
):
    options = ["--models", str(base_checkpoint.parent), "--data-dir", data]
    assert evaluate.main(options) == 0
    table = capsys.readouterr().out
    rows = json.loads((base_checkpoint.parent / "report.json").read_text())
    *measured, missing = rows["language"]
    assert [row["bytes"] for row in measured] == [500, 792]
    assert "`python finetune_classifier.py`" in missing["problem"]
    for row in measured:
        assert f"| base | {row['measured_on']} | {row['bits_per_byte']:.4f} | " in table
        assert row["trained_parameters"] == row["parameters"] > 0 and row["file_bytes"] > 1000
    assert "| 1 s | 1.00 GiB |" in table


def test_fine_tuned_models_are_measured_on_the_part_they_did_not_see(
    all_models: Path,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    (questions := tmp_path / "questions.jsonl").write_text(QUESTION)
    monkeypatch.setattr(evaluate, "QUESTIONS", questions)
    monkeypatch.setattr(evaluate, "JUDGED_RESPONSES", 5)
    options = ["--models", str(all_models), "--data-dir", data]
    assert evaluate.main(options) == 0
    rows = json.loads((all_models / "report.json").read_text())
    (all_models / "report.json").unlink()
    full, lora, linear, majority = rows["sentiment"]
    for row, name in ((full, "finetuned_classifier"), (lora, "lora_classifier")):
        path = all_models / f"{name}_weights.pth"
        recorded = load_checkpoint(path, ("classifier", "lora_classifier"))["metrics"]["test"]
        assert row["accuracy"] == recorded["accuracy"] and row["n"] == recorded["n"] == 16
        assert row["measured_on"] == "sample"
    assert lora["trained_parameters"] < full["trained_parameters"]
    assert linear["accuracy"] > majority["accuracy"] == 0.5
    assert linear["file_bytes"] > 1000 and linear["parameters"] > 100 and linear["seconds"] > 0
    assert linear["peak_memory_bytes"] > 1e8 and majority["peak_memory_bytes"] == 0
    reviews = rows["language"][2]
    assert reviews["measured_on"] == "test reviews" and 0 < reviews["bits_per_byte"] < 8
    base, full, plain, qlora = rows["instructions"]
    path = all_models / "qlora_instruction_weights.pth"
    recorded = load_checkpoint(path, "qlora_instruction")["metrics"]
    assert qlora["response_bits_per_byte"] == pytest.approx(
        recorded["test"]["response_bits_per_byte"], rel=1e-3
    )
    assert base["response_bits_per_byte"] == pytest.approx(
        recorded["base"]["response_bits_per_byte"], rel=1e-3
    )
    assert 0 <= base["stops"] <= 1 and base["parameters"] < qlora["parameters"]
    assert 0 <= base["right"] <= 1 and 0 <= qlora["right"] <= 1
    assert "--full" in full["problem"] and "--no-quantize" in plain["problem"]
    shown = capsys.readouterr().out
    assert f"| LoRA | sample, 16 texts | {lora['accuracy']:.1%} |" in shown


def test_a_right_answer_has_the_word_and_no_wrong_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    said = ["It is Paris.", "Parisian", "a fruit or a vegetable", "A FRUIT!", "12 or so"]
    model, tokenizer = nn.Linear(1, 1), SimpleNamespace(decode=lambda ids: said[ids[0]])
    answers = iter([[i] for i in range(len(said))])
    monkeypatch.setattr(generation, "generate_response", lambda *_, **__: next(answers))
    fruit = {"category": "kinds", "answers": ["fruit"], "wrong": ["vegetable"]}
    rows = [{"category": "facts", "answers": ["Paris"]}] * 2 + [fruit] * 2 + [{"answers": ["2"]}]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"instruction": "?", **row}) + "\n" for row in rows))
    metrics = evaluate.question_metrics(model, tokenizer, path)
    assert metrics["right"] == 2 / 5 and metrics["n"] == 5 and metrics["answers"] == said
    assert metrics["right: facts"] == metrics["right: kinds"] == 1 / 2
    answers = iter([[4], [4]])
    rows = [{"answers": [12], "context": None, "wrong": None}, {"answers": ["no", ""]}]
    path.write_text("".join(json.dumps({"instruction": 1, **row}) + "\n" for row in rows))
    assert evaluate.question_metrics(model, tokenizer, path)["right"] == 1 / 2
    for row in ("{}", '{"answers": "no"}', '{"answers": ["no"], "wrong": "yes"}'):
        path.write_text(row.replace("{", '{"instruction": "?", ').replace(", }", "}"))
        with pytest.raises(
            ValueError, match="rows need an instruction and a list of answers; wrong is a list"
        ):
            evaluate.question_metrics(model, tokenizer, path)


def test_a_large_model_answers_in_bfloat16_and_is_measured_in_float32(
    all_models: Path,
    tmp_path: Path,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Decoding 80 answers in float32 would take many times as long."""
    questions, answering = tmp_path / "questions.jsonl", []
    questions.write_text(QUESTION)
    monkeypatch.setattr(evaluate, "QUESTIONS", questions)
    monkeypatch.setattr(evaluate, "JUDGED_OF_LARGE", 2)
    monkeypatch.setattr(evaluate, "JUDGED_RESPONSES", 2)
    answer = generation.generate_response

    def spy(model: GPTModel, *args: object, **options: object) -> Iterator[int]:
        answering.append({p.dtype for p in model.parameters()})
        return answer(model, *args, **options)

    monkeypatch.setattr(generation, "generate_response", spy)
    where = all_models, tmp_path, runtime
    row = ("QLoRA", generation.QLORA)
    expected = evaluate._measure_row(*where, *row)
    assert answering == [{torch.float32}] * 3
    monkeypatch.setattr(generation, "LARGE_MODEL", 1)
    found = evaluate._measure_row(*where, *row)
    evaluate.measure_file("questions", all_models / generation.QLORA, None, runtime)
    assert answering[3:] == [{torch.bfloat16}] * 4
    for name in ("response_bits_per_byte", "parameters", "trained_parameters"):
        assert found[name] == expected[name]


def test_the_bundled_questions_are_eighty_in_five_kinds():
    rows = [row for _, row in data_loader.read_records(evaluate.QUESTIONS, ())]
    assert Counter(row["category"] for row in rows) == dict.fromkeys(
        ("facts", "opposites", "classification", "extraction", "counting"), 16
    )
    assert all(row["answers"] and row["instruction"] for row in rows)
    for row in rows:
        assert not set(row["answers"]) & set(row.get("wrong", []))
