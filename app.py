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
import pandas as pd
import streamlit as st
import torch

import generation
from data_loader import HINT, Instruction, read_unlabelled
from data_utils import IGNORE, encode_instruction
from evaluate import LINEAR, REPORT, REPORT_COLUMNS, load_linear_baseline, table_cells
from generation import BASE, LORA_CLASSIFIER, QLORA, TEMPERATURE, TOP_P, command_for
from lora import dequantize_nf4, quantize_nf4
from model import GPTModel
from tokenizer import BPETokenizer

MODELS = Path(os.environ.get("GPT_MODELS_DIR") or Path(__file__).parent / "models")
MAX_TEXT, MAX_ROWS, MAX_UPLOAD_MB = 2_000, 10_000, 10  # characters of a text, rows, MB of a file
MAX_SENTENCE, SENTENCE_TOKENS, SHOWN_TOKENS, MAX_ANSWER = 300, 32, 12, 500  # characters; tokens
FACT, VERSE = "The capital of France is", "Shall I compare thee to a summer's"  # examples
REFRESH_SECONDS, DRAW_SECONDS, CHART_COLOR = 3.0, 0.25, "#3a7ca5"
MARKDOWN = str.maketrans({c: f"\\{c}" for c in r"\`*_{}()#+-.!|<>~$:&="})  # shown literally
CLASSIFIERS = dict(REPORT["sentiment"][:3])  # files by name; the last row only guesses
ASSISTANTS = dict(REPORT["instructions"][:0:-1])  # QLoRA first; no row 0, the untouched base
PARTS = {"base": BASE, "LoRA classifier": LORA_CLASSIFIER, "QLoRA instruction model": QLORA}
ADAPTERS = (LORA_CLASSIFIER, generation.LORA, QLORA)
COSTS = {  # of a training: name in the report, unit and format
    "trained parameters": ("trained_parameters", 1, "~s"),
    "peak memory (GiB)": ("peak_memory_bytes", 2**30, ".2f"),
    "training (s)": ("seconds", 1, ",.0f"),
}
COLORS = ("blue", "green", "orange", "violet", "red")


def main() -> None:
    """Builds the chosen page, and the sidebar: the model sets, and what the chosen one lacks."""
    st.set_page_config(page_title="GPT from zero", layout="wide")
    pages = [
        st.Page(lambda: start_page(*pages[1:]), title="Start", url_path="start"),
        st.Page(generate_page, title="Generate", url_path="generate"),
        st.Page(chat_page, title="Chat", url_path="chat"),
        st.Page(sentiment_page, title="Sentiment", url_path="sentiment"),
        st.Page(how_page, title="How it works", url_path="how"),
        st.Page(training_page, title="Training and evaluation", url_path="training"),
    ]
    page = st.navigation(pages)
    found = sorted(path.parent for path in MODELS.glob("*/*.pth"))
    sets = list(dict.fromkeys([generation.default_model_set(MODELS), MODELS, *found]))
    st.sidebar.selectbox("Models", sets, 0, lambda f: f"{f.name}/", key="model_set")
    for part, name in PARTS.items():
        if not (path := model_set() / name).is_file():
            st.sidebar.caption(f"No {part}: `{command_for(path)}`")
    page.run()


# ---- what the pages share


def model_set() -> Path:
    """The folder chosen in the sidebar."""
    return st.session_state.get("model_set") or generation.default_model_set(MODELS)


def is_large(folder: str | Path) -> bool:
    """Whether a set has models so large that they are loaded only on request."""
    return any(path.stat().st_size > 50e6 for path in Path(folder).glob("*.pth"))


def checkpoint_path(name: str, folder: str | Path | None = None, must_exist: bool = False) -> Path:
    """A file of the chosen set, or of the shipped one if the user has not trained it yet."""
    path, shipped = Path(folder or model_set(), name), MODELS / "shipped" / name
    if not path.is_file() and path.parent == MODELS and shipped.is_file():
        return shipped
    if must_exist and not path.is_file():
        raise FileNotFoundError(f"No {name} in {path.parent.name}/ yet: `{command_for(path)}`")
    return path


