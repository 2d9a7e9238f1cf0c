"""Low-rank adaptation (LoRA; Hu et al. 2021, https://arxiv.org/abs/2106.09685), also of a base
quantised to 4 bits (QLoRA; Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

A frozen linear layer W gets a trainable companion of low rank: y = W x + (alpha / r) B A x. One of
A and B starts at zero, so that training starts from the model as it was; afterwards the product can
be added to W. Only A, B and a classification head are trained and saved: the adapter.

Shapes: r rank; A (r, in), B (out, r).
"""

import json
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

HEAD = "classifier_head"  # trains and is saved with the adapter


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers get an adapter, and how large.

    Attributes:
        r: Rank of the change to a weight.
        lora_alpha: The change is scaled by lora_alpha / r.
        lora_dropout: Share of a linear layer's inputs hidden from its adapter in training.
        target_modules: Last parts of the names of the layers to adapt, linear ones or embeddings,
            such as "qkv" or "blocks.2.attn.proj".

    Raises:
        ValueError: A value is out of range.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("qkv",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.r < 1 or not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"r {self.r} and lora_alpha {self.lora_alpha} must be above zero")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        if not self.target_modules:
            raise ValueError("target_modules names no layer")


class LoRALayer(nn.Module):
    """A linear layer, frozen, and its low-rank companion."""

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.base_layer = base_layer
        self.scale = config.lora_alpha / config.r
        self.lora_dropout = config.lora_dropout
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.r, base_layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, config.r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as nn.Linear does

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        low_rank = F.linear(F.dropout(x, self.lora_dropout, self.training), self.lora_A)
        change = F.linear(low_rank, self.lora_B)
        return torch.add(self.base_layer(x), change, alpha=self.scale)

    def weight_change(self) -> Tensor:
        """What the adapter adds to the weight: (out, in)."""
        return self.scale * self.lora_B @ self.lora_A


