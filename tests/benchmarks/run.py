"""Speed side by side with what people would use instead, in one run, as ratios.

    python tests/benchmarks/run.py [--quick] [--only NAME ...]

Contestants take turns; medians over the repeats, with the lowest and highest beside them. Ratios
above 1: ours is faster, or smaller. Everything that trains is measured in processes of its own.
Writes `tests/benchmarks/results.json` and prints it as a table.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # before `tokenizers` starts its threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiktoken  # noqa: E402
import torch  # noqa: E402
from gpt2_oracle import copy_into_gpt2  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from data_loader import fetch, find_data_dir  # noqa: E402
from data_utils import sample_texts  # noqa: E402
from generation import generate  # noqa: E402
from model import GPTConfig, GPTModel  # noqa: E402
from tokenizer import BPETokenizer, _patterns, plain_bpe  # noqa: E402

RESULTS = Path(__file__).with_name("results.json")
BIG_BYTES = 20_000_000
GPT2_FORM = {
    "bias": True,
    "activation": "gelu",
    "position": "learned",
    "qk_norm": False,
    "tie_weights": True,
    "dropout": 0.0,
}


class Table:
    """Measurements, each a row."""

    def __init__(self, repeats: int):
        self.repeats = repeats
        self.rows: list[dict] = []

    def race(
        self, what: str, amount: float, unit: str, repeats: int = 0, **runs: Callable[[], object]
    ) -> None:
        """Times contestants in turns, after a warm-up: `amount` of `unit` by the second.

        The first one is ours, and the others are divided by it; `unit` "s" reports seconds.
        """
        times: dict[str, list[float]] = {name: [] for name in runs}
        repeats = repeats or self.repeats
        for turn in range(repeats + (repeats > 1)):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                if turn or repeats == 1:
                    times[name].append(time.perf_counter() - started)
        if unit != "s":
            times = {name: [amount / t for t in values] for name, values in times.items()}
        self.add(what, unit, times, smaller_is_better=unit == "s")

    def add(
        self, what: str, unit: str, found: dict[str, list[float]], smaller_is_better: bool
    ) -> None:
        """A row of repeated measurements, ours first."""
        middle = {name: statistics.median(values) for name, values in found.items()}
        ours = next(iter(middle.values()))
        for name, value in middle.items():
            ratio = value / ours if smaller_is_better else ours / value
            spread = [min(found[name]), max(found[name])]
            row = {"what": what, "unit": unit, "by": name, "median": value, "spread": spread}
            self.rows.append({**row, "repeats": len(found[name]), "ratio": ratio})
            print(format_row(self.rows[-1]), flush=True)


def format_row(row: dict) -> str:
    """A line of the Markdown table."""
    low, high = row["spread"]
    return (
        f"| {row['what']} | {row['by']} | {row['median']:.4g} {row['unit']} "
        f"| {low:.4g} to {high:.4g} | {row['ratio']:.2f} |"
    )


def summary(rows: list[dict]) -> str:
    """A Markdown table with a line for each contest; its README quotes it."""
    lines = ["| what | ours | others, and the ratio |", "|---|---|---|"]
    for what in dict.fromkeys(row["what"] + row["unit"] for row in rows):
        ours, *others = (row for row in rows if row["what"] + row["unit"] == what)
        against = "; ".join(
            f"{o['by']} {o['median']:.4g} {o['unit']}: **{o['ratio']:.2f}**" for o in others
        )
        lines.append(f"| {ours['what']} | {ours['median']:.4g} {ours['unit']} | {against} |")
    return "\n".join(lines)


# ---- tokenizer


def train_with_tokenizers(text: str, vocab_size: int) -> Tokenizer:
    """The same vocabulary by Hugging Face `tokenizers`."""
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    peer.train_from_iterator([text], trainer)
    return peer


def as_tiktoken(ours: BPETokenizer) -> tiktoken.Encoding:
    """Our merges in `tiktoken`, whose ids are ranks."""
    merged = [ours.vocab[m] for _, _, m in ours.merges]
    tokens = [bytes([i]) for i in range(256)] + merged
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        "ours",
        pat_str=_patterns("gpt-2")[1].pattern,
        mergeable_ranks=ranks,
        special_tokens={},
    )


def big_text() -> str:
    """Twenty megabytes of text: the Python sources of PyTorch, in the order of their names."""
    text = ""
    for path in sorted(Path(torch.__file__).parent.rglob("*.py")):
        text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) > BIG_BYTES:
            break
    return text[:BIG_BYTES]


def benchmark_tokenizer(table: Table, shakespeare: str) -> None:
    """Training, encoding and decoding, one thread each."""
    sizes = {"1.1 MB": shakespeare, "20 MB": big_text()}
    for size, text in sizes.items():
        for merges in (1024, 4096):
            table.race(
                f"train {merges:,} merges, {size}",
                1,
                "s",
                repeats=0 if size == "1.1 MB" else 1,
                ours=lambda t=text, m=merges: BPETokenizer.train([t], m + 258),
                tokenizers=lambda t=text, m=merges: train_with_tokenizers(t, m + 256),
            )
    part = shakespeare[:100_000]  # the textbook is slow
    table.race(
        "train 1,024 merges, 0.1 MB, once",
        1,
        "s",
        repeats=1,
        ours=lambda: BPETokenizer.train([part], 1024 + 258),
        textbook=lambda: plain_bpe(part, 1024 + 256),
    )
    for size, text in sizes.items():
        text = text[:4_000_000]
        ours = BPETokenizer.train([text], 4096 + 2)
        theirs, tik = train_with_tokenizers(text, 4096), as_tiktoken(ours)
        ids, peer_ids, tik_ids = ours.encode(text), theirs.encode(text).ids, tik.encode(text)
        spelled = [ours.vocab[i] for i in ids]
        assert ids == peer_ids and spelled == tik.decode_tokens_bytes(tik_ids)

        def cold(tokenizer: BPETokenizer = ours, text: str = text) -> None:
            tokenizer._cached.cache_clear()
            tokenizer.encode(text)

        megabytes = len(text.encode()) / 1e6
        peers = {
            "tokenizers": lambda t=text, p=theirs: p.encode(t),
            "tiktoken": lambda t=text, p=tik: p.encode_ordinary(t),
        }
        what = f"encode {megabytes:.1f} MB of the {size}"
        table.race(f"{what}, cold cache", megabytes, "MB/s", ours=cold, **peers)
        warm = {"ours": lambda t=text, o=ours: o.encode(t), **peers}
        table.race(f"{what}, warm cache", megabytes, "MB/s", **warm)
        table.race(
            f"decode {megabytes:.1f} MB of the {size}",
            megabytes,
            "MB/s",
            ours=lambda i=ids, o=ours: o.decode(i),
            tokenizers=lambda i=ids, p=theirs: p.decode(i),
            tiktoken=lambda i=tik_ids, p=tik: p.decode(i),
        )


def benchmark_compression(shakespeare: str) -> list[dict]:
    """Bytes per token of the shared vocabulary by size, on text it was not learned from."""
    data_dir, cut = find_data_dir(), int(0.9 * len(shakespeare))
    texts = {"Shakespeare": shakespeare[cut:]}
    reviews, records = data_dir / "amazon_polarity_5000.jsonl", data_dir / "dolly_2500.jsonl"
    for name, path in (("reviews", reviews), ("instructions", records)):
        if path.is_file():
            lines = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:500])
            texts[name] = "\n".join(v for row in lines for v in row.values() if isinstance(v, str))
    rows = []
    for vocab_size in (512, 1024, 2048, 4096):
        for weight in (0, 1, 3):
            corpus = [shakespeare[:cut], *weight * sample_texts()]
            tokenizer = BPETokenizer.train(corpus, vocab_size)
            rates = {n: len(t.encode()) / len(tokenizer.encode(t)) for n, t in texts.items()}
            rows.append({"tokens": vocab_size, "samples counted": weight, **rates})
            print(rows[-1], flush=True)
    return rows


# ---- generation


def gpt2_pair() -> tuple[GPTModel, torch.nn.Module]:
    """GPT-2's form with 3.5 M random weights, ours and that of `transformers`."""
    torch.manual_seed(0)
    shape = {"vocab_size": 1024, "context_length": 272, "n_layer": 4, "n_head": 4, "n_embd": 256}
    model = GPTModel(GPTConfig(**shape, **GPT2_FORM)).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.mlp.proj.weight, std=0.02)
        torch.nn.init.normal_(block.attn.proj.weight, std=0.02)
    return model, copy_into_gpt2(model).eval()


