"""A small HTTP/1.1 client for tests: it tells what came, byte for byte, and whether it looks cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from dataclasses import dataclass, field

import httptools


@dataclass
class Reply:
    """What a client got. `was_cut`: the connection ended before the answer's own end."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    header_list: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    was_cut: bool = False
    chunks: list[bytes] = field(default_factory=list)

    @property
    def json(self) -> dict:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        """The `error` of an envelope."""
        return self.json["error"]

    @property
    def texts(self) -> list[str]:
        """The text deltas of a Messages stream."""
        events = [json.loads(found) for found in re.findall(rb"^data: (\{.*)$", self.body, re.MULTILINE)]
        return [e["delta"]["text"] for e in events if e.get("delta", {}).get("type") == "text_delta"]


class Connection:
    """One connection of a client: requests in turn, each answer read to its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        """Connect to a port on loopback."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20))

    async def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self._writer.write(data)
        await self._writer.drain()

    async def request(self, method: str, target: str, headers: dict[str, str], body: bytes = b"") -> Reply:
        """Send a request and read its answer."""
        await self.send(request_bytes(method, target, headers, body))
        return await self.answer(head_only=method == "HEAD")

    async def answer(self, head_only: bool = False) -> Reply:
        """Read one answer, to its end or to the end of the connection."""
        reading = _Reading(head_only)
        while not reading.done:
            try:
                data = await self._reader.read(1 << 16)
            except ConnectionError:
                data = b""
            if not data:
                reading.end()
                break
            reading.feed(data)
        return reading.reply

    async def read_until(self, mark: bytes) -> bytes:
        """Raw bytes up to and with a mark."""
        return await self._reader.readuntil(mark)

    async def read_on(self, ending: bytes) -> int:
        """Read until the bytes end so; how many there were."""
        size, tail = 0, b""
        while not tail.endswith(ending):
            data = await self._reader.read(1 << 20)
            size, tail = size + len(data), (tail + data)[-len(ending) :]
        return size

    async def rest(self) -> bytes:
        """Raw bytes to the end of the connection."""
        return await self._reader.read()

    async def is_closed(self) -> bool:
        """Wait for the other side to close."""
        try:
            return not await self._reader.read()
        except ConnectionError:
            return True

    def abort(self) -> None:
        """Go away at once, as a cancelled client does."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close and wait until it is."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


def request_bytes(method: str, target: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """A request as bytes, with host and content-length where they are not given."""
    fields = {"host": "gateway.test"} | headers
    if (body or method == "POST") and "transfer-encoding" not in fields:
        fields.setdefault("content-length", str(len(body)))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class _Reading:
    """Collects one answer through httptools."""

    def __init__(self, head_only: bool) -> None:
        self.reply = Reply()
        self.done = False
        self._head_only = head_only
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def end(self) -> None:
        framed = {"content-length", "transfer-encoding"} & set(self.reply.headers)
        self.reply.was_cut = bool(framed) or not self.reply.status
        self.done = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self.reply.headers[name.decode().lower()] = value.decode("latin-1")
        self.reply.header_list.append((name.decode().lower(), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        self.reply.status = self._parser.get_status_code()
        self.done = self._head_only and self.reply.status >= 200

    def on_body(self, body: bytes) -> None:
        self.reply.body += body
        self.reply.chunks.append(body)

    def on_message_complete(self) -> None:
        if self.reply.status >= 200:
            self.done = True
        else:
            self.reply.headers.clear()
