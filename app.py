"""The dashboard: every model of this repository in a browser.

    streamlit run app.py

Shows the model sets in `models/`, or in the folder that the environment variable GPT_MODELS_DIR
names, and in its subfolders such as `models/shipped/`: checkpoints, logs and `report.json`.
"""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st
import torch

import evaluate
import generation
from data_loader import Instruction, read_unlabelled
from data_utils import IGNORE, encode_instruction
from evaluate import LINEAR, LINEAR_BASELINE, REPORT, REPORT_COLUMNS, table_cells
from generation import BASE, QLORA, TEMPERATURE, TOP_P, continue_prompt, generate_response
from model import GPTModel
from tokenizer import BPETokenizer

MODELS = Path(os.environ.get("GPT_MODELS_DIR") or Path(__file__).parent / "models")
MAX_TEXT = 2_000  # characters
MAX_ROWS, MAX_UPLOAD_MB = 10_000, 10
SHOWN_TOKENS, ATTENTION_TOKENS = 15, 32
REFRESH_SECONDS = 3.0
CHART_COLOR = "#3a7ca5"
MARKDOWN = str.maketrans({c: f"\\{c}" for c in r"\`*_{}()#+-.!|<>~$:&="})  # shown literally
FINE_TUNINGS = ("full fine-tuning", "LoRA", "QLoRA, 4-bit base")  # rows of the report
CLASSIFIERS = dict(REPORT["sentiment"][:3])  # files by name; the last row only guesses
COLORS, SHOWN_BADGES = ("blue", "green", "orange", "violet", "red"), 300
LOADERS = {"tokenizer.json": BPETokenizer.load, LINEAR_BASELINE: evaluate.load_linear_baseline}


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
    command = generation.command_for(path)
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


def start_button(label: str, *keys: str) -> bool:
    """A button that starts to generate and clears the texts of `keys`, beside one that stops."""
    start, stop = st.columns([1, 5])
    stop.button("Stop")  # any button ends the run that streams
    if go := start.button(label, type="primary"):
        for key in keys:
            st.session_state.pop(key, None)
    return go


def stream_text(key: str, ids: Iterator | None, tokenizer: BPETokenizer, text: str = "") -> None:
    """Shows text as it is generated; what was shown stays when a button interrupts it."""
    body, caption = st.empty(), st.empty()

    def show(text: str, note: str) -> None:
        st.session_state[key] = text, note
        body.code(text, language=None, wrap_lines=True)
        caption.caption(note)

    if ids is not None:
        tokens, started = [], time.perf_counter()

        def counted() -> Iterator[int]:
            for token_id in ids:
                tokens.append(token_id)
                yield token_id

        for new_text in tokenizer.decode_stream(counted()):
            text += new_text
            speed = len(tokens) / (time.perf_counter() - started)
            show(text, f"{len(tokens)} tokens, {speed:.0f} tokens per second")
        if not tokens:
            show(text, "The model produced no text.")
    elif key in st.session_state:
        show(*st.session_state[key])


def bars(
    frame: pd.DataFrame, x: str, y: str, x_format: str = ".0%", x_max: Any = alt.Undefined
) -> alt.Chart:
    """A horizontal bar for each row of a table, in its order."""
    length = alt.X(x, type="quantitative").axis(format=x_format).scale(domainMax=x_max)
    chart = alt.Chart(frame).mark_bar(color=CHART_COLOR)
    return chart.encode(x=length, y=alt.Y(y, type="nominal", sort=None), tooltip=[y, x])


def printable(token: bytes) -> str:
    """A token's text with spaces, line ends and control characters made visible."""
    text = token.decode(errors="replace").replace(" ", "\u00b7").replace("\n", "\u21b5")
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else c for c in text)


# ---- pages


def generate_page() -> None:
    """Text from the base model, and its predictions for the next token."""
    st.title("Generate")
    st.write("The base model continues your text, one token at a time, in the style it learned.")
    with errors_as_messages():
        model, tokenizer, checkpoint = loaded(BASE)
        example = checkpoint.get("sample_prompt", "ROMEO:")
        prompt = st.text_area("Prompt", example, max_chars=MAX_TEXT)
        left, middle, right = st.columns(3)
        temperature = left.slider("Temperature", 0.0, 2.0, TEMPERATURE, 0.05, help="0 is greedy")
        length = left.slider("Tokens", 10, 500, 200, 10)
        top_p = middle.slider("Top-p", 0.05, 1.0, TOP_P, 0.05, help="Total probability to sample")
        top_k = middle.slider("Top-k", 0, 200, 0, help="Number of tokens to sample from; 0 is all")
        seed = right.number_input("Seed", 0, 2**31, 0, help="The same seed gives the same text")
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        go = start_button("Generate", "generated")
        ids = continue_prompt(model, tokenizer, prompt, length, **sampling) if go else None
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
    weights = generation.attention_maps(model, torch.tensor([ids]))[layer - 1, 0, head - 1].tolist()
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
    text = st.text_area("Review", example, max_chars=MAX_TEXT)
    if text.strip():
        for column, name in zip(st.columns(len(CLASSIFIERS)), CLASSIFIERS):
            with column, errors_as_messages():
                row = classify(name, [text]).iloc[0]
                verdict, sure = row.idxmax().translate(MARKDOWN), f"{row.max():.0%} sure"
                st.metric(name, verdict, sure, delta_color="off", delta_arrow="off")
                frame = row.rename_axis("class").reset_index(name="probability")
                st.altair_chart(bars(frame, "probability", "class", x_max=1))
    else:
        st.info("Write a review to classify it.")
    classify_file()


