"""The loop: schedule, gradients, resuming, faults. The models here are not GPTs."""

import math
import os
import re
import signal
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generation
import training
from training import (
    FORMAT_VERSION,
    Batch,
    Interrupted,
    LossFn,
    Muon,
    Runtime,
    TrainConfig,
    add_run_flags,
    bfloat16_is_faster,
    check_output,
    command_line,
    load_checkpoint,
    make_optimizers,
    mean_loss,
    new_parser,
    next_token_loss,
    orthogonalize,
    report_errors,
    save_checkpoint,
    save_result,
    set_learning_rates,
    train,
)

ROOT = Path(__file__).parents[1]


class Net(nn.Module):
    """An embedding, a hidden matrix, a norm, dropout and a head: one of each kind."""

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        self.embedding = nn.Embedding(8, 6)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(F.relu(self.hidden(self.embedding(x))))))


def batches(step: int, n_micro: int = 1) -> list[Batch]:
    x = torch.randint(8, (10,), generator=torch.Generator().manual_seed(step))
    return list(zip(x.tensor_split(n_micro), (x % 3).tensor_split(n_micro)))


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="sum"), torch.tensor(len(x))


def new_net(dropout: float = 0.1) -> Net:
    torch.manual_seed(0)
    return Net(dropout)


def run(
    tmp_path: Path,
    runtime: Runtime,
    net: nn.Module | None = None,
    batches: Callable[[int, int], list[Batch]] = batches,
    loss_fn: LossFn = loss_fn,
    resume: bool = False,
    metadata: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[nn.Module, dict[str, float]]:
    net = net or new_net()
    settings = {"steps": 20, "eval_every": 5, "warmup_steps": 3, **changes}

    def validate() -> dict[str, float]:
        return {"val_loss": mean_loss(net, batches_of_validation(), loss_fn, runtime)}

    best, _ = train(
        net,
        batches,
        loss_fn,
        TrainConfig(**settings),
        runtime=runtime,
        validate=validate,
        path=tmp_path / "run.pth",
        metadata=metadata or {},
        resume=resume,
    )
    return net, best


def batches_of_validation() -> list[Batch]:
    return [batches(1000 + i)[0] for i in range(3)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_it_learns(tmp_path: Path, runtime: Runtime, optimizer: str):
    rate = {"learning_rate": 0.03, "muon_learning_rate": 0.03}
    _, best = run(tmp_path, runtime, new_net(0), steps=300, optimizer=optimizer, **rate)
    assert best["val_loss"] < 0.3  # guessing costs ln 3 = 1.1


def test_the_same_seed_gives_the_same_weights(tmp_path: Path, runtime: Runtime):
    one, two = run(tmp_path / "1", runtime)[0], run(tmp_path / "2", runtime)[0]
    other = run(tmp_path / "3", runtime, seed=1)[0]
    assert same(one.state_dict(), two.state_dict())
    assert not same(one.state_dict(), other.state_dict())


def test_the_best_weights_are_kept(tmp_path: Path, runtime: Runtime):
    figures = iter([3.0, 1.0, 2.0, 4.0])
    net, weights = new_net(), []

    def validate() -> dict[str, float]:
        weights.append({k: v.clone() for k, v in net.state_dict().items()})
        return {"val_loss": next(figures)}

    config = TrainConfig(steps=20, eval_every=5)
    best, _ = train(
        net,
        batches,
        loss_fn,
        config,
        runtime=runtime,
        validate=validate,
        path=tmp_path / "run.pth",
        metadata={},
    )
    assert best == {"step": 10, "val_loss": 1.0}
    assert same(net.state_dict(), weights[1])


def test_the_schedule():
    optimizers = [torch.optim.SGD([torch.zeros(1)], lr=rate) for rate in (1.0, 2.0)]

    def rates(**changes: Any) -> list[float]:
        found = []
        for step in range(100):
            set_learning_rates(optimizers, step, TrainConfig(steps=100, **changes))
            first, second = (optimizer.param_groups[0]["lr"] for optimizer in optimizers)
            assert second == 2 * first
            found.append(first)
        return found

    schedule = rates(warmup_steps=10, decay_fraction=0.5)
    assert schedule[0] == 0.1 and schedule[9:51] == [1.0] * 42
    assert schedule[75] == 0.5 and schedule[99] == pytest.approx(0.02)
    assert set(rates(warmup_steps=0, decay_fraction=0.0)) == {1.0}


def test_each_parameter_goes_to_its_optimizer():
    net = new_net()
    net.norm.weight.requires_grad = False
    adamw, muon = make_optimizers(net, TrainConfig(steps=1), torch.float32)
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(net.hidden.weight)]
    matrices, vectors = adamw.param_groups
    assert {id(p) for p in matrices["params"]} == {id(net.embedding.weight), id(net.head.weight)}
    assert {id(p) for p in vectors["params"]} == {
        id(net.hidden.bias),
        id(net.norm.bias),
        id(net.head.bias),
    }
    assert matrices["weight_decay"] > 0 == vectors["weight_decay"]
    (only,) = make_optimizers(net, TrainConfig(steps=1, optimizer="adamw"), torch.float32)
    assert sum(len(g["params"]) for g in only.param_groups) == 6


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (12, 12)])
def test_muon_is_that_of_pytorch(shape: tuple[int, int]):
    """In bf16 bit by bit; in float32 it may differ by what bf16 rounds."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(5, *shape)

    def trained(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Tensor:
        parameter = nn.Parameter(start.clone())
        optimizer = make([parameter])
        for parameter.grad in gradients:
            optimizer.step()
        return parameter.data

    expected = trained(lambda p: torch.optim.Muon(p, lr=0.05, weight_decay=0.3))
    assert torch.equal(trained(lambda p: Muon(p, 0.05, 0.3, torch.bfloat16)), expected)
    found = trained(lambda p: Muon(p, 0.05, 0.3, torch.float32))
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)
    values = torch.linalg.svdvals(orthogonalize(gradients[0]))
    assert values.min() > 0.6 and values.max() < 1.3


def test_the_step_follows_adamw_on_the_mean_loss(tmp_path: Path, runtime: Runtime):
    net = new_net(dropout=0)
    oracle = new_net(dropout=0)
    optimizer = torch.optim.AdamW(oracle.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    for step in range(4):
        ((x, y),) = batches(step)
        optimizer.zero_grad()
        F.cross_entropy(oracle(x), y).backward()
        nn.utils.clip_grad_norm_(oracle.parameters(), 0.2)
        optimizer.step()
    options = {
        "optimizer": "adamw",
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "decay_fraction": 0.0,
    }
    run(tmp_path, runtime, net, steps=4, warmup_steps=0, max_grad_norm=0.2, **options)
    for ours, theirs in zip(net.parameters(), oracle.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("parts", [2, 3, 10, 13])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    tmp_path: Path, runtime: Runtime, parts: int
):
    whole, _ = run(tmp_path / "a", runtime, new_net(0))
    cut, _ = run(tmp_path / "b", runtime, new_net(0), grad_accumulation=parts)
    for ours, theirs in zip(whole.parameters(), cut.parameters()):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_every_step_has_its_own_dropout_mask(tmp_path: Path, runtime: Runtime):
    masks = []

    def recorded(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        torch.manual_seed(torch.initial_seed())  # the masks that this step is about to sample
        masks.append(tuple(F.dropout(torch.ones(50)).tolist()))
        return loss_fn(model, batch)

    for seed in (0, 1):
        net = new_net()
        train(
            net,
            batches,
            recorded,
            TrainConfig(steps=20, seed=seed),
            runtime=runtime,
            validate=lambda: {"val_loss": 1.0},
            path=tmp_path / "run.pth",
            metadata={},
        )
    assert len(masks) == len(set(masks)) == 40


def test_two_processes_take_the_steps_of_one(tmp_path: Path, runtime: Runtime):
    one, alone = run(tmp_path, runtime, new_net(0))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(ROOT / "tests" / "torchrun_worker.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["best"] == ranks[1]["best"] == pytest.approx(alone, rel=1e-4)
    examples = [rank["examples"] for rank in ranks]  # the work is shared, not done twice
    assert sum(examples) == 20 * 10 and min(examples) > 0
    weights = [rank["weights"] for rank in ranks]
    assert same(*weights)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(weights[0][name], tensor, atol=1e-5, rtol=1e-4)


def test_mean_loss_weighs_batches_by_their_size(runtime: Runtime):
    net, sizes = new_net().eval(), [1, 7, 4]
    x = torch.arange(12) % 8
    cut = list(zip(x.split(sizes), (x % 3).split(sizes)))
    expected = F.cross_entropy(net(x), x % 3).item()
    assert mean_loss(net, cut, loss_fn, runtime) == pytest.approx(expected, rel=1e-5)


def test_masked_targets_carry_no_loss():
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    model = SimpleNamespace(hidden=lambda _: logits, head=nn.Identity())
    loss, weight = next_token_loss(model, (targets, targets))
    log_p = logits.log_softmax(-1)
    assert weight == 3
    torch.testing.assert_close(loss, -(log_p[0, 0, 1] + log_p[0, 2, 2] + log_p[1, 2, 4]))


def test_logits_have_few_sizes_whatever_the_number_of_targets():
    sizes = set()

    def head(rows: Tensor) -> Tensor:
        sizes.add(len(rows))
        return rows

    model = SimpleNamespace(hidden=lambda ids: torch.ones(*ids.shape, 5), head=head)
    for n in (1, 63, 64, 65, 600):
        targets = torch.arange(700).remainder(5).where(torch.arange(700) < n, -100)[None]
        loss, weight = next_token_loss(model, (targets, targets))
        assert weight == n and loss.item() == pytest.approx(n * math.log(5), rel=1e-5)
    assert sizes == {64, 128, 512}


def test_a_step_without_targets_changes_nothing(tmp_path: Path, runtime: Runtime):
    def masked(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, _ = loss_fn(model, batch)
        return loss * 0, torch.tensor(0)

    net, before = new_net(), new_net().state_dict()
    train(
        net,
        batches,
        masked,
        TrainConfig(steps=3),
        runtime=runtime,
        validate=lambda: {"val_loss": 1.0},
        path=tmp_path / "run.pth",
        metadata={},
    )
    assert same(net.state_dict(), before)


# ---- resuming


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop_at", [1, 7, 10])
def test_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, runtime: Runtime, stop_at: int, sent: signal.Signals
):
    expected, _ = run(tmp_path / "a", runtime)

    def interrupted(step: int, parts: int) -> list[Batch]:
        if step == stop_at:
            os.kill(os.getpid(), sent)
        return batches(step, parts)

    handler = signal.getsignal(sent)
    with pytest.raises(Interrupted) as stopped:
        run(tmp_path / "b", runtime, batches=interrupted)
    assert stopped.value.args == (sent,)
    assert signal.getsignal(sent) == handler
    resumed, _ = run(tmp_path / "b", runtime, resume=True)
    assert same(resumed.state_dict(), expected.state_dict())
    logs = [(tmp_path / d / "run.resume.log.jsonl").read_text() for d in "ab"]
    assert len(logs[0].split("\n")) <= len(logs[1].split("\n"))


def test_a_run_that_died_resumes_from_its_last_state(tmp_path: Path, runtime: Runtime):
    class Died(Exception):
        pass

    def dying(step: int, parts: int) -> list[Batch]:
        if step == 13:
            raise Died
        return batches(step, parts)

    expected, _ = run(tmp_path / "a", runtime)
    with pytest.raises(Died):
        run(tmp_path / "b", runtime, batches=dying)
    resumed, best = run(tmp_path / "b", runtime, resume=True)
    assert same(resumed.state_dict(), expected.state_dict())
    assert best["step"] in (5, 10, 15, 20)
    steps = [line.split(",")[0] for line in (tmp_path / "b" / "run.resume.log.jsonl").open()]
    assert steps == ['{"step": 5', '{"step": 10', '{"step": 15', '{"step": 20']


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"learning_rate": 0.5}, "train_config.learning_rate was 0.004, is 0.5"),
        ({"metadata": {"data": "b"}}, "data was a, is b"),
        ({"steps": 30}, "train_config.steps was 20, is 30"),
    ],
)
def test_another_run_is_not_resumed(
    tmp_path: Path, runtime: Runtime, changes: dict, difference: str
):
    run(tmp_path, runtime, metadata={"data": "a"})
    with pytest.raises(ValueError, match=difference):
        run(tmp_path, runtime, **{"metadata": {"data": "a"}, **changes}, resume=True)


def test_nothing_to_resume_is_an_error(tmp_path: Path, runtime: Runtime):
    with pytest.raises(FileNotFoundError, match="create it with `python "):
        run(tmp_path, runtime, resume=True)


def test_a_state_of_another_version_is_one_line(tmp_path: Path, runtime: Runtime):
    run(tmp_path, runtime)
    path = tmp_path / "run.resume.pth"
    state = load_checkpoint(path, "resume")
    del state["metadata"]["state_format"]
    save_checkpoint(path, state)
    with pytest.raises(ValueError, match=r"state_format was None, is 2.*or --overwrite"):
        run(tmp_path, runtime, resume=True)


def output_options(folder: Path, resume: bool = False, overwrite: bool = False) -> Namespace:
    return Namespace(out_dir=folder, resume=resume, overwrite=overwrite)


def test_an_unfinished_run_is_refused_by_name_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So is a missing one, and all of this holds for the model that a script starts from."""
    state = tmp_path / "b.resume.pth"
    state.write_bytes(b"158 steps")
    for files, start in ((("b.pth", "c.pth"), ""), (("a.pth",), "b.pth")):
        with pytest.raises(ValueError, match=r"b\.resume\.pth .* add --resume or --overwrite"):
            check_output(output_options(tmp_path), *files, start=start)
        check_output(output_options(tmp_path, resume=True), *files, start=start)
        check_output(output_options(tmp_path, overwrite=True), *files, start=start)
    check_output(output_options(tmp_path), "a.pth")  # another script's state
    with pytest.raises(FileNotFoundError, match=r"no .*a\.resume\.pth to resume: omit --resume"):
        check_output(output_options(tmp_path, resume=True), "a.pth")
    monkeypatch.setenv("RANK", "1")  # the first process may have begun by now
    check_output(output_options(tmp_path), "b.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["b.resume.pth"]
    assert state.read_bytes() == b"158 steps"


def test_what_will_be_replaced_is_named_with_the_models_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    check_output(output_options(tmp_path), "base.pth", "tokenizer.json")
    assert capsys.readouterr().err == ""  # nothing there, nothing to say
    adapter = {"base": "base.pth", "lora_config": {"r": 1}, "weights": {}, "tokenizer_sha256": ""}
    on_another, merged = {**adapter, "base": "other.pth"}, {**adapter, "lora_config": None}
    files = {name: {"weights": {}} for name in ("base", "linear")}
    files |= {"on it": adapter, "on other": on_another, "full": merged}
    files["unfinished.resume"] = {"metadata": adapter, "weights": {}}
    for name, content in files.items():
        save_checkpoint(tmp_path / f"{name}.pth", {"kind": name, **content})
    (tmp_path / "damaged.pth").write_bytes(b"?")
    for name in ("base.log.jsonl", "tokenizer.json"):
        (tmp_path / name).write_text("")
    check_output(output_options(tmp_path), "base.pth", "tokenizer.json")
    said = capsys.readouterr().err
    assert said == (
        f"will replace base.pth, tokenizer.json, base.log.jsonl in {tmp_path}; models that "
        "depend on it: full.pth, on it.pth, on other.pth, unfinished.resume.pth\n"
    )
    check_output(output_options(tmp_path), "base.pth")  # the tokenizer stays
    assert capsys.readouterr().err.endswith(
        f"in {tmp_path}; models that depend on it: on it.pth, unfinished.resume.pth\n"
    )
    check_output(output_options(tmp_path), "on it.pth")
    assert capsys.readouterr().err == f"will replace on it.pth in {tmp_path}\n"
    save_checkpoint(tmp_path / "base.resume.pth", {"metadata": adapter, "weights": {}})
    check_output(output_options(tmp_path, overwrite=True), "base.pth", "tokenizer.json")
    assert "base.resume" not in capsys.readouterr().err  # it is discarded, too


def test_the_log_of_a_finished_run_stays_until_the_new_result_is_whole(
    tmp_path: Path, runtime: Runtime
):
    (tmp_path / "run.log.jsonl").write_text("older")
    net, _ = run(tmp_path, runtime)
    assert (tmp_path / "run.log.jsonl").read_text() == "older"
    provenance = {"seconds": 1.0, "peak_memory_bytes": 1}
    path = str(tmp_path / "run.pth")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(training, "save_checkpoint", lambda *_: (_ for _ in ()).throw(OSError))
        save_result(path, "base", net.state_dict(), provenance=provenance)
    assert (tmp_path / "run.log.jsonl").read_text() == "older"
    save_result(path, "base", net.state_dict(), provenance=provenance)
    assert (tmp_path / "run.log.jsonl").read_text().count("\n") == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.log.jsonl", "run.pth"]


# ---- as a library


def test_training_runs_in_a_thread_and_ends_with_the_same_weights(tmp_path: Path, runtime: Runtime):
    expected, _ = run(tmp_path / "a", runtime)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as pool:
        net, _ = pool.submit(run, tmp_path / "b", runtime).result()
    assert same(net.state_dict(), expected.state_dict())
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@report_errors
def interrupted_main(argv: list[str] | None = None) -> int:
    assert command_line().startswith("python test_training.py ")
    raise Interrupted(signal.SIGINT)


def test_the_command_to_continue_is_that_of_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["somewhere/pytest", "--steps", "3", "-c"])
    before = command_line()
    for argv in (["--out-dir", "a b"], ["--overwrite", "--out-dir", "a b"]):
        for more in ([], ["--resume"]):
            assert interrupted_main([*argv, *more]) == 130
            command = "python test_training.py --out-dir 'a b' --resume"
            assert capsys.readouterr().err == f"interrupted; continue with: {command}\n"
    assert interrupted_main() == 130
    command = "python test_training.py --steps 3 -c --resume"
    assert capsys.readouterr().err == f"interrupted; continue with: {command}\n"
    assert command_line() == before == "python pytest --steps 3 -c"


