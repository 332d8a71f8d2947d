"""A connection to PostgreSQL that is given up when the server does not answer any more.

A server that is stopped, or whose disk hangs, keeps its connections: its kernel goes on acknowledging what is sent to
it, so that no setting of TCP finds out.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from psycopg import Connection, OperationalError

if TYPE_CHECKING:
    from collections.abc import Generator

SILENCE_S = 15.0  # without a word: one that is alive ends a statement itself before (`dicom_node.storage.postgres`)


class AnsweredConnection(Connection):
    """psycopg's, which by itself waits for ever."""

    def wait(self, gen: Generator[Any, Any, Any], *arguments: Any, **options: Any) -> Any:
        """Do what psycopg does through this for every exchange with the server.

        Raises
        ------
        OperationalError : the server has been silent for too long; the connection is closed

        """
        return super().wait(self._until_silent(gen), *arguments, **options)

    def _until_silent(self, exchange: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        heard = time.monotonic()
        try:
            wanted = next(exchange)
            while True:
                is_ready = yield wanted  # now and then also where nothing is
                now = time.monotonic()
                if is_ready:
                    heard = now
                elif now - heard > SILENCE_S:
                    self.pgconn.finish()
                    raise OperationalError(f"no answer within {SILENCE_S:g} s")
                wanted = exchange.send(is_ready)
        except StopIteration as end:
            return end.value