def classify(name: str, texts: list[str]) -> pd.DataFrame:
    """Probabilities by one of `CLASSIFIERS`: a row for each text, a column for each label."""
    model, tokenizer, checkpoint = loaded(CLASSIFIERS[name])
    if name == LINEAR:
        probabilities = model.predict_proba(texts)
    else:
        probabilities = generation.class_probabilities(model, tokenizer, texts)
    return pd.DataFrame(probabilities, columns=checkpoint["labels"])


def classify_file() -> None:
    """Predictions for the rows of an uploaded file."""
    st.subheader("A file of reviews")
    st.write(f"CSV, TSV, JSON, JSON Lines or Parquet with texts; at most {MAX_ROWS:,} rows.")
    name = st.selectbox("Classifier", list(CLASSIFIERS))
    column = st.text_input("Column of the texts", help="Only if its name is not text or the like")
    types = ["csv", "tsv", "txt", "jsonl", "ndjson", "json", "parquet", "gz"]
    upload = st.file_uploader("File", type=types, max_upload_size=MAX_UPLOAD_MB)
    if upload is None:
        return
    with errors_as_messages():
        rows, texts = read_upload(upload.getvalue(), upload.name, column or None)
        request, shown = (model_set(), name, texts), st.session_state.get("classified", [None])
        if shown[0] != request:  # else only another widget of the page has changed
            with st.spinner(f"Classifying {len(texts):,} texts"):
                shown = st.session_state["classified"] = request, classify(name, texts)
        probabilities = shown[1]
        frame = pd.DataFrame(rows, dtype=object)
        frame["prediction"] = probabilities.idxmax(axis=1)
        frame[[f"probability_{label}" for label in probabilities]] = probabilities.round(4)
        st.dataframe(frame)
        if "json" in Path(upload.name.lower().removesuffix(".gz")).suffix:
            lines = (json.dumps(row, default=str) + "\n" for row in frame.to_dict("records"))
            file, content = "predictions.jsonl", "".join(lines)
        else:
            file, content = "predictions.csv", frame.to_csv(index=False)
        st.download_button("Download with predictions", content, file, on_click="ignore")


