"""What `transformers` and `peft` compute from our exports equals what our models compute."""

from dataclasses import asdict
from pathlib import Path

import peft
import pytest
import torch
from conftest import randomised
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import generation
from data_loader import Instruction
from data_utils import encode_instruction
from generation import BASE, LORA_CLASSIFIER, QLORA, export_hf, export_peft, load_model
from lora import LoRAConfig, apply_lora, lora_state_dict, quantize_4bit
from model import GPTClassificationModel, GPTConfig, GPTModel
from tokenizer import BPETokenizer
from training import save_checkpoint, weights_sha256

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 64, "context_length": 64, "dropout": 0.0}
LLAMA = {"activation": "swiglu", "norm": "rms", "n_kv_head": 2, "qk_norm": False, "head_size": 32}
GPT2 = {"activation": "gelu", "position": "learned", "bias": True, "qk_norm": False}
FORMS = {
    "ours": {},
    "gpt2": {**GPT2, "tie_weights": True},
    "llama": LLAMA,
    "llama, tied": {**LLAMA, "tie_weights": True},
    "qwen3": {**LLAMA, "qk_norm": True},
}
TARGETS = ("qkv", "attn.proj", "mlp.fc", "mlp.proj", "token_embedding")
TEXT = "Honest reviews of kettles, phones and books. " * 20
LABELS = ("bad", "good", "odd")


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([TEXT], 280)


@pytest.fixture(params=FORMS)
def base(request: pytest.FixtureRequest, tokenizer: BPETokenizer, tmp_path: Path) -> GPTModel:
    """A random base of each form, saved in `tmp_path / "models"`."""
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **SIZES, **FORMS[request.param])
    model = randomised(GPTModel(config))
    tokenizer.save(tmp_path / "models" / "tokenizer.json")
    save(tmp_path / "models" / BASE, "base", model.state_dict(), config, tokenizer)
    return model


def save(path: Path, kind: str, weights: dict[str, Tensor], config: GPTConfig, tokenizer, **more):
    contents = {"model_config": asdict(config), "tokenizer_sha256": tokenizer.sha256, **more}
    save_checkpoint(path, {"kind": kind, "weights": weights, **contents})


