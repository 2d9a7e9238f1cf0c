"""Following instructions with QLoRA: a 4-bit base, low-rank adapters, loss on responses only.

    python finetune_qlora_instructions.py                   # Dolly-15k, three minutes on two cores
    python finetune_qlora_instructions.py --dataset sample  # the small bundled instructions
    python finetune_qlora_instructions.py --data FILE       # your own
    python finetune_qlora_instructions.py --no-quantize     # plain LoRA on the full-precision base
    python finetune_qlora_instructions.py --full            # every weight, for comparison

Needs a base model (`python main.py`; else the one in `models/shipped`). Writes
`models/qlora_instruction_weights.pth` (with `--no-quantize` `lora_...`, with `--full` `full_...`)
and its log. After Ctrl-C, `--resume` continues the run.
"""

import argparse
import copy
import math
from dataclasses import asdict, dataclass

import torch

import training
from data_loader import INSTRUCTION_SOURCES, find_data_dir, load_instructions, log0
from data_utils import (
    CHAT_TEMPLATE,
    ExampleBatches,
    Split,
    collate_instructions,
    encode_instructions,
    instruction_batches,
    split_examples,
)
from evaluate import (
    INSTRUCTION_CONTEXT,
    RESPONSE_COLUMNS,
    markdown_table,
    response_metrics,
    stop_rate,
)
from generation import generate_response, open_base, reconfigure
from lora import (
    LoRAConfig,
    apply_lora,
    count_parameters,
    lora_state_dict,
    merge_lora,
    quantize_4bit,
    resolve_targets,
    stored_bytes,
)
from tokenizer import BPETokenizer
from training import Runtime, TrainConfig

RECIPE = {
    "steps": 450,
    "learning_rate": 0.004,
    "muon_learning_rate": 0.01,
    "decay_fraction": 0.9,
    "eval_every": 0,
    "r": 16,
    "lora_alpha": 32.0,
    # The head, too: it has never had to predict <|endoftext|> or modern words.
    "target_modules": ("qkv", "fc", "proj", "head"),
}
SHOWN_RESPONSES = 3


@dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """How instructions are read.

    Attributes:
        batch_size: Examples per step, over all processes.
        context_length: Maximum number of tokens of prompt and response together.
        dropout: Dropout rate of embeddings and block outputs.
        epochs: Maximum number of passes over the examples; `steps` may end the training sooner.
    """

    batch_size: int = 16
    context_length: int = INSTRUCTION_CONTEXT
    dropout: float = 0.05
    epochs: int = 5

    def __post_init__(self) -> None:
        training.check_range(self, 1, math.inf, "batch_size", "epochs")  # `GPTConfig`: the rest


@training.report_errors
def main(argv: list[str] | None = None) -> int:
    """Trains, saves and measures; returns the exit code (130 or 143 when interrupted)."""
    args = _parse(argv)
    with training.start_runtime() as runtime, training.lock_output_dir(args.out_dir, runtime):
        training.check_output(args, runtime, f"{args.method}_instruction_weights.pth")
        run(args, runtime)
    return 0


def run(args: argparse.Namespace, runtime: Runtime) -> None:
    """Fine-tunes by one of three methods: "qlora", "lora" or "full"."""
    config = training.from_options(InstructionConfig, vars(args))
    lora = None if args.method == "full" else training.from_options(LoRAConfig, vars(args))
    with training.rank_zero_first(runtime):
        base, tokenizer, origin = open_base(args.base, args.out_dir, config.context_length)
        lora = lora and resolve_targets(base, lora)
        data_dir = find_data_dir(args.data_dir)
        tasks = load_instructions(args.dataset, args.data, data_dir, args.max_examples)
        rows = split_examples(tasks)
        encoded = _encode(rows, tokenizer, config.context_length)
        log0(f"instructions: {tasks.name}, {encoded.sizes()}; runtime: {runtime.describe()}")
    model = reconfigure(base, config.context_length, config.dropout).to(runtime.device)
    before = response_metrics(model, tokenizer, encoded.test, runtime)
    metadata = {
        "model_config": asdict(model.config),
        **origin,
        **tasks.metadata,
        "chat_template": tokenizer.chat_template or CHAT_TEMPLATE,
        "instruction_config": asdict(config),
        "lora_config": lora and asdict(lora),
        "compute_dtype": str(runtime.dtype),
    }
    _prepare_model(model, args, lora, runtime)
    path = args.out_dir / f"{args.method}_instruction_weights.pth"
    best, provenance = _train(model, tokenizer, encoded, config, args, runtime, path, metadata)
    if runtime.rank == 0:
        runtime = Runtime(runtime.device, runtime.dtype)  # the other processes have left
        weights = lora_state_dict(model) if lora else model.state_dict()
        model.load_state_dict(training.half_precision(weights), strict=False)  # as saved
        after = response_metrics(model, tokenizer, encoded.test, runtime)
        after["stops"] = stop_rate(model, tokenizer, rows.test)
        metrics = {**best, "base": before, "test": after}
        contents = {**metadata, "metrics": metrics, "provenance": provenance}
        print(training.save_result(path, f"{args.method}_instruction", weights, **contents))
        _report(path.name, model, tokenizer, encoded, rows, contents, runtime)


