"""Following instructions with QLoRA: a 4-bit base, low-rank adapters, loss on responses only.

    python finetune_qlora_instructions.py                   # Dolly-15k, four minutes on two cores
    python finetune_qlora_instructions.py --dataset sample  # the small bundled instructions
    python finetune_qlora_instructions.py --data FILE       # your own: JSONL
    python finetune_qlora_instructions.py --no-quantize     # plain LoRA on the full-precision base
    python finetune_qlora_instructions.py --full            # every weight, to compare

Needs `models/model_weights.pth` and `models/tokenizer.json` (`python main.py`). Writes
`models/qlora_instruction_weights.pth` (with `--no-quantize` `lora_...`, with `--full` `full_...`)
and its log. Ctrl-C keeps a state that `--resume` goes on from.
"""

import argparse
import copy
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import training
from data_loader import INSTRUCTION_SOURCES, Instruction, find_data_dir, load_instructions, say
from data_utils import (
    EncodedInstruction,
    Split,
    encode_instructions,
    instruction_batches,
    instruction_training_batches,
    split_examples,
)
from evaluate import (
    INSTRUCTION_CONTEXT,
    answer,
    load_instruction_model,
    response_figures,
    share_that_stops,
)
from generation import copy_tokenizer, load_language_model, with_context
from lora import (
    LoRAConfig,
    apply_lora,
    count_parameters,
    lora_state_dict,
    merge_lora,
    quantize_4bit,
)
from model import GPTModel
from tokenizer import END_OF_TEXT, BPETokenizer

DEFAULTS = {
    "steps": 450,
    "learning_rate": 0.004,
    "muon_learning_rate": 0.01,
    "decay_share": 0.9,
    "r": 16,
    "lora_alpha": 32.0,
    # The head, too: it has never had to predict <|endoftext|> or the words of today.
    "target_modules": ("qkv", "fc", "proj", "head"),
}
SHOWN_ANSWERS = 3


@dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """How instructions are read.

    Attributes:
        batch_size: Examples a step, over all processes.
        context_length: Most tokens of prompt and response together.
        dropout: Share of embeddings and block outputs zeroed in training.
        epochs: Most passes over the examples; `steps` may end the training sooner.

    Raises:
        ValueError: A value is out of range.
    """

    batch_size: int = 16
    context_length: int = INSTRUCTION_CONTEXT
    dropout: float = 0.05
    epochs: int = 5

    def __post_init__(self) -> None:
        training.check_range(self, 1, math.inf, "batch_size", "epochs")  # `GPTConfig`: the rest


@dataclass(frozen=True)
class _Job:
    """A run's data, and where it starts from."""

    method: str
    config: InstructionConfig
    train_config: training.TrainConfig
    lora_config: LoRAConfig
    rows: Split[Instruction]
    encoded: Split[EncodedInstruction]
    tokenizer: BPETokenizer
    base: GPTModel
    facts: dict[str, Any]
    path: Path
    resume: bool
    runtime: training.Runtime


