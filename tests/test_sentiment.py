"""The two sentiment scripts from reviews to checkpoint, their metrics, and what is refused."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_LORA, TINY_SENTIMENT, randomised, run_under_torchrun, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline

import evaluate
import finetune_classifier
import finetune_lora_classifier
from data_loader import LABELS, Review, read_reviews
from data_utils import Split, pad_batch
from evaluate import classification_metrics
from finetune_classifier import prefix_classification_loss
from generation import class_probabilities, load_model
from lora import lora_state_dict
from model import GPTClassificationModel, GPTModel
from tokenizer import BPETokenizer
from training import Runtime, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[1]
FULL, LORA = "finetuned_classifier_weights.pth", "lora_classifier_weights.pth"
SCRIPTS = {FULL: finetune_classifier, LORA: finetune_lora_classifier}
Run = Callable[..., int]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Sixty labelled texts that a word decides."""
    words = {1: ["good", "love", "great"], 0: ["bad", "hate", "awful"]}
    rows = [
        {"text": f"the {words[i % 2][i % 3]} thing {i} is here", "label": i % 2} for i in range(60)
    ]
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def folder(base_checkpoint: Path) -> Path:
    """Folder with a base model, to write to."""
    return base_checkpoint.parent


def arguments(reviews: Path, folder: Path, name: str, *more: str) -> list[str]:
    """Options of the script that makes the classifier of this name."""
    base = str(folder / "model_weights.pth")
    return [
        "--data",
        str(reviews),
        "--base",
        base,
        "--out-dir",
        str(folder),
        *(TINY_LORA if name == LORA else TINY_SENTIMENT),
        *more,
    ]


# ---- figures


def test_figures_against_scikit_learn_and_by_hand():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 2, (2, 200))
    found = classification_metrics(predicted, labels, LABELS)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert sum(map(sum, found["confusion"])) == found["n"] == 200
    nine_of_ten = classification_metrics(np.array([1] * 9 + [0]), np.ones(10, dtype=int), LABELS)
    assert nine_of_ten["accuracy"] == 0.9 and nine_of_ten["confusion"] == [[0, 0], [1, 9]]
    assert nine_of_ten["ci95"] == pytest.approx([0.5958, 0.9821], abs=1e-4)  # Wilson, published


@pytest.mark.parametrize("options", [{"prefix_loss": 1.5}, {"text_template": "Review:"}])
def test_impossible_options_are_refused(options: dict):
    with pytest.raises(ValueError, match=r"prefix_loss must lie in \[0, 1\], and text_template"):
        finetune_classifier.ReviewConfig(**options)


def test_prefix_loss_by_hand():
    torch.manual_seed(0)
    model = randomised(GPTClassificationModel(GPTModel(tiny_config(50)), 2))
    ids, lengths, labels = torch.randint(50, (2, 5)), torch.tensor([5, 2]), torch.tensor([1, 0])
    loss, n = prefix_classification_loss(model, (ids, lengths, labels))
    expected = 0.0
    for row, length, label in zip(ids, lengths.tolist(), labels):
        each = [
            F.cross_entropy(model(row[None, :t], torch.tensor([t])), label[None]).item()
            for t in range(1, length + 1)
        ]
        weighted = sum(t * x for t, x in enumerate(each, 1)) / sum(range(1, length + 1))
        expected += (weighted + each[-1]) / 2
    assert n == 2 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_predictions_do_not_depend_on_the_other_texts(tokenizer: BPETokenizer, runtime: Runtime):
    model = randomised(GPTClassificationModel(GPTModel(tiny_config(tokenizer.vocab_size)), 2))
    texts = ["good", "a much longer text that is cut in its middle, for it does not fit", "so so"]
    together = class_probabilities(model, tokenizer, texts, runtime)
    alone = np.concatenate([class_probabilities(model, tokenizer, [t], runtime) for t in texts])
    turned = class_probabilities(model, tokenizer, texts[::-1], runtime)[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(together, turned, atol=1e-6)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-6)
    ids, lengths = pad_batch([np.array(tokenizer.encode("good"))], tokenizer.pad_id, 0)
    wide = F.pad(ids, (0, 7), value=3)
    torch.testing.assert_close(model(wide, lengths), model(ids, lengths))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(blacklist_categories=["Cs"])), min_size=1, max_size=5))