def _encode(rows: Split, tokenizer: BPETokenizer, context_length: int) -> Split:
    """Token ids of all splits; truncated responses are not trained on, unless all are."""
    train, *others = (
        encode_instructions(split, tokenizer, context_length) for split in vars(rows).values()
    )
    end = tokenizer.end_id
    complete = [example for example in train if example.ids[-1] == end]
    if n_cut := len(train) - len(complete):
        log0(f"skipped {n_cut:,} training responses: too long for the context")
    return Split(complete or train, *others)


def _prepare_model(model, args, lora, runtime) -> None:
    """Quantises the base and adds adapters, as the method requires."""
    if args.method == "qlora":
        before = stored_bytes(model)
        quantize_4bit(model, runtime.dtype)
        log0(f"base in 4 bits: {stored_bytes(model):,} bytes instead of {before:,}")
    if lora:
        torch.manual_seed(args.seed)
        apply_lora(model, lora)
    trained, total = count_parameters(model)
    log0(f"{args.method}: training {trained:,} of {total:,} parameters ({trained / total:.2%})")


def _train(model, tokenizer, encoded, config, args, runtime, path, metadata):
    T, loss_fn = config.context_length, training.next_token_loss

    def collate(indices):
        return collate_instructions([encoded.train[i] for i in indices], tokenizer, T)

    batches = ExampleBatches(map(len, encoded.train), collate, config.batch_size, args.seed)
    validation = instruction_batches(encoded.validation, tokenizer, T)
    return training.train(
        model,
        batches,
        loss_fn,
        training.fine_tuning_config(vars(args), batches.steps_per_epoch),
        runtime=runtime,
        validate=lambda: {"val_loss": training.mean_loss(model, validation, loss_fn, runtime)},
        path=path,
        metadata=metadata,
        resume=args.resume,
    )


def _report(name, model, tokenizer, encoded, rows, contents, runtime) -> None:
    """Prints metrics before and after, and a few responses."""
    before, after = contents["metrics"]["base"], contents["metrics"]["test"]
    columns = {"responses": "{n:,}", **RESPONSE_COLUMNS}
    table = [{"model": "base", **before}, {"model": name, **after}]
    if contents["lora_config"]:
        merged = copy.deepcopy(model)
        merge_lora(merged)
        metrics = response_metrics(merged, tokenizer, encoded.test, runtime)
        table.append({"model": "merged into full precision", **metrics})
    print(markdown_table(columns, table))
    for row in rows.test[:SHOWN_RESPONSES]:
        ids = generate_response(model, tokenizer, row)
        print(f"\n> {row.instruction}\n" + "".join(tokenizer.decode_stream(ids)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = training.new_parser("Fine-tune the base to follow instructions, with QLoRA.")
    training.add_run_flags(
        parser, INSTRUCTION_SOURCES, "instructions or conversations", max_examples=4_000
    )
    methods = parser.add_mutually_exclusive_group()
    for flag, method, text in (
        ("--no-quantize", "lora", "plain LoRA on the base in full precision"),
        ("--full", "full", "train every weight, without adapters"),
    ):
        methods.add_argument(flag, dest="method", action="store_const", const=method, help=text)
    for config_class in (InstructionConfig, LoRAConfig, TrainConfig):
        training.add_config_flags(parser, config_class)
    parser.set_defaults(method="qlora", **RECIPE)
    return parser.parse_args(argv)


if __name__ == "__main__":
    training.exit_process(main())