def read_upload(content: bytes, name: str, column: str | None = None) -> tuple[list, list[str]]:
    """Rows and texts of an uploaded file, read as the scripts read a file of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(name).name)
        path.write_bytes(content)
        try:
            rows, texts = read_unlabelled(path, column)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{folder}{os.sep}", "")) from None
    if len(rows) > MAX_ROWS:
        raise ValueError(f"the file has {len(rows):,} rows; the maximum is {MAX_ROWS:,}")
    return rows, [text[: 10 * MAX_TEXT] for text in texts]


def instructions_page() -> None:
    """The untouched base and the fine-tuned model answer side by side."""
    st.title("Instructions")
    st.write("The same prompt, answered by the untouched base and by the model after QLoRA.")
    question = st.text_area("Instruction", "Name three things to take to the beach.", max_chars=500)
    task = Instruction(question, st.text_area("Context (optional)", "", max_chars=MAX_TEXT))
    left, right = st.columns(2)
    temperature = left.slider("Temperature", 0.0, 2.0, 0.7, 0.05)
    sampling = {"temperature": temperature, "seed": right.number_input("Seed", 0, 2**31, 0)}
    go = start_button("Answer", BASE, QLORA)
    for column, title, name in zip(st.columns(2), ("Base", "QLoRA"), (BASE, QLORA)):
        with column, errors_as_messages():
            st.subheader(title)
            model, tokenizer, _ = loaded(name)
            ids = generate_response(model, tokenizer, task, **sampling) if go else None
            stream_text(name, ids, tokenizer)
    with errors_as_messages(), st.expander("Template and token mask"):
        model, tokenizer, _ = loaded(QLORA)
        response = st.text_input("A response to learn from", "Towel, book and hat.", max_chars=200)
        task = Instruction(task.instruction, task.context, response)
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
        text = st.text_area("Text", "Shall I compare thee to a summer's day?", max_chars=MAX_TEXT)
        ids = tokenizer.encode(text)
        if not ids:
            st.info("Write some text to see its tokens.")
            return
        n_bytes = len(text.encode())
        left, middle, right = st.columns(3)
        left.metric("Tokens", f"{len(ids):,}")
        middle.metric("Bytes", f"{n_bytes:,}")
        right.metric("Bytes per token", f"{n_bytes / len(ids):.2f}")
        with st.container(horizontal=True, gap="small"):
            for i, token_id in enumerate(ids[:SHOWN_BADGES]):
                color = COLORS[i % len(COLORS)]
                st.badge(badge(tokenizer.vocab[token_id], token_id), color=color)
        if len(ids) > SHOWN_BADGES:
            st.caption(f"The first {SHOWN_BADGES} of {len(ids):,} tokens.")
        st.subheader("Merges, step by step")
        word = st.text_input("Word", " summer", max_chars=40)
        rows = []
        for rank, ids in tokenizer.merge_steps(word):
            pair, vocab = "found whole" if rows else "bytes", tokenizer.vocab
            if rank is not None:
                pair = " + ".join(printable(vocab[i]) for i in tokenizer.merges[rank][:2])
            tokens = "  ".join(printable(vocab[i]) for i in ids)
            rows.append({"merge": pair, "rank": rank, "tokens": tokens})
        st.dataframe(pd.DataFrame(rows).astype({"rank": "Int64"}), hide_index=True)


def badge(token: bytes, token_id: int) -> str:
    """Markdown that shows a token literally, and its id. Invisible word joiners keep Streamlit from
    replacing dashes and arrows; it escapes square brackets itself."""
    return "\u2060".join([*(c.translate(MARKDOWN) for c in printable(token)), f" {token_id}"])


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
        for task, columns in REPORT_COLUMNS.items():
            header, *lines = table_cells(columns, rows[task])
            st.markdown(f"**{task.capitalize()}**")
            st.dataframe(pd.DataFrame(lines, columns=header), hide_index=True)
        formats = {"trained parameters": "~s", "peak memory (GiB)": ".2f", "training (s)": ",.0f"}
        for task in ("sentiment", "instructions"):
            tuned = [r for r in rows[task] if r["model"] in FINE_TUNINGS and "seconds" in r]
            if not tuned:
                continue
            frame = pd.DataFrame(tuned)
            costs = frame[["trained_parameters", "peak_memory_bytes", "seconds"]]
            frame[list(formats)] = costs / [1, 2**30, 1]
            st.markdown(f"**{task.capitalize()}: full fine-tuning against adapters**")
            for column, (name, x_format) in zip(st.columns(3), formats.items()):
                column.altair_chart(bars(frame[["model", name]], name, "model", x_format))
    except (KeyError, TypeError, AttributeError, ValueError):
        st.error(f"{path.name} cannot be read: recreate it with `{command}`.")


@st.fragment(run_every=REFRESH_SECONDS)
def curves() -> None:
    """Loss and learning rate of a training, read again every few seconds; one in progress, which
    has a log of its own, comes first."""
    paths = sorted(model_set().glob("*.log.jsonl"))
    paths.sort(key=lambda p: (".resume." not in p.name, not p.name.startswith("model_weights.")))
    names = (path.name.removesuffix(".log.jsonl") for path in paths)
    logs = {name.replace(".resume", " (in progress)"): path for name, path in zip(names, paths)}
    if not logs:
        st.info("There are no logs yet: train with `python main.py`.")
        return
    frame = pd.DataFrame(read_log(logs[st.selectbox("Training", list(logs), key="training")]))
    if frame.empty:
        st.info("No step is logged yet: wait a moment, or train with `python main.py`.")
        return
    st.caption(f"{frame.step.iloc[-1]:,.0f} steps, {frame.seconds.iloc[-1]:,.0f} seconds")
    titles = "Loss (nats; val_loss of language models per byte)", "Learning rate"
    metrics = ["loss", "val_loss"], ["learning_rate"]
    for column, title, names in zip(st.columns(2), titles, metrics):
        shown = frame.melt("step", frame.columns.intersection(names), "metric").dropna()
        chart = alt.Chart(shown, title=title).mark_line(point=True)
        value = alt.Y("value:Q", title=None).scale(zero=False)
        color = alt.Color("metric:N", title=None)
        column.altair_chart(chart.encode(x="step:Q", y=value, color=color))


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Complete lines of a log; the last one may still be written."""
    text, rows = "", []
    with contextlib.suppress(FileNotFoundError):  # a run in progress has just ended
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    for line in text[: text.rfind("\n") + 1].split("\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and {"step", "seconds"} <= row.keys()]


if __name__ == "__main__":
    main()
