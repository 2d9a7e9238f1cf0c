"""One training loop for every model of this repository.

    best, provenance = train(model, batches, loss_fn, TrainConfig(steps=1000), ...)

The caller defines batches and loss. The loop adds optimizers, schedule, gradient accumulation and
clipping, mixed precision, validation, logs, checkpoints, resuming, and processes under torchrun.

It carries no RNG state: batches and dropout masks derive from (seed, step). A run that was killed
and resumed therefore ends with exactly the weights of an uninterrupted one.
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import json
import math
import multiprocessing.util
import os
import re
import shlex
import signal
import sys
import time
import timeit
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from data_loader import atomic_write, is_rank_zero, log0

FORMAT_VERSION = 3  # of checkpoints
LOG_EVERY = 10  # steps
CACHED_ROWS = 512  # tokens whose float32 logits fit in the processor's cache

Batch = tuple[Tensor, ...]
# (step, n): the batch of a step in n micro-batches, some perhaps empty; depends on nothing else
Batches = Callable[[int, int], Sequence[Batch]]
LossFn = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]  # summed loss and number of terms


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        optimizer: "muon" (Muon for the matrices inside the network, AdamW for embeddings, head and
            norms) or "adamw" for everything.
        learning_rate: AdamW's peak rate.
        muon_learning_rate: Muon's peak rate.
        weight_decay: Weight decay of matrices; norms and biases have none.
        warmup_steps: Steps over which the rates rise from zero.
        decay_fraction: Final fraction of the steps, over which the rates fall linearly to zero.
        max_grad_norm: Gradients are clipped to this norm.
        grad_accumulation: Micro-batches per step, processed one after the other to save memory.
        eval_every: Steps between validations, each of which also saves a resumable state; 0 means
            once per epoch (fine-tuning only).
        seed: Seed of initial weights, batches and dropout."""

    steps: int
    optimizer: str = "muon"
    learning_rate: float = 0.004
    muon_learning_rate: float = 0.014
    weight_decay: float = 0.1
    warmup_steps: int = 50
    decay_fraction: float = 0.6
    max_grad_norm: float = 1.0
    grad_accumulation: int = 1
    eval_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer must be muon or adamw, not {self.optimizer}")
        check_range(self, 1, math.inf, "steps", "grad_accumulation", "eval_every")
        check_range(self, 0, math.inf, "learning_rate", "muon_learning_rate", "weight_decay")
        check_range(self, 0, 2**32, "warmup_steps", "seed")
        if not 0 <= self.decay_fraction <= 1 or not self.max_grad_norm > 0:
            raise ValueError("decay_fraction must lie in [0, 1] and max_grad_norm above 0")


