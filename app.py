"""The dashboard: every model of this repository in a browser.

    streamlit run app.py

Reads the checkpoints, logs and `report.json` in `models/`, or in the folder that the environment
variable GPT_MODELS_DIR names. User interface only: no training, no maths of its own.
"""

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st
import torch

from data_loader import read_jsonl
from data_utils import EncodedInstruction, collate_instructions, encode_prompt
from evaluate import (
    CLASSES,
    LINEAR_BASELINE,
    answer,
    class_probabilities,
    load_classifier,
    load_instruction_model,
    load_linear_baseline,
    report_tables,
)
from generation import continue_prompt, load_language_model, token_probabilities
from model import GPTModel
from tokenizer import END_OF_TEXT, BPETokenizer
from training import Runtime

MODELS = Path(os.environ.get("GPT_MODELS_DIR") or Path(__file__).parent / "models")
CPU = Runtime(torch.device("cpu"), torch.float32)
MAX_CHARACTERS = 2_000
MAX_ROWS = 10_000
SHOWN_TOKENS, ATTENTION_TOKENS = 15, 32
REFRESH_SECONDS = 3.0
CHART_COLOR = "#3a7ca5"


# ---- what the pages share


@st.cache_resource(max_entries=8, show_spinner="Loading the model")
def _load(path: Path, changed: float, _load: Callable) -> Any:
    """A model that all sessions read and none changes; loaded anew when its file changes."""
    return _load(path)


def loaded(load: Callable, name: str) -> Any:
    """What `load` makes of a file in the models folder, kept in memory."""
    path = MODELS / name
    return _load(path, path.stat().st_mtime if path.is_file() else 0.0, load)


def load_instructions_model(path: Path) -> Any:
    """As `load_instruction_model`, on the CPU."""
    return load_instruction_model(path, CPU)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Shows what is missing or refused, with the command that mends it, instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        st.error(str(error))


def stream_text(
    key: str, ids: Callable[[], Iterator[int]], tokenizer: BPETokenizer, start: str = ""
) -> None:
    """Shows text as it is sampled; what was shown stays when a button interrupts it."""
    place, speed = st.empty(), st.empty()
    state = st.session_state
    if state.pop(f"{key}-go", False):
        state[key], state[f"{key}-speed"] = start, ""
        begun, n = time.perf_counter(), 0

        def counted() -> Iterator[int]:
            nonlocal n
            for token_id in ids():
                n += 1
                yield token_id

        for piece in tokenizer.decode_stream(counted()):
            state[key] += piece
            seconds = time.perf_counter() - begun
            state[f"{key}-speed"] = f"{n} tokens, {n / seconds:.0f} tokens per second"
            place.code(state[key], language=None, wrap_lines=True)
            speed.caption(state[f"{key}-speed"])
    if key in state:
        place.code(state[key], language=None, wrap_lines=True)
        speed.caption(state[f"{key}-speed"])


def request(key: str) -> None:
    """Notes that a button asked for a text; the page then streams it."""
    st.session_state[f"{key}-go"] = True


def bars(frame: pd.DataFrame, x: str, y: str, x_format: str = ".0%") -> alt.Chart:
    """A horizontal bar for each row of a table, in its order."""
    return (
        alt.Chart(frame)
        .mark_bar(color=CHART_COLOR)
        .encode(
            x=alt.X(x, type="quantitative", axis=alt.Axis(format=x_format)),
            y=alt.Y(y, type="nominal", sort=None),
            tooltip=[y, x],
        )
    )


def printable(token: bytes) -> str:
    """A token's text with spaces and line ends made visible."""
    text = token.decode(errors="replace")
    return text.replace(" ", "\u00b7").replace("\n", "\u21b5")


# ---- pages


