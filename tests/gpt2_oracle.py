"""Our GPT-2 form and GPT-2 of `transformers`, weight by weight."""

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPTModel


def copy_into_gpt2(model: GPTModel) -> GPT2LMHeadModel:
    """The same weights in GPT-2 of `transformers`, whose linear layers are transposed.

    Dropout is where ours is; GPT-2's on attention weights is off.
    """
    config = model.config
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            attn_pdrop=0.0,
            embd_pdrop=config.dropout,
            resid_pdrop=config.dropout,
        )
    )
    with torch.no_grad():
        for ours, theirs, transposed in parameter_pairs(model, gpt2):
            theirs.copy_(ours.T if transposed else ours)
    return gpt2


def parameter_pairs(model: GPTModel, gpt2: GPT2LMHeadModel) -> list[tuple[Tensor, Tensor, bool]]:
    """Parameters of both, and whether the second is the first transposed."""
    top = gpt2.transformer
    pairs = [
        (model.token_embedding.weight, top.wte.weight, False),
        (model.position_embedding.weight, top.wpe.weight, False),
        (model.final_norm.weight, top.ln_f.weight, False),
        (model.final_norm.bias, top.ln_f.bias, False),
    ]
    for ours, theirs in zip(model.blocks, top.h, strict=True):
        for mine, other, transposed in (
            (ours.norm1, theirs.ln_1, False),
            (ours.norm2, theirs.ln_2, False),
            (ours.attn.qkv, theirs.attn.c_attn, True),
            (ours.attn.proj, theirs.attn.c_proj, True),
            (ours.mlp.fc, theirs.mlp.c_fc, True),
            (ours.mlp.proj, theirs.mlp.c_proj, True),
        ):
            pairs += [(mine.weight, other.weight, transposed), (mine.bias, other.bias, False)]
    return pairs
