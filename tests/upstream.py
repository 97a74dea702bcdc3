"""A scripted upstream: a real server on loopback that answers in bytes, with the field's faults by name.

A script is a list of steps; `upstream.script` is the answer to every request, `upstream.scripts` one for each in turn,
and a script may be a function from the request to its steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import json
import socket
import ssl
import struct
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools


@dataclass
class Request:
    """One request as it came."""

    method: str = ""
    target: str = ""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    connection: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def header(self) -> dict[str, str]:
        """Headers by lower-case name."""
        return {name.decode().lower(): value.decode("latin-1") for name, value in self.headers}

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Exchange:
    """What a step works on: the connection, and whether its body is chunked."""

    def __init__(self, writer: asyncio.StreamWriter, gone: asyncio.Event) -> None:
        self.writer, self.gone = writer, gone
        self.chunked = False

    async def write(self, data: bytes) -> None:
        """Send bytes and wait until they may follow one another."""
        self.writer.write(data)
        await self.writer.drain()

    async def piece(self, data: bytes) -> None:
        """A piece of the body, a chunk of its own where the body is chunked."""
        await self.write(b"%x\r\n%b\r\n" % (len(data), data) if self.chunked else data)


Step = Callable[[Exchange], Awaitable[None]]
Script = list[Step] | Callable[[Request], list[Step]]


# --- steps ------------------------------------------------------------------------------


def raw(data: bytes) -> Step:
    """Bytes as they are."""
    return lambda exchange: exchange.write(data)


def head(status: int, content_type: str, **headers: str) -> Step:
    """A head; the body is chunked unless `content_length` is given."""

    async def step(exchange: Exchange) -> None:
        fields = {"content-type": content_type} | {name.replace("_", "-"): value for name, value in headers.items()}
        exchange.chunked = "content-length" not in fields
        if exchange.chunked:
            fields["transfer-encoding"] = "chunked"
        lines = [f"HTTP/1.1 {status} Said", *(f"{name}: {value}" for name, value in fields.items())]
        await exchange.write("\r\n".join(lines).encode() + b"\r\n\r\n")

    return step


def body(data: bytes) -> Step:
    """A piece of the body."""
    return lambda exchange: exchange.piece(data)


def event(name: str, data: dict[str, Any]) -> Step:
    """A server-sent event; without a name where it is ""."""
    named = f"event: {name}\n" if name else ""
    return body(f"{named}data: {json.dumps(data)}\n\n".encode())


def end() -> Step:
    """The proper end of a chunked body."""
    return raw(b"0\r\n\r\n")


def close() -> Step:
    """Close the connection (FIN)."""

    async def step(exchange: Exchange) -> None:
        exchange.writer.close()

    return step


def reset_peer() -> Step:
    """Reset the connection (RST)."""

    async def step(exchange: Exchange) -> None:
        # What was written must have been read, or the reset would take it back.
        while exchange.writer.transport.get_write_buffer_size():
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        sock = exchange.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        exchange.writer.transport.abort()

    return step


def stall() -> Step:
    """Say nothing until the other side closes."""

    async def step(exchange: Exchange) -> None:
        await exchange.gone.wait()

    return step


def wait_for(signal: asyncio.Event) -> Step:
    """Say nothing until the test says so, or the other side closes."""

    async def step(exchange: Exchange) -> None:
        waits = [asyncio.ensure_future(signal.wait()), asyncio.ensure_future(exchange.gone.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    return step


def garbage() -> Step:
    """Bytes that are no HTTP, wherever they come."""
    return raw(b"\x00\xffthis is not HTTP\r\n\r\n")


def slicer(step: Step, size: int) -> Step:
    """Another step's bytes, so many at a time."""

    async def sliced(exchange: Exchange) -> None:
        inner = _Recorder(exchange)
        await step(inner)
        exchange.chunked = inner.chunked
        data = bytes(inner.data)
        for i in range(0, len(data), size):
            await exchange.write(data[i : i + size])
            await asyncio.sleep(0)

    return sliced


class _Recorder(Exchange):
    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange.writer, exchange.gone)
        self.chunked = exchange.chunked
        self.data = bytearray()

    async def write(self, data: bytes) -> None:
        self.data += data


# --- the Messages API -------------------------------------------------------------------


