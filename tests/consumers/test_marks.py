"""What is wrong with a consumer class is an error where the class is made."""

from collections.abc import AsyncIterator, Callable, Iterator
from types import new_class
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Body, Cookie, Depends, Header, Path, Query, Request, Response

from fastapi_channels.consumers import ActionConsumer, JsonConsumer, WebSocketConsumer, action, event
from fastapi_channels.exceptions import ChannelsError, DefinitionError
from fastapi_channels.routing import ConsumerRouter, route


def make(*bases: type, **namespace: Any) -> Any:
    """A class statement, `class Made(*bases)`, with these attributes."""
    return new_class("Made", bases, {}, lambda made: made.update({"__module__": __name__, **namespace}))


async def _nothing(self: Any) -> None: ...


def fresh() -> Callable[..., Any]:
    """A method that nobody has marked yet."""

    async def method(self: Any) -> None: ...

    return method


# Names

HOOKS_AND_API = [
    *("connect", "receive", "disconnect", "accept", "close", "send", "send_json", "group_add", "group_discard"),
    *("group_send", "groups", "user", "scope", "websocket", "sync", "as_asgi", "auth", "path_params", "layer"),
    *("channel_name", "outbox_key", "overflow"),
]


@pytest.mark.parametrize("name", HOOKS_AND_API)
@pytest.mark.parametrize("mark", [action, event])
def test_a_hook_or_api_method_can_not_be_marked(name: str, mark: Callable[..., Any]) -> None:
    """`@action` or `@event` on a hook, an API method or an attribute of every consumer is an error."""
    with pytest.raises(DefinitionError, match=name):
        make(ActionConsumer, **{name: mark(fresh())})


def test_a_mark_can_not_hide_the_table_of_actions() -> None:
    """An action method under the name `actions`, where the table stands, is an error."""
    with pytest.raises(DefinitionError, match="actions"):
        make(ActionConsumer, actions=action(fresh()))


@pytest.mark.parametrize("name", ["$cancel", "$", "$resume", "$own"])
def test_an_action_can_not_begin_with_a_dollar(name: str) -> None:
    """Names that begin with `$` are the protocol's."""
    with pytest.raises(DefinitionError, match=r"\$"):
        make(ActionConsumer, own=action(name)(fresh()))


@pytest.mark.parametrize("name", ["", "connect", "__init__", "close", "a b", "☃", "say.it", "x" * 1000])
def test_an_action_may_be_called_anything_else(name: str) -> None:
    """The name that clients use is any other text: it is a key of a table, not an attribute."""
    made = make(ActionConsumer, own=action(name)(fresh()))
    assert set(made.actions) == {name or "own"}


def test_two_methods_can_not_claim_one_action() -> None:
    """Two attributes of one action name are an error that names all three."""

    async def one(self: Any) -> None: ...
    async def two(self: Any) -> None: ...

    with pytest.raises(DefinitionError, match=r"(?s)(?=.*one)(?=.*two)(?=.*say)"):
        make(ActionConsumer, one=action("say")(one), two=action("say")(two))
    with pytest.raises(DefinitionError, match="say"):
        make(ActionConsumer, say=action(fresh()), two=action("say")(fresh()))


def test_two_methods_can_not_claim_one_event() -> None:
    """Two attributes of one event type are an error, spelled out or derived."""
    with pytest.raises(DefinitionError, match=r"chat\.message"):
        make(WebSocketConsumer, one=event("chat.message")(fresh()), chat_message=event(fresh()))
    with pytest.raises(DefinitionError, match=r"a\.b"):
        make(WebSocketConsumer, one=event("a.b")(fresh()), two=event("a.b")(fresh()))


def test_two_unrelated_bases_can_not_claim_one_name() -> None:
    """Two bases of which neither overrides the other are an error, unless the class says which it means."""

    class One(ActionConsumer):
        @action
        async def say(self) -> str:
            return "one"

    class Two(ActionConsumer):
        @action
        async def say(self) -> str:
            return "two"

    class Mixin:
        @event
        async def said(self, message: dict[str, Any]) -> None: ...

    class OtherMixin:
        @event
        async def said(self, message: dict[str, Any]) -> None: ...

    with pytest.raises(DefinitionError, match=r"(?s)(?=.*say)(?=.*One)(?=.*Two)"):
        make(One, Two)
    with pytest.raises(DefinitionError, match="said"):
        make(Mixin, OtherMixin, ActionConsumer)
    both = make(One, Two, say=Two.say)
    assert set(both.actions) == {"say"}