@st.cache_resource(max_entries=8, show_spinner="Loading the model")
def _small(path: Path, kind: str, changed: tuple[int, ...], _load: Callable) -> Any:
    return _load(path)  # all but `_load`, because of its underscore, is the key of the cache


@st.cache_resource(max_entries=3, show_spinner="Loading the model; this takes a few seconds")
def _large(path: Path, kind: str, changed: tuple[int, ...], _load: Callable) -> Any:
    return _load(path)  # at most three in memory, for all sets and sessions


def loaded(name: str, folder: str | Path | None = None, read: Callable | None = None) -> Any:
    """Loads a file of the chosen model set, as a model or with `read`, once for all sessions, and
    again when it or a file it depends on changes. Callers must not modify the result."""
    path = checkpoint_path(name, folder, must_exist=True)
    if path.parent != Path(folder or model_set()):
        st.caption(f"Not trained (`{command_for(MODELS / name)}`): showing {path.parent.name}/.")
    paths = [path.with_name(file) for file in (name, "tokenizer.json", BASE, generation.REVIEW_LM)]
    changed = tuple(p.stat().st_mtime_ns if p.is_file() else 0 for p in paths)
    cached = _small if read or not is_large(path.parent) else _large
    read = read or generation.load_for_inference
    return cached(path, read.__name__, changed, read)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Shows errors without a traceback; of a missing file, a hint: the command that writes it."""
    try:
        yield
    except FileNotFoundError as error:
        st.info(str(error))
    except (ValueError, OSError) as error:
        st.error(str(error))


def stream_text(shown: Any, key: str, ids: Iterator, tokenizer: BPETokenizer, text: str) -> None:
    """Shows text as it is generated, never as Markdown or HTML. Stores it in `shown`, with a
    note, once it is on the screen: Streamlit interrupts a run just before it draws."""
    body, caption, tokens = st.empty(), st.empty(), []
    started = drawn = time.perf_counter()
    counted = (tokens.append(token_id) or token_id for token_id in ids)
    for new_text in itertools.chain(tokenizer.decode_stream(counted), [""]):
        text += new_text
        if new_text and time.perf_counter() - drawn < DRAW_SECONDS:  # drawing costs, too
            continue
        drawn = time.perf_counter()
        note = f"{len(tokens)} tokens, {len(tokens) / (drawn - started):.0f} tokens per second"
        body.text(text)
        shown[key] = text, note if tokens else "The model produced no text."
        caption.caption(shown[key][1])


def sampling_options(left: Any, middle: Any, right: Any, temperature: float) -> dict[str, Any]:
    """The widgets of sampling, in three columns."""
    return {
        "temperature": left.slider("Temperature", 0.0, 2.0, temperature, 0.05, help="0 is greedy"),
        "top_k": middle.slider("Top-k", 0, 200, 0, help="Number of tokens to sample from; 0: all"),
        "top_p": right.slider("Top-p", 0.05, 1.0, TOP_P, 0.05, help="Total probability to sample"),
        "repetition_penalty": middle.slider("Repetition penalty", 1.0, 2.0, 1.0, 0.05),
        "seed": right.number_input("Seed", 0, 2**31, 0, help="The same seed gives the same text"),
    }


def bars(columns: Any, x_format: str, **scale: Any) -> alt.Chart:
    """Horizontal bars of a table with a column of names and one of values, in its order."""
    (y, x), frame = columns, pd.DataFrame(columns)
    length = alt.X(x, type="quantitative").axis(format=x_format).scale(**scale)
    chart = alt.Chart(frame).mark_bar(color=CHART_COLOR)
    return chart.encode(x=length, y=alt.Y(y, type="nominal", sort=None), tooltip=[y, x])


def printable(token: bytes) -> str:
    """A token's text with spaces, line ends and control characters made visible."""
    text = token.decode(errors="replace").replace(" ", "\u00b7").replace("\n", "\u21b5")
    return "".join(chr(0x2400 + ord(c)) if ord(c) < 32 else c for c in text)