def adapted(model: nn.Module, config: LoRAConfig) -> dict[str, Tensor]:
    apply_lora(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return lora_state_dict(model)


def ids(model: GPTModel) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(270, (3, 17))


def assert_equal_logits(theirs: nn.Module, ours: nn.Module, tokens: Tensor) -> None:
    with torch.no_grad():
        expected = ours(tokens)
        torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_transformers_continues_a_prompt_as_we_do(base: GPTModel, tmp_path: Path):
    export_hf(tmp_path / "models" / BASE, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_equal_logits(theirs, base.eval(), ids(base))
    model, tokenizer, _ = load_model(tmp_path / "models" / BASE)
    generator = pipeline("text-generation", str(tmp_path / "out"))
    text = generator("Honest", do_sample=False, max_new_tokens=20, return_full_text=False)
    ours = generation.continue_prompt(model, tokenizer, "Honest", 20, temperature=0, top_p=None)
    assert text[0]["generated_text"] == tokenizer.decode(ours)


@pytest.mark.parametrize("kind", ["classifier", "lora_classifier"])
def test_transformers_classifies_as_we_do(
    base: GPTModel, tokenizer: BPETokenizer, tmp_path: Path, kind: str
):
    path = tmp_path / "models" / LORA_CLASSIFIER
    model, lora = GPTClassificationModel(base, 3), {}
    for parameter in model.classifier_head.parameters():
        nn.init.normal_(parameter)
    weights = model.state_dict()
    if kind == "lora_classifier":
        config = LoRAConfig(r=4, lora_alpha=8.0, target_modules=TARGETS)
        lora = origin(base, config)
        weights = adapted(model, config)
    save(path, kind, weights, base.config, tokenizer, labels=LABELS, **lora)
    export_hf(path, tmp_path / "out")
    texts = ["Honest", "reviews of books and other things", "phones!"]
    expected = generation.class_probabilities(*load_model(path)[:2], texts)
    classifier = pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    for scores, row in zip(classifier(texts, batch_size=3), expected):
        found = {entry["label"]: entry["score"] for entry in scores}
        assert found == pytest.approx(dict(zip(LABELS, row)), abs=1e-4)
    if lora:
        export_hf(tmp_path / "models" / BASE, tmp_path / "base")
        export_peft(path, tmp_path / "adapter")
        plain = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=3, pad_token_id=tokenizer.pad_id
        )
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        batch = AutoTokenizer.from_pretrained(tmp_path / "base")(
            texts, return_tensors="pt", padding=True
        )
        with torch.no_grad():
            found = theirs(**batch).logits.softmax(-1).numpy()
        assert found == pytest.approx(expected, abs=1e-4)


def origin(base: GPTModel, config: LoRAConfig) -> dict:
    sha256 = weights_sha256(base.state_dict())
    return {"base": BASE, "base_sha256": sha256, "lora_config": asdict(config)}


@pytest.mark.parametrize("kind", ["lora_instruction", "qlora_instruction"])
def test_an_instruction_model_answers_there_as_here(
    base: GPTModel, tokenizer: BPETokenizer, tmp_path: Path, kind: str
):
    path = tmp_path / "models" / QLORA
    config = LoRAConfig(r=4, lora_alpha=8.0, target_modules=(*TARGETS[:4], "head"))
    more = {**origin(base, config), "prompt_template": "", "compute_dtype": "torch.float32"}
    if kind == "qlora_instruction":
        quantize_4bit(base)
    save(path, kind, adapted(base, config), base.config, tokenizer, **more)
    export_hf(path, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model, _, _ = load_model(path)
    assert_equal_logits(theirs, model, ids(model))
    turns = [("user", " Name a book. "), ("assistant", "Emma"), ("user", "A play?\n")]
    messages = [{"role": role, "content": text} for role, text in [("system", "Brief."), *turns]]
    task = Instruction("A play?", system="Brief.", earlier=(("Name a book.", "", "Emma"),))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for said, row in ((messages, task), (messages[1:2], Instruction("Name a book."))):
        expected = theirs.apply_chat_template(said)["input_ids"]
        assert encode_instruction(row, tokenizer, 10_000).ids == expected
    if kind == "lora_instruction":
        export_hf(tmp_path / "models" / BASE, tmp_path / "base")
        export_peft(path, tmp_path / "adapter")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
        assert_equal_logits(theirs.eval(), model, ids(model))


def test_a_4_bit_base_in_bfloat16_is_merged_and_exported_in_float32(
    base: GPTModel, tokenizer: BPETokenizer, tmp_path: Path
):
    path = tmp_path / "models" / QLORA
    config = LoRAConfig(r=4, target_modules=TARGETS[:4])
    more = {**origin(base, config), "compute_dtype": "torch.bfloat16"}
    more |= {"base_dtype": "torch.bfloat16"}
    quantize_4bit(base)
    save(path, "qlora_instruction", adapted(base, config), base.config, tokenizer, **more)
    export_hf(path, tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = generation.prepare_for_inference(load_model(path)[0], "fp32")
    assert_equal_logits(theirs, model, ids(model))


def test_a_failed_export_is_one_line_and_leaves_no_file(
    base: GPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def full_disk(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(generation, "save_file", full_disk)
    checkpoint, out = tmp_path / "models" / BASE, tmp_path / "out"
    assert generation.main(["--checkpoint", str(checkpoint), "--export-hf", str(out)]) == 2
    file = out / "model.safetensors"
    assert capsys.readouterr().err == f"error: cannot write {file}: No space left on device\n"
    assert not list(out.iterdir()) and {p.name for p in tmp_path.iterdir()} == {"models", "out"}


def test_an_export_never_replaces_files(base: GPTModel, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not empty"):
        export_hf(tmp_path / "models" / BASE, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
