"""A step of LoRA and of QLoRA on a public base, beside `peft` on the same weights.

    python tests/benchmarks/public_steps.py [--base smollm2-135m-instruct] [--repeats 3] [--steps 8]

LoRA: 16 rows of 128 random tokens, rank 8 on attention, and a classification head. QLoRA: 8 rows of
256, half of them a response, rank 16 on all linear layers of an NF4 base.
Ours are those of the fine-tuning scripts, with their micro-batches; `peft` has one batch, under
bfloat16 autocast where that is faster, as in its documentation. Every measurement is a process of
its own, the contestants taking turns; medians over the repeats. Memory is the peak of the whole
process. Writes `public_steps.json`, one entry per processor.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from run import processor  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import finetune_lora_classifier  # noqa: E402
import finetune_qlora_instructions  # noqa: E402
from data_utils import IGNORE  # noqa: E402
from finetune_classifier import prefix_classification_loss  # noqa: E402
from generation import export_hf, load_model, reconfigure  # noqa: E402
from lora import LoRAConfig, apply_lora, quantize_4bit  # noqa: E402
from model import GPTClassificationModel  # noqa: E402
from training import (  # noqa: E402
    Runtime,
    TrainConfig,
    from_options,
    make_optimizers,
    next_token_loss,
    peak_memory_bytes,
    start_runtime,
)

RESULTS = Path(__file__).with_name("public_steps.json")
CONTESTANTS = ("lora", "lora peft", "qlora", "qlora peft")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]


def make_batch(is_lora: bool, vocab_size: int) -> tuple[Tensor, ...]:
    """Random tokens, with lengths and labels, or with the targets of the second half."""
    torch.manual_seed(0)
    if is_lora:
        ids = torch.randint(vocab_size, (16, 128))
        return ids, torch.full((16,), 128), torch.arange(16) % 2
    ids = torch.randint(vocab_size, (8, 257))
    targets = ids[:, 1:].clone()
    targets[:, :128] = IGNORE
    return ids[:, :-1], targets


def our_model(is_lora: bool, path: Path, runtime: Runtime) -> nn.Module:
    """The model that the fine-tuning script trains."""
    model, _, _ = load_model(path, "base", dtype=runtime.dtype)
    reconfigure(model, 256)
    if is_lora:
        model = GPTClassificationModel(model, 2)
        nn.init.normal_(model.classifier_head.weight, std=0.02)
    else:
        quantize_4bit(model, runtime.dtype)
    script = finetune_lora_classifier if is_lora else finetune_qlora_instructions
    recipe = script.PUBLIC if is_lora else script.PUBLIC_RECIPE
    apply_lora(model, from_options(LoRAConfig, recipe))
    return model


def peft_model(is_lora: bool, folder: Path, runtime: Runtime) -> nn.Module:
    """The same by `transformers` and `peft`."""
    import peft
    import transformers

    config = {"lora_alpha": 16 if is_lora else 32, "r": 8 if is_lora else 16}
    if is_lora:
        auto, quantization = transformers.AutoModelForSequenceClassification, None
        config |= {"task_type": "SEQ_CLS", "target_modules": ATTENTION}
    else:
        auto = transformers.AutoModelForCausalLM
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=runtime.dtype,
        )
        config |= {"task_type": "CAUSAL_LM", "target_modules": ATTENTION + FEED_FORWARD}
    model = auto.from_pretrained(folder, dtype=torch.float32, quantization_config=quantization)
    if is_lora:
        nn.init.normal_(model.score.weight, std=0.02)
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def peft_loss(is_lora: bool, model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What our loss functions return."""
    if is_lora:
        ids, lengths, labels = batch
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = model(input_ids=ids, attention_mask=mask.long()).logits
        return F.cross_entropy(logits.float(), labels, reduction="sum"), torch.tensor(len(ids))
    ids, targets = batch
    logits = model(input_ids=ids).logits.float().flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    return loss, (targets != IGNORE).sum()


def measure(name: str, path: Path, folder: Path, steps: int) -> dict[str, float]:
    """Median seconds of a step, peak bytes, and the first and the last loss in nats."""
    is_lora, is_peft, times, losses = name.startswith("lora"), name.endswith("peft"), [], []
    with start_runtime() as runtime:
        torch.manual_seed(1)
        make, source = (peft_model, folder) if is_peft else (our_model, path)
        model = make(is_lora, source, runtime)
        settings = {"optimizer": "adamw", "learning_rate": 2e-4, "weight_decay": 0.0}
        optimizers = make_optimizers(model.train(), TrainConfig(steps=1, **settings), runtime.dtype)
        script = finetune_lora_classifier if is_lora else finetune_qlora_instructions
        n_micro = (script.PUBLIC if is_lora else script.PUBLIC_RECIPE)["grad_accumulation"]
        parts = [x.tensor_split(1 if is_peft else n_micro) for x in make_batch(is_lora, 49_000)]
        for _ in range(1 + steps):
            started, loss_sum, n_sum = time.perf_counter(), 0.0, 0
            for batch in zip(*parts):
                with runtime.autocast():
                    if is_peft:
                        loss, n = peft_loss(is_lora, model, batch)
                    elif is_lora:
                        loss, n = prefix_classification_loss(model, batch, weight=0.0)
                    else:
                        loss, n = next_token_loss(model, batch)
                loss.backward()
                loss_sum, n_sum = loss_sum + loss.item(), n_sum + n.item()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            torch._foreach_div_(gradients, n_sum)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            times.append(time.perf_counter() - started)
            losses.append(loss_sum / n_sum)
    seconds = statistics.median(times[1:])
    peak = peak_memory_bytes(runtime.device)
    return {"seconds": seconds, "bytes": peak, "first_loss": losses[0], "last_loss": losses[-1]}


def summary(medians: dict[str, dict[str, float]]) -> str:
    """The table in Markdown."""
    head = "| step | seconds | of peft's speed | GiB | of peft's | first, last loss |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, row in medians.items():
        peer = medians[name.split()[0] + " peft"]
        losses = f"{row['first_loss']:.4f}, {row['last_loss']:.4f}"
        lines.append(
            f"| {name} | {row['seconds']:.2f} | {peer['seconds'] / row['seconds']:.2f} "
            f"| {row['bytes'] / 2**30:.2f} | {row['bytes'] / peer['bytes']:.2f} | {losses} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the contestants and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2-135m-instruct", help="folder in models/")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs=2, metavar=("NAME", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = ROOT / "models" / args.base / "model_weights.pth"
    if args.only:
        print(json.dumps(measure(args.only[0], path, Path(args.only[1]), args.steps)))
        return
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder, "model")
        export_hf(path, exported)
        for _ in range(args.repeats):
            for name in CONTESTANTS:
                command = [sys.executable, __file__, "--base", args.base]
                command += ["--steps", str(args.steps), "--only", name, str(exported)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(row[key] for row in found) for key in found[0]}
        for name, found in rows.items()
    }
    print(summary(medians))
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    RESULTS.write_text(json.dumps({**results, processor(): medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
