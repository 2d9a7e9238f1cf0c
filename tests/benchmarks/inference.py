"""Speed, memory and quality of a public base at inference, beside `transformers`.

    python tests/benchmarks/inference.py [--base smollm2-135m-instruct] [--repeats 2]

Every kind of weights runs in a process of its own; the processes take turns, and the table shows
medians. Decoding: 128 greedy tokens after a short prompt, one at a time, then of eight equal
prompts at once. Prefill: one pass over 512 tokens. Memory is all that is resident afterwards,
mapped files included. Quality: bits per byte of the first 30 kB of The Wizard of Oz; and because
the public file was rounded to 4 bits before, the same of the shipped base on its held-out text, and
the accuracy of the shipped classifier. Writes `inference.json`, one entry per processor.

llama.cpp runs the packaged file, if `llama-cpp-python==0.3.36` is installed (pip builds it in eight
minutes) and the data directory holds that file.
"""

import argparse
import importlib.util
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

from data_loader import fetch, find_data_dir, load_corpus, log0  # noqa: E402
from evaluate import language_model_metrics, measure, rebuild_split  # noqa: E402
from generation import (  # noqa: E402
    BASE,
    FULL_CLASSIFIER,
    export_hf,
    generate,
    load_for_inference,
)
from lora import WEIGHTS  # noqa: E402
from training import CPU  # noqa: E402

RESULTS = Path(__file__).with_name("inference.json")
PEERS = ("transformers fp32", "transformers bf16")
LLAMA_CPP, GGUF = "llama.cpp Q4_1", "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS, PREFILL_TOKENS, TEXT_BYTES = 128, 512, 30_000
PROMPT = "Once upon a time, in a small town by the sea, there lived"


