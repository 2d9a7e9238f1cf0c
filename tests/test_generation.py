"""Sampling against `transformers`, and the cache against a plain loop without it."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

import generation
from generation import continue_prompt, generate, sample_next_token, token_probabilities
from model import GPTModel
from tokenizer import END_OF_TEXT, BPETokenizer

LOGITS = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("top_k", [1, 3, 40])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_k_equals_that_of_transformers(top_k: int, temperature: float):
    expected = TopKLogitsWarper(top_k)(None, LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(token_probabilities(LOGITS, temperature, top_k), expected)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
def test_top_p_equals_that_of_transformers(top_p: float):
    expected = TopPLogitsWarper(top_p)(None, LOGITS).softmax(-1)
    torch.testing.assert_close(token_probabilities(LOGITS, top_p=top_p), expected)


def test_temperature_zero_and_top_k_one_take_the_likeliest():
    likeliest = LOGITS.argmax(-1)
    assert torch.equal(sample_next_token(LOGITS, temperature=0), likeliest)
    assert torch.equal(sample_next_token(LOGITS, top_k=1), likeliest)
    assert torch.equal(sample_next_token(LOGITS, top_p=1e-6), likeliest)


def test_a_top_k_above_the_vocabulary_changes_nothing():
    assert torch.equal(token_probabilities(LOGITS, top_k=1000), token_probabilities(LOGITS))


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).expand(20_000, 3)
    tokens = sample_next_token(logits, generator=torch.Generator().manual_seed(0))
    shares = tokens.bincount(minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top-k"),
        ({"top_p": 0}, "top-p"),
        ({"top_p": 1.5}, "top-p"),
    ],
)
def test_senseless_options_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        sample_next_token(LOGITS, **options)


def without_cache(model: GPTModel, prompt: Tensor, n: int) -> Tensor:
    """Greedy decoding that runs the whole window for each token."""
    tokens = prompt
    for _ in range(n):
        start = generation.window_start(tokens.shape[1], model.config.context_length)
        with torch.no_grad():
            logits = model(tokens[:, start:])[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("prompt_length", [1, 5, 16, 17, 40])
def test_the_cache_gives_the_same_tokens_also_past_the_context(model: GPTModel, prompt_length: int):
    prompt = torch.randint(400, (3, prompt_length), generator=torch.Generator().manual_seed(2))
    tokens = torch.stack(list(generate(model, prompt, 45, temperature=0)), dim=1)
    assert torch.equal(tokens, without_cache(model, prompt, 45))


@pytest.mark.parametrize("context", [1, 2, 7, 16])
def test_the_window_keeps_at_least_half_a_context(context: int):
    for n in range(1, 100):
        seen = n - generation.window_start(n, context)
        assert min(n, (context + 1) // 2) <= seen <= context


def test_the_stop_token_ends_the_text(model: GPTModel):
    prompt = torch.tensor([[1, 2, 3]])
    tokens = [t.item() for t in generate(model, prompt, 30, temperature=0)]
    stopped = [t.item() for t in generate(model, prompt, 30, temperature=0, stop_token=tokens[4])]
    assert stopped == tokens[: tokens.index(tokens[4])]


def test_the_seed_decides(model: GPTModel, tokenizer: BPETokenizer):
    texts = [list(continue_prompt(model, tokenizer, "To be", 20, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_starts_a_text(model: GPTModel, tokenizer: BPETokenizer):
    assert list(continue_prompt(model, tokenizer, "", 5))
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(model, torch.empty(1, 0, dtype=torch.long), 5))


def test_special_tokens_in_the_prompt_are_plain_text(model: GPTModel, tokenizer: BPETokenizer):
    plain = list(continue_prompt(model, tokenizer, END_OF_TEXT, 5, temperature=0))
    assert plain != list(continue_prompt(model, tokenizer, "", 5, temperature=0))


def test_command_line(base_checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--checkpoint", str(base_checkpoint), "--prompt", "ROMEO:", "--max-new-tokens", "12"]
    assert generation.main(options) == 0
    text = capsys.readouterr().out
    assert text.startswith("ROMEO:")
    assert generation.main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 12 and "ROMEO:" + found["text"] + "\n" == text
    assert found["tokens_per_second"] == pytest.approx(12 / found["seconds"])


def test_a_missing_checkpoint_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert generation.main(["--checkpoint", str(tmp_path / "none.pth")]) == 2
    assert "python main.py" in capsys.readouterr().err


def test_another_tokenizer_is_refused(base_checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    other = BPETokenizer.train(["something else entirely"] * 2, vocab_size=265)
    other.save(base_checkpoint.with_name("tokenizer.json"))
    assert generation.main(["--checkpoint", str(base_checkpoint)]) == 2
    message = capsys.readouterr().err
    assert "model_weights.pth" in message and "tokenizer.json" in message
