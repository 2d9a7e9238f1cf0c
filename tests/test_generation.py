"""Sampling against `transformers`, and the cache against a plain loop without it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

import generation
import lora
from data_loader import Instruction
from generation import (
    LORA_CLASSIFIER,
    QLORA,
    KVCache,
    class_probabilities,
    continue_prompt,
    generate,
    generate_response,
    sample_next_token,
    token_probabilities,
)
from lora import lora_layers, quantized_weight
from model import GPTClassificationModel, GPTModel
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


@pytest.mark.parametrize("top_k", [0, 1000])
def test_a_top_k_of_zero_or_above_the_vocabulary_changes_nothing(top_k: int):
    assert torch.equal(token_probabilities(LOGITS, top_k=top_k), token_probabilities(LOGITS))


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3, 5.0])
def test_the_repetition_penalty_equals_that_of_transformers(penalty: float):
    previous = torch.randint(40, (5, 12), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(previous, LOGITS.clone()).argmax(-1)
    sampling = {"temperature": 0, "repetition_penalty": penalty}
    assert torch.equal(sample_next_token(LOGITS, previous, **sampling), expected)
    flat = torch.zeros(5, 40).scatter(1, previous, 1.0) - 0.5  # only the penalty decides
    expected = RepetitionPenaltyLogitsProcessor(penalty)(previous, flat.clone()).argmax(-1)
    assert torch.equal(sample_next_token(flat, previous, **sampling), expected)


def test_penalised_greedy_text_equals_a_plain_loop(model: GPTModel, tokenizer: BPETokenizer):
    prompt = tokenizer.encode("the king and the queen")
    tokens, penalise = list(prompt), RepetitionPenaltyLogitsProcessor(1.5)
    for _ in range(20):
        start = generation.window_start(len(tokens), model.config.context_length)
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:]]))[:, -1]
        tokens.append(penalise(torch.tensor([tokens]), logits).argmax().item())
    options = {"temperature": 0, "repetition_penalty": 1.5}
    text = list(continue_prompt(model, tokenizer, prompt, 20, **options))
    assert text == tokens[len(prompt) :]
    assert text != list(continue_prompt(model, tokenizer, prompt, 20, temperature=0))


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
        ({"top_k": -1}, "top-k"),
        ({"repetition_penalty": 0}, "repetition-penalty"),
        ({"repetition_penalty": float("nan")}, "repetition-penalty"),
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
    stopped = [t.item() for t in generate(model, prompt, 30, temperature=0, stops=[tokens[4]])]
    assert stopped == tokens[: tokens.index(tokens[4])]


def test_a_text_ends_with_the_chat_turn_or_the_document(
    model: GPTModel, tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch
):
    ids = list(continue_prompt(model, tokenizer, "To be", 30, temperature=0, top_p=None))
    for name in ("end_of_turn_id", "end_id"):
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, name, ids[4])
            found = continue_prompt(model, tokenizer, "To be", 30, temperature=0, top_p=None)
            assert list(found) == ids[: ids.index(ids[4])]


def test_a_row_that_ended_is_padded_and_costs_nothing_more(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch
):
    prompt = torch.randint(400, (4, 5), generator=torch.Generator().manual_seed(2))
    alone = [[t.item() for t in generate(model, row[None], 30, temperature=0)] for row in prompt]
    stop = alone[2][3]
    ends = [row.index(stop) if stop in row else 30 for row in alone]
    assert len(set(ends)) > 1 and ends[2] <= 3
    computed, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda i, c: computed.append(len(i)) or hidden(i, c))
    rows = torch.stack([*generate(model, prompt, 30, temperature=0, stops=[stop])], dim=1)
    assert rows.shape == (4, max(ends))
    for row, expected, end in zip(rows.tolist(), alone, ends):
        assert row == expected[:end] + [stop] * (max(ends) - end)
    assert computed == [sum(end >= step for end in ends) for step in range(len(computed))]
    assert len(computed) == min(30, max(ends) + 1)


@pytest.mark.parametrize(("n_prompt", "n_new", "expected"), [(3, 4, 7), (3, 40, 16), (20, 1, 16)])
def test_the_cache_is_as_long_as_the_text_at_most_the_context(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch, n_prompt: int, n_new: int, expected: int
):
    caches = []
    monkeypatch.setattr(generation, "KVCache", lambda *a: caches.append(KVCache(*a)) or caches[-1])
    assert len([*generate(model, torch.ones(2, n_prompt, dtype=torch.long), n_new)]) == n_new
    assert caches[0].keys.shape[3] == caches[0].values.shape[3] == expected


def test_the_memory_of_the_cache_is_freed_before_it_is_returned(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch
):
    memory, is_freed = [], []

    def cache(*arguments: object) -> KVCache:
        new = KVCache(*arguments)
        memory.append(StorageWeakRef(new.keys.untyped_storage()))
        return new

    monkeypatch.setattr(generation, "KVCache", cache)
    monkeypatch.setattr(lora, "return_freed_memory", lambda: is_freed.append(memory[-1].expired()))
    prompt, every_token = torch.ones(2, 3, dtype=torch.long), range(model.config.vocab_size)
    assert len([*generate(model, prompt, 4)]) == 4
    assert not [*generate(model, prompt, 4, stops=every_token)]
    next(stopped := generate(model, prompt, 4))
    assert is_freed == [True, True]
    stopped.close()
    assert is_freed == [True, True, True]


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


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert generation.main([*options, "--temperature", "0"]) == 0
    return capsys.readouterr().out


def test_command_line_of_an_instruction_model(
    all_models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = all_models / "qlora_instruction_weights.pth"
    model, tokenizer, _ = generation.load_for_inference(path)
    task = ["--instruct", "Name a fish.", "--context", "It is red.", "--max-new-tokens", "40"]
    ids = generate_response(
        *(model, tokenizer, Instruction("Name a fish.", "It is red.")),
        **{"temperature": 0, "max_new_tokens": 40},
    )
    expected = tokenizer.decode(list(ids))
    assert shown(capsys, *task, "--checkpoint", str(path)) == expected + "\n"
    found = json.loads(shown(capsys, *task, "--checkpoint", str(path), "--json"))
    assert found["text"] == expected and found["tokens"] <= 40
    monkeypatch.setattr(generation, "default_model_set", lambda: all_models)
    assert shown(capsys, *task) == expected + "\n"  # the set's QLoRA model
    base = shown(capsys, *task, "--checkpoint", str(all_models / "model_weights.pth"))
    assert base != expected + "\n"
    text = shown(capsys, "--prompt", "the king", "--checkpoint", str(path))
    assert text.startswith("the king") and text != shown(capsys, "--prompt", "the king")


@pytest.mark.parametrize(
    "name", ["finetuned_classifier_weights.pth", "lora_classifier_weights.pth"]
)
def test_a_classifier_is_refused_with_the_right_command(
    name: str, all_models: Path, capsys: pytest.CaptureFixture[str]
):
    path = all_models / name
    for task in ("--prompt", "--instruct"):
        assert generation.main([task, "x", "--checkpoint", str(path)]) == 2
        assert capsys.readouterr().err == (
            f"error: {path} is a classifier and writes no text: use "
            f"`python evaluate.py sentiment --checkpoint {path} --data FILE`\n"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "x"], "--context needs --instruct"),
        (["--prompt", "x", "--instruct", "y"], "--instruct: not allowed with argument --prompt"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        generation.main(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_an_empty_text_is_no_text_to_classify(model: GPTModel, tokenizer: BPETokenizer):
    classifier = GPTClassificationModel(model, 2)
    with pytest.raises(ValueError, match="text 2 of 3 is empty"):
        class_probabilities(classifier, tokenizer, ["good", "", "bad"])
    assert class_probabilities(classifier, tokenizer, [" ", "\n"]).shape == (2, 2)
    assert class_probabilities(classifier, tokenizer, []).shape == (0, 2)


def test_a_missing_checkpoint_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert generation.main(["--checkpoint", str(tmp_path / "none.pth")]) == 2
    assert "python main.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("models/model_weights.pth", "python main.py"),
        ("models/shipped/lora_classifier_weights.pth", "python finetune_lora_classifier.py"),
        ("models/gpt2/model_weights.pth", "python main.py --pretrained gpt2"),
        ("models/gpt2/linear_baseline.pth", "python finetune_classifier.py --base gpt2"),
        (
            "models/gpt2/lora_instruction_weights.pth",
            "python finetune_qlora_instructions.py --no-quantize --base gpt2",
        ),
    ],
)
def test_the_command_that_creates_a_file_of_a_model_set(file: str, command: str, tmp_path: Path):
    assert generation.command_for(tmp_path / file) == command


@pytest.mark.parametrize("name", [QLORA, LORA_CLASSIFIER])
def test_for_inference_a_model_has_no_adapters_and_no_4_bit_weights(
    name: str, all_models: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is dequantised or added for each token; a large model is in bf16 where that pays."""
    trained, _, _ = generation.load_model(all_models / name)
    merged, _, checkpoint = generation.load_for_inference(all_models / name)
    assert lora_layers(trained) and not lora_layers(merged) and "weights" not in checkpoint
    assert not any(map(quantized_weight, merged.modules()))
    assert not any(p.requires_grad for p in merged.parameters())
    ids = torch.arange(20)[None]
    inputs = (ids, torch.tensor([20])) if name == LORA_CLASSIFIER else (ids,)
    with torch.no_grad():
        expected = trained(*inputs)
    atol = 0.1 if name == QLORA else 1e-5  # 4-bit layers may compute in bf16
    torch.testing.assert_close(merged(*inputs), expected, rtol=1e-4, atol=atol)
    monkeypatch.setattr(generation, "LARGE_MODEL", 1)
    for fastest, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        monkeypatch.setattr(lora, "fastest_weights", lambda *_, fastest=fastest: fastest)
        model, _, _ = generation.load_for_inference(all_models / name)
        assert {p.dtype for p in model.parameters()} == {dtype}
        torch.testing.assert_close(model(*inputs).float(), expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("is_faster", [False, True])
def test_activations_are_in_the_faster_precision(
    is_faster: bool, base_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without instructions for bf16, 8-bit weights would read a prompt twelve times as slowly."""
    asked = []
    faster = lambda _: (asked.append(1), is_faster)[1]  # noqa: E731
    monkeypatch.setattr(generation.training, "bfloat16_is_faster", faster)
    generation.load_for_inference(base_checkpoint)
    assert not asked  # a small model is in float32: timing would only delay its start
    for weights in ("int8", "int4"):
        model, _, _ = generation.load_for_inference(base_checkpoint, weights=weights)
        expected = torch.bfloat16 if is_faster else torch.float32
        assert model(torch.arange(8)[None]).dtype == expected
        assert generation.KVCache(model).keys.dtype == expected


def test_another_tokenizer_is_refused(base_checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    other = BPETokenizer.train(["something else entirely"] * 2, vocab_size=265)
    other.save(base_checkpoint.with_name("tokenizer.json"))
    assert generation.main(["--checkpoint", str(base_checkpoint)]) == 2
    message = capsys.readouterr().err
    assert "model_weights.pth" in message and "tokenizer.json" in message


def test_opening_a_model_imports_neither_pytorchs_compiler_nor_arrow(base_checkpoint: Path):
    """Nor other slow modules: PyTorch's compiler costs a start a second, Jinja a tenth of one."""
    code = "import sys, generation; generation.load_for_inference(sys.argv[1], weights='bf16')"
    code += "; print({'torch._dynamo', 'pyarrow', 'sklearn', 'pandas', 'jinja2'} & {*sys.modules})"
    command = [sys.executable, "-c", code, str(base_checkpoint)]
    folder = Path(generation.__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_a_flipped_bit_in_the_metadata_is_noticed(base_checkpoint: Path):
    content = bytearray(base_checkpoint.read_bytes())
    content[content.index(b"tokenizer_sha256")] ^= 1
    base_checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        generation.load_model(base_checkpoint)
