"""backup and restore: what is copied from under a running gateway, and what is put in place."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from client import Connection
from conftest import HELLO, KEY, PROGRAM, FakeClock
from test_command_line import Shell
from test_command_line import mounted as mounted  # a fixture
from test_command_line import shell as shell  # a fixture
from test_ledger import entry, mount_small_disk, needs_mount

import gateway as g

LEDGER_FILES = ["usage-2026-07.jsonl.gz", "usage-2026-08.jsonl", "usage-2026-09.jsonl"]
API_KEY = "sk-ant-0123456789abcdef"
ZEROS = "0" * 32


def fill(directory: Path, count: int = 9, months: tuple[int, ...] = (7, 8, 9)) -> None:
    """Write a ledger; as many lines in each month."""
    clock = FakeClock()
    clock.advance(-82 * 86400)
    ledger = g.Ledger(directory, 3600, clock.clock)
    ledger.open()
    for month in months:
        for number in range(count):
            ledger.append(entry(number, f"2026-{month:02}-01T10:00:{number % 60:02}.000Z"))
    ledger.close()


def unpacked(backup: Path | bytes) -> dict[str, bytes]:
    """What is in a backup, in its order."""
    data = backup if isinstance(backup, bytes) else backup.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def packed(files: dict[str, bytes], change: Callable[[tarfile.TarInfo], None] = lambda info: None) -> bytes:
    """A tar as `backup` writes it, of these files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            change(info)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def signed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same with digests that fit, as somebody makes them who wants to be believed."""
    whole = {name: data for name, data in files.items() if name != g.Manifest.SUMS}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in whole.items())
    return {**whole, g.Manifest.SUMS: sums.encode()}


def everything(folder: Path) -> dict[str, bytes | None]:
    """All that lies below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def mode(path: Path) -> int:
    """The permissions of a file."""
    return path.stat().st_mode & 0o777


@pytest.fixture
def site(shell) -> Shell:
    """A config with a sealed key and a ledger of three months, one of them gzipped."""
    shell.run("init")
    shell.write(
        "server: {port: 0}\n"
        "upstreams:\n"
        f"  - {{name: main, url: 'http://127.0.0.1:1', api_key: {API_KEY}}}\n"
        f"keys:\n  - {{name: alice, key: {g.seal_key(KEY)}}}\n"
    )
    assert shell.run("seal") == 0
    fill(shell.folder / "usage")
    g.LedgerFiles(shell.folder / "usage").archive(lambda text: None)
    with gzip.open("usage/usage-2026-08.jsonl.gz") as file:
        Path("usage/usage-2026-08.jsonl").write_bytes(file.read())
    os.unlink("usage/usage-2026-08.jsonl.gz")
    return shell


@pytest.fixture
def backup(site) -> Path:
    """A backup of the site."""
    assert site.run("backup", "b.tar.gz") == 0
    return site.folder / "b.tar.gz"


def last_chain(folder: Path) -> str:
    """The value that `usage verify` finds last."""
    return g.LedgerFiles(folder).verify("", lambda text: None)


# What a backup holds


def test_a_backup_holds_config_secret_and_ledger(site):
    """
    Names do not depend on the host; the manifest comes first, digests that `sha256sum -c` reads come last.
    """
    Path("usage/usage-2026-08.torn").write_text("half a li\n")
    Path("usage/index.sqlite").write_text("derived")
    before = everything(site.folder)

    assert site.run("backup", "b.tar.gz") == 0

    files = unpacked(Path("b.tar.gz"))
    names = ["config.yaml", "gateway.secret"]
    names += [f"usage/{name}" for name in (*LEDGER_FILES, "usage-2026-08.torn")]
    assert list(files) == ["manifest.json", *names, "SHA256SUMS"]
    assert {name: files[name] for name in names} == {name: before[name] for name in names}
    manifest = json.loads(files["manifest.json"])
    assert (manifest["format"], manifest["chain"]) == (1, last_chain(Path("usage")))
    assert signed(files) == files
    assert mode(Path("b.tar.gz")) == 0o600
    size = sum(len(data) for name, data in files.items() if name != "SHA256SUMS")
    assert site.out == (
        f"b.tar.gz: {', '.join(names)}; {size:,} bytes before packing; the last chain value is {manifest['chain']}\n"
    )
    assert everything(site.folder) == before | {"b.tar.gz": Path("b.tar.gz").read_bytes()}


