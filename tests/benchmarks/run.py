"""Speed side by side with what people would use instead, in one run, as ratios.

    python tests/benchmarks/run.py [--quick] [--data FILE]

Each measurement alternates between us and the peer and takes the median; above 1 we are faster.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"  # before `tokenizers` starts its threads
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from gpt2_oracle import copy_into_gpt2  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402

from data_loader import fetch_tiny_shakespeare, find_data_dir, read_jsonl, sample_texts  # noqa: E402
from generation import generate  # noqa: E402
from model import GPTConfig, GPTModel  # noqa: E402
from tokenizer import BPETokenizer  # noqa: E402


def medians(repeats: int, **contestants: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each contestant, after a warm-up, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, function in contestants.items():
            started = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def train_with_tokenizers(text: str, vocab_size: int) -> Tokenizer:
    """The same vocabulary by Hugging Face `tokenizers`."""
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
    )
    peer.train_from_iterator([text], trainer)
    return peer


def benchmark_tokenizer(text: str, repeats: int) -> None:
    """Training and encoding against `tokenizers`, one thread each."""
    megabytes = len(text.encode()) / 1e6
    for vocab_size in (1024, 4096):
        seconds = medians(
            repeats,
            ours=lambda v=vocab_size: BPETokenizer.train([text], v, special_tokens=()),
            theirs=lambda v=vocab_size: train_with_tokenizers(text, v),
        )
        report(f"train {vocab_size:,} tokens on {megabytes:.1f} MB", "s", seconds)
        ours = BPETokenizer.train([text], vocab_size, special_tokens=())
        peer = train_with_tokenizers(text, vocab_size)
        cold, theirs_cold = ours.encode(text), peer.encode(text).ids

        def encode_cold(tokenizer: BPETokenizer = ours) -> None:
            tokenizer._cache.clear()
            tokenizer.encode(text)

        seconds = medians(
            repeats,
            ours=encode_cold,
            theirs=lambda p=peer: p.encode(text),
            warm=lambda t=ours: t.encode(text),
        )
        speeds = {name: megabytes / value for name, value in seconds.items()}
        print(
            f"  encode, {vocab_size:,} tokens: {speeds['ours']:.2f} MB/s with a cold cache, "
            f"{speeds['warm']:.2f} with a warm one; tokenizers {speeds['theirs']:.2f}: ratios "
            f"{speeds['ours'] / speeds['theirs']:.1f} and {speeds['warm'] / speeds['theirs']:.1f}; "
            f"{len(cold):,} and {len(theirs_cold):,} tokens"
        )


def benchmark_compression(text: str, data_dir: Path) -> None:
    """Bytes per token of the shared vocabulary by size, on text it was not learned from."""
    cut = int(0.9 * len(text.encode()))
    texts = {"Shakespeare": text.encode()[cut:].decode(errors="ignore")}
    reviews, records = data_dir / "amazon_polarity_5000.jsonl", data_dir / "dolly_2500.jsonl"
    if reviews.is_file() and records.is_file():
        rows = read_jsonl(reviews)[:1000]
        texts["reviews"] = "\n".join(f"{r['title']}\n{r['content']}" for r in rows)
        rows = read_jsonl(records)[:500]
        texts["instructions"] = "\n".join(
            f"{r['instruction']}\n{r['context']}\n{r['response']}" for r in rows
        )
    else:
        print(f"  (no reviews and instructions in {data_dir}: Shakespeare only)")
    samples = list(sample_texts().values())
    for vocab_size in (512, 1024, 2048, 4096):
        for weight in (0, 1, 3):
            corpus, weights = [text.encode()[:cut].decode(), *samples], [1, weight, weight]
            tokenizer = BPETokenizer.train(corpus, vocab_size, weights)
            rates = (
                f"{name} {len(t.encode()) / len(tokenizer.encode(t)):.2f}"
                for name, t in texts.items()
            )
            print(f"  {vocab_size:,} tokens, samples x {weight}: {', '.join(rates)} bytes a token")


def report(what: str, unit: str, seconds: dict[str, float]) -> None:
    """Prints our time, theirs, and the ratio."""
    ratio = seconds["theirs"] / seconds["ours"]
    print(
        f"  {what}: {seconds['ours']:.2f} {unit}, theirs {seconds['theirs']:.2f}: ratio {ratio:.2f}"
    )


def benchmark_generation(repeats: int, new_tokens: int = 240) -> None:
    """Greedy decoding with the same weights: ours, `transformers`, and a loop without a cache."""
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=1024,
        context_length=256,
        n_layer=4,
        n_head=4,
        n_embd=256,
        dropout=0.0,
        bias=True,
        activation="gelu",
        position="learned",
        qk_norm=False,
        tie_weights=True,
    )
    model = GPTModel(config).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.mlp.proj.weight, std=0.02)
        torch.nn.init.normal_(block.attn.proj.weight, std=0.02)
    peer = copy_into_gpt2(model).eval()
    prompt = torch.tensor([[1, 2, 3]])

    def ours() -> list[int]:
        return [t.item() for t in generate(model, prompt, new_tokens, temperature=0)]

    def theirs() -> list[int]:
        with torch.inference_mode():
            out = peer.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        return out[0, prompt.shape[1] :].tolist()

    def loop() -> list[int]:
        tokens = prompt
        with torch.inference_mode():
            for _ in range(new_tokens):
                tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
        return tokens[0, prompt.shape[1] :].tolist()

    equal = ours() == theirs() == loop()
    seconds = medians(repeats, ours=ours, theirs=theirs, loop=loop)
    speeds = {name: new_tokens / value for name, value in seconds.items()}
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"  generate {new_tokens} tokens, {size:.1f} M parameters: {speeds['ours']:.0f} tokens/s, "
        f"transformers {speeds['theirs']:.0f}, no cache {speeds['loop']:.0f}: ratios "
        f"{speeds['ours'] / speeds['theirs']:.1f} and {speeds['ours'] / speeds['loop']:.1f}; "
        f"{'equal' if equal else 'DIFFERENT'} tokens"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Measure speed side by side with peers.")
    parser.add_argument("--quick", action="store_true", help="one repeat instead of five")
    parser.add_argument("--data", type=Path, help="text to encode; else TinyShakespeare")
    args = parser.parse_args()
    repeats = 1 if args.quick else 5
    path = args.data or fetch_tiny_shakespeare(find_data_dir())
    print(f"{repeats} repeats, torch {torch.__version__}, {torch.get_num_threads()} threads")
    text = path.read_text(encoding="utf-8")
    benchmark_compression(text, find_data_dir())
    benchmark_tokenizer(text, repeats)
    benchmark_generation(repeats)


if __name__ == "__main__":
    main()
