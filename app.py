"""The dashboard: every model of this repository in a browser.

    streamlit run app.py

Shows the model sets in `models/`, or in the folder that the environment variable GPT_MODELS_DIR
names, and in its subfolders such as `models/shipped/`: checkpoints, logs and `report.json`.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st
import torch

import generation
from data_loader import Instruction, read_unlabelled
from data_utils import IGNORE, encode_instruction
from evaluate import LINEAR, LINEAR_BASELINE, REPORT_COLUMNS, load_linear_baseline, table_cells
from generation import BASE, QLORA, TEMPERATURE, TOP_P, continue_prompt, generate_response
from model import GPTModel
from tokenizer import BPETokenizer

MODELS = Path(os.environ.get("GPT_MODELS_DIR") or Path(__file__).parent / "models")
MAX_CHARACTERS = 2_000
MAX_ROWS, MAX_UPLOAD_MB = 10_000, 10
SHOWN_TOKENS, ATTENTION_TOKENS = 15, 32
REFRESH_SECONDS = 3.0
CHART_COLOR = "#3a7ca5"
MARKDOWN = str.maketrans({c: f"\\{c}" for c in r"\`*_{}()#+-.!|<>~$:&="})  # shown literally
FINE_TUNINGS = ("full fine-tuning", "LoRA", "QLoRA, 4-bit base")  # rows of the report
TASKS = {"language": "Language", "sentiment": "Sentiment", "instructions": "Instructions"}
CLASSIFIERS = {
    "Full fine-tuning": generation.FULL_CLASSIFIER,
    "LoRA": generation.LORA_CLASSIFIER,
    LINEAR: LINEAR_BASELINE,
}
LOADERS = {"tokenizer.json": BPETokenizer.load, LINEAR_BASELINE: load_linear_baseline}


def main() -> None:
    """Builds the sidebar and the chosen page."""
    st.set_page_config(page_title="GPT from zero", layout="wide")
    pages = [
        st.Page(generate_page, title="Generate", url_path="generate"),
        st.Page(sentiment_page, title="Sentiment", url_path="sentiment"),
        st.Page(instructions_page, title="Instructions", url_path="instructions"),
        st.Page(tokenizer_page, title="Tokenizer", url_path="tokenizer"),
        st.Page(training_page, title="Training and evaluation", url_path="training"),
    ]
    page = st.navigation(pages)
    sets = [f for f in (MODELS, *sorted(MODELS.glob("*/"))) if any(f.glob("*.pth"))]
    if sets:
        default = generation.default_model_set(MODELS)
        index = sets.index(default) if default in sets else 0
        st.sidebar.selectbox("Models", sets, index, lambda f: f"{f.name}/", key="model_set")
    page.run()


# ---- what the pages share


def model_set() -> Path:
    """The folder chosen in the sidebar."""
    return st.session_state.get("model_set") or generation.default_model_set(MODELS)


def checkpoint_path(name: str) -> Path:
    """A file of the chosen set, or of the shipped one if the user has not trained it yet."""
    path, shipped = model_set() / name, MODELS / "shipped" / name
    if path.is_file() or path.parent != MODELS or not shipped.is_file():
        return path
    creator = generation.FULL_CLASSIFIER if name == LINEAR_BASELINE else BASE
    command = generation.COMMANDS.get(name, generation.COMMANDS[creator])
    st.caption(f"Not in {MODELS.name}/ yet (`{command}`): showing {shipped.parent.name}/.")
    return shipped


@st.cache_resource(max_entries=8, show_spinner="Loading the model")
def _cached(path: Path, changed: tuple[int, ...], _load: Callable) -> Any:
    """`changed` is part of the cache's key; `_load`, with its underscore, is not."""
    return _load(path)


def loaded(name: str) -> Any:
    """Loads a file of the chosen model set once for all sessions, and again when it or a file it
    depends on changes. Callers must not modify the result."""
    path = checkpoint_path(name)
    paths = [path.with_name(file) for file in (name, "tokenizer.json", BASE, generation.REVIEW_LM)]
    changed = tuple(p.stat().st_mtime_ns if p.is_file() else 0 for p in paths)
    return _cached(path, changed, LOADERS.get(name, generation.load_model))


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Shows what is missing or refused, with the command that fixes it, instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        st.error(str(error))


