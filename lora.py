"""Low-rank adaptation (LoRA; Hu et al. 2021, https://arxiv.org/abs/2106.09685), also of a base
quantised to 4 bits (QLoRA; Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

A frozen linear layer W gets a trainable low-rank update: y = W x + (alpha / r) B A x. One of A and
B starts at zero, so training starts from the unchanged model; in QLoRA they start as a correction
of the 4-bit weights. Afterwards the update can be added to W. Only A, B and a classification head,
together the adapter, are trained and saved.

Shapes: r rank, A (r, in), B (out, r); B batch, T time (tokens), C channels, V vocabulary.
"""

import contextlib
import copy
import ctypes
import logging
import re
import timeit
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD = "classifier_head"  # trained and saved with the adapter
WEIGHTS = ("fp32", "bf16", "int8", "int4")  # formats of the weights of a model for inference


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers get an adapter, and its size.

    Attributes:
        r: Rank of the weight update.
        lora_alpha: The update is scaled by lora_alpha / r.
        lora_dropout: Dropout rate of the inputs of A; adapters of embeddings have no dropout.
        target_modules: Linear layers and embeddings to adapt, by the end of their names, such as
            "qkv" or "blocks.2.attn.proj"; in "blocks.-1.attn.qkv", -1 is the last block."""

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("qkv",)

    def __post_init__(self) -> None:
        names = self.target_modules
        names = " ".join([names] if isinstance(names, str) else names).replace(",", " ").split()
        object.__setattr__(self, "target_modules", tuple(names))
        if self.r < 1 or not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"r {self.r} and lora_alpha {self.lora_alpha} must be above zero")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), not {self.lora_dropout}")
        if not self.target_modules:
            raise ValueError("target_modules names no layer")


class LoRALinear(nn.Module):
    """A frozen linear layer, perhaps in half precision, and its low-rank update in float32."""

    def __init__(self, base_layer: nn.Linear, config: LoRAConfig):
        super().__init__()
        self.base_layer = base_layer
        self.scale = config.lora_alpha / config.r
        self.lora_dropout = config.lora_dropout
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.r, base_layer.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, config.r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)  # as nn.Linear does

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        inputs = F.dropout(x, self.lora_dropout, self.training)
        update = F.linear(F.linear(inputs, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return torch.add(self.base_layer(x), update, alpha=self.scale)

    def delta_weight(self) -> Tensor:
        """The weight update (out, in)."""
        return self.scale * self.lora_B @ self.lora_A


class LoRAEmbedding(nn.Module):
    """A frozen embedding and its low-rank update: r numbers per token, mapped to C channels. Here
    A (r, V) starts at zero and B (C, r) at random; start and names are those of `peft`."""

    def __init__(self, base_layer: nn.Embedding, config: LoRAConfig):
        super().__init__()
        self.base_layer = base_layer
        self.scale = config.lora_alpha / config.r
        (V, C), device = base_layer.weight.shape, base_layer.weight.device
        self.lora_embedding_A = nn.Parameter(torch.zeros(config.r, V, device=device))
        self.lora_embedding_B = nn.Parameter(torch.randn(C, config.r, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, T) to (B, T, C)."""
        update = F.linear(F.embedding(ids, self.lora_embedding_A.T), self.lora_embedding_B)
        embedded = self.base_layer(ids)
        return torch.add(embedded, update.to(embedded.dtype), alpha=self.scale)

    def delta_weight(self) -> Tensor:
        """The weight update (V, C)."""
        return self.scale * (self.lora_embedding_B @ self.lora_embedding_A).T


