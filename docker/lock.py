"""Write a lock of what an image gets: every package, at one version, with the hash of its file.

It asks pip what it would install here, for this Python and platform: run it with those of the image.

python docker/lock.py docker/cpu.lock
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write the lock to the file that is named."""
    _, target = sys.argv
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *wanted], stdout=subprocess.PIPE, text=True, check=True)
    lines = [f"# python docker/lock.py {target}"]
    for package in sorted(json.loads(done.stdout)["install"], key=lambda p: p["metadata"]["name"].lower()):
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        digest = package["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={version} \\\n    --hash=sha256:{digest}")
    Path(target).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
