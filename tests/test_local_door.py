"""The local door: commands at the running gateway, which is the only one that writes its ledger."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import stat
import subprocess
import sys

import pytest
from conftest import HELLO, KEY, GatewayUnderTest, StartGateway, until

import gateway as g

CONFIG = f"""
server: {{host: 127.0.0.1, port: 0}}
upstreams: [{{name: demo, format: demo}}]
teams: [{{name: red, limits: {{usd/week: 5}}}}]
keys: [{{name: alice, team: red, key: {KEY}, limits: {{usd/day: 1, requests/day: 10}}}}]
usage: {{directory: usage, fsync: never}}
"""


@pytest.fixture
def listening(io_loop, start_gateway: StartGateway) -> GatewayUnderTest:
    """A gateway that commands can ask."""

    async def start() -> GatewayUnderTest:
        gateway = await start_gateway(CONFIG)
        gateway.listen_locally()
        return gateway

    return io_loop.run_sync(start)


async def command(gateway: GatewayUnderTest, *arguments: str) -> int:
    """Run a command beside the gateway; its exit code."""
    return await asyncio.to_thread(g.main, ["--config", str(gateway.path), *arguments])


def audits(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The audit lines, without the process that asked."""
    lines = [record.getMessage() for record in caplog.records]
    return [re.sub(r"process \d+", "process", line) for line in lines if line.startswith("audit: ")]


BY = f"by user {os.geteuid()} on this host (process)"


async def test_a_correction_is_written_by_the_running_gateway(listening, capsys, caplog):
    """
    It counts when the command ends, stands in the chain, and leaves a line that says who it was.
    """
    caplog.set_level("INFO")
    await listening.post("/v1/messages", HELLO)

    codes = [
        await command(listening, "usage", "adjust", "alice", "--usd", "0.5", "--note", "refund", "--id", "a1"),
        await command(listening, "usage", "reset", "--team", "red", "--limit", "usd/week", "--id", "a2"),
    ]
    await listening.post("/v1/messages", HELLO)

    assert codes == [0, 0]
    assert capsys.readouterr().out == (
        "Adjusted by +$0.50: key alice, team red, the gateway (id a1).\n"
        "usd/week of team red now counts from zero (id a2).\n"
    )
    used = {row["limit"]: row["used"] for row in (await listening.get("/v1/usage")).json["limits"]}
    assert used["usd/day"] > 0.5
    assert [line["type"] for line in listening.entries()] == ["call", "adjust", "reset", "call"]
    assert len(g.LedgerFiles(listening.gateway.ledger.directory).verify("", print)) == 32
    assert audits(caplog) == [
        f"audit: usage adjust key alice: +0.5 usd, 'refund', id a1, {BY}",
        f"audit: usage reset team red: usd/week, id a2, {BY}",
    ]


async def test_what_speaks_against_it_comes_back_as_it_would_without_a_gateway(listening, capsys):
    """
    Nothing is written.
    """
    codes = [
        await command(listening, "usage", "adjust", "alise", "--usd", "1"),
        await command(listening, "usage", "reset", "alice", "--limit", "concurrent"),
        await command(listening, "upstream", "reset", "demi"),
    ]

    assert (codes, listening.entries()) == ([1, 1, 1], [])
    assert capsys.readouterr().err.splitlines() == [
        "error: there is no key named 'alise', did you mean alice?",
        "error: limit concurrent: key alice has no such limit to reset; it has: usd/day, requests/day",
        "error: there is no upstream named 'demi', did you mean demo?",
    ]


async def test_an_edit_is_live_when_its_command_ends(listening, capsys, caplog):
    """
    And what comes next finds it: a key that was just added can be adjusted, one that was revoked is refused.
    """
    caplog.set_level("INFO")

    codes = [
        await command(listening, "key", "add", "bob"),
        await command(listening, "usage", "adjust", "bob", "--usd", "1", "--id", "a1"),
        await command(listening, "key", "revoke", "alice"),
        *[await command(listening, "seal") for _ in range(2)],
    ]

    assert codes == [0] * 5
    assert (await listening.post("/v1/messages", HELLO)).status == 403
    assert audits(caplog) == [
        f"audit: key add bob, {BY}",
        f"audit: usage adjust key bob: +1 usd, id a1, {BY}",
        f"audit: key revoke alice, {BY}",
        f"audit: seal, {BY}",
    ]