# ---- pages


def start_page(*pages: Any) -> None:
    """What the app shows, in four cards."""
    st.title("GPT from zero")
    st.write("A language model from the first byte to a conversation, in plain PyTorch.")
    cards = {
        "**Write and talk.** The base continues your text; fine-tuned models answer.": pages[:2],
        "**Classify.** Models judge a text, or a file of texts, side by side.": pages[2:3],
        "**Look inside.** Follow a sentence through the model, from bytes to loss.": pages[3:4],
        "**Measure.** Watch a training live, and compare models on held-out data.": pages[4:],
    }
    for column, (text, group) in zip([*st.columns(2), *st.columns(2)], cards.items()):
        with column.container(border=True, height="stretch"):
            st.write(text)
            for page in group:
                st.page_link(page, icon=":material/arrow_forward:")


def generate_page() -> None:
    """Text from the base model."""
    st.title("Generate")
    st.write("The base model continues your text, one token at a time, in the style it learned.")
    with errors_as_messages():
        example = FACT if is_large(model_set()) else loaded(BASE)[2].get("sample_prompt", "ROMEO:")
        prompt = st.text_area("Prompt", example, max_chars=MAX_TEXT)
        left, middle, right = st.columns(3)
        length = left.slider("Tokens", 10, 500, 200, 10)
        sampling = sampling_options(left, middle, right, TEMPERATURE)
        start, stop = st.columns([1, 5])
        stop.button("Stop")  # any button ends the run that streams
        key = f"text {model_set()}"
        if start.button("Generate", type="primary"):
            model, tokenizer, _ = loaded(BASE)
            ids = generation.continue_prompt(model, tokenizer, prompt, length, **sampling)
            stream_text(st.session_state, key, ids, tokenizer, prompt)
        elif key in st.session_state:
            st.text(st.session_state[key][0])
            st.caption(st.session_state[key][1])


def chat_page() -> None:
    """A conversation with a fine-tuned model and, on request, with its untouched base beside it."""
    st.title("Chat")
    st.write("The model reads the whole conversation, in its chat template, and answers.")
    with errors_as_messages():
        files, system, sampling = chat_settings()
        turns = st.session_state.setdefault(f"chat {model_set()}", [])
        asked = st.chat_input(key="question", max_chars=MAX_TEXT, submit_mode="stop")
        if asked:
            turns.append((asked, {}))

        def edit() -> None:
            st.session_state["question"] = turns.pop()[0]

        history = st.container()
        with st.container(horizontal=True):
            st.button("Edit the last question", on_click=edit, disabled=not turns)
            st.button("Clear", on_click=turns.clear)
            is_shown = st.toggle("Template and token mask")
        for i, (question, answers) in enumerate(turns, 1):
            history.chat_message("user").text(question)
            is_new = bool(asked) and i == len(turns)
            titles = list(files if is_new else answers)
            for column, title in zip(history.columns(len(titles) or 1), titles):
                with column, st.chat_message("assistant"), errors_as_messages():
                    st.caption(title)
                    if is_new:
                        answer(turns, files, title, system, sampling)
                    else:
                        st.text(answers[title][0])
                        st.caption(answers[title][1])
        if is_shown and turns:
            title, file = next(iter(files.items()))
            show_template(conversation(turns, title, system), file)


def chat_settings() -> tuple[dict[str, str], str, dict[str, Any]]:
    """The files of the models that answer, by title, the system line, and options of sampling."""
    checkpoint_path(BASE, must_exist=True)
    titles = [title for title, file in ASSISTANTS.items() if checkpoint_path(file).is_file()]
    with st.sidebar:
        title = st.selectbox("Model that answers", titles) if titles else "Base"
        with_base = titles and st.toggle("The untouched base beside it")
        with st.expander("Sampling and system line"):
            system = st.text_area("System line", max_chars=500)
            sampling = sampling_options(st, st, st, 0.7)
    if not titles:
        st.info(f"The base answers. Fine-tune it with `{command_for(checkpoint_path(QLORA))}`.")
    files = {title: ASSISTANTS.get(title, BASE)} | ({"Base": BASE} if with_base else {})
    return files, system, sampling


