"""What a rank really does: bytes it holds, bytes it sends, and when."""

from sandbox.measure.memory import Peak, held
from sandbox.measure.timeline import Timeline, align
from sandbox.measure.traffic import Traffic, interface_bytes

__all__ = ["Peak", "Timeline", "Traffic", "align", "held", "interface_bytes"]