def message_start(
    input_tokens: int, cache_read: int = 0, cache_5m: int = 0, cache_1h: int = 0, model: str = "claude-test"
) -> Step:
    """The first event, with the input's usage."""
    usage = {
        "input_tokens": input_tokens,
        "cache_creation_input_tokens": cache_5m + cache_1h,
        "cache_read_input_tokens": cache_read,
        "cache_creation": {"ephemeral_5m_input_tokens": cache_5m, "ephemeral_1h_input_tokens": cache_1h},
        "output_tokens": 1,
    }
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": []}
    message |= {"stop_reason": None, "stop_sequence": None, "usage": usage}
    return event("message_start", {"type": "message_start", "message": message})


def block_start(index: int = 0, **block: Any) -> Step:
    """A content block begins."""
    content = block or {"type": "text", "text": ""}
    return event("content_block_start", {"type": "content_block_start", "index": index, "content_block": content})


def block_delta(index: int = 0, **delta: Any) -> Step:
    """A piece of a content block."""
    return event("content_block_delta", {"type": "content_block_delta", "index": index, "delta": delta})


def block_stop(index: int = 0) -> Step:
    """A content block ends."""
    return event("content_block_stop", {"type": "content_block_stop", "index": index})


def text(said: str) -> Step:
    """A piece of text."""
    return block_delta(type="text_delta", text=said)


def thinking(thought: str) -> Step:
    """A piece of thinking."""
    return block_delta(type="thinking_delta", thinking=thought)


def ping() -> Step:
    """What keeps a silent stream alive."""
    return event("ping", {"type": "ping"})


def message_delta(output_tokens: int, stop_reason: str = "end_turn", **usage: int) -> Step:
    """The output's usage."""
    delta = {"stop_reason": stop_reason, "stop_sequence": None}
    return event(
        "message_delta", {"type": "message_delta", "delta": delta, "usage": {"output_tokens": output_tokens} | usage}
    )


def message_stop() -> Step:
    """The terminal event."""
    return event("message_stop", {"type": "message_stop"})


def error_event(kind: str, message: str) -> Step:
    """An error in mid-stream."""
    return event("error", {"type": "error", "error": {"type": kind, "message": message}})


def json_body(value: Any, status: int = 200, **headers: str) -> list[Step]:
    """A whole JSON answer with its length."""
    data = json.dumps(value).encode()
    return [head(status, "application/json", content_length=str(len(data)), **headers), body(data)]


def stream_of(*words: str, input_tokens: int = 12, output_tokens: int = 5) -> list[Step]:
    """A whole good stream of text."""
    return [
        head(200, "text/event-stream", request_id="req_upstream"),
        message_start(input_tokens=input_tokens),
        block_start(),
        *(text(word) for word in words),
        block_stop(),
        message_delta(output_tokens=output_tokens),
        message_stop(),
        end(),
    ]


HELLO = stream_of("Hello", " world")


def message_json(said: str, input_tokens: int = 12, output_tokens: int = 5) -> list[Step]:
    """A whole non-stream message."""
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-test"}
    message |= {"content": [{"type": "text", "text": said}], "stop_reason": "end_turn", "stop_sequence": None}
    return json_body(message | {"usage": {"input_tokens": input_tokens, "output_tokens": output_tokens}})


def hello_json() -> list[Step]:
    """The stream HELLO as one message."""
    return message_json("Hello world")


def tool_use(name: str, tool_input: dict[str, Any]) -> list[Step]:
    """A whole stream that asks for a tool."""
    return [
        head(200, "text/event-stream"),
        message_start(input_tokens=20),
        block_start(type="tool_use", id="toolu_1", name=name, input={}),
        block_delta(type="input_json_delta", partial_json=json.dumps(tool_input)),
        block_stop(),
        message_delta(output_tokens=9, stop_reason="tool_use"),
        message_stop(),
        end(),
    ]


# --- chat completions -------------------------------------------------------------------


CHAT = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-test"}