def test_the_name_of_a_backup_is_its_time(site):
    """
    Beside the config, sorted by age.
    """
    assert site.run("backup") == 0

    (name,) = site.folder.glob("claude-gateway-*")
    assert re.fullmatch(r"claude-gateway-\d{8}T\d{6}Z\.tar\.gz", name.name)


def test_a_backup_overwrites_nothing(site):
    """
    A cron line with a fixed name must not replace the good one of yesterday.
    """
    Path("b.tar.gz").write_text("yesterday's")

    assert site.run("backup", "b.tar.gz") == 1

    assert site.err == "error: no backup was written to b.tar.gz: File exists\n"
    assert Path("b.tar.gz").read_text() == "yesterday's"


@pytest.mark.parametrize("from_environment", [False, True])
def test_a_secret_that_is_not_in_it_is_said_to_be_missing(site, monkeypatch, from_environment):
    """
    Kept apart on purpose, or in the environment: without it nobody can use the rest.
    """
    if from_environment:
        monkeypatch.setenv("GATEWAY_SECRET", Path("gateway.secret").read_text())

    assert site.run("backup", "b.tar.gz", *([] if from_environment else ["--without-secret"])) == 0

    assert "gateway.secret" not in unpacked(Path("b.tar.gz"))
    assert site.err == "note: the sealing secret, without which no upstream's key can be read, is not in it\n"


def test_files_that_lie_elsewhere_are_in_it_under_their_usual_names(site, monkeypatch):
    """
    A config that is a symlink, a secret from a mounted folder, a ledger on a disk of its own; and back to such places.
    """
    for folder in ("etc", "run", "disk"):
        Path(folder).mkdir()
    shutil.move("usage", "disk/ledger")
    shutil.move("gateway.secret", "run/s")
    Path("etc/real.yaml").write_text(site.config + f"usage: {{directory: {site.folder}/disk/ledger}}\n")
    os.unlink("config.yaml")
    os.symlink("etc/real.yaml", "config.yaml")
    monkeypatch.setenv("GATEWAY_SECRET_FILE", str(site.folder / "run/s"))
    before = everything(site.folder)

    assert site.run("backup", "b.tar.gz") == 0
    for folder in ("etc/real.yaml", "run/s"):
        os.unlink(folder)
    shutil.rmtree("disk/ledger")
    assert site.run("restore", "b.tar.gz", "--force") == 0

    assert set(unpacked(Path("b.tar.gz"))) >= {"config.yaml", "gateway.secret", f"usage/{LEDGER_FILES[0]}"}
    assert everything(site.folder) == before | {"b.tar.gz": Path("b.tar.gz").read_bytes()}
    assert Path("config.yaml").is_symlink()


def test_a_line_that_is_being_written_is_not_in_it(site):
    """
    The write of the gateway may be half done; what it will be is in the next backup.
    """
    newest = Path("usage") / LEDGER_FILES[-1]
    whole = newest.read_bytes()
    with open(newest, "ab") as file:
        file.write(whole.splitlines()[0][:-20])

    site.run("backup", "b.tar.gz")

    assert unpacked(Path("b.tar.gz"))[f"usage/{newest.name}"] == whole


@pytest.mark.parametrize("mistake", ["limits: {queu: 5s}", "teams: ${NOT_SET_ANYWHERE}"])
def test_a_config_with_a_mistake_is_backed_up_as_it_is(site, mistake):
    """
    Cron copies the ledger every night, also before somebody mends the config; it is said.
    """
    site.write(site.config + mistake + "\n")

    assert site.run("backup", "b.tar.gz") == 0

    assert site.err.startswith("warning: a mistake in the config: ")
    found = unpacked(Path("b.tar.gz"))
    assert found["config.yaml"].decode() == site.config
    assert [name for name in found if name.endswith(".jsonl")]