async def test_a_gateway_that_still_starts_says_so(listening, capsys):
    """
    Its counters are not whole yet.
    """
    listening.gateway.starting = True

    code = await command(listening, "usage", "adjust", "alice", "--usd", "1")

    assert (code, capsys.readouterr().err) == (1, "error: The gateway is starting: it still reads its ledger.\n")


async def test_the_socket_is_its_owners_alone(listening):
    """
    Whoever may connect may lift limits.
    """
    made = os.stat(listening.gateway.ledger.directory / g.LOCAL_SOCKET)

    assert stat.S_ISSOCK(made.st_mode) and stat.S_IMODE(made.st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_another_user_is_refused_whatever_the_mode(listening):
    """
    The kernel says who connects.
    """
    place = listening.gateway.ledger.directory / g.LOCAL_SOCKET
    place.chmod(0o666)
    reader, writer = os.pipe()

    def ask_as_nobody() -> None:
        if os.fork() == 0:
            os.chdir(place.parent)  # other users cannot come as far as here
            os.setuid(65534)
            with contextlib.suppress(BaseException), socket.socket(socket.AF_UNIX) as client:
                client.connect(g.LOCAL_SOCKET)
                client.sendall(b'{"action":"upstream reset","name":"demo"}\n')
                os.write(writer, client.recv(9999))
            os.write(writer, b".")
            os._exit(0)
        os.wait()

    await asyncio.to_thread(ask_as_nobody)
    answer = os.read(reader, 9999)
    os.close(writer)
    os.close(reader)

    assert b"the gateway runs as user 0: run this as that user" in answer


async def test_a_folder_whose_path_is_too_long_for_an_address(start_gateway, tmp_path, capsys):
    """
    It is reached through its descriptor.
    """
    deep = "/".join(["x" * 60] * 4)
    (tmp_path / deep).mkdir(parents=True)
    gateway = await start_gateway(CONFIG.replace("directory: usage", f"directory: {deep}"))
    gateway.listen_locally()

    assert await command(gateway, "usage", "adjust", "alice", "--usd", "1") == 0

    assert [line["type"] for line in gateway.entries()] == ["adjust"]


@pytest.mark.logs("commands that write to the ledger have to wait until the gateway has ended")
async def test_without_a_socket_a_command_says_what_to_do(start_gateway, capsys, monkeypatch):
    """
    Some file systems have none (a folder stands in its place here). Nobody writes beside the gateway.
    """
    monkeypatch.setattr(g, "HELD_S", 0.1)
    gateway = await start_gateway(CONFIG)
    directory = gateway.gateway.ledger.directory
    (directory / g.LOCAL_SOCKET).mkdir(parents=True)
    gateway.gateway.ledger.hold()
    gateway.listen_locally()
    gateway.local.check()

    code = await command(gateway, "usage", "adjust", "alice", "--usd", "1")

    assert (code, gateway.entries()) == (1, [])
    assert capsys.readouterr().err == (
        f"error: a gateway runs on {directory}, or a restore, and no gateway.sock answers there: end it first\n"
    )


async def test_a_socket_that_was_left_behind_is_nobody(start_gateway, capsys):
    """
    A gateway that was killed leaves its file: a command goes on alone, the next gateway puts its own there.
    """
    gateway = await start_gateway(CONFIG)
    gateway.listen_locally()
    left = gateway.gateway.ledger.directory / g.LOCAL_SOCKET
    gateway.local._end()

    alone = await command(gateway, "usage", "adjust", "alice", "--usd", "1")
    there = left.exists()
    gateway.listen_locally()
    asked = await command(gateway, "usage", "adjust", "alice", "--usd", "1")

    assert (alone, there, asked, len(gateway.entries())) == (0, True, 0, 2)


async def test_a_socket_that_is_removed_is_made_again(listening):
    """
    The ledger's folder may be moved or emptied under the gateway.
    """
    (listening.gateway.ledger.directory / g.LOCAL_SOCKET).unlink()

    listening.local.check()

    assert await command(listening, "usage", "adjust", "alice", "--usd", "1") == 0


async def send(gateway: GatewayUnderTest, data: bytes) -> bytes:
    """What the door answers to bytes."""

    def talk() -> bytes:
        with socket.socket(socket.AF_UNIX) as client, g.local_address(gateway.gateway.ledger.directory) as address:
            client.settimeout(10)
            client.connect(address)
            client.sendall(data)
            return client.recv(1 << 16)

    return await asyncio.to_thread(talk)


@pytest.mark.parametrize(
    "data", [b"nonsense\n", b"{}\n", b'{"action":"key add"}\n', b"x" * 200_000, b"[" * 60_000 + b"\n"]
)
async def test_what_is_no_request_is_refused(listening, data):
    """
    Also what is too long, and what an older gateway does not know.
    """
    answer = await send(listening, data)

    assert b"does not know that" in answer
    assert await command(listening, "usage", "adjust", "alice", "--usd", "1") == 0


async def test_who_asks_nothing_keeps_nobody_waiting(listening, monkeypatch):
    """
    Others are served meanwhile, and a silent connection is left in the end.
    """
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(listening.gateway.ledger.directory / g.LOCAL_SOCKET))
        silent.sendall(b'{"action":')

        assert await command(listening, "usage", "adjust", "alice", "--usd", "1") == 0
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.recv(1)  # it has not been left

    monkeypatch.setattr(g.LocalDoor, "LINE_S", 0.1)
    assert await send(listening, b'{"action":') == b""


