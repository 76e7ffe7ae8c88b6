"""`sandbox launch`: the command or manifest that starts a config somewhere, checked against its mesh."""

import shlex
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from sandbox.cli.arguments import ConfigPath, Set, read
from sandbox.errors import MeshError
from sandbox.launchers import LAUNCHERS, Job, Launcher

if TYPE_CHECKING:
    from sandbox.config import Config

__all__ = ["launch", "place", "spanning"]


def launch(
    config: ConfigPath,
    on: Annotated[Launcher, typer.Option(help="What starts it.")],
    nodes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Machines; default: 1, or what --gpus leaves."),
    ] = None,
    gpus: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Ranks on each, a GPU a rank where there are GPUs; default: what --nodes leaves."),
    ] = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="The node where the others meet it.")] = "HOST",
    image: Annotated[str, typer.Option(metavar="NAME", help="The image, for k8s, jobset and compose.")] = Job.image,
    verify: Annotated[bool, typer.Option("--verify", help="Start `sandbox verify` instead of `sandbox run`.")] = False,
    set_: Set = None,
) -> None:
    """Print the command or manifest that starts a config on a launcher, checked against its mesh."""
    settings = read(config, set_)
    nodes, gpus = place(settings, nodes, gpus)
    words, origin = ["sandbox", "verify" if verify else "run", str(config)], ["sandbox", "launch", str(config)]
    origin += ["--on", on, "--nodes", str(nodes), "--gpus", str(gpus), *(["--verify"] if verify else [])]
    for item in set_ or ():
        words += ["--set", item]
        origin += ["--set", item]
    cuda = settings.run.device != "cpu"
    job = Job(settings.name, tuple(words), nodes, gpus, cuda, host, image, shlex.join(origin))
    typer.echo(LAUNCHERS[on](job))
    for note in spanning(settings, gpus):
        typer.echo(f"{config}: {note}", err=True)


def place(config: "Config", nodes: int | None, gpus: int | None) -> tuple[int, int]:
    """Machines and ranks on each, for the mesh of `config`; what is None follows from the other.

    Raises MeshError: no such number exists, or nodes x gpus is not the number of ranks. The text has the fix.
    """
    from sandbox.config.base import divisors

    world = config.mesh.world
    if gpus is None:
        nodes = nodes or 1
        if world % nodes:
            raise MeshError(f"--nodes {nodes} does not divide the mesh's {world} ranks. {divisors(world)}")
        return nodes, world // nodes
    if nodes is None:
        if world % gpus:
            raise MeshError(f"--gpus {gpus} does not divide the mesh's {world} ranks. {divisors(world)}")
        return world // gpus, gpus
    if nodes * gpus == world:
        return nodes, gpus
    if world % gpus == 0:
        fix = f"--nodes {world // gpus}"
    elif world % nodes == 0:
        fix = f"--gpus {world // nodes}"
    else:
        fix = f"--nodes 1 --gpus {world}"
    dp = config.mesh.dp
    degree, rest = divmod(nodes * gpus * dp.degree, world)
    other = "" if rest or degree % dp.replicas else f", or --set mesh.dp.degree={degree}"
    raise MeshError(
        f"--nodes {nodes} x --gpus {gpus} are {nodes * gpus} ranks, but the mesh has {world} ({config.mesh}). "
        f"Say {fix}{other}."
    )


def spanning(config: "Config", gpus: int) -> list[str]:
    """What a person should know of axes that wait on the network in every layer, for nodes of `gpus` ranks."""
    from sandbox.config import AXES

    notes, block = [], 1
    for axis in reversed(AXES):
        degree = config.mesh.degrees[axis]
        block *= degree
        if axis in ("tp", "cp") and degree > 1 and gpus % block and config.mesh.world > gpus:
            notes.append(
                f"{axis} {degree} spans nodes of {gpus}: every layer will wait for the network between them. "
                f"{block} ranks on a node keep it inside."
            )
    return notes
