"""The image, really built, and a cluster of its containers: what it verifies, what it ends with, and what it leaves."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SMALL = ["--set", "model.layers=1", "--set", "model.width=32", "--set", "data.sequence=32"]
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))

pytestmark = [pytest.mark.parity, pytest.mark.timeout(600)]

# `sandbox verify` in whose ranks a bug is planted, one that really happened (docs/faults.md).
PLANTED = """
import functools
from sandbox import verify
from sandbox.cli import main
from sandbox.verify.faults import FAULTS
verify.Case = functools.partial(verify.Case, prepare=FAULTS["summed_for_averaged"].plant)
if __name__ == "__main__":
    main()
"""


def shell(*command: object, image: str = "", given: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command of docker/; skip the test, with the reason, where that says that it cannot be had here."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*map(str, command)],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "PYTHON": sys.executable, "SANDBOX_IMAGE": image},
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 69:
        pytest.skip(f"neither the image nor its cluster was checked: {done.stderr.strip().splitlines()[-1]}")
    return done


def engine(*words: str) -> list[str]:
    """What docker or podman, whichever is used here, answers, by line."""
    done = shell("bash", "-c", '. docker/engine.sh; "$engine" "$@"', "engine", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def traces() -> dict[str, list[str]]:
    """What a cluster could leave behind."""
    return {
        "containers": sorted(engine("ps", "--all", "--quiet")),
        "networks": sorted(engine("network", "ls", "--quiet")),
        "volumes": sorted(engine("volume", "ls", "--quiet")),
        "links": sorted(
            path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith(("podman", "br-"))
        ),
        "files": shell("git", "status", "--porcelain", "--ignored", "docker").stdout.splitlines(),
    }


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The name of an image of this work tree, which is removed when the tests have ended."""
    name = f"sandbox-test-{uuid.uuid4().hex[:8]}"
    built = shell("docker/build.sh", image=name)
    assert built.returncode == 0, built.stderr
    assert [path.name for path in (ROOT / "docker/wheels").iterdir()] == [".gitignore"]
    yield name
    engine("rmi", "--force", name)


def cluster(image: str, services: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    before = traces()
    done = shell("docker/cluster.sh", "-", image=image, given=yaml.safe_dump({"services": services}))
    assert traces() == before
    return done


def test_a_config_holds_in_a_cluster_of_two_containers_of_two_ranks(image: str) -> None:
    done = cluster(image, COMPOSE["services"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 case: 1 held" in done.stdout


def test_the_cluster_ends_with_the_status_of_a_verification_that_fails(image: str, tmp_path: Path) -> None:
    """The twin of the test above."""
    (tmp_path / "planted.py").write_text(PLANTED, encoding="utf-8")
    tmp_path.chmod(0o755)
    services = {
        name: service
        | {
            "command": ["planted" if word == "sandbox" else word for word in service["command"]] + SMALL,
            "volumes": [f"{tmp_path}/planted.py:/sandbox/planted.py:ro"],
        }
        for name, service in COMPOSE["services"].items()
    }
    done = cluster(image, services)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 mismatch" in done.stdout
    assert "scale: " in done.stdout


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        ("exit 0", "sleep 2; exit 3", 3),  # one that ended well stops nobody
        ("sleep 2; exit 3", "exit 0", 3),
        ("sleep 100", "exit 7", 7),  # one that failed stops all
    ],
)
def test_the_first_status_that_is_not_0_ends_the_cluster(image: str, first: str, second: str, status: int) -> None:
    services = {
        name: {"image": image, "command": ["sh", "-c", command], "stop_grace_period": "2s"}
        for name, command in (("node0", first), ("node1", second))
    }
    start = time.monotonic()
    assert cluster(image, services).returncode == status
    assert time.monotonic() - start < 60


def test_a_container_is_not_root_has_what_its_packages_need_and_is_healthy(image: str) -> None:
    (about,) = json.loads("\n".join(engine("image", "inspect", image)))
    health = about["Config"].get("Healthcheck") or about["Healthcheck"]  # docker's place, podman's
    assert health["Test"][0] == "CMD"
    run = ("bash", "-c", '. docker/engine.sh; run --network none "$@"', "engine", image)
    assert shell(*run, *health["Test"][1:]).returncode == 0
    words = shell(*run, "sh", "-c", "id -u && pip check && touch /venv/mine").stdout.splitlines()
    assert words == ["1000", "No broken requirements found."]
