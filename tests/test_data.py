"""Batches are pure functions of (seed, step), cover each epoch once, and never show what is held out."""

import hashlib
import math
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from sandbox.batch import IGNORED, Batch
from sandbox.config import Data
from sandbox.data import END, VOCAB, Corpus, bits_per_byte
from sandbox.errors import ConfigError

pytestmark = pytest.mark.unit

LAYOUTS = pytest.mark.parametrize("layout", ["packed", "padded"])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, ...]:
    """Documents in which every run of four bytes says where in the text it stands."""
    lengths, at, paths = (150, 1, 2, 40, 16, 300, 17, 90), 0, []
    for index, length in enumerate(lengths):
        words = b"".join(i.to_bytes(2, "big") for i in range(at, at + length // 2 + 1))
        paths.append(tmp_path / f"{index}.txt")
        paths[-1].write_bytes(words[:length])
        at += length
    return tuple(paths)


def corpus(files: tuple[Path, ...], **settings: object) -> Corpus:
    return Corpus.load(Data.model_validate({"files": files, "sequence": 16, **settings}))


def text(files: tuple[Path, ...]) -> list[int]:
    return [token for path in files for token in [*path.read_bytes(), END]]


def digest(*batches: Batch) -> str:
    content = hashlib.sha256()
    for batch in batches:
        for grid in (batch.tokens, batch.targets, batch.positions, batch.documents, batch.rows, batch.columns):
            content.update(grid.numpy().tobytes())
        content.update(str(batch.key).encode())
    return content.hexdigest()


def rows(*batches: Batch) -> list[tuple[int, ...]]:
    """The rows' tokens, padding aside."""
    return [
        tuple(tokens[documents >= 0].tolist())
        for batch in batches
        for tokens, documents in zip(batch.tokens, batch.documents, strict=True)
    ]


@LAYOUTS
def test_a_batch_is_a_pure_function_of_seed_and_step(files: tuple[Path, ...], layout: str) -> None:
    here, there = (corpus(files, layout=layout, mask="ragged") for _ in range(2))
    wanted = [digest(here.batch(step, seed=1, rows=4)) for step in range(20)]
    torch.manual_seed(0)
    assert [digest(there.batch(step, seed=1, rows=4)) for step in reversed(range(20))] == wanted[::-1]
    assert len(set(wanted)) == 20
    assert not torch.equal(here.batch(0, seed=2, rows=4).tokens, here.batch(0, seed=1, rows=4).tokens)


def test_keys_differ_and_fit_in_63_bits(files: tuple[Path, ...]) -> None:
    text = corpus(files)
    keys = {text.batch(step, seed=seed, rows=1).key for step in range(20) for seed in (0, 1, 2**40)}
    assert len(keys) == 60
    assert all(0 <= key < 2**63 for key in keys)
    assert max(keys) > 2**61


def test_another_process_draws_the_same_batch(files: tuple[Path, ...]) -> None:
    here = corpus(files, mask="ragged").batch(7, seed=3, rows=4)
    program = (
        "import sys; from pathlib import Path; from sandbox.config import Data; from sandbox.data import Corpus\n"
        "data = Data(files=tuple(map(Path, sys.argv[1:])), sequence=16, mask='ragged')\n"
        "batch = Corpus.load(data).batch(7, seed=3, rows=4)\n"
        "print(batch.tokens.tolist(), batch.targets.tolist(), batch.key)"
    )
    command = [sys.executable, "-c", program, *map(str, files)]
    printed = subprocess.run(command, env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == f"{here.tokens.tolist()} {here.targets.tolist()} {here.key}"


@LAYOUTS
@pytest.mark.parametrize("size", [1, 4, 100])
def test_every_window_is_seen_once_an_epoch(files: tuple[Path, ...], layout: str, size: int) -> None:
    text = corpus(files, layout=layout)
    windows = len(text.train.starts)
    steps = math.ceil(2 * windows / size)
    seen = rows(*(text.batch(step, seed=0, rows=size) for step in range(steps)))
    first, second = seen[:windows], seen[windows : 2 * windows]
    assert len(set(first)) == windows
    assert set(first) == set(second)
    assert first != second, "epochs are shuffled anew"
    trained = Counter(token for row in first for token in row)
    lost = Counter(text.train.tokens.tolist()) - trained
    if layout == "packed":
        assert lost.total() < 16, "the tail only"
    else:
        assert set(lost) <= {END}, "an end that fits no window predicts nothing"


@LAYOUTS
def test_nothing_held_out_is_ever_trained_on(files: tuple[Path, ...], layout: str) -> None:
    whole, parts = text(files), corpus(files, layout=layout, held_out=0.3)
    place = len(whole) - round(0.3 * len(whole))
    assert parts.train.tokens.tolist() + parts.held_out.tokens.tolist() == whole
    assert len(parts.train.tokens) == place
    pairs = {(row[i], row[i + 1]) for row in [whole[:place]] for i in range(place - 1)}
    for step in range(20):
        batch = parts.batch(step, seed=0, rows=4)
        valid = batch.targets != IGNORED
        assert set(zip(batch.tokens[valid].tolist(), batch.targets[valid].tolist(), strict=True)) <= pairs
    boundary = (whole[place - 1], whole[place])
    assert boundary not in pairs, "or this test would not see a target across the cut"
    held = rows(*parts.held_out_batches(50, rows=2))
    joined = bytes(token % 256 for token in whole[place:])
    assert all(bytes(token % 256 for token in row) in joined for row in held)


@LAYOUTS
def test_targets_are_the_next_tokens_of_the_document(files: tuple[Path, ...], layout: str) -> None:
    whole, parts = text(files), corpus(files, layout=layout)
    after = {tuple(whole[i : i + 5]): whole[i + 5] for i in range(len(whole) - 5)}
    ends = checked = 0
    for step in range(12):
        batch = parts.batch(step, seed=0, rows=4)
        assert (batch.targets[batch.documents < 0] == IGNORED).all()
        assert (batch.tokens[batch.documents < 0] == END).all()
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            for column, (token, target) in enumerate(zip(tokens, targets, strict=True)):
                if token == END:
                    assert target == IGNORED, "the next document cannot be foreseen"
                    ends += 1
                elif target != IGNORED and column >= 4:
                    assert target == after[tuple(tokens[column - 4 : column + 1])]
                    checked += 1
                if column + 1 < len(tokens) and target != IGNORED and tokens[column + 1] != END:
                    assert target == tokens[column + 1]
    assert ends > 3
    assert checked > 300


def test_packed_rows_number_documents_and_restart_positions(files: tuple[Path, ...]) -> None:
    parts = corpus(files)
    several = 0
    for step in range(12):
        batch = parts.batch(step, seed=0, rows=4)
        assert torch.equal(batch.rows, torch.arange(4))
        assert torch.equal(batch.columns, torch.arange(16))
        for row in range(4):
            document = position = 0
            for column in range(16):
                assert batch.documents[row, column] == document
                assert batch.positions[row, column] == position
                end = batch.tokens[row, column] == END
                document, position = (document + 1, 0) if end else (document, position + 1)
            several += document > 0
    assert several > 3


def test_a_padded_row_holds_one_document(files: tuple[Path, ...]) -> None:
    parts = corpus(files, layout="padded")
    batches = [parts.batch(step, seed=0, rows=4) for step in range(12)]
    documents = torch.cat([batch.documents for batch in batches])
    assert set(documents.unique().tolist()) == {-1, 0}
    assert (documents[:, 0] == 0).all()
    assert (documents.diff(dim=1) <= 0).all(), "padding comes last"
    for batch in batches:
        inside = batch.documents == 0
        assert torch.equal(batch.positions[inside], batch.columns.expand(4, -1)[inside])
        assert ((batch.targets != IGNORED).sum(1) > 0).all(), "no row without a target"


@LAYOUTS
def test_ragged_masks_hide_whole_rows_and_others_unevenly(files: tuple[Path, ...], layout: str) -> None:
    plain, ragged = corpus(files, layout=layout), corpus(files, layout=layout, mask="ragged")
    shares = []
    for step in range(12):
        full, batch = plain.batch(step, seed=0, rows=9), ragged.batch(step, seed=0, rows=9)
        assert torch.equal(full.tokens, batch.tokens)
        kept = batch.targets != IGNORED
        assert torch.equal(batch.targets[kept], full.targets[kept])
        counts = kept.sum(1)
        assert not counts[:2].any()
        assert len(counts[2:].unique()) > 2
        of = (full.targets != IGNORED).sum(1)
        shares += (counts / of)[2:][of[2:] > 10].tolist()
    assert statistics.mean(shares) == pytest.approx(0.55, abs=0.1)
    assert statistics.stdev(shares) > 0.2, "at one rate for all rows it would be 0.13"
    for size in (2, 3):
        assert ragged.batch(0, seed=0, rows=size).targets[0].eq(IGNORED).all()
    assert any(ragged.batch(step, seed=0, rows=1).valid for step in range(3)), "the only row is never hidden"


@LAYOUTS
def test_held_out_batches_are_spread_evenly_and_repeat(files: tuple[Path, ...], layout: str) -> None:
    parts = corpus(files, layout=layout, held_out=0.5, mask="ragged")
    windows = len(parts.held_out.starts)
    batches = parts.held_out_batches(3, rows=4)
    assert [len(batch.rows) for batch in batches] == [4, 4, 4]
    assert digest(*batches) == digest(*parts.held_out_batches(3, rows=4))
    assert windows > 12
    assert rows(*batches) == rows(parts.held_out.rows(torch.arange(12) * windows // 12, 16, key=0))
    every = rows(*parts.held_out_batches(windows, rows=1))
    assert every == rows(parts.held_out.rows(torch.arange(windows), 16, key=0))
    assert len(rows(*parts.held_out_batches(windows, rows=3))) == 3 * windows, "a short text repeats"


def test_unigram_entropy_is_that_of_the_training_tokens(files: tuple[Path, ...]) -> None:
    parts = corpus(files, held_out=0.4)
    tokens = parts.train.tokens.tolist()
    expected = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in Counter(tokens).values())
    assert parts.unigram_entropy == pytest.approx(expected, rel=1e-12)
    assert f"{expected:.3f} nats" in str(parts)
    assert "8 documents" in str(parts)
    assert bits_per_byte(math.log(256)) == pytest.approx(8)


def test_the_default_text_is_the_documentation_of_python() -> None:
    parts = Corpus.load(Data())
    assert parts.documents > 50
    assert len(parts.train.tokens) > 300_000
    assert 3 < parts.unigram_entropy < 3.6
    opening = bytes(parts.train.tokens[:20_000][parts.train.tokens[:20_000] != END].tolist()).decode()
    assert "assert" in opening
    assert "pydoc_data.topics" in str(parts)


def test_any_bytes_are_text(tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(bytes(range(256)) + b"\r\n\x00\xff\xfe" * 20)
    parts = corpus((odd,), held_out=0.1)
    assert [*parts.train.tokens.tolist(), *parts.held_out.tokens.tolist()] == [*odd.read_bytes(), END]


def test_errors_name_the_field_and_the_fix(tmp_path: Path, files: tuple[Path, ...]) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    for path, words in {empty: "is empty", tmp_path: "cannot be read", tmp_path / "none": "No such file"}.items():
        with pytest.raises(ConfigError, match=rf"data\.files: {path}.*{words}"):
            corpus((*files, path))
    with pytest.raises(ConfigError, match=r"data\.sequence 5000 .* training.*[Ll]ower data\.held_out"):
        corpus(files, sequence=5000)
    with pytest.raises(ConfigError, match=r"data\.sequence 500 .* validation.*raise data\.held_out"):
        corpus(files, sequence=500)
    with pytest.raises(ConfigError, match=r"data\.sequence"):
        corpus(files[1:2], layout="padded", held_out=0.9)
    with pytest.raises(ConfigError, match=r"model\.vocab 256 .*Set model\.vocab: 257"):
        Corpus.load(Data(files=files, sequence=16), vocab=256)
    Corpus.load(Data(files=files, sequence=16), vocab=VOCAB)