def test_flags_are_not_abbreviated_and_exclude_each_other(capsys: pytest.CaptureFixture[str]):
    parser = new_parser("x")
    add_run_flags(parser, ("sample",), "a file")
    for flags, message in (
        (["--over"], "unrecognized arguments: --over"),
        (["--resume", "--overwrite"], "--overwrite: not allowed with argument --resume"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(flags)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# ---- faults


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), MemoryError()])
def test_a_file_that_cannot_be_opened_is_not_called_damaged(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def refuse(*_: object) -> None:
        raise fault

    save_checkpoint(tmp_path / "a.pth", {"kind": "base", "weights": {}})
    monkeypatch.setattr(training.zipfile, "ZipFile", refuse)
    main = report_errors(lambda _: load_checkpoint(tmp_path / "a.pth", "base"))
    assert main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "damaged" not in said
    assert ("Permission denied" if fault.args else "out of memory") in said


def test_a_full_gpu_is_not_called_a_model_that_does_not_fit(tmp_path: Path):
    save_checkpoint(tmp_path / "a.pth", {"kind": "base", "weights": {}})
    with pytest.raises(torch.OutOfMemoryError), generation.open_checkpoint(tmp_path / "a.pth"):
        raise torch.OutOfMemoryError


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_good_states(
    tmp_path: Path, runtime: Runtime
):
    net = new_net()

    def poisoned(step: int, parts: int) -> list[Batch]:
        if step == 12:
            net.head.weight.data.fill_(math.nan)
        return batches(step, parts)

    with pytest.raises(FloatingPointError, match="at step 13: lower the learning rates"):
        run(tmp_path, runtime, net, batches=poisoned)
    state = load_checkpoint(tmp_path / "run.resume.pth", "resume")
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_cut_off_checkpoints_are_named(tmp_path: Path, share: float):
    path = tmp_path / "cut.pth"
    save_checkpoint(
        path, {"format": FORMAT_VERSION, "kind": "base", "weights": {"x": torch.ones(1000)}}
    )
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.pth is damaged .*python main\.py"):
        load_checkpoint(path, "base")


def test_other_files_are_not_taken_for_a_checkpoint(tmp_path: Path):
    path = tmp_path / "a.pth"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(path, "base")
    for content, message in (
        ({"format": 1, "kind": "base"}, "of format 1"),
        ({"format": FORMAT_VERSION, "kind": "base"}, "another file \\('weights'\\)"),
        ([1, 2], "'list' object"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, "base")


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((1,), (7,)), ((3, 1), (1, 5)), ((1, 3), (1, 1)), ((2, 3), (1, 2)), ((), ())],
)
def test_tensors_of_any_strides_can_be_saved(
    tmp_path: Path, shape: tuple[int, ...], stride: tuple[int, ...]
):
    """NumPy's columns and transposes keep their strides in PyTorch, even with one element."""
    weights = {"w": torch.empty_strided(shape, stride).fill_(1.5)}
    training.save_checkpoint(tmp_path / "x.pth", {"kind": "base", "weights": weights})
    sha256 = training.load_checkpoint(tmp_path / "x.pth", "base")["weights_sha256"]
    assert sha256 == training.weights_sha256({"w": torch.full(shape, 1.5)})


