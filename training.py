"""One training loop for every model of this repository.

    best, made = train(model, batches, loss_fn, TrainConfig(steps=1000), ...)

The caller says what a batch and its loss are. The loop does the rest: AdamW or Muon, learning-rate
schedule, gradient accumulation and clipping, mixed precision, validation, log, checkpoints,
resuming, Ctrl-C, and several processes under torchrun. It knows nothing of GPT; the losses and the
flags that the scripts share stand below it.

Nothing random is kept between steps: the batches, and the dropout masks, of step n follow from the
seed and n alone. That is why a run that was killed and resumed ends with the very same weights.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import timeit
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT_VERSION = 2
LOG_EVERY = 10  # steps
CACHED_ROWS = 512  # tokens whose logits in float32 stay in a processor's cache

T = TypeVar("T")
Batch = tuple[Tensor, ...]
LossFn = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        optimizer: "muon" (Muon for the matrices inside the network, AdamW for embeddings, head and
            norms; Jordan 2024, https://kellerjordan.github.io/posts/muon) or "adamw" for
            everything.
        learning_rate: AdamW's peak rate.
        muon_learning_rate: Muon's peak rate.
        weight_decay: Of matrices; norms and biases have none.
        warmup_steps: Steps in which the rates rise from zero.
        decay_share: Share of the steps, at the end, in which the rates fall linearly to zero.
        max_grad_norm: Gradients are scaled down to this norm.
        grad_accumulation: Parts a step's batch is cut into, one after the other, to save memory.
        eval_every: Steps between two validations, each with a resumable state written.
        seed: Of initial weights, batches and dropout.

    Raises:
        ValueError: A value is out of range.
    """

    steps: int
    optimizer: str = "muon"
    learning_rate: float = 0.004
    muon_learning_rate: float = 0.014
    weight_decay: float = 0.1
    warmup_steps: int = 50
    decay_share: float = 0.6
    max_grad_norm: float = 1.0
    grad_accumulation: int = 1
    eval_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer must be muon or adamw, not {self.optimizer}")
        check_range(self, 1, math.inf, "steps", "grad_accumulation", "eval_every")
        check_range(self, 0, math.inf, "learning_rate", "muon_learning_rate", "weight_decay")
        check_range(self, 0, math.inf, "warmup_steps")
        check_range(self, 0, 2**32, "seed")
        if not 0 <= self.decay_share <= 1 or not self.max_grad_norm > 0:
            raise ValueError("decay_share must lie in [0, 1] and max_grad_norm above 0")


def check_range(config: Any, least: float, below: float, *names: str) -> None:
    """Raises ValueError for the fields of a config that are under `least`, or not under `below`."""
    for name in names:
        if not least <= getattr(config, name) < below:
            raise ValueError(f"{name} must lie in [{least}, {below}), not {getattr(config, name)}")


# ---- device, precision, processes


@dataclass(frozen=True)
class Runtime:
    """Where and how precisely to compute, chosen once at the entry point.

    Attributes:
        device: CUDA, else MPS, else CPU.
        dtype: Of matrix products under autocast: bfloat16 where that is faster, else float32.
        rank: Number of this process under torchrun; 0 writes the files.
        world_size: Number of processes.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1

    def autocast(self) -> contextlib.AbstractContextManager:
        """Context in which matrix products run in `dtype`."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def describe(self) -> str:
        """One line for the log and the terminal, such as "cpu, bfloat16, 2 threads"."""
        precision = str(self.dtype).removeprefix("torch.")
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        processes = f", {self.world_size} processes" if self.world_size > 1 else ""
        return f"{self.device}, {precision}{threads}{processes}"


CPU = Runtime(torch.device("cpu"), torch.float32)  # where nothing is gained by more


@contextlib.contextmanager
def start_runtime() -> Iterator[Runtime]:
    """Chooses device and precision and, under torchrun, joins the other processes."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"{world_size} processes need a GPU each, there are {torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    dtype = torch.bfloat16 if bfloat16_is_faster(device) else torch.float32
    if world_size == 1:
        yield Runtime(device, dtype)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # one may encode a large corpus
    try:
        choice = [dtype]
        dist.broadcast_object_list(choice, src=0)
        yield Runtime(device, choice[0], rank, world_size)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first(runtime: Runtime) -> Iterator[None]:
    """Lets the first process go through the body before the others, so that these find its files.

    If it fails there, the others end quietly.
    """
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
def training_in(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Keeps other trainings out of a folder; the system frees the lock of a process that died.

    Raises:
        ValueError: Another process trains there; the message names it.
    """
    with contextlib.ExitStack() as held:
        with first_process_first(runtime):
            if runtime.rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                _lock(held.enter_context((folder / ".training.lock").open("a+")), folder)
        yield


