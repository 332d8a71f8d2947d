"""uvicorn that sleeps when nobody asks."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import uvicorn

TICK_S = 1.0  # the age of the Date header that answers carry


class HttpServer(uvicorn.Server):
    """A server of a thread, until `end`; uvicorn's own looks ten times a second whether it is to end: 1 % of a core."""

    _loop: asyncio.AbstractEventLoop | None = None

    def end(self) -> None:
        """Answer what was asked and end; from any thread, at any time."""
        self.should_exit = True
        if self._loop:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._ended.set)

    async def main_loop(self) -> None:
        """Wait for the end."""
        self._ended = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), TICK_S)