def test_a_checkpoint_of_another_kind_is_not_called_damaged(tmp_path: Path):
    save_checkpoint(tmp_path / "a.pth", {"kind": "resume", "weights": {"x": torch.ones(2)}})
    with pytest.raises(ValueError, match=r"a\.pth is of kind resume, not base or classifier$"):
        load_checkpoint(tmp_path / "a.pth", ("base", "classifier"))


def test_a_file_saved_on_a_gpu_loads_without_one(tmp_path: Path):
    weights = {"weight": torch.arange(6.0)}
    save_checkpoint(tmp_path / "cpu.pth", {"kind": "base", "weights": weights})
    with (
        zipfile.ZipFile(tmp_path / "cpu.pth") as here,
        zipfile.ZipFile(tmp_path / "gpu.pth", "w") as there,
    ):
        for name in here.namelist():  # as if the tensors had lain on the first GPU
            content = here.read(name).replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0")
            there.writestr(name, content)
    assert (tmp_path / "gpu.pth").read_bytes().count(b"cuda:0") == 1
    found = load_checkpoint(tmp_path / "gpu.pth", "base")["weights"]
    assert torch.equal(found["weight"], weights["weight"])


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path):
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"format": FORMAT_VERSION, "kind": "base", "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth is damaged or another file"):
        load_checkpoint(tmp_path / "evil.pth", "base")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must lie in [1, inf), not 0"),
        ({"optimizer": "sgd"}, "muon or adamw"),
        ({"learning_rate": -1.0}, "learning_rate must lie in [0, inf), not"),
        ({"learning_rate": math.nan}, "learning_rate must lie in [0, inf), not"),
        ({"decay_fraction": 2.0}, "decay_fraction"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**{"steps": 1, **changes})