def apply_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Wraps the target layers of a model, and freezes all but the adapters and a classifier's head.
    Leaves a model that has adapters as it is."""
    if lora_layers(model):
        return
    targets = tuple(f".{target}" for target in resolve_targets(model, config).target_modules)
    for name, layer in _adaptable_layers(model).items():
        if f".{name}".endswith(targets):
            adapter = LoRAEmbedding if isinstance(layer, nn.Embedding) else LoRALinear
            model.set_submodule(name, adapter(layer, config))
    trained = lora_state_dict(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in trained


def resolve_targets(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The config with "blocks.-1" as the last block; a target without a layer is a ValueError."""
    names = [f".{name}" for name in _adaptable_layers(model)]
    n = 1 + max(map(int, re.findall(r"\.blocks\.(\d+)", " ".join(names))), default=-1)
    targets = []
    for given in config.target_modules:
        target = re.sub(r"\bblocks\.-(\d+)", lambda match: f"blocks.{n - int(match[1])}", given)
        if not any(name.endswith(f".{target}") for name in names):
            known = dict.fromkeys(re.sub(r"^(.*\.blocks\.\d+|.*)\.", "", name) for name in names)
            text = f"the {n} blocks and the layers around them have {', '.join(known)}"
            raise ValueError(f"target_modules: {given} is no layer: {text}")
        targets.append(target)
    return replace(config, target_modules=targets)


def _adaptable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """By name; not a classifier's head, which is trained anyway, nor its backbone's unused one."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    return {name: m for name, m in layers.items() if name not in (HEAD, "backbone.head")}


def lora_layers(model: nn.Module) -> list[tuple[str, LoRALinear | LoRAEmbedding]]:
    """Name and module of each adapted layer."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear | LoRAEmbedding)]


