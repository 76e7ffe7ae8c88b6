"""The command line: what it answers, with which exit code, and never with a traceback."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox import cli
from sandbox.plan import engines
from sandbox.verdict import Verdicts

unit, parity = pytest.mark.unit, pytest.mark.parity
ROOT = Path(__file__).parent.parent

SMALL = """
mesh:
  dp: {degree: 2, strategy: %s}
model: {layers: 1, width: 16, heads: 2}
data: {sequence: 12}
train: {steps: 4, batch: 4, schedule: cosine}
run: {device: cpu}
"""


@dataclass(frozen=True)
class Answer:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Answer]


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["sandbox", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        code = ended.value.code
        assert isinstance(code, int)
        return Answer(code, out, err)

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL % "zero2")
    return path


@unit
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("run", "absent.yaml"), "absent.yaml: cannot be read (No such file or directory)."),
        (("run", "smal.yaml"), "smal.yaml: cannot be read (No such file or directory). Did you mean small.yaml?"),
        (
            ("run", "small.yaml", "--set", "train.stepz=3"),
            "small.yaml: train.stepz is not a field. Did you mean train.steps?",
        ),
        (
            ("run", "small.yaml", "--set", "mesh.dp.degre=4"),
            "small.yaml: mesh.dp.degre is not a field. Did you mean mesh.dp.degree?",
        ),
        (
            ("run", "small.yaml", "--set", "train.steps"),
            "--set train.steps: write KEY=VALUE, such as mesh.dp.degree=4.",
        ),
        (
            ("run", "small.yaml", "--set", "mesh.dp.degree=0"),
            "small.yaml: mesh.dp.degree: 0 should be greater than or equal to 1.",
        ),
        (("run", "small.yaml", "--set", "mesh.dp.degree=8"), "small.yaml: train.batch 4 leaves a rank without a row"),
        (
            ("run", "small.yaml", "--set", "mesh.dp.strategy=zero4"),
            "'zero4' is not a strategy of engine native. Did you mean zero",
        ),
        (("run", "small.yaml", "--set", "engine=torhc"), "'torhc' is not an engine. Did you mean torch?"),
        (("run", "small.yaml", "--set", "engine=torch"), "engine torch cannot run zero2: "),
        (("run", "small.yaml", "--set", "data.files=[nowhere.txt]"), "data.files: nowhere.txt cannot be read"),
        (("run", "small.yaml", "--set", "model.vocab=100"), "Set model.vocab: 257."),
        (("run", "small.yaml", "--set", "data.sequence=9999999"), "data.sequence 9999999"),
        (("run", "small.yaml", "--set", "run.device=cuda"), "run.device: cuda needs a GPU for each rank, 2 here, and"),
        (
            ("run", "small.yaml", "--set", "mesh.dp.degree=999", "--set", "train.batch=999"),
            "mesh: 999 ranks, and one machine takes 1 to 240. Lower a degree",
        ),
        (
            ("run", "small.yaml", "--resume"),
            "runs/small/checkpoints: holds no checkpoint. Train with run.checkpoint_every: N first.",
        ),
        (("verify",), "verify: name configs, such as configs/zero2.yaml, or say --all."),
        (("verify", "small.yaml", "--all"), "verify: name configs, such as configs/zero2.yaml, or say --all."),
        (
            ("verify", "small.yaml", "--dtype", "float16"),
            "--dtype float16: is not one of finest, float64, float32, bfloat16, config.",
        ),
        (("verify", "--all", "--only", "zzz"), "no case of --all has that in its `engine name`. There are: "),
        (("verify", "--all", "--only", "native ddp", "--only", "zzz"), "--only zzz: no case of --all has that in its"),
        (("verify", "small.yaml", "--only", "ddp"), "--only: chooses among the cases of --all."),
        (("verify", "--all", "--set", "train.seed=2"), "--all: its cases have their own settings."),
        (("verify", "--all", "--dtype", "float32"), "--all: its cases have their own settings."),
        (("explain", "small.yaml", "--set", "mesh.dp.degree=1"), "small.yaml: one rank has no strategy to explain."),
        (("explain", "small.yaml", "--engine", "torch"), "--engine: small.yaml names its own."),
        (("explain", "zero2", "--set", "train.seed=2"), "--set: there is no config to change."),
        (("explain", "zero4"), "'zero4' is not a strategy of engine native. Did you mean zero"),
        (("explain", "zero2", "--engine", "torch"), "engine torch cannot run zero2: "),
        (("explain", "ddp", "--engine", "nope"), "'nope' is not an engine."),
        (("doctor", "--port", "65536"), "Invalid value for '--port'"),
        (("faults", "--only", "zzz"), "--only zzz: no fault has that in its name. There are: "),
        (
            ("config", "export", "small.yaml", "--to", "torchrun", "--out", "no/x"),
            "--out: no/x cannot be written: no is not a folder.",
        ),
        (("config", "show", "absent.yaml"), "absent.yaml: cannot be read"),
        (("report", "absent.json"), "absent.json: cannot be read (No such file or directory)."),
        (("report", "small.yaml"), "small.yaml: cannot be read (not the JSON of verify --json)."),
        (
            ("run", "small.yaml", "--set", "run.folder=/elsewhere"),
            "run.folder /elsewhere leads out of where the run is",
        ),
        (("run", "small.yaml", "--set", "run.folder=a/../../b"), "run.folder a/../../b leads out of where the run is"),
        (("run", "small.yaml", "--set", "name=../../b"), "name '../../b' cannot be that of a folder."),
        (("checkpoint", "show", "nowhere"), "nowhere: holds no checkpoint."),
        (("checkpoint", "merge", "nowhere", "--to", "x"), "nowhere: holds no checkpoint."),
        (("checkpoint", "export", "nowhere", "--to", "x"), "nowhere: holds no checkpoint."),
        (("checkpoint", "import", "nowhere", "--to", "x"), "nowhere/config.json: cannot be read"),
        (("checkpoint", "import", "nowhere", "--to", "small.yaml"), "--to small.yaml: exists already."),
        (("checkpoint", "import", "nowhere", "--to", "a/b"), "--to a/b: a is not a folder."),
        (("run",), "Missing argument 'CONFIG'"),
        (("runn", "small.yaml"), "No such command 'runn'"),
        (("run", "small.yaml", "--stes"), "No such option"),
    ],
)
def test_a_wrong_input_is_named_and_ends_with_2(
    sandbox: Run, config: Path, arguments: tuple[str, ...], text: str
) -> None:
    answer = sandbox(*arguments)
    assert text in " ".join(answer.err.split())
    assert answer.code == 2
    assert answer.out == ""
    assert [path.name for path in config.parent.iterdir()] == [config.name], "nothing is written"


@unit
@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--json", ("verify", "small.yaml", "--json", "absent/verdicts.json")),
        ("--report", ("verify", "small.yaml", "--report", "absent/report.html")),
        ("--folder", ("run", "small.yaml", "--folder", "small.yaml/inside")),
    ],
)
def test_a_place_that_cannot_be_written_is_named_before_anything_runs(
    sandbox: Run, config: Path, option: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        pytest.fail("a world was launched")

    monkeypatch.setattr("sandbox.run.launch", never)
    monkeypatch.setattr("sandbox.verify.verifier.launch", never)
    answer = sandbox(*arguments)
    assert answer.code == 2
    assert option in answer.err or "absent" in answer.err or "inside" in answer.err


@unit
def test_the_list_shows_what_runs_and_why_the_rest_does_not(sandbox: Run) -> None:
    answer = sandbox("list")
    assert answer.code == 0
    for line in ("ddp", "zero1", "zero2", "zero3", "fsdp"):
        assert any(row.split()[:1] == [line] for row in answer.out.splitlines())
    assert "- torch zero2: " in answer.out
    marks = {row.split()[0]: row.split()[2:] for row in answer.out.splitlines() if row.split()[1:2] == ["dp"]}
    assert dict(zip(engines(), marks["zero2"], strict=True)) == {
        "native": "✓", "accelerate": "✓", "deepspeed": "✓", "fairscale": "✓", "torch": "-"
    }  # fmt: skip
    assert marks["ddp"] == ["✓", "✓", "✓", "-", "✓"]
    for engine in engines():
        assert any(row.startswith(f"{engine}: ") and any(c.isdigit() for c in row) for row in answer.out.splitlines())


@unit
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp"])
def test_a_strategy_is_explained_with_its_options_and_its_bytes(sandbox: Run, strategy: str) -> None:
    answer = sandbox("explain", strategy)
    assert answer.code == 0
    assert "Source: " in answer.out
    assert f"{strategy} on 4 ranks (dp 4)" in answer.out
    assert "parameter W" in answer.out
    for text in ("sent a step, ", "held, parameters", "held, gradients", "held, optimizer", "rank 3"):
        assert text in answer.out


@unit
def test_a_strategy_is_explained_for_a_config(sandbox: Run, config: Path) -> None:
    assert "zero2 on 3 ranks (dp 3)" in sandbox("explain", "zero2", config, "--set", "mesh.dp.degree=3").out
    assert "zero3 on 2 ranks (dp 2)" in sandbox("explain", "zero3", config).out
    assert "fsdp on 2 ranks (dp 2)" in sandbox("explain", "fsdp", config, "--engine", "torch").out


@unit
def test_a_config_is_explained_by_its_strategies_and_drawn(sandbox: Run, config: Path, tmp_path: Path) -> None:
    answer = sandbox("explain", config, "--set", "mesh.tp.degree=2", "--picture", tmp_path / "drawn.svg")
    assert "tensor on 4 ranks (dp 2, tp 2)" in " ".join(answer.out.split())
    assert "zero2 on 4 ranks (dp 2, tp 2)" in " ".join(answer.out.split())
    assert (tmp_path / "drawn.svg").read_text().startswith("<svg ")


@unit
def test_a_config_is_shown_with_every_default_and_can_be_read_again(sandbox: Run, config: Path) -> None:
    shown = sandbox("config", "show", config, "--set", "train.lr=0.5")
    assert shown.code == 0
    config.write_text(shown.out)
    assert sandbox("config", "show", config).out == shown.out
    for line in ("  lr: 0.5", "    strategy: zero2", "  checkpoint_every: 0"):
        assert line in shown.out.splitlines()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, tuple[float, float, float]]:
    return {m["step"]: (m["loss"], m["grad_norm"], m["lr"]) for m in lines(folder) if "loss" in m}


@parity
def test_the_parameters_of_all_stages_are_counted(sandbox: Run, config: Path, tmp_path: Path) -> None:
    counts = []
    for degree in (1, 2):
        stages = ("--set", "mesh.dp={degree: 1}", "--set", f"mesh.pp.degree={degree}", "--set", "train.steps=1")
        assert sandbox("run", config, *stages).code == 0
        counts.append(lines(tmp_path / "runs" / "small")[0]["run"]["parameters"])
    assert counts[0] == counts[1] > 1000


@parity
def test_a_run_writes_its_metrics(sandbox: Run, config: Path, tmp_path: Path) -> None:
    answer = sandbox(
        "run", config, "--set", "train.steps=3", "--set", "train.eval_every=2", "--set", "train.eval_batches=1"
    )
    assert answer.code == 0
    assert answer.err == ""
    head, *rest = lines(tmp_path / "runs" / "small")
    assert set(head["run"]) == {
        "name", "engine", "strategy", "mesh", "world", "device", "parameters", "unigram_entropy", "corpus", "from_step",
    }  # fmt: skip
    facts = {key: head["run"][key] for key in ("name", "engine", "strategy", "mesh", "world", "device", "from_step")}
    assert facts == {
        "name": "small", "engine": "native", "strategy": "zero2", "mesh": "dp 2", "world": 2, "device": "cpu",
        "from_step": 0,
    }  # fmt: skip
    steps = [m for m in rest if "loss" in m]
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert all(set(m) == {"step", "loss", "grad_norm", "lr", "tokens_per_second", "seconds"} for m in steps)
    checks = [m for m in rest if "validation_loss" in m]
    assert [m["step"] for m in checks] == [2, 3]
    assert all(set(m) == {"step", "validation_loss", "bits_per_byte"} for m in checks)
    (measured,) = [m for m in rest if "measured" in m]
    assert measured["step"] == 3
    assert sandbox("report", "runs/small", "--out", "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    for part in ("loss, nats a token", "Memory by rank", "Bytes sent in a step", "One step in time", "backward blocks"):
        assert part in page
    assert "zero2 on 2 ranks (dp 2)" in answer.out
    assert "step 3/3  loss" in answer.out


@parity
@pytest.mark.parametrize("strategy", ["zero2", "fsdp"])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    sandbox: Run, config: Path, tmp_path: Path, strategy: str
) -> None:
    config.write_text(SMALL % strategy)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    often = ("--set", "run.checkpoint_every=2", "--set", "train.eval_batches=1")
    assert sandbox("run", config, "--folder", whole, *often).code == 0
    shorter = whole / "checkpoints" / "step-000002"
    (cut / "checkpoints").mkdir(parents=True)
    shorter.rename(cut / "checkpoints" / "step-000002")
    answer = sandbox("run", config, "--folder", cut, "--resume", *often)
    assert answer.code == 0
    assert lines(cut)[0]["run"]["from_step"] == 2
    assert losses(cut) == {step: values for step, values in losses(whole).items() if step > 2}
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert [[m["step"] for m in lines(folder) if "measured" in m] for folder in (whole, cut)] == [[3], [4]]


@parity
def test_a_run_on_one_rank_says_nothing_on_standard_error(sandbox: Run, config: Path, tmp_path: Path) -> None:
    alone = ("--set", "mesh.dp.degree=1", "--set", "run.checkpoint_every=2", "--set", "train.eval_batches=1")
    answer = sandbox("run", config, *alone)
    assert (answer.code, answer.err) == (0, "")
    assert lines(tmp_path / "runs" / "small")[0]["run"]["strategy"] == "unsharded"


OFTEN = ("--set", "run.checkpoint_every=2", "--set", "train.eval_batches=1")


@parity
def test_a_run_goes_on_in_another_layout_and_is_told_what_changed(sandbox: Run, config: Path, tmp_path: Path) -> None:
    straight = ("--set", "mesh.dp.degree=1", "--set", "train.steps=6", "--set", "train.dtype=float64")
    assert sandbox("run", config, "--folder", "straight", *straight).code == 0
    first = ("--set", "train.schedule=constant", "--set", "train.dtype=float64", *OFTEN)
    assert sandbox("run", config, *first).code == 0
    for changed, text in (
        (("--set", "model.width=32"), "was saved with model.width 16, this run has 32. Resume with model.width: 16."),
        (("--set", "train.seed=3"), "was saved with train.seed 0, this run has 3."),
    ):
        answer = sandbox("run", config, "--resume", *first, *changed)
        assert (answer.code, answer.out) == (2, "")
        assert f"runs/small/checkpoints/step-000004: {text}" in answer.err
    more = ("--set", "train.steps=6", "--set", "engine=torch", "--set", "mesh.dp={degree: 4, strategy: fsdp}")
    answer = sandbox("run", config, "--resume", *first, *more)
    assert answer.code == 0
    assert "going on from runs/small/checkpoints/step-000004\ntrain.steps 4 -> 6\n" in answer.out
    assert sorted(losses(tmp_path / "runs" / "small")) == [1, 2, 3, 4, 5, 6]


@parity
def test_a_folder_belongs_to_one_run(sandbox: Run, config: Path) -> None:
    assert sandbox("run", config, *OFTEN).code == 0
    answer = sandbox("run", config, *OFTEN)
    assert (answer.code, answer.out) == (2, "")
    assert "runs/small/checkpoints: holds checkpoints of an earlier run. Go on from there with --resume" in answer.err


@parity
@pytest.mark.parametrize("lr", [0.01, 1e-9])
def test_the_model_learns_more_than_counting_tokens_would(
    sandbox: Run, config: Path, tmp_path: Path, lr: float
) -> None:
    settings = {"model.width": 64, "data.sequence": 64, "train.batch": 16, "train.steps": 80, "train.eval_every": 0}
    small = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert sandbox("run", config, *small, "--set", f"train.lr={lr}").code == 0
    head, *_, last = lines(tmp_path / "runs" / "small")
    learnt = last["validation_loss"] < 0.9 * head["run"]["unigram_entropy"]
    assert learnt == (lr == 0.01)


@parity
def test_verifying_says_held_and_writes_verdicts(sandbox: Run, config: Path, tmp_path: Path) -> None:
    answer = sandbox("verify", config, "--json", tmp_path / "v.json")
    assert answer.code == 0
    assert "small" in answer.out
    verdicts = Verdicts.model_validate_json((tmp_path / "v.json").read_bytes())
    (case,) = verdicts.cases
    assert (case.name, case.strategy, case.dtype, case.status) == ("small", "zero2", "float64", "held")
    assert list(verdicts.versions) == ["native"]
    assert case.worst is not None
    assert case.worst.error <= 1e-12


@parity
def test_a_report_of_verdicts_and_a_run_is_one_page(sandbox: Run, config: Path, tmp_path: Path) -> None:
    assert sandbox("verify", config, "--json", "v.json", "--report", "v.html").code == 0
    assert sandbox("run", config, "--set", "train.steps=2", "--set", "train.eval_batches=1").code == 0
    answer = sandbox("report", "v.json", "runs/small", "--out", "both.html", "--table", "v.md")
    assert (answer.code, answer.out) == (0, "wrote both.html\nwrote v.md\n")
    *_, line = (tmp_path / "v.md").read_text().splitlines()
    assert line.startswith("| zero2 | native | 1 of 1 | 2 | float64 | ")
    for name in ("v.html", "both.html"):
        page = (tmp_path / name).read_text()
        assert "small" in page
        assert "http://" not in page.replace("http://www.w3.org", "")


@unit
def test_a_report_of_a_slow_link(sandbox: Run, tmp_path: Path) -> None:
    step = {"ranks": "2 x 1", "name": "zero7", "sent": 9, "crossed": 9, "least": 0.1, "slow": 0.2, "fast": 0.1}
    (tmp_path / "link.json").write_text(json.dumps({"rate": "100mbit", "steps": [step]}))
    assert sandbox("report", "link.json", "--out", "page.html").code == 0
    assert "zero7" in (tmp_path / "page.html").read_text()


@parity
def test_a_mismatch_ends_with_1(sandbox: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sandbox.verify import verifier
    from sandbox.verify.faults import FAULTS

    sick = FAULTS["same_rows_on_every_rank"].plant
    launch = verifier.launch

    def tampered(world: int, work: Any, config: Any, *args: Any, **options: Any) -> Any:
        return launch(world, work, config, *((sick, *args[1:]) if args else args), **options)

    monkeypatch.setattr(verifier, "launch", tampered)
    answer = sandbox("verify", config)
    assert answer.code == 1
    assert "data: " in answer.out
    assert "were seen more than once" in " ".join(answer.out.split())


@parity
def test_a_fault_is_reported_as_caught(sandbox: Run) -> None:
    answer = sandbox("faults", "--only", "divided_twice", "--only", "rank_mean")
    assert answer.code == 0
    assert "divided_twice" in answer.out
    assert "rank_mean_of_means" in answer.out
    assert "normalised_after_backward" not in answer.out


@unit
@pytest.mark.parametrize(
    "arguments", [(), ("run",), ("verify",), ("config",), ("checkpoint",), ("checkpoint", "export")]
)
def test_help_is_there(sandbox: Run, arguments: tuple[str, ...]) -> None:
    answer = sandbox(*arguments, "--help")
    assert answer.code == 0
    assert "Usage: " in answer.out


@unit
def test_help_imports_neither_torch_nor_pydantic() -> None:
    check = (
        "import sys; from sandbox import cli; sys.argv = ['sandbox', '--help']\n"
        "try: cli.main()\nexcept SystemExit: sys.exit(bool({'torch', 'pydantic'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, check=False).returncode == 0


@unit
def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "sandbox", "run", "absent.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("absent.yaml: cannot be read")
