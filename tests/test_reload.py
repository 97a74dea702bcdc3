"""Hot reload: a save is live, whatever way it reaches the disk; a bad file changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import request_bytes
from conftest import HELLO, HELLO_STREAM, KEY, config_text, until
from upstream import end, head, hello_json, message_delta, message_start, message_stop, text, wait_for

import gateway as g

ANOTHER_KEY = "sk-proxy-another-key-0123456789abcdef"
DEMO = "upstreams: [{{name: demo, format: demo}}]\nkeys: [{{name: alice, key: {}}}]\n"


def demo(key: str) -> str:
    """A config with one key."""
    return DEMO.format(key)


@pytest.fixture
def watched(io_loop, tmp_path) -> Iterator[g.Gateway]:
    """A gateway whose config is watched, by events alone."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "config.yaml").write_text(demo(KEY))
    yield from watch(io_loop, folder / "config.yaml")


def watch(io_loop, path: Path) -> Iterator[g.Gateway]:
    """Load `path` and watch it."""
    gateway = g.Gateway(g.Config.load(path), g.Pace(burst_s=0.005))

    async def start() -> g.ConfigWatch:
        watcher = g.ConfigWatch(gateway)
        watcher.start()
        return watcher

    gateway.watcher = io_loop.run_sync(start)
    yield gateway
    gateway.watcher.stop()
    io_loop.run_sync(gateway.close)


async def until_known(gateway: g.Gateway, key: str, within_s: float = 2.0) -> float:
    """Wait until `key` is one of the gateway's keys; the seconds that took."""
    began = time.monotonic()
    await until(lambda: any(known.last4 == key[-4:] for known in gateway.config.keys), within_s)
    return time.monotonic() - began


def replace_by_rename(path: Path, text: str) -> None:
    """What vim and most editors do."""
    path.with_name("config.yaml.new").write_text(text)
    os.replace(path.with_name("config.yaml.new"), path)


def write_in_place(path: Path, text: str) -> None:
    """What `cat >` and nano do."""
    with open(path, "r+") as file:
        file.write(text)
        file.truncate()


def write_in_pieces(path: Path, text: str) -> None:
    """A slow writer: the file is half there for a while."""
    with open(path, "w") as file:
        for line in text.splitlines(keepends=True):
            file.write(line)
            file.flush()


@pytest.mark.parametrize("save", [replace_by_rename, write_in_place, write_in_pieces])
async def test_a_save_is_live_within_a_second(watched, save):
    """
    Editors replace the file or write into it; either is seen by its event.
    """
    save(watched.config.path, demo(ANOTHER_KEY))

    assert await until_known(watched, ANOTHER_KEY) < 1.0


def test_a_swapped_symlink_is_live_within_a_second(io_loop, tmp_path):
    """
    Kubernetes swaps `..data`, a symlink in the directory, and touches the file itself never.
    """
    for version, key in (("v1", KEY), ("v2", ANOTHER_KEY)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "config.yaml").write_text(demo(key))
    os.symlink("v1", tmp_path / "..data")
    os.symlink("..data/config.yaml", tmp_path / "config.yaml")
    watching = watch(io_loop, tmp_path / "config.yaml")
    gateway = next(watching)

    os.symlink("v2", tmp_path / "..tmp")
    os.rename(tmp_path / "..tmp", tmp_path / "..data")

    assert io_loop.run_sync(lambda: until_known(gateway, ANOTHER_KEY)) < 1.0
    next(watching, None)


@pytest.mark.logs("no such file")
async def test_a_file_that_is_removed_and_comes_back_is_read(watched):
    """
    While the file is gone the last good snapshot serves, and the loss is said with what helps: a new one would not.
    """
    path = watched.config.path
    path.unlink()
    await until(lambda: watched.reload_error)

    assert watched.reload_error == (
        f"{path}: no such file; put it back: it is read within a second, and a restart needs it"
    )
    assert await until_known(watched, KEY) < 1.0
    path.write_text(demo(ANOTHER_KEY))

    await until_known(watched, ANOTHER_KEY)
    assert watched.reload_error == ""


@pytest.fixture
def mounted(io_loop, tmp_path) -> Iterator[tuple[g.Gateway, Path]]:
    """A gateway whose config is a mount of its own, as with `docker -v ./config.yaml:…`; the file outside."""
    outside, inside = tmp_path / "outside.yaml", tmp_path / "site here" / "config.yaml"
    inside.parent.mkdir()
    outside.write_text(demo(KEY))
    inside.touch()
    if subprocess.run(["mount", "--bind", outside, inside], capture_output=True, check=False).returncode:
        pytest.skip("bind mounts need root")
    try:
        watching = watch(io_loop, inside)
        yield next(watching), outside
        next(watching, None)
    finally:
        subprocess.run(["umount", inside], check=True)