def forget(*keys: str) -> None:
    """Clears texts before new ones are generated."""
    for key in keys:
        st.session_state.pop(key, None)


def stream_text(
    key: str, ids: Iterator[int] | None, tokenizer: BPETokenizer, start: str = ""
) -> None:
    """Shows text as it is generated; what was shown stays when a button interrupts it."""
    body, caption = st.empty(), st.empty()

    def show(text: str, note: str) -> None:
        st.session_state[key] = text, note
        body.code(text, language=None, wrap_lines=True)
        caption.caption(note)

    if ids is not None:
        text, n_tokens, started = start, 0, time.perf_counter()

        def counted() -> Iterator[int]:
            nonlocal n_tokens
            for token_id in ids:
                n_tokens += 1
                yield token_id

        for new_text in tokenizer.decode_stream(counted()):
            text += new_text
            speed = n_tokens / (time.perf_counter() - started)
            show(text, f"{n_tokens} tokens, {speed:.0f} tokens per second")
        if not n_tokens:
            show(start, "The model produced no text.")
    elif key in st.session_state:
        show(*st.session_state[key])


def bars(
    frame: pd.DataFrame, x: str, y: str, x_format: str = ".0%", x_max: float | None = None
) -> alt.Chart:
    """A horizontal bar for each row of a table, in its order."""
    scale = alt.Scale() if x_max is None else alt.Scale(domain=[0, x_max])
    chart = alt.Chart(frame).mark_bar(color=CHART_COLOR)
    length = alt.X(x, type="quantitative", axis=alt.Axis(format=x_format), scale=scale)
    return chart.encode(x=length, y=alt.Y(y, type="nominal", sort=None), tooltip=[y, x])


def printable(token: bytes) -> str:
    """A token's text with spaces, line ends and control characters made visible."""
    text = token.decode(errors="replace").replace(" ", "\u00b7").replace("\n", "\u21b5")
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else c for c in text)


# ---- pages


def generate_page() -> None:
    """Text from the base model, and its predictions for the next token."""
    st.title("Generate")
    st.write(
        "The base model continues your text, one token at a time, in the style of Shakespeare."
    )
    with errors_as_messages():
        model, tokenizer, _ = loaded(BASE)
        prompt = st.text_area("Prompt", "ROMEO:", max_chars=MAX_CHARACTERS)
        left, middle, right = st.columns(3)
        temperature = left.slider("Temperature", 0.0, 2.0, TEMPERATURE, 0.05, help="0 is greedy")
        length = left.slider("Tokens", 10, 500, 200, 10)
        top_p = middle.slider(
            "Top-p", 0.05, 1.0, TOP_P, 0.05, help="Sample from top tokens of this total probability"
        )
        top_k = middle.slider(
            "Top-k", 0, 200, 0, help="Number of most probable tokens to sample from; 0 is all"
        )
        seed = right.number_input("Seed", 0, 2**31, 0, help="The same seed gives the same text")
        run, stop = st.columns([1, 5])
        go = run.button("Generate", type="primary", on_click=forget, args=("generated",))
        stop.button("Stop")  # any button ends the run that streams
        options = {"temperature": temperature, "top_k": top_k or None, "top_p": top_p, "seed": seed}
        ids = continue_prompt(model, tokenizer, prompt, length, **options) if go else None
        stream_text("generated", ids, tokenizer, prompt)
        if prompt_ids := tokenizer.encode(prompt):
            show_next_tokens(model, tokenizer, prompt_ids)
            show_attention(model, tokenizer, prompt_ids)


def show_next_tokens(model: GPTModel, tokenizer: BPETokenizer, ids: list[int]) -> None:
    """Chart of the most probable tokens after a prompt."""
    window = torch.tensor([ids[-model.config.context_length :]])
    with torch.inference_mode():
        probabilities = generation.token_probabilities(model(window)[:, -1])[0]
    top = probabilities.topk(SHOWN_TOKENS)
    names = [f"{printable(tokenizer.vocab[i])}  ({i})" for i in top.indices.tolist()]
    st.subheader("Next token")
    st.write("The most probable tokens after the prompt, before temperature, top-k and top-p.")
    frame = pd.DataFrame({"probability": top.values.tolist(), "token (id)": names})
    st.altair_chart(bars(frame, "probability", "token (id)"))