def test_precision_is_asked_of_the_hardware(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    assert bfloat16_is_faster(torch.device("cuda"))
    assert not bfloat16_is_faster(torch.device("mps"))
    assert isinstance(bfloat16_is_faster(torch.device("cpu")), bool)


@pytest.mark.parametrize(
    ("seconds", "faster", "products"), [(0.5, True, 40), (0.9, False, 40), (10.0, False, 4)]
)
def test_a_slow_precision_is_not_timed_for_long(
    seconds: float, faster: bool, products: int, monkeypatch: pytest.MonkeyPatch
):
    """Without instructions for bf16, twenty products would delay every start by four seconds."""
    timed = []

    def timeit(product, **_):
        timed.append(product.args[0].dtype)
        return seconds if timed[-1] == torch.bfloat16 else 1.0

    monkeypatch.setattr(training.timeit, "timeit", timeit)
    assert bfloat16_is_faster.__wrapped__(torch.device("cpu")) is faster
    assert len(timed) == products


def test_scripts_end_without_a_warning_where_processes_are_spawned():
    """On macOS, and on Linux from Python 3.14 on, a lock of `tqdm` is a named semaphore."""
    code = "import multiprocessing as m; m.set_start_method('spawn'); lock = m.RLock()\n"
    code += "import training; training.exit_process(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (3, "")