def conversation(turns: list[tuple[str, dict]], title: str, system: str) -> Instruction:
    """A chat as one model sees it: with its own answers or, where it gave none, with another's."""
    first = [next(iter(answers.values()), ("",)) for _, answers in turns]
    texts = [(q, "", answers.get(title, other)[0]) for (q, answers), other in zip(turns, first)]
    earlier = tuple(turn for turn in texts[:-1] if turn[2].strip())
    return Instruction(*texts[-1], system=system, earlier=earlier)


def answer(turns: list, files: dict, title: str, system: str, sampling: dict) -> None:
    """Streams a model's answer to the last question of a chat."""
    model, tokenizer, _ = loaded(files[title])
    if not tokenizer.chat_template and [*files.values()] == [BASE]:
        raise ValueError("this base has no chat template: it cannot answer before it is fine-tuned")
    task = dataclasses.replace(conversation(turns, title, system), response="")
    half = model.config.context_length // 2  # for the conversation, and as much for the answer
    if len(encode_instruction(task, tokenizer, 1 << 30)) > half:
        st.caption("Too long: the oldest turns or the end of a text were left out.")
    sampling = {**sampling, "max_new_tokens": min(MAX_ANSWER, half)}
    ids = generation.generate_response(model, tokenizer, task, **sampling)
    stream_text(turns[-1][1], title, ids, tokenizer, "")


def show_template(task: Instruction, name: str) -> None:
    """A conversation in the template of a model, and which of its tokens a training learns from."""
    model, tokenizer, _ = loaded(name)
    encoded = encode_instruction(task, tokenizer, model.config.context_length)
    st.code(tokenizer.decode(encoded.ids), language=None, wrap_lines=True)
    names = [printable(tokenizer.vocab[i]) for i in encoded.ids]
    rows = zip(names, names[1:], (target != IGNORE for target in encoded.targets[1:]))
    st.dataframe(pd.DataFrame(rows, columns=["input", "target", "carries loss"]), height=300)


def sentiment_page() -> None:
    """A text classified by three models, or a file of texts by one."""
    st.title("Sentiment")
    st.write("Which label fits a text? Two fine-tuned models beside a linear one.")
    example = "Stopped working after two days, and nobody answered my letters."
    text = st.text_area("Review", "" if is_large(model_set()) else example, max_chars=MAX_TEXT)
    folders, shipped = [model_set()], MODELS / "shipped"
    if shipped.is_dir() and shipped not in folders and st.toggle("Compare with shipped/"):
        folders.append(shipped)
    if not text.strip():
        st.info("Write a review to classify it.")
    for folder in folders if text.strip() else []:
        st.caption(f"{folder.name}/".translate(MARKDOWN))
        for column, name in zip(st.columns(len(CLASSIFIERS)), CLASSIFIERS):
            with column, errors_as_messages():
                row = classify(name, [text], folder).iloc[0]
                verdict, sure = row.idxmax().translate(MARKDOWN), f"{row.max():.0%} sure"
                st.metric(name, verdict, sure, delta_color="off", delta_arrow="off")
                columns = {"class": row.index, "probability": row.values}
                st.altair_chart(bars(columns, ".0%", domainMax=1))
    classify_file()


