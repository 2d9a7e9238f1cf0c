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

from data_utils import IGNORE, EncodedInstruction, collate_instructions, encode_prompt
from evaluate import (
    BASELINES,
    CLASSES,
    LINEAR_BASELINE,
    REVIEW_MODEL,
    answer,
    class_probabilities,
    load_classifier,
    load_instruction_model,
    load_linear_baseline,
    report_cells,
)
from generation import (
    TEMPERATURE,
    TOP_P,
    continue_prompt,
    load_language_model,
    token_probabilities,
)
from model import GPTModel
from tokenizer import END_OF_TEXT, BPETokenizer
from training import CPU

MODELS = Path(os.environ.get("GPT_MODELS_DIR") or Path(__file__).parent / "models")
MAX_CHARACTERS = 2_000
MAX_ROWS, MAX_UPLOAD_MB = 10_000, 10
SHOWN_TOKENS, ATTENTION_TOKENS = 15, 32
REFRESH_SECONDS = 3.0
CHART_COLOR = "#3a7ca5"
FINE_TUNINGS = ("full fine-tuning", "LoRA", "QLoRA, 4-bit base")  # rows of the report
TASKS = {"language": "Language", "sentiment": "Sentiment", "instructions": "Instructions"}


# ---- what the pages share


SHARED_FILES = ("tokenizer.json", "model_weights.pth", REVIEW_MODEL)  # what models are built on


@st.cache_resource(max_entries=8, show_spinner="Loading the model")
def _cached(path: Path, changed: tuple[int, ...], _load: Callable) -> Any:
    """`changed` is part of the cache's key; `_load`, with its underscore, is not."""
    return _load(path)


def loaded(load: Callable, name: str) -> Any:
    """What `load` makes of a file in the models folder: a model that all sessions read and none
    changes, loaded anew when its file, or one that it is built on, changes."""
    paths = [MODELS / file for file in (name, *SHARED_FILES)]
    changed = tuple(path.stat().st_mtime_ns if path.is_file() else 0 for path in paths)
    return _cached(paths[0], changed, load)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Shows what is missing or refused, with the command that mends it, instead of a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        st.error(str(error))


def forget(*keys: str) -> None:
    """Clears texts before new ones are sampled."""
    for key in keys:
        st.session_state.pop(key, None)


def stream_text(
    key: str, ids: Iterator[int] | None, tokenizer: BPETokenizer, start: str = ""
) -> None:
    """Shows text as it is sampled; what was shown stays when a button interrupts it."""
    place, below = st.empty(), st.empty()

    def show(text: str, note: str) -> None:
        """Shows a text and what there is to say of it, and keeps both."""
        st.session_state[key] = text, note
        place.code(text, language=None, wrap_lines=True)
        below.caption(note)

    if ids is not None:
        text, n, begun = start, 0, time.perf_counter()

        def counted() -> Iterator[int]:
            """Counts the tokens as they pass."""
            nonlocal n
            for token_id in ids:
                n += 1
                yield token_id

        for piece in tokenizer.decode_stream(counted()):
            text += piece
            speed = n / (time.perf_counter() - begun)
            show(text, f"{n} tokens, {speed:.0f} tokens per second")
        if not n:
            show(start, "It ended at once, without a word.")
    elif key in st.session_state:
        show(*st.session_state[key])


def bars(
    frame: pd.DataFrame, x: str, y: str, x_format: str = ".0%", x_most: float | None = None
) -> alt.Chart:
    """A horizontal bar for each row of a table, in its order."""
    scale = alt.Scale() if x_most is None else alt.Scale(domain=[0, x_most])
    return (
        alt.Chart(frame)
        .mark_bar(color=CHART_COLOR)
        .encode(
            x=alt.X(x, type="quantitative", axis=alt.Axis(format=x_format), scale=scale),
            y=alt.Y(y, type="nominal", sort=None),
            tooltip=[y, x],
        )
    )