@torch.no_grad()
def merge_lora(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Adds each adapter to its layer's weight and removes it: an equivalent, faster model. 4-bit
    weights are dequantised first, also in layers without an adapter. The changed weights get
    `dtype`, by default their own, which may be half precision and round the sum."""
    for name, layer in list(model.named_modules()):
        if q := quantized_weight(layer):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = nn.Parameter(dequantize_nf4(q).to(dtype), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    for name, adapter in lora_layers(model):
        layer = adapter.base_layer
        # A new tensor, because the head may share the weight of the embedding.
        merged = (layer.weight + adapter.delta_weight()).to(dtype or layer.weight.dtype)
        layer.weight = nn.Parameter(merged, requires_grad=False)
        model.set_submodule(name, layer)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of adapters and head, selected by name."""
    tensors = model.state_dict().items()
    return {n: t.detach().clone() for n, t in tensors if ".lora_" in n or HEAD in n}


def load_lora_state_dict(model: nn.Module, adapter: dict[str, Tensor]) -> None:
    """Loads a saved adapter into a model that `apply_lora` prepared with the same config."""
    if different := sorted(lora_state_dict(model).keys() ^ adapter.keys()):
        raise RuntimeError(f"{different[0]} is in the adapter or in the model, not in both")
    model.load_state_dict(adapter, strict=False)


@torch.no_grad()
def input_moments(model: nn.Module, texts: Iterable[Tensor]) -> dict[str, Tensor]:
    """Sum of x x^T (in, in) over the inputs x of each linear layer of the blocks, on ids (B, T)."""
    moments: dict[str, Tensor] = defaultdict(float)

    def add(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        x = inputs[0].flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            moments[name] += x.T @ x

    with contextlib.ExitStack() as hooks:
        for name, layer in model.named_modules():
            if "blocks" in name.split(".") and isinstance(layer, nn.Linear):
                hooks.enter_context(layer.register_forward_pre_hook(partial(add, name)))
        for ids in texts:
            model.hidden(ids)
    return moments


@torch.no_grad()
def absorb_quantization_error(
    model: nn.Module, weights: dict[str, Tensor], moments: dict[str, Tensor]
) -> None:
    """Starts the adapters of a quantised model as the best correction of their rank. With Q the
    4-bit weight, W the original one in `weights`, and the `input_moments` M = L L^T, B A is the
    truncated SVD of (W - Q) L, times the inverse of L: it minimises the error of the outputs rather
    than of the weights (QERA, Zhang et al. 2024, https://arxiv.org/abs/2410.06040)."""
    for name, adapter in lora_layers(model):
        if q := quantized_weight(adapter.base_layer):
            error = weights[f"{name}.weight"].float() - dequantize_nf4(q).float()
            moment = moments[name] / moments[name].diagonal().mean()
            L = torch.linalg.cholesky(moment + 0.01 * torch.eye(len(moment)).to(moment))  # damped
            r = min(len(adapter.lora_A), *error.shape)
            U, S, V = torch.svd_lowrank(error @ L, min(2 * r, *error.shape), niter=4)
            scale = (S[:r] / adapter.scale).sqrt()
            right = (V[:, :r] * scale).T
            adapter.lora_A[:r] = torch.linalg.solve_triangular(L, right, upper=False, left=False)
            adapter.lora_B[:, :r] = U[:, :r] * scale


# ---- NF4: 4-bit weights


class NF4Weight(NamedTuple):
    """A quantised weight of n elements."""

    codes: Tensor  # (n / 2,): indices of NF4 levels, two in a byte
    scale_codes: Tensor  # (n / 64,): indices of 8-bit levels, one per block of weights
    scale_scales: Tensor  # (n / 64 / 256,): one per block of scales
    scale_mean: Tensor  # subtracted from the scales before they are quantised
    shape: torch.Size  # (out, in)
    dtype: torch.dtype  # of the weight


def quantize_nf4(weight: Tensor) -> NF4Weight:
    """Rounds each weight to one of 16 levels times the largest magnitude of its block of 64. The
    levels are quantiles of a normal distribution, so each is used about equally often. The scales,
    32 bits per 64 weights, are themselves quantised to 8 bits in blocks of 256 (double
    quantisation): 4.13 bits per weight (Dettmers et al. 2023)."""
    codes, scales = _quantize_blocks(weight.detach().float().flatten(), nf4_levels(), 64)
    mean = scales.mean()
    scale_codes, scale_scales = _quantize_blocks(scales - mean, dynamic_levels(), 256)
    codes = F.pad(codes, (0, len(codes) % 2))
    packed = codes[::2] << 4 | codes[1::2]
    return NF4Weight(packed, scale_codes, scale_scales, mean, weight.shape, weight.dtype)


def dequantize_nf4(q: NF4Weight) -> Tensor:
    """The rounded weight (out, in)."""
    scales = _dequantize_blocks(q.scale_codes, q.scale_scales, dynamic_levels(), 256) + q.scale_mean
    codes = torch.stack([q.codes >> 4, q.codes & 15], dim=1).flatten()[: q.shape.numel()]
    return _dequantize_blocks(codes, scales, nf4_levels(), 64).view(q.shape).to(q.dtype)


def _quantize_blocks(x: Tensor, levels: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Index of the nearest level for each x / scale (n,), and the scale of each block."""
    blocks = F.pad(x, (0, -len(x) % block)).view(-1, block)
    scales = blocks.abs().amax(dim=1)
    normalised = (blocks * (1 / scales.clamp(min=1e-38))[:, None]).flatten()[: len(x)]
    boundaries = ((levels[:-1] + levels[1:]) / 2).to(x.device)
    return torch.bucketize(normalised, boundaries, out_int32=True).to(torch.uint8), scales


def _dequantize_blocks(codes: Tensor, scales: Tensor, levels: Tensor, block: int) -> Tensor:
    return levels.to(codes.device)[codes.int()] * scales.repeat_interleave(block)[: len(codes)]


@cache
def nf4_levels() -> Tensor:
    """The 16 levels (16,) from -1 to 1: 7 quantiles below zero, zero, and 8 above. The outermost
    have a probability of 1 - (1/30 + 1/32) / 2, because those of 0 and 1 are infinite."""
    probabilities = (torch.linspace(0.9677083, 0.5, n).double() for n in (8, 9))
    negative, positive = (torch.special.ndtri(p)[:-1] for p in probabilities)
    levels = torch.cat([-negative, torch.zeros(1), positive]).sort().values.float()
    return levels / levels.max()


@cache
def dynamic_levels() -> Tensor:
    """256 levels (256,) for 8-bit scales, dense near zero: zero, one, and seven decades of each
    sign, from 1e-7 to 1, each with twice as many levels as the decade below (Dettmers et al. 2021,
    https://arxiv.org/abs/2110.02861)."""
    levels = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        magnitudes = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        levels += [magnitudes, -magnitudes]
    return torch.cat(levels).sort().values


class NF4Linear(nn.Linear):
    """A frozen layer with 4-bit weights, dequantised at each call, if bitsandbytes cannot run."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        q = quantize_nf4(layer.weight)
        self.weight = nn.Parameter(q.codes, requires_grad=False)
        self.bias = layer.bias
        self.quant_state = q._replace(codes=self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, dequantize_nf4(self.quant_state).to(x.dtype), self.bias)


def quantize_4bit(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Quantises the linear layers of the blocks to NF4, in place; embeddings, norms and head stay.
    Uses bitsandbytes, which computes in `dtype`, or if that does not run, warns and uses the slower
    `NF4Linear`, with the same values. Move the model to its device before."""
    for name, layer in list(model.named_modules()):
        if "blocks" not in name.split(".") or type(layer) is not nn.Linear:
            continue
        layer.requires_grad_(False)
        try:
            quantized = _bitsandbytes_layer(layer, dtype)
        except Exception as error:  # it lacks a library, a kernel for this device, or is missing
            quantized, reason = NF4Linear(layer), str(error).strip().split("\n")[0]
            text = f"bitsandbytes not used ({reason}): slower NF4 in plain PyTorch"
            warnings.warn(text, stacklevel=2)
        model.set_submodule(name, quantized.train(layer.training))


def _bitsandbytes_layer(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    if layer.in_features % 64:  # its CPU kernel takes no block that spans two rows
        raise ValueError(f"it would misread rows of {layer.in_features} weights, not n x 64")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # hints about optional kernels
    from bitsandbytes.nn import Linear4bit, Params4bit

    sizes = (layer.in_features, layer.out_features)
    quantized = Linear4bit(*sizes, bias=False, compute_dtype=dtype, device="meta")
    quantized.weight = Params4bit(layer.weight.detach().clone().cpu(), quant_type="nf4")
    quantized.bias = layer.bias
    # Otherwise an evaluation re-packs the weights, which makes later gradients wrong.
    quantized.support_avx512bf16_for_cpu = False
    quantized = quantized.to(layer.weight.device)  # quantises, even if it is there already
    state, device = quantized.weight.quant_state, layer.weight.device
    state.code, state.state2.code = nf4_levels().to(device), dynamic_levels().to(device)  # shared
    return quantized


def quantized_weight(layer: nn.Module) -> NF4Weight | None:
    """The 4-bit weight of a layer, ours or that of bitsandbytes, whose layout is the same."""
    if isinstance(layer, NF4Linear):
        return layer.quant_state
    if state := getattr(getattr(layer, "weight", None), "quant_state", None):
        scales = (state.absmax, state.state2.absmax, state.offset)
        return NF4Weight(layer.weight.data.flatten(), *scales, state.shape, state.dtype)
    return None


# ---- 8-bit and 4-bit weights for inference on a CPU


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights and a scale for each row. The speed of one token at a time
    is limited by reading the weights from memory, so fewer bytes are faster. As an embedding, it
    returns vectors of `dtype`; else the outputs have the type of the inputs."""

    MAX_ROWS = 16  # of the bf16 kernel; with more it is faster to convert the weights first

    def __init__(self, layer: nn.Linear, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        weight = layer.weight.detach().to(torch.float32, copy=True)
        scales = weight.norm(torch.inf, dim=1, keepdim=True).clamp(min=1e-12) / 127
        self.register_buffer("weight", weight.div_(scales).round_().to(torch.int8))
        self.register_buffer("scales", scales[:, 0].bfloat16())
        self.bias, self.dtype = layer.bias, dtype

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out); token ids (B, T) to (B, T, C), for the embedding tied to it."""
        if not x.is_floating_point():
            return self.weight[x] * self.scales[x, None].to(self.dtype)
        rows = x.flatten(0, -2)
        if len(rows) > self.MAX_ROWS:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scales
        else:
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scales)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """The same with 4-bit weights, and a scale and a minimum for each 32 of them in a row."""

    GROUP = 32

    def __init__(self, layer: nn.Linear):
        super().__init__()
        groups = layer.weight.detach().to(torch.float32, copy=True).unflatten(1, (-1, self.GROUP))
        low, high = groups.aminmax(dim=2, keepdim=True)
        scales = ((high - low) / 15).clamp(min=1e-9)
        codes = groups.sub_(low).div_(scales).round_().clamp_(0, 15).int().flatten(1)
        self.register_buffer("weight", torch._convert_weight_to_int4pack_for_cpu(codes, 1))
        scales = torch.cat([scales, low + 8 * scales], dim=2)  # the kernel's codes are -8 to 7
        self.register_buffer("scales", scales.transpose(0, 1).contiguous().bfloat16())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows, groups = x.flatten(0, -2).bfloat16(), self.GROUP
        y = torch._weight_int4pack_mm_for_cpu(rows, self.weight, groups, self.scales)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def convert_weights(model: nn.Module, weights: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Converts a merged model to a format in WEIGHTS, in place. With "int8" and "int4", norms and
    activations are of `dtype`, the faster one for many tokens; with "int4", the head has 8 bits."""
    embeddings = {m.weight: n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for name, layer in list(model.named_modules()) if weights.startswith("int") else ():
        if isinstance(layer, nn.Linear) and name != HEAD:
            in_block = "blocks" in name.split(".") and not layer.in_features % Int4Linear.GROUP
            is_int4 = weights == "int4" and in_block
            packed = Int4Linear(layer) if is_int4 else Int8Linear(layer, dtype)
            model.set_submodule(name, packed)
            if tied := embeddings.get(layer.weight):
                model.set_submodule(tied, packed)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(weights, dtype)
    for parameter in model.parameters():  # not the buffers: the kernels' scales are in bf16
        parameter.data = parameter.data.to(dtype)
    model.requires_grad_(False)
    return_freed_memory()


def return_freed_memory() -> None:
    """Returns freed memory, which Linux's C library keeps for the process, to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def fastest_weights(layer: nn.Linear, dtype: torch.dtype) -> str:
    """The format in WEIGHTS with which a layer of this shape multiplies one vector fastest, timed;
    not "int4", which changes results, nor one whose kernel this machine lacks. `dtype` is the one
    that is faster for many vectors: where it is float32, bf16 would read a prompt too slowly."""
    if layer.weight.device.type != "cpu":  # the calls return before the work is done
        return "bf16" if dtype == torch.bfloat16 else "fp32"
    seconds = {}
    for weights in ("fp32", "int8", "bf16") if dtype == torch.bfloat16 else ("fp32", "int8"):
        copied = nn.Sequential(copy.deepcopy(layer))
        x = torch.ones_like(layer.weight[:1], dtype=torch.float32 if weights == "fp32" else dtype)
        with contextlib.suppress(RuntimeError), torch.inference_mode():
            convert_weights(copied, weights, dtype)
            seconds[weights] = min(timeit.repeat(partial(copied, x), number=4, repeat=15))
    return min(seconds, key=seconds.get)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of trainable and of all parameters; a byte of 4-bit weights counts as two."""
    sizes = {p: p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters()}
    return sum(n for p, n in sizes.items() if p.requires_grad), sum(sizes.values())


def describe_training(model: nn.Module) -> str:
    """For the log: "training 24,450 of 2,582,082 parameters (0.95%)"."""
    trained, total = count_parameters(model)
    return f"training {trained:,} of {total:,} parameters ({trained / total:.2%})"


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all weights, and of the scales and level tables of the quantised ones."""
    tensors = list(model.parameters())
    for q in filter(None, map(quantized_weight, model.modules())):
        tensors += (*q[1:4], nf4_levels(), dynamic_levels())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
