"""What each part of the base model is worth: added one after the other, and left out one at a time.

    python tests/benchmarks/ladder.py [--steps 600] [--seeds 0] [--only RUN ...]

The climb starts from a bigram table and adds a part per rung until it is the recipe of `main.py`;
then each part is left out of the recipe once. All runs read the same number of tokens:
BPE reads 2.8 times as much text with them as bytes do, and sees as much more at once. A run
without Muon is trained at two rates of AdamW, and the better one counts: a rate that suits the
whole model is too high for one without norms.

Each result is written to `ladder.json` as soon as it is there, and a run that the file has is
skipped, so the same command continues after an interruption. When all runs of a length are there,
draws `assets/ladder.png`.

The regularisers (resegmentation, dropout, weight decay) delay over-fitting: only a run that reads
as much as `main.py`, 4,800 steps of 4 windows, shows what they are worth.
"""

import argparse
import itertools
import json
import math
import re
import sys
import tempfile
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import altair as alt
import pandas as pd
from recipe import measure, parse_settings
from torch import Tensor, nn

from data_loader import Corpus, atomic_write, find_data_dir, load_corpus, log0
from evaluate import markdown_table
from model import GPTConfig, GPTModel, TransformerBlock
from training import Runtime, TrainConfig, start_runtime

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("ladder.json")
COLUMNS = {  # of the table; see `by_part`
    "part": "{part}",
    "climb": "{climb:.3f}",
    "gained": "{gained:+.3f}",
    "time": "{seconds:,.0f} s",
    "recipe without it": "{without:.3f}",
    "lost": "{lost:+.3f}",
}
ATTENTION, FEED_FORWARD, RESIDUALS = "attention, one head", "feed-forward", "residuals and norms"
ZERO_START = "projections start at zero"
PARTS: dict[str, dict[str, object]] = {  # as the climb adds them: options of `main.py` without each
    ATTENTION: {},  # see `build`
    "three heads": {"n_head": 1},
    FEED_FORWARD: {},
    RESIDUALS: {},
    "four blocks": {"n_layer": 1},
    ZERO_START: {},
    "rotary positions": {"position": "learned"},
    "q/k norm": {"qk_norm": False},
    "squared ReLU": {"activation": "gelu"},
    "BPE": {"vocab_size": 258},  # bytes, which resegmentation leaves alone, and special tokens
    "Muon": {"optimizer": "adamw"},  # see `ADAMW_RATES`
    "resegmentation": {"resegment_probability": 0},
    "dropout": {"dropout": 0},
    "weight decay": {"weight_decay": 0},
}
ADAMW_RATES = (0.002, 0.008)
WINDOWS = 4  # to a step: a short training learns more in many small steps than in few large ones
MEASURED = ("nats_per_byte", "learning_rate", "best_step", "parameters", "seconds")
BIGRAM, RECIPE = "bigram table", f"add {[*PARTS][-1]}"  # the first and the last rung


class Block(nn.Module):
    """A block of the model without some of its parts."""

    def __init__(self, block: TransformerBlock, without: set[str]):
        super().__init__()
        self.attn = None if ATTENTION in without else block.attn
        self.mlp = None if FEED_FORWARD in without else block.mlp
        self.keeps_x = RESIDUALS not in without
        self.norm1 = block.norm1 if self.keeps_x and self.attn else nn.Identity()
        self.norm2 = block.norm2 if self.keeps_x and self.mlp else nn.Identity()
        self.dropout = block.dropout

    def forward(self, x: Tensor, mask: Tensor, rotary: tuple, store: None) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        if self.attn:
            x = self.keeps_x * x + self.dropout(self.attn(self.norm1(x), mask, rotary))
        if self.mlp:
            x = self.keeps_x * x + self.dropout(self.mlp(self.norm2(x)))
        return x


def build(config: GPTConfig, without: set[str]) -> GPTModel:
    """The model without some parts. Without attention and feed-forward, embedding and head remain:
    a table of bigrams, as a product of two matrices."""
    model = GPTModel(config)
    model.blocks = nn.ModuleList(Block(block, without) for block in model.blocks)
    if RESIDUALS in without:
        model.final_norm = nn.Identity()
    if without & {RESIDUALS, ZERO_START}:  # zeros would block every gradient if x were not kept
        for name, module in model.named_modules():
            if name.endswith("proj"):
                module.reset_parameters()
    return model


def all_runs() -> dict[str, set[str]]:
    """Name of each run, in order, and the parts that it lacks."""
    parts = [*PARTS]
    climb = {f"add {part}": {*parts[i + 1 :]} for i, part in enumerate(parts)}
    return {BIGRAM: {*parts}, **climb, **{f"without {part}": {part} for part in parts}}


