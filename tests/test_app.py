"""The dashboard's pages, without a browser: right answers, messages for what is missing."""

import gc
import importlib
import itertools
import json
import operator
import re
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import dequantized, randomised, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streamlit.runtime.scriptrunner import StopException
from streamlit.testing.v1 import AppTest

import app
import generation
from data_loader import LABELS, Instruction
from data_utils import CHAT_TEMPLATE, IGNORE, encode_instruction
from generation import (
    BASE,
    FULL,
    LORA_CLASSIFIER,
    QLORA,
    class_probabilities,
    continue_prompt,
    generate_response,
    load_for_inference,
    load_model,
)
from lora import dequantize_nf4, lora_layers, nf4_levels, quantize_nf4
from model import GPTModel
from tokenizer import BPETokenizer
from training import load_checkpoint, next_token_loss, save_checkpoint

ROOT = Path(__file__).parents[1]
PAGES = ["start", "generate", "chat", "sentiment", "how", "training"]


@pytest.fixture
def models(all_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, which the app reads."""
    folder = tmp_path / "models"
    shutil.copytree(all_models, folder)
    monkeypatch.setattr(app, "MODELS", folder)
    return folder


def page(name: str, folder: Path | None = None) -> AppTest:
    """A page, run once; the start page with the links to the others."""
    run = "main" if name == "start" else f"{name}_page"
    at = AppTest.from_string(f"import app\napp.{run}()", default_timeout=120)
    if folder:
        at.session_state["model_set"] = folder
    return at.run()


def set_slider(at: AppTest, label: str, value: float) -> None:
    (slider,) = [slider for slider in at.slider if slider.label == label]
    slider.set_value(value)


def ask(at: AppTest, question: str) -> None:
    at.chat_input[0].set_value(question).run()


def assert_quiet(at: AppTest) -> None:
    assert not at.exception and not at.error, [e.value for e in (*at.exception, *at.error)]


@pytest.mark.parametrize("name", PAGES)
def test_every_page_opens_with_a_title_and_a_sentence(name: str, models: Path):
    at = page(name)
    assert_quiet(at)
    assert len(at.title) == 1 and at.markdown[0].value.endswith(".")


@pytest.mark.parametrize("name", PAGES)
def test_an_empty_folder_gives_commands_and_no_traceback(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "MODELS", tmp_path)
    at = page(name)
    assert_quiet(at)
    messages = [m.value for m in (*at.info, *at.sidebar.caption)]
    assert messages and all("python " in message for message in messages)


@pytest.mark.parametrize(
    ("name", "file", "command"),
    [
        ("generate", BASE, "python main.py"),
        ("chat", BASE, "python main.py"),
        ("how", BASE, "python main.py"),
        ("sentiment", LORA_CLASSIFIER, "python finetune_lora_classifier.py"),
        ("sentiment", generation.LINEAR_BASELINE, "python finetune_classifier.py"),
    ],
)
def test_a_model_that_a_set_lacks_is_a_hint_of_one_line(
    name: str, file: str, command: str, models: Path
):
    (models / file).unlink()
    at = page(name, models)
    assert_quiet(at)
    assert [hint.value for hint in at.info] == [f"No {file} in models/ yet: `{command}`"]
    assert len(at.metric) == (2 if name == "sentiment" else 0), "the others are shown"


def test_four_cards_say_what_the_app_shows(models: Path):
    at = page("start")
    assert_quiet(at)
    cards = [text.value for text in at.main.markdown if text.value.startswith("**")]
    assert len(cards) == 4 and len(at.main.get("page_link")) == len(PAGES) - 1


def test_generated_text_is_that_of_the_command_line(models: Path):
    at = page("generate")
    at.text_area[0].set_value("ROMEO:\nO").run()
    set_slider(at, "Temperature", 1.0)
    set_slider(at, "Tokens", 30)
    at.button[0].click().run()
    assert_quiet(at)
    model, tokenizer, _ = load_model(models / "model_weights.pth")
    ids = continue_prompt(model, tokenizer, "ROMEO:\nO", 30, temperature=1.0)
    expected = "ROMEO:\nO" + "".join(tokenizer.decode_stream(ids))
    assert at.text[0].value == expected
    assert "tokens per second" in at.caption[0].value
    at.button[1].click().run()  # Stop: what was shown stays
    assert at.text[0].value == expected


@pytest.mark.parametrize("drawings", range(1, 9))
def test_an_interrupted_text_stays_as_it_was_on_the_screen(
    drawings: int, all_models: Path, monkeypatch: pytest.MonkeyPatch
):
    """Streamlit raises StopException instead of drawing; text and note are drawn one by one."""
    screen: dict[str, str] = {}

    class Place:
        def draw(self, name: str, text: str) -> None:
            if next(count) == drawings:
                raise StopException
            screen[name] = text

        def text(self, text: str) -> None:
            self.draw("text", text)

        def caption(self, text: str) -> None:
            self.draw("caption", text)

    count, shown = itertools.count(), {}
    monkeypatch.setattr(app.st, "empty", Place)
    monkeypatch.setattr(app, "DRAW_SECONDS", 0)
    _, tokenizer, _ = load_model(all_models / "model_weights.pth")
    with pytest.raises(StopException):
        app.stream_text(shown, "text", iter(tokenizer.encode("a long story")), tokenizer, "ROMEO")
    assert shown["text"][0] == screen["text"]
    if drawings % 2 == 0:
        assert shown["text"][1] == screen["caption"]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_tokens_that_arrive_together_are_drawn_together(
    all_models: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
):
    """Every drawing takes the browser's time, which on the same cores is the model's."""
    drawn: list[str] = []
    place = SimpleNamespace(text=drawn.append, caption=lambda text: None)
    monkeypatch.setattr(app.st, "empty", lambda: place)
    monkeypatch.setattr(app, "DRAW_SECONDS", seconds)
    _, tokenizer, _ = load_model(all_models / "model_weights.pth")
    ids, shown = tokenizer.encode("a long story"), {}
    app.stream_text(shown, "text", iter(ids), tokenizer, "ROMEO")
    whole = "ROMEOa long story"
    parts = [tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)] if not seconds else []
    assert drawn == [*(f"ROMEO{part}" for part in parts), whole] and shown["text"][0] == whole
    assert shown["text"][1].startswith(f"{len(ids)} tokens, ")


def test_an_empty_prompt_is_no_error(models: Path):
    at = page("generate")
    at.text_area[0].set_value("").run()
    at.button[0].click().run()
    assert_quiet(at)


def test_probabilities_are_those_of_the_classifiers(models: Path):
    at = page("sentiment")
    at.text_area[0].set_value("I love it").run()
    assert_quiet(at)
    assert [m.label for m in at.metric] == list(app.CLASSIFIERS)
    for metric, name in zip(at.metric[:2], ("finetuned_classifier", "lora_classifier")):
        model, tokenizer, _ = load_model(models / f"{name}_weights.pth")
        (found,) = class_probabilities(model, tokenizer, ["I love it"])
        assert metric.value == LABELS[int(found[1] >= 0.5)]
        assert metric.delta == f"{found.max():.0%} sure"


def test_a_classifier_of_topics_has_a_bar_for_each_label(models: Path):
    path, labels = models / "finetuned_classifier_weights.pth", ["<b>Sport</b>", "Tech", "World"]
    checkpoint = load_checkpoint(path, "classifier")
    weights = {
        name: torch.cat([w, w[:1] + 1]) if name.startswith("classifier_head") else w
        for name, w in checkpoint["weights"].items()
    }
    save_checkpoint(path, {**checkpoint, "labels": labels, "weights": weights})
    at = page("sentiment")
    assert_quiet(at)
    found = app.classify("full fine-tuning", ["a", "b"])
    assert [*found] == labels and found.shape == (2, 3)
    verdict = app.classify("full fine-tuning", [at.text_area[0].value]).iloc[0].idxmax()
    assert at.metric[0].value == verdict.translate(app.MARKDOWN)
    assert "<b>".translate(app.MARKDOWN) == r"\<b\>"


def test_a_refused_adapter_is_a_message_beside_the_others(models: Path):
    path = models / "review_lm_weights.pth"
    checkpoint = load_checkpoint(path, "base")
    weights = {n: w + 1 if n == "head.weight" else w for n, w in checkpoint["weights"].items()}
    save_checkpoint(path, {**checkpoint, "weights": weights})
    at = page("sentiment")
    assert not at.exception and len(at.metric) == 2
    assert "python finetune_lora_classifier.py" in at.error[0].value


@pytest.mark.parametrize("name", ["model_weights.pth", "tokenizer.json"])
@pytest.mark.parametrize("shown", PAGES)
def test_damaged_files_are_messages(name: str, shown: str, models: Path):
    path = models / name
    path.write_bytes(path.read_bytes()[:200])
    at = page(shown)
    if shown == "chat":
        ask(at, "Who?")
    reads_base = shown in ("generate", "chat", "how")
    uses_it = reads_base or (name == "tokenizer.json" and shown == "sentiment")
    assert not at.exception
    assert all("python " in error.value for error in at.error)
    assert bool(at.error) == uses_it


def test_an_adapter_is_refused_as_soon_as_its_base_changes(models: Path):
    at = page("chat")
    ask(at, "Who?")
    assert_quiet(at)
    path = models / "model_weights.pth"
    checkpoint = load_checkpoint(path, "base")
    weights = {n: w * 1.5 for n, w in checkpoint["weights"].items()}
    save_checkpoint(path, {**checkpoint, "weights": weights})
    ask(at, "Who?")
    assert not at.exception and "was trained on another base" in at.error[0].value


def test_uploads_are_read_as_the_scripts_read_files():
    content = b'\xef\xbb\xbftitle,content\nGood,"a, b"\n,only\n'
    rows, texts = app.read_upload(content, "a.csv")
    assert texts == ["Good\na, b", "only"] and rows[1] == {"title": "", "content": "only"}
    lines = b'{"text": "x\\u2028y", "n": 1}\n\n{"text": "z", "n": null}'
    rows, texts = app.read_upload(lines, "a.JSONL")
    assert texts == ["x\u2028y", "z"] and [row["n"] for row in rows] == [1, None]
    assert app.read_upload(b"good\t1\nbad\t0\n", "a.tsv")[1] == ["good", "bad"]
    assert app.read_upload(b"note;n\ngood;1\n", "a.csv", "note")[1] == ["good"]
    for name, content, message in (
        ("a.csv", b"", "has no valid row"),
        ("a.csv", b"\xff" + bytes(9), r"^a\.csv is not text"),
        ("a.csv", b"n;m;o;p\n1;2;3;4\n", r"^a\.csv: 4 columns without known names, n, m"),
        (
            "a.jsonl",
            b'{"n": 1}',
            "row 1: no text; ignored columns: n; name the column of the texts above",
        ),
        ("a.csv", b"text\nI love it, really\n", "row 2: 2 fields instead of 1"),
        ("a.jsonl", b"{", "row 1: not JSON"),
        ("a.jsonl", b'{"text": "a"}\nnull', "row 2: not an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": " "}', "row 2: no text"),
        ("a.csv", b"text\n", "has no valid row"),
        ("a.csv", b"text\n" + b"x\n" * (app.MAX_ROWS + 1), "10,001 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            app.read_upload(content, name)


def test_the_shipped_models_stand_in_until_the_user_has_trained(
    all_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As after `python main.py` on a fresh clone: a base and nothing else."""
    shutil.copytree(all_models, tmp_path / "shipped")
    for name in ("tokenizer.json", BASE):
        shutil.copy(all_models / name, tmp_path)
    monkeypatch.setattr(app, "MODELS", tmp_path)
    for name in PAGES:
        at = page(name)
        if name == "chat":
            ask(at, "Who?")
        assert_quiet(at)
        captions = [caption.value for caption in at.caption]
        stands_in = any("showing shipped/" in caption for caption in captions)
        assert stands_in == (name in ("sentiment", "chat", "how")), captions


def test_the_sidebar_chooses_the_model_set_and_names_what_it_lacks(
    all_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A set without its base, as a clone has one, is listed with the command that fetches it."""
    folder = tmp_path / "models"
    names = "shipped", "other", "smollm2-135m-instruct"
    for name in names:
        shutil.copytree(all_models, folder / name)
    (folder / "cache").mkdir()  # holds no model
    (folder / "other" / LORA_CLASSIFIER).unlink()
    (folder / names[2] / BASE).unlink()
    monkeypatch.setenv("GPT_MODELS_DIR", str(folder))
    at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    assert_quiet(at)
    chooser = at.sidebar.selectbox[0]
    assert chooser.options == ["shipped/", "models/", "other/", "smollm2-135m-instruct/"]
    assert chooser.value.name == "shipped" and not at.sidebar.caption
    chooser.set_value(folder / "other").run()
    assert_quiet(at)
    command = "`python finetune_lora_classifier.py --base other`"
    assert [c.value for c in at.sidebar.caption] == [f"No LoRA classifier: {command}"]
    at.sidebar.selectbox[0].set_value(folder / names[2]).run()
    command = "`python main.py --pretrained smollm2-135m-instruct`"
    assert [c.value for c in at.sidebar.caption] == [f"No base: {command}"]
    at.sidebar.selectbox[0].set_value(folder).run()
    assert at.sidebar.caption[0].value == "No base: `python main.py`"


# ---- chat


def click(at: AppTest, label: str) -> None:
    next(button for button in at.button if button.label == label).click().run()


def expected_answer(models: Path, file: str, task: Instruction, **sampling: object) -> str:
    model, tokenizer, _ = load_for_inference(models / file)
    n = model.config.context_length // 2
    ids = generate_response(model, tokenizer, task, max_new_tokens=n, **sampling)
    return "".join(tokenizer.decode_stream(ids))


def shown_texts(at: AppTest) -> list[str]:
    """Questions and answers; Streamlit strips them."""
    return [text.value for text in at.text]


def test_an_answer_is_that_of_the_model_to_the_whole_conversation(models: Path):
    at = page("chat")
    ask(at, "Who?")
    next(box for box in at.text_area if box.label == "System line").set_value("Be brief.")
    set_slider(at, "Temperature", 1.0)
    set_slider(at, "Repetition penalty", 1.3)
    at.number_input[0].set_value(7)
    ask(at, "Why?")
    assert_quiet(at)
    first = expected_answer(models, QLORA, Instruction("Who?"), temperature=0.7)
    task = Instruction("Why?", system="Be brief.", earlier=(("Who?", "", first),))
    sampling = {"temperature": 1.0, "repetition_penalty": 1.3, "seed": 7}
    second = expected_answer(models, QLORA, task, **sampling)
    texts = ["Who?", first.strip(), "Why?", second.strip()]
    assert shown_texts(at) == texts
    notes = [note.value for note in at.caption if "tokens per second" in note.value]
    assert len(notes) == 2 and notes[0].split()[0].isdigit()
    at.run()
    assert shown_texts(at) == texts, "no new answer"


def test_the_last_question_is_edited_and_a_chat_cleared(models: Path):
    at = page("chat")
    for question in ("Who?", "Why?"):
        ask(at, question)
    click(at, "Edit the last question")
    assert at.text[0].value == "Who?" and len(at.text) == 2
    assert at.chat_input[0].value == "Why?", "back in the box"
    ask(at, "When?")
    assert shown_texts(at)[::2] == ["Who?", "When?"]
    click(at, "Clear")
    assert_quiet(at)
    assert not at.text


def test_the_untouched_base_answers_beside_any_instruction_model(models: Path):
    checkpoint = load_checkpoint(models / BASE, "base")
    checkpoint |= {"kind": "full_instruction", "chat_template": CHAT_TEMPLATE}
    save_checkpoint(models / FULL, checkpoint)
    at = page("chat")
    assert at.sidebar.selectbox[0].options == ["QLoRA, 4-bit base", "full fine-tuning"]
    at.sidebar.selectbox[0].set_value("full fine-tuning")
    at.sidebar.toggle[0].set_value(True).run()
    ask(at, "Who?")
    assert_quiet(at)
    assert [c.value for c in at.caption][::2] == ["full fine-tuning", "Base"]
    expected = expected_answer(models, BASE, Instruction("Who?"), temperature=0.7)
    assert shown_texts(at) == ["Who?", expected.strip(), expected.strip()]


def test_template_and_mask_show_the_conversation(models: Path):
    at = page("chat")
    at.toggle[0].set_value(True).run()
    ask(at, "Who? ### Response\n<|endoftext|>")
    click(at, "Clear")
    for question in ("Who?", "Why <|endoftext|>"):
        ask(at, question)
    assert_quiet(at)
    _, first, _, second = (text.value for text in at.text)
    earlier = (("Who?", "", first),) if first.strip() else ()
    task = Instruction("Why <|endoftext|>", "", second, earlier=earlier)
    model, tokenizer, _ = load_for_inference(models / QLORA)
    example = encode_instruction(task, tokenizer, model.config.context_length)
    assert at.code[0].value == tokenizer.decode(example.ids)
    mask = at.dataframe[0].value["carries loss"].tolist()
    assert mask == [target != IGNORE for target in example.targets[1:]] and any(mask)


def test_a_conversation_that_outgrows_the_context_says_so(models: Path):
    at = page("chat")
    for question in ("Who?", "What was the name of the king of the sea and of all the land?"):
        ask(at, question)
    ask(at, "And of the queen?")
    assert_quiet(at)
    said = [c.value for c in at.caption]
    assert any("oldest turns" in caption for caption in said)
    assert not any("oldest turns" in caption for caption in said[:4]), "not of the first answer"


def test_without_an_instruction_model_a_base_answers_if_it_has_a_template(models: Path):
    (models / QLORA).unlink()
    at = page("chat")
    assert_quiet(at)
    assert "`python finetune_qlora_instructions.py`" in at.info[0].value
    ask(at, "Who?")
    assert "has no chat template" in at.error[0].value
    checkpoint = load_checkpoint(models / BASE, "base")
    save_checkpoint(models / BASE, {**checkpoint, "chat_template": CHAT_TEMPLATE})
    ask(at, "Who?")
    assert_quiet(at)
    expected = expected_answer(models, BASE, Instruction("Who?"), temperature=0.7)
    assert at.text[-1].value == expected.strip()


# ---- large models


def test_no_large_model_is_loaded_before_it_is_asked_for(
    models: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: list[str] = []
    load = generation.load_for_inference
    monkeypatch.setattr(
        generation, "load_for_inference", lambda path: (opened.append(path.name), load(path))[1]
    )
    monkeypatch.setattr(app, "is_large", lambda _: True)
    pages = {name: page(name) for name in PAGES}
    assert not opened
    for at in pages.values():
        assert_quiet(at)
    click(pages["generate"], "Generate")
    assert opened == [BASE] and pages["generate"].text
    ask(pages["chat"], "Who?")
    pages["sentiment"].text_area[0].set_value("good").run()
    assert opened == [BASE, QLORA, generation.FULL_CLASSIFIER, LORA_CLASSIFIER]
    assert len(pages["sentiment"].metric) == 3
    assert len(pages["how"].dataframe) == 1, "the merges alone"
    pages["how"].toggle[0].set_value(True).run()
    assert_quiet(pages["how"])
    assert opened[4:] == [BASE] and len(pages["how"].dataframe) == 3


def test_at_most_three_large_models_are_kept_and_sessions_share_them(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app, "is_large", lambda _: True)
    folders = [shutil.copytree(models, tmp_path / f"set{i}") for i in range(5)]
    kept = []
    for folder in folders:
        model, _, _ = app.loaded(BASE, folder)
        assert app.loaded(BASE, folder)[0] is model
        kept.append(weakref.ref(model))
        del model
    gc.collect()
    assert [ref() is not None for ref in kept] == [False, False, True, True, True]


# ---- sentiment


def test_models_from_scratch_judge_the_same_text(
    all_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("shipped", "other"):
        shutil.copytree(all_models, tmp_path / name)
    monkeypatch.setattr(app, "MODELS", tmp_path)
    at = AppTest.from_string("import app\napp.sentiment_page()", default_timeout=60)
    at.session_state["model_set"] = tmp_path / "other"
    at.run()
    assert len(at.metric) == 3
    at.toggle[0].set_value(True).run()
    assert_quiet(at)
    assert [m.value for m in at.metric[:3]] == [m.value for m in at.metric[3:]]
    assert [c.value for c in at.caption[:2]] == ["other/", "shipped/"] and len(at.metric) == 6


def test_a_file_is_judged_once(models: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    judge = app.classify
    monkeypatch.setattr(
        app, "classify", lambda n, t, *f: (calls.append(len(t)), judge(n, t, *f))[1]
    )
    at = page("sentiment")
    at.file_uploader[0].set_value(("a.csv", b"text,n\ngood,1\nbad,2\n", "text/csv")).run()
    at.run()
    assert_quiet(at)
    assert calls.count(2) == 1
    frame, found = at.dataframe[0].value, judge("full fine-tuning", ["good", "bad"])
    assert [*frame] == ["text", "n", "prediction", "probability_negative", "probability_positive"]
    assert frame["prediction"].tolist() == found.idxmax(axis=1).tolist()
    assert frame["probability_positive"].tolist() == found["positive"].round(4).tolist()
    at.selectbox[0].set_value("LoRA").run()
    assert calls.count(2) == 2


def test_a_file_is_judged_again_by_a_classifier_that_was_trained_again(models: Path):
    at = page("sentiment")
    at.file_uploader[0].set_value(("a.csv", b"text\ngood\n", "text/csv")).run()
    before = at.dataframe[0].value["prediction"].tolist()
    path = models / "finetuned_classifier_weights.pth"
    with generation.open_checkpoint(path) as checkpoint:
        contents = {**checkpoint, "labels": ("worse", "better")}
    save_checkpoint(path, contents)
    at.run()
    assert_quiet(at)
    labels = {"negative": "worse", "positive": "better"}
    assert at.dataframe[0].value["prediction"].tolist() == [labels[name] for name in before]


def test_predictions_replace_no_column_of_a_file(models: Path):
    at = page("sentiment")
    content = b"text,prediction,prediction_2,probability_negative\ngood,a,b,0.5\n"
    at.file_uploader[0].set_value(("a.csv", content, "text/csv")).run()
    assert_quiet(at)
    (row,) = at.dataframe[0].value.to_dict("records")
    given = {"text": "good", "prediction": "a", "prediction_2": "b", "probability_negative": "0.5"}
    made = [
        f"{name}_2_2" for name in ("prediction", "probability_negative", "probability_positive")
    ]
    assert given.items() <= row.items() and [*row] == [*given, *made]
    assert row["prediction_2_2"] in ("negative", "positive")


# ---- how it works


def test_each_step_names_code_that_is_there():
    named = re.findall(r"`(\w+)\.py: ([\w.]+)`", Path(app.__file__).read_text())
    assert len(named) == 8
    for module, name in named:
        operator.attrgetter(name)(importlib.import_module(module))


LLAMA = {"norm": "rms", "activation": "swiglu", "n_kv_head": 1, "qk_norm": False}


@pytest.mark.parametrize("changes", [{}, {**LLAMA, "tie_weights": True}])
def test_the_lens_gives_the_logits_of_a_model_that_ends_after_each_layer(changes: dict):
    model = randomised(GPTModel(tiny_config(50, n_layer=3, **changes)))
    ids = torch.arange(12).view(2, 6)
    found = list(generation.logit_lens(model, ids))
    assert len(found) == 3 and torch.equal(found[-1], model(ids))
    blocks = model.blocks
    for n, logits in enumerate(found, 1):
        model.blocks = blocks[:n]
        assert torch.allclose(logits, model(ids), atol=1e-6)
    assert not torch.allclose(found[0], found[-1], atol=0.1)


@pytest.mark.parametrize("file", [LORA_CLASSIFIER, QLORA])
def test_updates_of_an_adapter_are_those_of_the_model(file: str, all_models: Path):
    updates = generation.adapter_updates(all_models / file)
    model, _, _ = load_model(all_models / file)
    layers = {name.removeprefix("backbone."): layer for name, layer in lora_layers(model)}
    assert updates.keys() == layers.keys()
    for name, layer in layers.items():
        update, r = layer.delta_weight().detach(), len(updates[name][1])
        assert updates[name][1] == pytest.approx(torch.linalg.svdvals(update)[:r], abs=1e-5)
        norm = dequantized(layer.base_layer).weight.norm()
        assert updates[name][0] == pytest.approx((update.norm() / norm).item(), rel=0.05)
    norms = [norm for norm, _ in updates.values()]
    assert norms == sorted(norms, reverse=True) and norms[-1] > 0


def test_every_number_is_that_of_the_model(models: Path):
    at = page("how")
    at.text_area[0].set_value("O my king").run()
    set_slider(at, "Top-k", 1)
    set_slider(at, "Row of `blocks.0.mlp.fc`", 3)
    at.run()
    assert_quiet(at)
    model, tokenizer, _ = load_for_inference(models / BASE)
    ids = torch.tensor([tokenizer.encode("O my king")])
    logits = model(ids).detach()
    said = " ".join(text.value for text in at.markdown)
    assert at.code[0].value == "4f 20 6d 79 20 6b 69 6e 67"
    assert f"9 bytes, {ids.shape[1]} tokens: {9 / ids.shape[1]:.2f} bytes per token." in said
    loss, _ = next_token_loss(model, (ids[:, :-1], ids[:, 1:]))
    assert f"Mean: {loss.item() / (ids.shape[1] - 1):.3f} nats per token." in said
    assert "1 of 400 tokens can be sampled." in said
    _, lens, block = (shown.value for shown in at.dataframe)
    probabilities, tokens = logits[0].softmax(-1).max(-1)
    words = [app.printable(tokenizer.vocab[token]) for token in tokens]
    assert [*lens.iloc[-1]] == [f"{word} {p:.0%}" for word, p in zip(words, probabilities)]
    assert len(lens) == model.config.n_layer
    weight = model.blocks[0].mlp.fc.weight.detach()
    assert block["before"].tolist() == weight[3, :64].tolist()
    rounded = dequantize_nf4(quantize_nf4(weight))[3, :64]
    assert block["after"].tolist() == rounded.tolist()
    levels = nf4_levels()[block["code"].tolist()]  # of one block, so in proportion
    assert torch.allclose(levels * rounded.abs().max() / levels.abs().max(), rounded, atol=1e-6)


def test_a_long_sentence_is_cut_for_the_model_and_one_token_has_no_loss(models: Path):
    at = page("how")
    at.text_area[0].set_value("O my king and my lord, " * 9).run()
    assert_quiet(at)
    assert at.dataframe[1].value.shape[1] == app.SENTENCE_TOKENS
    at.text_area[0].set_value("O").run()
    assert_quiet(at)
    assert not any("nats" in text.value for text in at.markdown)


def test_a_set_without_adapters_gets_the_command(models: Path):
    for file in app.ADAPTERS:
        (models / file).unlink(missing_ok=True)
    at = page("how")
    assert_quiet(at)
    command = "`python finetune_lora_classifier.py`"
    assert [hint.value for hint in at.info] == [f"No {LORA_CLASSIFIER} in models/ yet: {command}"]


def test_a_word_is_built_by_its_merges(models: Path):
    at = page("how")
    at.text_input[0].set_value(" king").run()
    assert_quiet(at)
    tokenizer = BPETokenizer.load(models / "tokenizer.json")
    frame = at.dataframe[0].value
    assert frame["tokens"].iloc[0] == "\u00b7  k  i  n  g"
    expected = "  ".join(app.printable(tokenizer.vocab[i]) for i in tokenizer.encode(" king"))
    assert frame["tokens"].iloc[-1] == expected


def test_what_a_user_writes_is_shown_as_text(models: Path):
    at = page("how")
    at.text_area[0].set_value("<script>alert(1)</script> **bold** :red[x] $y$").run()
    assert_quiet(at)
    assert app.badge(b"*<b>", 7).replace("\u2060", "") == r"\*\<b\> 7"
    assert app.printable(b" a\n\t") == "\u00b7a\u21b5\u2409"


# ---- any input


ODD = [
    "\0",
    "\x1b[31m",
    "\u202eabc",
    "a\u0301" * 50,
    "\U0001f600" * 99,
    "<|endoftext|>",
    "x" * 2000,
]


@pytest.mark.parametrize("odd", ODD)
def test_any_text_gets_an_answer_on_every_page(odd: str, models: Path):
    at = page("chat")
    ask(at, odd)
    assert_quiet(at)
    assert at.text[0].value == odd
    for name in ("generate", "sentiment", "how"):
        at = page(name)
        at.text_area[0].set_value(odd).run()
        for box in at.text_input:
            box.set_value(odd[:40])
        assert_quiet(at.run())


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_arbitrary_text_is_shown_and_judged(text: str, models: Path):
    for name in ("how", "sentiment"):
        at = page(name)
        at.text_area[0].set_value(text).run()
        assert_quiet(at)


def test_curves_and_table_come_from_the_files(models: Path):
    rows = {
        "language": [{"model": "base", "problem": "nothing"}],
        "sentiment": [
            {
                "model": "LoRA",
                "measured_on": "sample",
                "n": 8,
                "accuracy": 0.875,
                "ci95": [0.8, 0.9],
                "macro_f1": 0.87,
                "trained_parameters": 10,
                "parameters": 1000,
                "file_bytes": 2000,
                "seconds": 3.0,
                "peak_memory_bytes": 2**30,
            }
        ],
        "instructions": [],
    }
    (models / "report.json").write_text(json.dumps(rows))
    at = page("training")
    assert_quiet(at)
    shown = " | ".join(at.dataframe[1].value.iloc[0])
    expected = "LoRA | sample, 8 texts | 87.5% | 80.0% to 90.0% | 0.870 | 10 | 1,000 | 2 kB | 3 s"
    assert shown == f"{expected} | 1.00 GiB"
    logs = sorted(path.name.removesuffix(".log.jsonl") for path in models.glob("*.log.jsonl"))
    assert at.selectbox[0].options == logs and len(logs) == 4
    path = models / "qlora_instruction_weights.log.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    path.write_text(path.read_text() + '{"st')  # a line under way
    at.selectbox[0].set_value("qlora_instruction_weights").run()
    assert_quiet(at)
    assert at.caption[0].value.startswith(f"{last['step']} steps")
    path.write_text("")
    at.run()
    assert_quiet(at)
    assert at.info[0].value.startswith("No step is logged yet")


def test_a_training_in_progress_is_shown_first(models: Path):
    name = "lora_classifier_weights"
    finished = models / f"{name}.log.jsonl"
    running = finished.rename(models / f"{name}.resume.log.jsonl")
    at = page("training")
    assert_quiet(at)
    assert at.selectbox[0].value == at.selectbox[0].options[0] == f"{name} (in progress)"
    n_steps = json.loads(running.read_text().splitlines()[-1])["step"]
    assert at.caption[0].value.startswith(f"{n_steps} steps")
    running.rename(finished)
    assert_quiet(at.run())
    assert f"{name} (in progress)" not in at.selectbox[0].options
    assert at.selectbox[0].value in at.selectbox[0].options


def test_the_prompt_comes_with_the_checkpoint(models: Path):
    assert page("generate").text_area[0].value == "ROMEO:"
    path = models / BASE
    save_checkpoint(path, {**load_checkpoint(path, "base"), "sample_prompt": "The capital is"})
    at = page("generate")
    assert at.text_area[0].value == "The capital is" and "Shakespeare" not in at.markdown[0].value


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"language": 1}'])
def test_a_report_of_another_shape_is_a_message(content: str, models: Path):
    (models / "report.json").write_text(content)
    at = page("training")
    assert not at.exception
    assert "recreate it with `python evaluate.py --models " in at.error[0].value


def test_no_page_changes_what_another_shows(models: Path):
    model, tokenizer, _ = load_model(models / "lora_classifier_weights.pth")
    before = class_probabilities(model, tokenizer, ["a", "good one"])
    for name in (*PAGES, *reversed(PAGES)):
        at = page(name)
        if name == "chat":
            ask(at, "Who?")
        elif at.button:
            at.button[0].click().run()
        assert_quiet(at)
    cached, _, _ = app.loaded(LORA_CLASSIFIER)
    found = class_probabilities(cached, tokenizer, ["a", "good one"])
    assert found == pytest.approx(before, abs=1e-5)  # an adapter is merged
    base, _, _ = app.loaded(BASE)
    fresh, _, _ = load_model(models / "model_weights.pth")
    ids = torch.arange(20)[None]
    assert torch.equal(base(ids), fresh(ids))


def test_a_new_checkpoint_is_taken_up(models: Path):
    path = models / "model_weights.pth"
    first, _, _ = app.loaded(path.name)
    assert app.loaded(path.name)[0] is first
    checkpoint = load_checkpoint(path, "base")
    weights = {n: w * 1.5 for n, w in checkpoint["weights"].items()}
    save_checkpoint(path, {**checkpoint, "weights": weights})
    second, _, _ = app.loaded(path.name)
    assert torch.equal(second.head.weight, first.head.weight * 1.5)
