"""Sending without an application: for Celery workers, cron jobs, scripts and shells."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import Future
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

from fastapi_channels._tasks import run_blocking
from fastapi_channels.exceptions import SettingsError
from fastapi_channels.layers.base import ChannelLayer, Receipt
from fastapi_channels.layers.envelope import Envelope, Message
from fastapi_channels.layers.factory import LayerSpec, make_layer
from fastapi_channels.layers.names import checked_name
from fastapi_channels.layers.users import DISCONNECT
from fastapi_channels.settings import ChannelsSettings

__all__ = ["AsyncPublisher", "Publisher"]

Result = TypeVar("Result")


class AsyncPublisher:
    """Sends to the channels and groups of other processes, from an event loop; an async context manager.

    It connects at the first send, or on entering, holds one connection to each server and subscribes to nothing. With
    the broker away a send raises LayerUnavailable; the next one tries again.

    Args:
        url: What stands in `CHANNEL_LAYERS` of the application: a URL, or `{"BACKEND": ..., "CONFIG": {...}}`, with the
            same prefix, keys and serializer.
        settings: Instead of a URL, the application's settings module or its dotted path. With neither, the environment
            says (`CHANNELS_CHANNEL_LAYERS`, `FASTAPI_CHANNELS_SETTINGS`).
        alias: Which of the layers in the settings.

    Raises:
        SettingsError: There is no such layer, or it reaches no other process (`memory://`).
    """

    def __init__(
        self, url: LayerSpec | None = None, *, settings: str | ModuleType | None = None, alias: str = "default"
    ) -> None:
        self._layer = _making_layers(url, settings, alias)()
        self._last: asyncio.Future[None] | None = None

    @classmethod
    def _of(cls, layer: ChannelLayer) -> Self:
        publisher = cls.__new__(cls)
        publisher._layer = layer
        publisher._last = None
        return publisher

    async def __aenter__(self) -> Self:
        await self._layer.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def send(self, channel: str, message: Message) -> None:
        """See `ChannelLayer.send`."""
        await self._opened(channel, message)
        await self._layer.send(channel, message)

    async def group_send(
        self, group: str, message: Message, *, exclude: Collection[str] = (), idempotency_key: str | None = None
    ) -> Receipt:
        """See `ChannelLayer.group_send`."""
        await self._opened(group, message)
        return await self._layer.group_send(group, message, exclude=exclude, idempotency_key=idempotency_key)

    async def disconnect_user(self, user_id: str, code: int = 4503, reason: str = "") -> None:
        """See `ChannelLayer.disconnect_user`."""
        await self._opened("users", {"type": DISCONNECT})
        await self._layer.disconnect_user(user_id, code, reason)

    async def close(self) -> None:
        """Disconnect; a later send connects anew."""
        await self._layer.close()

    async def _opened(self, name: str, message: Message) -> None:
        """Wait until it is connected and those who have waited longer have gone on; bad input waits for nothing."""
        if self._layer.is_open and self._last is None:
            return
        checked_name(name)
        Envelope.of(message, 0.0)
        before, this = self._last, asyncio.get_running_loop().create_future()
        self._last = this
        try:
            opened = await _outcome(self._layer.open())
            if before is not None:
                await asyncio.wait({before})
            if opened is not None:
                raise opened
        finally:
            if before is None or before.done():
                self._gone_on(this)
            else:  # given up while it waited; those behind it wait for those before it
                before.add_done_callback(lambda _: self._gone_on(this))

    def _gone_on(self, this: asyncio.Future[None]) -> None:
        this.set_result(None)
        if self._last is this:
            self._last = None


class Publisher:
    """The blocking twin of `AsyncPublisher`; a context manager, for any number of threads.

    An event loop in a thread of its own does the work. It may be made before a process forks, as Celery does: each
    process gets a thread and connections of its own at its first send. Messages of one thread keep their order.

    Args:
        url: See `AsyncPublisher`.
        settings: See there.
        alias: See there.

    Raises:
        SettingsError: See there.
    """

    def __init__(
        self, url: LayerSpec | None = None, *, settings: str | ModuleType | None = None, alias: str = "default"
    ) -> None:
        self._make = _making_layers(url, settings, alias)
        self._make()  # what is wrong with it is said here
        self._worker: _Worker | None = None
        self._forgotten: weakref.finalize[..., Publisher] | None = None
        self._changing = threading.Lock()
        _publishers.add(self)

    def __enter__(self) -> Self:
        try:
            self._run(lambda publisher: publisher.__aenter__())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def send(self, channel: str, message: Message) -> None:
        """See `ChannelLayer.send`."""
        self._run(lambda publisher: publisher.send(channel, message))

    def group_send(
        self, group: str, message: Message, *, exclude: Collection[str] = (), idempotency_key: str | None = None
    ) -> Receipt:
        """See `ChannelLayer.group_send`."""
        return self._run(
            lambda publisher: publisher.group_send(group, message, exclude=exclude, idempotency_key=idempotency_key)
        )

    def disconnect_user(self, user_id: str, code: int = 4503, reason: str = "") -> None:
        """See `ChannelLayer.disconnect_user`."""
        self._run(lambda publisher: publisher.disconnect_user(user_id, code, reason))

    def close(self) -> None:
        """Disconnect and end the thread, once the sends of other threads are through; a later send begins anew."""
        with self._changing:
            worker, self._worker = self._worker, None
            self._let_go()
        if worker is not None:
            worker.end()

    def _run(self, call: Callable[[AsyncPublisher], Coroutine[Any, Any, Result]]) -> Result:
        with self._changing:
            if self._worker is None:
                self._worker = _Worker(self._make)
                # One that is forgotten doesn't leave its thread and connection behind.
                self._forgotten = weakref.finalize(self, self._worker.end_soon)
                self._forgotten.atexit = False
            worker = self._worker
            worker.begin_call()
        try:
            return run_blocking(worker.loop, call(worker.publisher))
        finally:
            worker.end_call()

    def _let_go(self) -> None:
        if self._forgotten is not None:
            self._forgotten.detach()
            self._forgotten = None

    def _forget(self) -> None:
        """Leave the thread and the connections, which are the parent's, alone."""
        self._let_go()
        self._worker = None
        self._changing = threading.Lock()