def generate_page() -> None:
    """Text from the base model, and what it expects next."""
    st.title("Generate")
    st.write("The base model continues your text, a token at a time, in the manner of Shakespeare.")
    with errors_as_messages():
        model, tokenizer, _ = loaded(load_language_model, "model_weights.pth")
        prompt = st.text_area("Prompt", "ROMEO:", max_chars=MAX_CHARACTERS)
        left, middle, right = st.columns(3)
        temperature = left.slider("Temperature", 0.0, 2.0, 0.8, 0.05, help="0 takes the likeliest")
        length = left.slider("Tokens", 10, 500, 200, 10)
        top_p = middle.slider(
            "Top-p", 0.05, 1.0, 0.95, 0.05, help="Share of probability drawn from"
        )
        top_k = middle.slider("Top-k", 0, 200, 0, help="Likeliest tokens drawn from; 0 is all")
        seed = right.number_input("Seed", 0, 2**31, 0, help="The same seed gives the same text")
        run, stop = st.columns([1, 5])
        run.button("Generate", type="primary", on_click=request, args=("generated",))
        stop.button("Stop")  # any button ends the run that streams
        sampling = {
            "temperature": temperature,
            "top_k": top_k or None,
            "top_p": top_p,
            "seed": seed,
        }
        stream_text(
            "generated",
            lambda: continue_prompt(model, tokenizer, prompt, length, **sampling),
            tokenizer,
            prompt,
        )
        show_next_tokens(model, tokenizer, prompt)
        show_attention(model, tokenizer, prompt)


def show_next_tokens(model: GPTModel, tokenizer: BPETokenizer, prompt: str) -> None:
    """Chart of the likeliest tokens after a prompt."""
    ids = tokenizer.encode(prompt)[-model.config.context_length :]
    if not ids:
        return
    with torch.inference_mode():
        probabilities = token_probabilities(model(torch.tensor([ids]))[:, -1])[0]
    top = probabilities.topk(SHOWN_TOKENS)
    names = [f"{printable(tokenizer.vocab[i])}  ({i})" for i in top.indices.tolist()]
    st.subheader("Next token")
    st.write("The likeliest tokens after the prompt, before temperature, top-k and top-p.")
    frame = pd.DataFrame({"probability": top.values.tolist(), "token (id)": names})
    st.altair_chart(bars(frame, "probability", "token (id)"))


def show_attention(model: GPTModel, tokenizer: BPETokenizer, prompt: str) -> None:
    """Map of where a head looks, for the first tokens of a prompt."""
    ids = tokenizer.encode(prompt)[: min(ATTENTION_TOKENS, model.config.context_length)]
    if not ids:
        return
    st.subheader("Attention")
    st.write("How much each token (row) attends to itself and those before it (columns).")
    left, right = st.columns(2)
    layer = left.selectbox("Layer", range(1, model.config.n_layer + 1))
    head = right.selectbox("Head", range(1, model.config.n_head + 1))
    weights = model.attention_maps(torch.tensor([ids]))[layer - 1, 0, head - 1].tolist()
    names = [f"{i:2d} {printable(tokenizer.vocab[t])}" for i, t in enumerate(ids)]
    rows = [
        {"from": names[i], "to": names[j], "weight": weights[i][j]}
        for i in range(len(ids))
        for j in range(i + 1)
    ]
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_rect()
        .encode(
            x=alt.X("to:N", sort=None, title="attends to"),
            y=alt.Y("from:N", sort=None, title="token"),
            color=alt.Color("weight:Q", scale=alt.Scale(domain=[0, 1], scheme="blues")),
            tooltip=["from", "to", alt.Tooltip("weight", format=".3f")],
        )
        .properties(height=max(200, 22 * len(ids)))
    )
    st.altair_chart(chart)


CLASSIFIERS = {
    "Full fine-tuning": "finetuned_classifier_weights.pth",
    "LoRA": "lora_classifier_weights.pth",
    "TF-IDF + logistic regression": LINEAR_BASELINE,
}


