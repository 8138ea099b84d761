"""What a program prints: a console that cannot show or take it must not end hours of training."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from typing import TextIO


class Output(io.TextIOBase):
    """Writes to a stream: letters that it cannot encode become "?"; its first failure is kept, the
    rest dropped.

    Args:
        stream: usually sys.stdout, which is None where the process was started without one.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        self._try("write", text.encode(self.encoding, "replace").decode(self.encoding))
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        if self._stream is None or self.failure is not None:
            return
        try:
            getattr(self._stream, method)(*arguments)
        except OSError as error:
            self.failure = error
            # What the stream still holds would fail once more when Python ends.
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