def classify(name: str, texts: list[str], folder: str | Path | None = None) -> pd.DataFrame:
    """Probabilities by one of `CLASSIFIERS`: a row for each text, a column for each label."""
    read = load_linear_baseline if name == LINEAR else None
    model, tokenizer, checkpoint = loaded(CLASSIFIERS[name], folder, read)
    if read:
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
        path = checkpoint_path(CLASSIFIERS[name], must_exist=True)
        request = model_set(), path, path.stat().st_mtime_ns, texts
        if request != st.session_state.get("classified", [None])[0]:  # else another widget changed
            with st.spinner(f"Classifying {len(texts):,} texts"):
                st.session_state["classified"] = request, classify(name, texts)
        _, probabilities = st.session_state["classified"]
        frame = pd.DataFrame(rows, dtype=object).replace({float("nan"): None})
        predictions = probabilities.round(4).add_prefix("probability_")
        predictions.insert(0, "prediction", probabilities.idxmax(axis=1))
        while {*predictions} & {*frame}:  # the file has columns of these names
            predictions = predictions.add_suffix("_2")
        frame[predictions.columns] = predictions
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
            text = str(error).replace(f"{folder}{os.sep}", "")
            raise ValueError(text.replace(HINT, "name the column of the texts above")) from None
    if len(rows) > MAX_ROWS:
        raise ValueError(f"the file has {len(rows):,} rows; the maximum is {MAX_ROWS:,}")
    return rows, [text[: 10 * MAX_TEXT] for text in texts]


@errors_as_messages()
def how_page() -> None:
    """A sentence, step by step through the base model; its weights in 4 bits, and its adapters."""
    st.title("How it works")
    st.write("Follow a sentence through the base model. Every number is computed by that model.")
    tokenizer, large = loaded("tokenizer.json", read=BPETokenizer.load), is_large(model_set())
    text = st.text_area("Sentence", FACT if large else VERSE, max_chars=MAX_SENTENCE, height=68)
    ids, vocab, n_bytes = tokenizer.encode(text), tokenizer.vocab, len(text.encode())
    if not ids:
        st.info("Write a sentence to follow it.")
        return
    step("1. Bytes, tokens, ids", "`tokenizer.py: BPETokenizer.encode` merges bytes into tokens.")
    st.code(text.encode().hex(" "), language=None, wrap_lines=True)
    with st.container(horizontal=True, gap="small"):
        for i, token_id in enumerate(ids):
            st.badge(badge(vocab[token_id], token_id), color=COLORS[i % len(COLORS)])
    st.write(f"{n_bytes:,} bytes, {len(ids):,} tokens: {n_bytes / len(ids):.2f} bytes per token.")
    steps = tokenizer.merge_steps(st.text_input("A word, merge by merge", " summer", max_chars=40))
    rows = [(rank, "  ".join(printable(vocab[i]) for i in parts)) for rank, parts in steps]
    frame = pd.DataFrame(rows, columns=["rank", "tokens"]).astype({"rank": "Int64"})
    st.dataframe(frame, hide_index=True)
    if large and not st.toggle("Load the model for the other steps"):
        return
    show_forward_pass(loaded(BASE)[0], tokenizer, ids[:SENTENCE_TOKENS])
    show_nf4(loaded(BASE, read=first_matrix))
    show_adapter()


def step(title: str, text: str) -> None:
    """The heading of a step, and what computes it."""
    st.write(f"### {title}\n\n{text}")