def test_two_unrelated_bases_can_not_claim_one_action_under_two_names() -> None:
    """Two bases whose different methods are the same action are an error."""

    class One(ActionConsumer):
        @action("say")
        async def one(self) -> None: ...

    class Two(ActionConsumer):
        @action("say")
        async def two(self) -> None: ...

    with pytest.raises(DefinitionError, match="say"):
        make(One, Two)


def test_a_diamond_is_no_conflict() -> None:
    """A mixin that both bases have, and an override on one side of a diamond, are fine."""

    class Root(ActionConsumer):
        @action
        async def say(self) -> str:
            return "root"

    class Left(Root): ...

    class Right(Root):
        async def say(self) -> str:
            return "right"

    class Both(Left, Right): ...

    assert set(Both.actions) == {"say"}


@pytest.mark.parametrize("value", [7, "text", property(lambda self: None)])
def test_a_marked_method_is_overridden_by_a_method(value: Any) -> None:
    """What stands in the place of a marked method is a method, or None to take it away."""

    class Base(ActionConsumer):
        @action
        async def say(self) -> None: ...

    with pytest.raises(DefinitionError, match="say"):
        make(Base, say=value)
    assert set(make(Base, say=None).actions) == set()


@pytest.mark.parametrize("wrap", [staticmethod, classmethod, property])
@pytest.mark.parametrize("mark", [action, event])
def test_only_methods_can_be_marked(wrap: Callable[..., Any], mark: Callable[..., Any]) -> None:
    """A static method, a class method or a property can't be marked, with the mark called or bare."""
    with pytest.raises(DefinitionError):
        mark("name")(wrap(fresh()))
    with pytest.raises(DefinitionError):
        mark(wrap(fresh()))


@pytest.mark.parametrize("name", [7, ["say"], True])
@pytest.mark.parametrize("mark", [action, event])
def test_the_name_of_a_mark_is_text(name: Any, mark: Callable[..., Any]) -> None:
    """`@action(7)` is an error, and not an action of that name."""
    with pytest.raises((DefinitionError, TypeError)):
        mark(name)(fresh())


@pytest.mark.parametrize("wrap", [staticmethod, classmethod])
def test_a_marked_function_can_not_become_static(wrap: Callable[..., Any]) -> None:
    """A function that was marked and then made static is an error where the class is made."""
    with pytest.raises(DefinitionError):
        make(ActionConsumer, say=wrap(action(fresh())))


# Settings of a mark


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"concurrency": -1}, {"timeout": 0}, {"timeout": -0.5}])
def test_an_action_has_sensible_settings(options: dict[str, Any]) -> None:
    """A concurrency under 1 or a timeout that isn't positive is an error."""
    with pytest.raises(DefinitionError, match=next(iter(options))):
        action(**options)


def test_what_this_version_can_not_keep_is_an_error() -> None:
    """A misspelled argument of `@action`, or what is no permission and the like, is an error, and not silence."""
    with pytest.raises(TypeError):
        action(concurency=2)  # type: ignore[call-overload]
    for name in ("permission_classes", "throttle_classes", "authentication_classes"):
        with pytest.raises(DefinitionError, match=name):
            make(ActionConsumer, **{name: [object()]})


# Signatures


def _annotated(annotation: Any, default: Any = ...) -> Callable[..., Any]:
    async def method(self: Any, value: Any) -> None: ...

    method.__annotations__["value"] = annotation
    if default is not ...:
        method.__defaults__ = (default,)
    return method


IMPOSSIBLE: list[Any] = [
    *([Request], [Response], [BackgroundTasks], [Annotated[int, Query()]], [Annotated[int, Header()]]),
    *([Annotated[int, Cookie()]], [Annotated[int, Path()]], [Annotated[dict[str, int], Body()]], [int, Query(1)]),
    [object()],
]


