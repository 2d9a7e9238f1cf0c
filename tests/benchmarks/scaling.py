"""Cost against size: step time, memory and bits per byte over five models and four corpora.

    python tests/benchmarks/scaling.py [--steps 200]

Trains each pair with `main.py` on the first eighth, quarter, half or all of TinyShakespeare's
training part, for the same number of steps, and measures all of them on the same validation part
with `evaluate.py`. Writes `tests/benchmarks/scaling.json` and the plot `assets/scaling.png`, and
prints the fits: y grows as x^exponent (as in Kaplan et al. 2020, https://arxiv.org/abs/2001.08361).
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import altair as alt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from data_loader import fetch, find_data_dir  # noqa: E402
from training import load_checkpoint  # noqa: E402

WIDTHS = {48: 2, 64: 2, 96: 3, 128: 4, 192: 6}  # channels: heads
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)


def python(script: str, *arguments: str) -> str:
    """What a script of the repository prints."""
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def measure(width: int, text: str, validation: Path, steps: int, folder: Path) -> dict[str, float]:
    """Trains a model in a folder of its own and measures it."""
    out = folder / f"{width}-{len(text)}"
    out.mkdir()
    (out / "text.txt").write_text(text)
    shape = ["--n-embd", str(width), "--n-head", str(WIDTHS[width]), "--batch-size", "16"]
    shape += ["--context-length", "128", "--dropout", "0.15"]
    run = ["--steps", str(steps), "--eval-every", str(steps), "--out-dir", str(out)]
    # The usual weight decay: so short a training does not over-fit.
    python("main.py", "--data", str(out / "text.txt"), "--weight-decay", "0.1", *shape, *run)
    path = out / "model_weights.pth"
    checkpoint = load_checkpoint(path, "base")
    log = [json.loads(x) for x in path.with_suffix(".log.jsonl").read_text().splitlines()]
    first, last = log[0], log[-2]  # the last line's time has the validation in it
    options = ["perplexity", "--checkpoint", str(path), "--data", str(validation), "--json"]
    found = json.loads(python("evaluate.py", *options))
    return {
        "parameters": sum(t.numel() for t in checkpoint["weights"].values()),
        "corpus bytes": int(0.9 * len(text.encode())),  # main.py validates on the rest
        "bits per byte": found["bits_per_byte"],
        "seconds a step": (last["seconds"] - first["seconds"]) / (last["step"] - first["step"]),
        "peak memory (GiB)": checkpoint["provenance"]["peak_memory_bytes"] / 2**30,
    }


def exponent(rows: list[dict[str, float]], x: str, y: str) -> float:
    """Slope of y over x, both as logarithms."""
    logs = [[math.log(row[name]) for row in rows] for name in (x, y)]
    return float(np.polyfit(*logs, 1)[0])


def summary(exponents: dict[str, float]) -> str:
    """The fits as a Markdown table; README quotes it."""
    lines = [f"| {what} | {value:+.2f} |" for what, value in exponents.items()]
    return "\n".join(["| what grows | exponent |", "|---|---|", *lines])


def plot(rows: list[dict[str, float]]) -> alt.Chart:
    """Bits per byte, step time and memory over parameters, a line for each corpus."""
    frame = pd.DataFrame(rows)
    frame["corpus"] = [f"{n / 1e6:.2f} MB" for n in frame["corpus bytes"]]
    base = alt.Chart(frame).mark_line(point=True).properties(width=240, height=220)
    log = alt.Scale(type="log", nice=False)
    x = alt.X("parameters:Q", scale=log, axis=alt.Axis(format="~s"))
    return alt.hconcat(
        *(
            base.encode(x=x, y=alt.Y(f"{name}:Q", scale=log), color="corpus:N")
            for name in ("bits per byte", "seconds a step", "peak memory (GiB)")
        )
    )


def main() -> None:
    """Trains, measures, fits and plots."""
    parser = argparse.ArgumentParser(description="Cost against size.")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    text = fetch("tinyshakespeare.txt", find_data_dir()).read_text(encoding="utf-8")
    cut, rows = int(0.9 * len(text)), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        validation = folder / "validation.txt"
        validation.write_text(text[cut:])
        for share in SHARES:
            for width in WIDTHS:
                part = text[: int(share * cut)]
                rows.append(measure(width, part, validation, args.steps, folder))
                print(json.dumps(rows[-1]), flush=True)
    whole = [row for row in rows if row["corpus bytes"] == max(r["corpus bytes"] for r in rows)]
    largest = [row for row in rows if row["parameters"] >= 0.9 * max(r["parameters"] for r in rows)]
    fits = {f"{y} over parameters": exponent(whole, "parameters", y) for y in list(rows[0])[2:]}
    fits["bits per byte over corpus"] = exponent(largest, "corpus bytes", "bits per byte")
    results = {"steps": args.steps, "rows": rows, "exponents": fits}
    Path(__file__).with_name("scaling.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(rows).save(ROOT / "assets" / "scaling.png", ppi=120)
    print(summary(fits))


if __name__ == "__main__":
    main()
