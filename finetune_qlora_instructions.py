"""Instruction tuning with QLoRA: a 4-bit base, low-rank adapters, loss on responses only.

    python finetune_qlora_instructions.py                   # Dolly, three minutes on one core
    python finetune_qlora_instructions.py --dataset sample  # the small bundled instructions
    python finetune_qlora_instructions.py --data FILE       # your own
    python finetune_qlora_instructions.py --no-quantize     # plain LoRA on the full-precision base
    python finetune_qlora_instructions.py --full            # every weight, for comparison

Needs a base model (`python main.py`; else the one in `models/shipped`). Writes
`models/qlora_instruction_weights.pth` (with `--no-quantize` `lora_...`, with `--full` `full_...`)
and its log. After Ctrl-C, `--resume` continues the run.
"""

import argparse
import math
from dataclasses import asdict, dataclass

import torch

import data_utils
import evaluate
import generation
import lora
import training
from data_loader import CATALOG, find_data_dir, load_instructions, log0
from data_utils import CHAT_TEMPLATE, ExampleBatches, Split, encode_instructions, split_examples
from tokenizer import BPETokenizer

RECIPE = {"steps": 450, "muon_learning_rate": 0.01, "decay_fraction": 0.9, "eval_every": 0}
# The head, too: it has never had to predict <|endoftext|> or modern words.
RECIPE |= {"r": 16, "lora_alpha": 32.0, "target_modules": ("qkv", "fc", "proj", "head")}
# For a public base, which answers already.
PUBLIC_RECIPE = {"steps": 240, "warmup_steps": 10, "decay_fraction": 0.9, "eval_every": 40}
PUBLIC_RECIPE |= {"optimizer": "adamw", "learning_rate": 3e-4, "weight_decay": 0.0, "dropout": 0.0}
PUBLIC_RECIPE |= {"batch_size": 8, "grad_accumulation": 8}
PUBLIC_RECIPE |= {"r": 16, "lora_alpha": 32.0, "target_modules": ("qkv", "fc", "proj")}
MOMENT_EXAMPLES = 64  # whose activations weight the errors of quantisation


@dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """How instructions are read.

    Attributes:
        batch_size: Examples per step, over all processes.
        context_length: Maximum number of tokens of prompt and response together.
        dropout: Dropout rate of embeddings and block outputs.
        epochs: Maximum number of passes over the examples; `steps` may end the training sooner."""

    batch_size: int = 16
    context_length: int = evaluate.INSTRUCTION_CONTEXT
    dropout: float = 0.05
    epochs: int = 5

    def __post_init__(self) -> None:
        training.check_range(self, 1, math.inf, "batch_size", "epochs")  # GPTConfig has the rest


@training.report_errors
def main(argv: list[str] | None = None) -> int:
    """Trains, saves and measures; returns the exit code (130 or 143 when interrupted)."""
    args = _parse(argv)
    with training.start_runtime() as runtime, training.lock_output_dir(args.out_dir, runtime):
        run(args, runtime)
    return 0


def run(args: argparse.Namespace, runtime: training.Runtime) -> None:
    """Fine-tunes by one of three methods: "qlora", "lora" or "full"."""
    config = training.from_options(InstructionConfig, vars(args))
    adapter = None if args.method == "full" else training.from_options(lora.LoRAConfig, vars(args))
    length, kind = config.context_length, f"{args.method}_instruction"
    path = args.out_dir / f"{kind}_weights.pth"
    with training.rank_zero_first(runtime):
        training.check_output(args, path.name)
        dtype = runtime.dtype if adapter and args.public_recipe else torch.float32
        base, tokenizer, origin = generation.open_base(args, length, dtype)
        adapter = adapter and lora.resolve_targets(base, adapter)
        data_dir = find_data_dir(args.data_dir)
        tasks = load_instructions(args.dataset, args.data, data_dir, args.max_examples)
        rows = split_examples(tasks)
        encoded = _encode(rows, tokenizer, length)
        log0(f"instructions: {tasks.name}, {encoded.sizes()}; runtime: {runtime.describe()}")
    model = generation.reconfigure(base, length, config.dropout).to(runtime.device)
    before = evaluate.response_metrics(model, tokenizer, encoded.test, runtime)
    metadata = {"model_config": asdict(model.config), **origin, **tasks.metadata}
    metadata |= {"instruction_config": asdict(config), "lora_config": adapter and asdict(adapter)}
    metadata |= {"chat_template": tokenizer.chat_template or CHAT_TEMPLATE}
    metadata |= {"compute_dtype": str(runtime.dtype), "base_dtype": str(dtype)}
    _prepare_model(model, encoded.train[:MOMENT_EXAMPLES], args, adapter, runtime)
    best, provenance = _train(model, tokenizer, encoded, config, args, runtime, path, metadata)
    if runtime.rank == 0:
        runtime = training.Runtime(runtime.device, runtime.dtype)  # the other processes have left
        weights = lora.lora_state_dict(model) if adapter else model.state_dict()
        model.load_state_dict(training.half_precision(weights), strict=False)  # as saved
        after = evaluate.response_metrics(model, tokenizer, encoded.test, runtime)
        after["stops"] = evaluate.stop_rate(model, tokenizer, rows.test)
        metadata |= {"metrics": {**best, "base": before, "test": after}, "provenance": provenance}
        print(training.save_result(path, kind, weights, **metadata))
        _report(path.name, model, tokenizer, rows, metadata["metrics"])


