"""Turns any checkpoint into a model that continues text, answers and classifies.

    python generation.py --prompt "ROMEO:" --temperature 0.8 --top-p 0.95
    python generation.py --instruct "Name three animals."

Shapes: B batch, T time (tokens), V vocabulary; N texts.
"""

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lora
import training
from data_loader import PRETRAINED, Instruction, atomic_write, log0
from data_utils import CHAT_TEMPLATE, encode_instruction, text_batches
from model import GPTClassificationModel, GPTConfig, GPTModel, hf_config, hf_tensors, weights_to_hf
from tokenizer import BPETokenizer
from training import CPU, Runtime, dependents, load_checkpoint, new_parser, report_errors

TEMPERATURE, TOP_P = 0.8, 0.95  # sampling defaults
MAX_RESPONSE_TOKENS = 200


def generate(
    model: GPTModel, prompt: Tensor, max_new_tokens: int, stops: Sequence[int] = (), **sampling: Any
) -> Iterator[Tensor]:
    """Yields, step by step, the next token of each row (B,) of a prompt (B, T) of any length, in
    evaluation mode. A row ends when it samples a token in `stops`: while others continue, it yields
    `stops[0]` as padding and costs nothing more. `sampling` goes to `sample_next_token`."""
    if prompt.shape[1] == 0 or max_new_tokens < 0:
        raise ValueError("the prompt needs at least one token, and max-new-tokens 0 or more")
    cache = KVCache(model, len(prompt), prompt.shape[1] + max_new_tokens)
    rows = torch.arange(len(prompt), device=prompt.device)  # those that have not ended
    padding = torch.full_like(rows, stops[0] if stops else 0)
    stops = torch.tensor(stops, device=prompt.device)
    tokens, start, n_seen = prompt, 0, 0
    try:
        for _ in range(max_new_tokens):
            new_start = window_start(tokens.shape[1], model.config.context_length)
            if new_start != start:  # the window has moved: all its tokens are computed again
                start, n_seen, cache.length = new_start, new_start, 0
            with torch.inference_mode():
                logits = model.head(model.hidden(tokens[:, n_seen:], cache)[:, -1])
                next_token = sample_next_token(logits, tokens, **sampling)
            n_seen, tokens = tokens.shape[1], torch.cat([tokens, next_token[:, None]], dim=1)
            if (ended := torch.isin(next_token, stops)).any():
                rows, tokens = rows[~ended], tokens[~ended]
                cache.keys, cache.values = cache.keys[:, ~ended], cache.values[:, ~ended]
                if not len(rows):
                    break
            yield padding.scatter(0, rows, tokens[:, -1])
    finally:  # also if the caller stops early
        del cache
        lora.return_freed_memory()


