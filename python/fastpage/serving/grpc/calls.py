"""What the handlers of every service share: the status of an error, and streams to a client."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from fastpage.engine.core import DuplicateRequestId, EngineStopped
from fastpage.errors import InvalidArgument, ResourceExhausted

# Requests of more bytes than this are looked at off the event loop: other calls go on meanwhile.
_LONG_REQUEST = 1 << 14
# That is done one after the other, as a rule, and whoever waits for it holds its memory: some five
# times as much.
_MOST_WAITING_BYTES = 64 << 20
_SECONDS_TO_READ = 1.0  # one of a few MiB

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Outputs(Protocol[T_co]):
    """A RequestStream, or what wraps one."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    def abort(self) -> None: ...


class ModelNotFound(InvalidArgument):
    """The request names a model that is not served here."""


class NotReady(RuntimeError):
    """The model is still being loaded."""


class SlowClient(ResourceExhausted):
    """The client does not take what is written to it."""


# The first class that fits gives the status.
_STATUS = (
    (DuplicateRequestId, grpc.StatusCode.ALREADY_EXISTS),
    (ModelNotFound, grpc.StatusCode.NOT_FOUND),
    (InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (EngineStopped, grpc.StatusCode.UNAVAILABLE),
    (NotReady, grpc.StatusCode.UNAVAILABLE),
    (Exception, grpc.StatusCode.INTERNAL),
)


# It travels as metadata, percent-encoded, of which a client takes 8 KiB for certain.
_LONGEST_MESSAGE = 600


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> NoReturn:
    """Ends the call with the status that fits the error, and one line."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    message = " ".join(str(error).split()) or type(error).__name__
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]} ..."
    await context.abort(status, message, _retry_hint(error))
    raise AssertionError("abort() raises")


def _retry_hint(error: Exception) -> tuple[tuple[str, str], ...]:
    """`grpc-retry-pushback-ms` is what grpc's own retries obey, in a client whose service config
    asks for them; `retry-after-ms` is for everybody else."""
    seconds = getattr(error, "retry_after_seconds", None)
    if seconds is None:
        return ()
    milliseconds = str(math.ceil(seconds * 1000))
    return (("retry-after-ms", milliseconds), ("grpc-retry-pushback-ms", milliseconds))


async def aside(request: Message, call: Callable[..., T], *args: Any) -> T:
    """call(*args), on another thread if the request is long. Raises ResourceExhausted if many of
    them wait for that already."""
    size = request.ByteSize()
    if size <= _LONG_REQUEST:
        return call(*args)
    return await _long_requests.look_at(size, call, *args)


class _LongRequests:
    """Those that are looked at, or wait for it."""

    def __init__(self) -> None:
        self.num_bytes = 0

    async def look_at(self, size: int, call: Callable[..., T], *args: Any) -> T:
        if self.num_bytes > 0 and self.num_bytes + size > _MOST_WAITING_BYTES:
            error = ResourceExhausted(
                f"{self.num_bytes} bytes of long requests are being read: try again later"
            )
            error.retry_after_seconds = _SECONDS_TO_READ  # type: ignore[attr-defined]
            raise error
        self.num_bytes += size
        work = asyncio.ensure_future(asyncio.to_thread(call, *args))
        work.add_done_callback(lambda _: self._subtract(size))
        # A caller that goes away does not take its memory along before a thread has seen to it.
        return await asyncio.shield(work)

    def _subtract(self, size: int) -> None:
        self.num_bytes -= size


_long_requests = _LongRequests()


async def write_outputs(
    stream: Outputs[T],
    context: grpc.aio.ServicerContext,
    to_messages: Callable[[T], Iterable[Any]],
    slow_client_timeout: float,
) -> None:
    """Writes what becomes of a request to its client, and ends the call with the status of what
    goes wrong. Whatever ends it, the request's KV blocks are given back.

    While a write waits for the client, news coalesce in the stream; a client that does not take a
    message for `slow_client_timeout` seconds loses the call.
    """
    watch = _WriteWatch(slow_client_timeout)
    try:
        async for output in stream:
            for message in to_messages(output):
                watch.count += 1
                await context.write(message)
                watch.count += 1
    except asyncio.CancelledError:
        if not watch.expired:
            raise
        stream.abort()
        error = f"the client took no message for {slow_client_timeout:g} s: the call was given up"
        await abort(context, SlowClient(error))
    except Exception as error:
        await abort(context, error)
    finally:
        watch.stop()
        stream.abort()


async def last_output(stream: Outputs[T]) -> T:
    """The output of a FINAL_ONLY stream. The request is given up if the caller goes away."""
    try:
        async for output in stream:
            last = output
        return last
    finally:
        stream.abort()


class _WriteWatch:
    """Cancels the task that made it when one write takes too long. `count` goes up before and after
    each write. One timer a call, which looks now and then: a timeout, or only the time, for each
    message would cost too much."""

    _LOOKS = 4  # in the time that a write may take

    def __init__(self, seconds: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._seconds_between = seconds / self._LOOKS
        self._last_count = 0
        self._looks = 0
        self._wait()
        self.count = 0
        self.expired = False

    def stop(self) -> None:
        self._timer.cancel()

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._seconds_between, self._look)

    def _look(self) -> None:
        writing = self.count % 2 == 1
        self._looks = self._looks + 1 if writing and self.count == self._last_count else 0
        self._last_count = self.count
        if self._looks == self._LOOKS:
            self.expired = True
            self._task.cancel()
        else:
            self._wait()