def _lock(file: TextIO, folder: Path) -> None:
    file.seek(0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"process {file.read()} is training in {folder}: wait for it, or choose another "
            "--out-dir"
        ) from None
    except (OSError, AttributeError):  # some network file systems; Windows, which has no fcntl
        print(f"warning: {folder} cannot be locked: train once at a time", file=sys.stderr)
    file.truncate()
    file.write(str(os.getpid()))
    file.flush()


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices faster than float32 ones; on a CPU, timed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = {"x": torch.ones(512, 512, dtype=dtype)}
        seconds[dtype] = min(timeit.repeat("x @ x", globals=matrix, number=1, repeat=20))
    return seconds[torch.bfloat16] * 1.3 < seconds[torch.float32]


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the GPU if there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux, where `ru_maxrss` may be a larger parent's
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return 1024 * int(found[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---- checkpoints


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors: the identity of a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def half_precision(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are saved: in float16, half the bytes, on the CPU."""
    return {n: t.detach().to("cpu", torch.float16, copy=True) for n, t in weights.items()}


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all: a temporary file, flushed to disk, then renamed.

    The format version and the hash of its "weights" go with it.

    Raises:
        OSError: The disk is full or the folder cannot be written; an older file stays as it was.
    """
    sha256 = weights_sha256(checkpoint["weights"])
    checkpoint = {"format": FORMAT_VERSION, **checkpoint, "weights_sha256": sha256}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from None


def load_checkpoint(
    path: Path, kind: str | tuple[str, ...], hint: str = "python main.py"
) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, tensors and plain values only.

    Args:
        path: The file.
        kind: What the file must be, such as "base", or several that it may be.
        hint: Command that makes such a file, for the error messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, of another kind, or of another format version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: make it with `{hint}`")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the check sums
            if damaged := archive.testzip():
                raise ValueError(f"wrong check sum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = (kind,) if isinstance(kind, str) else kind
        if (found := checkpoint.get("kind")) not in kinds:
            raise ValueError(f"of kind {found}, not {' or '.join(kinds)}")
        if (found := checkpoint.get("format")) != FORMAT_VERSION:
            raise ValueError(f"of format {found}, not {FORMAT_VERSION}")
        if weights_sha256(checkpoint["weights"]) != checkpoint["weights_sha256"]:
            raise ValueError("with other weights than it says")
    except Exception as error:  # torch.load has no error class of its own: zip, pickle, EOF, ...
        first_line = str(error).split("\n")[0]
        raise ValueError(
            f"{path} is damaged or another file ({first_line}): make one with `{hint}`"
        ) from None
    return checkpoint


# ---- the loop


class Interrupted(Exception):
    """A signal, the argument, ended a training early; a resumable state is on disk."""


def train(
    model: nn.Module,
    batches: Callable[[int, int], Sequence[Batch]],
    loss_fn: LossFn,
    config: TrainConfig,
    *,
    runtime: Runtime,
    validate: Callable[[], dict[str, float]],
    criterion: str = "val_loss",
    path: Path,
    facts: dict[str, Any],
    resume: bool = False,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains `model` in place; it ends with the best weights.

    Args:
        model: Parameters that require gradients are trained, and alone kept in the states.
        batches: `batches(step, parts)` is the batch of a step, cut into that many parts (some may
            be empty); it must not depend on anything else.
        loss_fn: `loss_fn(model, batch)` is (sum of losses, number of things summed): the step
            follows the mean over all parts on all processes.
        config: How.
        runtime: Where.
        validate: Figures of the model as it is, called on every process.
        criterion: The figure whose lowest value, the last one of equals, marks the weights to keep.
        path: Where the caller will save the result. Beside it, with the suffix `.log.jsonl`, a log
            gets a line every few steps ("tokens" there are the things that `loss_fn` counts), and
            `state_path` holds a resumable state, which the caller removes once the result is saved.
        facts: What the run was started with (data, tokenizer, model); `resume` refuses others.
        resume: Whether to go on from that state.

    Returns:
        Step and validation figures of the best weights, and how they were made; "seconds" there are
        those of training, validation included, over all sessions of the run.

    Raises:
        FileNotFoundError: `resume` without a state to resume.
        FloatingPointError: The loss or a gradient is not finite; the states on disk are good.
        Interrupted: This process, or another of the run, got SIGINT (Ctrl-C) or SIGTERM.
        ValueError: The state to resume is of a run with another configuration.
    """
    run = _Run(model, config, runtime, facts, path, criterion)
    if resume:
        run.load()
    if runtime.world_size > 1:
        for parameter in run.parameters:
            dist.broadcast(parameter.data, src=0)
    progress = tqdm(
        total=config.steps, initial=run.step, unit="step", disable=runtime.rank > 0, mininterval=0.5
    )
    model.train()
    with _SignalCatcher() as signals, progress:
        if not resume:
            run.write(log=False, state=True)  # from here on there is something to resume
        while run.step < config.steps:
            run.take_step(batches, loss_fn)
            if validated := run.step % config.eval_every == 0 or run.step == config.steps:
                run.validate(validate)
            stop = run.told_to_stop(signals.caught)
            run.write(log=validated or run.step % LOG_EVERY == 0, state=validated or bool(stop))
            progress.set_postfix(run.figures(), refresh=False)
            progress.update()
            if stop:
                raise Interrupted(stop)
    if stop := run.told_to_stop(signals.caught):
        raise Interrupted(stop)
    model.load_state_dict(run.best_weights, strict=False)  # those that are trained
    model.eval()
    return run.best, _provenance(config, runtime, run.seconds)


def state_path(path: Path) -> Path:
    """Where the resumable state of a training lies whose result goes to `path`."""
    return path.with_suffix(".resume.pth")


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the peak rate at a step: linear warm-up, constant, linear decay to zero."""
    warmup = (step + 1) / config.warmup_steps if config.warmup_steps else 1.0
    decay_steps = config.decay_share * config.steps
    decay = (config.steps - step) / decay_steps if decay_steps else 1.0
    return min(1.0, warmup, decay)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Optimizers over the parameters that require gradients; each group knows its peak rate.

    Raises:
        ValueError: No parameter requires gradients.
    """
    modules = dict(model.named_modules())
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "adamw": [], "undecayed": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = name.rpartition(".")[0]
        inside = isinstance(modules[owner], nn.Linear) and not owner.endswith("head")
        adapts = getattr(modules[owner], "base_layer", None)  # of a low-rank adapter
        by_muon = config.optimizer == "muon" and (inside or isinstance(adapts, nn.Linear))
        kind = "undecayed" if parameter.ndim < 2 else "muon" if by_muon else "adamw"
        groups[kind].append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    decays = {"adamw": config.weight_decay, "undecayed": 0.0}
    if adamw := [{"params": groups[k], "weight_decay": d} for k, d in decays.items() if groups[k]]:
        rate, betas = config.learning_rate, (0.9, 0.95)
        optimizers.append(torch.optim.AdamW(adamw, lr=rate, betas=betas, fused=True))
    if groups["muon"]:
        rate, decay = config.muon_learning_rate, config.weight_decay
        optimizers.append(torch.optim.Muon(groups["muon"], lr=rate, weight_decay=decay))
    if not optimizers:
        raise ValueError("no parameter requires gradients: nothing to train")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def mean_loss(
    model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn, runtime: Runtime
) -> float:
    """Mean loss over fixed batches, shared out among the processes.

    Returns:
        Sum of losses divided by the sum of counts; NaN where nothing is counted.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.inference_mode(), runtime.autocast():
        for batch in batches[runtime.rank :: runtime.world_size]:
            loss, count = loss_fn(model, _to(batch, runtime.device))
            sums += torch.stack([loss, count]).cpu().double()
    if runtime.world_size > 1:
        sums = sums.to(runtime.device if runtime.device.type == "cuda" else "cpu")
        dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed cross entropy in nats, and the number of targets that count.

    Args:
        model: Maps token ids (B, T) to logits (B, T, V).
        batch: Inputs and targets, each (B, T); targets of -100 carry no loss.
    """
    inputs, targets = batch
    logits = model(inputs).flatten(0, 1)
    parts = zip(logits.split(CACHED_ROWS), targets.flatten().split(CACHED_ROWS))
    losses = [F.cross_entropy(part.float(), wanted, reduction="sum") for part, wanted in parts]
    return torch.stack(losses).sum(), (targets != -100).sum()


def prefix_classification_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed cross entropy in nats, half of it asked of each token, and the number of texts.

    A causal model has read a prefix of the text at each token: all of them are examples. The mean
    over the tokens is weighted by their place, since a beginning says less.

    Args:
        model: Also has `token_logits`, which maps token ids (B, T) to logits (B, T, classes).
        batch: Token ids, lengths and class probabilities to learn (B, classes).
    """
    ids, lengths, targets = batch
    B, T = ids.shape
    logits = model.token_logits(ids).float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.repeat_interleave(T, dim=0), reduction="none"
    ).view(B, T)
    places = torch.arange(1, T + 1, device=ids.device).expand(B, T)
    weights = places * (places <= lengths[:, None])
    everywhere = (losses * weights).sum(1) / weights.sum(1)
    last = losses.gather(1, lengths[:, None] - 1).squeeze(1)
    return (everywhere + last).sum() / 2, torch.tensor(B, device=ids.device)


def _to(batch: Batch, device: torch.device) -> Batch:
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)


def _sum_over_processes(parameters: list[nn.Parameter], sums: Tensor) -> None:
    """Adds up `sums` and the gradients of all processes, in one message."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    held = [sums, *(parameter.grad for parameter in parameters)]
    flat = torch.cat([tensor.flatten() for tensor in held])
    dist.all_reduce(flat)
    for tensor, total in zip(held, flat.split([tensor.numel() for tensor in held])):
        tensor.copy_(total.view_as(tensor))


def _diverged(what: str, step: int) -> str:
    return (
        f"{what} at step {step}: lower the learning rates and start again; the states written so "
        "far are good"
    )


class _SignalCatcher:
    """Notes the first Ctrl-C or SIGTERM instead of dying; a second one acts as usual."""

    def __enter__(self) -> "_SignalCatcher":
        self.caught: signal.Signals | None = None
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, _frame: object) -> None:
        self.caught = signal.Signals(number)
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class _Run:
    """A training under way: its steps, its place, its best weights, its files."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        runtime: Runtime,
        facts: dict[str, Any],
        path: Path,
        criterion: str,
    ):
        self.model, self.config, self.runtime = model, config, runtime
        self.criterion = criterion
        self.optimizers = make_optimizers(model, config)
        self.named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.facts = {
            **facts,
            "world_size": runtime.world_size,
            "precision": str(runtime.dtype),
            "train_config": asdict(config),
        }
        self.state_path, self.log_path = state_path(path), path.with_suffix(".log.jsonl")
        self.step, self.seconds, self.tokens, self.log_bytes = 0, 0.0, 0.0, 0
        self.best: dict[str, float] = {}
        self.best_weights: dict[str, Tensor] = {}
        self.recent_losses: list[float] = []
        self.validation: dict[str, float] = {}  # not yet logged

    def take_step(self, batches: Callable[[int, int], Sequence[Batch]], loss_fn: LossFn) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        factor = learning_rate_factor(self.step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        loss, count = self._accumulate_gradients(batches, loss_fn)
        if count:
            self._scale_gradients(count, loss)
            for optimizer in self.optimizers:
                optimizer.step()
            self.recent_losses = [*self.recent_losses, loss][-LOG_EVERY:]
        self.step += 1
        self.tokens += count
        self.seconds += time.perf_counter() - started

    def _accumulate_gradients(
        self, batches: Callable[[int, int], Sequence[Batch]], loss_fn: LossFn
    ) -> tuple[float, float]:
        """Leaves the gradient of the summed loss of the whole step in `.grad`, on every process.

        Returns:
            Mean loss, and the count it was divided by.
        """
        rank, world_size = self.runtime.rank, self.runtime.world_size
        for parameter in self.parameters:
            parameter.grad = None
        torch.manual_seed((self.config.seed * 1_000_003 + self.step) * 4096 + rank)  # dropout
        sums = torch.zeros(2, device=self.runtime.device)
        parts = batches(self.step, self.config.grad_accumulation * world_size)
        for batch in parts[rank::world_size]:
            if not len(batch[0]):
                continue
            with self.runtime.autocast():
                loss, count = loss_fn(self.model, _to(batch, self.runtime.device))
            loss.backward()
            sums += torch.stack([loss.detach(), count])
        if world_size > 1:
            _sum_over_processes(self.parameters, sums)
        loss, count = sums.tolist()
        return (loss / count if count else math.nan), count

    def _scale_gradients(self, count: float, loss: float) -> None:
        """Turns gradients of the sum into gradients of the mean, and clips their norm."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item() / count
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(_diverged(f"loss {loss} and gradient norm {norm}", self.step))
        scale = min(1.0, self.config.max_grad_norm / (norm + 1e-6)) / count
        torch._foreach_mul_(gradients, scale)

    def validate(self, validate: Callable[[], dict[str, float]]) -> None:
        """Takes the figures of the model as it is; keeps the weights if they are the best."""
        started = time.perf_counter()
        self.model.eval()
        self.validation = validate()
        self.model.train()
        found = self.validation[self.criterion]
        if not math.isfinite(found):
            raise FloatingPointError(_diverged(f"{self.criterion} {found}", self.step))
        if not self.best or found <= self.best[self.criterion]:
            self.best = {"step": self.step, **self.validation}
            self.best_weights = {n: p.detach().clone() for n, p in self.named.items()}
        self.seconds += time.perf_counter() - started

    def told_to_stop(self, caught: signal.Signals | None) -> signal.Signals | None:
        """The signal that any process has caught."""
        number = torch.tensor(int(caught or 0), device=self.runtime.device)
        if self.runtime.world_size > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return signal.Signals(number.item()) if number else None

    def figures(self) -> dict[str, str]:
        """What the progress bar shows."""
        shown = {"loss": self._recent_loss(), "best": self.best.get(self.criterion)}
        return {name: f"{value:.4f}" for name, value in shown.items() if value is not None}

    def _recent_loss(self) -> float | None:
        losses = self.recent_losses
        return sum(losses) / len(losses) if losses else None

    def write(self, log: bool, state: bool) -> None:
        """Writes a log line and the resumable state, if asked to and the first process."""
        if self.runtime.rank:
            return
        if log:
            self._log()
        if state:
            self._save()

    def _log(self) -> None:
        """Appends a line behind those of this run; the first one replaces an older run's log."""
        line = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "loss": self._recent_loss(),
            "learning_rate": self.optimizers[0].param_groups[0]["lr"],
            **self.validation,
        }
        self.validation = {}
        with self.log_path.open("r+b" if self.log_bytes else "wb") as file:
            file.truncate(self.log_bytes)
            file.seek(self.log_bytes)
            self.log_bytes += file.write(json.dumps(line).encode() + b"\n")

    def _save(self) -> None:
        state = {
            "kind": "resume",
            "facts": self.facts,
            "weights": {n: p.detach() for n, p in self.named.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "best": self.best,
            "best_weights": self.best_weights,
            "place": [self.step, self.seconds, self.tokens, self.log_bytes],
            "recent_losses": self.recent_losses,
        }
        save_checkpoint(self.state_path, state)

    def load(self) -> None:
        """Goes on from the state on disk.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged or of another run.
        """
        state = load_checkpoint(self.state_path, "resume", hint="the same command without --resume")
        if differences := _differences(state["facts"], self.facts):
            timed = any(difference.startswith("precision") for difference in differences)
            raise ValueError(
                f"{self.state_path} is of another run ({'; '.join(differences)}): give the same "
                f"options{' on an idle machine, since precision is timed' if timed else ''}, or "
                "start over without --resume"
            )
        self.model.load_state_dict(state["weights"], strict=False)
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.best, self.best_weights = state["best"], state["best_weights"]
        self.step, self.seconds, self.tokens, log_bytes = state["place"]
        held = self.log_path.read_bytes()[:log_bytes] if self.log_path.is_file() else b""
        self.log_bytes = held.rfind(b"\n") + 1  # a log that was cut off goes on at a whole line
        self.recent_losses = state["recent_losses"]


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {a}, is {b}")
    return found


# ---- command lines


def leave(code: int) -> NoReturn:
    """Ends a script with an exit code.

    Under torchrun at once: taking down the threads of the process group aborts, now and then, a
    process that has done all its work.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


def command_line() -> str:
    """The command that started this process, to be shown and recorded."""
    n = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if n == "1" else ["torchrun", f"--nproc_per_node={n}"]
    return shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]])


def relative_path(path: Path, folder: Path) -> str:
    """Where a file lies, seen from a folder: for files that name each other."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _provenance(config: TrainConfig, runtime: Runtime, seconds: float) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "numpy", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": command_line(),
        "train_config": asdict(config),
        "runtime": runtime.describe(),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(runtime.device),
        "versions": versions,
    }


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def new_parser(description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose help shows defaults."""
    return argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=HelpFormatter
    )


def add_run_flags(
    parser: argparse.ArgumentParser, data_sets: Iterable[str], data_help: str, max_examples: int = 0
) -> None:
    """Adds the flags that every training has: its data, its folder, resuming; a fine-tuning, which
    has `max_examples`, also the flag of its base."""
    add = parser.add_argument
    text = "auto: the first of the others that can be had"
    add("--dataset", choices=("auto", *data_sets), default="auto", help=text)
    add("--data", type=Path, help=f"of your own instead: {data_help}")
    add("--data-dir", type=Path, help="folder of downloads; else $GPT_DATA_DIR, else data")
    add("--out-dir", type=Path, default=Path("models"), help="where to write")
    add("--resume", action="store_true", help="go on from an interrupted run with the same options")
    if max_examples:
        add("--max-examples", type=int, default=max_examples, help="most examples to use")
        add("--base", type=Path, default=Path("models/model_weights.pth"), help="base model")


def add_config_flags(
    parser: argparse.ArgumentParser, config_class: type, defaults: dict[str, Any]
) -> None:
    """Adds a `--kebab-case` flag for each field of a config dataclass.

    Args:
        parser: Gets the flags; a flag not given leaves no trace in the parsed arguments.
        config_class: Its field types, defaults and "Attributes:" lines make the flags.
        defaults: Values to show instead of the dataclass's own defaults.
    """
    group = parser.add_argument_group(config_class.__name__)
    for field in fields(config_class):
        default = defaults.get(field.name, field.default)
        if field.type is bool:
            kind: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif field.type == tuple[str, ...]:
            kind, default = {"nargs": "+", "metavar": "NAME"}, " ".join(default)
        else:
            kind = {"type": field.type, "metavar": field.type.__name__.upper()}
        text = f"{_attribute_help(config_class, field.name)} (default: {default})"
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)


def from_options(config_class: type[T], options: dict[str, Any]) -> T:
    """A config dataclass with those of the options that are fields of it.

    Raises:
        ValueError: A value is out of range.
    """
    return config_class(
        **{f.name: options[f.name] for f in fields(config_class) if f.name in options}
    )


def fine_tuning_config(options: dict[str, Any], config: Any, n_examples: int) -> TrainConfig:
    """How to train for `config.epochs` passes at most, validating after each by default."""
    steps_per_epoch = max(1, n_examples // config.batch_size)
    steps = min(options["steps"], config.epochs * steps_per_epoch)
    return from_options(TrainConfig, {"eval_every": steps_per_epoch, **options, "steps": steps})


def _attribute_help(config_class: type, name: str) -> str:
    """The text of an attribute in a Google-style docstring, for `--help`."""
    found = re.search(rf"^ {{4}}{name}: (.*(?:\n {{8}}.*)*)", inspect.getdoc(config_class), re.M)
    return " ".join(found[1].split()).replace("%", "%%").rstrip(".")


def one_line_errors(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Makes a script's `main` report in a line on stderr what a user got wrong, with exit code 2,
    or how an interrupted training goes on, with 130 or 143."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        """As `main`, without tracebacks."""
        if hasattr(sys.stdout, "reconfigure"):  # a terminal that cannot show a character shows "?"
            sys.stdout.reconfigure(errors="replace")
        try:
            return main(argv)
        except (ValueError, OSError, FloatingPointError) as error:
            message, code = f"error: {error}", 2
        except torch.OutOfMemoryError:
            message, code = "error: out of GPU memory: in a training, raise --grad-accumulation", 2
        except Interrupted as stop:
            resume = "" if "--resume" in sys.argv else " --resume"
            message = f"interrupted; continue with: {command_line()}{resume}"
            code = 128 + stop.args[0]
        except KeyboardInterrupt:
            message, code = "interrupted", 130
        if os.environ.get("RANK", "0") == "0":  # under torchrun only the first process speaks
            print(message, file=sys.stderr)
        return code

    return wrapped
