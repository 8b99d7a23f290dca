"""Conversations as OpenAI's chat API writes them: messages of roles and content parts.

`parse_messages` turns them into the fields of a `Request`. It decodes data URLs and opens nothing.
"""

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias, Unpack

from perception_rt.errors import InputError, describe
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.image import ImageSource
from perception_rt.processing.prompt import IMAGE_MARK, VIDEO_MARK
from perception_rt.processing.video import VideoSource
from perception_rt.runtime.request import Exchange, Request, RequestOptions

Message: TypeAlias = Mapping[str, Any]
Fetch: TypeAlias = Callable[[str, int], bytes]

_DATA_URL = re.compile(
    r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(;[\w.+-]+=[^;,]*)*;base64,",
    re.ASCII | re.IGNORECASE,
)
_WEB_URL = re.compile(r"https?://", re.ASCII | re.IGNORECASE)
_MARKS = {"image": IMAGE_MARK, "video": VIDEO_MARK}
_SYSTEM_ROLES = ("system", "developer")
_ROLES = (*_SYSTEM_ROLES, "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The fields of a `Request` that messages determine.

    Attributes:
        prompt: the last user message, with marks where several images and videos belong.
        images: its images.
        videos: its videos.
        literal: whether marks in the prompt are text.
        history: the exchanges before it.
        system: the system text; None without one.
    """

    prompt: str
    images: tuple[ImageSource, ...] = ()
    videos: tuple[VideoSource, ...] = ()
    literal: bool = False
    history: tuple[Exchange, ...] = ()
    system: str | None = None

    def request(self, **options: Unpack[RequestOptions]) -> Request:
        """Returns a request with these and other fields; InputError if a field is given twice."""
        own: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in options:
            if name in own:
                raise InputError(f"{name} cannot be given beside messages, which contain it")
        return Request(**own, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaReader:
    """Reads the images and videos in a message.

    Attributes:
        sources: whether parts may hold what `Request.images` and `Request.videos` take. Never for
            messages of another machine: a string would name a file of this one.
        fetch: returns the bytes behind an http or https URL, given the most bytes it may have, or
            raises InputError; None refuses all such URLs.
        limits: bounds on encoded sizes.
    """

    sources: bool = False
    fetch: Fetch | None = None
    limits: Limits = DEFAULT_LIMITS

    def read_url(self, kind: str, value: object) -> bytes:
        """Returns the bytes of a part's URL, which may be in an object with `url`.

        Raises:
            InputError: it is no data URL, too large, or no URL that may be fetched.
        """
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str):
            raise InputError(f'{kind}_url must be {{"url": "data:..."}}, not {describe(value)}')
        most = self.limits.image_bytes if kind == "image" else self.limits.video_bytes
        if _WEB_URL.match(url) and self.fetch is not None:
            return self.fetch(url, most)
        return decode_data_url(kind, url, most)


def decode_data_url(kind: str, url: str, most_bytes: int) -> bytes:
    """Decodes a base64 data URL.

    Args:
        kind: "image" or "video"; a data URL with another media type is refused.
        url: `data:image/png;base64,...`; the media type may be missing.
        most_bytes: bound on the decoded size.

    Raises:
        InputError: it is something else, damaged, or too large.
    """
    found = _DATA_URL.match(url)
    if found is None:
        raise InputError(
            f"the {kind} URL {url[:40]!r} is refused: send the {kind} itself as a data URL, "
            f"data:{kind}/...;base64,..."
        )
    media_type = (found["type"] or "").lower()
    if media_type.partition("/")[0] not in (kind, "", "application"):
        raise InputError(f"a data URL of type {media_type[:40]!r} is no {kind}")
    size = (len(url) - found.end()) // 4 * 3
    if size > most_bytes + 3:
        raise InputError(f"{kind} has about {size} bytes; the limit is {most_bytes} bytes")
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"the data URL of the {kind} is not valid base64") from None


def chat_request(
    messages: Sequence[Message],
    *,
    response_format: Mapping[str, Any] | None = None,
    **options: Unpack[RequestOptions],
) -> Request:
    """Makes a request of a conversation in OpenAI's form, for `Generator.submit`.

    Args:
        messages: see `parse_messages`; `{"type": "image", "image": ...}` may hold anything that
            `Request.images` takes, and the same for videos.
        response_format: see `parse_response_format`; None for any answer.
        **options: the fields of `Request` that messages do not determine.

    Raises:
        InputError: a message or the response format is unusable.
    """
    schema = None if response_format is None else parse_response_format(response_format)
    if schema is not None:
        if options.get("json_schema") is not None:
            raise InputError("json_schema cannot be given beside response_format")
        options["json_schema"] = schema
    return parse_messages(messages, MediaReader(sources=True)).request(**options)


def parse_response_format(value: object) -> dict[str, Any] | None:
    """Returns the JSON schema that a response format of OpenAI's chat API asks for.

    Args:
        value: `{"type": "text"}`, `{"type": "json_object"}` for any object, or `{"type":
            "json_schema", "json_schema": {"schema": {...}}}`. A schema is always followed, with
            `strict` or without.

    Returns:
        The schema for `Request.json_schema`; None for text.

    Raises:
        InputError: it is something else.
    """
    kind = value.get("type") if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and kind == "text":
        return None
    if isinstance(value, Mapping) and kind == "json_object":
        return {"type": "object"}
    if not isinstance(value, Mapping) or kind != "json_schema":
        raise InputError(
            'response_format must be {"type": ...} with text, json_object or json_schema'
        )
    named = value.get("json_schema")
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if not isinstance(schema, dict):
        raise InputError(
            'response_format of type json_schema must have "json_schema": {"schema": {...}}'
        )
    return schema


def parse_messages(messages: object, reader: MediaReader) -> Conversation:
    """Turns messages into a question and its history.

    Messages are dictionaries with `role` and `content`. System (or developer) messages come first;
    then users and assistants alternate, and a user's is the last. Content is a text or a list of
    parts: `{"type": "text", "text": ...}`, `{"type": "image_url", "image_url": {"url": ...}}` and
    the same with `video_url`; `{"type": "image", "image": ...}` and `{"type": "video", ...}` hold
    anything that `Request` takes, if the reader allows it. Texts beside each other are joined by a
    line break. A single image or video is placed first, as in training; several stay where they
    are. Text is never parsed: `<image>` in it is text.

    Args:
        messages: a list.
        reader: reads the images and videos.

    Raises:
        InputError: names the message, and the part, that is unusable.
    """
    turns = _turns(messages, reader)
    system = [turn.joined() for turn in turns if turn.role in _SYSTEM_ROLES]
    spoken = [turn for turn in turns if turn.role not in _SYSTEM_ROLES]
    history = []
    for asked, answered in zip(spoken[:-1:2], spoken[1::2], strict=True):
        history.append(Exchange(answer=answered.joined(), **asked.question()))
    return Conversation(
        system="\n".join(system) if system else None,
        history=tuple(history),
        **spoken[-1].question(),
    )


@dataclass(slots=True)
class _Turn:
    """A message: its role, and its texts and media in order."""

    role: str
    where: str
    parts: list[tuple[str, Any]] = field(default_factory=list)  # (kind, text or source)

    def joined(self) -> str:
        return "\n".join(value for _, value in self.parts)

    def question(self) -> dict[str, Any]:
        """The fields that `Request` and `Exchange` share."""
        kinds = [kind for kind, _ in self.parts]
        media = [kind for kind in kinds if kind != "text"]
        texts = [value for kind, value in self.parts if kind == "text"]
        marked = bool(media) and any(mark in text for text in texts for mark in _MARKS.values())
        if marked and sorted(media) + ["text"] * len(texts) != kinds:
            raise InputError(
                f"{self.where}: a text with {IMAGE_MARK} or {VIDEO_MARK} cannot stand between "
                "images and videos; put the images, then the videos, before the texts"
            )
        prompt, after_text = "", False
        for kind, value in self.parts:
            if kind == "text":
                prompt += "\n" * after_text + value
            elif len(media) > 1 and not marked:
                prompt += _MARKS[kind]
            after_text = kind == "text"
        return {
            "prompt": prompt if len(media) > 1 else "\n".join(texts),
            "images": tuple(value for kind, value in self.parts if kind == "image"),
            "videos": tuple(value for kind, value in self.parts if kind == "video"),
            "literal": marked,
        }


def _turns(messages: object, reader: MediaReader) -> list[_Turn]:
    """The messages, in an order that makes a conversation."""
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"messages must be a list of at least one, not {describe(messages)}")
    most = 2 * reader.limits.history_turns + 2
    if len(messages) > most:
        raise InputError(f"there are {len(messages)} messages; the limit is {most}")
    turns: list[_Turn] = []
    expected = "user"
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        turn = _turn(message, where, reader)
        if turn.role in _SYSTEM_ROLES:
            if any(earlier.role not in _SYSTEM_ROLES for earlier in turns):
                raise InputError(f"{where}: the {turn.role} message must come first")
        elif turn.role != expected:
            raise InputError(
                f"{where} is of the {turn.role}, where the {expected}'s belongs: user and "
                "assistant alternate, and the user begins"
            )
        else:
            expected = "assistant" if expected == "user" else "user"
        turns.append(turn)
    if turns[-1].role != "user":
        raise InputError("the last message must be the user's")
    return turns


def _turn(message: object, where: str, reader: MediaReader) -> _Turn:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else describe(role)
        raise InputError(f"{where}: role must be one of {', '.join(_ROLES)}, not {shown}")
    if message.get("tool_calls") or message.get("function_call"):
        raise InputError(f"{where}: tools are not supported")
    content = message.get("content")
    turn = _Turn(role, where)
    if isinstance(content, str):
        turn.parts.append(("text", content))
    elif isinstance(content, Sequence) and not isinstance(content, bytes) and content:
        for number, part in enumerate(content):
            turn.parts.append(_part(part, f"{where}.content[{number}]", role, reader))
    else:
        raise InputError(f"{where}: content must be a text or a list of parts")
    return turn


def _part(part: object, where: str, role: str, reader: MediaReader) -> tuple[str, Any]:
    """Kind and text or source of a content part."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise InputError(f"{where} must be an object with a type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise InputError(f"{where}: text must be a string, not {describe(text)}")
        return kind, text
    media = kind.removesuffix("_url")
    if media not in _MARKS or (kind in _MARKS and not reader.sources):
        raise InputError(f"{where}: type {kind[:40]!r} is none of text, image_url and video_url")
    if role != "user":
        raise InputError(f"{where}: only users' messages have images and videos")
    if kind in _MARKS:
        source = part.get(kind)
        if source is None:
            raise InputError(f"{where}: {kind} is missing")
        return media, source
    try:
        return media, reader.read_url(media, part.get(kind))
    except InputError as error:
        raise type(error)(f"{where}: {error}") from None  # it may be a caller's, from `fetch`