def _encode(rows: Split, tokenizer: BPETokenizer, length: int) -> Split:
    """Token ids of all splits; truncated responses are not trained on, unless all are truncated."""
    train, *others = (encode_instructions(x, tokenizer, length) for x in vars(rows).values())
    ends = generation.stop_ids(tokenizer)
    complete = [x for x in train if {*x.targets[-2:]} & {*ends}]  # a line break may follow
    if complete and (n_cut := len(train) - len(complete)):
        log0(f"skipped {n_cut:,} training responses: too long for the context")
    return Split(complete or train, *others)


def _prepare_model(model, examples, args, adapter, runtime) -> None:
    """Quantises the base and adds adapters, as the method requires."""
    weights, moments = model.state_dict(), {}
    if args.method == "qlora":
        before = lora.stored_bytes(model)
        with runtime.autocast():
            ids = (torch.tensor([x.ids[:-1]], device=runtime.device) for x in examples)
            moments = lora.input_moments(model.eval(), ids)
        lora.quantize_4bit(model, runtime.dtype)
        log0(f"base in 4 bits: {lora.stored_bytes(model):,} bytes instead of {before:,}")
    if adapter:
        torch.manual_seed(args.seed)
        lora.apply_lora(model, adapter)
        lora.absorb_quantization_error(model, weights, moments)
        del weights, moments
        lora.return_freed_memory()
    log0(f"{args.method}: {lora.describe_training(model)}")


def _train(model, tokenizer, encoded, config, args, runtime, path, metadata):
    T, loss_fn = config.context_length, training.next_token_loss

    def collate(indices):
        return data_utils.collate_instructions([encoded.train[i] for i in indices], tokenizer, T)

    batches = ExampleBatches(map(len, encoded.train), collate, config.batch_size, args.seed)
    validation = data_utils.instruction_batches(encoded.validation, tokenizer, T)
    recipe = training.fine_tuning_config(vars(args), batches.steps_per_epoch)

    def validate():
        return {"val_loss": training.mean_loss(model, validation, loss_fn, runtime)}

    rest = runtime, validate, path, metadata, args.resume
    return training.train(model, batches, loss_fn, recipe, *rest)


def _report(name, model, tokenizer, rows, metrics) -> None:
    """Prints metrics before and after, and a few responses."""
    table = [{"model": "base", **metrics["base"]}, {"model": name, **metrics["test"]}]
    columns = {"responses": "{n:,}"} | evaluate.RESPONSE_COLUMNS
    del columns["right answers"]  # which takes minutes: `evaluate.py`
    print(evaluate.markdown_table(evaluate.table_cells(columns, table)))
    generation.prepare_for_inference(model)  # answers several times faster than 4 bits
    for row in rows.test[:3]:
        ids = generation.generate_response(model, tokenizer, row)
        print(f"\n> {row.instruction}\n" + "".join(tokenizer.decode_stream(ids)))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = training.new_parser("Fine-tune the base to follow instructions, with QLoRA.")
    training.add_run_flags(parser, CATALOG["instructions"], "instructions or conversations", 4_000)
    method = {"dest": "method", "action": "store_const"}
    add = parser.add_mutually_exclusive_group().add_argument
    add("--no-quantize", const="lora", help="plain LoRA on the base in full precision", **method)
    add("--full", const="full", help="train every weight, without adapters", **method)
    for config_class in (InstructionConfig, lora.LoRAConfig, training.TrainConfig):
        training.add_config_flags(parser, config_class)
    parser.set_defaults(method="qlora")
    return generation.parse_for_base(parser, argv, RECIPE, PUBLIC_RECIPE)


if __name__ == "__main__":
    training.exit_process(main())