def measure_run(
    without: set[str], steps: int, seed: int, corpus: Corpus, folder: Path, runtime: Runtime
) -> dict[str, float]:
    """Trains and measures the recipe without some parts, at its best rate; "seconds" is for one."""
    settings: dict[str, object] = {"batch_size": WINDOWS}
    settings |= {name: value for part in without for name, value in PARTS[part].items()}
    if ATTENTION in without:
        settings.pop("position", None)  # learned positions would join the table of bigrams
    runs = []
    for rate in ADAMW_RATES if "Muon" in without else (TrainConfig.learning_rate,):
        options = parse_settings({**settings, "learning_rate": rate}, steps, seed)
        found = measure(options, corpus, folder, runtime, partial(build, without=without))
        found |= {"best_step": found["best"]["step"], "learning_rate": rate}
        runs.append({name: found[name] for name in MEASURED})
    return min(runs, key=itemgetter("nats_per_byte"))


def by_part(rows: list[dict], steps: int) -> list[dict[str, Any]]:
    """For each part the climb with it and the recipe without it, in nats per byte; means over the
    seeds, NaN where a run is missing."""

    def average(run: str, value: str = "nats_per_byte") -> float:
        found = [row[value] for row in rows if (row["run"], row["steps"]) == (run, steps)]
        return mean(found or [math.nan])

    table, before, recipe = [], math.nan, average(RECIPE)
    for part, run in {BIGRAM: BIGRAM, **{part: f"add {part}" for part in PARTS}}.items():
        climb, without = average(run), average(f"without {part}")
        row = {"part": part, "climb": climb, "gained": before - climb, "without": without}
        table.append({**row, "lost": without - recipe, "seconds": average(run, "seconds")})
        before = climb
    return table


def summary(rows: list[dict], steps: int) -> str:
    """The Markdown table of the runs of this length."""
    cells = [[cell.format(**row) for cell in COLUMNS.values()] for row in by_part(rows, steps)]
    return re.sub(r"\+?\bnan( s)?", "", markdown_table([[*COLUMNS], *cells]))


def plot(rows: list[dict], steps: int) -> alt.Chart:
    """The climb on the left, what the recipe loses without each part on the right."""
    frame = pd.DataFrame(by_part(rows, steps))
    y = alt.Y("part:N", scale=alt.Scale(domain=[*frame["part"]]), title=None)  # in this order
    base = alt.Chart(frame).properties(width=330, height=alt.Step(22))
    title = "nats per byte with this part added"
    x = alt.X("climb:Q", title=title, scale=alt.Scale(zero=False))
    climb = base.encode(x=x, y=y.axis(labelLimit=200))
    labels = climb.mark_text(align="left", dx=8, dy=5).encode(
        text=alt.Text("climb:Q", format=".3f")
    )
    title = "nats per byte lost by the recipe without this part"
    lost = base.transform_filter("isValid(datum.lost)").encode(y=y.axis(labels=False))
    bars = lost.mark_bar().encode(x=alt.X("lost:Q", title=title))
    lost = lost.transform_calculate(end="max(0, datum.lost)").mark_text(align="left", dx=4)
    lost = lost.encode(x=alt.X("end:Q", title=title), text=alt.Text("lost:Q", format="+.3f"))
    return (climb.mark_line(point=True, order=False) + labels) | (bars + lost)


def main() -> None:
    """Runs what the results lack; prints and draws all of this length."""
    parser = argparse.ArgumentParser(description="What each part of the base model is worth.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", choices=all_runs(), default=[*all_runs()])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    from run import processor  # slow to import

    rows = json.loads(args.results.read_text()) if args.results.is_file() else []
    with tempfile.TemporaryDirectory() as folder, start_runtime() as runtime:
        corpus = load_corpus("tinyshakespeare", None, find_data_dir())
        machine = f"{processor()}, {runtime.describe()}"
        for seed, run in itertools.product(args.seeds, args.only):
            key = {"run": run, "steps": args.steps, "seed": seed}
            if not any(key.items() <= row.items() for row in rows):
                found = measure_run(
                    all_runs()[run], args.steps, seed, corpus, Path(folder), runtime
                )
                rows.append({**key, **found, "machine": machine})
                with atomic_write(args.results) as file:
                    file.write(json.dumps(rows, indent=1).encode() + b"\n")
                log0(f"{run}: {found['nats_per_byte']:.4f} nats per byte")
    print(summary(rows, args.steps))
    if all_runs().keys() <= {row["run"] for row in rows if row["steps"] == args.steps}:
        is_ours = args.results == RESULTS
        path = ROOT / "assets" / "ladder.png" if is_ours else args.results.with_suffix(".png")
        plot(rows, args.steps).save(path, ppi=120)


if __name__ == "__main__":
    main()