@pytest.mark.parametrize("asked", IMPOSSIBLE)
def test_a_handler_can_not_ask_for_what_there_is_not(asked: list[Any]) -> None:
    """A Request, a Response, BackgroundTasks or a parameter of the handshake in a handler is an error that names it."""
    for mark in (action, event):
        with pytest.raises(DefinitionError, match="value"):
            make(ActionConsumer, own=mark(_annotated(*asked)))
    with pytest.raises(DefinitionError, match="value"):
        make(JsonConsumer, receive=_annotated(*asked))


def test_a_handler_has_one_parameter_for_the_data() -> None:
    """A second parameter without `Depends` is an error that names both."""

    def two() -> Any:
        async def method(self: Any, one: int, other: str = "") -> None: ...

        return method

    for base, namespace in (
        (ActionConsumer, {"own": action(two())}),
        (WebSocketConsumer, {"own": event(two())}),
        (JsonConsumer, {"receive": two()}),
    ):
        with pytest.raises(DefinitionError, match=r"(?s)(?=.*one)(?=.*other)"):
            make(base, **namespace)


def test_a_handler_has_no_collecting_parameters() -> None:
    """`*args`, `**kwargs` and positional-only parameters are errors."""

    async def args(self: Any, *args: Any) -> None: ...
    async def kwargs(self: Any, **kwargs: Any) -> None: ...
    async def positional(self: Any, value: int, /) -> None: ...

    for method in (args, kwargs, positional):
        for mark in (action, event):
            with pytest.raises(DefinitionError, match=r"args|kwargs|value"):
                make(ActionConsumer, own=mark(method))


def test_a_dependency_can_not_ask_for_what_there_is_not() -> None:
    """A dependency of a handler, at any depth, that asks for a Request or a Response is an error that names it."""

    def deep(request: Request) -> None: ...
    def middle(value: Annotated[None, Depends(deep)]) -> None: ...

    async def method(self: Any, value: Annotated[None, Depends(middle)]) -> None: ...

    for mark in (action, event):
        with pytest.raises(DefinitionError, match=r"(?s)(?=.*deep)(?=.*request)"):
            make(ActionConsumer, own=mark(method))


def test_an_annotation_that_names_nothing_is_an_error() -> None:
    """An annotation in quotes that can't be found is an error that names it."""
    with pytest.raises(DefinitionError, match="Missing"):
        make(ActionConsumer, own=action(_annotated("Missing")))


def test_an_annotation_may_name_the_class_itself() -> None:
    """An annotation in quotes is resolved in the module, and may name the class that is being made."""
    assert make(ActionConsumer, own=action(_annotated("dict[str, Any]")))


def test_an_event_handler_or_receive_can_not_be_a_generator() -> None:
    """Only actions stream: a generator that handles events or frames is an error."""

    async def stream(self: Any, message: dict[str, Any]) -> AsyncIterator[int]:
        yield 1

    def plain_stream(self: Any, message: dict[str, Any]) -> Iterator[int]:
        yield 1

    for method in (stream, plain_stream):
        with pytest.raises(DefinitionError):
            make(WebSocketConsumer, receive=method)
        with pytest.raises(DefinitionError, match="generator"):
            make(JsonConsumer, receive=method)
        with pytest.raises(DefinitionError, match="generator"):
            make(WebSocketConsumer, own=event(method))


@pytest.mark.parametrize("annotation", [int, dict[str, Any], str | None, list[str]])
def test_receive_of_a_plain_consumer_takes_text_or_bytes(annotation: Any) -> None:
    """`WebSocketConsumer.receive` takes `str`, `bytes` or both, and nothing else."""
    with pytest.raises(DefinitionError, match="str"):
        make(WebSocketConsumer, receive=_annotated(annotation))
    assert make(WebSocketConsumer, receive=_annotated(str | bytes))


def test_an_action_consumer_has_no_receive() -> None:
    """`receive` on an `ActionConsumer` would never be called, which is an error."""
    with pytest.raises(DefinitionError, match="receive"):
        make(ActionConsumer, receive=_annotated(dict[str, Any]))


