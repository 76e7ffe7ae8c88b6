"""`sandbox checkpoint`: look at checkpoints, merge them, hand them to other programs, and take models in."""

from pathlib import Path
from typing import Annotated

import typer

from sandbox.errors import CheckpointError

__all__ = ["app"]

app = typer.Typer(
    help="""Look at checkpoints, merge them, hand them to other programs, and take models in.

    A run writes one every `run.checkpoint_every` steps, to FOLDER/checkpoints/step-NNNNNN. It holds logical tensors, so
    `sandbox run CONFIG --resume` goes on from it under any mesh, strategy and engine.

    DIR is a checkpoint, or a run's folder, of which the newest one is meant.
    """,
    epilog="Start with: sandbox checkpoint show runs/zero2",
    no_args_is_help=True,
)

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint, or a run's folder, such as runs/zero2.")]


@app.command()
def show(dir_: Dir) -> None:
    """Say what a checkpoint holds and who saved it, after reading every byte against its checksum."""
    from sandbox.checkpoint.folder import facts, find, problems
    from sandbox.checkpoint.storage import index

    checkpoint = find(dir_)
    if wrong := problems(checkpoint):
        raise CheckpointError("\n".join(wrong))
    found, stored = facts(checkpoint), index(checkpoint)
    config = found["config"]
    degrees = {axis: dict(section).get("degree", 1) for axis, section in config["mesh"].items()}
    wide = ", ".join(f"{axis} {degree}" for axis, degree in degrees.items() if degree != 1) or "one rank"
    for kind in ("parameters", "optimizer"):
        own = [entry for name, entry in stored.items() if name.startswith(f"{kind}/")]
        print(f"{kind + ':':<12}{len(own)} tensors, {sum(e.nbytes for e in own):,} bytes")  # noqa: T201
    print(f"step:       {found['step']}")  # noqa: T201
    print(f"saved by:   engine {config['engine']}, {wide}" if "engine" in config else "saved by:   an import")  # noqa: T201
    print(f"checksums:  {len(list(checkpoint.iterdir())) - 1} files, all right")  # noqa: T201


@app.command()
def merge(dir_: Dir, to: Annotated[Path, typer.Option(metavar="FILE", help="The safetensors file to write.")]) -> None:
    """Write all tensors whole, optimizer state too, to one safetensors file, without the world that saved them."""
    from sandbox.checkpoint.folder import find
    from sandbox.checkpoint.whole import save_file

    checkpoint = find(dir_)
    _absent(to)
    print(f"wrote {to}: {save_file(checkpoint, to)} tensors of {checkpoint.name}")  # noqa: T201


@app.command()
def export(dir_: Dir, to: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to make.")]) -> None:
    """Write the model for Hugging Face: model.safetensors and config.json, loaded by LlamaForCausalLM."""
    from sandbox.checkpoint.folder import find
    from sandbox.checkpoint.llama import export

    checkpoint = find(dir_)
    _absent(to)
    print(f"wrote {to}: {export(checkpoint, to):,} parameters of {checkpoint.name}")  # noqa: T201


@app.command("import")
def import_(
    dir_: Annotated[Path, typer.Argument(metavar="DIR", help="A Llama's folder: config.json and *.safetensors.")],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="The run's folder to make, such as runs/mine.")],
) -> None:
    """Make a run's folder out of a Llama: a checkpoint of step 0, and a config to go on with."""
    import yaml

    from sandbox.checkpoint.llama import take_in

    _absent(to)
    _, model = take_in(dir_, to / "checkpoints")
    settings = model.model_dump(mode="json", exclude_defaults=True)
    (to / "config.yaml").write_text(f"# 1 rank\n{yaml.safe_dump({'model': settings}, sort_keys=False)}", "utf-8")
    print(f"wrote {to}. Go on with: sandbox run {to}/config.yaml --folder {to} --resume")  # noqa: T201


def _absent(to: Path) -> None:
    if to.exists():
        raise CheckpointError(f"--to {to}: exists already. Name another place.")
    if not to.parent.is_dir():
        raise CheckpointError(f"--to {to}: {to.parent} is not a folder. Name another place.")