class LoRAEmbedding(nn.Module):
    """An embedding, frozen, and its low-rank companion: r numbers a token, turned into channels.

    Here A (r, V) starts at zero and B (C, r) random, as in `peft`, whose names they have.
    """

    def __init__(self, base_layer: nn.Embedding, config: LoRAConfig):
        super().__init__()
        self.base_layer = base_layer
        self.scale = config.lora_alpha / config.r
        V, C = base_layer.weight.shape
        device = base_layer.weight.device
        self.lora_embedding_A = nn.Parameter(torch.zeros(config.r, V, device=device))
        self.lora_embedding_B = nn.Parameter(torch.randn(C, config.r, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to (B, T, C)."""
        change = F.linear(F.embedding(ids, self.lora_embedding_A.T), self.lora_embedding_B)
        return torch.add(self.base_layer(ids), change, alpha=self.scale)

    def weight_change(self) -> Tensor:
        """What the adapter adds to the weight: (V, C)."""
        return self.scale * (self.lora_embedding_B @ self.lora_embedding_A).T


def apply_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Wraps the target layers of a model, and freezes everything but adapters and head.

    A model that has adapters stays as it is. A target that matches no layer gets a warning.
    """
    if any(True for _ in lora_layers(model)):
        return
    kinds = nn.Linear | nn.Embedding
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    for target in config.target_modules:
        found = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not found:
            warnings.warn(
                f"LoRA target {target!r} matches no linear layer or embedding", stacklevel=2
            )
        for name in found:
            layer = layers.pop(name)  # a layer that two targets match is wrapped once
            adapter = LoRAEmbedding if isinstance(layer, nn.Embedding) else LoRALayer
            model.set_submodule(name, adapter(layer, config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = _is_adapter(name)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer | LoRAEmbedding]]:
    """Name and module of each adapted layer."""
    kinds = LoRALayer | LoRAEmbedding
    return ((n, m) for n, m in list(model.named_modules()) if isinstance(m, kinds))


def _is_adapter(name: str) -> bool:
    parts = name.split(".")
    return parts[-1].startswith("lora_") or HEAD in parts


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Adds each adapter to its layer's weight and removes it: the same function, no extra cost.

    A weight of 4 bits becomes one of full precision, which the sum needs.
    """
    for name, module in lora_layers(model):
        layer = dequantize(module.base_layer)
        # A new tensor: the head's weight may be the embedding's, too.
        layer.weight = nn.Parameter(layer.weight + module.weight_change(), requires_grad=False)
        model.set_submodule(name, layer)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter: tensors of the low-rank layers and of the head, chosen by name."""
    return {n: t.detach().clone() for n, t in model.state_dict().items() if _is_adapter(n)}


def load_lora_state_dict(model: nn.Module, adapter: dict[str, Tensor]) -> None:
    """Puts a saved adapter into a model that `apply_lora` prepared.

    Raises:
        RuntimeError: Tensors are missing, too many, or of other shapes.
    """
    places = {name for name in model.state_dict() if _is_adapter(name)}
    if different := sorted(places ^ adapter.keys()):
        raise RuntimeError(f"{different[0]} is in the adapter or in the model, not in both")
    model.load_state_dict(adapter, strict=False)


# ---- 4-bit weights


@dataclass(frozen=True)
class QuantizedSize:
    """What quantisation came to.

    Attributes:
        parameters: Weights that were quantised.
        bits_per_parameter: Of these, scales included.
        bytes_before: Of the whole model.
        bytes_after: Of the whole model.
    """

    parameters: int
    bits_per_parameter: float
    bytes_before: int
    bytes_after: int


def quantize_4bit(model: nn.Module, dtype: torch.dtype = torch.float32) -> QuantizedSize:
    """Stores the linear layers of the blocks in 4 bits; embeddings, norms and head stay.

    Each weight becomes one of the 16 values of NF4, quantiles of a normal distribution, times the
    scale of its block of 64; the scales are 8-bit numbers themselves (double quantisation). A
    model that is quantised stays as it is.

    Args:
        model: Holds the trained weights, which the 4-bit layers take over.
        dtype: In which the layers compute.

    Raises:
        ValueError: bitsandbytes cannot be loaded.
    """
    bitsandbytes = _load_bitsandbytes()
    for name, layer in list(model.named_modules()):
        in_block = "blocks" in name.split(".")
        if not in_block or not isinstance(layer, nn.Linear) or is_quantized(layer):
            continue
        quantized = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=dtype,
            device="meta",  # no random weights
        )
        quantized.weight = bitsandbytes.nn.Params4bit(
            layer.weight.detach().clone().cpu(),
            quant_type="nf4",  # the default is another 4-bit type
            compress_statistics=True,
        )
        if layer.bias is not None:
            quantized.bias = layer.bias.requires_grad_(False)
        # Without gradients such CPUs would pack the weights anew, in a layout from which the
        # gradients of later training come out wrong.
        quantized.support_avx512bf16_for_cpu = False
        try:
            quantized.to(layer.weight.device)  # quantises, also where it moves nothing
        except RuntimeError as error:  # no library for this GPU
            raise ValueError(_no_bitsandbytes(error)) from None
        model.set_submodule(name, quantized.train(layer.training))
    layers = [layer for layer in model.modules() if is_quantized(layer)]
    for layer in layers:  # the tables of 16 and 256 values are the same for all: hold them once
        state, first = layer.weight.quant_state, layers[0].weight.quant_state
        state.code, state.state2.code = first.code, first.state2.code
    return _quantized_size(model, layers)


def _load_bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of faster kernels it could use
    try:
        import bitsandbytes
    except Exception as error:  # a missing package, or a library of it that the system lacks
        raise ValueError(_no_bitsandbytes(error)) from None
    return bitsandbytes


def _no_bitsandbytes(error: Exception) -> str:
    first_line = str(error).strip().split("\n")[0]
    return (
        f"bitsandbytes cannot be loaded ({first_line}): `pip install bitsandbytes`, or train "
        "without 4-bit weights: --no-quantize"
    )


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer holds 4-bit weights."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def dequantize(layer: nn.Module) -> nn.Module:
    """A linear layer in full precision with a 4-bit layer's weights; any other layer itself."""
    if not is_quantized(layer):
        return layer
    functional = _load_bitsandbytes().functional
    weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.float(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.float(), requires_grad=False)
    return plain


def _quantized_size(model: nn.Module, layers: list[nn.Linear]) -> QuantizedSize:
    held: dict[int, Tensor] = {}
    for layer in layers:
        state = layer.weight.quant_state
        parts = (layer.weight, state.absmax, state.code, state.state2.absmax, state.state2.code)
        held |= {id(tensor): tensor for tensor in (*parts, state.offset)}
    quantized = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    n = sum(layer.weight.quant_state.shape.numel() for layer in layers)
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in held)
    return QuantizedSize(n, 8 * quantized / n if n else 0.0, rest + 4 * n, rest + quantized)


# ---- what is trained and saved


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of trainable parameters and of all; a byte of 4-bit weights is two."""
    sizes = [
        (p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel(), p.requires_grad)
        for p in model.parameters()
    ]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def export_peft(model: nn.Module, config: LoRAConfig, folder: Path) -> None:
    """Writes the adapter as `peft` reads it: `adapter_config.json`, `adapter_model.safetensors`.

    `peft.PeftModel.from_pretrained(model, folder)` puts it on a classifier of this repository that
    has the base weights and no adapter.
    """
    settings = {
        "peft_type": "LORA",
        **asdict(config),
        "modules_to_save": [HEAD],
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{n}" + (".weight" if n.endswith(("lora_A", "lora_B")) else ""): t
        for n, t in lora_state_dict(model).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