def classify(name: str, texts: list[str]) -> list[float]:
    """Probability that each text is positive, by one of `CLASSIFIERS`."""
    if CLASSIFIERS[name] == LINEAR_BASELINE:
        linear, _ = loaded(load_linear_baseline, LINEAR_BASELINE)
        return linear.predict_proba(texts)[:, 1].tolist()
    model, tokenizer, _ = loaded(load_classifier, CLASSIFIERS[name])
    return class_probabilities(model, tokenizer, texts, CPU)[:, 1].tolist()


def sentiment_page() -> None:
    """A review judged by three classifiers, or a file of them by one."""
    st.title("Sentiment")
    st.write("Is a product review positive? Two fine-tuned models and a linear one beside them.")
    default = "Stopped working after two days, and nobody answered my letters."
    text = st.text_area("Review", default, max_chars=MAX_CHARACTERS)
    if text.strip():
        for column, name in zip(st.columns(len(CLASSIFIERS)), CLASSIFIERS):
            with column, errors_as_messages():
                (positive,) = classify(name, [text])
                verdict = CLASSES[positive >= 0.5]
                st.metric(
                    name, verdict, f"{max(positive, 1 - positive):.0%} sure", delta_color="off"
                )
                frame = pd.DataFrame({"probability": [1 - positive, positive], "class": CLASSES})
                chart = bars(frame, "probability", "class")
                st.altair_chart(
                    chart.encode(x=alt.X("probability", scale=alt.Scale(domain=[0, 1])))
                )
    else:
        st.info("Write a review to have it judged.")
    batch_mode()


def batch_mode() -> None:
    """Predictions for the rows of a file."""
    st.subheader("A file of reviews")
    st.write(
        f"CSV or JSONL with a column `text`, or `title` and `content`; {MAX_ROWS:,} rows at most."
    )
    name = st.selectbox("Classifier", list(CLASSIFIERS))
    file = st.file_uploader("File", type=["csv", "jsonl"])
    if file is None:
        return
    with errors_as_messages():
        frame = read_table(file.name, file.getvalue())
        texts = review_texts(frame)
        with st.spinner(f"Judging {len(texts):,} reviews"):
            positive = classify(name, texts)
        frame["prediction"] = [CLASSES[p >= 0.5] for p in positive]
        frame["probability_positive"] = [round(p, 4) for p in positive]
        st.dataframe(frame)
        csv = file.name.endswith(".csv")
        content = frame.to_csv(index=False) if csv else frame.to_json(orient="records", lines=True)
        st.download_button("Download with predictions", content, f"predictions-{file.name}")


def read_table(name: str, content: bytes) -> pd.DataFrame:
    """Rows of an uploaded CSV or JSONL file.

    Raises:
        ValueError: It cannot be read, or has too many rows.
    """
    try:
        text = content.decode("utf-8-sig")
        if name.endswith(".csv"):
            frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        else:
            lines = [json.loads(line) for line in text.split("\n") if line.strip()]
            frame = pd.DataFrame(lines)
    except (ValueError, RecursionError) as error:  # pandas' and json's errors are ValueErrors
        raise ValueError(f"{name} cannot be read: {str(error).splitlines()[0]}") from None
    if not 0 < len(frame) <= MAX_ROWS:
        raise ValueError(f"{name} has {len(frame):,} rows; between 1 and {MAX_ROWS:,} are possible")
    return frame


def review_texts(frame: pd.DataFrame) -> list[str]:
    """The text of each row.

    Raises:
        ValueError: There is no such column, or a row has no text.
    """
    names = ["text"] if "text" in frame else [n for n in ("title", "content") if n in frame]
    if not names:
        raise ValueError("the file needs a column text, or title and content")
    columns = [frame[name].fillna("").astype(str) for name in names]
    texts = ["\n".join(part for part in row if part.strip()) for row in zip(*columns)]
    if empty := [i for i, text in enumerate(texts, 1) if not text.strip()]:
        raise ValueError(f"{len(empty):,} rows have no text, the first is row {empty[0]}")
    return [text[: 10 * MAX_CHARACTERS] for text in texts]