def benchmark_generation(table: Table, new_tokens: int = 256) -> None:
    """Greedy decoding with the same weights: ours, `transformers`, and a loop without a cache."""
    model, peer = gpt2_pair()
    for batch in (1, 8):
        prompt = torch.tensor([[1, 2, 3]]).repeat(batch, 1)

        def ours(prompt: torch.Tensor = prompt) -> torch.Tensor:
            return torch.stack(list(generate(model, prompt, new_tokens, temperature=0)), dim=1)

        def theirs(prompt: torch.Tensor = prompt) -> torch.Tensor:
            with torch.inference_mode():
                return peer.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    eos_token_id=None,
                )[:, prompt.shape[1] :]

        def loop(prompt: torch.Tensor = prompt) -> torch.Tensor:
            tokens = prompt
            with torch.inference_mode():
                for _ in range(new_tokens):
                    tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
            return tokens[:, prompt.shape[1] :]

        assert torch.equal(ours(), theirs()) and torch.equal(ours(), loop())
        table.race(
            f"generate {new_tokens} tokens, batch {batch}",
            batch * new_tokens,
            "tokens/s",
            ours=ours,
            transformers=theirs,
            **{"no cache": loop},
        )
    speed = next(r["median"] for r in table.rows if r["what"].startswith("generate"))
    weights = 4 * sum(p.numel() for p in model.parameters())
    read = torch.ones(1 << 26)
    started = time.perf_counter()
    read.sum()
    bandwidth = 4 * len(read) / (time.perf_counter() - started)
    share = 100 * speed * weights / bandwidth
    table.add("share of memory bandwidth", "%", {"ours, batch 1": [share]}, False)


