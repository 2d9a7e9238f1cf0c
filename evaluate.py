"""How good the models are, measured on text they were not trained on.

    python evaluate.py                                          # table of everything in models/
    python evaluate.py perplexity --data FILE [--checkpoint FILE] [--json]

Bits per byte compares models with different vocabularies: the loss of a whole text in bits, divided
by its bytes in UTF-8. Perplexity, e to the loss per token, does not: longer tokens are harder to
guess.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np

from data_loader import (
    WIZARD_OF_OZ,
    ByteRange,
    SourceError,
    fetch,
    find_data_dir,
    load_corpus,
    read_text,
)
from data_utils import count_bytes, scoring_windows
from generation import load_language_model
from model import GPTModel
from tokenizer import END_OF_TEXT, BPETokenizer
from training import (
    HelpFormatter,
    Runtime,
    mean_loss,
    next_token_loss,
    one_line_errors,
    start_runtime,
)


def perplexity(
    model: GPTModel, tokenizer: BPETokenizer, ids: np.ndarray, runtime: Runtime
) -> dict[str, float]:
    """Scores every token of a text once, in windows that advance by half a context.

    Args:
        model: In evaluation mode.
        tokenizer: The model's own.
        ids: Token ids of the text.
        runtime: Where to compute.

    Returns:
        "bits_per_byte", "nats_per_byte", "perplexity" (e to the nats per token), "tokens", "bytes".

    Raises:
        ValueError: The text is empty.
    """
    if not len(ids):
        raise ValueError("there is no text to measure")
    start = tokenizer.special_tokens[END_OF_TEXT]
    windows = scoring_windows(ids, model.config.context_length, start)
    nats_per_token = mean_loss(model, windows, next_token_loss, runtime)
    n_bytes = count_bytes(ids, tokenizer)
    nats_per_byte = nats_per_token * len(ids) / n_bytes
    return {
        "bits_per_byte": nats_per_byte / math.log(2),
        "nats_per_byte": nats_per_byte,
        "perplexity": math.exp(nats_per_token) if nats_per_token < 700 else math.inf,
        "tokens": len(ids),
        "bytes": n_bytes,
    }


def measure_file(checkpoint: Path, parts: list[ByteRange], runtime: Runtime) -> dict[str, float]:
    """Perplexity of a base checkpoint on text files; see `perplexity`."""
    model, tokenizer, _ = load_language_model(checkpoint)
    pieces = itertools.chain.from_iterable(map(read_text, parts))
    ids = np.concatenate([np.array(piece) for piece in tokenizer.encode_stream(pieces)])
    return perplexity(model.to(runtime.device), tokenizer, ids, runtime)


def _whole(path: Path) -> list[ByteRange]:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    return [ByteRange(path, 0, path.stat().st_size)]


def comparison_table(models: Path, data_dir: Path, runtime: Runtime) -> str:
    """The table of all checkpoints in a folder, as Markdown; what is missing names its command."""
    rows = [
        "| model | measured on | bits per byte | nats per byte | perplexity |",
        "|" + "---|" * 5,
    ]
    checkpoint = models / "model_weights.pth"
    if not checkpoint.is_file():
        return "\n".join([*rows, f"| base | {checkpoint} missing: run `python main.py` | | | |"])
    for place, parts in _language_texts(data_dir).items():
        if isinstance(parts, str):
            rows.append(f"| base | {place}: {parts} | | | |")
            continue
        m = measure_file(checkpoint, parts, runtime)
        rows.append(
            f"| base | {place} ({m['bytes']:,} bytes) | {m['bits_per_byte']:.4f} | "
            f"{m['nats_per_byte']:.4f} | {m['perplexity']:.2f} |"
        )
    return "\n".join(rows)


def _language_texts(data_dir: Path) -> dict[str, list[ByteRange] | str]:
    """In-domain and out-of-domain text, or why it cannot be had."""
    texts: dict[str, list[ByteRange] | str] = {}
    sources = {
        "TinyShakespeare, validation part": lambda: load_corpus(
            "tinyshakespeare", None, data_dir
        ).split()[1],
        "The Wizard of Oz": lambda: _whole(fetch(WIZARD_OF_OZ, data_dir)),
    }
    for name, find in sources.items():
        try:
            texts[name] = find()
        except SourceError as error:
            texts[name] = str(error)
    return texts


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Command line: the table, or one checkpoint on one file."""
    args = _parse(argv)
    with start_runtime() as runtime:
        if args.task is None:
            print(comparison_table(args.models, find_data_dir(args.data_dir), runtime))
            return 0
        figures = measure_file(args.checkpoint, _whole(args.data), runtime)
    if args.json:
        print(json.dumps(figures))
    else:
        print(
            "\n".join(
                f"{name}: {value:,.4f}".replace(".0000", "") for name, value in figures.items()
            )
        )
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure the checkpoints in models/.", formatter_class=HelpFormatter
    )
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of checkpoints")
    parser.add_argument(
        "--data-dir", type=Path, help="folder of data sets; else $GPT_DATA_DIR, else data"
    )
    tasks = parser.add_subparsers(dest="task", metavar="perplexity")
    task = tasks.add_parser(
        "perplexity", help="one base checkpoint on one text file", formatter_class=HelpFormatter
    )
    task.add_argument(
        "--checkpoint", type=Path, default=Path("models/model_weights.pth"), help="base model"
    )
    task.add_argument("--data", type=Path, required=True, help="UTF-8 text file")
    task.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