@training.one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Trains, saves, reloads and measures; returns the exit code (130 or 143 when interrupted)."""
    args = _parse(argv)
    with training.start_runtime() as runtime, training.training_in(args.out_dir, runtime):
        with training.first_process_first(runtime):
            job = _prepare(args, runtime)
        before = response_figures(job.base, job.tokenizer, job.encoded.test, runtime)
        model = _prepare_model(job)
        best, made = _train(model, job)
        if runtime.rank == 0:
            _finish(model, best, before, made, job)
    return 0


def _prepare(args: argparse.Namespace, runtime: training.Runtime) -> _Job:
    """Reads everything, so that what is wrong with it is found before the training."""
    options = vars(args)
    config = training.from_options(InstructionConfig, options)
    lora_config = training.from_options(LoRAConfig, options)
    language_model, tokenizer, checkpoint = load_language_model(args.base)
    base = with_context(language_model, config.context_length, config.dropout)
    found = load_instructions(
        args.dataset, args.data, find_data_dir(args.data_dir), args.max_examples
    )
    rows = split_examples(found)
    encoded = _encode(rows, tokenizer, config.context_length)
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in vars(encoded).items())
    say(f"instructions: {found.name}, {sizes}; runtime: {runtime.describe()}")
    copy_tokenizer(tokenizer, args.out_dir)
    facts = {
        "base": training.relative_path(args.base, args.out_dir),
        "base_sha256": checkpoint["weights_sha256"],
        "tokenizer_sha256": tokenizer.sha256,
        **found.facts,
        "model_config": asdict(base.config),
        "instruction_config": asdict(config),
        "lora_config": None if args.method == "full" else asdict(lora_config),
        "compute_dtype": str(runtime.dtype),
    }
    return _Job(
        method=args.method,
        config=config,
        train_config=training.fine_tuning_config(options, config, len(encoded.train)),
        lora_config=lora_config,
        rows=rows,
        encoded=encoded,
        tokenizer=tokenizer,
        base=base.to(runtime.device).eval(),
        facts=facts,
        path=args.out_dir / f"{args.method}_instruction_weights.pth",
        resume=args.resume,
        runtime=runtime,
    )


def _encode(
    rows: Split[Instruction], tokenizer: BPETokenizer, context_length: int
) -> Split[EncodedInstruction]:
    """Token ids of all parts; what is trained on ends with `<|endoftext|>`, if anything does."""
    train, *others = (
        encode_instructions(part, tokenizer, context_length) for part in vars(rows).values()
    )
    whole = [e for e in train if e.response[-1] == tokenizer.special_tokens[END_OF_TEXT]]
    if cut := len(train) - len(whole):
        say(f"{cut:,} training responses left out: too long to be whole")
    return Split(whole or train, *others)


def _prepare_model(job: _Job) -> GPTModel:
    """The base as it is to be trained: quantised, with adapters, or all of it."""
    model = job.base
    if job.method == "qlora":
        size = quantize_4bit(model, job.runtime.dtype)
        say(
            f"base in 4 bits: {size.bits_per_parameter:.3f} bits for each of {size.parameters:,} "
            f"parameters; the model has {size.bytes_after:,} bytes instead of {size.bytes_before:,}"
        )
    if job.method != "full":
        torch.manual_seed(job.train_config.seed)
        apply_lora(model, job.lora_config)
    trained, total = count_parameters(model)
    say(f"{job.method}: trains {trained:,} of {total:,} parameters ({trained / total:.2%})")
    return model


def _train(model: GPTModel, job: _Job) -> tuple[dict[str, float], dict[str, Any]]:
    T = job.config.context_length
    validation = instruction_batches(job.encoded.validation, job.tokenizer, T)

    def validate() -> dict[str, float]:
        """Figures of the model as it is."""
        return {
            "val_loss": training.mean_loss(model, validation, training.next_token_loss, job.runtime)
        }

    return training.train(
        model,
        instruction_training_batches(
            job.encoded.train, job.tokenizer, T, job.config.batch_size, job.train_config.seed
        ),
        training.next_token_loss,
        job.train_config,
        runtime=job.runtime,
        validate=validate,
        path=job.path,
        facts=job.facts,
        resume=job.resume,
    )


def _finish(
    model: GPTModel, best: dict[str, float], before: dict, made: dict[str, Any], job: _Job
) -> None:
    """Saves the best weights, checks the file, and measures it on the test part.

    Raises:
        OSError: What was saved does not give the same logits.
    """
    job = replace(job, runtime=replace(job.runtime, rank=0, world_size=1))  # the others have left
    full = job.method == "full"
    weights = training.half_precision(model.state_dict() if full else lora_state_dict(model))
    model.load_state_dict(weights, strict=full)
    figures = response_figures(model, job.tokenizer, job.encoded.test, job.runtime)
    stops = share_that_stops(model, job.tokenizer, job.rows.test)
    metrics = {**best, "base": before, "test": {**figures, "stops": stops}}
    header = {"kind": f"{job.method}_instruction", "made": made}
    training.save_checkpoint(
        job.path, {**header, **job.facts, "weights": weights, "metrics": metrics}
    )
    again = load_instruction_model(job.path, job.runtime)[0]
    T, device = job.config.context_length, job.runtime.device
    inputs = instruction_batches(job.encoded.test[:16], job.tokenizer, T)[0][0].to(device)
    with torch.inference_mode(), job.runtime.autocast():
        if not torch.equal(model(inputs), again(inputs)):
            raise OSError(f"{job.path} does not give the logits that were saved: try again")
    training.state_path(job.path).unlink(missing_ok=True)
    _report(model, metrics, made, job)


def _report(model: GPTModel, metrics: dict[str, Any], made: dict[str, Any], job: _Job) -> None:
    figures, before = metrics["test"], metrics["base"]
    change = figures["response_bits_per_byte"] / before["response_bits_per_byte"] - 1
    print(
        f"| on {figures['n']:,} test responses | bits per byte | perplexity |\n|---|---|---|\n"
        f"| base | {before['response_bits_per_byte']:.4f} | {before['response_perplexity']:.2f} |\n"
        f"| {job.method} | {figures['response_bits_per_byte']:.4f} ({change:+.1%}) | "
        f"{figures['response_perplexity']:.2f} |\n"
        f"{figures['stops']:.0%} of answers stop by themselves\n"
        f"best at step {metrics['step']} of {job.train_config.steps}; wrote {job.path}: "
        f"{job.path.stat().st_size:,} bytes, {math.ceil(made['seconds'])} s of training, "
        f"{made['peak_memory_bytes'] / 2**30:.2f} GiB at most"
    )
    if job.method != "full":
        merged = copy.deepcopy(model)
        merge_lora(merged)
        after = response_figures(merged, job.tokenizer, job.encoded.test, job.runtime)
        change = after["response_bits_per_byte"] - figures["response_bits_per_byte"]
        print(f"merged into full-precision weights: {change:+.6f} bits per byte")
    for row in job.rows.test[:SHOWN_ANSWERS]:
        ids = answer(model, job.tokenizer, row.instruction, row.context)
        print(f"\n> {row.instruction}\n" + "".join(job.tokenizer.decode_stream(ids)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = training.new_parser("Fine-tune the base to follow instructions, with QLoRA.")
    training.add_run_flags(
        parser, INSTRUCTION_SOURCES, "JSONL file of instructions", max_examples=4_000
    )
    methods = parser.add_mutually_exclusive_group()
    for flag, method, text in (
        ("--no-quantize", "lora", "plain LoRA on the base in full precision"),
        ("--full", "full", "train every weight, without adapters"),
    ):
        methods.add_argument(flag, dest="method", action="store_const", const=method, help=text)
    for config_class in (InstructionConfig, LoRAConfig, training.TrainConfig):
        defaults = {"eval_every": "a pass over the examples", **DEFAULTS}
        training.add_config_flags(parser, config_class, defaults)
    return parser.parse_args(argv, argparse.Namespace(method="qlora", **DEFAULTS))


if __name__ == "__main__":
    training.leave(main())
