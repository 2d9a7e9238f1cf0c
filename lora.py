"""Low-rank adaptation (LoRA; Hu et al. 2021, https://arxiv.org/abs/2106.09685).

A frozen linear layer W gets a trainable companion of low rank: y = W x + (alpha / r) B A x. A
starts random and B at zero, so that training starts from the model as it was; afterwards the
product can be added to W. Only A, B and a classification head are trained and saved: the adapter.

Shapes: r rank; A (r, in), B (out, r).
"""

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

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
        lora_dropout: Share of a layer's inputs hidden from its adapter in training.
        target_modules: Last parts of the names of the linear layers to adapt, such as "qkv" or
            "attn.proj".

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
        return self.base_layer(x) + F.linear(low_rank, self.lora_B) * self.scale

    def weight_change(self) -> Tensor:
        """What the adapter adds to the weight: (out, in)."""
        return self.scale * self.lora_B @ self.lora_A


def apply_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Wraps the target layers of a model, and freezes everything but adapters and head.

    A model that has adapters stays as it is. A target that matches no linear layer gets a warning.
    """
    if any(True for _ in lora_layers(model)):
        return
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for target in config.target_modules:
        found = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not found:
            warnings.warn(f"LoRA target {target!r} matches no linear layer", stacklevel=2)
        for name in found:
            layer = linear.pop(name)  # a layer that two targets match is wrapped once
            model.set_submodule(name, LoRALayer(layer, config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = _is_adapter(name)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Name and module of each adapted layer."""
    return ((n, m) for n, m in list(model.named_modules()) if isinstance(m, LoRALayer))


def _is_adapter(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] in ("lora_A", "lora_B") or HEAD in parts


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Adds each adapter to its layer's weight and removes it: the same function, no extra cost."""
    for name, module in lora_layers(model):
        module.base_layer.weight += module.weight_change()
        model.set_submodule(name, module.base_layer)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter: tensors of the low-rank layers and of the head, chosen by name."""
    return {n: t.detach().clone() for n, t in model.state_dict().items() if _is_adapter(n)}


def load_lora_state_dict(model: nn.Module, adapter: dict[str, Tensor]) -> None:
    """Puts a saved adapter into a model that `apply_lora` prepared.

    Raises:
        ValueError: Tensors are missing, too many, or of other shapes.
    """
    places = {n: t for n, t in model.state_dict().items() if _is_adapter(n)}
    if different := sorted(places.keys() ^ adapter.keys()):
        raise ValueError(f"the adapter does not fit the model: {different[0]} is on one side only")
    for name, tensor in adapter.items():
        if tensor.shape != places[name].shape:
            raise ValueError(
                f"the adapter does not fit the model: {name} is {tuple(tensor.shape)}, not "
                f"{tuple(places[name].shape)}"
            )
        places[name].copy_(tensor)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of trainable parameters and of all."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def export_peft(model: nn.Module, config: LoRAConfig, folder: Path) -> None:
    """Writes the adapter as `peft` reads it: `adapter_config.json`, `adapter_model.safetensors`.

    `peft.PeftModel.from_pretrained(model, folder)` puts it on a model of this repository that has
    the base weights and no adapter.
    """
    adapter = lora_state_dict(model)
    has_head = any(HEAD in name.split(".") for name in adapter)
    settings = {
        "peft_type": "LORA",
        **asdict(config),
        "target_modules": list(config.target_modules),
        "modules_to_save": [HEAD] if has_head else None,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{name}" + (".weight" if ".lora_" in name else ""): t.contiguous()
        for name, t in adapter.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