def chat_chunk(content: str, finish: str | None = None) -> Step:
    """A piece of a chat stream."""
    choices = [{"index": 0, "delta": {"content": content} if content else {}, "finish_reason": finish}]
    return event(
        "", {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-test", "choices": choices}
    )


def chat_usage(prompt: int, completion: int, cached: int = 0) -> Step:
    """The extra last chunk that include_usage asks for."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return event("", CHAT | {"choices": [], "usage": usage})


def chat_done() -> Step:
    """The terminal event of a chat stream."""
    return body(b"data: [DONE]\n\n")


def chat_hello(stream: bool) -> list[Step]:
    """A whole chat answer."""
    if stream:
        pieces = [chat_chunk("Hello"), chat_chunk(" world"), chat_chunk("", "stop"), chat_usage(12, 5), chat_done()]
        return [head(200, "text/event-stream"), *pieces, end()]
    message = {"role": "assistant", "content": "Hello world"}
    answer = {"id": "c1", "object": "chat.completion", "created": 1, "model": "gpt-test"}
    answer |= {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    return json_body(answer | {"usage": {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17}})


def response_completed(input_tokens: int, output_tokens: int, cached: int = 0) -> Step:
    """The terminal event of a Responses stream, with its usage."""
    usage = {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": input_tokens + output_tokens}
    usage["input_tokens_details"] = {"cached_tokens": cached}
    answer = {"id": "resp_1", "object": "response", "model": "gpt-test", "status": "completed", "usage": usage}
    return event("response.completed", {"type": "response.completed", "response": answer})


# --- the server -------------------------------------------------------------------------


class ScriptedUpstream:
    """A server on loopback that answers by script."""

    def __init__(self, tls: bool = False) -> None:
        self.script: Script = []
        self.scripts: list[Script] = []
        self.requests: list[Request] = []
        self.connections = self.open_connections = 0
        self.url = self.ca_file = ""
        self._tls = tls
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free port."""
        context = None
        if self._tls:
            self.ca_file, context = self_signed()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context, limit=1 << 26)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"https://localhost:{port}" if self._tls else f"http://127.0.0.1:{port}"

    async def close(self) -> None:
        """Close everything."""
        self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def refuse(self) -> int:
        """A port at which connections are refused."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            return int(sock.getsockname()[1])

    async def request_came(self, count: int = 1) -> Request:
        """Wait for the so manyth request."""
        while len(self.requests) < count:
            self._changed.clear()
            await self._changed.wait()
        return self.requests[count - 1]

    async def closed_by_peer(self, timeout_s: float = 10.0) -> None:
        """Wait until the last request's connection was closed by the other side; TimeoutError when it is not."""
        async with asyncio.timeout(timeout_s):
            await self.requests[-1].closed.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        self.open_connections += 1
        gone = asyncio.Event()
        reading = _Reading(self, self.connections, gone)
        answering = asyncio.ensure_future(self._answer(reading, writer, gone))
        try:
            while data := await reader.read(1 << 16):
                reading.feed(data)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            gone.set()
            for request in reading.answered:
                request.closed.set()
            self.open_connections -= 1
            self._writers.discard(writer)
            self._tasks.discard(task)
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await answering
            writer.transport.abort()

    async def _answer(self, reading: _Reading, writer: asyncio.StreamWriter, gone: asyncio.Event) -> None:
        while True:
            request = await reading.whole.get()
            self.requests.append(request)
            reading.answered.append(request)
            script = self.scripts.pop(0) if self.scripts else self.script
            self._changed.set()
            exchange = Exchange(writer, gone)
            for step in script(request) if callable(script) else script:
                if not writer.is_closing():
                    with contextlib.suppress(ConnectionError):
                        await step(exchange)


class _Reading:
    """Requests out of one connection's bytes."""

    def __init__(self, upstream: ScriptedUpstream, connection: int, gone: asyncio.Event) -> None:
        self.whole: asyncio.Queue[Request] = asyncio.Queue()
        self.answered: list[Request] = []
        self._connection = connection
        self._parser = httptools.HttpRequestParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._request = Request(connection=self._connection)

    def on_url(self, url: bytes) -> None:
        self._request.target += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers.append((name, value))

    def on_body(self, data: bytes) -> None:
        self._request.body += data

    def on_message_complete(self) -> None:
        self._request.method = self._parser.get_method().decode()
        self.whole.put_nowait(self._request)


class ConnectProxy:
    """An HTTP proxy that knows CONNECT only."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.lines: list[str] = []
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """Close everything."""
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            await self._tunnel(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        self.lines.append(asked.split(b"\r\n")[0].decode())
        writer.write(b"HTTP/1.1 %d Said\r\n\r\n" % self.status)
        if self.status != 200:
            return await writer.drain()
        host, port = self.lines[-1].split()[1].rsplit(":", 1)
        onward_reader, onward_writer = await asyncio.open_connection(host, int(port))
        try:
            await asyncio.gather(pump(reader, onward_writer), pump(onward_reader, writer))
        finally:
            onward_writer.transport.abort()
        return None


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry bytes one way until they end."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


def self_signed() -> tuple[str, ssl.SSLContext]:
    """A certificate for localhost that vouches for itself: its file, and a server's context with it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - dt.timedelta(1)).not_valid_after(now + dt.timedelta(1))
    builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
    certificate = builder.sign(key, hashes.SHA256())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    folder = Path(tempfile.mkdtemp())
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return str(folder / "cert.pem"), context
