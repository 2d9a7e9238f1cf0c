"""Token files, windows and batches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_loader import Corpus
from data_utils import (
    IGNORE,
    TokenBatches,
    count_bytes,
    merge_children,
    prepare_token_ids,
    prepare_tokenizer,
    resegment,
    scoring_windows,
)
from tokenizer import BPETokenizer


def test_the_tokenizer_is_learned_once(
    own_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    corpus = Corpus("own", (own_text,))
    first = prepare_tokenizer(corpus, 300, tmp_path / "cache")
    assert "using" not in capsys.readouterr().err
    again = prepare_tokenizer(corpus, 300, tmp_path / "cache")
    assert f"using {tmp_path / 'cache' / 'tokenizer-'}" in capsys.readouterr().err
    assert again.sha256 == first.sha256
    other = prepare_tokenizer(corpus, 310, tmp_path / "cache")
    assert other.vocab_size == 310


def test_the_vocabulary_covers_reviews_and_instructions(own_text: Path, tmp_path: Path, play: str):
    alone = BPETokenizer.train([play[:18_000]], 1000)
    shared = prepare_tokenizer(Corpus("own", (own_text,)), 1000, tmp_path)
    review = "The battery died after two weeks and the customer service was not helpful at all."
    assert len(shared.encode(review)) < len(alone.encode(review))


def test_token_files_hold_the_ids_of_the_text(
    own_text: Path, tokenizer: BPETokenizer, tmp_path: Path
):
    second = tmp_path / "second.txt"
    second.write_text("Exeunt all.\n<|endoftext|>\n<|endoftext|>Enter.<|endoftext|>\n")
    corpus = Corpus("own", (own_text, second))
    part, _ = corpus.split(1.0)
    ids = prepare_token_ids("train", part, corpus, tokenizer, tmp_path / "cache")
    documents = [own_text.read_text(), "Exeunt all.\n", "Enter."]
    expected = [i for text in documents for i in (*tokenizer.encode(text), tokenizer.end_id)]
    assert ids.tolist() == expected and ids.dtype == np.uint16
    assert count_bytes(ids, tokenizer) == sum(map(len, documents))


def test_the_tokenizer_never_learns_the_marker(tmp_path: Path):
    """The stories are long enough that the marker would be worth merging."""
    path = tmp_path / "stories.txt"
    path.write_text("".join(f"A story of {i}.\n<|endoftext|>\n" for i in range(2000)))
    tokenizer = prepare_tokenizer(Corpus("own", (path,)), 600, tmp_path / "cache")
    assert not any(b"<|" in word or b"endo" in word for word in tokenizer.vocab[:-2])


def test_token_files_are_written_once(
    own_text: Path, tokenizer: BPETokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    corpus = Corpus("own", (own_text,))
    first = prepare_token_ids("train", corpus.split()[0], corpus, tokenizer, tmp_path / "cache")
    monkeypatch.setattr(BPETokenizer, "encode", None)  # would fail if called
    again = prepare_token_ids("train", corpus.split()[0], corpus, tokenizer, tmp_path / "cache")
    assert np.array_equal(first, again)


# ---- subword regularisation


def test_resegmented_tokens_spell_the_same_text(tokenizer: BPETokenizer, play: str):
    ids = np.array(tokenizer.encode(play[:3000]))
    halves = merge_children(tokenizer)
    lengths = []
    for probability in (0.0, 0.1, 0.5, 1.0):
        split = resegment(ids, halves, probability, np.random.default_rng(0))
        assert tokenizer.decode(split) == play[:3000]
        lengths.append(len(split))
    assert lengths[0] == len(ids) and lengths[-1] == 3000 and lengths == sorted(lengths)


def test_split_tokens_split_as_often_as_said(tokenizer: BPETokenizer):
    merged = next(m for left, right, m in tokenizer.merges if max(left, right) < 256)  # two bytes
    split = resegment(
        np.full(20_000, merged), merge_children(tokenizer), 0.1, np.random.default_rng(0)
    )
    assert len(split) - 20_000 == pytest.approx(2000, abs=5 * (20_000 * 0.1 * 0.9) ** 0.5)


# ---- windows and batches


def batches_of(tokenizer: BPETokenizer, n: int = 1000, **options: float) -> TokenBatches:
    settings = {"context_length": 16, "batch_size": 4, "seed": 0, **options}
    return TokenBatches(np.arange(n) % 256, tokenizer, **settings)


def test_a_batch_depends_on_seed_and_step_alone(tokenizer: BPETokenizer):
    one, two = batches_of(tokenizer), batches_of(tokenizer)
    late = two(37)
    for step in (0, 37, 5):
        assert torch.equal(one(step)[0][0], two(step)[0][0])
    assert torch.equal(one(37)[0][0], late[0][0])
    assert not torch.equal(one(0)[0][0], batches_of(tokenizer, seed=1)(0)[0][0])


def test_targets_are_the_next_tokens(tokenizer: BPETokenizer):
    ((inputs, targets),) = batches_of(tokenizer)(3)
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal((inputs + 1) % 256, targets)


def test_an_epoch_goes_over_the_text_once(tokenizer: BPETokenizer):
    ids = np.arange(256)
    batches = TokenBatches(ids, tokenizer, context_length=8, batch_size=1, seed=0)
    seen = torch.cat([batches(s)[0][0].flatten() for s in range(batches.steps_per_epoch)])
    assert len(seen) == len(seen.unique()) >= 256 - 3 * 8


def test_parts_make_up_the_batch(tokenizer: BPETokenizer):
    batches = batches_of(tokenizer, resegment_probability=0.2, steps=100)
    whole = batches(2)[0][0]
    for parts in (2, 3, 8):  # more parts than rows leave some empty
        pieces = batches(2, parts)
        assert len(pieces) == parts
        assert torch.equal(torch.cat([inputs for inputs, _ in pieces]), whole)


def test_tokens_are_split_less_and_less(tokenizer: BPETokenizer, play: str):
    ids = np.array(tokenizer.encode(play))
    batches = TokenBatches(ids, tokenizer, 64, 16, seed=0, resegment_probability=0.5, steps=100)
    bytes_seen = [count_bytes(batches(step)[0][0].numpy(), tokenizer) for step in (0, 50, 99, 100)]
    assert bytes_seen == sorted(bytes_seen) and bytes_seen[0] < 0.8 * bytes_seen[-1]
    start = batches._starts(100 // batches.steps_per_epoch)
    place = 100 % batches.steps_per_epoch * 16
    assert np.array_equal(batches(100)[0][0][0], ids[start[place] : start[place] + 64])


def test_too_short_a_text_is_refused(tokenizer: BPETokenizer):
    with pytest.raises(ValueError, match="too few for a context of 16"):
        batches_of(tokenizer, n=16)


def test_a_text_of_one_window_still_trains(tokenizer: BPETokenizer):
    ((inputs, _),) = batches_of(tokenizer, n=17)(5)
    assert inputs.shape == (1, 16)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 12, 13, 100, 101])
def test_scoring_windows_score_every_token_once(n: int):
    ids = np.arange(1, n + 1)
    scored = []
    for inputs, targets in scoring_windows(ids, context_length=8, start_id=0, batch_size=3):
        assert inputs.shape == targets.shape and inputs.shape[1] <= 8
        for row, (x, y) in enumerate(zip(inputs, targets)):
            counted = y != IGNORE
            assert torch.equal(x[counted] + 1, y[counted])
            scored += y[counted].tolist()
            if row and n > 8:
                assert not counted[:3].any() or len(y) < 8
    assert sorted(scored) == ids.tolist()


def test_special_tokens_count_no_bytes(tokenizer: BPETokenizer):
    end = tokenizer.end_id
    ids = np.array([*tokenizer.encode("héllo"), end])
    assert count_bytes(ids, tokenizer) == 6