async def _outcome(call: Coroutine[Any, Any, None]) -> Exception | None:
    """What a call raises, if it does; not its cancellation, which goes on."""
    try:
        await call
    except Exception as error:
        return error
    return None


#: Those of this process, which a fork of it has to start anew.
_publishers: weakref.WeakSet[Publisher] = weakref.WeakSet()


def _forget_all() -> None:
    for publisher in list(_publishers):
        publisher._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


class _Worker:
    """A thread with an event loop, and the publisher that lives there."""

    def __init__(self, make: Callable[[], ChannelLayer]) -> None:
        self.publisher = AsyncPublisher._of(make())
        self._calls = 0
        self._change = threading.Condition()
        started: Future[asyncio.AbstractEventLoop] = Future()
        # A daemon: a process that forgets to close its publisher ends all the same.
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._work(started)), name="fastapi-channels-publisher", daemon=True
        )
        self._thread.start()
        self.loop = started.result()

    async def _work(self, started: Future[asyncio.AbstractEventLoop]) -> None:
        self._ended = asyncio.Event()
        started.set_result(asyncio.get_running_loop())
        try:
            await self._ended.wait()
        finally:
            await self.publisher.close()

    def begin_call(self) -> None:
        with self._change:
            self._calls += 1

    def end_call(self) -> None:
        with self._change:
            self._calls -= 1
            self._change.notify_all()

    def end(self) -> None:
        with self._change:
            self._change.wait_for(lambda: not self._calls)
        self.end_soon()
        self._thread.join()

    def end_soon(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self.loop.call_soon_threadsafe(self._ended.set)


def _making_layers(url: LayerSpec | None, settings: str | ModuleType | None, alias: str) -> Callable[[], ChannelLayer]:
    """What makes the layer of a publisher; the settings are read once, here."""
    if url is not None and settings is not None:
        raise TypeError("a Publisher takes a URL or settings, not both")
    loaded = ChannelsSettings.load(settings)
    if url is None and alias not in loaded.channel_layers:
        known = ", ".join(sorted(loaded.channel_layers))
        raise SettingsError(f"there is no channel layer {alias!r} in CHANNEL_LAYERS, only: {known}")
    spec: LayerSpec = loaded.channel_layers[alias] if url is None else url
    if isinstance(spec, ChannelLayer):
        raise SettingsError("a Publisher makes a layer of its own; name it by a URL, or by BACKEND and CONFIG")

    def make() -> ChannelLayer:
        layer = make_layer(spec, capacity=loaded.capacity, expiry=loaded.expiry)
        if not layer.reaches_others:
            raise SettingsError("memory:// reaches no other process; a Publisher needs a broker, such as redis://")
        layer.listens = False
        return layer

    return make