def show_attention(model: GPTModel, tokenizer: BPETokenizer, ids: list[int]) -> None:
    """Attention map of a head, for the first tokens of a prompt."""
    ids = ids[: min(ATTENTION_TOKENS, model.config.context_length)]
    st.subheader("Attention")
    st.write("How much each token (row) attends to itself and to earlier tokens (columns).")
    left, right = st.columns(2)
    layer = left.selectbox("Layer", range(1, model.config.n_layer + 1))
    head = right.selectbox("Head", range(1, model.config.n_head + 1))
    weights = model.attention_maps(torch.tensor([ids]))[layer - 1, 0, head - 1].tolist()
    names = [f"{i:2d} {printable(tokenizer.vocab[t])}" for i, t in enumerate(ids)]
    rows = [(names[i], names[j], weights[i][j]) for i in range(len(ids)) for j in range(i + 1)]
    frame = pd.DataFrame(rows, columns=["from", "to", "weight"])
    chart = alt.Chart(frame, height=max(200, 22 * len(ids))).mark_rect(color=CHART_COLOR)
    chart = chart.encode(
        x=alt.X("to:N", sort=None, title="attends to"),
        y=alt.Y("from:N", sort=None, title="token"),
        opacity=alt.Opacity("weight:Q", scale=alt.Scale(domain=[0, 1], range=[0.03, 1])),
        tooltip=["from", "to", alt.Tooltip("weight", format=".3f")],
    )
    st.altair_chart(chart)


def sentiment_page() -> None:
    """A text classified by three models, or a file of texts by one."""
    st.title("Sentiment")
    st.write("Which label fits a text? Two fine-tuned models beside a linear one.")
    example = "Stopped working after two days, and nobody answered my letters."
    text = st.text_area("Review", example, max_chars=MAX_CHARACTERS)
    if text.strip():
        for column, name in zip(st.columns(len(CLASSIFIERS)), CLASSIFIERS):
            with column, errors_as_messages():
                labels, (row,) = classify(name, [text])
                frame = pd.DataFrame({"probability": row, "class": labels})
                verdict, sure = labels[row.argmax()].translate(MARKDOWN), f"{row.max():.0%} sure"
                st.metric(name, verdict, sure, delta_color="off", delta_arrow="off")
                st.altair_chart(bars(frame, "probability", "class", x_max=1))
    else:
        st.info("Write a review to classify it.")
    classify_file()


def classify(name: str, texts: list[str]) -> tuple[list[str], np.ndarray]:
    """The labels of one of `CLASSIFIERS`, and their probabilities (N, labels) for texts."""
    model, tokenizer, checkpoint = loaded(CLASSIFIERS[name])
    if name == LINEAR:
        return list(checkpoint["labels"]), model.predict_proba(texts)
    probabilities = generation.class_probabilities(model, tokenizer, texts)
    return list(checkpoint["labels"]), probabilities


def classify_file() -> None:
    """Predictions for the rows of an uploaded file."""
    st.subheader("A file of reviews")
    st.write(
        f"CSV, TSV, JSON, JSON Lines or Parquet with a column of texts; at most {MAX_ROWS:,} rows."
    )
    name = st.selectbox("Classifier", list(CLASSIFIERS))
    column = st.text_input("Column of the texts", help="Only if its name is not text or the like")
    types = ["csv", "tsv", "txt", "jsonl", "ndjson", "json", "parquet", "gz"]
    upload = st.file_uploader("File", type=types, max_upload_size=MAX_UPLOAD_MB)
    if upload is None:
        return
    with errors_as_messages():
        rows, texts = read_upload(upload.getvalue(), upload.name, column or None)
        with st.spinner(f"Classifying {len(texts):,} texts"):
            labels, probabilities = classify_once(name, texts)
        frame = pd.DataFrame(rows, dtype=object)
        frame["prediction"] = [labels[i] for i in probabilities.argmax(1)]
        for label, column in zip(labels, probabilities.T):
            frame[f"probability_{label}"] = column.round(4)
        st.dataframe(frame)
        if "json" in Path(upload.name.lower().removesuffix(".gz")).suffix:
            lines = (json.dumps(row, default=str) + "\n" for row in frame.to_dict("records"))
            file, content = "predictions.jsonl", "".join(lines)
        else:
            file, content = "predictions.csv", frame.to_csv(index=False)
        st.download_button("Download with predictions", content, file, on_click="ignore")