class KVCache:
    """Keys and values (L, B, K, max_length, D) of the `length` tokens seen, so that a step computes
    only the new ones; allocated once."""

    def __init__(self, model: GPTModel, batch_size: int = 1, max_length: int | None = None):
        config, weight = model.config, model.final_norm.weight
        max_length = min(max_length or config.context_length, config.context_length)
        shape = (config.n_layer, batch_size, config.n_kv_head, max_length, config.head_size)
        self.keys, self.values = weight.new_empty((2, *shape))
        self.length = 0

    def extend(self, T: int) -> list[Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
        """Makes room for T tokens. Returns for each layer a function that stores their keys and
        values (B, K, T, D) and returns those of all S tokens."""
        start, self.length = self.length, self.length + T
        new = (x[..., start : self.length, :].unbind() for x in (self.keys, self.values))
        seen = (x[..., : self.length, :].unbind() for x in (self.keys, self.values))
        return [partial(self._store, views) for views in zip(*new, *seen)]

    @staticmethod
    @torch.no_grad()
    def _store(views: tuple[Tensor, ...], k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        views[0].copy_(k)
        views[1].copy_(v)
        return views[2:]


def window_start(n_tokens: int, context_length: int) -> int:
    """Index of the first token that the model sees of a text of n tokens. A window that is full
    moves by half a context; until it is full again, keys and values are reused."""
    excess, step = max(0, n_tokens - context_length), max(1, context_length // 2)
    return -(-excess // step) * step


def sample_next_token(
    logits: Tensor,
    previous: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples a token (B,) from each row of logits (B, V); at temperature 0, the most probable one.
    `top_k` keeps the k most probable tokens (0: all), `top_p` the fewest whose probabilities add up
    to it (nucleus sampling, Holtzman et al. 2020, https://arxiv.org/abs/1904.09751). The penalty
    divides the logits of `previous` tokens (B, T), or multiplies negative ones (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858)."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top-k must be 0 or more, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top-p must lie in (0, 1], not {top_p}")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition-penalty must be above 0, not {repetition_penalty}")
    if repetition_penalty != 1 and previous is not None:
        x = logits.gather(1, previous)
        x = torch.where(x < 0, x * repetition_penalty, x / repetition_penalty)
        logits = logits.scatter(1, previous, x)
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = token_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Probabilities (B, V) that `sample_next_token` samples from; the temperature is above 0."""
    logits = (logits - logits.max(dim=-1, keepdim=True).values).float() / temperature
    if top_k and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        preceding = ordered.cumsum(dim=-1) - ordered  # zero for the most probable token
        kept = ordered.masked_fill(preceding >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def continue_prompt(
    model: GPTModel,
    tokenizer: BPETokenizer,
    prompt: str | list[int],
    max_new_tokens: int,
    seed: int = 0,
    **sampling: Any,
) -> Iterator[int]:
    """Yields the token ids that follow a prompt, up to the end of the text or of the turn;
    `tokenizer.decode_stream` turns them into text. An empty prompt starts a new text."""
    device = model.final_norm.weight.device
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    tokens = torch.tensor([ids or [tokenizer.end_id]], device=device)
    sampling = {"temperature": TEMPERATURE, "top_p": TOP_P, **sampling}
    sampling["generator"] = torch.Generator(device).manual_seed(seed)
    stream = generate(model, tokens, max_new_tokens, stop_ids(tokenizer), **sampling)
    return (token.item() for token in stream)


def stop_ids(tokenizer: BPETokenizer) -> list[int]:
    """The tokens that end a turn of a chat or a text."""
    turn = tokenizer.end_of_turn_id
    return [tokenizer.end_id] if turn is None else [turn, tokenizer.end_id]


def generate_response(
    model: GPTModel, tokenizer: BPETokenizer, task: Instruction, **sampling: Any
) -> Iterator[int]:
    """Yields the token ids of a response to the last turn of a task, as `continue_prompt` does. A
    prompt of more than half a context is shortened as in training."""
    task = replace(task, response="")
    prompt = encode_instruction(task, tokenizer, model.config.context_length // 2 - 1).ids
    sampling = {"max_new_tokens": MAX_RESPONSE_TOKENS, **sampling}
    return continue_prompt(model, tokenizer, prompt, **sampling)


@torch.inference_mode()
def class_probabilities(
    model: GPTClassificationModel, tokenizer: BPETokenizer, texts: list[str], runtime: Runtime = CPU
) -> np.ndarray:
    """Probabilities (N, classes) of texts, in their order. Texts longer than the context lose their
    middle; an empty one is a ValueError."""
    if "" in texts:
        raise ValueError(f"text {texts.index('') + 1} of {len(texts)} is empty: leave it out")
    probabilities = np.empty((len(texts), model.classifier_head.out_features))
    context_length = model.backbone.config.context_length
    for indices, ids, lengths in text_batches(texts, tokenizer, context_length):
        with runtime.autocast():
            logits = model(ids.to(runtime.device), lengths.to(runtime.device))
        probabilities[indices] = logits.cpu().double().softmax(dim=-1).numpy()
    return probabilities


@torch.no_grad()
def attention_maps(model: GPTModel, ids: Tensor) -> Tensor:
    """Attention weights (L, B, H, T, T) of all layers and heads; each row sums to one."""
    x, mask, rotary = model.embed(ids, 0)
    maps = []
    for block in model.blocks:
        q, k, _ = block.attn.project(block.norm1(x), rotary)
        maps.append(block.attn.weights(q, k, mask))
        x = block(x, mask, rotary)
    return torch.stack(maps)


@torch.no_grad()
def logit_lens(model: GPTModel, ids: Tensor) -> Iterator[Tensor]:
    """Yields for each layer the logits (B, T, V) that the final norm and the head compute from the
    residual stream after it: the model's guess so far (nostalgebraist 2020, "interpreting GPT: the
    logit lens"). The last are the model's own."""
    x, mask, rotary = model.embed(ids, 0)
    for block in model.blocks:
        x = block(x, mask, rotary)
        yield model.head(model.final_norm(x))


def adapter_updates(path: str | Path) -> dict[str, tuple[float, list[float]]]:
    """For each layer that an adapter changes: the Frobenius norm of the update relative to that of
    the weight, and the r singular values of the update; both largest first. With the QR
    decompositions B = Q1 R1 and A^T = Q2 R2, B A has the singular values of the small R1 R2^T."""
    updates = {}
    with open_checkpoint(path) as checkpoint:
        base, config = _base_weights(path, checkpoint), checkpoint["lora_config"]
        adapter = {name: tensor.float() for name, tensor in checkpoint["weights"].items()}
        for name in (name for name in adapter if name.endswith("_A")):
            layer = name.rpartition(".")[0].removeprefix("backbone.")
            weight = base.get(f"{layer}.weight", base["token_embedding.weight"])  # if tied
            A, B = adapter[name], adapter[f"{name[:-1]}B"]
            left, right = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
            values = config["lora_alpha"] / config["r"] * torch.linalg.svdvals(left @ right.T)
            updates[layer] = (values.norm() / weight.float().norm()).item(), values.tolist()
    return dict(sorted(updates.items(), key=lambda item: item[1], reverse=True))


# ---- from a checkpoint to a model

# The files of a model set, and the commands that create them.
BASE, REVIEW_LM = "model_weights.pth", "review_lm_weights.pth"
FULL_CLASSIFIER, LORA_CLASSIFIER = "finetuned_classifier_weights.pth", "lora_classifier_weights.pth"
LINEAR_BASELINE = "linear_baseline.pth"
QLORA, LORA, FULL = (f"{name}_instruction_weights.pth" for name in ("qlora", "lora", "full"))
COMMANDS = {BASE: "python main.py", LORA_CLASSIFIER: "python finetune_lora_classifier.py"}
_CLASSIFY, _INSTRUCT = "python finetune_classifier.py", "python finetune_qlora_instructions.py"
COMMANDS |= {REVIEW_LM: _CLASSIFY, FULL_CLASSIFIER: _CLASSIFY, LINEAR_BASELINE: _CLASSIFY}
COMMANDS |= {QLORA: _INSTRUCT, LORA: f"{_INSTRUCT} --no-quantize", FULL: f"{_INSTRUCT} --full"}
CLASSIFIERS = ("classifier", "lora_classifier")  # kinds of checkpoints
INSTRUCTION_MODELS = ("qlora_instruction", "lora_instruction", "full_instruction")
ANY_KIND = ("base", *CLASSIFIERS, *INSTRUCTION_MODELS)
LARGE_MODEL = 20_000_000  # parameters; smaller models gain nothing from fewer bits


def load_model(
    path: str | Path,
    kinds: str | tuple[str, ...] = ANY_KIND,
    runtime: Runtime = CPU,
    dtype: torch.dtype | None = torch.float32,
) -> tuple[Any, BPETokenizer, dict[str, Any]]:
    """Opens a checkpoint: the model in evaluation mode, its tokenizer, and the checkpoint itself.
    The tokenizer is the `tokenizer.json` beside the checkpoint. An adapter is loaded onto its base,
    at the relative path that the checkpoint records; for QLoRA the base is quantised again, to
    exactly the same values. `dtype` is that of the base's weights; with None they stay as in the
    file, mapped into memory. Files that do not match, or of other kinds, raise a ValueError."""
    with open_checkpoint(path, kinds) as checkpoint:
        lora_config = checkpoint.get("lora_config")
        weights = _base_weights(path, checkpoint) if lora_config else checkpoint["weights"]
        tokenizer_path = Path(path).with_name("tokenizer.json")
        tokenizer = BPETokenizer.load(tokenizer_path)
        if tokenizer.sha256 != checkpoint.get("tokenizer_sha256"):
            text = f"{path} was trained with another tokenizer than {tokenizer_path}: put the"
            raise ValueError(f"{text} right one back, or repeat `{command_for(path)}`")
        weights = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
        head = {name: weights.pop(name) for name in list(weights) if name.startswith(lora.HEAD)}
        is_quantized = checkpoint["kind"] == "qlora_instruction"
        if is_quantized:  # the same values need weights of the dtype used in training
            dtype = getattr(torch, checkpoint.get("base_dtype", "float32").split(".")[-1])
        model = _build_model(GPTConfig(**checkpoint["model_config"]), weights, dtype)
        if checkpoint["kind"] in CLASSIFIERS:
            model = GPTClassificationModel(model, len(checkpoint["labels"]))
            model.load_state_dict(head, strict=False)
        tokenizer.chat_template = checkpoint.get("chat_template")
        tokenizer.text_template = checkpoint.get("review_config", {}).get("text_template", "{}")
        model.to(runtime.device)
        if is_quantized:
            lora.quantize_4bit(model, getattr(torch, checkpoint["compute_dtype"].split(".")[-1]))
        if lora_config:
            lora.apply_lora(model, lora.LoRAConfig(**lora_config))
            lora.load_lora_state_dict(model, checkpoint["weights"])
    return model.eval(), tokenizer, checkpoint


@contextlib.contextmanager
def open_checkpoint(path: str | Path, kinds: str | tuple[str, ...] = ANY_KIND) -> Iterator[dict]:
    """Reads a checkpoint; errors in the body name the file and the command that creates it."""
    hint = command_for(path)
    checkpoint = load_checkpoint(path, kinds, hint)
    try:
        yield checkpoint
    except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the file
        raise
    except (KeyError, TypeError, RuntimeError) as error:
        first_line = str(error).replace(":\n\t", ": ").split("\n")[0]
        text = f"{path} does not fit this program's model ({first_line})"
        raise ValueError(f"{text}: recreate it with `{hint}`") from None


def _base_weights(path: str | Path, checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The weights that an adapter was trained on."""
    base_path = Path(path).parent / checkpoint["base"]
    base = load_checkpoint(base_path, "base", command_for(base_path))
    if base["weights_sha256"] != checkpoint["base_sha256"]:
        text = f"{path} was trained on another base than {base_path}: put the right one back"
        raise ValueError(f"{text}, or train again with `{command_for(path)}`")
    return base["weights"]


def load_for_inference(
    path: str | Path, runtime: Runtime = CPU, weights: str | None = None
) -> tuple[Any, BPETokenizer, dict[str, Any]]:
    """`load_model` with a model for inference only; the checkpoint comes without its weights."""
    model, tokenizer, checkpoint = load_model(path, runtime=runtime, dtype=None)
    del checkpoint["weights"]
    return prepare_for_inference(model, weights), tokenizer, checkpoint


def prepare_for_inference(model: nn.Module, weights: str | None = None) -> nn.Module:
    """Merges adapters in place, dequantises 4-bit weights, and converts the result to a format in
    `lora.WEIGHTS`: by default the fastest for a large model, and float32 for a small one."""
    if weights is None and lora.count_parameters(model)[1] <= LARGE_MODEL:
        weights = "fp32"
    device = next(model.parameters()).device
    has_bf16 = weights != "fp32" and training.bfloat16_is_faster(device)
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    if weights is None:
        config = getattr(model, "backbone", model).config
        weights = lora.fastest_weights(nn.Linear(config.n_embd, config.n_ff, device=device), dtype)
        log0(f"weights: {weights}, the fastest here")
    lora.merge_lora(model, torch.float32 if weights == "fp32" else None)
    try:
        lora.convert_weights(model, weights, dtype)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"no {weights} on this machine ({reason}): leave --weights out") from None
    return model


def command_for(path: str | Path) -> str:
    """The command that creates a file of a model set."""
    folder, name = Path(path).resolve().parent, Path(path).name
    command = COMMANDS.get(name, COMMANDS[BASE])
    if folder.parent.name != "models" or folder.name == "shipped":
        return command
    if command != COMMANDS[BASE]:
        return f"{command} --base {folder.name}"
    is_public = folder.name in PRETRAINED
    return f"{command} --pretrained {folder.name}" if is_public else f"{command} --out-dir {folder}"


def _build_model(config, weights, dtype) -> GPTModel:
    """A model with these weights, without initialising any first; a dtype of None changes none."""
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if config.position == "learned":  # an adapter may use a shorter context than its base
        positions = weights["position_embedding.weight"]
        weights["position_embedding.weight"] = positions[: config.context_length].clone()
    with torch.device("meta"), _NoInitialisation():
        model = GPTModel(config)
    model.load_state_dict(weights, assign=True)
    if config.tie_weights:
        model.head.weight = model.token_embedding.weight
    return model


class _NoInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init`, which on the meta device imports all of PyTorch's compiler: slow."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def cached_model(path: str | Path, metadata: dict[str, Any]) -> tuple | None:
    """What `load_model` returns for a base if the file exists and has this metadata, else None."""
    if not (path := Path(path)).is_file():
        return None
    try:
        cached = load_model(path, "base")
        if metadata.items() <= cached[2].items():
            log0(f"using {path}")
            return cached
        note = dependents(path.parent, [path.name])
        log0(f"replacing {path}: the data, the base or the options differ{note}")
    except ValueError as error:
        log0(f"training it again: {error}")
    return None


def parse_for_base(
    parser: argparse.ArgumentParser, argv: list[str] | None, recipe: dict, public_recipe: dict
) -> argparse.Namespace:
    """The options of a fine-tuning; defaults depend on whether the base is a public model or one
    trained from scratch. `--base` is a file, or a folder, also one in `models/`."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--base", type=Path)
    path = first.parse_known_args(argv)[0].base or default_model_set() / BASE
    folders = [f for f in (Path("models", path), path) if f.is_dir() or str(path) in PRETRAINED]
    path = folders[0] / BASE if folders else path
    is_public = False
    with contextlib.suppress(Exception):  # `load_model` says what is wrong with a file
        saved = torch.load(path, "cpu", weights_only=True, mmap=True)
        is_public = bool(saved.get("pretrained") or saved.get("public_base"))
    parser.set_defaults(**(public_recipe if is_public else recipe))
    args = parser.parse_args(argv)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: create it with `{command_for(path)}`")
    args.base, args.public_recipe = path, public_recipe if is_public else {}
    if args.out_dir is None:  # by default, models/shipped is never overwritten
        args.out_dir = Path("models") if path.parent.name == "shipped" else path.parent
    return args


def open_base(
    args: argparse.Namespace, context_length: int, dtype: torch.dtype = torch.float32
) -> tuple[GPTModel, BPETokenizer, dict[str, Any]]:
    """Opens `args.base` and copies its tokenizer to `args.out_dir`. Returns the model, its
    tokenizer, and the path and hashes by which checkpoints identify the base."""
    if args.public_recipe:
        defaults = ", ".join(f"{name} {value!r}" for name, value in args.public_recipe.items())
        log0(f"defaults for a public base: {defaults}")
    model, tokenizer, checkpoint = load_model(args.base, "base", dtype=dtype)
    log0(f"using {args.base}")
    length = model.config.context_length
    if model.config.position == "learned" and context_length > length:
        raise ValueError(f"the base has {length} learned positions: lower --context-length")
    place_tokenizer(tokenizer, args.out_dir)
    origin = {"base_sha256": checkpoint["weights_sha256"], "tokenizer_sha256": tokenizer.sha256}
    base = Path(os.path.relpath(args.base.resolve(), args.out_dir.resolve())).as_posix()
    return model, tokenizer, {"base": base, **origin}


def place_tokenizer(tokenizer: BPETokenizer, folder: str | Path) -> None:
    """Writes the tokenizer of a model set, unless it has one; a different one is a ValueError."""
    path = Path(folder, "tokenizer.json")
    if not path.is_file():
        tokenizer.save(path)
    elif BPETokenizer.load(path).sha256 != tokenizer.sha256:
        raise ValueError(f"{path} differs from the base's tokenizer: choose another --out-dir")


def reconfigure(model: GPTModel, context_length: int, dropout: float = 0.0) -> GPTModel:
    """Changes the context length and the dropout rate of a model in place. A context of learned
    positions can only become shorter."""
    model.config = replace(model.config, context_length=context_length, dropout=dropout)
    if model.config.position == "learned":
        table = model.position_embedding
        table.weight = nn.Parameter(table.weight[:context_length].detach())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model


def default_model_set(root: str | Path = "models") -> Path:
    """The user's models if they have a base, else the ones that come with the clone."""
    return Path(root) if Path(root, BASE).is_file() else Path(root, "shipped")


def default_path(file: str, folder: str | Path | None = None) -> Path:
    """A file of the model set in `folder`, or of the default one; logs its path."""
    path = Path(folder or default_model_set(), file)
    log0(f"using {path}")
    return path


# ---- to other libraries


def export_hf(path: str | Path, folder: str | Path) -> None:
    """Writes a checkpoint as a folder for `transformers`, in float32 and with adapters merged."""
    model, tokenizer, checkpoint = load_model(path)
    lora.merge_lora(model.float(), torch.float32)
    labels, gpt = checkpoint.get("labels"), getattr(model, "backbone", model)
    is_tied = gpt.head.weight is gpt.token_embedding.weight  # no longer after adapters of the head
    config = replace(gpt.config, tie_weights=is_tied)
    tensors = weights_to_hf(gpt.state_dict(), config)
    stops, vocab = stop_ids(tokenizer), tokenizer.vocab
    special = {"bos_token_id": None, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
    tokens = {"eos_token": vocab[stops[0]].decode(), "pad_token": vocab[tokenizer.pad_id].decode()}
    tokens |= {"model_max_length": config.context_length, "clean_up_tokenization_spaces": False}
    files = {"tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}}
    if checkpoint["kind"] in INSTRUCTION_MODELS or tokenizer.chat_template:
        files["tokenizer_config"]["chat_template"] = tokenizer.chat_template or CHAT_TEMPLATE
    if labels:
        tensors.pop("lm_head.weight", None)
        tensors |= _classifier_tensors(model)
        special |= {"eos_token_id": stops[0], "id2label": dict(enumerate(labels))}
        special["label2id"] = {name: i for i, name in enumerate(labels)}
    else:
        files["generation_config"] = special
    task = "SequenceClassification" if labels else "CausalLM"
    files["config"] = {**hf_config(config, task), **special, "dtype": "float32"}
    _write_folder(folder, tensors, "model.safetensors", **files)
    tokenizer.save(Path(folder, "tokenizer.json"))


def export_peft(path: str | Path, folder: str | Path) -> None:
    """Writes an adapter that `peft` loads onto the same base in `transformers`. Where our layer
    joins several of theirs (queries, keys and values), these share A, and the rows of B are divided
    among them: exactly the same update, of the same rank. One of a 4-bit base fits that alone."""
    model, _, checkpoint = load_model(path)
    if not checkpoint.get("lora_config"):
        raise ValueError(f"{path} has no adapter: use --export-hf")
    if checkpoint["kind"] == "qlora_instruction":
        log0("the adapter fits the base in NF4 with double quantisation, and no other precision")
    labels, config = checkpoint.get("labels"), getattr(model, "backbone", model).config
    tensors = _classifier_tensors(model) if labels else {}
    saved = sorted({name.rpartition(".")[0] for name in tensors})
    for name, module in lora.lora_layers(model):
        layer = name.removeprefix("backbone.")
        if isinstance(module, lora.LoRAEmbedding):
            for matrix in ("lora_embedding_A", "lora_embedding_B"):
                tensors |= hf_tensors(f"{layer}.{matrix}", getattr(module, matrix), config)
            continue
        for theirs, rows in hf_tensors(f"{layer}.lora_B", module.lora_B, config).items():
            tensors[f"{theirs}.weight"] = rows
            tensors[f"{theirs.removesuffix('B')}A.weight"] = module.lora_A
    targets = sorted({n.partition(".lora_")[0] for n in tensors if ".lora_" in n})
    settings = {**checkpoint["lora_config"], "peft_type": "LORA", "target_modules": targets}
    task, is_gpt2 = "SEQ_CLS" if labels else "CAUSAL_LM", config.position == "learned"
    settings |= {"task_type": task, "modules_to_save": saved or None, "fan_in_fan_out": is_gpt2}
    tensors = {f"base_model.model.{n}": t.detach().clone() for n, t in tensors.items()}
    _write_folder(folder, tensors, "adapter_model.safetensors", adapter_config=settings)


def _classifier_tensors(model: GPTClassificationModel) -> dict[str, Tensor]:
    """The head of a classifier for `transformers`, whose head has no bias: ours moves into the bias
    of the final norm, where it has the same effect."""
    head, norm = model.classifier_head, model.backbone.final_norm
    tensors = {"score.weight": head.weight.detach()}
    if head.bias is not None:
        shift = (torch.linalg.pinv(head.weight.double()) @ head.bias.double()).float()
        bias = shift if norm.bias is None else norm.bias + shift
        for name, tensor in (("weight", norm.weight), ("bias", bias)):
            tensors |= hf_tensors(f"final_norm.{name}", tensor.detach(), model.backbone.config)
    return tensors


def _write_folder(folder, tensors: dict[str, Tensor], file: str, **settings: dict) -> None:
    """Writes tensors to `file`, then JSON files; without space for tensors, no file is left."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose a new folder")
    with atomic_write(folder / file) as target:
        try:
            save_file(tensors, target.name, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(error) from None
    for name, values in settings.items():
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    log0(f"wrote {folder}")


# ---- command line


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Command line: streams text, prints one JSON object, or exports."""
    args = _parse(argv)
    path = args.checkpoint or default_path(BASE if args.instruct is None else QLORA)
    if args.export_hf or args.export_peft:
        for export, folder in ((export_hf, args.export_hf), (export_peft, args.export_peft)):
            if folder:
                export(path, folder)
        return 0
    runtime = Runtime(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model, tokenizer, checkpoint = load_for_inference(path, runtime, args.weights)
    if checkpoint["kind"] in CLASSIFIERS:
        command = f"python evaluate.py sentiment --checkpoint {path} --data FILE"
        raise ValueError(f"{path} is a classifier and writes no text: use `{command}`")
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    sampling = {name: getattr(args, name) for name in names}
    started = time.perf_counter()
    if args.instruct is None:
        ids = continue_prompt(model, tokenizer, args.prompt, **sampling)
    else:
        task = Instruction(args.instruct, args.context)
        ids = generate_response(model, tokenizer, task, **sampling)
    if args.json:
        tokens = list(ids)
        seconds = time.perf_counter() - started
        speed = {"seconds": seconds, "tokens_per_second": len(tokens) / seconds}
        print(json.dumps({"text": tokenizer.decode(tokens), "tokens": len(tokens), **speed}))
    else:
        print(args.prompt, end="")
        for chunk in tokenizer.decode_stream(ids):
            print(chunk, end="", flush=True)
        print()
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("Continue a prompt, or follow an instruction.")
    add, task = parser.add_argument, parser.add_mutually_exclusive_group()
    task.add_argument("--prompt", default="", help="text to continue; empty starts a new text")
    task.add_argument("--instruct", help="instruction to follow, instead of a prompt")
    add("--context", default="", help="text that the instruction is about")
    add("--checkpoint", type=Path, help="model file (default: the base; with --instruct, QLoRA)")
    add("--max-new-tokens", type=int, default=300, help="maximum number of tokens to generate")
    add("--temperature", type=float, default=TEMPERATURE, help="0 is greedy")
    add("--top-k", type=int, default=0, help="sample from the k most probable tokens; 0 means all")
    add("--top-p", type=float, default=TOP_P, help="sample from tokens of this total probability")
    add("--repetition-penalty", type=float, default=1.0, help="above 1 discourages repetition")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    text = "weight format (default: fp32; for a large model, the fastest of the first three)"
    add("--weights", choices=lora.WEIGHTS, help=text)
    add("--json", action="store_true", help="print one JSON object at the end")
    add("--export-hf", type=Path, metavar="DIR", help="instead, write a copy for transformers")
    add("--export-peft", type=Path, metavar="DIR", help="instead, write the adapter for peft")
    args = parser.parse_args(argv)
    if args.context and args.instruct is None:
        parser.error("--context needs --instruct")
    return args


if __name__ == "__main__":
    training.exit_process(main())
