"""What a training step costs in seconds and memory: every weight, LoRA, and QLoRA.

    python tests/benchmarks/steps.py [--repeats 3] [--steps 20]

The default model with random weights; sentiment: 32 texts of 160 tokens, adapters on the query-key-
value products; instructions: 16 texts of 256 tokens, adapters of rank 16 on all linear layers.
Every measurement is a process of its own, the methods taking turns; medians over the
repeats. Memory is what the process grows by, at its peak, from the model before the first step on.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lora import LoRAConfig, apply_lora, quantize_4bit  # noqa: E402
from model import GPTClassificationModel, GPTConfig, GPTModel  # noqa: E402
from training import (  # noqa: E402
    TrainConfig,
    make_optimizers,
    next_token_loss,
    prefix_classification_loss,
    start_runtime,
)

METHODS = {"sentiment": ["full", "lora"], "instructions": ["full", "lora", "qlora"]}
WARM_UP = 3


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(task: str, method: str, steps: int) -> dict[str, float]:
    """Median seconds of a step and bytes that the steps needed."""
    torch.manual_seed(0)
    with start_runtime() as runtime:
        model = GPTModel(GPTConfig(vocab_size=2048, context_length=256)).to(runtime.device)
        config = LoRAConfig()
        if task == "instructions":
            config = LoRAConfig(r=16, lora_alpha=32, target_modules=("qkv", "fc", "proj", "head"))
            batch = tuple(torch.randint(2048, (2, 16, 256), device=runtime.device))
            loss_fn = next_token_loss
        else:
            model = GPTClassificationModel(model, 2).to(runtime.device)
            ids = torch.randint(2048, (32, 160), device=runtime.device)
            batch = (ids, torch.full((32,), 160).to(ids), torch.randint(2, (32,)).to(ids))
            loss_fn = prefix_classification_loss
        if method == "qlora":
            quantize_4bit(model, runtime.dtype)
        if method != "full":
            apply_lora(model, config)
        optimizers = make_optimizers(model.train(), TrainConfig(steps=1))
        before, times = resident_bytes(), []
        for _ in range(WARM_UP + steps):
            started = time.perf_counter()
            with runtime.autocast():
                loss, weight = loss_fn(model, batch)
            (loss / weight).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            times.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if runtime.device.type == "cuda":
            before, peak = 0, torch.cuda.max_memory_allocated()
    return {"seconds": statistics.median(times[WARM_UP:]), "bytes": peak - before}


def main() -> None:
    """Runs each method in processes of its own and prints a table."""
    parser = argparse.ArgumentParser(description="Cost of a step: full, LoRA, QLoRA.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs=2, metavar=("TASK", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(*args.only, args.steps)))
        return
    print("| task | method | step | of full | memory | of full |\n|---|---|---|---|---|---|")
    for task, methods in METHODS.items():
        found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
        for _ in range(args.repeats):
            for method in methods:
                command = [sys.executable, __file__, "--steps", str(args.steps)]
                command += ["--only", task, method]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[method].append(json.loads(done.stdout.splitlines()[-1]))
        middle = {
            m: {k: statistics.median(row[k] for row in rows) for k in ("seconds", "bytes")}
            for m, rows in found.items()
        }
        full = middle["full"]
        for method, row in middle.items():
            print(
                f"| {task} | {method} | {row['seconds'] * 1e3:.0f} ms "
                f"| {row['seconds'] / full['seconds']:.2f} | {row['bytes'] / 2**20:,.0f} MiB "
                f"| {row['bytes'] / full['bytes']:.2f} |"
            )


if __name__ == "__main__":
    main()
