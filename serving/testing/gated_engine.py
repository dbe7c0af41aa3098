"""A scripted engine that steps when the test lets it, so that a story can stop time mid-answer."""

import threading
from collections.abc import Sequence

from headrace.serving.engine.base import Limits, Logits, Row
from headrace.serving.errors import EngineFault
from headrace.serving.testing.scripted_engine import Rule, ScriptedEngine


class GatedEngine(ScriptedEngine):
    """Implements Engine. Open from the start; `hold` closes the gate."""

    def __init__(self, limits: Limits, rule: Rule) -> None:
        super().__init__(limits, rule)
        self._changed = threading.Condition()
        self._steps_left: int | None = None
        self._is_dead = False
        self._is_held = False

    def hold(self, *, after_steps: int = 0) -> None:
        """Let this many more steps pass, then make the engine wait."""
        with self._changed:
            self._steps_left = after_steps
            self._changed.notify_all()

    def wait_until_held(self, *, timeout_s: float = 30) -> None:
        """Block until a step stands at the closed gate. Not on the event loop."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._is_held, timeout_s), "no step came"

    def release(self) -> None:
        with self._changed:
            self._steps_left = None
            self._changed.notify_all()

    def die(self) -> None:
        """Fail the step that waits, and every later one."""
        with self._changed:
            self._is_dead = True
            self._changed.notify_all()

    def step(self, rows: Sequence[Row]) -> Logits:
        with self._changed:
            self._is_held = self._steps_left == 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_dead or self._steps_left != 0)
            self._is_held = False
            if self._is_dead:
                raise EngineFault(
                    "The device is gone.", why="The test took it away.", fix="Restart the replica."
                )
            if self._steps_left is not None:
                self._steps_left -= 1
        return super().step(rows)
