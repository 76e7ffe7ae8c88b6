"""A config is checked before anything starts, and each message names the field and the fix."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sandbox.config import Config, Mesh, check, load
from sandbox.errors import ConfigError
from sandbox.plan import plan

pytestmark = pytest.mark.unit

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def refusal(tree: dict[str, Any]) -> str:
    """What is said of a config that cannot run."""
    with pytest.raises(ConfigError) as caught:
        plan(check(Config, tree))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"trian": {}}, "trian is not a field. Did you mean train?"),
        ({"train": {"stepz": 3}}, "train.stepz is not a field. Did you mean train.steps?"),
        ({"mesh": {"db": {}}}, "mesh.db is not a field. Did you mean mesh.dp?"),
        ({"model": {"kv_head": 3}}, "model.kv_head is not a field. Did you mean model.kv_heads?"),
        ({"run": {"checkpoint_evry": 3}}, "run.checkpoint_evry is not a field. Did you mean run.checkpoint_every?"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_name(tree: dict[str, Any], text: str) -> None:
    assert refusal(tree) == text


def test_a_key_like_no_other_is_answered_with_those_there_are() -> None:
    text = refusal({"data": {"zzzzzz": 1}})
    assert text == "data.zzzzzz is not a field. It may be one of: files, held_out, layout, mask, sequence."


@pytest.mark.parametrize(
    ("axis", "text"),
    [
        ({"bucket_nb": 1}, "mesh.dp.bucket_nb is not a field. Did you mean mesh.dp.bucket_mb?"),
        ({"degre": 4}, "mesh.dp.degre is not a field. Did you mean mesh.dp.degree?"),
        ({"strategi": "ddp"}, "mesh.dp.strategi is not a field. Did you mean mesh.dp.strategy?"),
        ({"strategy": "zero3", "prefetsh": 1}, "mesh.dp.prefetsh is not a field. Did you mean mesh.dp.prefetch?"),
        ({"sync": "lst"}, "mesh.dp.sync: 'lst' is not one of 'last' or 'each'."),
        ({"bucket_mb": 0}, "mesh.dp.bucket_mb: 0 should be greater than 0."),
        ({"strategy": "zero3", "bucket_mb": 1}, "mesh.dp.bucket_mb is not a field."),
        ({"strategy": "zero4"}, "mesh.dp.strategy: 'zero4' is not a strategy of engine native. Did you mean zero"),
    ],
)
def test_a_strategys_options_are_checked_like_any_other(axis: dict[str, Any], text: str) -> None:
    assert refusal({"mesh": {"dp": {"degree": 2, **axis}}}).startswith(text)


def test_options_are_checked_on_one_rank_as_well() -> None:
    assert "Did you mean mesh.dp.bucket_mb?" in refusal({"mesh": {"dp": {"bucket_nb": 1}}})


@pytest.mark.parametrize("axis", ["pp", "cp", "tp"])
def test_a_typo_in_an_axis_of_degree_one_is_not_swallowed(axis: str) -> None:
    assert f"mesh.{axis}.degre is not a field. Did you mean mesh.{axis}.degree?" in refusal(
        {"mesh": {axis: {"degre": 4}}}
    )


def test_an_unknown_engine_is_named_with_the_nearest() -> None:
    assert refusal({"engine": "torhc"}) == "engine: 'torhc' is not an engine. Did you mean torch?"


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({"train": {"steps": "many"}}, "train.steps: 'many' should be a valid integer"),
        ({"train": {"steps": 0}}, "train.steps: 0 should be greater than or equal to 1."),
        ({"train": {"lr": -1}}, "train.lr: -1 should be greater than 0."),
        ({"train": 5}, "train: 5 should be a valid dictionary"),
        ({"mesh": {"dp": {"degree": 1.5}}}, "mesh.dp.degree: 1.5 should be a valid integer"),
        ({"model": {"dropout": 1.0}}, "model.dropout: 1.0 should be less than 1."),
        ({"train": {"betas": [0.9]}}, "train.betas.1: "),
        ({"train": {"optimizer": "adam"}}, "train.optimizer: 'adam' is not one of 'sgd', 'sgd_momentum' or 'adamw'."),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_path(tree: dict[str, Any], text: str) -> None:
    assert refusal(tree).startswith(text)


def test_all_problems_are_told_at_once() -> None:
    lines = refusal({"train": {"stepz": 3, "lr": 0}, "modle": {}}).splitlines()
    assert sorted(line.split()[0] for line in lines) == ["modle", "train.lr:", "train.stepz"]


def test_a_config_cannot_be_changed() -> None:
    config = Config()
    for section, key in ((config, "name"), (config.train, "steps"), (config.mesh.dp, "degree")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 2)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_survives_being_written_and_read(path: Path) -> None:
    config = load(path, ["train.clip=null", "data.files=[a.txt]"])
    again = Config.model_validate(config.model_dump(mode="json"))
    assert again == config
    assert again.mesh.dp.options == config.mesh.dp.options


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_in_the_folder_can_be_planned(path: Path) -> None:
    config = load(path)
    assert config.name == path.stem
    names = [planned.strategy.__name__.split(".")[-1] for planned in plan(config)]
    assert (config.mesh.dp.strategy in names) == (config.mesh.dp.degree > 1 or config.mesh.cp.degree > 1)
    assert bool(names) == (config.mesh.world > 1)


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_an_absent_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    near = written(tmp_path / "zero2.yaml", "")
    with pytest.raises(
        ConfigError, match=r"zero-2\.yaml: cannot be read \(No such file or directory\)\. Did you"
    ) as got:
        load(tmp_path / "zero-2.yaml")
    assert str(got.value).endswith(f"Did you mean {near}?")
    (tmp_path / "configs").mkdir()
    below = written(tmp_path / "configs/nested.yaml", "")
    with pytest.raises(ConfigError, match=re.escape(f"Did you mean {below}?")):
        load(tmp_path / "nested.yaml")
    written(tmp_path / ".quite-other.yaml", "")
    with pytest.raises(ConfigError, match=r"directory\)\.$"):
        load(tmp_path / "quite-another")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff\xfe", "cannot be read"),
        (b"mesh: {dp: [", "is not YAML: while parsing a flow node"),
        (b"- a\n- b", "holds a list, not sections such as `mesh:` and `train:`."),
        (b"just words", "holds a str, not sections"),
        (b"train: {stepz: 3}", "train.stepz is not a field. Did you mean train.steps?"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {text}")
    assert "\n" not in str(caught.value)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "train: {steps: !!python/object/apply:os.mkdir [mark]}",
        "!!python/object/apply:os.mkdir [mark]",
        "train: &a {steps: *a}",
        "&a [*a]",
        f"{BOMB}train: {{steps: *i}}",
        f"{BOMB}data: {{files: *i}}",
        f"{BOMB}*i : 1",
        "[" * 20_000,
        "a: {" * 5000,
        "train: {steps: 2001-99-99}",
        f"train: {{steps: {'9' * 5000}}}",
        "train: {lr: .nan}",
        "train: {lr: .inf}",
        "run: {timeout: .inf}",
        "model: {width: 1000000000000000000, heads: 7}",
        "name: ..",
        "name: a/b",
        'name: "a\\0"',
        "run: {folder: /tmp}",
        "run: {folder: ~}\nmesh: {dp: {degree: 99999999999}}",
    ],
)
def test_what_is_meant_to_harm_is_refused_in_few_words(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "c.yaml", text)
    with pytest.raises(ConfigError) as caught:
        plan(load(path))
    assert len(str(caught.value)) < 8000  # a line for each of 18 things that are wrong
    assert [file.name for file in tmp_path.iterdir()] == ["c.yaml"]


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path / "nil.yaml", "")) == Config(name="nil")


def test_overrides_reach_any_depth_and_the_last_one_counts(tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", "train: {steps: 5}")
    sets = ["train.steps=6", "train.steps=7", "mesh.dp.degree=4", "train.clip=null", "train.lr=3e-3", "name=other"]
    config = load(path, sets)
    assert (config.train.steps, config.mesh.dp.degree, config.train.clip) == (7, 4, None)
    assert (config.train.lr, config.name) == (0.003, "other")


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("train.steps", "--set train.steps: write KEY=VALUE, such as mesh.dp.degree=4."),
        ("=3", "--set =3: write KEY=VALUE, such as mesh.dp.degree=4."),
        ("train.=3", "--set train.=3: write KEY=VALUE, such as mesh.dp.degree=4."),
        ("train.betas=[1", "--set train.betas=[1: the value is not YAML. Quote it."),
        ("train.steps.more=3", "--set train.steps.more=3: train.steps is a value, not a section."),
        ("train.stepz=3", "train.stepz is not a field. Did you mean train.steps?"),
        ("train.steps=x", "train.steps: 'x' should be a valid integer"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, item: str, text: str) -> None:
    path = written(tmp_path / "c.yaml", "train: {steps: 5}")
    with pytest.raises(ConfigError) as caught:
        load(path, [item])
    assert text in str(caught.value)


def test_degrees_multiply_to_the_world() -> None:
    mesh = Mesh.model_validate({"dp": {"degree": 8, "replicas": 2}})
    assert mesh.degrees == {"pp": 1, "dp_replicate": 2, "dp_shard": 4, "ep": 1, "cp": 1, "tp": 1}
    assert mesh.world == 8
    assert str(mesh) == "dp 2x4"
    carved = Mesh.model_validate({"dp": {"degree": 8, "replicas": 2}, "ep": {"degree": 2}})
    assert (carved.degrees["dp_shard"], carved.degrees["ep"], carved.world) == (2, 2, 8)
    assert str(carved) == "dp 2x4, ep 2"
    assert str(Mesh()) == "-"


def test_the_reference_is_the_same_training_on_one_rank_of_ours() -> None:
    config = check(Config, {"engine": "torch", "mesh": {"dp": {"degree": 4}}, "train": {"seed": 3}})
    reference = config.reference()
    assert (reference.engine, reference.mesh.world) == ("native", 1)
    assert (reference.train, reference.model, reference.data) == (config.train, config.model, config.data)
    assert plan(reference) == []
