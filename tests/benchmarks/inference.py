"""Speed, memory and quality of a public base at inference, beside `transformers`.

    python tests/benchmarks/inference.py [--base smollm2-135m-instruct] [--repeats 3]

Every kind of weights runs in a process of its own; the processes take turns, and the table shows
medians. Decoding: 128 greedy tokens after a short prompt, one at a time. Prefill: one pass over 512
tokens. Memory is resident after both. Quality: bits per byte of the first 30 kB of The Wizard of
Oz. Writes `inference.json`, one entry per processor.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from data_loader import fetch, find_data_dir, log0  # noqa: E402
from evaluate import language_model_metrics  # noqa: E402
from generation import WEIGHTS, export_hf, generate, load_for_inference  # noqa: E402
from training import CPU  # noqa: E402

RESULTS = Path(__file__).with_name("inference.json")
PEERS = ("transformers fp32", "transformers bf16")
NEW_TOKENS, PREFILL_TOKENS, TEXT_BYTES = 128, 512, 30_000
PROMPT = "Once upon a time, in a small town by the sea, there lived"


def resident_bytes() -> int:
    """Memory of this process, without files that it has mapped."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def seconds(function: Any, repeats: int) -> float:
    """The shortest of several runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def read_bandwidth() -> float:
    """Bytes a second at which all threads read a large array."""
    array = torch.ones(1 << 27)
    return 4 * array.numel() / seconds(array.sum, 5)


def measure(name: str, path: Path, folder: Path, with_quality: bool) -> dict[str, float]:
    """What one contestant reaches."""
    started = time.perf_counter()
    if name in PEERS:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = torch.float32 if name.endswith("fp32") else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
        model.generation_config.eos_token_id = None

        def decode() -> torch.Tensor:
            return model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0]

        def prefill() -> None:
            model(long, use_cache=True, logits_to_keep=1)
    else:
        model, tokenizer, _ = load_for_inference(path, weights=name)
        ids = torch.tensor([tokenizer.encode(PROMPT)])

        def decode() -> torch.Tensor:
            return torch.cat([ids[0], *generate(model, ids, NEW_TOKENS, temperature=0.0)])

        def prefill() -> None:
            list(generate(model, long, 1, temperature=0.0))

    result = {"load_seconds": time.perf_counter() - started}
    long = torch.randint(1000, 40_000, (1, PREFILL_TOKENS), generator=torch.manual_seed(0))
    with torch.inference_mode():
        result["tokens"] = decode().tolist()[-NEW_TOKENS:]
        result["decode"] = NEW_TOKENS / seconds(decode, 2)
        result["prefill"] = PREFILL_TOKENS / seconds(prefill, 3)
        result["bytes"] = resident_bytes()
        if with_quality and name not in PEERS:
            text = fetch("wizard_of_oz.txt", find_data_dir(None)).read_bytes()[:TEXT_BYTES]
            ids_of_text = np.array(tokenizer.encode(text.decode(errors="ignore")))
            metrics = language_model_metrics(model, tokenizer, ids_of_text, CPU)
            result["bits_per_byte"] = metrics["bits_per_byte"]
    return result


def main() -> None:
    """Runs the contestants in turns, prints a table and stores it under this processor's name."""
    parser = argparse.ArgumentParser(description="Inference with a public base.")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="folder in models/")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = ROOT / "models" / args.base / "model_weights.pth"
    if args.only:
        name, folder, quality = args.only
        print(json.dumps(measure(name, path, Path(folder), quality == "1")))
        return
    names, found = (*PEERS, *WEIGHTS), {name: [] for name in (*PEERS, *WEIGHTS)}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "hf")
        export_hf(path, folder)
        for i in range(args.repeats):
            for name in names:
                command = [sys.executable, __file__, "--base", args.base, "--only", name]
                command += [str(folder), str(int(i == 0))]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                log0(f"{name}: {found[name][-1]['decode']:.1f} tokens/s")
    from run import processor

    keys = ("decode", "prefill", "bytes", "load_seconds")
    table = {
        n: {k: statistics.median(r[k] for r in rows) for k in keys} for n, rows in found.items()
    }
    for name in WEIGHTS:
        table[name]["bits_per_byte"] = found[name][0]["bits_per_byte"]
    same = found[PEERS[0]][0]["tokens"] == found["fp32"][0]["tokens"]
    record = {"bandwidth": read_bandwidth(), "same_tokens_in_fp32": same, "table": table}
    everything = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    everything[processor()] = record
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n")
    first = table[PEERS[0]]
    print("| weights | decode | of transformers fp32 | prefill | memory | bits per byte |")
    print("|---|---|---|---|---|---|")
    for name, row in table.items():
        ratio, quality = row["decode"] / first["decode"], row.get("bits_per_byte", "")
        print(
            f"| {name} | {row['decode']:.1f} tokens/s | {ratio:.2f} | {row['prefill']:,.0f} "
            f"tokens/s | {row['bytes'] / 2**20:,.0f} MiB | {quality and f'{quality:.4f}'} |"
        )


if __name__ == "__main__":
    main()
