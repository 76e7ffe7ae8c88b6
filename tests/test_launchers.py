"""What `sandbox launch` prints is what the files of launch/ run, and is valid where a schema says what is."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from sandbox.cli.launch import place, spanning
from sandbox.config import Config, load
from sandbox.errors import ConfigError, MeshError
from sandbox.launchers import LAUNCHERS, Job, Launcher

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("docker/*.sh")])
RUN = ("sandbox", "run", "configs/hsdp.yaml")
JOB = Job("hsdp", RUN, nodes=2, gpus=2, host="node0")
PRINTED = {  # the files that `sandbox launch` has printed, and how
    "launch/slurm.sbatch": (Launcher.SLURM, "run"),
    "launch/pytorchjob.yaml": (Launcher.K8S, "run"),
    "launch/jobset.yaml": (Launcher.JOBSET, "run"),
    "docker/compose.yaml": (Launcher.COMPOSE, "verify"),
}


def config(**mesh: Any) -> Config:
    return Config.model_validate({"mesh": mesh, "train": {"batch": 64}})


# The mesh


@pytest.mark.parametrize(
    ("nodes", "gpus", "placed"), [(None, None, (1, 4)), (2, None, (2, 2)), (None, 1, (4, 1)), (4, 1, (4, 1))]
)
def test_what_is_left_out_follows_from_the_mesh(nodes: int | None, gpus: int | None, placed: tuple[int, int]) -> None:
    assert place(config(dp={"degree": 4}), nodes, gpus) == placed


@pytest.mark.parametrize(
    ("nodes", "gpus", "text"),
    [
        (3, None, "--nodes 3 does not divide the mesh's 4 ranks. Those that do: 1, 2, 4."),
        (None, 3, "--gpus 3 does not divide the mesh's 4 ranks. Those that do: 1, 2, 4."),
        (2, 4, "are 8 ranks, but the mesh has 4 (dp 2, tp 2). Say --nodes 1, or --set mesh.dp.degree=4."),
        (4, 3, "are 12 ranks, but the mesh has 4 (dp 2, tp 2). Say --gpus 1, or --set mesh.dp.degree=6."),
        (3, 3, "are 9 ranks, but the mesh has 4 (dp 2, tp 2). Say --nodes 1 --gpus 4."),
    ],
)
def test_a_number_of_ranks_that_the_mesh_has_not_is_refused_with_the_fix(
    nodes: int | None, gpus: int | None, text: str
) -> None:
    mesh = {"dp": {"degree": 2}, "tp": {"degree": 2}}
    with pytest.raises(MeshError) as caught:
        place(config(**mesh), nodes, gpus)
    assert text in str(caught.value)
    if "mesh.dp.degree=" in text:  # the fix is one
        degree = int(text.rpartition("=")[2].rstrip("."))
        assert place(config(**mesh | {"dp": {"degree": degree}}), nodes, gpus) == (nodes, gpus)


def test_one_is_told_of_an_axis_that_waits_for_the_network_in_every_layer() -> None:
    mesh = config(dp={"degree": 2}, cp={"degree": 2}, tp={"degree": 4})
    assert spanning(mesh, 16) == spanning(mesh, 8) == []
    assert [note.split()[0] for note in spanning(mesh, 4)] == ["cp"]
    assert [note.split()[0] for note in spanning(mesh, 2)] == ["tp", "cp"]
    assert spanning(config(dp={"degree": 8}), 2) == []


def test_local_is_one_machine() -> None:
    with pytest.raises(ConfigError, match="Say --on torchrun"):
        LAUNCHERS[Launcher.LOCAL](JOB)


# The scripts


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """An environment in which launchers print how they were called instead of launching."""
    for name in ("torchrun", "accelerate", "deepspeed"):
        (tmp_path / name).write_text(f'#!/bin/sh\nfor word in {name} "$@"; do printf "%s\\n" "$word"; done\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node0\necho node1\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; print(sys.argv)'\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_ID": "hsdp"}


def words(environment: dict[str, str], *command: str) -> list[str]:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("launcher", "script", "job"),
    [
        (Launcher.TORCHRUN, "torchrun.sh", Job("hsdp", RUN, nodes=1, gpus=4)),
        (Launcher.TORCHRUN, "nodes.sh", JOB),
        (Launcher.ACCELERATE, "accelerate.sh", JOB),
        (Launcher.DEEPSPEED, "deepspeed.sh", JOB),
        (Launcher.SLURM, "slurm.sbatch", JOB),
    ],
)
def test_a_script_does_what_is_printed(stubs: dict[str, str], launcher: Launcher, script: str, job: Job) -> None:
    settings = stubs | {"NODES": str(job.nodes), "GPUS": str(job.gpus), "HOST": "node0", "RANK": "1"}
    ran = words(settings, "bash", f"launch/{script}", "configs/hsdp.yaml")
    printed = words(settings, "bash", "-c", LAUNCHERS[launcher](job))
    assert ran == printed
    assert ran[-3:] == list(RUN)
    assert ran[0] == ("torchrun" if launcher in ("torchrun", "slurm") else launcher)


def test_the_elastic_script_adds_restarts_to_that_of_several_nodes(stubs: dict[str, str]) -> None:
    settings = stubs | {"NODES": "1:2", "GPUS": "2", "HOST": "node0", "ADDRESS": "10.0.0.1"}
    fixed = words(settings, "bash", "launch/nodes.sh", "configs/hsdp.yaml")
    elastic = words(settings, "bash", "launch/elastic.sh", "configs/hsdp.yaml")
    assert {*fixed} < {*elastic}
    assert {"--max-restarts", "1:2", "--local-addr", "10.0.0.1"} < {*elastic}


def test_a_script_names_the_setting_that_is_missing(stubs: dict[str, str]) -> None:
    command = ["bash", "launch/torchrun.sh", "configs/ddp.yaml"]
    done = subprocess.run(command, cwd=ROOT, env=stubs, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "GPUS: how many ranks" in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shellcheck_clean(path: Path) -> None:
    command = [Path(sys.executable).parent / "shellcheck", "--external-sources", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_hadolint_clean() -> None:
    command = [Path(sys.executable).parent / "hadolint", ROOT / "docker/Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_base_of_the_image_is_pinned_by_its_digest() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    assert re.search(r"^ARG BASE_IMAGE=\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)


@pytest.mark.parametrize("script", ["build.sh", "cluster.sh"])
def test_where_nothing_runs_containers_a_status_of_its_own_and_the_way_out_are_given(
    tmp_path: Path, script: str
) -> None:
    for name in ("bash", "dirname", "id"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    command = [tmp_path / "bash", ROOT / "docker" / script]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 69
    assert "Start docker; or, as root, docker/install.sh installs" in done.stderr


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_lock_holds_every_package_with_a_hash(name: str) -> None:
    lines = (ROOT / f"docker/{name}.lock").read_text().replace("\\\n", " ").splitlines()[1:]
    assert all(re.fullmatch(r"\S+==\S+(\s+--hash=sha256:[0-9a-f]{64})+", line) for line in lines)
    locked = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    assert {re.split(r"[><=]", name)[0].lower() for name in wanted} <= locked
    assert any(line.startswith("torch==2.13.0") for line in lines)
    assert any(package.startswith("nvidia-") for package in locked) == (name == "cuda")


# The manifests


@pytest.mark.parametrize("name", PRINTED)
def test_a_file_is_what_is_printed(name: str) -> None:
    launcher, command = PRINTED[name]
    origin = f"sandbox launch configs/hsdp.yaml --on {launcher} --nodes 2 --gpus 2"
    origin += " --verify" if command == "verify" else ""
    path = "configs/hsdp.yaml"
    job = Job(load(ROOT / path).name, ("sandbox", command, path), nodes=2, gpus=2, origin=origin)
    assert (ROOT / name).read_text() == f"{LAUNCHERS[launcher](job)}\n", f"{origin} > {name}"


def checked(launcher: Launcher, manifest: Any) -> None:
    """Raise if a manifest is not what its launcher takes."""
    if launcher == Launcher.COMPOSE:
        schema = files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
        jsonschema.validate(manifest, json.loads(schema.read_text()))
        return
    name = "pytorchjob" if launcher == Launcher.K8S else "jobset"
    jsonschema.validate(manifest, json.loads((ROOT / f"tests/schemas/{name}.json").read_text()))
    if launcher == Launcher.K8S:
        replicas = manifest["spec"]["pytorchReplicaSpecs"].values()
        parts = [{"apiVersion": "v1", "kind": "PodTemplate", "template": replica["template"]} for replica in replicas]
    else:
        jobs = manifest["spec"]["replicatedJobs"]
        parts = [{"apiVersion": "batch/v1", "kind": "Job", "spec": job["template"]["spec"]} for job in jobs]
    for part in parts:
        kubernetes_validate.validate(part, kubernetes_validate.latest_version(), strict=True)


MANIFESTS = [Launcher.K8S, Launcher.JOBSET, Launcher.COMPOSE]


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("launcher", MANIFESTS)
def test_a_manifest_is_valid(launcher: Launcher, cuda: bool, nodes: int) -> None:
    job = Job("A name, Of_Sorts", ("sandbox", "run", "x.yaml", "--set", "data.files=[a b]"), nodes, 4, cuda)
    checked(launcher, yaml.safe_load(LAUNCHERS[launcher](job)))


@pytest.mark.parametrize("launcher", MANIFESTS)
def test_a_wrong_manifest_is_not_valid(launcher: Launcher) -> None:
    """Each key that is misspelled, down to those of containers, is found."""
    manifest = yaml.safe_load(LAUNCHERS[launcher](JOB))
    found = 0
    for path in list(_paths(manifest)):
        wrong = copy.deepcopy(manifest)
        owner = wrong
        for part in path[:-1]:
            owner = owner[part]
        owner[f"{path[-1]}s"] = owner.pop(path[-1])
        with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
            checked(launcher, wrong)
        found += 1
    assert found > 4


FREE = ("metadata", "limits", "services")
"""Maps whose keys are the user's."""


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(tree, dict):
        for key, value in tree.items():
            if not path or path[-1] not in FREE:
                yield (*path, key)
            yield from _paths(value, (*path, key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _paths(value, (*path, number))


def test_words_survive_the_shell() -> None:
    job = Job("x", ("sandbox", "run", "a b.yaml", "--set", "data.files=['it']"), nodes=1, gpus=2)
    assert shlex.split(LAUNCHERS[Launcher.TORCHRUN](job))[-4:] == list(job.words[1:])
