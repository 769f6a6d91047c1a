"""Tells an exception that only says that another rank went away from one that says what is wrong."""

from __future__ import annotations

import re

# gloo, NCCL and torch's stores raise plain RuntimeError for most of what can happen to a connection.
_WORDS = re.compile(
    r"connection (closed by peer|reset by peer|refused)|broken pipe|socket timeout|timed out (waiting|after)|"
    r"wait timeout|failed to pass monitoredbarrier|/gloo/transport/|remote process exited|"
    r"nccl (error|communicator was aborted)|"
    r"tcpstore|heartbeat",
    re.IGNORECASE,
)


def is_communication(error: BaseException) -> bool:
    """Tell whether this exception, or one that it was raised from or during, is about the connection to other ranks."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if _is_communication(link):
            return True
        seen.add(id(link))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False


def _is_communication(error: BaseException) -> bool:
    if any(
        base.__name__ == "DistError" for base in type(error).__mro__
    ):  # torch.distributed's own, without importing it
        return True
    return isinstance(error, (RuntimeError, ConnectionError, EOFError)) and _WORDS.search(str(error)) is not None
