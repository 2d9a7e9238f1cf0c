"""Sentiment of Amazon reviews with LoRA: under one percent of the parameters are trained.

    python finetune_lora_classifier.py                     # after python main.py
    python finetune_lora_classifier.py --r 4 --target-modules qkv attn.proj
    python finetune_lora_classifier.py --export-peft DIR   # for the library peft, too

As `finetune_classifier.py`, with the same options, data and start, `review_model_weights.pth`; that
model stays as it is, and `models/lora_classifier_weights.pth` holds low-rank changes to it and the
classification head. The defaults are for the default base; for one of fewer than three blocks give
`--target-modules qkv`.
"""

import argparse
import os
from pathlib import Path

from evaluate import load_classifier
from finetune_classifier import make_parser, run
from lora import LoRAConfig, export_peft
from training import add_config_flags, from_options, leave, one_line_errors

DEFAULTS = {
    "steps": 600,
    "epochs": 5,
    "learning_rate": 0.002,
    "muon_learning_rate": 0.017,
    "warmup_steps": 30,
    "decay_share": 0.9,
    "dropout": 0.1,
    "hide_probability": 0.0,
    "lora_alpha": 8.0,
    # Where the new words are, and one place to put them together: as much as one percent allows.
    "target_modules": ("token_embedding", "blocks.2.attn.qkv"),
}


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Trains an adapter; returns the exit code (130 or 143 when interrupted)."""
    parser = make_parser("Fine-tune low-rank adapters (LoRA) for sentiment.", DEFAULTS)
    parser.add_argument("--export-peft", type=Path, help="folder for a copy that peft can load")
    add_config_flags(parser, LoRAConfig, DEFAULTS)
    args = parser.parse_args(argv, argparse.Namespace(**DEFAULTS))
    config = from_options(LoRAConfig, vars(args))
    if args.export_peft:
        args.export_peft.mkdir(parents=True, exist_ok=True)  # refused before the training
    run(args, config)
    if args.export_peft and os.environ.get("RANK", "0") == "0":
        model, _, _ = load_classifier(args.out_dir / "lora_classifier_weights.pth")
        export_peft(model, config, args.export_peft)
    return 0


if __name__ == "__main__":
    leave(main())