def read_upload(
    content: bytes, name: str, text_column: str | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and texts of an uploaded file, read as the scripts read a file of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(name).name)
        path.write_bytes(content)
        try:
            rows, texts = read_unlabelled(path, text_column)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{folder}{os.sep}", "")) from None
    if len(rows) > MAX_ROWS:
        raise ValueError(f"the file has {len(rows):,} rows; the maximum is {MAX_ROWS:,}")
    return rows, [text[: 10 * MAX_CHARACTERS] for text in texts]


def classify_once(name: str, texts: list[str]) -> tuple[list[str], np.ndarray]:
    """As `classify`; the last result of a session is reused."""
    request = (str(model_set()), name, texts)
    if st.session_state.get("classified") != request:
        st.session_state["probabilities"] = classify(name, texts)
        st.session_state["classified"] = request
    return st.session_state["probabilities"]


def instructions_page() -> None:
    """The untouched base and the fine-tuned model answer side by side."""
    st.title("Instructions")
    st.write("The same prompt, answered by the untouched base and by the model after QLoRA.")
    keys = ("base-response", "qlora-response")
    question = st.text_area("Instruction", "Name three things to take to the beach.", max_chars=500)
    task = Instruction(question, st.text_area("Context (optional)", "", max_chars=MAX_CHARACTERS))
    left, right = st.columns(2)
    temperature = left.slider("Temperature", 0.0, 2.0, 0.7, 0.05)
    seed = right.number_input("Seed", 0, 2**31, 0)
    run, stop = st.columns([1, 5])
    go = run.button("Answer", type="primary", on_click=forget, args=keys)
    stop.button("Stop")
    titles = ("Base", "QLoRA")
    for column, title, key, name in zip(st.columns(2), titles, keys, (BASE, QLORA)):
        with column, errors_as_messages():
            st.subheader(title)
            model, tokenizer, _ = loaded(name)
            options = {"temperature": temperature, "seed": seed}
            ids = generate_response(model, tokenizer, task, **options) if go else None
            stream_text(key, ids, tokenizer)
    with errors_as_messages(), st.expander("Template and token mask"):
        show_template(task)


def show_template(task: Instruction) -> None:
    """A task as the model reads it, and which of its targets carry loss."""
    model, tokenizer, _ = loaded(QLORA)
    example = "A towel, a book, and a hat."
    response = st.text_input("A response to learn from", example, max_chars=200)
    task = dataclasses.replace(task, response=response)
    encoded = encode_instruction(task, tokenizer, model.config.context_length)
    st.code(tokenizer.decode(encoded.ids), language=None)
    names = [printable(tokenizer.vocab[i]) for i in encoded.ids]
    rows = zip(names, names[1:], (target != IGNORE for target in encoded.targets[1:]))
    st.dataframe(pd.DataFrame(rows, columns=["input", "target", "carries loss"]), height=300)


def tokenizer_page() -> None:
    """Text split into tokens, and the merges that build a word."""
    st.title("Tokenizer")
    st.write("Byte-level BPE: the tokens that the models read, learned from the training text.")
    with errors_as_messages():
        tokenizer = loaded("tokenizer.json")
        example = "Shall I compare thee to a summer's day?"
        text = st.text_area("Text", example, max_chars=MAX_CHARACTERS)
        ids = tokenizer.encode(text)
        if not ids:
            st.info("Write some text to see its tokens.")
            return
        n_bytes = len(text.encode())
        left, middle, right = st.columns(3)
        left.metric("Tokens", f"{len(ids):,}")
        middle.metric("Bytes", f"{n_bytes:,}")
        right.metric("Bytes per token", f"{n_bytes / len(ids):.2f}")
        colors = itertools.cycle(("blue", "green", "orange", "violet", "red"))
        with st.container(horizontal=True, gap="small"):
            for token_id, color in zip(ids[:300], colors):
                st.badge(badge(tokenizer.vocab[token_id], token_id), color=color)
        if len(ids) > 300:
            st.caption(f"The first 300 of {len(ids):,} tokens.")
        show_merges(tokenizer)


def badge(token: bytes, token_id: int) -> str:
    """Markdown that shows a token literally, and its id.

    Streamlit itself escapes square brackets in badges; the invisible word joiners keep it from
    replacing dashes and arrows.
    """
    text = printable(token)
    return "\u2060".join([*(c.translate(MARKDOWN) for c in text), ""]) + f" {token_id}"