def show_forward_pass(model: GPTModel, tokenizer: BPETokenizer, ids: list[int]) -> None:
    """From token ids to logits, and what follows from them."""
    batch, vocab = torch.tensor([ids[: model.config.context_length]]), tokenizer.vocab
    names = [f"{i} {printable(vocab[token])}" for i, token in enumerate(batch[0].tolist(), 1)]
    step("2. Embeddings", "`model.py: GPTModel.embed` turns each id into a vector with this norm.")
    norms = model.embed(batch, 0)[0][0].detach().float().norm(dim=-1)
    st.altair_chart(bars({"token": names, "norm": norms}, ".2f"))
    show_attention(generation.attention_maps(model, batch)[:, 0].float(), names)
    step("4. Logit lens", "`generation.py: logit_lens` guesses the next token after each layer.")
    guesses, shades = [], []
    for logits in generation.logit_lens(model, batch):  # one layer at a time: V may be large
        logits = logits[0].float()
        best = [column.tolist() for column in logits.softmax(-1).max(-1)]
        guesses.append([f"{printable(vocab[i])} {p:.0%}" for p, i in zip(*best)])
        shades.append([f"background-color: {CHART_COLOR}{round(180 * p):02x}" for p in best[0]])
    layers = [f"layer {i}" for i in range(1, len(guesses) + 1)]
    frame, colors = (pd.DataFrame(rows, layers, names) for rows in (guesses, shades))
    st.dataframe(frame.style.apply(lambda _: colors, axis=None), height="content")
    show_sampling(logits[-1:], tokenizer)
    step("6. Loss", "`training.py: next_token_loss`: minus the log probability of each token.")
    if len(names) > 1:
        losses = torch.nn.functional.cross_entropy(logits[:-1], batch[0, 1:], reduction="none")
        st.altair_chart(bars({"token": names[1:], "loss (nats)": losses}, ".1f"))
        st.write(f"Mean: {losses.mean():.3f} nats per token. Training lowers this number.")


@st.fragment
def show_attention(maps: torch.Tensor, names: list[str]) -> None:
    """The attention weights (L, H, T, T) of a head."""
    step("3. Attention", "`model.py: CausalSelfAttention.weights` says where each token looks.")
    choices = zip(st.columns(2), ("Layer", "Head"), maps.shape)
    layer, head = (column.selectbox(title, range(1, n + 1)) for column, title, n in choices)
    weights = pd.DataFrame(maps[layer - 1, head - 1], names, names).rename_axis("token")
    frame = weights.reset_index().melt("token", var_name="attends to", value_name="weight")
    x, y = alt.X("attends to:N", sort=None), alt.Y("token:N", sort=None)
    shade = alt.Opacity("weight:Q").scale(domain=[0, 1], range=[0.03, 1])
    chart = alt.Chart(frame[frame.weight > 0], height=140 + 22 * len(names))
    st.altair_chart(chart.mark_rect(color=CHART_COLOR, tooltip=True).encode(x, y, shade))


@st.fragment
def show_sampling(logits: torch.Tensor, tokenizer: BPETokenizer) -> None:
    """The next-token probabilities of logits (1, V), before and after the options of sampling."""
    step("5. The next token", "`generation.py: token_probabilities` is what we sample from.")
    left, middle, right = st.columns(3)
    temperature = left.slider("Temperature", 0.05, 2.0, TEMPERATURE, 0.05)
    top_k = middle.slider("Top-k", 0, 50, 0, help="0 is all")
    top_p = right.slider("Top-p", 0.05, 1.0, TOP_P, 0.05)
    before = generation.token_probabilities(logits)[0]
    after = generation.token_probabilities(logits, temperature, top_k, top_p)[0]
    top, longest = before.topk(SHOWN_TOKENS).indices, max(before.max(), after.max()).item()
    names = [f"{printable(tokenizer.vocab[i])}  ({i})" for i in top.tolist()]
    for column, title, shown in zip(st.columns(2), ("model", "sampled"), (before, after)):
        columns = {"token (id)": names, f"probability ({title})": shown[top]}
        column.altair_chart(bars(columns, ".0%", domainMax=longest))
    st.write(f"{(after > 0).sum():,} of {len(after):,} tokens can be sampled.")


def first_matrix(path: str | Path) -> torch.Tensor:
    """A weight from the file of the base: the loaded one may be stored in fewer bits."""
    return generation.load_checkpoint(path, "base")["weights"]["blocks.0.mlp.fc.weight"].float()