def printable(token: bytes) -> str:
    """A token's text with spaces, line ends and control characters made visible."""
    text = token.decode(errors="replace").replace(" ", "\u00b7").replace("\n", "\u21b5")
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else c for c in text)


# ---- pages


def generate_page() -> None:
    """Text from the base model, and what it expects next."""
    st.title("Generate")
    st.write("The base model continues your text, a token at a time, in the manner of Shakespeare.")
    with errors_as_messages():
        model, tokenizer, _ = loaded(load_language_model, "model_weights.pth")
        prompt = st.text_area("Prompt", "ROMEO:", max_chars=MAX_CHARACTERS)
        left, middle, right = st.columns(3)
        temperature = left.slider(
            "Temperature", 0.0, 2.0, TEMPERATURE, 0.05, help="0 takes the likeliest"
        )
        length = left.slider("Tokens", 10, 500, 200, 10)
        top_p = middle.slider(
            "Top-p", 0.05, 1.0, TOP_P, 0.05, help="Share of probability drawn from"
        )
        top_k = middle.slider("Top-k", 0, 200, 0, help="Likeliest tokens drawn from; 0 is all")
        seed = right.number_input("Seed", 0, 2**31, 0, help="The same seed gives the same text")
        run, stop = st.columns([1, 5])
        go = run.button("Generate", type="primary", on_click=forget, args=("generated",))
        stop.button("Stop")  # any button ends the run that streams
        sampling = {
            "temperature": temperature,
            "top_k": top_k or None,
            "top_p": top_p,
            "seed": seed,
        }
        ids = continue_prompt(model, tokenizer, prompt, length, **sampling) if go else None
        stream_text("generated", ids, tokenizer, prompt)
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
        .mark_rect(color=CHART_COLOR)
        .encode(
            x=alt.X("to:N", sort=None, title="attends to"),
            y=alt.Y("from:N", sort=None, title="token"),
            opacity=alt.Opacity("weight:Q", scale=alt.Scale(domain=[0, 1], range=[0.03, 1])),
            tooltip=["from", "to", alt.Tooltip("weight", format=".3f")],
        )
        .properties(height=max(200, 22 * len(ids)))
    )
    st.altair_chart(chart)


