"""The requests to the engine that one call makes, one for each of its prompts, as one thing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from fastpage.engine.async_engine import AsyncEngine, RequestStream
from fastpage.outputs import RequestOutput, RequestOutputKind
from fastpage.serving.openai.exchange import ClientGone
from fastpage.serving.openai.reply import Call, News

# So many prompts are added, some 25 microseconds each, before others get their turn.
_AT_ONCE = 32


class Streams:
    """abort() may be called at any time, by whoever learns that nobody waits for the outputs."""

    def __init__(self) -> None:
        self._streams: dict[int, RequestStream] = {}  # by the index of the prompt
        self._aborted = False

    async def submit(self, engine: AsyncEngine, call: Call) -> None:
        """All of the call's prompts, or none: raises what AsyncEngine.add_request() raises for the
        first that is refused, and ClientGone after abort()."""
        if len(call.prompts) == 1:
            await self._add(engine, call, 0, call.id)
        else:
            await self._add_all(engine, call)
        if self._aborted:
            raise ClientGone

    async def _add_all(self, engine: AsyncEngine, call: Call) -> None:
        adding: list[asyncio.Task[None]] = []
        try:
            for i in range(len(call.prompts)):
                add = self._add(engine, call, i, f"{call.id}-{i}")
                adding.append(asyncio.create_task(add))
                if len(adding) % _AT_ONCE == 0:
                    await asyncio.sleep(0)
            results = await asyncio.gather(*adding, return_exceptions=True)
        except asyncio.CancelledError:
            for task in adding:
                task.cancel()
            raise
        for error in filter(None, results):
            raise error

    async def _add(self, engine: AsyncEngine, call: Call, index: int, request_id: str) -> None:
        self._streams[index] = await engine.add_request(
            call.prompts[index],
            call.params,
            request_id,
            priority=call.request.priority or 0,
            output_kind=RequestOutputKind.DELTA if call.stream else RequestOutputKind.FINAL_ONLY,
        )

    def abort(self) -> None:
        self._aborted = True
        for stream in self._streams.values():
            stream.abort()

    async def outputs(self) -> list[RequestOutput]:
        """Of calls that do not stream: one for each prompt, when all are complete."""
        in_order = [self._streams[i] for i in sorted(self._streams)]
        return [output for stream in in_order async for output in stream]

    async def news(self) -> AsyncGenerator[list[News], None]:
        """What is new of any of them, as it comes."""
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                yield [(0, output)]
            return
        waiting: dict[asyncio.Future[RequestOutput], int] = {}
        done: list[asyncio.Future[RequestOutput]] = []
        one_is_done = asyncio.Event()

        def on_done(task: asyncio.Future[RequestOutput]) -> None:
            done.append(task)
            one_is_done.set()

        def wait_for_next(i: int) -> None:
            task = asyncio.ensure_future(anext(self._streams[i]))
            task.add_done_callback(on_done)
            waiting[task] = i

        try:
            for i in self._streams:
                wait_for_next(i)
            while waiting:
                await one_is_done.wait()
                one_is_done.clear()
                news = [(waiting.pop(task), task.result()) for task in done]
                done.clear()
                for i, output in news:
                    if not output.finished:
                        wait_for_next(i)
                yield news
        finally:
            for task in (*waiting, *done):
                task.cancel()