def train(
    model: nn.Module,
    batches: Batches,
    loss_fn: LossFn,
    config: TrainConfig,
    runtime: "Runtime",
    validate: Callable[[], dict[str, float]],
    path: str | Path,
    metadata: dict[str, Any],
    resume: bool = False,
    maximize: str = "",
) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains the parameters of `model` that require gradients, and leaves it with the best weights.
    Returns the metrics of the best step, and the provenance with the config. Gradients are averaged
    over all terms of the loss. The best step has the lowest "val_loss", or the highest `maximize`,
    of `validate`, which runs on every process. The log and the state to resume from, which must be
    of a run with the same `metadata`, lie beside `path`. Raises FloatingPointError if loss,
    gradient or metric is not finite, Interrupted after SIGINT, SIGTERM."""
    run = _Run(model, config, runtime, path, metadata, maximize)
    with _stop_signals(runtime) as received_signal, run.start(resume) as bar:
        for step in range(run.step, config.steps):
            set_learning_rates(run.optimizers, step, config)
            torch.manual_seed((config.seed * 1_000_003 + step) * 4096 + runtime.rank)  # dropout
            totals = torch.zeros(2, device=runtime.device)
            micro_batches = batches(step, config.grad_accumulation * runtime.world_size)
            for micro_batch in own_batches(micro_batches, runtime):
                with runtime.autocast():
                    loss, n_terms = loss_fn(model, micro_batch)
                loss.backward()
                totals += torch.stack([loss.detach(), n_terms])
            loss_sum, n_terms = all_reduce_(run.parameters, totals, runtime.world_size)
            if n_terms:
                norm = scale_and_clip_(run.parameters, n_terms, config.max_grad_norm)
                _check_finite(step + 1, {"loss": loss_sum / n_terms, "gradient norm": norm})
                for optimizer in run.optimizers:
                    optimizer.step()
            model.zero_grad(set_to_none=True)
            metrics = run.keep_best_if_due(step + 1, validate)
            run.advance(bar, loss_sum, n_terms, metrics, stop := received_signal())
            if stop:
                break  # raises Interrupted on leaving the context
    model.eval().load_state_dict(run.best_weights, strict=False)  # the trained parameters only
    return run.best, {"train_config": asdict(config), **provenance(runtime, run.seconds)}


def set_learning_rates(optimizers: list[Optimizer], step: int, config: TrainConfig) -> None:
    """Linear warm-up to the peak rate (the optimizer's default), constant, linear decay to zero."""
    warmup = (step + 1) / max(1, config.warmup_steps)
    decay = (config.steps - step) / max(1, config.decay_fraction * config.steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * min(1.0, warmup, decay)


def own_batches(batches: Sequence[Batch], runtime: "Runtime") -> Iterator[Batch]:
    """Moves the batches of this process to its device, without the empty ones."""
    for batch in batches[runtime.rank :: runtime.world_size]:
        if len(batch[0]):
            yield tuple(tensor.to(runtime.device, non_blocking=True) for tensor in batch)


def all_reduce_(parameters: list[nn.Parameter], totals: Tensor, world_size: int) -> list[float]:
    """Sums gradients and totals (2,) over all processes, in one message; returns the totals."""
    if world_size > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        tensors = [totals, *(parameter.grad for parameter in parameters)]
        sums = nn.utils.parameters_to_vector(tensors)
        dist.all_reduce(sums)
        nn.utils.vector_to_parameters(sums, tensors)
    return totals.tolist()


def scale_and_clip_(parameters: list[nn.Parameter], n_terms: float, max_norm: float) -> float:
    """Divides gradients by `n_terms`, clips their norm to `max_norm`, returns the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients).item() / n_terms
    torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)) / n_terms)
    return norm


def make_optimizers(model: nn.Module, config: TrainConfig, dtype: torch.dtype) -> list[Optimizer]:
    """AdamW and Muon, which computes in `dtype`, over the parameters that require gradients. AdamW
    (Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101) scales each element of the
    momentum by its own history, Muon the matrix as a whole."""
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "adamw": [], "undecayed": []}
    for name, parameter in model.named_parameters():
        layer = model.get_submodule(name.rpartition(".")[0])
        is_inner = isinstance(layer, nn.Linear) and not name.endswith("head.weight")
        is_adapter = isinstance(getattr(layer, "base_layer", None), nn.Linear)
        by_muon = config.optimizer == "muon" and (is_inner or is_adapter)
        kind = "undecayed" if parameter.ndim < 2 else "muon" if by_muon else "adamw"
        if parameter.requires_grad:
            groups[kind].append(parameter)
    optimizers: list[Optimizer] = []
    decays = {"adamw": config.weight_decay, "undecayed": 0.0}
    if adamw := [{"params": groups[k], "weight_decay": d} for k, d in decays.items() if groups[k]]:
        optimizers.append(AdamW(adamw, config.learning_rate, betas=(0.9, 0.95), fused=True))
    if muon := groups["muon"]:
        optimizers.append(Muon(muon, config.muon_learning_rate, config.weight_decay, dtype))
    return optimizers


class Muon(Optimizer):
    """Moves matrices by their momentum, made nearly orthogonal so that it is equally large in all
    directions (Jordan 2024, https://kellerjordan.github.io/posts/muon). `torch.optim.Muon` does the
    same, but always in bf16, which is very slow on a processor without instructions for it."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, decay: float, dtype: torch.dtype):
        super().__init__(parameters, {"lr": lr, "weight_decay": decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """One update, with Nesterov momentum and decoupled weight decay."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state, gradient = self.state[parameter], parameter.grad
                momentum = state["momentum_buffer"] if state else torch.zeros_like(gradient)
                state["momentum_buffer"] = momentum.lerp_(gradient, 0.05)
                update = orthogonalize(gradient.lerp(momentum, 0.95).to(self.dtype))
                rate = group["lr"] * max(1, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonalize(x: Tensor) -> Tensor:
    """Pushes the singular values of a matrix (m, n) towards one by Newton-Schulz iterations."""
    is_tall = x.shape[0] > x.shape[1]
    x = (x.T if is_tall else x) / x.norm().clamp(min=1e-7)
    for _ in range(5):
        A = x @ x.T
        x = torch.addmm(x, torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if is_tall else x


def mean_loss(
    model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn, runtime: "Runtime"
) -> float:
    """Mean loss over fixed batches, split among the processes; NaN if there are no terms."""
    totals = torch.zeros(2, dtype=torch.float64)
    with torch.inference_mode(), runtime.autocast():
        for batch in own_batches(batches, runtime):
            loss, n_terms = loss_fn(model, batch)
            totals += torch.stack([loss, n_terms]).cpu().double()
    if runtime.world_size > 1:
        totals = totals.to(runtime.device)
        dist.all_reduce(totals)
    return (totals[0] / totals[1]).item()


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed cross entropy in nats of the targets (B, T) other than -100, and their number. The
    plain equivalent is `F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")` with
    the logits (B * T, V). Here logits are computed only where there is a target, in slices that
    stay in the cache: faster, and with a large vocabulary it saves gigabytes. Padding to a multiple
    of 64 rows leaves few tensor sizes, so that their memory is reused."""
    inputs, targets = batch
    has_loss = targets != -100
    hidden, targets = model.hidden(inputs)[has_loss], targets[has_loss]
    n_padding = -len(targets) % 64
    hidden = F.pad(hidden, (0, 0, 0, n_padding)).split(CACHED_ROWS)
    targets = F.pad(targets, (0, n_padding), value=-100).split(CACHED_ROWS)
    loss = functools.partial(F.cross_entropy, reduction="sum")
    losses = [loss(model.head(rows).float(), ids) for rows, ids in zip(hidden, targets)]
    return torch.stack(losses).sum(), has_loss.sum()


class Interrupted(Exception):
    """A signal, whose number is the argument, ended a training; its resumable state is on disk."""


def _check_finite(step: int, metrics: dict[str, float]) -> None:
    if not all(map(math.isfinite, metrics.values())):
        values = ", ".join(f"{name} {value}" for name, value in metrics.items())
        advice = "lower the learning rates and start again; the states written so far are good"
        raise FloatingPointError(f"{values} at step {step}: {advice}")


# ---- what a run remembers and writes


class _Run:
    """Progress, best weights and files of a training."""

    PROGRESS = ("step", "seconds", "tokens", "log", "recent_losses", "best", "best_weights")

    def __init__(self, model, config, runtime, path, metadata, maximize):
        self.model, self.config, self.runtime = model, config, runtime
        self.monitor, self.sign = maximize or "val_loss", -1 if maximize else 1
        self.optimizers = make_optimizers(model, config, runtime.dtype)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        world = {"world_size": runtime.world_size, "precision": str(runtime.dtype)}
        self.metadata = {**metadata, **world, "train_config": asdict(config), "state_format": 2}
        self.state_path, self.log_path = state_path(path), state_path(path, ".log.jsonl")
        self.step, self.seconds, self.tokens, self.log = 0, 0.0, 0.0, ""
        self.recent_losses, self.best, self.best_weights = [], {}, {}

    def start(self, resume: bool) -> tqdm:
        """Loads the state to resume, or writes the first one; returns the progress bar."""
        if self.runtime.world_size > 1:  # all processes start from the same weights
            for tensor in self.weights.values():
                dist.broadcast(tensor, src=0)
        if resume:
            self._load_state()
        if not self.runtime.rank:  # from here on there is something to resume
            self._save_state()
            self.log_path.write_text(self.log)  # drops what a killed run logged after its state
        self.model.train()
        self.started = time.perf_counter() - self.seconds  # counts earlier sessions, too
        hidden = self.runtime.rank > 0
        return tqdm(total=self.config.steps, initial=self.step, unit="step", disable=hidden)

    def keep_best_if_due(self, step: int, validate: Callable[[], dict]) -> dict[str, float]:
        """When due, validates the model, and keeps its weights if none were better so far."""
        if step % self.config.eval_every and step < self.config.steps:
            return {}
        self.model.eval()
        metrics = validate()
        self.model.train()
        value = metrics[self.monitor]
        _check_finite(step, {self.monitor: value})
        if not self.best or self.sign * value <= self.sign * self.best[self.monitor]:
            self.best = {"step": step, **metrics}
            self.best_weights = {name: tensor.clone() for name, tensor in self.weights.items()}
        return metrics

    def advance(self, bar: tqdm, loss_sum: float, n_terms: float, metrics: dict, stop: int) -> None:
        """Counts a step and shows it; rank 0 also writes a log line and the resumable state."""
        self.step, self.tokens = self.step + 1, self.tokens + n_terms
        self.seconds = time.perf_counter() - self.started
        if n_terms:  # else the step changed nothing and has no loss
            self.recent_losses = [*self.recent_losses, loss_sum / n_terms][-LOG_EVERY:]
        loss = sum(self.recent_losses) / len(self.recent_losses) if self.recent_losses else None
        shown = {"loss": loss, "best": self.best.get(self.monitor)}.items()
        bar.set_postfix({k: f"{v:.4f}" for k, v in shown if v is not None}, refresh=False)
        bar.update()
        if not self.runtime.rank and (metrics or self.step % LOG_EVERY == 0):
            line = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
            line |= {"loss": loss, "learning_rate": self.optimizers[0].param_groups[0]["lr"]}
            self.log += (text := json.dumps(line | metrics) + "\n")
            with self.log_path.open("a") as file:
                file.write(text)
        if not self.runtime.rank and (metrics or stop):
            self._save_state()

    def _save_state(self) -> None:
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"kind": "resume", "metadata": self.metadata, "weights": self.weights}
        progress = {name: getattr(self, name) for name in self.PROGRESS}
        save_checkpoint(self.state_path, {**state, "optimizers": optimizers, **progress})

    def _load_state(self) -> None:
        state = load_checkpoint(self.state_path, "resume", command_line().replace(" --resume", ""))
        if differences := "; ".join(_differences(state["metadata"], self.metadata)):
            advice = "give the same options on an idle machine (precision is timed), or --overwrite"
            raise ValueError(f"{self.state_path} is of another run ({differences}): {advice}")
        self.model.load_state_dict(state["weights"], strict=False)
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        vars(self).update({name: state[name] for name in self.PROGRESS})


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} was {a}, is {b}"


@contextlib.contextmanager
def _stop_signals(runtime: "Runtime") -> Iterator[Callable[[], int]]:
    """Yields a function that all processes call: the number of a SIGINT or SIGTERM to any, or 0.
    After such a signal, raises Interrupted on leaving."""
    caught = [0]
    with contextlib.ExitStack() as original_handlers:

        def record(number: int, _frame: object) -> None:
            caught.append(number)
            original_handlers.close()  # restores them: a second signal acts as usual

        def received_signal() -> int:
            number = torch.tensor(max(caught), device=runtime.device)
            if runtime.world_size > 1:
                dist.all_reduce(number, dist.ReduceOp.MAX)
            return int(number)

        with contextlib.suppress(ValueError):  # only the main thread can set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                original_handlers.callback(signal.signal, number, signal.signal(number, record))
        yield received_signal
        if stop := received_signal():
            raise Interrupted(stop)


def state_path(path: str | Path, suffix: str = ".pth") -> Path:
    """Path of the resumable state, or of the log, of an unfinished training that writes `path`."""
    return Path(path).with_suffix(f".resume{suffix}")


def save_result(
    path: str | Path, kind: str, weights: dict[str, Tensor], tokenizer: Any = None, **contents: Any
) -> str:
    """Saves a trained model in half precision, then its tokenizer, if given, and its log; only then
    deletes the resumable state. `contents` includes the `provenance`. Returns a message."""
    path = Path(path)
    save_checkpoint(path, {"kind": kind, **contents, "weights": half_precision(weights)})
    if tokenizer:
        tokenizer.save(path.with_name("tokenizer.json"))
    state_path(path, ".log.jsonl").replace(path.with_suffix(".log.jsonl"))
    state_path(path).unlink(missing_ok=True)
    costs, size = contents["provenance"], path.stat().st_size
    memory = f"{costs['peak_memory_bytes'] / 2**30:.2f} GiB peak memory"
    return f"wrote {path}: {size:,} bytes, {math.ceil(costs['seconds'])} s of training, {memory}"


def half_precision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors in float16 on the CPU, as they are saved; tied ones stay one tensor."""
    distinct = {tensor.data_ptr(): tensor.detach() for tensor in weights.values()}
    copies = {key: t.to("cpu", torch.float16, copy=True) for key, t in distinct.items()}
    return {name: copies[tensor.data_ptr()] for name, tensor in weights.items()}


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Writes a checkpoint atomically, with the format version and the hash of its "weights"."""
    sha256 = weights_sha256(checkpoint["weights"])
    with atomic_write(path) as file:
        torch.save({"format": FORMAT_VERSION, **checkpoint, "weights_sha256": sha256}, file)


def load_checkpoint(
    path: str | Path, kinds: str | tuple[str, ...], hint: str = "python main.py"
) -> dict[str, Any]:
    """Reads and verifies a checkpoint of one of these kinds: plain values, and tensors mapped into
    memory from the file. Errors name `hint`, a command that creates one."""
    path, kinds = Path(path), (kinds,) if isinstance(kinds, str) else kinds
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: create it with `{hint}`")
    written = path.stat().st_mtime_ns
    try:
        is_state = "resume" in kinds  # replaced while it is in use, therefore not mapped
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            for name in archive.namelist():
                if is_state or "/data/" not in name:  # weights have a SHA-256, too
                    archive.read(name)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=not is_state)
        if (version := checkpoint.get("format")) != FORMAT_VERSION:
            raise ValueError(f"of format {version}, not {FORMAT_VERSION}")
        if weights_sha256(checkpoint["weights"]) != checkpoint["weights_sha256"]:
            raise ValueError("weights do not match the recorded SHA-256")
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch.load has no error class of its own: zip, pickle, EOF, ...
        if path.is_file() and path.stat().st_mtime_ns != written:  # replaced while it was read
            return load_checkpoint(path, kinds, hint)
        first_line = str(error).split("\n")[0]
        text = f"{path} is damaged or another file ({first_line}): move it, and create one with"
        raise ValueError(f"{text} `{hint}`") from None
    if (kind := checkpoint.get("kind")) not in kinds:
        raise ValueError(f"{path} is of kind {kind}, not {' or '.join(kinds)}")
    return checkpoint


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values of tensors: the identity of a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):  # dimensions of size 1 may have any stride
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous()[..., None].view(torch.uint8).numpy())
    return digest.hexdigest()