def test_the_folder_of_the_ledger_may_come_from_the_environment_beside_a_mistake(site, monkeypatch):
    """
    As it may in a config without one.
    """
    monkeypatch.setenv("LEDGER", "usage")
    site.write(site.config + "usage: {directory: '${LEDGER}'}\nlimits: {queu: 5s}\n")

    assert site.run("backup", "b.tar.gz") == 0
    assert [name for name in unpacked(Path("b.tar.gz")) if name.endswith(".jsonl")]


@pytest.mark.parametrize("text", ["upstreams: [", "usage: {directory: [a]}\n", "usage: {directory: '${NOT_SET}'}\n"])
def test_a_config_that_does_not_say_where_the_ledger_is_is_not_backed_up(site, text):
    """
    A backup without the ledger would be found out too late.
    """
    site.write(text)

    assert site.run("backup", "b.tar.gz") == 1

    assert site.err.count("error: ") == 1 and not Path("b.tar.gz").exists()


def test_a_terminal_gets_no_backup(site):
    """
    Nobody wants that on the screen; nor does a restore wait for somebody to type one.
    """
    outer, inner = pty.openpty()
    for command, stream in ((["backup", "-"], "stdout"), (["restore", "-"], "stdin")):
        done = subprocess.run(
            [sys.executable, PROGRAM, *command], **{stream: inner}, stderr=subprocess.PIPE, text=True, check=False
        )
        assert done.returncode == 1 and "terminal: redirect it, or name a file" in done.stderr
    os.close(outer), os.close(inner)


def test_a_backup_goes_through_a_pipe_and_back(site):
    """
    As `docker exec gw claude-gateway backup - > gw.tar.gz` has it.
    """
    out = subprocess.run([sys.executable, PROGRAM, "backup", "-"], capture_output=True, check=True)
    back = subprocess.run(
        [sys.executable, PROGRAM, "restore", "-", "--config", "new/config.yaml"],
        input=out.stdout,
        capture_output=True,
        check=True,
    )

    assert out.stderr.startswith(b"-: config.yaml, gateway.secret, usage/")
    assert back.stdout.endswith(b"Start the gateway with: gateway.py serve\n")
    assert everything(Path("new/usage")) == everything(Path("usage"))