def test_any_text_has_probabilities_whatever_stands_beside_it(texts: list[str]):
    texts = [text or "?" for text in texts]
    tokenizer = BPETokenizer.train(["to be or not to be"], 260)
    model = GPTClassificationModel(
        randomised(GPTModel(tiny_config(tokenizer.vocab_size))), 2
    ).eval()
    torch.nn.init.normal_(model.classifier_head.weight, generator=torch.Generator().manual_seed(0))
    runtime = Runtime(torch.device("cpu"), torch.float32)
    together = class_probabilities(model, tokenizer, texts, runtime)
    alone = [class_probabilities(model, tokenizer, [text], runtime)[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together.sum(1), 1)


@pytest.fixture
def split(reviews: Path) -> Split[Review]:
    """Two thirds of the reviews to learn from, the rest to test."""
    rows, _ = read_reviews(reviews)
    return Split(rows[:36], rows[36:40], rows[40:])


def test_the_linear_baseline_learns_what_a_word_decides(split: Split[Review]):
    metrics, checkpoint = evaluate.fit_linear_baseline(split, LABELS)
    assert metrics["TF-IDF + logistic regression"]["accuracy"] == 1.0
    assert metrics["majority class"]["accuracy"] == 0.5
    assert checkpoint["metrics"]["test"] == metrics["TF-IDF + logistic regression"]
    table = evaluate.sentiment_tables(dict(reversed(metrics.items())))
    assert "| majority class | 20 | 50.0% | 29.9% to 70.1% | 0.333 |" in table
    assert "| negative | 10 | 0 |\n| positive | 10 | 0 |" in table


def test_the_linear_baseline_reloads_to_the_same_probabilities(
    split: Split[Review], tmp_path: Path
):
    _, saved = evaluate.fit_linear_baseline(split, LABELS)
    save_checkpoint(tmp_path / "linear.pth", {**saved, "dataset": "mine"})
    again, _, checkpoint = evaluate.load_linear_baseline(tmp_path / "linear.pth")
    assert checkpoint["dataset"] == "mine" and checkpoint["provenance"]["seconds"] > 0
    oracle = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10))
    train, texts = [*split.train, *split.validation], [row.text for row in split.test]
    oracle.fit([row.text for row in train], [row.label for row in train])
    np.testing.assert_allclose(again.predict_proba(texts), oracle.predict_proba(texts), atol=1e-6)
    assert again.predict(texts).tolist() == oracle.predict(texts).tolist()


# ---- scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_saves_what_reloads_to_the_same_predictions(
    name: str,
    reviews: Path,
    folder: Path,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    measured: list[tuple] = []
    measure = evaluate.classifier_metrics
    spy = lambda *a: (measured.append(a), measure(*a))[1]  # noqa: E731
    monkeypatch.setattr(evaluate, "classifier_metrics", spy)
    assert SCRIPTS[name].main(arguments(reviews, folder, name)) == 0
    shown = capsys.readouterr()
    assert "TF-IDF + logistic regression" in shown.out and "majority class" in shown.out
    assert "parameters (" in shown.err and not list(folder.glob("*.resume.pth"))
    model, tokenizer, checkpoint = load_model(folder / name)
    ((trained, _, rows, _, _),) = measured
    monkeypatch.undo()
    texts = [row.text for row in rows]
    found = [class_probabilities(m, tokenizer, texts, runtime) for m in (model, trained)]
    assert np.array_equal(*found) and checkpoint["labels"] == ("negative", "positive")
    test = checkpoint["metrics"]["test"]
    assert test["n"] == 12 and checkpoint["provenance"]["seconds"] > 0
    assert f"| {name} | 12 | {test['accuracy']:.1%} |" in shown.out
    assert not model.training
    log = (folder / name).with_suffix(".log.jsonl").read_text().splitlines()
    assert {"val_loss", "val_accuracy", "learning_rate"} <= json.loads(log[-1]).keys()

    command = ["sentiment", "--checkpoint", str(folder / name), "--data", str(reviews), "--json"]
    assert evaluate.main(command) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.keys() == {"accuracy", "ci95", "macro_f1", "labels", "confusion", "n"}
    assert figures["n"] == 60


