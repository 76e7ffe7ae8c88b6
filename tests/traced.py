"""Programs that tests start, interrupt and kill, and what they leave behind."""

import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Traced:
    """Programs whose processes and files can be found again."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self, *command: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "RUNTIME_TEST": self.mark, "TMPDIR": str(self.folder)}
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=pipe, text=True, env=environment)

    def processes(self, also: str = "") -> list[int]:
        """Those alive; `also`: in whose environment is this too."""
        return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if self._ours(path, also)]

    def files(self) -> list[Path]:
        return list(self.folder.glob("sandbox-*"))  # torch has a cache there

    def _ours(self, path: Path, also: str = "") -> bool:
        try:
            found = path.read_bytes()
            return self.mark.encode() in found and also.encode() in found
        except OSError:  # another's, or gone
            return False

    def gone(self) -> bool:
        """Whether all is gone, at the latest in 5 s: the kernel needs a moment for dead processes."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if not self.processes() and not self.files():
                return True
            time.sleep(0.02)
        return False
