"""Draws docs/pictures, which docs/strategies.md shows: `make pictures`."""

from pathlib import Path

from sandbox.config import load
from sandbox.report.picture import gallery, picture

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/pictures"
CONFIGS = {
    # picture: config, and what is set in it
    "ddp": ("ddp", "mesh.dp.degree=4"),
    "zero1": ("zero1", "mesh.dp.degree=4"),
    "zero2": ("zero2", "mesh.dp.degree=4"),
    "zero3": ("zero3", "mesh.dp.degree=4"),
    "fsdp": ("fsdp", "mesh.dp.degree=4"),
    "hsdp": ("hsdp",),
    "tensor": ("tp", "mesh.tp.degree=4"),
    "ring": ("cp", "mesh.cp.degree=4"),
    "ulysses": ("ulysses",),
    "pipeline": ("pp", "mesh.pp.degree=4", "mesh.dp.degree=1", "train.microbatches=8"),
    "zero_bubble": ("zero_bubble",),
    "expert": ("ep", "model.experts=6", "model.mlp=gelu"),
    "composition": (
        "pp", "mesh.pp.schedule=zb_h1", "mesh.dp.strategy=fsdp", "mesh.tp.degree=2", "train.microbatches=6",
    ),
}  # fmt: skip


def drawn() -> dict[str, str]:
    """The text of every picture, by its name."""
    pictures = {}
    for name, (config, *settings) in CONFIGS.items():
        loaded = load(ROOT / f"configs/{config}.yaml", [*settings, f"name={name}"])
        pictures[name] = picture(loaded)
    return pictures | {"schedules": gallery()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in drawn().items():
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
