"""What a training step costs in seconds and memory: every weight, LoRA, QLoRA, and the peers.

    python tests/benchmarks/steps.py [--repeats 3] [--steps 20]

Sentiment: the default model, 32 texts of 160 tokens; instructions: 16 texts of 256 tokens; random
weights, and the adapters of the fine-tuning scripts.
Every measurement is a process of its own, the methods taking turns; medians over the repeats.
Memory is what the process grows by, at its peak, from the model before the first step on. The
peers, for `run.py`: `peft` on the same modules, and GPT-2 in `transformers`, from the same weights.
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import finetune_lora_classifier  # noqa: E402
import finetune_qlora_instructions  # noqa: E402
from finetune_classifier import prefix_classification_loss  # noqa: E402
from lora import (  # noqa: E402
    LoRAConfig,
    apply_lora,
    lora_state_dict,
    quantize_4bit,
    resolve_targets,
)
from model import GPTClassificationModel, GPTConfig, GPTModel  # noqa: E402
from training import (  # noqa: E402
    LossFn,
    Runtime,
    TrainConfig,
    from_options,
    make_optimizers,
    next_token_loss,
    peak_memory_bytes,
    start_runtime,
)

SCRIPTS = {
    "sentiment": finetune_lora_classifier,
    "instructions": finetune_qlora_instructions,
}
METHODS = {"sentiment": ["full", "lora"], "instructions": ["full", "lora", "qlora"]}
WARM_UP = 3
GPT2 = {"vocab_size": 1024, "context_length": 128, "n_layer": 4, "n_head": 4, "n_embd": 256}
Task = tuple[nn.Module, tuple[Tensor, ...], LossFn]


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def gpt2_task(peer: bool, dropout: float) -> Task:
    """GPT-2's form on 16 windows of 128 tokens, ours or that of `transformers` with its loss."""
    from gpt2_oracle import copy_into_gpt2
    from run import GPT2_FORM

    model = GPTModel(GPTConfig(**GPT2, **{**GPT2_FORM, "dropout": dropout}))
    for block in model.blocks:
        nn.init.normal_(block.mlp.proj.weight, std=0.02)
        nn.init.normal_(block.attn.proj.weight, std=0.02)
    batch = tuple(torch.randint(1024, (2, 16, 128)))
    if not peer:
        return model, batch, next_token_loss

    def summed_loss(twin: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        ids, targets = batch
        out = twin(ids, labels=targets, shift_labels=targets, num_items_in_batch=1)
        return out.loss, torch.tensor(targets.numel())

    return copy_into_gpt2(model), batch, summed_loss


def with_peft(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """The same adapters as `apply_lora` makes, by `peft`."""
    import peft

    ours = copy.deepcopy(model)
    torch.manual_seed(0)
    apply_lora(ours, config)
    head = ["classifier_head"] if isinstance(model, GPTClassificationModel) else None
    twin = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=list(resolve_targets(model, config).target_modules),
            modules_to_save=head,
        ),
    )
    places = dict(twin.named_parameters())
    with torch.no_grad():
        for name, tensor in lora_state_dict(ours).items():
            if "lora_" in name:
                ending = ".default" if "lora_embedding" in name else ".default.weight"
                places[f"base_model.model.{name}{ending}"].copy_(tensor)
    return twin


def adapter_task(task: str, method: str, runtime: Runtime) -> Task:
    """One of our fine-tunings, or the same with adapters by `peft`."""
    model = GPTModel(GPTConfig(vocab_size=2048, context_length=256)).to(runtime.device)
    config, device = from_options(LoRAConfig, SCRIPTS[task].RECIPE), runtime.device
    if task == "instructions":
        batch = tuple(torch.randint(2048, (2, 16, 256), device=device))
        loss_fn = next_token_loss
    else:
        model = GPTClassificationModel(model, 2).to(device)
        ids = torch.randint(2048, (32, 160), device=device)
        batch = (ids, torch.full((32,), 160).to(ids), torch.randint(2, (32,)).to(ids))
        loss_fn = prefix_classification_loss
    if method.startswith("qlora"):
        quantize_4bit(model, runtime.dtype)
    if method.endswith("peft"):
        model = with_peft(model, config)
    elif method != "full":
        torch.manual_seed(0)
        apply_lora(model, config)
    return model, batch, loss_fn


def measure(name: str, steps: int, optimizer: str) -> dict[str, float]:
    """Median seconds of a step, bytes that the steps needed, and the last loss."""
    torch.manual_seed(0)
    task, _, method = name.partition(" ")
    with start_runtime() as runtime:
        if task.startswith("gpt2"):
            dtype = torch.bfloat16 if "bf16" in task else torch.float32
            runtime = Runtime(torch.device("cpu"), dtype)
            model, batch, loss_fn = gpt2_task(bool(method), 0.1 if "dropout" in task else 0.0)
        else:
            model, batch, loss_fn = adapter_task(task, method, runtime)
        config = TrainConfig(steps=1, optimizer=optimizer, learning_rate=1e-3)
        optimizers = make_optimizers(model.train(), config, runtime.dtype)
        before, times = resident_bytes(), []
        for step in range(WARM_UP + steps):
            torch.manual_seed(step)  # of dropout
            started = time.perf_counter()
            with runtime.autocast():
                loss, weight = loss_fn(model, batch)
            (loss / weight).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            times.append(time.perf_counter() - started)
        if runtime.device.type == "cuda":
            before = 0
    return {
        "seconds": statistics.median(times[WARM_UP:]),
        "bytes": peak_memory_bytes(runtime.device) - before,
        "loss": (loss / weight).item(),
        "flop": gpt2_flop(*batch[0].shape),
        "peak_flops": peak_flops(runtime.dtype),
    }


def gpt2_flop(B: int, T: int) -> float:
    """Operations of a training step of the GPT-2 form, three times those of its forward pass."""
    L, C, V = GPT2["n_layer"], GPT2["n_embd"], GPT2["vocab_size"]
    return 3 * 2 * B * T * (12 * L * C * C + V * C + 2 * L * T * C)


def peak_flops(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations a second that a large matrix product reaches."""
    x, times = torch.ones(size, size, dtype=dtype), []
    for _ in range(10):
        started = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)


def main() -> None:
    """Runs each method in processes of its own and prints a table."""
    parser = argparse.ArgumentParser(description="Cost of a step: full, LoRA, QLoRA.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--optimizer", default="muon", help="muon or adamw")
    parser.add_argument("--only", metavar="NAME", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.steps, args.optimizer)))
        return
    print("| task | method | step | of full | memory | of full |\n|---|---|---|---|---|---|")
    for task, methods in METHODS.items():
        found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
        for _ in range(args.repeats):
            for method in methods:
                command = [sys.executable, __file__, "--steps", str(args.steps)]
                command += ["--only", f"{task} {method}"]
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