def resident_bytes() -> int:
    """Memory of this process, with the files that it has mapped and read."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


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


def matrix_peak(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    x = torch.ones(2048, 2048, dtype=dtype)
    return 2 * len(x) ** 3 / seconds(lambda: x @ x, 3)


def held_out_quality(weights: str) -> dict[str, float]:
    """Of the shipped models, on text that they were not trained on."""
    shipped, data_dir = ROOT / "models" / "shipped", find_data_dir(None)
    model, tokenizer, checkpoint = load_for_inference(shipped / BASE, weights=weights)
    corpus = load_corpus("tinyshakespeare", None, data_dir).split()[1]
    metrics = measure(model, tokenizer, checkpoint, corpus, CPU)
    model, tokenizer, checkpoint = load_for_inference(shipped / FULL_CLASSIFIER, weights=weights)
    reviews = rebuild_split(checkpoint, data_dir).test
    accuracy = measure(model, tokenizer, checkpoint, reviews, CPU)["accuracy"]
    return {"shipped_bits_per_byte": metrics["bits_per_byte"], "shipped_accuracy": accuracy}


def contest(name: str, path: Path, folder: Path, with_quality: bool) -> dict[str, float]:
    """What one contestant reaches."""
    started = time.perf_counter()
    if name in PEERS:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = torch.float32 if name.endswith("fp32") else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
        model.generation_config.eos_token_id = None

        def decode(batch: int = 1) -> torch.Tensor:
            prompts = ids.repeat(batch, 1)
            return model.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False)[0]

        def prefill() -> None:
            model(long, use_cache=True, logits_to_keep=1)
    else:
        model, tokenizer, _ = load_for_inference(path, weights=name)
        ids = torch.tensor([tokenizer.encode(PROMPT)])

        def decode(batch: int = 1) -> torch.Tensor:
            prompts = ids.repeat(batch, 1)
            return torch.stack([*generate(model, prompts, NEW_TOKENS, temperature=0.0)])[:, 0]

        def prefill() -> None:
            list(generate(model, long, 1, temperature=0.0))

    result = {"load_seconds": time.perf_counter() - started}
    long = torch.randint(1000, 40_000, (1, PREFILL_TOKENS), generator=torch.manual_seed(0))
    weights = {x.data_ptr(): x for x in (*model.parameters(), *model.buffers())}.values()
    result["weight_bytes"] = sum(x.numel() * x.element_size() for x in weights)
    with torch.inference_mode():
        result["tokens"] = decode().tolist()[-NEW_TOKENS:]
        result["decode"] = NEW_TOKENS / seconds(decode, 2)
        result["decode_8"] = 8 * NEW_TOKENS / seconds(lambda: decode(8), 1)
        result["prefill"] = PREFILL_TOKENS / seconds(prefill, 3)
        result["bytes"] = resident_bytes()
        if with_quality and name not in PEERS:
            text = fetch("wizard_of_oz.txt", find_data_dir(None)).read_bytes()[:TEXT_BYTES]
            ids_of_text = np.array(tokenizer.encode(text.decode(errors="ignore")))
            metrics = language_model_metrics(model, tokenizer, ids_of_text, CPU)
            result["bits_per_byte"] = metrics["bits_per_byte"]
            result |= held_out_quality(name)
    return result


def llama_cpp_contest(path: Path) -> dict[str, float]:
    """What llama.cpp reaches, one text at a time."""
    from llama_cpp import Llama

    started, n = time.perf_counter(), torch.get_num_threads()
    model = Llama(str(path), n_ctx=1024, n_threads=n, n_threads_batch=n, verbose=False)
    result = {"load_seconds": time.perf_counter() - started, "weight_bytes": path.stat().st_size}
    ids = model.tokenize(PROMPT.encode(), add_bos=False)
    long = torch.randint(1000, 40_000, (PREFILL_TOKENS,), generator=torch.manual_seed(0)).tolist()

    def decode() -> list[int]:
        model.reset()
        stream = model.generate(ids, temp=0.0)
        return [next(stream) for _ in range(NEW_TOKENS)]

    def prefill() -> None:
        model.reset()
        model.eval(long)

    result["tokens"] = decode()
    result["decode"] = NEW_TOKENS / seconds(decode, 2)
    result["prefill"] = PREFILL_TOKENS / seconds(prefill, 3)
    return result | {"bytes": resident_bytes()}


def main() -> None:
    """Runs the contestants in turns, prints a table and stores it under this processor's name."""
    parser = argparse.ArgumentParser(description="Inference with a public base.")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="folder in models/")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = ROOT / "models" / args.base / "model_weights.pth"
    if args.only:
        name, folder, quality = args.only
        if name == LLAMA_CPP:
            print(json.dumps(llama_cpp_contest(find_data_dir(None) / GGUF)))
        else:
            print(json.dumps(contest(name, path, Path(folder), quality == "1")))
        return
    has_llama = importlib.util.find_spec("llama_cpp") and (find_data_dir(None) / GGUF).is_file()
    if not has_llama:
        log0(f"without {LLAMA_CPP}: it is not installed, or the data directory has no {GGUF}")
    names = (*PEERS, *WEIGHTS, *([LLAMA_CPP] if has_llama else []))
    found = {name: [] for name in names}
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

    keys = ("decode", "decode_8", "prefill", "bytes", "weight_bytes", "load_seconds")
    table = {
        name: {k: statistics.median(r[k] for r in rows) for k in keys if k in rows[0]}
        for name, rows in found.items()
    }
    for name in WEIGHTS:
        table[name] |= {k: v for k, v in found[name][0].items() if "bits_per" in k or "acc" in k}
    same = found[PEERS[0]][0]["tokens"] == found["fp32"][0]["tokens"]
    record = {"bandwidth": read_bandwidth(), "same_tokens_in_fp32": same, "table": table}
    stored = torch.load(path, "cpu", weights_only=True, mmap=True)["weights"].items()
    sizes = (x.numel() for name, x in stored if name.startswith("blocks") and x.ndim == 2)
    record["flop_per_token"] = 2 * sum(sizes)  # of a prefill, which asks the head only once
    record["peak"] = {n: matrix_peak(getattr(torch, n)) for n in ("float32", "bfloat16")}
    everything = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    everything[processor()] = record
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n")
    print(*summaries(record), sep="\n\n")


def summaries(record: dict[str, Any]) -> tuple[str, str]:
    """The documentation's tables: rates, with ratios to `transformers` in fp32, and quality."""
    table, first = record["table"], record["table"][PEERS[0]]
    names = "weights | decode | of bandwidth | decode 8 | prefill | of peak | memory | opened in"
    rates = [f"| {names} |", "|---|---|---|---|---|---|---|---|"]
    for name, row in table.items():
        cells = [
            f"{row[key]:,.{digits}f} ({row[key] / first[key]:.2f})" if key in row else ""
            for key, digits in (("decode", 1), ("decode_8", 1), ("prefill", 0))
        ]
        share = row["decode"] * row["weight_bytes"] / record["bandwidth"]
        fp32_peak, bf16_peak = record["peak"].values()
        peak = fp32_peak if name.endswith("fp32") else max(fp32_peak, bf16_peak)
        cells.insert(1, f"{share:.0%}")
        cells.append(f"{record['flop_per_token'] * row['prefill'] / peak:.0%}")
        cells.append(f"{row['bytes'] / 2**20:,.0f} MiB ({row['bytes'] / first['bytes']:.2f})")
        cells.append(f"{row['load_seconds']:.1f} s")
        rates.append(f"| {name} | {' | '.join(cells)} |")
    quality = ["| weights | public base | shipped base | shipped classifier |", "|---|---|---|---|"]
    for name in WEIGHTS:
        bits, own_bits, accuracy = list(table[name].values())[-3:]
        quality.append(f"| {name} | {bits:.4f} | {own_bits:.4f} | {accuracy:.1%} |")
    return "\n".join(rates), "\n".join(quality)


if __name__ == "__main__":
    main()
