"""The house rules: who imports whom, documentation, help texts."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [  # every page of documentation
    ROOT / "README.md",
    ROOT / "tests" / "README.md",
    ROOT / "tests" / "benchmarks" / "README.md",
    ROOT / "models" / "shipped" / "README.md",
    ROOT / "models" / "smollm2-135m-instruct" / "README.md",
    ROOT / ".github" / "CONTRIBUTING.md",
]
PROSE = "\n".join(path.read_text(encoding="utf-8") for path in DOCS)
sys.path.append(str(ROOT / "tests" / "benchmarks"))
import inference  # noqa: E402
import labels  # noqa: E402
import ladder  # noqa: E402
import public_steps  # noqa: E402
import run  # noqa: E402
import scaling  # noqa: E402
import steps  # noqa: E402

from training import CPU  # noqa: E402

SCRIPTS = [
    "main",
    "generation",
    "evaluate",
    "finetune_classifier",
    "finetune_lora_classifier",
    "finetune_qlora_instructions",
]
MAY_IMPORT = {  # arrows point down: data flows the other way, once
    "data_loader": set(),
    "model": set(),
    "lora": set(),
    "tokenizer": {"data_loader"},  # to write a file atomically
    "training": {"data_loader"},  # to write a file atomically, and to log
    "data_utils": {"tokenizer", "data_loader"},
    "generation": {"model", "lora", "tokenizer", "data_utils", "data_loader", "training"},
}
MAY_IMPORT["evaluate"] = {*MAY_IMPORT}
MAY_IMPORT["main"] = {*MAY_IMPORT} - {"lora", "main"}
MAY_IMPORT["finetune_classifier"] = {*MAY_IMPORT} - {"main"}
MAY_IMPORT["finetune_qlora_instructions"] = {*MAY_IMPORT} - {"main", "finetune_classifier"}
MAY_IMPORT["finetune_lora_classifier"] = {
    *("finetune_classifier", "lora", "generation", "training", "data_loader")
}
MAY_IMPORT["app"] = {
    *("generation", "evaluate", "data_loader", "data_utils", "tokenizer", "lora", "model")
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & {file.stem for file in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_imports_only_what_it_may(path: Path):
    assert imports(path) <= MAY_IMPORT[path.stem]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_public_names_are_documented_and_typed(path: Path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in [*tree.body, *(method for c in classes for method in c.body)]:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        assert ast.get_docstring(node), f"{path.name}: {node.name}"
        if isinstance(node, ast.FunctionDef):
            arguments = [a for a in [*node.args.args, *node.args.kwonlyargs] if a.arg != "self"]
            missing = [a.arg for a in arguments if a.annotation is None and a.arg != "cls"]
            assert not missing and node.returns is not None, f"{path.name}: {node.name} {missing}"
            types = [ast.unparse(a.annotation) for a in arguments if a.annotation]
            assert not {"Path", "Path | None"} & {*types}, f"{path.name}: {node.name} takes no str"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_default(name: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "default" in text and "None" not in text
    assert not re.search(r"[A-Z] \(default", text), "an option without a word on it"


def test_every_option_in_the_documentation_is_one_of_its_command(
    capsys: pytest.CaptureFixture[str],
):
    commands = re.findall(r"(?:python|nproc_per_node=\d) ([a-z_]+)\.py((?: [^`\n]*)?)", PROSE)
    assert len(commands) > 20
    for name, rest in commands:
        tasks = [w for w in rest.split() if w in ("perplexity", "sentiment", "instructions")]
        with pytest.raises(SystemExit):
            importlib.import_module(name).main([*tasks, "--help"])
        shown = capsys.readouterr().out
        for flag in re.findall(r"--[a-z-]+", rest):
            assert re.search(rf"{flag}\b", shown), f"{name}.py {rest}: no {flag}"


def test_every_test_that_the_documentation_names_is_there():
    defined = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", PROSE))
    assert len(named) > 30 and not [name for name in named if f"def {name}(" not in defined]


def test_the_tour_names_what_is_there_in_reading_order():
    stops = re.findall(r"^\| `([a-z_]+)\.py:(\w+)` \|", README, re.MULTILINE)
    assert {file for file, _ in stops} == {path.stem for path in FILES} - {
        "finetune_lora_classifier"  # only what differs
    }
    lines: dict[str, list[int]] = {}
    for file, name in stops:
        source = (ROOT / f"{file}.py").read_text().split("\n")
        (line,) = (i for i, text in enumerate(source) if re.match(rf"(def|class) {name}\b", text))
        lines.setdefault(file, []).append(line)
    assert all(found == sorted(found) for found in lines.values())


def test_the_idea_comes_first():
    for file, idea, within in (
        ("training", "loss.backward()", 200),
        ("model", "class CausalSelfAttention", 30),
        ("tokenizer", "def plain_bpe", 60),
    ):
        before, _, _ = (ROOT / f"{file}.py").read_text().partition(idea)
        assert before.count("\n") < within, file


def test_the_readme_is_short_and_its_links_lead_somewhere():
    assert README.count("\n") <= 250
    for path in DOCS:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{path}: {link}"


def test_the_documentation_quotes_the_benchmarks():
    results = json.loads((ROOT / "tests" / "benchmarks" / "results.json").read_text())
    assert all(run.summary(results[name]) in PROSE for name in run.BENCHMARKS)
    fits = json.loads((ROOT / "tests" / "benchmarks" / "scaling.json").read_text())["exponents"]
    assert scaling.summary(fits) in PROSE
    accuracies = json.loads(labels.RESULTS.read_text())
    assert PROSE.count(labels.summary(accuracies)) == 2  # of the benchmarks, and a model card
    for accuracy in accuracies["250"]:
        assert f"{accuracy:.1%}".replace("%", " %") in README
    for rows in json.loads(public_steps.RESULTS.read_text()).values():
        assert public_steps.summary(rows) in PROSE
    machines = [*map(inference.summaries, json.loads(inference.RESULTS.read_text()).values())]
    assert all(rates in PROSE for rates, _ in machines)
    assert machines[0][1] in PROSE  # the quality of the weights
    rows = json.loads(ladder.RESULTS.read_text())
    assert ladder.summary(rows, 600).strip() in PROSE
    longer = [f" {row['nats_per_byte']:.3f}" for row in rows if row["steps"] > 600]
    assert longer and all(number in PROSE for number in longer)


@pytest.mark.parametrize(
    ("task", "ours", "peer"),
    [
        ("sentiment", "lora", "peft"),
        ("instructions", "lora", "peft"),
        ("instructions", "qlora", "qlora-peft"),
    ],
)
def test_the_benchmark_trains_the_same_adapters_with_peft(task, ours, peer):
    results = []
    for method in (ours, peer):
        torch.manual_seed(0)
        model, batch, loss_fn = steps.adapter_task(task, method, CPU)
        loss, _ = loss_fn(model.eval(), tuple(tensor[:2] for tensor in batch))
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append(torch.stack([loss.detach(), nn.utils.get_total_norm(gradients)]))
    torch.testing.assert_close(*results)


def test_versions_are_pinned():
    names = ("requirements.txt", "requirements-dev.txt")
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    assert "torch==2.13.0" in lines and "-r requirements.txt" in lines
    assert all("==" in line or line.startswith("-r") for line in lines)


def test_plain_text_only():
    for path in [*FILES, *ROOT.glob("tests/*.py"), *DOCS]:
        text = path.read_text(encoding="utf-8")
        assert not re.search("[\U0001f300-\U0001faff\u2600-\u27bf]", text), path.name
