"""All links of one layer: which command goes to which server, and what this process hears from whom."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from contextvars import copy_context
from typing import Any

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AskError, AuthenticationError, MovedError

from fastapi_channels._tasks import Crew
from fastapi_channels.exceptions import LayerUnavailable, SettingsError
from fastapi_channels.layers.base import Health
from fastapi_channels.layers.counters import Counters
from fastapi_channels.layers.redis.link import CommandLink, Link, Request, SubscriberLink
from fastapi_channels.layers.redis.servers import Servers

__all__ = ["Links", "Subscription"]

logger = logging.getLogger("fastapi_channels")

#: How many subscriptions are restored at a time.
BATCH = 500

#: How long to wait between two looks at who has which slot, in seconds: at most this, twice as much each time.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0


class Subscription:
    """A Pub/Sub channel that this process wants to hear, until it says otherwise.

    Attributes:
        address: The channel.
        deliver: Called with what is published there.
        confirmed: Called each time a server has confirmed it, where what was missed can be caught up with; else None.
        first: Done with the first confirmation, or with the error that the server gave instead.
        asking: The request for it that has no answer yet.
        link: The connection that hears it; None while nobody knows which server has it.
        is_confirmed: Whether the server has confirmed it.
        is_due: Whether all is not well while it isn't confirmed, whatever the reason.
        refusal: Why the server doesn't let us, so that asking again is of no use; else None.
    """

    __slots__ = ("address", "asking", "confirmed", "deliver", "first", "is_confirmed", "is_due", "link", "refusal")

    def __init__(
        self,
        address: str,
        deliver: Callable[[bytes], None],
        confirmed: Callable[[], None] | None,
        first: asyncio.Future[None],
    ) -> None:
        self.address = address
        self.deliver = deliver
        self.confirmed = confirmed
        self.first = first
        self.asking: asyncio.Future[Any] | None = None
        self.link: SubscriberLink | None = None
        self.is_confirmed = False
        self.is_due = False
        self.refusal: str | None = None


class Links:
    """The connections of one layer: to each server one that publishes, and one that subscribes if it listens.

    Args:
        servers: The servers.
        crew: Runs the connections' tasks.
        timeout: How long a server may take, in seconds.
        counters: Where gaps are counted.
        listens: Whether it subscribes to anything.
    """

    def __init__(self, servers: Servers, crew: Crew, timeout: float, counters: Counters, *, listens: bool) -> None:
        self._servers = servers
        self._listens = listens
        self._crew = crew
        self._loop = crew.loop
        self._timeout = timeout
        self._counters = counters
        self._commands: dict[str, CommandLink] = {}
        self._subscribers: dict[str, SubscriberLink] = {}
        self._subscriptions: dict[bytes, Subscription] = {}
        #: Those that were heard, or should have been, and aren't.
        self._unheard: set[Subscription] = set()
        self._moved: list[Request] = []
        self._is_mapping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._was_well = False
        self._has_gap = False
        self._lost_at: float | None = None
        self._closed = False
        self._why: Exception | None = None

    # Opening and closing

    def open(self) -> None:
        """Begin to connect to all servers; `connected` waits for that."""
        if self._servers.can_change:
            self._map_anew()
        self._make_links()
        if self._servers.asks_regularly:
            self._start(self._ask_regularly())

    async def connected(self) -> None:
        """Wait until everything is connected and confirmed.

        Raises:
            LayerUnavailable: It takes longer than the timeout.
            SettingsError: A server does not take the credentials.
        """
        try:
            async with asyncio.timeout(self._timeout):
                while not self.health().ok:
                    for error in (self._why, *(link.error for link in self._all())):
                        self._refuse_wrong_credentials(error)
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise LayerUnavailable(f"Redis can't be reached: {self.health().detail}") from None

    def give_up(self) -> None:
        """Tell everybody who waits for a connection that there will be none."""
        closed = LayerUnavailable("the channel layer was closed")
        for link in self._commands.values():
            for request in () if link.is_up else link.withdraw():
                request.answer(closed)
        for subscription in self._subscriptions.values():
            if not subscription.first.done():
                subscription.first.set_exception(closed)
                subscription.first.exception()

    async def close(self) -> None:
        """Disconnect from all servers."""
        self._closed = True
        self.give_up()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for request in self._moved:
            request.answer(LayerUnavailable("the channel layer was closed"))
        await asyncio.gather(*(link.close() for link in self._all()))
        await self._servers.close()

    def health(self) -> Health:
        """What is up and what is not."""
        # A server that has just joined the Cluster is no loss.
        links = [link for link in self._all() if not (self._was_well and link.is_new)]
        wrong = {link.name: f"{link.name}: {link.error}" for link in links if not link.is_up}
        if not self._commands:
            wrong[""] = f"{self._servers.shown}: {self._why or 'no server is known yet'}"
        can_send = bool(self._commands) and all(link.is_up for link in links if isinstance(link, CommandLink))
        can_receive = not self._unheard and all(link.is_up for link in links if isinstance(link, SubscriberLink))
        if not wrong and self._unheard:
            refusals = [subscription.refusal for subscription in self._unheard if subscription.refusal]
            waiting = f"{self._servers.shown}: {len(self._unheard)} subscriptions are not confirmed"
            wrong[""] = refusals[0] if refusals else waiting
        latencies = [link.latency for link in links if link.latency is not None]
        return Health(not wrong, "; ".join(wrong.values()), can_send, can_receive, max(latencies, default=None))

    # Commands

    def ask(self, key: str, *command: str | bytes | int) -> asyncio.Future[Any]:
        """Send a command to the server that has `key`; of two, the first is carried out first.

        The future gets the reply, an error of redis-py, or LayerUnavailable.
        """
        request = Request(key, command, self._loop.create_future(), self._loop.time() + self._timeout)
        self._send(request)
        return request.reply

    def link_of(self, key: str) -> CommandLink | None:
        """The link to the server that has `key`; None if there is none."""
        try:
            return self._commands.get(self._servers.of(key))
        except LayerUnavailable:
            return None

    @property
    def command_links(self) -> list[CommandLink]:
        """The links to all servers, for what concerns each of them."""
        return list(self._commands.values())

    def _send(self, request: Request) -> None:
        if request.key is None:  # it was for one server, which has lost what it was about
            request.answer(LayerUnavailable(f"{self._servers.shown}: a slot of the Cluster has moved"))
            return
        try:
            link = self._commands.get(self._servers.of(request.key))
        except LayerUnavailable as error:
            request.answer(error)
            self._map_anew()
            return
        if link is None:
            request.answer(LayerUnavailable(f"{self._servers.shown}: no connection to the server that has this name"))
        else:
            link.send(request)

    def _redirected(self, link: CommandLink, request: Request, error: AskError) -> None:
        target = self._commands.get(f"{error.host}:{error.port}")
        if not isinstance(error, MovedError) and target is not None:
            request.is_asked = True
            target.tell("ASKING")  # good for the next command only
            target.send(request)
        else:
            link.is_held = True
            self._moved.append(request)
            self._map_anew()

    # Subscriptions

    def subscribe(
        self,
        address: str,
        deliver: Callable[[bytes], None],
        confirmed: Callable[[], None] | None = None,
        *,
        is_due: bool = False,
    ) -> Subscription:
        """Hear what is published on a channel from its confirmation on, again after each loss of the connection.

        Args:
            address: The channel.
            deliver: Called with what is published there.
            confirmed: Called at each confirmation, to catch up with what was missed; None if that can't be.
            is_due: Whether all is not well until it is confirmed.
        """
        subscription = Subscription(address, deliver, confirmed, self._loop.create_future())
        if is_due:
            subscription.is_due = True
            self._unheard.add(subscription)
        self._subscriptions[address.encode()] = subscription
        self._place(subscription)
        return subscription

    async def confirmation(self, subscription: Subscription) -> None:
        """Wait until a server has confirmed a subscription.

        Raises:
            LayerUnavailable: None has within the timeout.
        """
        try:
            async with asyncio.timeout(self._timeout):
                await asyncio.shield(subscription.first)
        except TimeoutError:
            reason = self.health().detail or f"no answer within {self._timeout:g} s"
            raise LayerUnavailable(f"Redis has not confirmed a subscription: {reason}") from None

    def unsubscribe(self, address: str) -> None:
        """Hear a channel no more."""
        subscription = self._subscriptions.pop(address.encode(), None)
        if subscription is not None:
            self._unheard.discard(subscription)
            if subscription.link is not None and subscription.link.is_up:
                subscription.link.tell(self._servers.unsubscribe, address)

    def _place(self, subscription: Subscription) -> None:
        """Give a subscription to the link of the server that has it, and ask for it if that is up."""
        try:
            name = self._servers.of(subscription.address)
        except LayerUnavailable:
            subscription.link = None
            self._unheard.add(subscription)
            self._map_anew()
            return
        subscription.link = self._subscriber(name)
        if subscription.link.is_up:
            _ = self._ask_for(subscription)

    def _ask_for(self, subscription: Subscription) -> asyncio.Future[Any]:
        link = subscription.link
        assert link is not None
        reply = subscription.asking = link.ask(self._servers.subscribe, subscription.address)

        def answered(reply: asyncio.Future[Any]) -> None:
            if subscription.asking is reply:
                subscription.asking = None
            if self._subscriptions.get(subscription.address.encode()) is subscription and subscription.link is link:
                self._answered(subscription, link, None if reply.cancelled() else reply.exception())

        reply.add_done_callback(answered)
        return reply

    def _answered(self, subscription: Subscription, link: SubscriberLink, error: BaseException | None) -> None:
        if isinstance(error, LayerUnavailable):
            if link.is_up and not link.is_restoring:  # it took too long, and may be confirmed all the same
                self._start(self._restore(link))
        elif isinstance(error, AskError):
            self._map_anew()
        elif error is not None:
            subscription.refusal = f"{link.name}: {error}"
            if not subscription.is_due:
                self._unheard.discard(subscription)  # asking again is of no use, and the other groups are heard
            if not subscription.first.done():
                subscription.first.set_exception(LayerUnavailable(subscription.refusal))
                subscription.first.exception()
            else:
                logger.error("%s does not let this process hear a group any more: %s", link.name, error)
            self._tell()
        else:
            subscription.is_confirmed = True
            if not subscription.first.done():
                subscription.first.set_result(None)
            if subscription.confirmed is not None:
                subscription.confirmed()
            if subscription in self._unheard:
                self._unheard.discard(subscription)
                if not self._unheard:
                    self._tell()

    async def _restore(self, link: SubscriberLink) -> None:
        """Ask anew for everything that this process wants to hear over a link that has come up."""
        if link.is_restoring:
            return
        link.is_restoring = True
        try:
            while link.is_up and (missing := self._missing(link)):
                for start in range(0, len(missing), BATCH):
                    batch = [it for it in missing[start : start + BATCH] if it.link is link]
                    if batch:
                        await asyncio.wait([self._ask_for(subscription) for subscription in batch])
                if self._missing(link):
                    await asyncio.sleep(FIRST_PAUSE)
        finally:
            link.is_restoring = False

    def _missing(self, link: SubscriberLink) -> list[Subscription]:
        return [
            subscription
            for subscription in self._subscriptions.values()
            if subscription.link is link
            and not (subscription.is_confirmed or subscription.refusal or subscription.asking)
        ]

    def _heard(self, address: bytes, data: bytes) -> None:
        subscription = self._subscriptions.get(address)
        if subscription is not None:
            try:
                subscription.deliver(data)
            except Exception:
                logger.exception("a message could not be delivered")

    def _revoked(self, address: bytes) -> None:
        subscription = self._subscriptions.get(address)
        if subscription is not None:
            self._unhear([subscription])
            self._map_anew()

    # Links

    def _all(self) -> list[Link]:
        return [*self._commands.values(), *self._subscribers.values()]

    def _make_links(self) -> None:
        for name in self._servers.names():
            if name not in self._commands:
                self._commands[name] = CommandLink(
                    name, self._connecting(name), self._crew, self._timeout, self._changed, self._redirected
                )
                if self._listens:
                    self._subscriber(name)

    def _subscriber(self, name: str) -> SubscriberLink:
        link = self._subscribers.get(name)
        if link is None:
            link = self._subscribers[name] = SubscriberLink(
                name, self._connecting(name), self._crew, self._timeout, self._changed, self._heard, self._revoked
            )
        return link

    def _connecting(self, name: str) -> Callable[[], AbstractConnection]:
        return lambda: self._servers.connection(name, self._timeout)

    def _changed(self, link: Link) -> None:
        if self._closed:
            return
        if isinstance(link, SubscriberLink):
            if link.is_up:
                self._start(self._restore(link))
            else:
                self._unhear([it for it in self._subscriptions.values() if it.link is link])
        if not link.is_up and self._servers.can_change:
            self._map_anew()
        self._tell()

    def _unhear(self, subscriptions: Sequence[Subscription]) -> None:
        """Take note that this process doesn't hear these until they are confirmed anew."""
        if any(subscription.is_confirmed and subscription.confirmed is None for subscription in subscriptions):
            self._counters.gaps += 1
            self._has_gap = True
        for subscription in subscriptions:
            subscription.is_confirmed, subscription.refusal = False, None
        self._unheard.update(subscriptions)

    def _tell(self) -> None:
        """Log when something is lost and when all is well again, and wake who waits for that."""
        self._news.set()
        health = self.health()
        if health.ok:
            if self._lost_at is not None:
                missed = "; messages to its groups may be lost to this process" if self._has_gap else ""
                lasted = self._loop.time() - self._lost_at
                logger.warning("%s: connected again after %.1f s%s", self._servers.shown, lasted, missed)
            self._was_well = True
            self._has_gap = False
            self._lost_at = None
        elif self._was_well and self._lost_at is None:
            self._lost_at = self._loop.time()
            logger.warning("%s: connection lost: %s", self._servers.shown, health.detail)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._crew.start(coroutine, copy_context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Who has which slot

    def _map_anew(self) -> None:
        """Find out which server has what, if that isn't being done."""
        if not self._is_mapping and not self._closed:
            self._is_mapping = True
            self._start(self._map())

    async def _ask_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._timeout / 2)
            self._map_anew()

    async def _map(self) -> None:
        """Find out which server has what, again until everything has its place."""
        pause = FIRST_PAUSE
        while True:
            try:
                await self._use(await self._find())
                self._why = None
            except Exception as error:  # a Cluster in trouble has many answers
                self._why = error
                logger.debug("%s: can't find out which server has what: %r", self._servers.shown, error)
                self._tell()
            if self._is_settled():
                self._is_mapping = False
                return
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _find(self) -> Sequence[str]:
        try:
            async with asyncio.timeout(self._timeout / 2):
                return await self._servers.find()
        except TimeoutError:
            raise LayerUnavailable(f"no answer within {self._timeout / 2:g} s") from None

    async def _use(self, found: Sequence[str]) -> None:
        """Bring everything to the servers that have it now.

        To those that lose something nothing is written until they have answered what was sent; then what they have
        sent back, and what waited, goes where it belongs in the order in which it was asked.
        """
        for name in self._servers.losing(found):
            if name in self._commands:
                self._commands[name].is_held = True
        held = [link for link in self._commands.values() if link.is_held]
        for link in held:
            await link.answered()
        self._servers.use(found)
        self._make_links()
        requests, self._moved = self._moved, []
        for link in held:
            requests += link.withdraw()
            link.is_held = False
        for request in requests:
            self._send(request)
        moving = [subscription for subscription in self._subscriptions.values() if self._has_moved(subscription)]
        self._unhear(moving)
        for subscription in moving:
            if subscription.link is not None and subscription.link.is_up:
                subscription.link.tell(self._servers.unsubscribe, subscription.address)
            self._place(subscription)
        for subscriber in self._subscribers.values():
            if subscriber.is_up:
                self._start(self._restore(subscriber))
        names = set(self._servers.names())
        for gone in [link for link in self._all() if link.name not in names]:
            (self._commands if isinstance(gone, CommandLink) else self._subscribers).pop(gone.name)
            await gone.close()
        self._tell()

    def _has_moved(self, subscription: Subscription) -> bool:
        try:
            name = self._servers.of(subscription.address)
        except LayerUnavailable:
            return False
        return subscription.link is None or subscription.link is not self._subscribers.get(name)

    def _is_settled(self) -> bool:
        return (
            not self._moved
            and bool(self._commands)
            and all(link.is_up for link in self._all())
            and not any(self._has_moved(subscription) for subscription in self._subscriptions.values())
        )

    def _refuse_wrong_credentials(self, error: BaseException | None) -> None:
        if isinstance(error, AuthenticationError):
            raise SettingsError(f"{self._servers.shown}: the server does not take these credentials ({error})")