# ---- training


def benchmark_steps(table: Table) -> None:
    """Training steps in processes of their own: whole models, then adapters against peft's."""
    contests = {
        "GPT-2 form, 16 x 128, fp32": ("gpt2", "gpt2 transformers"),
        "GPT-2 form, 16 x 128, bf16": ("gpt2-bf16", "gpt2-bf16 transformers"),
        "GPT-2 form, dropout 0.1, fp32": ("gpt2-dropout", "gpt2-dropout transformers"),
        "GPT-2 form, dropout 0.1, bf16": ("gpt2-dropout-bf16", "gpt2-dropout-bf16 transformers"),
        "LoRA, sentiment": ("sentiment lora", "sentiment peft"),
        "LoRA, instructions": ("instructions lora", "instructions peft"),
        "QLoRA, instructions": ("instructions qlora", "instructions qlora-peft"),
    }
    for what, names in contests.items():
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(table.repeats):
            for name in names:
                command = [sys.executable, str(Path(__file__).with_name("steps.py"))]
                done = subprocess.run(
                    [*command, "--optimizer", "adamw", "--only", name],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
        by = dict(zip(names, ("ours", names[1].split()[-1])))
        for unit, scale in (("seconds", 1.0), ("MiB", 2**20)):
            key = "bytes" if unit == "MiB" else unit
            values = {by[n]: [row[key] / scale for row in rows] for n, rows in found.items()}
            table.add(f"step: {what}", unit, values, smaller_is_better=True)
        losses = [rows[0]["loss"] for rows in found.values()]
        same = abs(losses[0] - losses[1]) < 2e-2 * abs(losses[1])
        remark = "" if same else ", with other masks" if "dropout" in what else ", DIFFERENT"
        print(f"  losses after the steps: {losses}{remark}", flush=True)
        if names[0] in ("gpt2", "gpt2-bf16"):
            peak, flop = found[names[0]][0]["peak_flops"], found[names[0]][0]["flop"]
            shares = [100 * flop / row["seconds"] / peak for row in found[names[0]]]
            table.add(f"share of matrix-product peak: {what}", "%", {"ours": shares}, False)


BENCHMARKS = ("tokenizer", "generation", "steps")


def main() -> None:
    """Prints the tables and writes them; with --only, the other parts stay as they were."""
    parser = argparse.ArgumentParser(description="Measure speed side by side with peers.")
    parser.add_argument("--quick", action="store_true", help="one repeat; writes nothing")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    text = fetch("tinyshakespeare.txt", find_data_dir()).read_text(encoding="utf-8")
    print("| what | by | median | spread | ours against it |\n|---|---|---|---|---|")
    for name in args.only:
        table = Table(1 if args.quick else args.repeats)
        if name == "tokenizer":
            benchmark_tokenizer(table, text)
            results["bytes per token"] = benchmark_compression(text)
        elif name == "generation":
            benchmark_generation(table)
        else:
            benchmark_steps(table)
        results[name] = table.rows
    packages = ("torch", "tokenizers", "tiktoken", "transformers", "peft", "bitsandbytes")
    results["machine"] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
    if not args.quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print("\n\n".join(summary(results[name]) for name in BENCHMARKS if name in results))


def processor() -> str:
    """The processor's name, where the system tells, and the instructions that PyTorch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