async def test_a_bind_mounted_file_is_seen_by_the_poll(mounted):
    """
    The file's own directory says nothing: the poll compares the content's stat.
    """
    gateway, outside = mounted
    write_in_place(outside, demo(ANOTHER_KEY))

    gateway.watcher.poll()

    assert await until_known(gateway, ANOTHER_KEY) < 1.0
    assert [warning for warning in gateway.config.warnings if "mounted as a single file" in warning]


@pytest.mark.logs("was replaced on the host")
async def test_a_bind_mounted_file_that_is_replaced_outside_is_said_to_be_and_no_more_edited(mounted):
    """
    The mount keeps the old file: what is edited there is gone with the container, so nothing says OK to it.
    """
    gateway, outside = mounted
    replace_by_rename(outside, demo(ANOTHER_KEY))

    gateway.watcher.poll()
    await until(lambda: gateway.reload_error)
    with pytest.raises(g.ConfigError) as caught:
        options = argparse.Namespace(config=gateway.config.path, name="bob", team="", limit=[], model=[], expires="")
        g.command_key_add(options)

    assert str(caught.value) == gateway.reload_error
    assert "restart the container, and mount the folder" in gateway.reload_error
    assert gateway.config.path.read_text() == demo(KEY)


async def test_the_poll_alone_sees_a_new_inode(gateway):
    """
    Where no events arrive at all, the poll sees a replaced file by its stat, and every tenth time by its content.
    """
    watcher = g.ConfigWatch(gateway.gateway)  # never started: no events
    replace_by_rename(gateway.path, gateway.path.read_text().replace(KEY, ANOTHER_KEY))

    watcher.poll()

    assert await until_known(gateway.gateway, ANOTHER_KEY) < 1.0


async def test_the_ledgers_own_writes_do_not_make_the_config_be_read(watched, tmp_path):
    """
    With `usage: {directory: .}` every call changes the watched directory: such events are passed over.
    """
    seen = []
    watched.watcher._changed = lambda: seen.append(1)

    (watched.config.path.parent / "usage-2026-11.jsonl").write_text("{}\n")
    (watched.config.path.parent / "other.txt").write_text("")
    await until(lambda: seen)

    assert watched.reload_failed_at is None


async def test_a_revoked_key_is_refused_within_two_seconds_of_the_save(watched):
    """
    The measure is the call, not the file: save, then ask.
    """
    door = g.Door(watched, g.tornado_application(watched))
    port = await door.listen("127.0.0.1", 0)
    g.main(["--config", str(watched.config.path), "key", "revoke", "alice"])
    began = time.monotonic()

    status = 200
    async with asyncio.timeout(5):
        while status == 200:
            status = await ask(port)

    assert status == 403 and time.monotonic() - began < 2.0
    await door.close()


@pytest.mark.logs("config not reloaded", "refused all the same")
@pytest.mark.parametrize(
    "mistake", ["enabled: 5", "team: '${NOT_SET}'", "team: a, team: b", "expires: 2027-13-45", "name: [x]"]
)
async def test_a_key_is_refused_that_is_disabled_beside_a_mistake_and_let_in_when_both_are_gone(watched, mistake):
    """
    The rest of the file is not live. The very text that was loaded before is taken when it comes back.
    """
    path = watched.config.path
    bad = path.read_text().replace("}]\nkeys: [{", "}]\nkeys: [{enabled: false, ").replace("}]\n", "}]\n", 1)
    bad = bad.rstrip().removesuffix("]") + f", {{key: {ANOTHER_KEY}, {mistake}}}]\n"

    path.write_text(bad)
    await until(lambda: watched.reload_error)
    during = [key.enabled for key in watched.config.keys]
    path.write_text(demo(KEY))
    await until(lambda: not watched.reload_error)

    assert during == [False]
    assert [key.enabled for key in watched.config.keys] == [True]