def test_disconnect_takes_the_code_and_perhaps_the_reason() -> None:
    """`disconnect` takes (self, code, reason), (self, code) or *args; anything else is an error."""

    async def none(self: Any) -> None: ...
    async def three(self: Any, code: int, reason: str, more: str) -> None: ...
    async def keyword(self: Any, code: int, *, reason: str) -> None: ...
    async def code(self: Any, code: int) -> None: ...
    async def both(self: Any, code: int, reason: str = "") -> None: ...
    async def args(self: Any, *args: Any) -> None: ...

    for method in (none, three, keyword):
        with pytest.raises(DefinitionError, match="disconnect"):
            make(WebSocketConsumer, disconnect=method)
    for method in (code, both, args):  # type: ignore[assignment]
        assert make(WebSocketConsumer, disconnect=method)


# Attributes of the class


@pytest.mark.parametrize("name", ["groups", "forward_events"])
def test_a_list_of_names_is_not_one_name(name: str) -> None:
    """`groups = "news"` would join four groups of one letter, so it is an error."""
    with pytest.raises(DefinitionError, match=name):
        make(WebSocketConsumer, **{name: "news"})


def test_an_event_is_either_handled_or_forwarded() -> None:
    """A type that has a handler and stands in `forward_events` is an error."""
    with pytest.raises(DefinitionError, match="news"):
        make(WebSocketConsumer, forward_events=["news"], own=event("news")(fresh()))


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "{a}", 7])
def test_a_group_of_the_class_has_a_groups_name(name: Any) -> None:
    """A name in `groups` that is none is an error where the class is made, and not at its first connection."""
    with pytest.raises((ValueError, DefinitionError)):
        make(WebSocketConsumer, groups=[name])


def test_connect_can_not_ask_for_what_there_is_not() -> None:
    """A Request, a Response, or `**kwargs` in `connect` is an error where the route is made."""

    async def kwargs(self: Any, **kwargs: Any) -> None: ...

    for method in (_annotated(Request), _annotated(Response), _annotated(BackgroundTasks), kwargs):
        with pytest.raises(DefinitionError, match="connect"):
            ConsumerRouter([route("/ws", make(WebSocketConsumer, connect=method))])
        with pytest.raises(DefinitionError, match="connect"):
            make(WebSocketConsumer, connect=method).as_asgi()


@pytest.mark.parametrize("name", ["grups", "_session", "__class__", "permission_classes"])
def test_a_route_sets_only_attributes_of_its_class(name: str) -> None:
    """`route(..., **init)` with an attribute that the class doesn't have, or a private one, is an error."""
    with pytest.raises(ChannelsError, match=name):
        ConsumerRouter([route("/ws", make(WebSocketConsumer), None, **{name: ["x"]})])
    with pytest.raises(ChannelsError, match=name):
        make(WebSocketConsumer).as_asgi(**{name: ["x"]})


def test_a_route_needs_a_consumer_class() -> None:
    """An instance, a function or another class is an error that says so."""
    for wrong in (_nothing, object, "Chat", make(WebSocketConsumer)()):
        with pytest.raises(DefinitionError, match="consumer class"):
            ConsumerRouter([route("/ws", wrong)])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["_write", "_reply", "_session", "_connection", "_answer", "_calls", "_begin"])
def test_a_private_name_of_ours_can_not_be_taken(name: str) -> None:
    """A method or attribute under a private name that the consumers rely on is an error, also in a mixin."""
    with pytest.raises(DefinitionError, match=name):
        make(ActionConsumer, **{name: fresh()})
    mixin = new_class("Mixin", (), {}, lambda made: made.update({name: fresh()}))
    with pytest.raises(DefinitionError, match=name):
        new_class("Mixed", (mixin, ActionConsumer))


def test_private_names_of_ones_own() -> None:
    """Private names that the consumers don't use are the user's, and so are those of a subclass of a subclass."""
    first = make(ActionConsumer, _mine=fresh(), __slots__=())
    assert make(first, _mine=fresh(), _more=1)