@st.fragment
def show_nf4(weight: torch.Tensor) -> None:
    """The first block of 64 weights of a row, before and after quantisation to 4 bits."""
    step("7. 4-bit weights", "`lora.py: quantize_nf4` rounds to one of 16 levels times a scale.")
    row, q = st.slider("Row of `blocks.0.mlp.fc`", 0, len(weight) - 1), quantize_nf4(weight)
    codes = torch.stack([q.codes >> 4, q.codes & 15], dim=1).view(weight.shape)
    shown = {"before": weight, "code": codes, "after": dequantize_nf4(q)}
    frame = pd.DataFrame({name: matrix[row, :64] for name, matrix in shown.items()})
    left, right = st.columns([2, 1])
    left.scatter_chart(frame.reset_index(), x="index", y=["before", "after"])
    right.dataframe(frame)


@st.fragment
@errors_as_messages()
def show_adapter() -> None:
    """Which layers an adapter changed most, and the singular values of its updates."""
    step("8. Adapters", "`lora.py: LoRALinear.delta_weight` is a low-rank update of a weight.")
    files = [file for file in ADAPTERS if checkpoint_path(file).is_file()] or [LORA_CLASSIFIER]
    updates = loaded(st.selectbox("Adapter", files), read=generation.adapter_updates)
    left, right = st.columns(2)
    norms = {"layer": list(updates), "relative norm of update": [x for x, _ in updates.values()]}
    left.altair_chart(bars(pd.DataFrame(norms)[:SHOWN_TOKENS], ".1%"))
    values = updates[right.selectbox("Layer", list(updates))][1]
    right.altair_chart(bars({"number": range(1, len(values) + 1), "singular value": values}, ".2f"))


def badge(token: bytes, token_id: int) -> str:
    """Markdown of a literal token and its id; word joiners keep Streamlit off dashes and arrows."""
    return "\u2060".join([*(c.translate(MARKDOWN) for c in printable(token)), f" {token_id}"])


def training_page() -> None:
    """Curves from the logs, live, and the comparison table."""
    st.title("Training and evaluation")
    st.write("Logged losses and learning rates, updated live, and metrics on held-out data.")
    curves()
    st.subheader("Comparison")
    path = model_set() / "report.json"
    command = f"python evaluate.py --models {path.parent}"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for task, columns in REPORT_COLUMNS.items():
            header, *lines = table_cells(columns, rows[task])
            st.markdown(f"**{task.capitalize()}**")
            st.dataframe(pd.DataFrame(lines, columns=header), hide_index=True)
            tuned = [r for r in rows[task] if r["model"] in ASSISTANTS and "seconds" in r]
            if not tuned:
                continue
            names = [row["model"] for row in tuned]
            for column, (title, (key, unit, x_format)) in zip(st.columns(3), COSTS.items()):
                costs = {"model": names, title: [row[key] / unit for row in tuned]}
                column.altair_chart(bars(costs, x_format))
    except FileNotFoundError:
        st.info(f"There is no {path.name} yet: create it with `{command}`.")
    except (KeyError, TypeError, AttributeError, ValueError):
        st.error(f"{path.name} cannot be read: recreate it with `{command}`.")


@st.fragment(run_every=REFRESH_SECONDS)
def curves() -> None:
    """Loss and learning rate of a training, read every few seconds; one in progress comes first."""
    paths = sorted(model_set().glob("*.log.jsonl"))
    paths.sort(key=lambda p: (".resume." not in p.name, not p.name.startswith("model_weights.")))
    names = (p.name.removesuffix(".log.jsonl").replace(".resume", " (in progress)") for p in paths)
    logs = dict(zip(names, paths))
    chosen = st.selectbox("Training", list(logs), key="training") if logs else None
    frame = pd.DataFrame(read_log(logs[chosen]) if logs else [])
    if frame.empty:
        command = command_for(model_set() / (LORA_CLASSIFIER if is_large(model_set()) else BASE))
        st.info(f"No step is logged yet: wait a moment, or train with `{command}`.")
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
    rows = []
    with contextlib.suppress(FileNotFoundError):  # a run in progress has just ended
        for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and {"step", "seconds"} <= row.keys()]


if __name__ == "__main__":
    main()
