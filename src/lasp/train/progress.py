"""Progress of work in the background: enough to tell slow work from work that stands still."""

import time

# The first is nobody's own work: whoever waits for others is not to blame for standing still.
PHASES = ("waiting for the others", "writing", "reading back what was written", "sealing", "hashing", "reading")


class Progress:
    """Noted by the thread that works, asked by another."""

    def __init__(self) -> None:
        self.phase = PHASES[0]
        self._noted_at = time.monotonic()

    def enter(self, phase: str) -> None:
        """Another of PHASES begins."""
        self.phase = phase
        self.note()

    def note(self, _num_bytes: int = 0) -> None:
        """Something was done."""
        self._noted_at = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since something was done."""
        return time.monotonic() - self._noted_at
