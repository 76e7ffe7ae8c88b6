"""What a rank really does: bytes it holds, bytes it sends, and when."""

from sandbox.measure.memory import Peak, held
from sandbox.measure.step import METRICS, Figures, fill, measured_run, timed
from sandbox.measure.timeline import Timeline, align
from sandbox.measure.traffic import Traffic, interface_bytes

__all__ = [
    "METRICS", "Figures", "Peak", "Timeline", "Traffic", "align", "fill", "held", "interface_bytes", "measured_run",
    "timed",
]  # fmt: skip
