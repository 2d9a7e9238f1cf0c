"""A GPT decoder in plain PyTorch (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners").

Shapes: B batch, T time (tokens), C channels (`n_embd`), H heads, D head size (C / H), V vocabulary,
L layers, S tokens seen so far (those in the cache and the T new ones).

With learned positions, GELU, biases, tied weights and no query/key normalisation this is GPT-2. The
defaults are the recipe of `main.py`: rotary positions, squared ReLU, query/key normalisation, and
output projections that start at zero, so that each block starts as the identity.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and to earlier tokens (Vaswani et al. 2017,
    https://arxiv.org/abs/1706.03762)."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.n_head, self.qk_norm = config.n_head, config.qk_norm
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: "KVCache | None" = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, T, C) to (B, T, C); `mask` (T, S) is 0 where a token may attend and -inf elsewhere.

        On a CPU attention is spelled out, which in bf16 is several times faster than PyTorch's
        fused kernel; a GPU, and a single token, use that kernel.
        """
        B, T, C = x.shape
        q, k, v = self.project(x, rotary)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if x.is_cuda or T == 1:
            mask = mask.to(q.dtype) if cache is not None and T > 1 else None
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=cache is None)
        else:
            y = self.weights(q, k, mask) @ v
        return self.proj(y.transpose(1, 2).reshape(B, T, C))  # from (B, H, T, D)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (B, H, T, D), of x (B, T, C)."""
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, 3 * self.n_head, -1).transpose(1, 2)  # (B, 3 H, T, D)
        qk, v = heads.split([2 * self.n_head, self.n_head], dim=1)
        if self.qk_norm:
            qk = F.layer_norm(qk, qk.shape[-1:])
        if rotary is not None:
            qk = rotate(qk, rotary[0].to(qk.dtype), rotary[1].to(qk.dtype))
        return *qk.split(self.n_head, dim=1), v

    def weights(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        """Attention weights (B, H, T, S): softmax of q k^T / sqrt(D) plus the mask (T, S)."""
        B, H, T, D = q.shape
        q, k = q.reshape(B * H, T, D), k.reshape(B * H, -1, D)
        scores = torch.baddbmm(mask.to(q.dtype), q, k.transpose(1, 2), alpha=1 / math.sqrt(D))
        return scores.softmax(dim=-1).view(B, H, T, -1)


class FeedForward(nn.Module):
    """Two linear layers around an activation, applied to each token separately."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.gelu = config.activation == "gelu"

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = self.fc(x)
        x = F.gelu(x, approximate="tanh") if self.gelu else F.relu(x).square()
        return self.proj(x)


class TransformerBlock(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: "GPTConfig"):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = FeedForward(config)
        self.dropout = FastDropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache: "KVCache | None" = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.dropout(self.attn(self.norm1(x), mask, rotary, cache, layer))
        return x + self.dropout(self.mlp(self.norm2(x)))


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Everything needed to build a model.

    Attributes:
        vocab_size: Number of token ids (V).
        context_length: Maximum number of tokens that the model sees at once.
        n_layer: Transformer blocks (L).
        n_head: Attention heads (H); divides n_embd.
        n_embd: Channels (C).
        dropout: Dropout rate of embeddings and block outputs.
        bias: Whether linear layers and norms have biases, as in GPT-2.
        activation: "gelu" (GPT-2's tanh form) or "relu2" (squared ReLU; So et al. 2021,
            https://arxiv.org/abs/2109.08668).
        position: "learned" (GPT-2's table) or "rotary" (Su et al. 2021,
            https://arxiv.org/abs/2104.09864).
        qk_norm: Whether queries and keys are normalised to mean 0 and variance 1 in each head
            (Dehghani et al. 2023, https://arxiv.org/abs/2302.05442).
        tie_weights: Whether the head shares the weights of the token embedding, as in GPT-2.
    """

    vocab_size: int = 2048
    context_length: int = 128
    n_layer: int = 4
    n_head: int = 3
    n_embd: int = 192
    dropout: float = 0.15
    bias: bool = False
    activation: str = "relu2"
    position: str = "rotary"
    qk_norm: bool = True
    tie_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.activation not in ("gelu", "relu2"):
            raise ValueError(f"activation must be gelu or relu2, not {self.activation}")
        if self.position not in ("learned", "rotary"):
            raise ValueError(f"position must be learned or rotary, not {self.position}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.head_size}")

    @property
    def head_size(self) -> int:
        """Channels per head (D)."""
        return self.n_embd // self.n_head


class GPTModel(nn.Module):
    """Maps token ids to logits over the next token."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.context_length, config.n_embd)
        else:
            cos, sin = rotary_table(config.context_length, config.head_size)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.dropout = FastDropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.head.weight = self.token_embedding.weight
        mask = torch.full((config.context_length, config.context_length), -math.inf).triu(1)
        self.register_buffer("causal_mask", mask, persistent=False)
        for name, parameter in self.named_parameters():  # a tied head is named as the embedding
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("bias", "proj.weight")) or name == "head.weight":
                nn.init.zeros_(parameter)  # each block starts as the identity, the loss at ln V

    def forward(self, ids: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Logits (B, T, V) for the token after each of `ids` (B, T)."""
        return self.head(self.hidden(ids, cache))

    def hidden(self, ids: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Normalised last hidden states (B, T, C) of token ids (B, T).

        With a cache, `ids` are the T tokens that follow those in it.
        """
        start = 0 if cache is None else cache.length
        end = start + ids.shape[1]
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens exceed the context of {self.config.context_length}")
        x, mask, rotary = self._embed(ids, start)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, rotary, cache, layer)
        if cache is not None:
            cache.length = end
        return self.final_norm(x)

    def _embed(
        self, ids: Tensor, start: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Block inputs (B, T, C), causal mask (T, S) and rotary table of tokens from `start` on."""
        end = start + ids.shape[1]
        x = self.token_embedding(ids)
        rotary = None
        if self.config.position == "learned":
            x = x + self.position_embedding(torch.arange(start, end, device=ids.device))
        else:
            rotary = (self.cos[start:end], self.sin[start:end])
        if torch.is_autocast_enabled(x.device.type):  # bfloat16 between the blocks, too
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.dropout(x), self.causal_mask[start:end, :end], rotary

    @torch.no_grad()
    def attention_maps(self, ids: Tensor) -> Tensor:
        """Attention weights (L, B, H, T, T) of every layer and head; each row sums to one."""
        x, mask, rotary = self._embed(ids, 0)
        maps = []
        for block in self.blocks:
            q, k, _ = block.attn.project(block.norm1(x), rotary)
            maps.append(block.attn.weights(q, k, mask))
            x = block(x, mask, rotary)
        return torch.stack(maps)


class GPTClassificationModel(nn.Module):
    """A GPT with a linear head on the hidden state of the last real token.

    The last real token is the only one that has seen the whole text. Padding comes after it and is
    never read, so a prediction does not depend on the rest of the batch. The backbone's own head is
    not read either, and frozen.
    """

    def __init__(self, backbone: GPTModel, n_classes: int):
        super().__init__()
        self.backbone = backbone
        if not backbone.config.tie_weights:
            backbone.head.requires_grad_(False)
        self.classifier_head = nn.Linear(backbone.config.n_embd, n_classes)
        nn.init.zeros_(self.classifier_head.weight)
        nn.init.zeros_(self.classifier_head.bias)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Class logits (B, classes) of right-padded token ids (B, T) and their lengths (B,)."""
        if lengths.min() < 1 or lengths.max() > ids.shape[1]:
            raise ValueError(f"lengths must lie between 1 and {ids.shape[1]}")
        hidden = self.backbone.hidden(ids)
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        return self.classifier_head(last)

    def token_logits(self, ids: Tensor) -> Tensor:
        """Class logits (B, T, classes) after each token of ids (B, T), for training."""
        return self.classifier_head(self.backbone.hidden(ids))


class KVCache:
    """Keys and values of the `length` tokens seen so far: for each layer a buffer
    (B, H, context_length, D), allocated once."""

    def __init__(self, model: GPTModel, batch_size: int = 1):
        config, weight = model.config, model.final_norm.weight
        shape = (batch_size, config.n_head, config.context_length, config.head_size)
        self.keys, self.values = (
            [weight.new_zeros(shape) for _ in range(config.n_layer)] for _ in range(2)
        )
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new keys and values (B, H, T, D) of one layer; returns all S of them."""
        keys, values, T = self.keys[layer], self.values[layer], key.shape[2]
        keys.narrow(2, self.length, T).copy_(key)
        values.narrow(2, self.length, T).copy_(value)
        return keys.narrow(2, 0, self.length + T), values.narrow(2, 0, self.length + T)


def rotary_table(context_length: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (context_length, D) of the angles that `rotate` turns by.

    Pair i at position t turns by t * 10,000^(-2 i / D) (Su et al. 2021,
    https://arxiv.org/abs/2104.09864).
    """
    half = head_size // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.outer(torch.arange(context_length), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x[i], x[i + D/2]) of x (..., T, D) by an angle that grows with position."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class FastDropout(nn.Module):
    """`nn.Dropout`, several times faster on a CPU.

    The plain equivalent is `F.dropout(x, self.p, self.training)`. Here 16 random bits decide about
    an element and one 64-bit random number serves four of them, so `p` is rounded to a multiple of
    2^-16.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x."""
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[: x.numel()] >= round(self.p * 2**16) - 2**15
        return x * keep.view(x.shape).to(x.dtype).mul_(1 / (1 - self.p))
