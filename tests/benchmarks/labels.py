"""What pretraining is worth in labels: accuracy by the number of labelled reviews.

    python tests/benchmarks/labels.py [--base smollm2-135m-instruct]

A person with few labels trains and validates on that many reviews: from scratch
(`finetune_classifier.py` on the shipped base), LoRA on a public base, and TF-IDF with logistic
regression, by the scripts. All are measured on the same 1,000 reviews, the test split of the 5,000;
the last row is what the model sets record, trained on all the others. Writes `labels.json` and
`assets/labels.png`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("labels.json")
sys.path.insert(0, str(ROOT))

import altair as alt  # noqa: E402
import pandas as pd  # noqa: E402

from data_loader import Review, find_data_dir, load_reviews, log0  # noqa: E402
from data_utils import split_examples  # noqa: E402
from evaluate import baseline_metrics, load_linear_baseline, measure_file  # noqa: E402
from generation import FULL_CLASSIFIER, LINEAR_BASELINE, LORA_CLASSIFIER  # noqa: E402
from training import Runtime, load_checkpoint, start_runtime  # noqa: E402

EPOCHS = {250: 4, 1000: 2}  # of the public base; the default of one would be too few steps
SHIPPED = ROOT / "models" / "shipped"
NAMES = ("TF-IDF + logistic regression", "from scratch, 2.6 M parameters", "public base, LoRA")


def write_rows(path: Path, rows: list[Review]) -> None:
    """Labelled texts as JSON Lines."""
    lines = (json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def measure(n: int, folder: Path, base: str, runtime: Runtime) -> list[float]:
    """Accuracies of the three models that learn from `n` reviews, a tenth of them to validate."""
    found = load_reviews("auto", None, find_data_dir(None), 5_000)
    split = split_examples(found)
    data, test = folder / "train.jsonl", folder / "test.jsonl"
    rows = [*split.train, *split.validation]
    write_rows(data, rows[: n * 5 // 4])  # the scripts set a fifth of a file apart for a test
    write_rows(test, split.test)
    scratch, public = folder / "scratch", folder / "public"
    commands = [
        ["finetune_classifier.py", "--base", SHIPPED / "model_weights.pth", "--out-dir", scratch],
        ["finetune_lora_classifier.py", "--base", base, "--out-dir", public],
    ]
    commands[1] += ["--epochs", str(EPOCHS[n])]
    for command in commands:
        command = [sys.executable, *map(str, command), "--data", str(data)]
        subprocess.run(command, check=True, cwd=ROOT)
    linear, _, checkpoint = load_linear_baseline(public / LINEAR_BASELINE)
    linear = baseline_metrics(linear, split, checkpoint["labels"])[NAMES[0]]
    paths = (scratch / FULL_CLASSIFIER, public / LORA_CLASSIFIER)
    found = [measure_file("sentiment", path, test, runtime) for path in paths]
    return [row["accuracy"] for row in (linear, *found)]


def recorded(base: str) -> list[float]:
    """Accuracies that the model sets record for all reviews."""
    paths = (
        SHIPPED / LINEAR_BASELINE,
        SHIPPED / FULL_CLASSIFIER,
        ROOT / "models" / base / LORA_CLASSIFIER,
    )
    kinds = ("linear", "classifier", "lora_classifier")
    return [load_checkpoint(p, kinds)["metrics"]["test"]["accuracy"] for p in paths]


def summary(table: dict[str, list[float]]) -> str:
    """The table in Markdown."""
    lines = [["labels", *NAMES], ["---"] * 4]
    lines += [[f"{int(n):,}", *(f"{x:.1%}" for x in row)] for n, row in table.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace(" --- ", "---")


def plot(table: dict[str, list[float]]) -> alt.Chart:
    """Accuracy over the number of labels, a line for each model."""
    rows = [(int(n), name, x) for n, row in table.items() for name, x in zip(NAMES, row)]
    frame = pd.DataFrame(rows, columns=["labelled reviews", "model", "accuracy"])
    x = alt.X(
        "labelled reviews:Q", scale=alt.Scale(type="log"), axis=alt.Axis(values=[*map(int, table)])
    )
    y = alt.Y("accuracy:Q", scale=alt.Scale(zero=False), axis=alt.Axis(format=".0%"))
    legend = alt.Legend(orient="bottom", columns=1, labelLimit=300)
    chart = alt.Chart(frame).mark_line(point=True).properties(width=420, height=260)
    return chart.encode(x=x, y=y, color=alt.Color("model:N", sort=NAMES, legend=legend))


def main() -> None:
    """Measures, writes and draws the table."""
    parser = argparse.ArgumentParser(description="Accuracy by the number of labels.")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="folder in models/")
    args = parser.parse_args()
    table = {}
    with start_runtime() as runtime:
        for n in EPOCHS:
            with tempfile.TemporaryDirectory() as folder:
                table[str(n)] = measure(n, Path(folder), args.base, runtime)
            log0(f"{n} labels: {table[str(n)]}")
    table["4000"] = recorded(args.base)
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")
    plot(table).save(ROOT / "assets" / "labels.png", ppi=120)
    print(summary(table))


if __name__ == "__main__":
    main()