def test_lora_saves_adapter_and_head_alone_and_shares_the_language_model(
    reviews: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert finetune_classifier.main(arguments(reviews, folder, FULL)) == 0
    language_model = folder / "review_lm_weights.pth"
    before = language_model.read_bytes()
    capsys.readouterr()
    more = ["--r", "2", "--target-modules", "qkv", "attn.proj"]
    assert finetune_lora_classifier.main(arguments(reviews, folder, LORA, *more)) == 0
    assert f"using {language_model}" in capsys.readouterr().err
    assert language_model.read_bytes() == before
    checkpoint = load_checkpoint(folder / LORA, "lora_classifier")
    layers = [f"backbone.blocks.{i}.attn.{n}" for i in range(2) for n in ("qkv", "proj")]
    expected = {f"{layer}.lora_{m}" for layer in layers for m in "AB"}
    assert set(checkpoint["weights"]) == expected | {
        "classifier_head.weight",
        "classifier_head.bias",
    }
    assert checkpoint["lora_config"]["target_modules"] == ("qkv", "attn.proj")
    base = load_checkpoint(language_model, "base")
    assert checkpoint["base_sha256"] == base["weights_sha256"]
    origin = load_checkpoint(folder / "model_weights.pth", "base")
    assert base["base_sha256"] == origin["weights_sha256"]
    model, _, _ = load_model(folder / LORA)
    assert any(t.any() for n, t in lora_state_dict(model).items() if "lora_B" in n)


def test_training_learns(reviews: Path, folder: Path):
    more = "--steps 150 --epochs 40 --review-lm-steps 1 --dropout 0 --learning-rate 0.01".split()  # noqa: SIM905
    assert finetune_classifier.main(arguments(reviews, folder, FULL, *more)) == 0
    assert load_checkpoint(folder / FULL, "classifier")["metrics"]["test"]["accuracy"] >= 0.9


def test_calibration_corrects_odds_and_keeps_their_order(tokenizer: BPETokenizer, runtime: Runtime):
    model = GPTClassificationModel(
        randomised(GPTModel(tiny_config(tokenizer.vocab_size))), 2
    ).eval()
    torch.nn.init.normal_(model.classifier_head.weight, generator=torch.Generator().manual_seed(0))
    texts = [f"the {i} king" for i in range(300)]
    before = class_probabilities(model, tokenizer, texts, runtime)[:, 1]
    log_odds = np.log(before) - np.log(1 - before)
    true = 1 / (1 + np.exp(-(0.5 * (log_odds - np.median(log_odds)))))  # half as sure, and shifted
    labels = np.random.default_rng(0).random(300) < true
    rows = [Review(text, int(label)) for text, label in zip(texts, labels)]
    finetune_classifier.calibrate(model, tokenizer, rows, runtime)
    after = class_probabilities(model, tokenizer, texts, runtime)[:, 1]
    assert (np.argsort(before) == np.argsort(after)).all()
    assert after.mean() == pytest.approx(labels.mean(), abs=0.01)
    loss = [-np.log(np.where(labels, p, 1 - p)).mean() for p in (before, after, true)]
    assert loss[1] < loss[0] and loss[1] == pytest.approx(loss[2], abs=0.03)


def test_calibration_of_two_classes_is_platts_and_of_more_recovers_the_truth(
    tokenizer: BPETokenizer, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
):
    """The oracle for two classes is logistic regression, for three the odds that made the labels:
    half of the model's, with a shift for each class."""
    rng = np.random.default_rng(0)
    for n_classes in (2, 3):
        logits = rng.normal(size=(3000, n_classes)) * 3
        true = log_softmax(logits / 2 + np.arange(n_classes), axis=1)
        labels = [int(rng.choice(n_classes, p=np.exp(row))) for row in true]
        rows = [Review("", label) for label in labels]
        probabilities = np.exp(log_softmax(logits, axis=1))
        answer = functools.partial(lambda p, *_: p, probabilities)
        monkeypatch.setattr(finetune_classifier, "class_probabilities", answer)
        model = GPTClassificationModel(GPTModel(tiny_config(tokenizer.vocab_size)), n_classes)
        torch.nn.init.ones_(model.classifier_head.weight)
        finetune_classifier.calibrate(model, tokenizer, rows, runtime)
        scale = model.classifier_head.weight.detach().numpy()
        shift = np.diff(model.classifier_head.bias.detach().numpy())
        assert scale == pytest.approx(0.5, abs=0.03)
        assert shift == pytest.approx(np.ones(n_classes - 1), abs=0.15)
        if n_classes == 2:
            platt = LogisticRegression().fit(np.diff(logits), labels)
            assert scale == pytest.approx(platt.coef_.item(), abs=1e-4)
            assert shift == pytest.approx(platt.intercept_, abs=1e-4)


@pytest.fixture
def topics(tmp_path: Path) -> Path:
    """Ninety texts of three topics, which a word decides, in a file without a known column."""
    words = {"World": "war", "Sport": "goal", "Tech|<b>": "chip"}
    rows = [f"{t};the {w} number {i}, today" for i in range(30) for t, w in words.items()]
    path = tmp_path / "topics.csv"
    path.write_bytes("\r\n".join(["kind;news", *rows]).encode("utf-16"))
    return path


@pytest.mark.parametrize("name", SCRIPTS)
def test_any_labels_from_a_file_to_a_verdict(
    name: str, topics: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    columns = ["--text-column", "news", "--label-column", "kind"]
    more = ["--steps", "60", "--epochs", "60", "--learning-rate", "0.01", "--dropout", "0"]
    assert SCRIPTS[name].main(arguments(topics, folder, name, *more, *columns)) == 0
    shown = capsys.readouterr()
    labels = ["Sport", "Tech|<b>", "World"]
    assert "labels: Sport, Tech|<b>, World" in shown.err and "read as utf_16" in shown.err
    assert "| label \\ prediction | Sport | Tech\\|<b> | World |" in shown.out
    checkpoint = load_checkpoint(folder / name, ("classifier", "lora_classifier"))
    assert [*checkpoint["labels"]] == labels
    assert checkpoint["metrics"]["test"]["labels"] == labels
    linear, _, baseline = evaluate.load_linear_baseline(folder / "linear_baseline.pth")
    assert baseline["labels"] == labels and baseline["metrics"]["test"]["accuracy"] == 1.0
    assert linear.predict_proba(["a goal", "a chip"]).argmax(1).tolist() == [0, 1]

    command = ["sentiment", "--checkpoint", str(folder / name), "--json"]
    assert evaluate.main([*command, "--text", "the goal number 3, today"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert list(judged["probabilities"]) == labels
    assert sum(judged["probabilities"].values()) == pytest.approx(1)
    assert judged["label"] == max(labels, key=judged["probabilities"].get)
    assert evaluate.main([*command, "--text", " "]) == 2
    assert "--text is empty" in capsys.readouterr().err
    part = tmp_path / "part.jsonl"
    part.write_text('{"review": "the war", "topic": 1, "label": "WORLD"}\n' * 3)
    assert evaluate.main([*command, "--data", str(part)]) == 0
    found = capsys.readouterr()
    assert sum(json.loads(found.out)["confusion"][2]) == 3 and "ignored columns: topic" in found.err
    part.write_text('{"review": "the war", "label": "Europe"}')
    assert evaluate.main([*command, "--data", str(part)]) == 2
    assert "the model's labels are Sport, Tech|<b>, World, not Europe" in capsys.readouterr().err


def test_an_adapter_on_another_base_is_refused(reviews: Path, folder: Path):
    assert finetune_lora_classifier.main(arguments(reviews, folder, LORA)) == 0
    path = folder / "review_lm_weights.pth"
    checkpoint = load_checkpoint(path, "base")
    weights = {n: w + 1 if n == "head.weight" else w for n, w in checkpoint["weights"].items()}
    save_checkpoint(path, {**checkpoint, "weights": weights})
    with pytest.raises(ValueError, match=f"trained on another base than .*{path.name}"):
        load_model(folder / LORA)


@pytest.mark.parametrize("base", ["smollm2-135m-instruct", "models/smollm2-135m-instruct"])
def test_a_public_base_that_is_not_there_yet_is_named_with_its_command(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The folder comes with the clone, the base does not."""
    monkeypatch.chdir(tmp_path)
    if base.startswith("models"):
        Path(base).mkdir(parents=True)
    assert finetune_lora_classifier.main(["--base", base, "--dataset", "sample"]) == 2
    said = capsys.readouterr().err  # at once: no word on what the run would replace
    assert said.startswith("error: no checkpoint") and said.count("\n") == 1
    assert "`python main.py --pretrained smollm2-135m-instruct`" in said


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_base_the_message_names_the_command(
    name: str, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert SCRIPTS[name].main(arguments(reviews, tmp_path / "empty", name)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no checkpoint at") and "`python main.py`" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "none.csv"], "no such file: none.csv"),
        (["--max-examples", "0"], "max-examples must be at least 1"),
        (["--max-examples", "3"], "has too few rows"),
        (["--epochs", "0"], "epochs must lie in [1, inf), not 0"),
        (["--dropout", "2"], "dropout must lie in [0, 1)"),
        (["--resume"], "to resume: omit --resume"),
    ],
)
def test_mistakes_are_one_line(
    reviews: Path,
    folder: Path,
    more: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
):
    assert finetune_classifier.main(arguments(reviews, folder, FULL, *more)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line
    assert not (folder / FULL).exists()


def test_resuming_without_the_review_lm_names_the_fix(
    reviews: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / FULL).with_suffix(".resume.pth").touch()
    assert finetune_classifier.main(arguments(reviews, folder, FULL, "--resume")) == 2
    assert "missing or differs: give the same options, or --overwrite" in capsys.readouterr().err


def test_one_flipped_bit_in_a_weight_is_noticed(reviews: Path, folder: Path):
    assert finetune_classifier.main(arguments(reviews, folder, FULL)) == 0
    path = folder / FULL
    wanted = load_checkpoint(path, "classifier")["weights"]["backbone.head.weight"]
    content = bytearray(path.read_bytes())
    place = content.index(wanted.numpy().tobytes()) + 11
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_model(path)


@pytest.mark.slow
def test_two_processes_train_an_adapter(reviews: Path, folder: Path):
    options = arguments(reviews, folder, LORA, "--dropout", "0")
    done = run_under_torchrun("finetune_lora_classifier.py", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("TF-IDF") == 1, "only the first process speaks"
    _, _, checkpoint = load_model(folder / LORA)
    assert checkpoint["provenance"]["command"].startswith("torchrun --nproc_per_node=2")


def test_base_and_results_may_lie_in_two_folders(reviews: Path, folder: Path, tmp_path: Path):
    more = ["--out-dir", str(tmp_path / "elsewhere" / "deep")]
    options = arguments(reviews, folder, LORA, *more)
    assert finetune_lora_classifier.main(options) == 0
    path = tmp_path / "elsewhere" / "deep" / LORA
    assert load_model(path)[2]["kind"] == "lora_classifier"
    review_lm = load_checkpoint(path.with_name("review_lm_weights.pth"), "base")
    assert (path.parent / review_lm["base"]).resolve() == (folder / "model_weights.pth").resolve()


def test_a_folder_with_another_tokenizer_is_refused(
    reviews: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "other"
    other.mkdir()
    BPETokenizer.train(["another text " * 9], vocab_size=262).save(other / "tokenizer.json")
    before = (other / "tokenizer.json").read_bytes()
    options = arguments(reviews, folder, FULL, "--out-dir", str(other))
    assert finetune_classifier.main(options) == 2
    assert "choose another --out-dir" in capsys.readouterr().err
    assert (other / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "other data"])
def test_a_language_model_that_does_not_fit_is_trained_again(
    damage: str, reviews: Path, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert finetune_classifier.main(arguments(reviews, folder, FULL)) == 0
    path = folder / "review_lm_weights.pth"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        reviews.write_text(reviews.read_text().replace("thing 7", "thing seven"))
    capsys.readouterr()
    assert finetune_classifier.main(arguments(reviews, folder, FULL)) == 0
    said = capsys.readouterr().err
    assert ("training it again" if damage == "cut" else f"replacing {path}") in said
    load_checkpoint(path, "base")


def test_a_base_of_fixed_length_says_which(
    reviews: Path,
    folder: Path,
    tokenizer: BPETokenizer,
    capsys: pytest.CaptureFixture[str],
):
    path = folder / "model_weights.pth"
    config = tiny_config(tokenizer.vocab_size, position="learned")
    weights = randomised(GPTModel(config)).state_dict()
    base = {**load_checkpoint(path, "base"), "model_config": vars(config), "weights": weights}
    save_checkpoint(path, base)
    assert finetune_classifier.main(arguments(reviews, folder, FULL)) == 2
    assert "the base has 16 learned positions" in capsys.readouterr().err
    fitting = arguments(reviews, folder, FULL, "--context-length", "16")
    assert finetune_classifier.main(fitting) == 0
