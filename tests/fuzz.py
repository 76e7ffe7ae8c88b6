"""Files mutated at random, and what may come of it: a clear error, or a right result. Each case is its own seed."""

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from checkpoint_work import one

from sandbox import checkpoint
from sandbox.checkpoint import folder as folders
from sandbox.checkpoint import state, whole
from sandbox.config import Config, Data, load
from sandbox.data import Corpus
from sandbox.errors import ConfigError
from sandbox.interchange import export, read
from sandbox.plan import plan
from sandbox.report.record import RunRecord

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
PIECES = [
    b"[", b"]", b"{", b"}", b": ", b"\n", b"- ", b"&a ", b"*a", b"<<: ", b"|\n", b"? ", b"\t", b"#", b"%", b"'", b'"',
    b"!!python/object/apply:os.mkdir [mark]", b"~", b".nan", b".inf", b"-1", b"0", b"9" * 30, b"9" * 5000, b"1e400",
    b"2001-99-99", b"\x00", b"\xff", b"0x", b"true", b"null", b"../", b"/",
]  # fmt: skip
KEYS = [
    b"name", b"engine", b"mesh", b"dp", b"pp", b"tp", b"cp", b"degree", b"strategy", b"replicas", b"model", b"layers",
    b"width", b"heads", b"kv_heads", b"train", b"steps", b"batch", b"schedule", b"order", b"sequence", b"stages",
    b"microbatches", b"run", b"folder", b"data", b"files",
]  # fmt: skip
VALUES: list[Any] = [
    0,
    1,
    2,
    3,
    4,
    -1,
    1.5,
    1e400,
    float("nan"),
    9**99,
    True,
    None,
    "auto",
    "",
    "2",
    [],
    [1],
    {},
    {"": 1},
]
SLOW = 5.0
"""Seconds of the processor that no case may take: they take milliseconds."""


