"""A decoder-only transformer in plain PyTorch: ours, GPT-2 (Radford et al. 2019), Llama, Qwen3.

Shapes: B batch, T time (tokens), C channels (`n_embd`), H query heads, K key/value heads, D head
size, V vocabulary, L layers, S tokens seen so far (those in the cache and the T new ones).

The defaults are the recipe of `main.py`: rotary positions, squared ReLU, query/key normalisation,
and output projections that start at zero, so that each block starts as the identity. With other
settings it is GPT-2, Llama (also SmolLM2) or Qwen3: their files are converted at the end.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor] | None  # cosines and signed sines (T, D)
Store = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None  # KVCache: T new k and v to all S


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762)."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.n_head, self.n_kv_head, D = config.n_head, config.n_kv_head, config.head_size
        n_rows = (config.n_head + 2 * config.n_kv_head) * D
        self.qkv = nn.Linear(config.n_embd, n_rows, bias=config.bias)
        self.proj = nn.Linear(config.n_head * D, config.n_embd, bias=config.bias)
        self.qk_norm, self.norm_eps = config.qk_norm, config.norm_eps
        if config.qk_norm and config.norm == "rms":  # with learned weights, as in Qwen3
            self.q_norm, self.k_norm = (RMSNorm(D, config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor, rotary: Rotary, store: Store = None) -> Tensor:
        """(B, T, C) to (B, T, C); `mask` (T, S) is 0 where a token may attend and -inf elsewhere.
        Each key/value head serves H / K query heads (Ainslie et al. 2023,
        https://arxiv.org/abs/2305.13245). PyTorch's kernel computes single tokens, prompts in fp32,
        and all on CUDA; else, in training or bf16, it is spelled out, which in bf16 is faster."""
        (B, T, _), K = x.shape, self.n_kv_head
        q, k, v = self.project(x, rotary)
        k, v = store(k, v) if store else (k, v)
        S = k.shape[2]
        if T == 1:  # it attends to all S; the queries of a key head are batched as if tokens
            y = F.scaled_dot_product_attention(q.reshape(B, K, -1, q.shape[-1]), k, v)
        elif x.is_cuda or (store and q.dtype == torch.float32):
            is_causal, gqa = S == T, self.n_head > K
            mask = None if is_causal else mask.to(q.dtype)
            y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, enable_gqa=gqa)
        else:
            y = self.weights(q, k, mask).view(B, K, -1, S) @ v
        return self.proj(y.reshape(q.shape).transpose(1, 2).reshape(B, T, -1))  # of (B, H, T, D)

    def project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, ...]:
        """Queries (B, H, T, D), keys and values (B, K, T, D) of x (B, T, C)."""
        (B, T, _), H, K = x.shape, self.n_head, self.n_kv_head
        heads = self.qkv(x).view(B, T, H + 2 * K, -1).transpose(1, 2)
        qk, v = heads.split([H + K, K], dim=1)
        if hasattr(self, "q_norm"):
            qk = torch.cat([self.q_norm(qk[:, :H]), self.k_norm(qk[:, H:])], dim=1)
        elif self.qk_norm:
            qk = F.layer_norm(qk, qk.shape[-1:], eps=self.norm_eps)
        if rotary is not None:
            qk = rotate(qk, rotary[0].to(qk.dtype), rotary[1].to(qk.dtype))
        return *qk.split([H, K], dim=1), v

    def weights(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """Attention weights (B, H, T, S): softmax of q k^T / sqrt(D) plus the mask (T, S)."""
        (B, H, T, D), K = q.shape, self.n_kv_head
        q, k = q.reshape(B * K, -1, D), k.reshape(B * K, -1, D)  # (B K, H / K * T, D), (B K, S, D)
        mask = mask.to(q.dtype).repeat(H // K, 1)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D**-0.5)
        return scores.softmax(dim=-1).view(B, H, T, -1)


class FeedForward(nn.Module):
    """Two linear layers around an activation, applied to each token separately."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        n_rows = config.n_ff * (2 if config.activation == "swiglu" else 1)
        self.fc = nn.Linear(config.n_embd, n_rows, bias=config.bias)
        self.proj = nn.Linear(config.n_ff, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.proj(self.activation(self.fc(x)))


ACTIVATIONS = {
    "gelu": partial(F.gelu, approximate="tanh"),  # GPT-2's form
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, https://arxiv.org/abs/2109.08668
    # half of the channels gate the other half: Shazeer 2020, https://arxiv.org/abs/2002.05202
    "swiglu": lambda x: F.silu(x.chunk(2, dim=-1)[0]) * x.chunk(2, dim=-1)[1],
}


class TransformerBlock(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.norm1 = NORMS[config.norm](config)
        self.attn = CausalSelfAttention(config)
        self.norm2 = NORMS[config.norm](config)
        self.mlp = FeedForward(config)
        self.dropout = FastDropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor, rotary: Rotary, store: Store = None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attn(self.norm1(x), mask, rotary, store))
        return x + self.dropout(self.mlp(self.norm2(x)))


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Everything needed to build a model.

    Attributes:
        vocab_size: Number of token ids (V).
        context_length: Maximum number of tokens that the model sees at once.
        n_layer: Transformer blocks (L).
        n_head: Attention heads (H).
        n_embd: Channels (C).
        n_kv_head: Key/value heads (K); divides n_head; 0 means n_head.
        head_size: Channels per head (D); 0 means n_embd / n_head.
        n_ff: Width of the feed-forward layer; 0 means 4 n_embd.
        dropout: Dropout rate of embeddings and block outputs.
        bias: Whether linear layers and norms have biases, as in GPT-2.
        activation: "gelu" (GPT-2), "relu2" (squared ReLU) or "swiglu" (Llama).
        position: "learned" (GPT-2) or "rotary" (Su et al. 2021, https://arxiv.org/abs/2104.09864).
        rotary_base: The slowest pair of a head turns by about 1 / rotary_base radians per token.
        norm: "layer" or "rms" (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467).
        norm_eps: Added to the variance before its root is taken.
        qk_norm: Whether to normalise q, k (Dehghani et al. 2023, https://arxiv.org/abs/2302.05442).
        tie_weights: Whether the head shares the weights of the token embedding, as in GPT-2."""

    vocab_size: int = 2048
    context_length: int = 256
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 192
    n_kv_head: int = 0
    head_size: int = 0
    n_ff: int = 0
    dropout: float = 0.1
    bias: bool = False
    activation: str = "relu2"
    position: str = "rotary"
    rotary_base: float = 10_000.0
    norm: str = "layer"
    norm_eps: float = 1e-5
    qk_norm: bool = True
    tie_weights: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):  # whose values may come from a file
            value, kind = getattr(self, field.name), field.type
            if type(value) is not kind and (type(value), kind) != (int, float):
                raise ValueError(f"{field.name} must be {kind.__name__}, not {value!r}")
        head_size, rest = divmod(self.n_embd, self.n_head or 1)
        if rest and not self.head_size:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        defaults = {"n_kv_head": self.n_head, "head_size": head_size, "n_ff": 4 * self.n_embd}
        for name, default in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or default)
        sizes = ("vocab_size", "context_length", "n_head", "n_embd", *defaults)
        limits = {**dict.fromkeys(sizes, (1, 10**7)), "n_layer": (1, 1001), "dropout": (0, 1)}
        limits |= {"norm_eps": (1e-20, 1), "rotary_base": (1, 1e12)}
        for name, (minimum, below) in limits.items():
            if not minimum <= (value := getattr(self, name)) < below:
                raise ValueError(f"{name} must lie in [{minimum}, {below}), not {value}")
        choices = {"activation": ACTIVATIONS, "position": ("learned", "rotary"), "norm": NORMS}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be {' or '.join(values)}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head_size, not {self.head_size}")


class RMSNorm(nn.RMSNorm):
    """Casts its weight to the type of x: if they differ, PyTorch's own is slower and warns."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


NORMS = {
    "layer": lambda config: nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias),
    "rms": lambda config: RMSNorm(config.n_embd, config.norm_eps),
}


class GPTModel(nn.Module):
    """Maps token ids to logits over the next token."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.n_embd)
        self.dropout = FastDropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.final_norm = NORMS[config.norm](config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.token_embedding.weight
        for name, parameter in self.named_parameters():  # a tied head is named as the embedding
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("bias", "proj.weight")) or name == "head.weight":
                nn.init.zeros_(parameter)  # each block starts as the identity, the loss at ln V

    def forward(self, ids: Tensor, cache: Any = None) -> Tensor:
        """Logits (B, T, V) for the token after each of `ids` (B, T)."""
        return self.head(self.hidden(ids, cache))

    def hidden(self, ids: Tensor, cache: Any = None) -> Tensor:
        """Normalised last hidden states (B, T, C) of `ids` (B, T) after those in a `KVCache`."""
        x, mask, rotary = self.embed(ids, 0 if cache is None else cache.length)
        stores = [None] * len(self.blocks) if cache is None else cache.extend(ids.shape[1])
        for block, store in zip(self.blocks, stores):
            x = block(x, mask, rotary, store)
        return self.final_norm(x)

    def embed(self, ids: Tensor, start: int) -> tuple[Tensor, Tensor, Rotary]:
        """Block inputs (B, T, C), causal mask (T, S) and rotary table of tokens from `start` on."""
        config, T, end = self.config, ids.shape[1], start + ids.shape[1]
        if end > config.context_length:
            raise ValueError(f"{end} tokens exceed the context of {config.context_length}")
        x, rotary = self.token_embedding(ids), None
        if config.position == "learned":
            x = x + self.position_embedding(torch.arange(start, end, device=ids.device))
        else:
            rotary = tuple(t[start:end].to(x.dtype) for t in rotary_table(config, ids.device))
        mask = torch.full((T, end), -torch.inf, device=ids.device).triu(start + 1)
        if torch.is_autocast_enabled(x.device.type):  # bfloat16 between the blocks, too
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.dropout(x), mask, rotary


class GPTClassificationModel(nn.Module):
    """A GPT with a linear head on the hidden state of the last real token, the only one that has
    seen the whole text. The padding after it and the backbone's own head are not used."""

    def __init__(self, backbone: GPTModel, n_classes: int):
        super().__init__()
        self.backbone = backbone
        if not backbone.config.tie_weights:
            backbone.head.requires_grad_(False)
        has_bias = backbone.config.norm == "layer"  # else `transformers` could not express it
        self.classifier_head = nn.Linear(backbone.config.n_embd, n_classes, has_bias)
        for parameter in self.classifier_head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Class logits (B, classes) of right-padded token ids (B, T) and their lengths (B,)."""
        if lengths.min() < 1 or lengths.max() > ids.shape[1]:
            raise ValueError(f"lengths must lie between 1 and {ids.shape[1]}")
        rows = torch.arange(len(ids), device=ids.device)
        return self.classifier_head(self.backbone.hidden(ids)[rows, lengths - 1])


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a table made while generating also serves training
def rotary_table(config: GPTConfig, device: Any = "cpu") -> Rotary:
    """Cosines, signed sines (positions, D): at position t, pair i turns by t * base^(-2 i / D)."""
    frequencies = config.rotary_base ** (-torch.arange(0, config.head_size, 2) / config.head_size)
    angles = torch.outer(torch.arange(config.context_length), frequencies)
    cos, sin = angles.cos().to(device), angles.sin().to(device)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of x (..., T, D) by an angle that grows with position."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class FastDropout(nn.Dropout):
    """`F.dropout(x, self.p, self.training)`, several times faster on a CPU: 16 random bits decide
    on each element, so `p` is rounded to a multiple of 2^-16."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        if not (self.training and self.p and x.device.type == "cpu"):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()] >= round(self.p * 2**16) - 2**15
        return x * keep.view(x.shape).to(x.dtype).mul_(1 / (1 - self.p))


# ---- the same models in Hugging Face files; ours is there called Persimmon

LAYERS = {  # ours: Llama's and Qwen3's, GPT-2's, Persimmon's. B is a block, A its attention
    "token_embedding": ("model.embed_tokens", "transformer.wte", "model.embed_tokens"),
    "position_embedding": ("", "transformer.wpe", ""),
    "blocks": ("model.layers", "transformer.h", "model.layers"),
    "norm1": ("B.input_layernorm", "B.ln_1", "B.input_layernorm"),
    "attn.qkv": ("A.q_proj A.k_proj A.v_proj", "B.attn.c_attn", "A.query_key_value"),
    "attn.q_norm": ("A.q_norm", "", "A.q_layernorm"),
    "attn.k_norm": ("A.k_norm", "", "A.k_layernorm"),
    "attn.proj": ("A.o_proj", "B.attn.c_proj", "A.dense"),
    "norm2": ("B.post_attention_layernorm", "B.ln_2", "B.post_attention_layernorm"),
    "mlp.fc": ("B.mlp.gate_proj B.mlp.up_proj", "B.mlp.c_fc", "B.mlp.dense_h_to_4h"),
    "mlp.proj": ("B.mlp.down_proj", "B.mlp.c_proj", "B.mlp.dense_4h_to_h"),
    "final_norm": ("model.norm", "transformer.ln_f", "model.final_layernorm"),
    "head": ("lm_head", "lm_head", "lm_head"),
}
SETTINGS = {  # fields of GPTConfig, and their names in the same three columns
    "vocab_size": ("vocab_size", "vocab_size", "vocab_size"),
    "context_length": ("max_position_embeddings", "n_positions", "max_position_embeddings"),
    "n_layer": ("num_hidden_layers", "n_layer", "num_hidden_layers"),
    "n_head": ("num_attention_heads", "n_head", "num_attention_heads"),
    "n_embd": ("hidden_size", "n_embd", "hidden_size"),
    "n_kv_head": ("num_key_value_heads", "", ""),
    "head_size": ("head_dim", "", ""),
    "n_ff": ("intermediate_size", "n_inner", "intermediate_size"),
    "rotary_base": ("rope_theta", "", "rope_theta"),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "tie_weights": ("tie_word_embeddings", "tie_word_embeddings", "tie_word_embeddings"),
}
_ROPE = {"rope_type": "default", "partial_rotary_factor": 1.0}
_SILU = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, **_ROPE}
_GELU = {"activation_function": "gelu_new", "scale_attn_weights": True}
_RELU2 = {"hidden_act": "relu2", "qk_layernorm": True, **_ROPE}
_OFF = {"rope_scaling": None, "quantization_config": None, "use_sliding_window": False}
_OFF |= {"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False}
OURS = ("activation", "position", "norm", "qk_norm", "bias")
FAMILIES = {  # model type: column above, values of OURS, and the only values we support of theirs
    "llama": (0, ("swiglu", "rotary", "rms", False, False), _SILU),
    "qwen3": (0, ("swiglu", "rotary", "rms", True, False), _SILU),
    "gpt2": (1, ("gelu", "learned", "layer", False, True), _GELU),
    "persimmon": (2, ("relu2", "rotary", "layer", True, False), _RELU2),
}


def config_from_hf(data: dict[str, Any]) -> GPTConfig:
    """Our config for a `config.json` of gpt2, llama or qwen3; ValueError if we lack a setting."""
    if (kind := data.get("model_type")) not in ("gpt2", "llama", "qwen3"):
        raise ValueError(f"model_type {kind!r} is not supported: only gpt2, llama and qwen3")
    column, ours, fixed = FAMILIES[kind]
    rope, layers = data.get("rope_parameters") or {}, data.get("layer_types") or []
    if not isinstance(rope, dict) or rope.keys() - {"rope_theta", *_ROPE}:
        raise ValueError(f"rope_parameters {rope} are not supported")
    if not isinstance(layers, list) or layers != ["full_attention"] * len(layers):
        raise ValueError("layer_types other than full_attention are not supported")
    data = {**data, **rope}
    for name, value in {**_OFF, **fixed}.items():
        given = data.get(name, value)
        if given != value and (value, given) != ("gelu_new", "gelu_pytorch_tanh"):  # synonyms
            raise ValueError(f"{name} {given!r} is not supported: only {value!r}")
    values = {"tie_weights": kind == "gpt2", "dropout": 0.0, **dict(zip(OURS, ours))}
    optional = () if kind == "qwen3" else ("n_kv_head", "head_size", "n_ff", "rotary_base")
    for name, row in SETTINGS.items():
        if data.get(row[column]) is not None:
            values[name] = data[row[column]]
        elif name not in (*values, *optional):  # its default there is not ours
            raise ValueError(f"{row[column]} is missing")
    return GPTConfig(**values)


def hf_config(config: GPTConfig, task: str) -> dict[str, Any]:
    """The `config.json` with which `transformers` computes the same; ValueError if it cannot."""
    kind, column = find_family(config)
    architecture = kind.title().replace("Gpt", "GPT") + "For" + task
    data = {"model_type": kind, "architectures": [architecture], **FAMILIES[kind][2]}
    data |= {row[column]: getattr(config, name) for name, row in SETTINGS.items() if row[column]}
    if config.position == "rotary":  # where new versions of transformers look
        data["rope_parameters"] = {**_ROPE, "rope_theta": config.rotary_base}
    return data


def find_family(config: GPTConfig) -> tuple[str, int]:
    """The model type of `transformers` that this config describes, and its column above."""
    ours = tuple(getattr(config, name) for name in OURS)
    plain = (config.n_kv_head, config.head_size * config.n_head) == (config.n_head, config.n_embd)
    for kind, (column, values, _) in FAMILIES.items():
        if ours == values and (plain or column == 0):
            return kind, column
    raise ValueError("transformers has no model of this architecture")


def hf_tensors(name: str, tensor: Tensor, config: GPTConfig) -> dict[str, Tensor]:
    """Splits one of our tensors into those of `transformers`, named and arranged as there."""
    kind, column = find_family(config)
    H, K, D = config.n_head, config.n_kv_head, config.head_size
    block, layer, parameter = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    theirs = LAYERS[layer][column].replace("A.", "B.self_attn.")
    theirs = theirs.replace("B.", f"{LAYERS['blocks'][column]}.{block}.").split()
    if kind == "persimmon" and layer == "attn.qkv":  # there grouped by head
        tensor = tensor.view(3, H, D, -1).transpose(0, 1).reshape(tensor.shape)
    elif kind == "gpt2" and block and parameter == "weight":  # (in, out)
        tensor = tensor.t()
    sizes = [H * D, K * D, K * D] if len(theirs) == 3 else len(tensor) // len(theirs)
    return {f"{their}.{parameter}": part for their, part in zip(theirs, tensor.split(sizes))}


def weights_to_hf(weights: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """The tensors of a `GPTModel`, as `transformers` names and arranges them."""
    weights, theirs = dict(weights), {}
    if is_persimmon := find_family(config)[0] == "persimmon":  # where these norms have weights
        layers = [f"blocks.{i}.attn.{x}_norm" for i in range(config.n_layer) for x in "qk"]
        weights |= {f"{layer}.weight": torch.ones(config.head_size) for layer in layers}
    for name, tensor in weights.items():
        if name == "head.weight" and config.tie_weights:
            continue
        parts = hf_tensors(name, tensor, config)
        theirs |= {their: part.contiguous() for their, part in parts.items()}
        if is_persimmon and name not in ("token_embedding.weight", "head.weight"):  # it has biases
            theirs |= {n.replace("weight", "bias"): p.new_zeros(len(p)) for n, p in parts.items()}
    return theirs


def weights_from_hf(tensors: Mapping[str, Callable], config: GPTConfig) -> dict[str, Tensor]:
    """The weights of a `GPTModel`; `tensors` maps names in a Hugging Face file to functions that
    read one each, so that no model is held twice. A ValueError names a tensor that does not fit."""
    prefix, weights = re.compile(r"^(model|transformer)\."), {}  # some files omit the prefix
    unread = {prefix.sub("", name): read for name, read in tensors.items()}
    with torch.device("meta"):
        model = GPTModel(config)
    for name, ours in model.named_parameters():
        parts, is_transposed = [], config.position == "learned" and name.startswith("blocks")
        for theirs, expected in hf_tensors(name, ours, config).items():
            theirs = prefix.sub("", theirs)
            if theirs not in unread:
                raise ValueError(f"the tensor {theirs} is missing")
            part = unread.pop(theirs)()
            if name in ("token_embedding.weight", "head.weight"):
                part = part[: config.vocab_size]  # without the rows that no token has
            if part.shape != expected.shape or not part.is_floating_point():
                given = f"{part.dtype} of shape {tuple(part.shape)}, not {tuple(expected.shape)}"
                raise ValueError(f"the tensor {theirs} is {given}")
            parts.append(part.t() if is_transposed else part)
        weights[name] = torch.cat(parts)
    if config.tie_weights:
        weights["head.weight"] = weights["token_embedding.weight"]
        unread.pop("lm_head.weight", None)
    if extra := [n for n in unread if not re.fullmatch(r".*attn\.(masked_)?bias|.*inv_freq", n)]:
        raise ValueError(f"the tensor {extra[0]!r} is unexpected")
    return weights