def instructions_page() -> None:
    """The untouched base and the fine-tuned model answer side by side."""
    st.title("Instructions")
    st.write("The same prompt for the base, which knows plays alone, and after QLoRA on Dolly.")
    task = st.text_area("Instruction", "Name three things to take to the beach.", max_chars=500)
    context = st.text_area("Context, if it is about a text", "", max_chars=MAX_CHARACTERS)
    left, right = st.columns(2)
    temperature = left.slider("Temperature", 0.0, 2.0, 0.7, 0.05)
    seed = right.number_input("Seed", 0, 2**31, 0)
    run, stop = st.columns([1, 5])
    keys = ("base-answer", "qlora-answer")
    run.button("Answer", type="primary", on_click=lambda: [request(key) for key in keys])
    stop.button("Stop")
    files = ("model_weights.pth", "qlora_instruction_weights.pth")
    loaders = (load_language_model, load_instructions_model)
    titles = ("Base", "QLoRA")
    for column, title, key, name, load in zip(st.columns(2), titles, keys, files, loaders):
        with column, errors_as_messages():
            st.subheader(title)
            model, tokenizer, _ = loaded(load, name)
            stream_text(
                key,
                lambda m=model, t=tokenizer: answer(
                    m, t, task, context, temperature=temperature, seed=seed
                ),
                tokenizer,
            )
    with errors_as_messages(), st.expander("Template and token mask"):
        show_template(task, context)


def show_template(task: str, context: str) -> None:
    """The prompt as the model reads it, and which of its targets carry loss."""
    _, tokenizer, _ = loaded(load_language_model, "model_weights.pth")
    prompt = encode_prompt(task, context, tokenizer)
    st.code(tokenizer.decode(prompt), language=None)
    response = st.text_input(
        "A response to learn from", "A towel, a book, and a hat.", max_chars=200
    )
    ids = [*tokenizer.encode(response), tokenizer.special_tokens[END_OF_TEXT]]
    inputs, targets = collate_instructions([EncodedInstruction(prompt, ids)], tokenizer, 0)
    rows = [
        {
            "input": printable(tokenizer.vocab[i]),
            "target": printable(tokenizer.vocab[t if t >= 0 else n]),
            "carries loss": t >= 0,
        }
        for i, t, n in zip(inputs[0].tolist(), targets[0].tolist(), (prompt + ids)[1:])
    ]
    st.dataframe(pd.DataFrame(rows), height=300)


def tokenizer_page() -> None:
    """Text cut into tokens, and how a word's merges build it."""
    st.title("Tokenizer")
    st.write("Byte-level BPE: the pieces that the models read, learned from the training text.")
    with errors_as_messages():
        tokenizer = loaded(BPETokenizer.load, "tokenizer.json")
        text = st.text_area(
            "Text", "Shall I compare thee to a summer's day?", max_chars=MAX_CHARACTERS
        )
        ids = tokenizer.encode(text)
        if not ids:
            st.info("Write some text to see its tokens.")
            return
        colors = ("blue", "green", "orange", "violet", "red")
        left, middle, right = st.columns(3)
        left.metric("Tokens", f"{len(ids):,}")
        middle.metric("Bytes", f"{len(text.encode()):,}")
        right.metric("Bytes per token", f"{len(text.encode()) / len(ids):.2f}")
        with st.container(horizontal=True, gap="small"):
            for place, token_id in enumerate(ids[:300]):
                piece = escaped(printable(tokenizer.vocab[token_id]))
                st.badge(f"{piece} {token_id}", color=colors[place % len(colors)])
        if len(ids) > 300:
            st.caption(f"The first 300 of {len(ids):,} tokens.")
        show_merges(tokenizer)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|<>~$:&" else c for c in text)