def show_merges(tokenizer: BPETokenizer) -> None:
    """Table of the merges that build a word from its bytes."""
    st.subheader("Merges, step by step")
    word = st.text_input("Word", " summer", max_chars=40)
    rows = []
    for rank, ids in tokenizer.merge_steps(word):
        pair = "found whole" if rows else "bytes"
        if rank is not None:
            left, right, _ = tokenizer.merges[rank]
            pair = f"{printable(tokenizer.vocab[left])} + {printable(tokenizer.vocab[right])}"
        tokens = "  ".join(printable(tokenizer.vocab[i]) for i in ids)
        rows.append({"merge": pair, "rank": rank, "tokens": tokens})
    st.dataframe(pd.DataFrame(rows).astype({"rank": "Int64"}), hide_index=True)


def training_page() -> None:
    """Curves from the logs, live, and the comparison table."""
    st.title("Training and evaluation")
    st.write("Logged losses and learning rates, updated live, and metrics on held-out data.")
    curves()
    st.subheader("Comparison")
    path = model_set() / "report.json"
    command = f"python evaluate.py --models {path.parent}"
    if not path.is_file():
        st.info(f"There is no {path.name} yet: create it with `{command}`.")
        return
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for task, title in TASKS.items():
            header, *lines = table_cells(REPORT_COLUMNS[task], rows[task])
            st.markdown(f"**{title}**")
            st.dataframe(pd.DataFrame(lines, columns=header), hide_index=True)
        show_costs(rows)
    except (KeyError, TypeError, AttributeError, ValueError):
        st.error(f"{path.name} cannot be read: recreate it with `{command}`.")


@st.fragment(run_every=REFRESH_SECONDS)
def curves() -> None:
    """Loss and learning rate of a training, read again every few seconds."""
    logs = {p.name.removesuffix(".log.jsonl"): p for p in sorted(model_set().glob("*.log.jsonl"))}
    if not logs:
        st.info("There are no logs yet: train with `python main.py`.")
        return
    first = list(logs).index("model_weights") if "model_weights" in logs else 0
    name = st.selectbox("Training", list(logs), index=first, key="training")
    frame = pd.DataFrame(read_log(logs[name]))
    if frame.empty:
        st.info("No step is logged yet: wait a moment, or train with `python main.py`.")
        return
    last = frame.iloc[-1]
    st.caption(f"{int(last['step']):,} steps, {last['seconds']:,.0f} seconds")
    left, right = st.columns(2)
    losses = [n for n in ("loss", "val_loss") if n in frame]
    shown = frame.melt("step", losses, "metric", "value").dropna()
    chart = alt.Chart(shown, title="Loss (nats; val_loss of language models per byte)")
    value = alt.Y("value:Q", title="loss").scale(zero=False)
    color = alt.Color("metric:N", title=None)
    left.altair_chart(chart.mark_line(point=True).encode(x="step:Q", y=value, color=color))
    chart = alt.Chart(frame, title="Learning rate").mark_line(color=CHART_COLOR)
    right.altair_chart(chart.encode(x="step:Q", y=alt.Y("learning_rate:Q", title="learning rate")))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Complete lines of a log; the last one may still be written."""
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = []
    for line in text[: text.rfind("\n") + 1].split("\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and {"step", "seconds"} <= row.keys()]


def show_costs(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Charts of trained parameters, memory and time: full against LoRA against QLoRA."""
    for task in ("sentiment", "instructions"):
        tuned = [row for row in rows[task] if row["model"] in FINE_TUNINGS]
        frame = pd.DataFrame([row for row in tuned if "peak_memory_bytes" in row])
        if frame.empty:
            continue
        frame["peak memory (GiB)"] = frame["peak_memory_bytes"] / 2**30
        frame["training (s)"] = frame["seconds"]
        frame["trained parameters"] = frame["trained_parameters"]
        st.markdown(f"**{TASKS[task]}: full fine-tuning against adapters**")
        formats = {"trained parameters": "~s", "peak memory (GiB)": ".2f", "training (s)": ",.0f"}
        for column, (name, x_format) in zip(st.columns(3), formats.items()):
            column.altair_chart(bars(frame[["model", name]], name, "model", x_format))


if __name__ == "__main__":
    main()