def provenance(runtime: "Runtime", seconds: float) -> dict[str, Any]:
    """What a checkpoint records about how it was made."""
    versions = {"python": sys.version.split()[0], "torch": torch.version.__version__}
    costs = {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes(runtime.device)}
    return {"command": command_line(), "runtime": runtime.describe(), **costs, "versions": versions}


# ---- device, precision, processes


@dataclass(frozen=True)
class Runtime:
    """Where and how precisely to compute, chosen once at the entry point."""

    device: torch.device = field(default=torch.device("cpu"))
    dtype: torch.dtype = torch.float32  # of matrix products under autocast
    rank: int = 0  # index of this process under torchrun; rank 0 writes the files
    world_size: int = 1  # number of processes

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context in which matrix products run in `dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16)

    def describe(self) -> str:
        """One line for log and terminal, such as "cpu, bfloat16, 2 threads"."""
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        processes = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}{threads}{processes}"


CPU = Runtime()  # default for small jobs


@contextlib.contextmanager
def start_runtime() -> Iterator[Runtime]:
    """Chooses device (CUDA, MPS, CPU) and precision; under torchrun, joins the other processes."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    has_mps = world_size == 1 and torch.backends.mps.is_available()  # gloo has no MPS
    device = torch.device("mps" if has_mps else "cpu")
    if torch.cuda.is_available():
        if local_rank >= (n_gpus := torch.cuda.device_count()):
            raise ValueError(f"{world_size} processes need a GPU each, there are {n_gpus}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dtype = torch.bfloat16 if bfloat16_is_faster(device) else torch.float32
    with contextlib.ExitStack() as stack:
        if world_size > 1:
            backend, choice = "nccl" if device.type == "cuda" else "gloo", [dtype]
            dist.init_process_group(backend, timeout=timedelta(days=1))  # encoding may take hours
            stack.callback(dist.destroy_process_group)
            dist.broadcast_object_list(choice, src=0)
            dtype = choice[0]
        yield Runtime(device, dtype, rank, world_size)


@contextlib.contextmanager
def rank_zero_first(runtime: Runtime) -> Iterator[None]:
    """Runs the body on rank 0 first, so that the others find its files or, if it fails, exit."""
    done = [False]
    if runtime.rank:
        dist.broadcast_object_list(done, src=0)
        if not done[0]:
            raise SystemExit(2)
    try:
        yield
        done = [True]
    finally:
        if runtime.rank == 0 and runtime.world_size > 1:
            dist.broadcast_object_list(done, src=0)


@contextlib.contextmanager
def lock_output_dir(folder: str | Path, runtime: Runtime) -> Iterator[None]:
    """Locks a folder against other trainings; a process that dies releases its lock."""
    with contextlib.ExitStack() as stack:
        with rank_zero_first(runtime):
            if runtime.rank == 0:
                Path(folder).mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(FileLock(Path(folder, ".training.lock"), timeout=0))
                    for part in Path(folder).glob("*.pth.*.part"):  # of a process that was killed
                        part.unlink()
                except Timeout:
                    text = f"another training is running in {folder}: wait, or change --out-dir"
                    raise ValueError(text) from None
                except NotImplementedError:  # some network file systems
                    log0(f"warning: {folder} cannot be locked: run one training at a time")
        yield


def check_output(args: argparse.Namespace, *files: str, start: str = "") -> None:
    """Refuses to overwrite an unfinished run in `args.out_dir`: of one of `files`, or of `start`,
    which the script trains first. Logs the files to be replaced, and what depends on them."""
    if not is_rank_zero():  # rank 0 has checked, and its new state may lie there by now
        return
    states = [state_path(args.out_dir / file) for file in (*files, start or files[0])]
    unfinished = [path for path in states if path.is_file()]
    if args.resume and not unfinished:
        raise FileNotFoundError(f"there is no {states[0]} to resume: omit --resume")
    if unfinished and not (args.resume or args.overwrite):
        raise ValueError(f"{unfinished[0]} is an unfinished run: add --resume or --overwrite")
    files += tuple(Path(file).with_suffix(".log.jsonl").name for file in files)
    replaced = [file for file in files if (args.out_dir / file).is_file()]
    if replaced and not args.resume:
        note = dependents(args.out_dir, replaced)
        log0(f"will replace {', '.join(replaced)} in {args.out_dir}{note}")


def dependents(folder: str | Path, files: Sequence[str]) -> str:
    """A note on the models in a folder that need one of `files`, their tokenizer or base."""
    names = []
    for path in sorted(Path(folder).glob("*.pth")):
        with contextlib.suppress(Exception):  # a damaged file is no model
            checkpoint = torch.load(path, "cpu", weights_only=True, mmap=True)
            metadata = checkpoint.get("metadata", checkpoint)  # nested in a resumable state
            on_base = metadata.get("lora_config") and metadata["base"] in files
            on_tokenizer = "tokenizer_sha256" in metadata and "tokenizer.json" in files
            if path.name.replace(".resume", "") not in files and (on_base or on_tokenizer):
                names.append(path.name)
    return f"; models that depend on it: {', '.join(names)}" if names else ""


@functools.cache
def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether this device multiplies bf16 matrices faster than float32 ones; timed on a CPU."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    matrices = (torch.ones(512, 512, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    products = [functools.partial(F.linear, x, x) for x in matrices]
    seconds = [math.inf, math.inf]
    for n in range(20):
        seconds = [min(s, timeit.timeit(p, number=1)) for s, p in zip(seconds, products)]
        if n and seconds[1] > 3 * seconds[0]:
            break  # without instructions for bf16 it takes ten times as long
    return seconds[1] * 1.3 < seconds[0]


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: on the GPU if there is one, else resident; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")  # Linux, where `ru_maxrss` may be a larger parent's
    match = status.is_file() and re.search(r"VmHWM:\s+(\d+)", status.read_text())
    return 1024 * int(match[1]) if match else 0


# ---- command lines


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(action.default)})"
        return action.help if action.default is None else super()._get_help_string(action)


def new_parser(description: str, **options: Any) -> argparse.ArgumentParser:
    """A parser whose help shows defaults, and that takes no abbreviations."""
    options |= {"formatter_class": HelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(description=description, **options)


def add_run_flags(
    parser: argparse.ArgumentParser, data_sets: Iterable[str], data_help: str, max_examples: int = 0
) -> None:
    """Adds the flags of all training scripts and, with `max_examples`, those of fine-tuning."""
    add = parser.add_argument
    add("--dataset", choices=("auto", *data_sets), default="auto", help="auto: the first available")
    add("--data", type=Path, help=f"your own data instead: {data_help}")
    add("--data-dir", type=Path, help="folder of downloads (default: $GPT_DATA_DIR, else data)")
    if not max_examples:
        add("--out-dir", type=Path, default=Path("models"), help="folder to write to")
    else:
        add("--out-dir", type=Path, help="folder to write to (default: the base's, or models)")
        add("--max-examples", type=int, default=max_examples, help="maximum number of examples")
        text = "base model: a file, or a folder in models (default: models, else models/shipped)"
        add("--base", type=Path, help=text)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="continue an unfinished run with the same options")
    add("--overwrite", action="store_true", help="discard an unfinished run and start over")


def add_config_flags(parser: argparse.ArgumentParser, config_class: type) -> None:
    """Adds a `--kebab-case` flag for each field of a config dataclass, with its default and its
    text under "Attributes:". `parser.set_defaults` changes defaults, and the help shows it."""
    group = parser.add_argument_group(config_class.__name__)
    texts = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(config_class), re.M))
    for f in fields(config_class):
        options = {"type": f.type, "metavar": f.type.__name__.upper()}
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif f.type == tuple[str, ...]:
            options = {"nargs": "+", "metavar": "NAME"}
        text = " ".join(texts[f.name].split()).replace("%", "%%").rstrip(".")
        group.add_argument(f"--{f.name}".replace("_", "-"), default=f.default, help=text, **options)


def from_options(config_class: type, options: dict[str, Any]) -> Any:
    """A config dataclass built from the options that are its fields; ignores the others."""
    names = [f.name for f in fields(config_class) if f.name in options]
    return config_class(**{name: options[name] for name in names})


def fine_tuning_config(options: dict[str, Any], steps_per_epoch: int) -> TrainConfig:
    """How to train for at most `steps` and `epochs`; by default validates after each epoch."""
    steps = min(options["steps"], options["epochs"] * steps_per_epoch)
    eval_every = options["eval_every"] or steps_per_epoch
    return from_options(TrainConfig, {**options, "steps": steps, "eval_every": eval_every})


def check_range(config: Any, minimum: float, below: float, *names: str) -> None:
    """Raises ValueError for fields of a config that are not in [minimum, below)."""
    for name in names:
        if not minimum <= (value := getattr(config, name)) < below:
            raise ValueError(f"{name} must lie in [{minimum}, {below}), not {value}")


def command_line() -> str:
    """The running command, to show and to record."""
    n = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if n == "1" else ["torchrun", f"--nproc_per_node={n}"]
    return shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]])


def report_errors(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Decorates a script's `main`: user errors become one line on stderr and exit code 2; an
    interrupted training shows the command that continues it, with exit code 130 or 143."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        if hasattr(sys.stdout, "reconfigure"):  # terminals that lack a character show "?"
            sys.stdout.reconfigure(errors="replace")
        before = sys.argv
        sys.argv = [main.__code__.co_filename, *(before[1:] if argv is None else argv)]
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError) as error:
            message, code = f"error: {error}", 2
        except (torch.OutOfMemoryError, MemoryError):
            message, code = "error: out of memory: in a training, raise --grad-accumulation", 2
        except Interrupted as stop:
            sys.argv = [*(a for a in sys.argv if a not in ("--resume", "--overwrite")), "--resume"]
            message, code = f"interrupted; continue with: {command_line()}", 128 + stop.args[0]
        except KeyboardInterrupt:
            message, code = "interrupted", 130
        finally:
            sys.argv = before
        log0(message)
        return code

    return wrapped


def exit_process(code: int) -> NoReturn:
    """Ends a script at once: tearing down PyTorch is slow, and library threads may abort it. First
    releases the named locks of `tqdm` and `joblib`: macOS and Python 3.14 would warn about them."""
    sys.stdout.flush()
    multiprocessing.util._exit_function()
    os._exit(code)
