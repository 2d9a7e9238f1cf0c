"""Text from a trained model, a token at a time.

    python generation.py --prompt "ROMEO:" --temperature 0.8 --top-p 0.95

Shapes: B batch, T time (tokens), V vocabulary.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model import GPTConfig, GPTModel, KVCache
from tokenizer import END_OF_TEXT, BPETokenizer
from training import load_checkpoint, new_parser, one_line_errors

TEMPERATURE, TOP_P = 0.8, 0.95  # of a sample, unless asked for others


def sample_next_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws a token from each row of logits.

    Args:
        logits: (B, V).
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Draw only from the k likeliest tokens (all, where V is smaller).
        top_p: Draw only from the fewest tokens whose probabilities add up to this (nucleus
            sampling, Holtzman et al. 2020, https://arxiv.org/abs/1904.09751).
        generator: Source of randomness, on the logits' device.

    Returns:
        Token ids (B,).

    Raises:
        ValueError: An argument is out of range.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top-k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top-p must lie in (0, 1], not {top_p}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = token_probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Probabilities (B, V) that `sample_next_token` draws from; temperature above 0."""
    logits = (logits - logits.max(dim=-1, keepdim=True).values).float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the likeliest token always stays
        probabilities = torch.zeros_like(probabilities).scatter(
            -1, order, ordered.masked_fill(before >= top_p, 0.0)
        )
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    return probabilities


def window_start(n_tokens: int, context_length: int) -> int:
    """First token the model sees of a text of n tokens.

    A text that outgrows the context goes on from its last half context or more, so that the window
    moves once in half a context and the keys and values in between can be kept.
    """
    over = max(0, n_tokens - context_length)
    step = max(1, context_length // 2)
    return -(-over // step) * step


def generate(
    model: GPTModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the next token of each row, one step after the other.

    Args:
        model: In evaluation mode.
        prompt: Token ids (B, T) of at least one token; may be longer than the context.
        max_new_tokens: Most steps.
        temperature, top_k, top_p, generator: See `sample_next_token`.
        stop_token: Ends the text, without being yielded, when all rows draw it in the same step.

    Raises:
        ValueError: With the first token: the prompt is empty or an argument is out of range.
    """
    if prompt.shape[1] == 0 or max_new_tokens < 0:
        raise ValueError("the prompt needs at least one token, and max-new-tokens 0 or more")
    cache = KVCache(model, prompt.shape[0])
    tokens, start, seen = prompt, 0, 0
    for _ in range(max_new_tokens):
        moved = window_start(tokens.shape[1], model.config.context_length)
        if moved != start:
            start = seen = moved
            cache.length = 0
        with torch.inference_mode():
            logits = model.head(model.hidden(tokens[:, seen:], cache)[:, -1])
            next_token = sample_next_token(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
        seen = tokens.shape[1]
        if stop_token is not None and (next_token == stop_token).all():
            return
        yield next_token
        tokens = torch.cat([tokens, next_token[:, None]], dim=1)


def continue_prompt(
    model: GPTModel,
    tokenizer: BPETokenizer,
    prompt: str | list[int],
    max_new_tokens: int,
    *,
    temperature: float = TEMPERATURE,
    top_k: int | None = None,
    top_p: float | None = TOP_P,
    seed: int = 0,
) -> Iterator[int]:
    """Yields the token ids that follow a prompt, up to `<|endoftext|>`.

    Turn the ids into text as they come with `tokenizer.decode_stream`.

    Args:
        model: In evaluation mode.
        tokenizer: The model's own.
        prompt: Text or token ids; an empty one starts a text of the model's own.
        max_new_tokens: Most tokens.
        temperature, top_k, top_p: See `sample_next_token`.
        seed: The same seed gives the same tokens.
    """
    device = model.final_norm.weight.device
    stop_token = tokenizer.special_tokens[END_OF_TEXT]
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    ids = ids or [stop_token]
    tokens = generate(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token=stop_token,
        generator=torch.Generator(device).manual_seed(seed),
    )
    return (token.item() for token in tokens)


def load_language_model(
    path: Path, hint: str = "python main.py"
) -> tuple[GPTModel, BPETokenizer, dict]:
    """Base model, the tokenizer beside it, and the checkpoint's other facts.

    Args:
        path: The checkpoint.
        hint: Command that makes it, for the error messages.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the model was trained with another tokenizer.
    """
    checkpoint = load_checkpoint(path, "base", hint)
    with misfits_named(path, hint):
        model = GPTModel(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["weights"])
        tokenizer = load_tokenizer(path, checkpoint)
    return model.eval(), tokenizer, checkpoint


def load_tokenizer(path: Path, checkpoint: dict) -> BPETokenizer:
    """The tokenizer beside a checkpoint.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or the checkpoint was made with another one.
    """
    tokenizer_path = path.with_name("tokenizer.json")
    tokenizer = BPETokenizer.load(tokenizer_path)
    if tokenizer.sha256 != checkpoint.get("tokenizer_sha256"):
        raise ValueError(
            f"{path} was trained with another tokenizer than {tokenizer_path}: put the "
            "right one back, or train again with `python main.py`"
        )
    return tokenizer


def with_context(model: GPTModel, context_length: int, dropout: float) -> GPTModel:
    """The same weights for texts of another length, in training with another dropout.

    Raises:
        ValueError: The model has learned positions, whose number is fixed.
    """
    if model.config.position == "learned" and context_length != model.config.context_length:
        raise ValueError(
            "the base has learned positions: --context-length must be "
            f"{model.config.context_length}"
        )
    config = dataclasses.replace(model.config, context_length=context_length, dropout=dropout)
    copy = GPTModel(config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def copy_tokenizer(tokenizer: BPETokenizer, folder: Path) -> None:
    """Puts the tokenizer beside the models that a training is about to write.

    Raises:
        ValueError: There is another one, which other models there need.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        tokenizer.save(path)
    elif BPETokenizer.load(path).sha256 != tokenizer.sha256:
        raise ValueError(f"{path} is another tokenizer than the base's: choose another --out-dir")


@contextlib.contextmanager
def misfits_named(path: Path, hint: str) -> Iterator[None]:
    """Turns the errors of building a model from a checkpoint into a ValueError that names both."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError) as error:
        first_line = str(error).replace(":\n\t", ": ").split("\n")[0]
        raise ValueError(
            f"{path} does not fit this program's model ({first_line}): make it again with `{hint}`"
        ) from None


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Command line: streams text, or prints one JSON object."""
    args = _parse(argv)
    model, tokenizer, _ = load_language_model(args.checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    stream = continue_prompt(
        model.to(device),
        tokenizer,
        args.prompt,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )
    if args.json:
        ids = list(stream)
        seconds = time.perf_counter() - started
        speed = {"seconds": seconds, "tokens_per_second": len(ids) / seconds}
        print(json.dumps({"text": tokenizer.decode(ids), "tokens": len(ids), **speed}))
    else:
        print(args.prompt, end="")
        for piece in tokenizer.decode_stream(stream):
            print(piece, end="", flush=True)
        print()
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser("Continue a prompt with the trained language model.")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts a new text")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("models/model_weights.pth"), help="base model"
    )
    parser.add_argument("--max-new-tokens", type=int, default=300, help="most tokens to generate")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="0 is greedy")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, default=TOP_P, help="draw from this share only")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