def show_merges(tokenizer: BPETokenizer) -> None:
    """Table of the merges that build a word from its bytes."""
    st.subheader("Merges, step by step")
    word = st.text_input("Word", " summer", max_chars=40)
    rows = []
    for rank, ids in tokenizer.merge_steps(word):
        pair = "bytes"
        if rank is not None:
            left, right, _ = tokenizer.merges[rank]
            pair = f"{printable(tokenizer.vocab[left])} + {printable(tokenizer.vocab[right])}"
        parts = "  ".join(printable(tokenizer.vocab[i]) for i in ids)
        rows.append({"merge": pair, "rank": rank, "parts": parts})
    st.dataframe(pd.DataFrame(rows).astype({"rank": "Int64"}), hide_index=True)


def training_page() -> None:
    """Curves from the logs, live, and the comparison table."""
    st.title("Training and evaluation")
    st.write("What the trainings logged, step by step; a training under way shows up by itself.")
    curves()
    st.subheader("Comparison")
    path = MODELS / "report.json"
    if not path.is_file():
        st.info(f"There is no {path.name} yet: make it with `python evaluate.py`.")
        return
    with errors_as_messages():
        rows = json.loads(path.read_text(encoding="utf-8"))
        st.markdown(report_tables(rows))
        show_costs(rows)


@st.fragment(run_every=REFRESH_SECONDS)
def curves() -> None:
    """Loss and learning rate of a training, read again every few seconds."""
    logs = {
        path.name.removesuffix(".log.jsonl"): path for path in sorted(MODELS.glob("*.log.jsonl"))
    }
    if not logs:
        st.info("There are no logs yet: train with `python main.py`.")
        return
    name = st.selectbox("Training", list(logs), index=list(logs).index(min(logs, key=preferred)))
    with errors_as_messages():
        frame = pd.DataFrame(read_jsonl(logs[name]))
        last = frame.iloc[-1]
        st.caption(f"{int(last['step']):,} steps, {last['seconds']:,.0f} seconds")
        left, right = st.columns(2)
        losses = [n for n in ("loss", "val_loss", "val_error") if n in frame]
        shown = frame.melt("step", losses, "figure", "value").dropna()
        base = alt.Chart(shown).encode(x=alt.X("step:Q"), y=alt.Y("value:Q").scale(zero=False))
        lines = base.encode(color=alt.Color("figure:N", title=None)).mark_line(point=True)
        left.altair_chart(lines.properties(title="Loss (nats)"))
        rates = (
            alt.Chart(frame)
            .mark_line(color=CHART_COLOR)
            .encode(x="step:Q", y=alt.Y("learning_rate:Q", title="learning rate"))
        )
        right.altair_chart(rates.properties(title="Learning rate"))


def preferred(name: str) -> tuple[bool, str]:
    """Sorts the base's log before the others."""
    return name != "model_weights", name


def show_costs(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Charts of parameters trained, memory and time, full against LoRA against QLoRA."""
    for task in ("sentiment", "instructions"):
        frame = pd.DataFrame([row for row in rows[task] if "trained_parameters" in row])
        if frame.empty:
            continue
        frame["peak memory (GiB)"] = frame["peak_memory_bytes"] / 2**30
        frame["training (s)"] = frame["seconds"]
        frame["trained parameters"] = frame["trained_parameters"]
        st.markdown(f"**{task.capitalize()}**")
        names = ("trained parameters", "peak memory (GiB)", "training (s)")
        for column, name in zip(st.columns(3), names):
            column.altair_chart(bars(frame[["model", name]], name, "model", "~s"))


def main() -> None:
    """Builds the sidebar and the chosen page."""
    st.set_page_config(page_title="GPT from zero", layout="wide")
    pages = {
        "Generate": generate_page,
        "Sentiment": sentiment_page,
        "Instructions": instructions_page,
        "Tokenizer": tokenizer_page,
        "Training and evaluation": training_page,
    }
    st.navigation(
        [
            st.Page(page, title=title, url_path=page.__name__.removesuffix("_page"))
            for title, page in pages.items()
        ]
    ).run()


if __name__ == "__main__":
    main()
