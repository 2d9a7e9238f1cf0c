"""The model against GPT-2 from `transformers`, PyTorch's own modules, and properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import randomised, tiny_config
from gpt2_oracle import copy_into_gpt2, parameter_pairs
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from generation import KVCache, attention_maps
from model import (
    CausalSelfAttention,
    FastDropout,
    GPTClassificationModel,
    GPTConfig,
    GPTModel,
    rotary_table,
    rotate,
)

GPT2_OPTIONS = {
    "bias": True,
    "activation": "gelu",
    "position": "learned",
    "qk_norm": False,
    "tie_weights": True,
}
RECIPES = {"default": {}, "gpt2": GPT2_OPTIONS}


def build(recipe: str = "default", **changes: object) -> GPTModel:
    return randomised(GPTModel(tiny_config(50, **{**RECIPES[recipe], **changes})))


def some_ids(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_equal_those_of_gpt2():
    model = build("gpt2")
    gpt2 = copy_into_gpt2(model).eval()
    ids = some_ids(3, 12)
    logits, expected = model(ids), gpt2(ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for output in (logits, expected):
        F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for ours, theirs, transposed in parameter_pairs(model, gpt2):
        gradient = theirs.grad.T if transposed else theirs.grad
        torch.testing.assert_close(ours.grad, gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_token_does_not_see_later_ones(recipe: str):
    model, ids = build(recipe), some_ids(2, 12)
    before = model(ids)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    after = model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 7], [11, 1], [3, 1, 1, 7]])
def test_the_cache_changes_nothing(recipe: str, cuts: list[int]):
    model, ids = build(recipe), some_ids(2, 12)
    cache = KVCache(model, batch_size=2)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in ids.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), atol=1e-5, rtol=1e-4)


def test_more_tokens_than_the_context_are_refused():
    model = build()
    with pytest.raises(ValueError, match="17 tokens exceed the context of 16"):
        model(some_ids(1, 17))
    cache = KVCache(model)
    model(some_ids(1, 10), cache)
    with pytest.raises(ValueError, match="17 tokens"):
        model(some_ids(1, 7), cache)


@pytest.mark.parametrize("recipe", RECIPES)
def test_written_out_attention_equals_the_fused_kernel(recipe: str):
    attention, x = build(recipe).blocks[0].attn, torch.randn(3, 12, 16)
    mask = torch.full((12, 12), -math.inf).triu(1)
    q, k, v = attention.project(x, None)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attention.weights(q, k, mask) @ v, fused, atol=1e-5, rtol=1e-4)


def test_attention_equals_pytorchs_module():
    attention = CausalSelfAttention(tiny_config(50, **GPT2_OPTIONS)).eval()
    torch.nn.init.normal_(attention.proj.weight)
    oracle = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(attention.qkv.weight)
        oracle.in_proj_bias.copy_(attention.qkv.bias)
        oracle.out_proj.weight.copy_(attention.proj.weight)
        oracle.out_proj.bias.copy_(attention.proj.bias)
    x, mask = torch.randn(2, 9, 16), torch.full((9, 9), -math.inf).triu(1)
    expected, _ = oracle(x, x, x, attn_mask=mask)
    torch.testing.assert_close(attention(x, mask, None), expected, atol=1e-5, rtol=1e-4)


def test_attention_maps_are_the_weights_the_model_uses():
    model, ids = build(), some_ids(2, 9)
    maps = attention_maps(model, ids)
    assert maps.shape == (2, 2, 2, 9, 9)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 2, 9))
    assert (maps.triu(1) == 0).all()
    for layer, block in enumerate(model.blocks):
        seen = {}
        hook = block.attn.register_forward_hook(
            lambda _, inputs, output, seen=seen: seen.update(x=inputs[0], y=output)
        )
        model(ids)
        hook.remove()
        v = block.attn.project(seen["x"], None)[2]
        expected = block.attn.proj((maps[layer] @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(seen["y"], expected, atol=1e-5, rtol=1e-4)


def test_rotary_scores_depend_on_the_distance_alone():
    cos, sin = rotary_table(GPTConfig(context_length=16, head_size=16))
    q, k = torch.randn(2, 1, 1, 16)
    rotated_q, rotated_k = rotate(q, cos, sin), rotate(k, cos, sin)  # (16, 1, 16), one a position
    scores = rotated_q[:, 0] @ rotated_k[:, 0].T
    for distance in range(16):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)


def test_rotary_angles_are_those_of_transformers():
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=16)
    positions = torch.arange(16)[None]
    expected = LlamaRotaryEmbedding(config)(torch.ones(1, 16, 32), positions)
    x = torch.randn(1, 2, 16, 16)
    theirs, _ = apply_rotary_pos_emb(x, x, *expected)
    ours = rotate(x, *rotary_table(GPTConfig(context_length=16, head_size=16)))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_fresh_model_guesses_evenly():
    for recipe in RECIPES:
        torch.manual_seed(0)
        model = GPTModel(tiny_config(50, **RECIPES[recipe]))
        ids = some_ids(8, 17)
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        assert loss.item() == pytest.approx(math.log(50), abs=0.02)


def test_parameter_count():
    V, T, C, L = 50, 16, 16, 2
    n = sum(p.numel() for p in build("gpt2").parameters())
    block = (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C) + 4 * C
    assert n == V * C + T * C + L * block + 2 * C
    n = sum(p.numel() for p in build().parameters())
    assert n == 2 * V * C + L * (12 * C * C + 2 * C) + C


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1001, 999)
    dropped = FastDropout(0.1)(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.002)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.002)
    assert torch.equal(FastDropout(0.1).eval()(x), x) and torch.equal(FastDropout(0.0)(x), x)


def test_dropout_follows_the_seed_and_its_gradient_the_mask():
    torch.manual_seed(3)
    x = torch.ones(50, 50, requires_grad=True)
    first = FastDropout(0.5)(x)
    first.sum().backward()
    assert torch.equal(x.grad, first.detach())
    torch.manual_seed(3)
    assert torch.equal(FastDropout(0.5)(x), first)


# ---- classification


def test_a_prediction_does_not_depend_on_padding_or_on_the_batch():
    classifier = GPTClassificationModel(build(), n_classes=2).eval()
    torch.nn.init.normal_(classifier.classifier_head.weight)
    rows = [some_ids(n) for n in (3, 9, 1, 16)]
    lengths = torch.tensor([len(row) for row in rows])
    alone = torch.cat([classifier(row[None], torch.tensor([len(row)])) for row in rows])
    for padding in (0, 49):
        padded = torch.full((4, 16), padding)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        together = classifier(padded, lengths)
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(
            classifier(padded[order], lengths[order]), together[order], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("length", [0, 6])
def test_impossible_lengths_are_refused(length: int):
    with pytest.raises(ValueError, match="between 1 and 5"):
        GPTClassificationModel(build(), 2)(some_ids(1, 5), torch.tensor([length]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "not a multiple of n_head 5"),
        ({"n_layer": 0}, r"n_layer must lie in \[1, 1001\)"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"activation": "tanh"}, "gelu or relu2"),
        ({"position": "none"}, "learned or rotary"),
        ({"n_embd": 6, "n_head": 2}, "even head_size"),
        ({"vocab_size": 0}, r"vocab_size must lie in \[1, "),
    ],
)
def test_impossible_configurations_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"vocab_size": 50, **changes})


@pytest.mark.gpu
def test_a_gpu_gives_the_same_logits():
    model, ids = build(), some_ids(2, 12)
    expected = model(ids)
    torch.testing.assert_close(model.cuda()(ids.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)