def mutated(content: bytes, rng: random.Random, pieces: Sequence[bytes]) -> bytes:
    """One to four changes: a byte, something put in, something left out, an early end, a part of it again."""
    new = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(new) + 1), rng.randrange(6)
        if kind == 0 and new:
            new[min(at, len(new) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            new[at:at] = rng.choice(pieces)
        elif kind == 2:
            del new[at : at + rng.randint(1, 8)]
        elif kind == 3 and rng.random() < 0.3:
            del new[at:]
        elif kind == 4:
            new[at:at] = new[: rng.randint(1, 40)]
        else:
            new[at : at + 8] = rng.randbytes(8)
    return bytes(new)


def attempts(seeds: Sequence[int], case: Callable[[random.Random], bool]) -> int:
    """Run `case` for each seed -> how often it was refused. Anything but a ConfigError comes through, with its seed."""
    refused = 0
    for seed in seeds:
        started = time.process_time()
        try:
            case(random.Random(seed))
        except ConfigError as error:
            refused += 1
            assert 10 < len(str(error)) < 5000, f"seed {seed}: {str(error)[:500]}"
        except Exception as error:
            raise AssertionError(f"seed {seed}: {repr(error)[:500]}") from error
        assert time.process_time() - started < SLOW, f"seed {seed} took too long"
    return refused


def configs(folder: Path, seeds: Sequence[int]) -> int:
    """Configs are refused, or planned and written as they were read."""
    path = folder / "c.yaml"

    def case(rng: random.Random) -> None:
        path.write_bytes(mutated(rng.choice(CONFIGS).read_bytes(), rng, [*PIECES, *(b" %b: {" % key for key in KEYS)]))
        config = load(path)
        plan(config)
        assert Config.model_validate(config.model_dump(mode="json")) == config
        assert (folder / "runs" / config.name).resolve().is_relative_to((folder / "runs").resolve())

    refused = attempts(seeds, case)
    assert sorted(file.name for file in folder.iterdir()) == ["c.yaml"]
    return refused


def library_configs(folder: Path, seeds: Sequence[int]) -> int:
    """DeepSpeed's and Accelerate's configs are refused, or say the same of the batch as what is made of them."""
    good = []
    for path in CONFIGS:
        for target in ("deepspeed-json", "accelerate-yaml"):
            with suppress(ConfigError):
                good.append((target, export(load(path), target, path).text))

    def case(rng: random.Random) -> None:
        target, text = rng.choice(good)
        path = folder / ("c.json" if target == "deepspeed-json" else "c.yaml")
        if rng.random() < 0.5:
            path.write_bytes(mutated(text.encode(), rng, PIECES))
        else:  # still JSON or YAML, but with another value
            tree = yaml.safe_load(text)
            owner = rng.choice([tree, *(part for part in tree.values() if isinstance(part, dict))])
            owner[rng.choice(list(owner))] = rng.choice(VALUES)
            path.write_text(json.dumps(tree) if target == "deepspeed-json" else yaml.safe_dump(tree))
        config, _ = read(path)
        plan(config)
        assert Config.model_validate(config.model_dump(mode="json")) == config
        if target == "deepspeed-json":
            said, train = json.loads(path.read_text()), config.train
            assert said.get("train_batch_size", train.batch) in (train.batch, "auto", None)
            if isinstance(micro := said.get("train_micro_batch_size_per_gpu"), int) and micro:
                assert train.batch == micro * train.microbatches * config.mesh.dp.degree

    return attempts(seeds, case)


def texts(folder: Path, seeds: Sequence[int]) -> int:
    """Texts of any bytes and sizes are refused as too short, or every byte of them is a token."""
    path = folder / "t.txt"

    def case(rng: random.Random) -> None:
        text = rng.randbytes(rng.choice([0, 1, 2, rng.randrange(40), rng.randrange(2000)]))
        path.write_bytes(text if rng.random() < 0.5 else mutated(b"\r\n\xef\xbb\xbf caf\xc3\xa9 " * 9, rng, PIECES))
        size = rng.choice([1, 2, 8, 64])
        data = Data(files=(path,), sequence=size, layout=rng.choice(["packed", "padded"]), mask="ragged")
        corpus = Corpus.load(data)
        tokens = torch.cat([corpus.train.tokens, corpus.held_out.tokens]).tolist()
        assert tokens == [*path.read_bytes(), 256]
        batch = corpus.batch(rng.randrange(10**6), seed=rng.randrange(2**40), rows=rng.randint(1, 5))
        assert batch.tokens.shape[1] == size

    return attempts(seeds, case)


def records(folder: Path, seeds: Sequence[int]) -> int:
    """Metrics of a run, as `sandbox report` reads them, are refused or read."""
    lines = [{"run": {"name": "x", "strategy": "ddp"}}, {"step": 1, "loss": 2.5, "grad_norm": 1.0}]
    good = "".join(json.dumps(line) + "\n" for line in lines).encode()

    def case(rng: random.Random) -> None:
        (folder / "metrics.jsonl").write_bytes(mutated(good, rng, PIECES))
        RunRecord.read(folder)

    return attempts(seeds, case)


def checkpoints(folder: Path, seeds: Sequence[int], *, forged: bool) -> int:
    """Checkpoints are refused, or hold what was saved. `forged`: the checksums are made right again."""
    trainer = one(model={"width": 8, "layers": 1}, train={"optimizer": "adamw"})
    trainer.train_step()
    good = checkpoint.save(trainer, folder / "good")
    before, bad = whole.load(good), folder / "bad"
    names = sorted(file.name for file in good.iterdir())

    def case(rng: random.Random) -> None:
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        for _ in range(rng.choice([1, 1, 1, 2])):
            name = rng.choice([".metadata", *names])
            match rng.randrange(6):
                case 0:
                    (bad / name).unlink(missing_ok=True)
                case 1:
                    (bad / rng.choice(names)).write_bytes((good / name).read_bytes())
                case _:
                    (bad / name).write_bytes(mutated((good / name).read_bytes(), rng, [b"", *PIECES]))
        if forged:
            seal(bad)
        unharmed = {file.name: file.read_bytes() for file in bad.iterdir()}
        try:
            checkpoint.restore(trainer, bad)
            if not forged:
                found = {name: piece.local for name, piece in state.held(trainer, copy=False).items()}
                assert found.keys() == before.keys()
                assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())
        finally:
            assert unharmed == {file.name: file.read_bytes() for file in bad.iterdir()}

    refused = attempts(seeds, case)
    assert sorted(path.name for path in folder.iterdir()) == ["bad", "good"]
    return refused


def seal(path: Path) -> None:
    """Make the checksums right again, as a forger would."""
    names = sorted(file.name for file in path.iterdir() if file.name != folders.SUMS)
    (path / folders.SUMS).write_text("".join(f"{folders.checksum(path / name)}  {name}\n" for name in names))