CLASSIFIERS = {
    "Full fine-tuning": "finetuned_classifier_weights.pth",
    "LoRA": "lora_classifier_weights.pth",
    BASELINES[0]: LINEAR_BASELINE,
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
                sure = f"{max(positive, 1 - positive):.0%} sure"
                st.metric(name, verdict, sure, delta_color="off", delta_arrow="off")
                frame = pd.DataFrame({"probability": [1 - positive, positive], "class": CLASSES})
                st.altair_chart(bars(frame, "probability", "class", x_most=1))
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
    file = st.file_uploader("File", type=["csv", "jsonl"], max_upload_size=MAX_UPLOAD_MB)
    if file is None:
        return
    with errors_as_messages():
        csv = file.name.lower().endswith(".csv")
        frame = read_table(file.getvalue(), csv)
        texts = review_texts(frame)
        with st.spinner(f"Judging {len(texts):,} reviews"):
            positive = classify_all(name, texts)
        frame["prediction"] = [CLASSES[p >= 0.5] for p in positive]
        frame["probability_positive"] = [round(p, 4) for p in positive]
        st.dataframe(frame)
        rows = (json.dumps(row, default=str) + "\n" for row in frame.to_dict("records"))
        content = frame.to_csv(index=False) if csv else "".join(rows)
        kind = "csv" if csv else "jsonl"
        st.download_button(
            "Download with predictions", content, f"predictions.{kind}", on_click="ignore"
        )


def classify_all(name: str, texts: list[str]) -> list[float]:
    """As `classify`, but what a session has judged last is not judged again."""
    asked = (name, texts)
    if st.session_state.get("judged") != asked:
        st.session_state["verdicts"] = classify(name, texts)
        st.session_state["judged"] = asked
    return st.session_state["verdicts"]


def read_table(content: bytes, csv: bool) -> pd.DataFrame:
    """Rows of an uploaded CSV or JSONL file.

    Raises:
        ValueError: It cannot be read, or has too many rows.
    """
    try:
        text = content.decode("utf-8-sig")
        if csv:
            frame = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("each line must be a JSON object")
            frame = pd.DataFrame(rows, dtype=object)
    except (ValueError, RecursionError) as error:  # pandas' and json's errors are ValueErrors
        raise ValueError(f"the file cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(frame.index, pd.RangeIndex):
        raise ValueError("the file's rows have more fields than its first line: quote the texts")
    if not 0 < len(frame) <= MAX_ROWS:
        raise ValueError(f"the file has {len(frame):,} rows; 1 to {MAX_ROWS:,} are possible")
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
    texts = ["\n".join(part.strip() for part in row if part.strip()) for row in zip(*columns)]
    if empty := [i for i, text in enumerate(texts, 1) if not text.strip()]:
        raise ValueError(f"{len(empty):,} rows have no text, the first is row {empty[0]}")
    return [text[: 10 * MAX_CHARACTERS] for text in texts]


def instructions_page() -> None:
    """The untouched base and the fine-tuned model answer side by side."""
    st.title("Instructions")
    st.write("The same prompt for the base, which knows plays alone, and after QLoRA on Dolly.")
    keys = ("base-answer", "qlora-answer")
    task = st.text_area("Instruction", "Name three things to take to the beach.", max_chars=500)
    context = st.text_area("Context, if it is about a text", "", max_chars=MAX_CHARACTERS)
    left, right = st.columns(2)
    temperature = left.slider("Temperature", 0.0, 2.0, 0.7, 0.05)
    seed = right.number_input("Seed", 0, 2**31, 0)
    run, stop = st.columns([1, 5])
    go = run.button("Answer", type="primary", on_click=forget, args=keys)
    stop.button("Stop")
    files = ("model_weights.pth", "qlora_instruction_weights.pth")
    loaders = (load_language_model, load_instruction_model)
    parts = zip(st.columns(2), ("Base", "QLoRA"), keys, files, loaders)
    for column, title, key, name, load in parts:
        with column, errors_as_messages():
            st.subheader(title)
            model, tokenizer, _ = loaded(load, name)
            sampling = {"temperature": temperature, "seed": seed}
            ids = answer(model, tokenizer, task, context, **sampling) if go else None
            stream_text(key, ids, tokenizer)
    with errors_as_messages(), st.expander("Template and token mask"):
        show_template(task, context)


def show_template(task: str, context: str) -> None:
    """The prompt as the model reads it, and which of its targets carry loss."""
    model, tokenizer, _ = loaded(load_instruction_model, "qlora_instruction_weights.pth")
    prompt = encode_prompt(task, context, tokenizer, model.config.context_length // 2)
    st.code(tokenizer.decode(prompt), language=None)
    response = st.text_input(
        "A response to learn from", "A towel, a book, and a hat.", max_chars=200
    )
    ids = [*tokenizer.encode(response), tokenizer.special_tokens[END_OF_TEXT]]
    unpadded = 0  # the context to fill up to
    _, targets = collate_instructions([EncodedInstruction(prompt, ids)], tokenizer, unpadded)
    names = [printable(tokenizer.vocab[i]) for i in prompt + ids]
    rows = zip(names, names[1:], (targets[0] != IGNORE).tolist())
    st.dataframe(pd.DataFrame(rows, columns=["input", "target", "carries loss"]), height=300)


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
                st.badge(badge(tokenizer.vocab[token_id], token_id), color=colors[place % 5])
        if len(ids) > 300:
            st.caption(f"The first 300 of {len(ids):,} tokens.")
        show_merges(tokenizer)


def badge(token: bytes, token_id: int) -> str:
    """Markdown that shows a token as it is, and its id.

    Streamlit itself escapes square brackets in badges; the invisible word joiners keep it from
    setting dashes and arrows in type.
    """
    text = printable(token)
    shown = (f"\\{c}" if c in r"\`*_{}()#+-.!|<>~$:&=" else c for c in text)
    return "\u2060".join([*shown, ""]) + f" {token_id}"


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
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for task, title in TASKS.items():
            header, *lines = report_cells(task, rows[task])
            st.markdown(f"**{title}**")
            st.dataframe(pd.DataFrame(lines, columns=header), hide_index=True)
        show_costs(rows)
    except (KeyError, TypeError, AttributeError, ValueError):
        st.error(f"{path.name} cannot be read: make it again with `python evaluate.py`.")


@st.fragment(run_every=REFRESH_SECONDS)
def curves() -> None:
    """Loss and learning rate of a training, read again every few seconds."""
    names = sorted(path.name.removesuffix(".log.jsonl") for path in MODELS.glob("*.log.jsonl"))
    if not names:
        st.info("There are no logs yet: train with `python main.py`.")
        return
    first = names.index("model_weights") if "model_weights" in names else 0
    name = st.selectbox("Training", names, index=first, key="training")
    frame = pd.DataFrame(read_log(MODELS / f"{name}.log.jsonl"))
    if frame.empty:
        st.info("No step is logged yet: wait a moment, or train with `python main.py`.")
        return
    last = frame.iloc[-1]
    st.caption(f"{int(last['step']):,} steps, {last['seconds']:,.0f} seconds")
    left, right = st.columns(2)
    losses = [n for n in ("loss", "val_loss") if n in frame]
    shown = frame.melt("step", losses, "figure", "value").dropna()
    base = alt.Chart(shown).encode(
        x=alt.X("step:Q"), y=alt.Y("value:Q", title="loss").scale(zero=False)
    )
    lines = base.encode(color=alt.Color("figure:N", title=None)).mark_line(point=True)
    left.altair_chart(lines.properties(title="Loss (nats; val_loss of language models by byte)"))
    rates = alt.Chart(frame).mark_line(color=CHART_COLOR)
    rates = rates.encode(x="step:Q", y=alt.Y("learning_rate:Q", title="learning rate"))
    right.altair_chart(rates.properties(title="Learning rate"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a log; the last one may be under way."""
    text = path.read_text(encoding="utf-8", errors="replace")
    rows = []
    for line in text[: text.rfind("\n") + 1].split("\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and {"step", "seconds"} <= row.keys()]


def show_costs(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Charts of parameters trained, memory and time, full against LoRA against QLoRA."""
    for task in ("sentiment", "instructions"):
        tuned = [row for row in rows[task] if row["model"] in FINE_TUNINGS]
        frame = pd.DataFrame([row for row in tuned if "peak_memory_bytes" in row])
        if frame.empty:
            continue
        frame["peak memory (GiB)"] = frame["peak_memory_bytes"] / 2**30
        frame["training (s)"] = frame["seconds"]
        frame["trained parameters"] = frame["trained_parameters"]
        st.markdown(f"**{TASKS[task]}: full against adapters**")
        forms = {"trained parameters": "~s", "peak memory (GiB)": ".2f", "training (s)": ",.0f"}
        for column, (name, form) in zip(st.columns(3), forms.items()):
            column.altair_chart(bars(frame[["model", name]], name, "model", form))


def main() -> None:
    """Builds the sidebar and the chosen page."""
    st.set_page_config(page_title="GPT from zero", layout="wide")
    st.navigation(
        [
            st.Page(generate_page, title="Generate", url_path="generate"),
            st.Page(sentiment_page, title="Sentiment", url_path="sentiment"),
            st.Page(instructions_page, title="Instructions", url_path="instructions"),
            st.Page(tokenizer_page, title="Tokenizer", url_path="tokenizer"),
            st.Page(training_page, title="Training and evaluation", url_path="training"),
        ]
    ).run()


if __name__ == "__main__":
    main()
