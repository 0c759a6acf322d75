"""Dynamo's recompile limit: from there on other inputs run the original code, which Dynamo alone would tell."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar

log = logging.getLogger("attnopt")
_SOURCE = "torch._dynamo.convert_frame"
_MESSAGE = "torch._dynamo hit config."
_told: ContextVar[Callable[[str], None] | None] = ContextVar("attnopt_recompiles", default=None)


class _Listener(logging.Handler):
    """Hears Dynamo say that it compiles a function no more, and says what that means for attention."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Say it once for a function, and tell whoever is listening."""
        if not str(record.msg).startswith(_MESSAGE) or not isinstance(record.args, tuple) or len(record.args) < 3:
            return
        limit, count, function = record.args[:3]
        note = (
            f"Dynamo reached its {limit} of {count} for {function}: inputs unlike those so far run the original code, "
            f"without fused attention. Let sizes vary (dynamic=True, or dynamic_shapes), or raise "
            f"torch._dynamo.config.{limit}."
        )
        tell = _told.get()
        if tell is not None:
            tell(note)
        if note not in self.heard:
            self.heard.add(note)
            log.warning(note)


_listener = _Listener()


@contextlib.contextmanager
def telling(tell: Callable[[str], None]) -> Iterator[None]:
    """Have `tell` called with what there is to say, if a limit is reached inside."""
    listen()
    token = _told.set(tell)
    try:
        yield
    finally:
        _told.reset(token)


def listen() -> None:
    """Hear Dynamo from now on; a second call changes nothing."""
    source = logging.getLogger(_SOURCE)
    if _listener not in source.handlers:
        source.addHandler(_listener)
