"""Sentiment of Amazon reviews with LoRA: under one percent of the parameters are trained.

    python finetune_lora_classifier.py
    python finetune_lora_classifier.py --r 4 --target-modules qkv attn.proj

As `finetune_classifier.py`, with the same options, data and starting point (from scratch:
`review_lm_weights.pth`). That model stays unchanged: `models/lora_classifier_weights.pth` holds
low-rank updates to it and the classification head.
"""

from finetune_classifier import PUBLIC_RECIPE, make_parser, run
from generation import parse_for_base
from lora import LoRAConfig
from training import add_config_flags, exit_process, from_options, report_errors

RECIPE = {"steps": 600, "epochs": 5, "learning_rate": 0.002, "muon_learning_rate": 0.017}
RECIPE |= {"warmup_steps": 30, "decay_fraction": 0.9, "eval_every": 0, "dropout": 0.1}
# The embedding, to learn modern words, and one layer to combine them: all that 1 % allows.
RECIPE |= {"lora_alpha": 8.0, "target_modules": ("token_embedding", "blocks.-1.attn.qkv")}
PUBLIC = {**PUBLIC_RECIPE, "learning_rate": 5e-4, "target_modules": ("qkv", "attn.proj")}


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Trains an adapter; returns the exit code (130 or 143 when interrupted)."""
    parser = make_parser("Fine-tune low-rank adapters (LoRA) for sentiment.")
    add_config_flags(parser, LoRAConfig)
    args = parse_for_base(parser, argv, RECIPE, PUBLIC)
    run(args, from_options(LoRAConfig, vars(args)))
    return 0


if __name__ == "__main__":
    exit_process(main())