def test_who_hangs_up_in_the_middle_makes_the_backup_fail(site):
    """
    `backup - | ssh …` whose other end dies must not look like a backup.
    """
    Path("usage/usage-2026-06.torn").write_bytes(os.urandom(1 << 20))
    process = subprocess.Popen([sys.executable, PROGRAM, "backup", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()

    assert process.stderr.read() == b"error: no backup was written to stdout: Broken pipe\n"
    assert process.wait() == 1
    process.stderr.close()


@needs_mount
def test_a_full_disk_leaves_no_half_backup(site):
    """
    What lies under the name is whole, or nothing lies there.
    """
    disk = site.folder / "disk"
    disk.mkdir()
    assert mount_small_disk(disk)
    try:
        Path("usage/usage-2026-06.torn").write_bytes(os.urandom(1 << 20))

        assert site.run("backup", "disk/b.tar.gz") == 1

        assert site.err == "error: no backup was written to disk/b.tar.gz: No space left on device\n"
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


# While others write


def test_months_that_are_gzipped_meanwhile_are_all_in_it(site):
    """
    `usage archive` takes a file away and puts another one there, at any moment between listing and copying.
    """
    wanted, seen = last_chain(site.folder / "usage"), set()

    for i in range(40):
        files = g.LedgerFiles(site.folder / f"round{i}")
        files.directory.mkdir()
        fill(files.directory)
        archiving = threading.Thread(target=files.archive, args=[lambda text: None])
        archiving.start()
        while archiving.is_alive():
            with contextlib.ExitStack() as opened:
                held = g.hold_ledger(files.directory, opened)
                assert held[-1].last_chain().decode() == wanted
            assert [one.name[6:19] for one in held] == ["usage-2026-07", "usage-2026-08", "usage-2026-09"]
            seen.add(tuple(one.name.endswith(".gz") for one in held))

    assert len(seen) > 1  # it did happen meanwhile


def test_a_backup_while_a_gateway_writes_and_months_turn_is_a_beginning_of_the_chain(site):
    """
    Whatever moment it is: no gap, and no half line.
    """
    shutil.rmtree("usage")
    clock, number, weeks, before = FakeClock(), 0, 0, 0
    ledger = g.Ledger(site.folder / "usage", 3600, clock.clock)
    ledger.open()

    def append() -> None:
        nonlocal number, weeks
        while not done.is_set():
            if number > before + 1000:  # enough for this copy: all of them are read again
                time.sleep(0.001)
                continue
            for _ in range(20):
                number += 1
                ledger.append(entry(number, g.utc_time(clock.clock.wall())))
            if weeks:
                weeks -= 1
                clock.advance(7 * 86400)
            ledger.tick()

    lengths, done, writer = [], threading.Event(), threading.Thread(target=append)
    writer.start()
    try:
        for i in range(8):
            before, weeks = number, 4  # a month turns while this copy is made
            while number < before + 30:
                time.sleep(0.001)
            with contextlib.ExitStack() as opened:
                copy = site.folder / f"copy{i}"
                copy.mkdir()
                for held in g.hold_ledger(site.folder / "usage", opened):
                    (copy / Path(held.name).name).write_bytes(held.read(held.size))
            last_chain(copy)  # raises where a line does not follow
            requests = [line.request_id for line in g.LedgerFiles(copy).lines()]
            lengths.append(len(requests))
            assert requests == [f"req_{n}" for n in range(1, lengths[-1] + 1)]
    finally:
        done.set()
        writer.join()
    ledger.close()

    assert lengths == sorted(set(lengths)) and lengths[0] > 0
    assert len(g.LedgerFiles(site.folder / "usage").paths()) > 1


async def test_a_backup_of_a_running_gateway_starts_elsewhere_with_its_counters(tmp_path, start_process):
    """
    The whole way, with processes: calls go on while it is copied; what is restored serves, with the same key, from
    where the copy ends.
    """
    first = start_process(tmp_path, "--log-level", "warning")
    connection = await Connection.open(first.port)

    async def call() -> None:
        reply = await connection.request(
            "POST", "/v1/messages", {"x-api-key": first.key}, json.dumps(HELLO | {"model": "claude-demo"}).encode()
        )
        assert reply.status == 200

    for _ in range(10):
        await call()
    copying = subprocess.Popen([sys.executable, PROGRAM, "backup", "b.tar.gz"], cwd=tmp_path, stdout=subprocess.PIPE)
    calls = 10
    while copying.poll() is None:
        await call()
        calls += 1
    assert copying.wait() == 0
    seen = re.search(rb"value is (\w+)", copying.communicate()[0])[1].decode()
    await connection.close()

    new = tmp_path / "new"
    restored = subprocess.run(
        [sys.executable, PROGRAM, "--config", new / "config.yaml", "restore", "b.tar.gz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    copied = int(re.search(r"jsonl: ([\d,]+) lines", restored.stderr)[1].replace(",", ""))
    second = start_process(new)
    connection = await Connection.open(second.port)
    await call()
    usage = await connection.request("GET", "/v1/usage", {"x-api-key": first.key}, b"")
    await connection.close()

    assert 10 <= copied <= calls
    assert usage.json["month"]["calls"] == copied + 1
    assert first.end()[0] == second.end()[0] == 0
    assert g.LedgerFiles(new / "usage").verify(seen, lambda text: None) != seen
    assert len(list(g.LedgerFiles(new / "usage").lines())) == copied + 1
    ours, theirs = ((folder / "usage").glob("*.jsonl") for folder in (tmp_path, new))
    assert next(ours).read_bytes().splitlines()[:copied] == next(theirs).read_bytes().splitlines()[:copied]


# Restore


def test_what_is_restored_is_what_was_there(site, backup):
    """
    On a host that has nothing yet; the report says what came back and what to do next.
    """
    wanted = everything(Path("usage"))

    assert site.run("--config", "new/config.yaml", "restore", "b.tar.gz") == 0

    new = site.folder / "new"
    assert everything(new / "usage") == wanted
    assert (new / "config.yaml").read_text() == site.config
    assert (new / "gateway.secret").read_text() == Path("gateway.secret").read_text()
    assert [mode(new / name) for name in ("config.yaml", "gateway.secret")] == [0o640, 0o600]
    assert {mode(path) for path in (new / "usage").iterdir()} <= {0o640}
    assert g.Config.load(new / "config.yaml").upstreams[0].api_key == (API_KEY,)
    made = json.loads(unpacked(backup)["manifest.json"])
    assert site.out == (
        f"Restored the backup of {made['time']} to {new}/config.yaml and {new}/usage.\n"
        "Start the gateway with: gateway.py serve\n"
    )


def test_a_restore_that_fails_halfway_leaves_things_as_they_were(site):
    """
    What was moved comes back.
    """
    old = [Path("config.yaml"), *(Path("usage") / name for name in LEDGER_FILES)]
    new = {path: Path("new") / path.name for path in old}
    before = everything(site.folder)
    Path("new").mkdir()

    for path in old[:3]:
        new[path].write_text("new")
    with pytest.raises(FileNotFoundError):
        g.swap(old[::-1], dict(reversed(new.items())), "kept")
    assert {name: data for name, data in everything(site.folder).items() if "new" not in name} == before
    for path in old:
        new[path].write_text("new")
    g.swap(old, new, "kept")

    after = everything(site.folder)
    assert {after[str(path)] for path in old} == {b"new"}
    assert after["kept/config.yaml"] == before["config.yaml"]
    assert sorted(path.name for path in Path("usage/kept").iterdir()) == LEDGER_FILES


KILLED = """
import os, sys, gateway

def run(count):
    def hook(event, arguments):
        nonlocal count
        count -= event == "os.rename"
        if count < 0:
            os._exit(9)

    config = f"{count}/config.yaml"
    sys.addaudithook(hook)
    os._exit(gateway.main(["--config", config, "restore", "--force", "b.tar.gz"]))

for count in range(9):
    if not os.fork():
        run(count)
    os.wait()
"""


def test_a_restore_that_is_killed_leaves_no_config_to_its_half_ledger(site, backup):
    """
    Before the first rename all is old, after the last all is new; in between no key works, and nothing is lost.
    """
    g.Ledger.correct(site.folder / "usage", g.Adjustment(time="2026-09-21T00:00:00.000Z", cost_usd=1.0), g.Clock())
    old = {name: data for name, data in everything(site.folder).items() if data and name != "b.tar.gz"}
    for count in range(9):
        for folder in (f"{count}", f"{count}/usage"):
            Path(folder).mkdir()
        for name, data in old.items():
            Path(f"{count}/{name}").write_bytes(data)

    environ = os.environ | {"PYTHONPATH": str(PROGRAM.parent)}
    subprocess.run([sys.executable, "-c", KILLED], env=environ, capture_output=True, check=True)

    new = {name: data for name, data in unpacked(backup).items() if name in old}
    left = [everything(Path(f"{count}")) for count in range(9)]
    assert old.items() <= left[0].items() and new.items() <= left[8].items()
    assert not any(files.get("config.yaml") for files in left[1:8])
    assert all(set(old.values()) <= set(files.values()) for files in left)
    for kept in Path("4").glob("**/before-restore-*"):
        kept.rename(kept.with_name("before"))  # the same second may have been its name
    assert site.run("--config", "4/config.yaml", "restore", "--force", "b.tar.gz") == 0
    assert new.items() <= everything(Path("4")).items()


def test_what_is_there_is_replaced_only_by_force_and_kept(site, backup):
    """
    A restore in the wrong folder can be undone by hand.
    """
    site.write(site.config + "# edited since\n")
    Path("gateway.secret").write_text(g.Vault.new_secret() + "\n" + Path("gateway.secret").read_text())
    g.Ledger.correct(site.folder / "usage", g.Adjustment(time="2026-09-21T00:00:00.000Z", cost_usd=1.0), g.Clock())
    before = everything(site.folder)

    assert site.run("restore", "b.tar.gz") == 1
    refusal, untouched = site.err, everything(site.folder)
    assert site.run("restore", "b.tar.gz", "--force") == 0

    assert re.fullmatch(
        rf"error: {site.folder}/config\.yaml is there already; --force keeps it in before-restore-\d{{8}}T\d{{6}}Z/; "
        r"nothing was restored\n",
        refusal,
    )
    assert untouched == before
    after = everything(site.folder)
    (stamp,) = {re.search(r"before-restore-\w+", name)[0] for name in after if "before" in name}
    assert {name: data for name, data in after.items() if "before-restore" not in name} == {
        name: unpacked(backup).get(name, data) for name, data in before.items()
    }
    assert all(after[f"{stamp}/{name}"] == before[name] for name in ("config.yaml", "gateway.secret"))
    kept = {name: data for name, data in before.items() if name.startswith("usage/")}
    assert {name: after[name.replace("usage/", f"usage/{stamp}/")] for name in kept} == kept
    folders = f"{site.folder}/{stamp} and {site.folder}/usage/{stamp}"
    assert f"\nWhat was there before is kept in {folders}.\n" in site.out


def test_a_ledger_alone_is_not_replaced_unasked(site, backup):
    """
    Neither is a secret, which may open what nobody else can open.
    """
    os.unlink("config.yaml")

    assert site.run("restore", "b.tar.gz") == 1
    ledger = site.err
    shutil.rmtree("usage")
    Path("gateway.secret").write_text(g.Vault.new_secret())
    assert site.run("restore", "b.tar.gz") == 1

    assert ledger.startswith(f"error: {site.folder}/usage/{LEDGER_FILES[0]} is there already; --force")
    assert site.err.startswith(f"error: {site.folder}/gateway.secret is there already; --force")
    assert list(Path("usage").iterdir()) == []


async def test_a_gateway_that_runs_keeps_a_restore_away(site, backup, start_process):
    """
    It would go on writing into files that are moved, with counters of something else: by its lock, even while it hangs.
    """
    process = start_process(site.folder)
    os.kill(process.process.pid, signal.SIGSTOP)
    os.waitpid(process.process.pid, os.WUNTRACED)  # noqa: ASYNC222 - until it stands still
    before = everything(site.folder)

    code, after = site.run("restore", "b.tar.gz", "--force"), everything(site.folder)
    os.kill(process.process.pid, signal.SIGCONT)

    assert (code, site.err) == (
        1,
        "error: a gateway runs on this ledger: stop it first; nothing was restored\n",
    )
    assert after == before
    assert process.end()[0] == 0
    assert site.run("restore", "b.tar.gz", "--force") == 0


def test_no_gateway_starts_into_a_restore(tmp_path, clock):
    """
    It would count half a ledger.
    """
    held = g.hold_folder(tmp_path)

    with pytest.raises(
        OSError, match="another gateway runs on it, or a backup is being restored there: end that first"
    ):
        g.Ledger(tmp_path, 0, clock.clock).hold()
    os.close(held)


def test_a_secret_that_does_not_open_the_config_is_found_before_anything_is_put_in_place(site, monkeypatch):
    """
    None, another one, one in the environment: each is told with what would help.
    """
    secret = Path("gateway.secret").read_text()
    site.run("backup", "with.tar.gz")
    site.run("backup", "without.tar.gz", "--without-secret")
    restore = ("--config", "new/config.yaml", "restore")

    assert site.run(*restore, "without.tar.gz") == 1
    none = site.err
    monkeypatch.setenv("GATEWAY_SECRET", g.Vault.new_secret())
    assert site.run(*restore, "with.tar.gz") == 1
    another = site.err

    assert none.startswith("error: the backup's config does not work here, nothing was restored: ")
    assert "(the sealing secret is not in the backup: it must be here before)\n" in none
    assert "was sealed with another secret than the one in GATEWAY_SECRET. Restore the secret" in another
    assert list(Path("new").iterdir()) == []
    monkeypatch.setenv("GATEWAY_SECRET", secret)
    assert site.run(*restore, "with.tar.gz") == 0
    assert sorted(path.name for path in Path("new").iterdir()) == ["config.yaml", "usage"]


def test_a_chain_that_was_broken_before_is_restored_as_it_was(site):
    """
    Who has lost the host has lost enough; the warning names the line.
    """
    broken = Path("usage/usage-2026-08.jsonl")
    broken.write_text(broken.read_text().replace("alice", "mallory", 1))
    site.run("backup", "b.tar.gz")

    assert site.run("--config", "new/config.yaml", "restore", "b.tar.gz") == 0

    assert "warning: the ledger's chain was broken before the backup: usage-2026-08.jsonl:1: does not foll" in site.err
    assert everything(Path("new/usage")) == everything(Path("usage"))


def test_a_config_that_is_mounted_alone_is_not_replaced(mounted, shell):
    """
    As with `docker -v config.yaml`: nothing can take its place, and what to do is said.
    """
    shell.run("init", "--config", "other/config.yaml")
    shell.run("backup", "b.tar.gz", "--config", "other/config.yaml")
    (mounted / "usage").mkdir()
    before = everything(mounted)

    assert shell.run("restore", "b.tar.gz", "--force", "--config", str(mounted / "config.yaml")) == 1

    why = "is mounted as a single file, and cannot be replaced: mount its folder instead; nothing was restored"
    assert shell.err == f"error: {mounted}/config.yaml {why}\n"
    assert everything(mounted) == before


# Backups that are not what they should be


def refused(site: Shell, data: bytes) -> str:
    """What restore says of these bytes, having put nothing in place."""
    Path("bad.tar.gz").write_bytes(data)
    before = everything(site.folder)
    assert site.run("--config", "new/config.yaml", "restore", "bad.tar.gz") == 1
    after = everything(site.folder)
    assert {name for name in after if name not in ("new",)} == set(before)
    assert (
        site.err.count("\n") == site.err.count("error: ") + site.err.count(" lines\n") and "Traceback" not in site.err
    )
    shutil.rmtree("new", ignore_errors=True)
    return site.err


def test_a_backup_that_is_damaged_anywhere_is_refused(site, backup):
    """
    Cut, or a byte flipped: it is refused, or (in gzip's own bits, and in zeros at the end) all is as it was.
    """
    data, wanted = backup.read_bytes(), everything(Path("usage"))
    places = range(0, len(data), max(1, len(data) // 20))
    flipped = [data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :] for place in places]
    codes = []

    for damaged in [*flipped, *(data[:place] for place in places)]:
        Path("bad.tar.gz").write_bytes(damaged)
        codes.append(site.run("--config", "new/config.yaml", "restore", "bad.tar.gz"))
        assert ("nothing was restored" in site.err) == codes[-1]
        assert everything(Path("new/usage")) == ({} if codes[-1] else wanted)
        assert codes[-1] == 0 or list(Path("new").iterdir()) == []
        shutil.rmtree("new")
    assert set(codes) <= {0, 1} and codes.count(0) <= 6


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/tmp/evil",
        "usage/../../evil",
        "usage/",
        "evil",
        "usage/usage-2026-09.jsonl\n",
        "usage/upstream.reset",
    ],
)
def test_foreign_names_are_refused(site, backup, name):
    """
    Though their digests are right.
    """
    files = signed(unpacked(backup) | {name: b"evil"})

    assert f"{name!a} does not belong into a backup" in refused(site, packed(files))
    assert not Path("/tmp/evil").exists() and not list(site.folder.parent.glob("evil"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_only_plain_files_are_taken(site, backup, kind):
    """
    A link would lead elsewhere.
    """

    def change(info: tarfile.TarInfo) -> None:
        if info.name == "usage/usage-2026-08.jsonl":
            info.type, info.linkname = kind, "/etc/passwd"

    assert "nothing was restored" in refused(site, packed(unpacked(backup), change))


def test_what_does_not_have_the_digests_at_the_end_is_refused(site, backup):
    """
    Changed before it was packed, so that gzip's checksum is right; more than that, or less.
    """
    files = unpacked(backup)
    sums = files.pop("SHA256SUMS")
    more = {"usage/usage-2026-10.jsonl": b"evil"}
    name = "usage/usage-2026-09.jsonl"
    changed = {name: files[name].replace(b"alice", b"malic", 1)}

    assert "no whole backup" in refused(site, packed(files | changed | {"SHA256SUMS": sums}))
    assert "no whole backup" in refused(site, packed(files | more | {"SHA256SUMS": sums}))
    assert "no whole backup" in refused(site, packed(files | {"SHA256SUMS": sums} | more))
    assert "no whole backup" in refused(site, packed(signed({"manifest.json": files["manifest.json"]})))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 2}, "its format is 2, this gateway (0.1.0) knows 1; nothing was restored"),
        ({"chain": 3}, "bad.tar.gz is damaged, or no backup: Expected `str`, got `int`"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(site, backup, change, problem):
    """
    A later gateway may write others.
    """
    files = unpacked(backup)
    manifest = json.loads(files["manifest.json"]) | change

    assert problem in refused(site, packed(signed(files | {"manifest.json": json.dumps(manifest).encode()})))


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", gzip.compress(b""), gzip.compress(b"hello"), packed({"a": b""})],
    ids=["empty", "text", "nothing packed", "text packed", "another file packed"],
)
def test_what_is_no_backup_at_all_is_said_to_be_none(site, data):
    """
    The wrong file, named in a hurry.
    """
    assert "nothing was restored" in refused(site, data)


@needs_mount
def test_a_ledger_on_another_disk_is_put_there_whole_or_not_at_all(site, backup):
    """
    A rename does not reach it; and where the disk fills up, things are as they were.
    """
    disk = site.folder / "disk"
    disk.mkdir()
    assert mount_small_disk(disk)
    restore = ("--config", "new/config.yaml", "restore", "b.tar.gz")
    try:
        config = site.config + f"usage: {{directory: {disk}/usage}}\n"
        files = {name: data for name, data in unpacked(backup).items() if "jsonl" not in name}
        files |= {"config.yaml": config.encode(), "usage/usage-2025-00.torn": b"x"}
        backup.write_bytes(packed(signed(files)))
        assert site.run(*restore) == 0
        before = everything(site.folder)

        many = {f"usage/usage-2025-{number:02}.torn": b"y" for number in range(20)}
        backup.write_bytes(packed(signed(files | many)))
        assert site.run(*restore, "--force") == 1

        assert site.err.endswith(": No space left on device; nothing was restored\n")
        assert everything(site.folder) == before | {"b.tar.gz": backup.read_bytes()}
        assert before["disk/usage/usage-2025-00.torn"] == b"x"
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


async def test_a_gateway_that_runs_on_another_folder_keeps_a_restore_away_too(site, backup, start_process):
    """
    What counts is the config that is there, and not only the backup's.
    """
    site.write(site.config + "usage: {directory: usage2}\n")
    start_process(site.folder)

    code = site.run("restore", str(backup), "--force")

    assert (code, "a gateway runs on this ledger" in site.err) == (1, True)


def test_a_file_of_a_backup_that_is_mostly_holes_or_too_large_is_not_unpacked(site):
    """
    441 bytes had written 3 GB before their digest was looked at.
    """
    for name, size in (("config.yaml", 17 << 20), ("SHA256SUMS", 17 << 20)):
        assert "does not belong into a backup" in refused(site, packed({name: bytes(size)}))


def test_a_start_after_a_restore_that_was_killed_makes_no_demo(site):
    """
    A supervisor starts the gateway again: it would serve a new key instead of the old ones.
    """
    (site.folder / "config.yaml").unlink()
    (site.folder / ".restore-abc").mkdir()

    assert site.run("serve") == 1
    assert "run the restore again" in site.err and not (site.folder / "config.yaml").exists()