@pytest.mark.logs("config not reloaded")
async def test_a_reload_that_is_asked_for_reads_the_same_text_again(tmp_path, clock):
    """
    The secret beside it may be lost or another, of which the text tells nothing. SIGHUP always has a line in the log.
    """
    path = tmp_path / "config.yaml"
    g.init_config(path)
    vault = g.Vault.open(tmp_path)
    sealed = vault.seal("sk-upstream-1234567890")
    path.write_text(f"upstreams: [{{name: a, url: 'http://127.0.0.1:1', api_key: {sealed}}}]\n")
    gateway = g.Gateway(g.Config.load(path, clock.clock))
    (tmp_path / g.Vault.FILE).unlink()

    await gateway.reload()
    unasked = gateway.reload_error
    await gateway.reload(is_asked=True)

    assert not unasked and "gateway.secret" in gateway.reload_error
    await gateway.close()


async def ask(port: int) -> int:
    """One call; its status."""
    from client import Connection

    connection = await Connection.open(port)
    reply = await connection.request("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO).encode())
    await connection.close()
    return reply.status


async def test_a_running_stream_is_untouched_by_a_reload(gateway, upstream):
    """
    A call keeps the snapshot that it began with, even when its key and its upstream are gone from the next.
    """
    go_on = asyncio.Event()
    upstream.script = [
        head(200, "text/event-stream"),
        message_start(input_tokens=12),
        text("Hel"),
        wait_for(go_on),
        text("lo"),
        message_delta(output_tokens=5),
        message_stop(),
        end(),
    ]
    client = await gateway.connect()
    await client.send(request_bytes("POST", "/v1/messages", {"x-api-key": KEY}, json.dumps(HELLO_STREAM).encode()))
    await client.read_until(b'"Hel"')

    assert await gateway.write(demo(ANOTHER_KEY))
    refused = await gateway.post("/v1/messages", HELLO)
    go_on.set()
    rest = await client.read_until(b"0\r\n\r\n")

    assert b'"lo"' in rest and refused.status == 401
    assert gateway.entries()[0]["outcome"] == "completed"
    await client.close()


BAD = {
    "empty": ("", "expected a mapping such as `upstreams: …`"),
    "half": (config_text("http://h")[:70], "config.yaml:"),
    "unknown setting": (config_text("http://h", ", modles: {}"), "did you mean models?"),
    "wrong type": (
        config_text("http://h").replace("port: 0", "port: many"),
        "server.port: expected a whole number from 0 to 65535 such as 8000, got 'many'",
    ),
}


@pytest.mark.logs("config not reloaded, the last good one stays")
@pytest.mark.parametrize("name", BAD)
async def test_a_bad_file_changes_nothing_and_says_why(gateway, upstream, name):
    """
    The last good snapshot stays; the error, with its line, stands in the log; /health says only when, to anybody.
    """
    text, words = BAD[name]
    good, before = gateway.path.read_text(), gateway.gateway.config

    taken = await gateway.write(text)
    health = (await gateway.get("/health")).json["config"]

    assert not taken and gateway.gateway.config is before
    assert words in gateway.gateway.reload_error and words not in json.dumps(health)
    assert health["reload_failed_at"] == "2026-09-21T14:13:20.000Z"
    await gateway.write(good)
    assert (await gateway.get("/health")).json["config"]["reload_failed_at"] is None


@pytest.mark.logs("config not reloaded, the last good one stays")
@pytest.mark.logs("config: the keys that it disables are refused all the same")
async def test_a_key_that_a_bad_file_disables_is_refused_all_the_same(gateway, upstream):
    """
    Nothing else of the file is live, and its mistake is told; the key comes back with a good file that enables it.
    """
    upstream.script = hello_json()
    good = gateway.path.read_text()
    revoked = good.replace(f"key: {KEY}}}", f"key: {KEY}, enabled: false}}")

    taken = await gateway.write(revoked.replace("port: 0", "prot: 0"))
    await gateway.gateway.reload()
    refused = await gateway.post("/v1/messages", HELLO)
    await gateway.write(good.replace("port: 0", "port: 0, contact: ann"))
    back = await gateway.post("/v1/messages", HELLO)

    assert revoked != good and not taken
    assert (refused.status, refused.error["message"]) == (
        403,
        "The key alice (…stuv) is disabled. Ask whoever runs this gateway.",
    )
    assert back.status == 200


async def test_connections_survive_a_reload_and_those_of_a_removed_upstream_are_closed(gateway, upstream):
    """
    State is not configuration: the pool stays where the address stays.
    """

    upstream.script = hello_json()
    await gateway.post("/v1/messages", HELLO)

    await gateway.write(config_text(upstream.url, ", on_disconnect: drain"))
    await gateway.post("/v1/messages", HELLO)
    assert upstream.connections == 1

    await gateway.write(demo(KEY))
    await until(lambda: not upstream.open_connections)