async def test_while_a_real_gateway_runs_and_after_it_the_ledger_is_one_chain(tmp_path, start_process):
    """
    A command asks it while it runs, and writes alone before and after.
    """
    (tmp_path / "config.yaml").write_text(CONFIG)

    def adjust() -> int:
        run = [sys.executable, g.__file__, "usage", "adjust", "alice", "--usd", "0.1"]
        return subprocess.run(run, cwd=tmp_path, capture_output=True).returncode

    codes = [adjust()]
    process = start_process(tmp_path)
    codes.append(await asyncio.to_thread(adjust))
    _, log = process.end()
    codes.append(adjust())

    assert codes == [0, 0, 0]
    assert re.search("audit: usage adjust key alice: [+]0.1 usd, id [0-9a-f]{16}, by user", log)
    files = g.LedgerFiles(tmp_path / "usage")
    assert len(list(files.lines())) == 3 and len(files.verify("", print)) == 32
    assert not (tmp_path / "usage" / g.LOCAL_SOCKET).exists()


async def test_many_commands_at_once_wait_for_their_turn(listening, monkeypatch):
    """
    So many are served at once and no more; a full queue would refuse the others at once.
    """
    monkeypatch.setattr(g.LocalDoor, "LINE_S", 0.1)
    most = g.LocalDoor.MOST_CLIENTS
    with contextlib.ExitStack() as stack:
        for _ in range(most + 40):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(5.0)  # as `ask` does: then a full queue is an error, not a wait
            client.connect(str(listening.gateway.ledger.directory / g.LOCAL_SOCKET))
        await until(lambda: len(listening.local._tasks) == 1 + most)

        assert await command(listening, "usage", "adjust", "alice", "--usd", "1") == 0


def test_a_reset_waits_for_a_gateway_that_starts(tmp_path, capsys, monkeypatch):
    """
    Who holds the folder may be about to listen: it is not said at once that nobody was reached.
    """
    monkeypatch.setattr(g, "HELD_S", 0.1)
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    held = g.hold_folder(tmp_path / "usage")

    codes = [g.main(["--config", str(path), "upstream", "reset", "demo"])]
    os.close(held)
    codes.append(g.main(["--config", str(path), "upstream", "reset", "demo"]))

    waited, free = capsys.readouterr().err.splitlines()
    assert codes == [1, 1]
    assert f"a gateway runs on {tmp_path}/usage, or a restore" in waited
    assert "no gateway was reached" in free
