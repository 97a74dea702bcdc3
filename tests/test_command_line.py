"""The command line: init, check, key, seal, usage; what they write, print and return."""

from __future__ import annotations

import datetime as dt
import errno
import io
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from conftest import KEY
from hypothesis import given, settings
from hypothesis import strategies as st

import gateway as g

HASH, HASH2 = ("sha256:" + digit * 64 + ":last" for digit in "12")
ALICE = f"""\
upstreams:
  - name: demo
    format: demo

keys:
  - name: alice  # the boss
    key: {HASH}
# the end
"""
WHOLE = "expected a whole number such as 1000, at most 1,000,000,000,000,000 either way"
A_KEY = re.compile(r"sk-proxy-[A-Za-z0-9]{32}")
PLAIN = "sk-ant-0123456789abcdef"


class Shell:
    """A folder to run commands in, and what they said."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.out = self.err = ""

    def run(self, *arguments: str) -> int:
        """Run a command in this process; its exit code."""
        self._capsys.readouterr()
        code = g.main(arguments)
        self.out, self.err = self._capsys.readouterr()
        return code

    def write(self, text: str) -> None:
        """Write config.yaml."""
        (self.folder / "config.yaml").write_text(text)

    def errors(self) -> str:
        """What was printed to stderr since."""
        return self._capsys.readouterr().err

    @property
    def config(self) -> str:
        """The text of config.yaml."""
        return (self.folder / "config.yaml").read_text()

    def keys(self) -> dict[str, g.Key]:
        """The keys of config.yaml by name."""
        return {key.name: key for key in g.Config.load(self.folder / "config.yaml").keys}

    def files(self) -> dict[str, bytes]:
        """Every file of the folder with what is in it."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}


@pytest.fixture
def shell(tmp_path, capsys, monkeypatch) -> Shell:
    """A shell in an empty folder, without variables of ours."""
    for name in ("GATEWAY_CONFIG", "GATEWAY_SECRET", "GATEWAY_SECRET_FILE", "GATEWAY_HOST", "GATEWAY_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path, capsys)


# init


def test_init_writes_a_config_a_secret_and_one_key(shell):
    """
    The key is shown once, only its hash is kept; the secret is for its owner alone.
    """
    assert shell.run("init") == 0

    (key,) = A_KEY.findall(shell.out)
    assert shell.out == (
        f"Wrote {shell.folder}/config.yaml, the sealing secret, and a key for you:\n\n  {key}\n\n"
        "It is shown once. Start the gateway with: gateway.py serve\n"
    )
    assert sorted(shell.files()) == ["config.yaml", "gateway.secret"]
    assert key not in shell.config and f"    key: {g.seal_key(key)}\n" in shell.config
    assert stat.S_IMODE(os.stat("gateway.secret").st_mode) == 0o600
    assert not stat.S_IMODE(os.stat("config.yaml").st_mode) & 0o007
    config, vault = g.Config.load(shell.folder / "config.yaml"), g.Vault.open(shell.folder)
    assert (config.keys.find([key]).name, config.server.port, config.warnings) == ("me", 8000, [])
    assert vault.unseal(vault.seal(PLAIN)) == PLAIN


def test_a_second_init_changes_nothing(shell):
    """
    Whoever has a config keeps it, and their key with it.
    """
    shell.run("init")
    before = shell.files()

    assert shell.run("init") == 1

    assert shell.err == f"error: {shell.folder}/config.yaml is there already; nothing was changed\n"
    assert shell.files() == before


def test_init_makes_no_secret_where_the_environment_has_one(shell, monkeypatch):
    """
    GATEWAY_SECRET from the container's platform: nothing to keep on the disk.
    """
    monkeypatch.setenv("GATEWAY_SECRET", g.Vault.new_secret())

    assert shell.run("init") == 0

    assert list(shell.files()) == ["config.yaml"]


def test_init_puts_the_secret_where_the_environment_says(shell, monkeypatch):
    """
    GATEWAY_SECRET_FILE names it; a secret that is there already stays.
    """
    place = shell.folder / "run" / "secrets" / "gateway"
    monkeypatch.setenv("GATEWAY_SECRET_FILE", str(place))

    assert shell.run("init", "--config", "a/config.yaml") == 0
    first = place.read_text()
    assert shell.run("init", "--config", "b/config.yaml") == 0

    assert place.read_text() == first
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert os.listdir("a") == os.listdir("b") == ["config.yaml"]


def test_init_says_why_it_cannot_write(shell):
    """
    A path through a file, a disk that is read-only.
    """
    shell.write("")

    assert shell.run("init", "--config", "config.yaml/below/config.yaml") == 1

    assert re.fullmatch(r"error: cannot write .*/config\.yaml/below/gateway\.secret: .*\n", shell.err)


# check


PASTED = "sk-ant-api03-" + "aB3-" * 10 + "x"


def test_check_prints_what_the_config_means(shell, monkeypatch):
    """
    Upstreams, keys, models and warnings, in one look and without a secret.
    """
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    shell.write(f"""
server: {{host: 0.0.0.0, port: 9000, timezone: UTC}}
upstreams:
  - name: anthropic
    url: https://api.anthropic.com
    api_key: {PLAIN}
    models: {{"claude-opus-*": big, "claude-*": "*"}}
  - name: openai
    url: https://api.openai.com
    api_key: ["${{OPENAI_API_KEY}}", "${{OPENAI_API_KEY}}-2"]
    format: openai
    models: ["", "gpt-*"]
    priority: 2
  - name: open
    url: http://10.0.0.1:8080/v1
    priority: 3
    weight: 0.5
  - {{name: demo, format: demo}}
prices:
  unknown: refuse
  "claude-*": {{input: 3, output: 15}}
  "gpt-*": {{input: 1, output: 4}}
  "*": {{input: 10, output: 50}}
keys:
  - name: alice
    key: {KEY}
    limits: {{usd/day: 20, tokens/month: 50M, requests: 1.5k, concurrent: 16}}
    models: ["claude-*", ""]
    expires: 2999-12-31
    allow_ips: [10.0.0.0/8, 192.0.2.7]
  - {{name: bob, key: {HASH}, enabled: false, expires: 2001-01-01}}
  - {{name: carol, key: {HASH2}, expires: 2001-01-01}}
""")
    path = shell.folder / "config.yaml"
    path.chmod(0o644)
    digest = g.Config.load(path).digest

    assert shell.run("check") == 0

    assert (
        shell.out
        == f"""\
{shell.folder}/config.yaml is good (digest {digest})

listens on 0.0.0.0:9000, time zone UTC, ledger in {shell.folder}/usage

upstreams, of those that serve a model the lowest priority is asked:
  anthropic: anthropic https://api.anthropic.com, models claude-opus-* as big, claude-*, priority 1, weight 1, 1 API key
  demo: demo, models *, priority 1, weight 1, built in, needs no API key
  openai: openai https://api.openai.com, models "", gpt-*, priority 2, weight 1, 2 API keys
  open: anthropic http://10.0.0.1:8080/v1, models *, priority 3, weight 0.5, 0 API keys

prices: 3 rows; a model without one: refuse

keys:
  alice (…stuv): enabled, works through 2999-12-31, from 10.0.0.0/8, 192.0.2.7/32, models claude-*, "", \
limits usd/day 20, tokens/month 50,000,000, requests 1,500, concurrent 16
  bob (…last): disabled, worked through 2001-01-01, models *, limits none
  carol (…last): expired, worked through 2001-01-01, models *, limits none

warnings:
  line 6: upstreams[0].api_key: is in clear text: run `gateway.py seal`
  line 26: keys[0].key: is in clear text: run `gateway.py seal`
  {path} can be read by every user of this host, and so is what is in clear text in it: chmod 640 {path}
  line 32: keys[2].expires: is over: the key works no more
"""
    )
    assert shell.err == ""


@pytest.mark.parametrize(("host", "why"), [("192.0.2.7", "assign requested address"), ("gateway.invalid", "known")])
def test_a_host_that_this_machine_has_not_is_told_at_the_start(shell, host, why):
    """
    Often it is the public name, which belongs to a proxy in front.
    """
    shell.write(f"server:\n  port: 0\n  host: {host}\nupstreams: [{{name: demo, format: demo}}]\n")
    remedy = "127.0.0.1 is for this host alone, 0.0.0.0 for others, too; a proxy's name belongs into server.url"

    assert shell.run("serve") == 1

    assert shell.err.startswith(f"error: cannot listen on {host}:0: ") and why in shell.err
    assert shell.err.endswith(f"; set server.host: {remedy}\n")


def test_check_masks_a_key_that_was_pasted_under_models(shell):
    """
    A model's own name is shown, however long.
    """
    shell.write(f"""
upstreams:
  - {{name: demo, format: demo, models: {{"{PASTED}": "*", "claude-*": "AIza{"b" * 30}"}}}}
keys: [{{name: alice, key: {KEY}, models: ["{PASTED}", "anthropic.claude-3-5-sonnet-20241022-v2:0"]}}]
""")

    for command in ("check", "key list"):
        assert shell.run(*command.split()) == 0
        assert PASTED not in shell.out and "b" * 30 not in shell.out and f"models {'*' * len(PASTED)}" in shell.out
        assert "anthropic.claude-3-5-sonnet-20241022-v2:0" in shell.out


def test_check_says_that_without_keys_nobody_can_call(shell):
    """
    A config may be good and of no use.
    """
    shell.write("upstreams: [{name: demo, format: demo}]\n")

    assert shell.run("check") == 0

    assert shell.out.endswith("\nkeys:\n  none: nobody can call; gateway.py key add NAME\n")


@pytest.mark.parametrize("command", ["check", "usage", "seal", "key list", "key add a", "key rotate a", "key revoke a"])
def test_without_a_config_every_command_says_how_to_make_one(shell, command):
    """
    A typo in a path must not be answered with an empty report.
    """
    assert shell.run(*command.split(), "--config", "nowhere/config.yaml") == 1

    assert shell.err == f"error: {shell.folder}/nowhere/config.yaml: no such file; `gateway.py init` makes one\n"


def test_the_config_is_the_options_else_the_environments_else_the_working_directorys(shell, monkeypatch):
    """
    `--config` may stand before the command, behind it, and in between.
    """
    for name in ("option", "variable", "config"):
        (shell.folder / f"{name}.yaml").write_text(ALICE.replace("alice", name))

    assert shell.run("key", "list") == 0 and "  config (…last)" in shell.out
    monkeypatch.setenv("GATEWAY_CONFIG", "variable.yaml")
    assert shell.run("key", "list") == 0 and "  variable (…last)" in shell.out
    for arguments in (
        ["--config", "option.yaml", "key", "list"],
        ["key", "list", "--config", "option.yaml"],
        ["key", "--config", "option.yaml", "list"],
    ):
        assert shell.run(*arguments) == 0 and "  option (…last)" in shell.out


# key add, list, rotate, revoke


def test_key_add_shows_a_key_once_and_keeps_its_hash(shell):
    """
    With what its holder has to set, ready to be copied.
    """
    shell.write(ALICE)

    assert shell.run("key", "add", "bob") == 0

    key = A_KEY.findall(shell.out)[0]
    assert (
        shell.out
        == f"""\
bob's key, shown only now:

  {key}

For Claude Code:

  export ANTHROPIC_BASE_URL=http://127.0.0.1:8000
  export ANTHROPIC_AUTH_TOKEN={key}
"""
    )
    added = f"  - name: bob\n    key: {g.seal_key(key)}\n"
    assert shell.config == ALICE.replace("# the end\n", added + "# the end\n")


@pytest.mark.parametrize(
    "url", ["https://gateway.example.com", "https://gateway.example.com/", "http://proxy:81/claude/"]
)
def test_what_users_are_to_set_is_the_public_address(shell, url):
    """
    Behind a proxy the gateway's own address is of use to nobody else. The greeting still says where it listens.
    """
    shell.write(f"server: {{url: '{url}'}}\n" + "upstreams: [{name: demo, format: demo}]\n")

    shell.run("key", "add", "alice")
    added = shell.out
    greeting = g.greeting(g.Config.load(shell.folder / "config.yaml"), 8123, "")

    line = f"  export ANTHROPIC_BASE_URL={url.rstrip('/')}\n"
    assert line in added and line in greeting
    assert greeting.startswith(f"claude-gateway {g.VERSION} listens on http://127.0.0.1:8123 (config.yaml)\n")


def test_the_greeting_says_make_a_key_only_where_there_is_none(shell):
    """
    Else it says how to make another.
    """
    demo = "upstreams: [{name: demo, format: demo}]\n"
    greetings = []
    for keys in ("", f"keys: [{{name: alice, key: {HASH}}}]\n"):
        shell.write(demo + keys)
        greetings.append(g.greeting(g.Config.load(shell.folder / "config.yaml"), 8123, ""))

    assert f"\nMake a key: {g.PROGRAM} key add NAME\n" in greetings[0]
    assert f"\nAnother key: {g.PROGRAM} key add NAME\n" in greetings[1] and "Make a key" not in greetings[1]


def test_key_add_writes_limits_models_and_the_last_day(shell):
    """
    What the options say stands in the file as a person would write it.
    """
    shell.write(ALICE)
    limits = ["--limit", "usd/day=20", "--limit", "tokens/month=50M", "--limit", "concurrent=16"]

    assert (
        shell.run(
            "key", "add", "bob", *limits, "--model", "claude-*", "--model", "gpt-6-sol", "--expires", "2999-12-31"
        )
        == 0
    )

    (written,) = re.findall(r"key: sha256:\w+:\w+\n(    limits:.*?)# the end", shell.config, re.DOTALL)
    assert re.sub(r'"', "", written) == (
        "    limits: {usd/day: 20, tokens/month: 50M, concurrent: 16}\n"
        "    models: [claude-*, gpt-6-sol]\n"
        "    expires: 2999-12-31\n"
    )
    bob = shell.keys()["bob"]
    assert bob.models == ("claude-*", "gpt-6-sol")
    assert bob.budgets[0] == g.Budget(
        "key", "bob", (g.Limit("usd", g.WINDOWS["day"], 20.0), g.Limit("tokens", g.WINDOWS["month"], 50e6)), 16.0
    )


NAMES = ["bob", "Zoë", "张伟", "😀", "bob@example.org", "Bob B. & co", "null", "12", "-", "a: b", "#1"]


@pytest.mark.parametrize("name", [*NAMES, "it's", 'say "hi"', "{a}", "*"])
def test_a_key_may_have_any_name_that_can_be_read(shell, name):
    """
    Teams are named by people; what YAML would misread is put in quotes, and what is readable stays so.
    """
    shell.write(ALICE)

    assert shell.run("key", "add", "--", name) == 0

    assert list(shell.keys()) == ["alice", name]
    assert name.replace('"', '\\"') in shell.config
    assert shell.run("key", "revoke", "--", name) == 0
    assert not shell.keys()[name].enabled


@settings(deadline=None)
@given(st.text().filter(str.isprintable))
def test_any_text_can_be_written_into_yaml(text):
    """
    As a value on a line of its own and between braces.
    """
    written = g.yaml_scalar(text)

    assert yaml.safe_load(f"a: {written}") == {"a": text}
    assert yaml.safe_load(f"{{a: {written}, b: 1}}") == {"a": text, "b": 1}


def test_key_add_works_for_a_last_day_with_a_time(shell):
    """
    As people write it, without seconds.
    """
    shell.write(ALICE)

    assert shell.run("key", "add", "bob", "--expires", "2999-12-31 12:00") == 0

    assert shell.keys()["bob"].expires_at == dt.datetime(2999, 12, 31, 12, tzinfo=dt.UTC).timestamp()


def test_key_add_puts_a_key_into_a_team_that_there_is(shell):
    """
    Another name is refused with what there is, and changes nothing.
    """
    text = "teams: [{name: red}, {name: the blues}]\n" + ALICE
    shell.write(text)

    assert shell.run("key", "add", "bob", "--team", "reds") == 1
    assert (shell.err, shell.config) == ("error: there is no team named 'reds', did you mean red?\n", text)
    assert shell.run("key", "add", "bob", "--team", "the blues") == 0
    assert shell.keys()["bob"].team == "the blues"
    shell.write(ALICE)
    assert shell.run("key", "add", "bob", "--team", "red") == 1
    assert shell.err == "error: there is no team named 'red'; there are: none\n"


def test_key_add_refuses_a_date_that_is_over(shell):
    """
    By the config's time zone: a key ends with its last day there.
    """
    text = "server: {timezone: Pacific/Kiritimati}\n" + ALICE
    shell.write(text)
    today = dt.datetime.now(zoneinfo.ZoneInfo("Pacific/Kiritimati")).date()
    yesterday = f"{today - dt.timedelta(days=1)}"

    for day in ("2020-01-01", yesterday, "2020-01-01 12:00"):
        assert shell.run("key", "add", "eve", "--expires", day) == 1
        assert shell.err == f"error: expires: {day} is over, the key would never work\n"
    assert shell.config == text
    assert shell.run("key", "add", "eve", "--expires", f"{today + dt.timedelta(days=1)}") == 0


def test_a_key_is_shown_with_its_last_day_or_its_moment(shell):
    """
    As it is written in the config, whatever its time zone.
    """
    shell.write("server: {timezone: Europe/Berlin}\n" + ALICE)
    assert shell.run("key", "add", "bob", "--expires", "2999-01-31") == 0
    assert shell.run("key", "add", "carol", "--expires", "2999-01-31 12:00") == 0

    assert shell.run("key", "list") == 0

    assert "enabled, works through 2999-01-31, models" in shell.out
    assert "enabled, expires 2999-01-31 11:00 UTC, models" in shell.out


def test_key_list_tells_each_keys_state(shell):
    """
    As `check` does; and what to do when there is none.
    """
    shell.write(ALICE)
    assert shell.run("key", "list") == 0
    assert shell.out == "  alice (…last): enabled, models *, limits none\n"

    shell.write("upstreams: [{name: demo, format: demo}]\nkeys: []\n")
    assert shell.run("key", "list") == 0
    assert shell.out == "  none: gateway.py key add NAME makes one\n"


def test_key_rotate_gives_a_new_key_and_touches_one_line(shell):
    """
    The old one ends now; limits, models and comments stay.
    """
    shell.write(ALICE)

    assert shell.run("key", "rotate", "alice") == 0

    (key,) = A_KEY.findall(shell.out)
    assert shell.out == f"alice's new key, shown only now; it takes the old one's place:\n\n  {key}\n"
    assert shell.config == ALICE.replace(HASH, g.seal_key(key))


def test_key_revoke_disables_a_key_and_touches_nothing_else(shell):
    """
    Its name stays for the ledger, and it can come back.
    """
    shell.write(ALICE)

    assert shell.run("key", "revoke", "alice") == 0

    assert shell.out == "alice's key is revoked. `enabled: true` in config.yaml brings it back.\n"
    assert shell.config == ALICE.replace("# the end", "    enabled: false\n# the end")


MISTAKES = {
    "an unknown limit": "limits: {usd/dya: 5}",
    "a date that is none": "expires: 2027-13-45",
    "a number that is none": "team: !!int abc",
    "an unknown tag": "team: !foo bar",
    "a variable that is not set": "team: ${NOT_SET_ANYWHERE}",
    "a setting given twice": "team: a\n    team: b",
    "a merged mapping": "<<: {team: a}",
    "a list for a text": "team: [a]",
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_key_is_revoked_beside_somebody_elses_mistake(shell, mistake):
    """
    A mistake elsewhere does not keep a key in use that has been stolen; it is told.
    """
    bad = ALICE.replace("# the end", f"  - name: bob\n    key: {HASH2}\n    {mistake}\n# the end")
    shell.write(bad)

    assert shell.run("key", "revoke", "alice") == 0

    assert shell.out.startswith("alice's key is revoked.")
    assert "But the file has a mistake" in shell.out
    assert shell.config == bad.replace("  - name: bob", "    enabled: false\n  - name: bob")


def test_a_key_revoked_twice_is_revoked_once(shell):
    """
    The line that is there is used.
    """
    shell.write(ALICE)
    shell.run("key", "revoke", "alice")
    once = shell.config

    assert shell.run("key", "revoke", "alice") == 0

    assert shell.config == once


# seal

UNSEALED = f"""\
upstreams:
  - name: anthropic  # the first
    url: https://a.test
    api_key: {PLAIN}-1  # from the console
  - {{name: other, url: "https://b.test", api_key: '{PLAIN}-2'}}
  - name: environment
    url: https://c.test
    api_key: ${{C_KEY}}
  - name: half
    url: https://d.test
    api_key: sk-${{C_KEY}}
  - name: none
    url: https://e.test

keys:
  - name: alice
    key: "{KEY}"  # plain
  - name: bob
    key: {HASH}
"""


def test_seal_turns_every_plain_secret_into_its_sealed_form(shell, monkeypatch):
    """
    Upstream keys are encrypted, users' keys hashed; what is sealed or comes from the environment stays.
    """
    monkeypatch.setenv("C_KEY", "sk-environment")
    shell.run("init")
    shell.write(UNSEALED)

    assert shell.run("seal") == 0

    assert shell.out == "Sealed: upstreams[0].api_key, upstreams[1].api_key, keys[0].key\n"
    first, second = re.findall(r"enc:[\w=-]+", shell.config)
    assert shell.config == (
        UNSEALED.replace(f"{PLAIN}-1", first).replace(f"'{PLAIN}-2'", second).replace(f'"{KEY}"', g.seal_key(KEY))
    )
    config = g.Config.load(shell.folder / "config.yaml")
    assert [upstream.api_key for upstream in config.upstreams] == [
        (f"{PLAIN}-1",),
        (f"{PLAIN}-2",),
        ("sk-environment",),
        ("sk-sk-environment",),
        (),
    ]
    assert config.keys.find([KEY]).name == "alice"
    assert [warning.partition(": there")[0] for warning in config.warnings] == ["line 12: upstreams[4].api_key"]
    assert sorted(shell.files()) == ["config.yaml", "gateway.secret"]


LAYOUTS = {  # how a secret may be written, and where `seal` says that it is
    "braces": (f"- {{name: a, url: https://a.test, api_key: {PLAIN}}}\n", ".api_key"),
    "a list": (f"- {{name: a, url: https://a.test, api_key: [{PLAIN}]}}\n", ".api_key[0]"),
    "lines of its own": (f"- name: a\n  api_key: >-\n    {PLAIN}\n  # b\n  url: https://a.test\n", ".api_key"),
    "a token's header": (
        f"- {{name: a, format: demo, headers: {{set: {{X-Token: {PLAIN}}}}}}}\n",
        ".headers.set.X-Token",
    ),
    "a header named key": (f"- {{name: a, format: demo, headers: {{set: {{key: {PLAIN}}}}}}}\n", ".headers.set.key"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_secret_is_sealed_wherever_and_however_it_is_written(shell, name):
    """
    What goes upstream is encrypted, not hashed: it must open again. A second `seal` finds nothing.
    """
    written, place = LAYOUTS[name]
    text = "# first\nupstreams:\n" + written + "  # last\n"
    shell.run("init")
    shell.write(text)

    assert shell.run("seal") == 0
    assert shell.out == f"Sealed: upstreams[0]{place}\n"
    sealed = shell.config
    assert shell.run("seal") == 0
    assert shell.out == "Nothing to seal: no secret stands there in clear text.\n"

    (secret,) = re.findall(r"enc:[\w=-]+", sealed)
    assert shell.config == sealed == text.replace(f">-\n    {PLAIN}", PLAIN).replace(PLAIN, secret)
    config = g.Config.load(shell.folder / "config.yaml")
    assert [*config.upstreams[0].api_key, *config.upstreams[0].headers.set.values()] == [PLAIN]
    assert [warning for warning in config.warnings if "clear text" in warning] == []


def test_a_header_that_carries_no_secret_stays_readable(shell):
    """
    By its name.
    """
    text = "upstreams: [{name: a, format: demo, headers: {set: {x-team: red}}}]\n"
    shell.write(text)

    assert shell.run("seal") == 0

    assert shell.config == text


def test_seal_rotate_encrypts_with_the_newest_secret(shell):
    """
    The new secret goes on the first line; afterwards the old one can be removed.
    """
    old, new = g.Vault.new_secret(), g.Vault.new_secret()
    sealed = g.Vault([old], "").seal(PLAIN)
    text = f"upstreams: [{{name: a, url: https://a.test, api_key: {sealed}}}]  # a\n"
    shell.write(text)
    (shell.folder / "gateway.secret").write_text(f"{new}\n{old}\n")

    assert shell.run("seal", "--rotate") == 0

    (rotated,) = re.findall(r"enc:[\w=-]+", shell.config)
    assert shell.out == "Encrypted again with the newest secret: upstreams[0].api_key\n"
    assert rotated != sealed and shell.config == text.replace(sealed, rotated)
    (shell.folder / "gateway.secret").write_text(f"{new}\n")
    assert g.Config.load(shell.folder / "config.yaml").upstreams[0].api_key == (PLAIN,)


def test_seal_rotate_says_what_was_sealed_and_what_encrypted_again(shell):
    """
    What stood there in clear text is sealed as well. Users' keys are hashed: there is nothing to encrypt again.
    """
    shell.run("init")
    before = shell.config

    assert shell.run("seal", "--rotate") == 0
    assert (shell.out, shell.config) == ("Nothing to encrypt again: no secret there is sealed.\n", before)
    shell.write(f"upstreams:\n  - {{name: a, url: https://a.test, api_key: {PLAIN}}}\n")
    shell.run("seal")
    shell.write(shell.config + f"  - {{name: b, url: https://b.test, api_key: {PLAIN}}}\n")

    assert shell.run("seal", "--rotate") == 0

    assert shell.out == ("Sealed: upstreams[1].api_key\nEncrypted again with the newest secret: upstreams[0].api_key\n")
    assert [upstream.api_key for upstream in g.Config.load(shell.folder / "config.yaml").upstreams] == [(PLAIN,)] * 2


def test_seal_makes_the_secret_where_there_is_none(shell):
    """
    A config that was copied from the example has no secret beside it.
    """
    shell.write(f"upstreams: [{{name: a, url: https://a.test, api_key: {PLAIN}}}]\n")

    assert shell.run("seal") == 0

    assert shell.out == (
        f"Made the sealing secret {shell.folder}/gateway.secret: keep a copy elsewhere, "
        "nothing else opens what is sealed with it.\nSealed: upstreams[0].api_key\n"
    )
    assert PLAIN not in shell.config
    assert g.Config.load(shell.folder / "config.yaml").upstreams[0].api_key == (PLAIN,)
    assert stat.S_IMODE(os.stat("gateway.secret").st_mode) == 0o600


def test_a_lost_secret_is_answered_with_what_helps_and_that_helps(shell):
    """
    The sealed key cannot be opened by any command, and no new secret is made beside it: it would not open it either.
    """
    shell.write(f"upstreams: [{{name: a, url: https://a.test, api_key: {PLAIN}}}]\n")
    shell.run("seal")
    sealed = shell.config
    os.unlink("gateway.secret")

    told = []
    for command in (["check"], ["serve"], ["seal"], ["seal", "--rotate"]):
        assert shell.run(*command) == 1
        told.append(shell.err)

    assert set(told) == {
        f"error: {shell.folder}/config.yaml:1: upstreams[0].api_key: cannot be opened: there is no sealing secret in "
        f"{shell.folder}/gateway.secret. Restore the secret that it was sealed with (its file, or GATEWAY_SECRET), "
        "or put the value here in clear text and run `gateway.py seal`\n"
    }
    assert list(shell.files()) == ["config.yaml"]
    shell.write(re.sub(r"enc:[^}]+", PLAIN, sealed))
    assert shell.run("seal") == 0
    assert g.Config.load(shell.folder / "config.yaml").upstreams[0].api_key == (PLAIN,)


@pytest.mark.parametrize("key", [KEY + "a,b}", KEY + "abc:", KEY + "[a]b", KEY + "a'b#", KEY + '\\"{&*', "?" * 20])
@pytest.mark.parametrize("written", ["  - name: alice\n    key: {}\n", "  - {{name: alice, key: {}}}\n"])
def test_any_plain_key_can_be_sealed_whatever_its_last_characters(shell, key, written):
    """
    They stand in the sealed form, and YAML has its own idea of brackets and colons.
    """
    shell.write("upstreams: [{name: demo, format: demo}]\nkeys:\n" + written.format(json.dumps(key)))

    assert shell.run("seal") == 0

    assert shell.keys()["alice"].last4 == key[-4:]
    assert g.Config.load(shell.folder / "config.yaml").keys.find([key]).name == "alice"


def test_seal_through_a_symlink_uses_the_secret_that_the_gateway_uses(shell):
    """
    The gateway looks beside the path that it was started with; a key sealed with another secret stops it.
    """
    shell.run("init")
    (shell.folder / "repository").mkdir()
    (shell.folder / "repository" / "config.yaml").write_text(
        f"upstreams: [{{name: a, url: https://a.test, api_key: {PLAIN}}}]\n"
    )
    os.unlink("config.yaml")
    os.symlink("repository/config.yaml", "config.yaml")

    assert shell.run("seal") == 0

    assert os.path.islink("config.yaml")
    assert g.Config.load(shell.folder / "config.yaml").upstreams[0].api_key == (PLAIN,)


@pytest.fixture
def mounted(shell) -> Iterator[Path]:
    """A config with a plain secret that is a bind mount; the folder it is mounted in."""
    site, outside = shell.folder / "site", shell.folder / "outside.yaml"
    outside.write_text(f"upstreams: [{{name: a, url: https://a.test, api_key: {PLAIN}}}]\n")
    site.mkdir()
    (site / "config.yaml").touch()
    (site / "gateway.secret").write_text(g.Vault.new_secret())
    try:
        subprocess.run(["mount", "--bind", outside, site / "config.yaml"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("bind mounts need root")
    yield site
    subprocess.run(["umount", site / "config.yaml"], check=True)


def test_no_secret_stays_in_clear_text_when_a_bind_mounted_config_is_sealed(shell, mounted):
    """
    Whoever seals wants the plain secret off the disk; a copy made on the way is a copy.
    """
    assert shell.run("--config", str(mounted / "config.yaml"), "seal") == 0

    assert PLAIN not in (shell.folder / "outside.yaml").read_text()
    assert [path.name for path in mounted.iterdir() if PLAIN in path.read_text()] == []


# usage

ENTRY = g.Entry(
    time="2026-09-21T13:33:20.000Z",
    request_id="req_1",
    key="alice",
    team="",
    upstream="anthropic",
    model="claude-opus-5-5",
    model_served="claude-opus-5-5",
    path="/v1/messages",
    stream=True,
    status=200,
    outcome="completed",
    error_type="",
    attempts=1,
    input_tokens=1_000,
    output_tokens=200,
    cache_write_5m_tokens=300,
    cache_write_1h_tokens=400,
    cache_read_tokens=1_700,
    estimated=False,
    cost_usd=0.0125,
    price=g.Price(5, 25),
    first_byte_ms=200.0,
    duration_ms=1_500.0,
    bytes_up=4_000,
    bytes_down=3_000,
    session="s1",
    client="127.0.0.1",
    user_agent="claude-cli/2.1",
    upstream_request_id="req_2",
)


NO_TOKENS = dict.fromkeys((name for name in g.Entry.__struct_fields__ if name.endswith("_tokens")), 0)


def entry(**changes: object) -> g.Entry:
    """An entry like ENTRY, but for the changes."""
    return msgspec.structs.replace(ENTRY, **changes)


@pytest.fixture
def ledger(shell) -> Any:
    """Write entries as the gateway writes them, a file for each month."""
    shell.write("upstreams: [{name: demo, format: demo}]\nserver: {timezone: Asia/Shanghai}\n")
    (shell.folder / "usage").mkdir()

    def write(*entries: g.Entry) -> None:
        for one in entries:
            with open(shell.folder / "usage" / f"usage-{one.time[:7]}.jsonl", "ab") as file:
                file.write(msgspec.json.encode(one) + b"\n")

    return write


def test_usage_is_a_table_with_a_sum(shell, ledger):
    """
    Who spent what, on which day (of the server's time zone), with which model; failed calls are calls.
    """
    ledger(
        entry(),
        entry(cost_usd=1_234.5, output_tokens=1_000_000),
        entry(time="2026-09-21T16:00:00.000Z", key="bob", outcome="upstream_cut"),  # the 22nd in Shanghai
        entry(time="2026-10-01T00:00:00.000Z", key="bob", model="gpt-6-sol", cost_usd=0.0, **NO_TOKENS),
    )

    assert shell.run("usage") == 0

    assert (
        shell.out
        == """\
day         key    model            calls  failed  input  cache write  cache read     output         USD  cache hits
2026-09-21  alice  claude-opus-5-5      2       0  2,000        1,400       3,400  1,000,200  1,234.5125         50%
2026-09-22  bob    claude-opus-5-5      1       1  1,000          700       1,700        200      0.0125         50%
2026-10-01  bob    gpt-6-sol            1       0      0            0           0          0      0.0000           -
all                                     4       1  3,000        2,100       5,100  1,000,400  1,234.5250         50%
"""
    )


def test_usage_as_json_has_the_same_numbers(shell, ledger):
    """
    For scripts: numbers are numbers, and what cannot be computed is null.
    """
    ledger(entry(), entry(outcome="error", estimated=True))

    assert shell.run("usage", "--by", "key,model", "--json") == 0

    assert json.loads(shell.out) == [
        {
            "group": {"key": "alice", "model": "claude-opus-5-5"},
            "calls": 2,
            "failed": 1,
            "input_tokens": 2000,
            "output_tokens": 400,
            "cache_write_tokens": 1400,
            "cache_read_tokens": 3400,
            "cost_usd": 0.025,
            "cache_hit_rate": 0.5,
        }
    ]


def test_usage_as_csv_has_the_same_numbers(shell, ledger):
    """
    For spreadsheets: a header, and numbers without separators.
    """
    ledger(entry(output_tokens=1_000_000), entry(key="Zoë, “the boss”"))

    assert shell.run("usage", "--by", "key", "--csv") == 0

    assert shell.out.splitlines() == [
        "key,calls,failed,input_tokens,cache_write_tokens,cache_read_tokens,output_tokens,cost_usd,cache_hit_rate",
        '"Zoë, “the boss”",1,0,1000,700,1700,200,0.012500,0.5',
        "alice,1,0,1000,700,1700,1000000,0.012500,0.5",
    ]


def test_a_csv_cell_is_one_line_on_any_terminal(shell, ledger):
    """
    Line breaks, tabs and control characters of a name are shown as �.
    """
    ledger(entry(model="a\nb\r=1", session="\t=1\x1b[31m"))

    assert shell.run("usage", "--by", "model,session", "--csv") == 0

    assert shell.out.splitlines()[1].startswith("a�b�=1,�=1�[31m,1,0,")


@pytest.mark.parametrize(
    "name", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "＝1", "＋1", "－1", "＠1", '=cmd|"/c calc"!A1']
)
def test_a_csv_cell_is_never_a_formula(shell, ledger, name):
    """
    Models and sessions are named by clients, and the report is opened by whoever pays.
    """
    ledger(entry(model=name, session=name))

    assert shell.run("usage", "--by", "model,session", "--csv") == 0

    cell = "'" + name.replace('"', '""')
    cell = f'"{cell}"' if '"' in name else cell
    assert shell.out.split("\n", 1)[1].startswith(f"{cell},{cell},1,0,")


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ([], 4),
        (["--since", "2026"], 4),
        (["--since", "2026-09"], 3),
        (["--since", "2026-09-21"], 2),
        (["--since", "2026-09-21T13:33:20.001"], 1),
        (["--until", "2026-09"], 1),
        (["--until", "2026-09-21"], 2),
        (["--until", "2027"], 4),
        (["--since", "2026-09", "--until", "2026-10"], 2),
        (["--since", "2027"], 0),
    ],
)
def test_usage_of_a_time_counts_from_its_start_up_to_its_end(shell, ledger, options, calls):
    """
    A time may be given as year, month, day or moment (UTC); the end is not in.
    """
    times = ("2026-08-31T23:59:59", "2026-09-01T00:00:00", "2026-09-21T13:33:20", "2026-10-01T00:00:00")
    ledger(*(entry(time=f"{time}.000Z") for time in times))

    assert shell.run("usage", "--by", "key", "--json", *options) == 0

    assert sum(total["calls"] for total in json.loads(shell.out)) == calls


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("month", [{"month": "2026-09"}, {"month": "2026-10"}]),
        ("session", [{"session": "s1"}, {"session": "s2"}]),
        ("client", [{"client": "127.0.0.1"}]),
        ("session,month", [{"session": "s1", "month": "2026-09"}, {"session": "s2", "month": "2026-10"}]),
        ("key, month", [{"key": "alice", "month": "2026-09"}, {"key": "alice", "month": "2026-10"}]),
    ],
)
@pytest.mark.parametrize("shape", ["--json", "--csv", None])
def test_usage_is_grouped_by_what_is_asked_for(shell, ledger, by, groups, shape):
    """
    One group or several, in the order asked for, sorted.
    """
    ledger(entry(), entry(time="2026-09-30T16:00:00.000Z", session="s2"))

    assert shell.run("usage", "--by", by, *[shape] * bool(shape)) == 0

    if shape == "--json":
        assert [total["group"] for total in json.loads(shell.out)] == groups
    else:
        lines = shell.out.splitlines()[1 : 1 + len(groups)]
        assert [re.split(r",|  +", line)[: len(groups[0])] for line in lines] == [list(g.values()) for g in groups]


@pytest.mark.parametrize(
    ("shape", "out"),
    [
        ([], "No calls in {}/usage yet.\n"),
        (["--json"], "[]\n"),
        (
            ["--csv"],
            "day,key,model,calls,failed,input_tokens,cache_write_tokens,cache_read_tokens,output_tokens,"
            "cost_usd,cache_hit_rate\n",
        ),
    ],
)
def test_usage_without_calls_is_no_error(shell, shape, out):
    """
    Not even without the folder.
    """
    shell.write(ALICE)

    assert shell.run("usage", *shape) == 0

    assert shell.out == out.format(shell.folder)


def test_lines_of_the_ledger_that_cannot_be_read_are_counted_and_said(shell, ledger):
    """
    A report says what it leaves out.
    """
    ledger(entry())
    with open(shell.folder / "usage" / "usage-2026-09.jsonl", "ab") as file:
        file.write(b'{"time": 5}\n\xff\xfe\n{"time":"2026-09-')

    assert shell.run("usage", "--by", "key", "--json") == 0

    assert [total["calls"] for total in json.loads(shell.out)] == [1]
    assert shell.err == (
        "3 lines of the ledger cannot be read and count nothing: "
        "usage-2026-09.jsonl:2, usage-2026-09.jsonl:3, usage-2026-09.jsonl:4\n"
    )


@pytest.mark.parametrize(
    ("mistake", "line"),
    [
        ("keys: [{name: alice}]", "6: keys[0].key: is required, and missing"),
        ("teams: 5\nlimits: 6", "6: teams: expected a list such as [a, b], got 5"),
        ("server: {port: 1}", "6: server: given twice, first in line 3"),
    ],
)
def test_reports_are_made_beside_a_mistake_which_is_told(shell, ledger, mistake, line):
    """
    In one line. Ledger and time zone are those of the config all the same.
    """
    demo = "upstreams: [{name: demo, format: demo}]\n"
    shell.write(f"# mine\n{demo}server:\n  timezone: ${{TZ:-Asia/Shanghai}}\nusage: {{directory: usage}}\n{mistake}\n")
    ledger(entry(), entry(time="2026-09-21T16:00:00.000Z"))
    warning = f"warning: a mistake in the config: {shell.folder}/config.yaml:{line}\n"

    assert (shell.run("usage", "--by", "day", "--csv"), shell.err) == (0, warning)
    assert [row[:13] for row in shell.out.splitlines()] == ["day,calls,fai", "2026-09-21,1,", "2026-09-22,1,"]
    assert (shell.run("usage", "archive"), shell.err) == (0, warning)
    assert (shell.run("usage", "verify"), shell.err[: len(warning)]) == (1, warning)  # no chain in these lines


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ("usage: {directory: 5}", "usage.directory: must be known here"),
        (
            "server: {timezone: Europe}",
            "server.timezone: expected a time zone such as Europe/Berlin, got 'Europe'",
        ),
        ("server: }", "not YAML: "),
    ],
)
def test_no_report_is_made_where_it_would_be_of_something_else(shell, mistake, error):
    """
    Of another ledger, or with days of another time zone.
    """
    shell.write("upstreams: [{name: demo, format: demo}]\n" + mistake)

    assert shell.run("usage") == 1

    assert f"error: {shell.folder}/config.yaml:2: {error}" in shell.err


# The command itself


def run_as_a_program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run gateway.py in a process of its own."""
    return subprocess.run([sys.executable, g.__file__, *arguments], capture_output=True, check=False, **options)


def test_the_commands_exit_code_is_the_programs(shell):
    """
    0 for good, 1 for a bad config, 2 for a bad command.
    """
    assert run_as_a_program("--version").stdout == f"claude-gateway {g.VERSION}\n".encode()
    assert run_as_a_program("check", cwd=shell.folder).returncode == 1
    assert run_as_a_program("chekc", cwd=shell.folder).returncode == 2


def test_an_installed_program_calls_itself_what_it_was_installed_as(shell):
    """
    pip, pipx and the image install it as `claude-gateway`; what to type next is then told with that name.
    """
    launcher = Path(g.__file__).parent / "deploy" / "claude-gateway"
    environ = os.environ | {"PYTHONPATH": str(Path(g.__file__).parent)}
    command = [sys.executable, str(launcher)]

    made = subprocess.run([*command, "init"], capture_output=True, text=True, cwd=shell.folder, env=environ, check=True)
    missing = subprocess.run(
        [*command, "check", "--config", "other.yaml"], capture_output=True, text=True, cwd=shell.folder, env=environ
    )

    assert made.stdout.endswith("It is shown once. Start the gateway with: claude-gateway serve\n")
    assert "and run `claude-gateway seal`." in (shell.folder / "config.yaml").read_text()
    assert missing.stderr == f"error: {shell.folder}/other.yaml: no such file; `claude-gateway init` makes one\n"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            f"Permission denied for user {os.geteuid()}: it must be that user's (chown), "
            "or the gateway must run as its owner",
        ),
    ],
)
def test_missing_rights_are_told_with_the_user_who_misses_them(error, reason):
    """
    In a container the process is rarely whom its owner thinks of, and a mounted folder is rarely its own.
    """
    assert g.why_not(error) == reason


# Corrections, the chain, the archive

LEDGER_CONFIG = f"""
upstreams: [{{name: demo, format: demo}}]
teams: [{{name: red}}]
limits: {{gateway: {{requests/minute: 9}}}}
keys:
  - {{name: alice, team: red, limits: {{usd/day: 5, concurrent: 2}}, key: {KEY}}}
  - {{name: bob, key: sk-proxy-bob0123456789abcdefghijklmnopqrs}}
"""


def ledger_lines(shell) -> list[dict]:
    """The ledger's lines, oldest first, without what differs from run to run."""
    files = sorted((shell.folder / "usage").glob("usage-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [{name: line[name] for name in line if name not in ("time", "chain")} for line in lines]


def without_id(text: str) -> str:
    """What a correction prints, without the id that was drawn for it."""
    return re.sub(r" \(id [0-9a-f]{16}\)", " (id …)", text)


def test_a_reset_is_a_line_of_the_ledger(shell):
    """
    For a key, a team or the gateway; for one limit or all.
    """
    shell.write(LEDGER_CONFIG)

    assert shell.run("usage", "reset", "alice", "--limit", "usd/day", "--note", "holiday") == 0
    assert without_id(shell.out) == "usd/day of key alice now counts from zero (id …).\n"
    assert shell.run("usage", "reset", "--team", "red") == 0
    told = "team red has no limits in config.yaml: the reset is booked (id …), no more.\n"
    assert without_id(shell.out) == told
    assert shell.run("usage", "reset", "--gateway") == 0
    assert without_id(shell.out) == "All limits of gateway now count from zero (id …).\n"

    lines = ledger_lines(shell)
    assert len({line.pop("id") for line in lines}) == 3
    assert lines == [
        {"type": "reset", "scope": "key", "name": "alice", "limit": "usd/day", "note": "holiday"},
        {"type": "reset", "scope": "team", "name": "red", "limit": "", "note": ""},
        {"type": "reset", "scope": "gateway", "name": "", "limit": "", "note": ""},
    ]


def test_an_adjustment_counts_with_the_key_its_team_and_the_gateway(shell):
    """
    It stands in the ledger and in reports, as what it is.
    """
    shell.write(LEDGER_CONFIG)

    assert shell.run("usage", "adjust", "alice", "--usd", "-3.5", "--tokens", "1000", "--note", "refund") == 0
    told = "Adjusted by -$3.50, +1000 tokens: key alice, team red, the gateway (id …).\n"
    assert without_id(shell.out) == told
    assert shell.run("usage", "adjust", "bob", "--requests", "2") == 0
    assert shell.run("usage", "--by", "key,team,model", "--csv") == 0

    assert shell.out.splitlines()[1:] == [
        "alice,red,(adjusted),0,0,1000,0,0,0,-3.500000,0.0",
        "bob,,(adjusted),2,0,0,0,0,0,0.000000,",
    ]
    line = ledger_lines(shell)[0]
    assert len(line.pop("id")) == 16
    assert line == {
        "type": "adjust",
        "key": "alice",
        "team": "red",
        "model": "(adjusted)",
        "requests": 0,
        "input_tokens": 1000,
        "cost_usd": -3.5,
        "note": "refund",
    }


@pytest.mark.parametrize(
    ("usd", "shown"),
    [("0.5", "+$0.50"), ("-3.5", "-$3.50"), ("-1234", "-$1,234.00"), ("0.000000123", "+$0.000000123")],
)
def test_an_adjustment_in_dollars_is_shown_as_money(shell, usd, shown):
    """
    To the billionth, as the ledger counts.
    """
    shell.write(LEDGER_CONFIG)

    assert shell.run("usage", "adjust", "--gateway", "--usd", usd) == 0

    assert without_id(shell.out) == f"Adjusted by {shown}: gateway (id …).\n"


@pytest.mark.parametrize("arguments", [["adjust", "alice", "--usd", "-5"], ["reset", "alice"]])
def test_a_correction_is_made_once_under_an_id_also_where_no_gateway_runs(shell, arguments):
    """
    The id is in the ledger: neither a restart nor a gateway that has ended forgets it.
    """
    shell.write(LEDGER_CONFIG)

    assert shell.run("usage", *arguments, "--id", "a1") == 0
    assert shell.run("usage", *arguments, "--id", "a1") == 0
    assert (shell.out, shell.err) == ("a1 was done already: nothing was done again.\n", "")
    assert shell.run("usage", *arguments, "--id", "a2") == 0

    assert [line["id"] for line in ledger_lines(shell)] == ["a1", "a2"]


@pytest.mark.parametrize(
    "other",
    [
        ["adjust", "alice", "--usd", "-6"],
        ["adjust", "alice", "--tokens", "-5"],
        ["adjust", "bob", "--usd", "-5"],
        ["adjust", "--team", "red", "--usd", "-5"],
        ["reset", "alice"],
    ],
)
def test_an_id_that_another_correction_has_is_refused_and_says_which(shell, other):
    """
    Else it would be taken for booked, and is not.
    """
    shell.write(LEDGER_CONFIG)
    assert shell.run("usage", "adjust", "alice", "--usd", "-5", "--note", "refund", "--id", "a1") == 0

    assert shell.run("usage", *other, "--id", "a1") == 1

    booked = "usage adjust key alice: -5 usd, 'refund', id a1"
    assert shell.err == f"error: nothing was done: --id a1 was used for another correction ({booked})\n"
    assert len(ledger_lines(shell)) == 1


def test_a_correction_is_found_again_in_an_archive(shell):
    """
    However long ago it was made.
    """
    shell.write(LEDGER_CONFIG)
    assert shell.run("usage", "adjust", "alice", "--usd", "-5", "--id", "a1") == 0
    (written,) = (shell.folder / "usage").glob("usage-*.jsonl")
    written.rename(written.with_name("usage-2026-01.jsonl"))
    for month in ("02", "03", "04"):
        written.with_name(f"usage-2026-{month}.jsonl").touch()
    assert shell.run("usage", "archive") == 0

    assert shell.run("usage", "adjust", "alice", "--usd", "-5", "--id", "a1") == 0
    assert shell.out == "a1 was done already: nothing was done again.\n"


def test_verify_finds_the_line_that_was_changed(shell):
    """
    Exit code 0 and the last value of the chain, or 1 and the line.
    """
    shell.write(LEDGER_CONFIG)
    for usd in ("1", "2", "3"):
        shell.run("usage", "adjust", "alice", "--usd", usd)
    (file,) = (shell.folder / "usage").glob("usage-*.jsonl")

    good = shell.run("usage", "verify")
    last = re.search(r"last chain value is ([0-9a-f]{32})\n", shell.out)[1]
    seen = shell.run("usage", "verify", "--seen", last)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    cut = shell.run("usage", "verify", "--seen", last)
    cut_error = shell.err
    file.write_text("".join([lines[0], lines[1].replace('"cost_usd":2', '"cost_usd":1'), lines[2]]))
    changed = shell.run("usage", "verify")

    assert (good, seen, cut, changed) == (0, 0, 1, 1)
    assert cut_error == f"error: no line has the chain value {last}: what it stood for was rewritten or removed\n"
    assert shell.err == (
        f"error: {file.name}:2: does not follow from the line before: "
        "it was changed, or lines before it were removed or added\n"
    )


@pytest.mark.parametrize("is_rewritten", [False, True])
def test_verify_compares_the_index_with_the_lines(shell, is_rewritten):
    """
    Also where whoever rewrote it had the sealing secret. While a gateway runs, it has the index for itself.
    """
    shell.write(LEDGER_CONFIG)
    shell.run("usage", "adjust", "alice", "--usd", "3")
    without = shell.run("usage", "verify"), shell.out.splitlines()[-1]
    config = g.Config.load(shell.folder / "config.yaml")
    index = g.Index(config.usage_directory, g.Calendar(config.timezone), config.clock.wall(), config.index_secret)
    index.open()
    for view in index.views:
        index.catch_up(view)
    if is_rewritten:
        index._db.execute("UPDATE sums SET nano_usd = 0 WHERE cut = 0")
    index.close()

    held = g.hold_folder(config.usage_directory)
    while_it_runs = shell.run("usage", "verify"), shell.out.splitlines()[-1]
    os.close(held)
    compared = shell.run("usage", "verify")

    assert without == (0, "There is no index to compare with the lines: the next start makes one.")
    assert while_it_runs == (0, "The index was not compared with the lines: a gateway runs on it.")
    assert (config.usage_directory / g.Index.FILE).exists() != is_rewritten
    if is_rewritten:
        assert compared == 1
        assert shell.err.startswith("error: the index differed from the lines in the sums of clock_hour ")
    else:
        assert (compared, shell.out.splitlines()[-1]) == (0, "The index has what the lines add up to.")


def test_archived_months_go_on_counting(shell):
    """
    The months that are over are gzipped; reports and the chain are as before.
    """
    shell.write(LEDGER_CONFIG)
    ledger = g.Ledger(shell.folder / "usage", 0, g.Clock())
    for month in ("2026-08", "2026-09"):
        ledger.append(msgspec.structs.replace(ENTRY, time=f"{month}-21T13:33:20.000Z"))
    ledger.append(msgspec.structs.replace(ENTRY, time="2026-10-01T00:00:00.000Z"))
    ledger.close()
    shell.run("usage")
    before = shell.out

    packed = shell.run("usage", "archive")
    told = shell.out
    again = shell.run("usage", "archive")
    nothing = shell.out
    shell.run("usage")

    done = "Months gzipped: 2.\n"
    assert (packed, again) == (0, 0)
    assert re.sub(r"[\d,]+ bytes", "N bytes", re.sub(r"[\d,]+ before", "N before", told)) == (
        "usage-2026-08.jsonl.gz: N bytes, N before\nusage-2026-09.jsonl.gz: N bytes, N before\n" + done
    )
    assert nothing == "Nothing to do: every month but the newest is gzipped already.\n"
    assert shell.out == before
    assert shell.run("usage", "verify") == 0


# --- one sentence for whatever goes wrong --------------------------------------------------------------


def run_process(folder: Path, *arguments: str, python: tuple[str, ...] = (), **options) -> subprocess.CompletedProcess:
    """A command in a process of its own."""
    command = [sys.executable, *python, g.__file__, *arguments]
    return subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, timeout=20, **options)


@pytest.mark.parametrize("command", [("check",), ("key", "list"), ("usage", "--csv"), ("backup", "-")])
def test_a_full_disk_behind_stdout_is_one_sentence(shell, command):
    """
    No traceback, and nothing more when the process ends.
    """
    shell.run("init")

    with open("/dev/full", "w") as full:
        ended = run_process(shell.folder, *command, stdout=full)

    assert ended.returncode == 1
    assert re.fullmatch(r"error: .*No space left on device\n", ended.stderr)


def closed_pipe() -> int:
    """A pipe's end to write to, whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def test_a_reader_that_has_seen_enough_is_no_error(shell):
    """
    `| head -1` closes the pipe.
    """
    shell.run("init")

    with open(closed_pipe(), "w") as pipe:
        ended = run_process(shell.folder, "check", stdout=pipe)

    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("path", "code", "error"),
    [("/dev/full", 1, "error: stdout: No space left on device\n"), (closed_pipe, 0, "")],
)
def test_help_that_cannot_be_printed_ends_as_other_commands_do(shell, monkeypatch, path, code, error):
    """
    Argparse passes over what goes wrong.
    """
    with open(path if isinstance(path, str) else path(), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)

        assert (shell.run("--help"), shell.err) == (code, error)


@pytest.mark.parametrize(
    ("command", "name"), [(["init"], "me"), (["key", "add", "it's"], "it's"), (["key", "rotate", "bob"], "bob")]
)
@pytest.mark.parametrize(("path", "reason"), [("/dev/full", "No space left on device"), (closed_pipe, "Broken pipe")])
def test_a_key_that_nobody_has_seen_is_answered_with_how_to_get_another(
    shell, monkeypatch, command, name, path, reason
):
    """
    It is in the config and cannot be shown again.
    """
    if command != ["init"]:
        shell.run("init")
        shell.run("key", "add", "bob")
    before = shell.files()

    with open(path if isinstance(path, str) else path(), "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)

        assert shell.run(*command) == 1

    remedy = shlex.join(["gateway.py", "key", "rotate", name])
    assert shell.err == f"error: {name}'s key was made, but nobody has seen it ({reason}): `{remedy}` makes another\n"
    assert shell.files() != before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_is_not_utf_8_has_escapes_in_place_of_what_it_lacks(shell, monkeypatch, encoding):
    """
    No command fails for what its terminal cannot show, least of all after its work is done.
    """
    shell.write(ALICE.replace("alice", "müller日本"))
    with open("out", "w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)

        codes = [shell.run("key", "revoke", "müller日本"), shell.run("key", "list")]
        with pytest.raises(SystemExit, match="0"):
            shell.run("usage", "--help")

    shown = Path("out").read_text(encoding)
    name = "müller日本".encode(encoding, "backslashreplace").decode(encoding)
    assert (codes, shell.err) == ([0, 0], "")
    assert shown.startswith(f"{name}'s key is revoked.")
    assert f"{name} (\\u2026last): disabled" in shown


@pytest.mark.parametrize("char", "\u034f\u115f\u1160\u2800\u3164\ufe0f\uffa0\U000e0101\u200b\u202e\x1b\n\ud800")
def test_what_no_terminal_shows_is_not_printable(char):
    """
    Also what Python takes for printable; what people write in stays.
    """
    assert g.printable(f"a{char}b") == "a\ufffdb"
    assert g.printable("Zoë 张伟 が 😀 नमस्ते 한글") == "Zoë 张伟 が 😀 नमस्ते 한글"
    assert g.printable("x" * 200) == "x" * 128


EVIL = "\\e[31m\\e]0;owned\\a\\u202elive\\u3164"  # as YAML and JSON write them
SEEN = "�[31m�]0;owned��live�"  # on a terminal


@pytest.mark.parametrize(
    ("arguments", "config", "shown"),
    [
        (["check"], f'"{EVIL}": 1', SEEN),
        (["key", "list"], f'keys: [{{name: bob, key: {KEY}, models: ["{EVIL}"]}}]', SEEN),
        (["--config", "a\u202e\u2800.yaml", "check"], "", "a��.yaml"),
        (["usage", "--since", "\u202e2026"], "", "--since �2026"),
        (["usage", "--by", "\u202ekey"], "", "cannot group by �key"),
        (["usage", "verify", "--seen", "\u202e00"], "", "�00"),
        (
            ["usage", "reset", "bob", "--limit", "\u202eusd"],
            f"keys: [{{name: bob, key: {KEY}}}]",
            "limit �usd: key bob has no such limit",
        ),
    ],
)
def test_nothing_that_is_printed_can_steer_the_terminal(shell, arguments, config, shown):
    """
    Escape sequences, marks that turn the direction of writing and what has no width are shown as �, wherever they come
    from and whatever is said of them.
    """
    shell.write("upstreams: [{name: a, format: demo}]\n" + config)

    shell.run(*arguments)

    said = shell.out + shell.err
    assert said.replace("\n", "").isprintable() and not re.search("[\u3164\u2800]", said)
    assert shown in said


def test_names_in_the_ledger_cannot_steer_the_terminal(shell, ledger):
    """
    Clients choose what they call a model, and whoever writes a ledger of an old version may have let it pass.
    """
    ledger(entry(model="\x1b[2J\x1b]52;c;cm0gLXJm\x07big\u202e\ufe0f"))

    assert shell.run("usage", "--by", "model") == 0

    assert "�[2J�]52;c;cm0gLXJm�big��  " in shell.out and shell.out.replace("\n", "").isprintable()


NAME = "keys[2].name: expected text (in quotes, where it looks like a number or a date) without white space around it"
NO_SUCH = "limit {}: {} has no such limit to reset; it has: {}"
NOTHING = "say what to adjust, by how much other than 0: --usd, --tokens or --requests"
A_DATE = "expires: expected a date such as 2027-01-31, got"
ONE = "name one: a KEY, --team TEAM, or --gateway"
TEXT = "expected arguments of one line, in UTF-8, got"
NO_DATES = ("tomorrow", "2027", "01.02.2027", "20270131", "2027-13-45", "2027-02-30")
REFUSED: list[tuple[str, list[str], str]] = [  # a command, what more it is given, and how the error begins
    ("key add", ["alice"], "there is a key named 'alice' already\n"),
    *(("key add", [name], f"{{}}:8: {NAME}") for name in ("", " bob")),
    *(("key add", [name], f"{TEXT} {name!a}") for name in ("bob\n", "b\udcffb")),
    ("key add carol", ["--limit", "usd/day"], "limit 'usd/day': expected a number of dollars"),
    ("key add carol", ["--limit", "usd/day=lots"], "limit 'usd/day': expected a number of dollars"),
    ("key add carol", ["--limit", "usd/year=5"], "limit 'usd/year': unknown limit, did you mean usd/day?"),
    *(("key add carol", ["--expires", date], f"{A_DATE} {date!r}\n") for date in ("tomorrow", "2027", "01.02.2027")),
    *(
        ("key add carol", ["--expires", date], f"{A_DATE} {date!r}\n")
        for date in ("20270131", "2027-13-45", "2027-02-30")
    ),
    ("key add carol", ["--expires", "1" * 5000], f"{A_DATE} '11111"),
    ("key add carol", ["--expires", "2027-01-31, enabled: false"], f"{A_DATE} '2027-01-31, enabled: false'"),
    ("key rotate", ["Alice"], "there is no key named 'Alice', did you mean alice?\n"),
    ("key revoke", ["Alice"], "there is no key named 'Alice', did you mean alice?\n"),
    ("usage --by", ["key,colour"], f"cannot group by colour; by {', '.join(g.USAGE_GROUPS)}\n"),
    ("usage --since", ["yesterday"], "--since yesterday: expected a time such as 2026, 2026-11"),
    ("usage --until", ["yesterday"], "--until yesterday: expected a time such as 2026, 2026-11"),
    ("usage --json", ["--csv"], "--json or --csv, not both\n"),
    ("usage reset", [], ONE),
    ("usage reset alice", ["--team", "red"], ONE),
    ("usage reset", ["alise"], "there is no key named 'alise', did you mean alice?\n"),
    ("usage reset", ["--team", "blue"], "there is no team named 'blue'; there are: red\n"),
    ("usage reset alice", ["--limit", "concurrent"], NO_SUCH.format("concurrent", "key alice", "usd/day")),
    ("usage reset alice", ["--limit", "usd/month"], NO_SUCH.format("usd/month", "key alice", "usd/day")),
    ("usage reset --team red", ["--limit", "usd/day"], NO_SUCH.format("usd/day", "team red", "none")),
    ("usage reset --gateway", ["--limit", "usd/year"], NO_SUCH.format("usd/year", "gateway", "requests/minute")),
    ("usage adjust", ["alice"], NOTHING),
    ("usage adjust alice", ["--usd", "0"], NOTHING),
    ("usage adjust", ["--usd", "1"], ONE),
    *(("usage adjust alice --usd 1 --note", [note], f"{TEXT} {note!a}\n") for note in ("\udcff", "a\x1b[31m")),
    ("usage verify --seen", ["\udcff"], f"{TEXT} '\\udcff'\n"),
    ("upstream test --model", ["\udcff"], f"{TEXT} '\\udcff'\n"),
    ("usage reconcile", ["a\0b"], f"{TEXT} 'a\\x00b'\n"),
    ("restore", ["a\0b"], f"{TEXT} 'a\\x00b'\n"),
    ("check --config", ["a\nerror: b"], f"{TEXT} 'a\\nerror: b'\n"),
]


@pytest.mark.parametrize(("command", "more", "error"), REFUSED)
def test_what_cannot_be_meant_is_refused_in_a_sentence_and_nothing_is_written(shell, command, more, error):
    """
    What is wrong, and what would be right; no key is shown that would not work.
    """
    shell.write(LEDGER_CONFIG)

    assert shell.run(*command.split(), *more) == 1

    assert shell.err.startswith("error: " + error.format(shell.folder / "config.yaml"))
    assert not A_KEY.search(shell.out)
    assert shell.files() == {"config.yaml": LEDGER_CONFIG.encode()} and not Path("usage").exists()


BAD = {
    "check": ("upstreams: [{name: a, fromat: demo}]", "upstreams[0].fromat: unknown setting, did you mean format?"),
    "seal": (
        f"upstreams: [{{name: a, url: https://a.test, api_key: '\"{PLAIN}\"'}}]",
        "upstreams[0].api_key: is empty, or has blanks, quotes",
    ),
}


@pytest.mark.parametrize("command", BAD)
def test_a_bad_config_is_told_with_line_and_path_and_not_changed(shell, command):
    """
    A script asks before it deploys; the error goes where errors go. What is pasted badly would be sealed so.
    """
    text, error = BAD[command]
    shell.write(text)

    assert (shell.run(command), shell.out) == (1, "")

    assert shell.err.startswith(f"error: {shell.folder}/config.yaml:1: {error}")
    assert shell.files() == {"config.yaml": text.encode()}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--usd", "lots"], "argument --usd: expected dollars such as -3.50, at most 9,007,199 either way, got 'lots'"),
        (["--usd", "nan"], "argument --usd: expected dollars such as -3.50, at most 9,007,199 either way, got 'nan'"),
        (["--usd", "1e9"], "argument --usd: expected dollars such as -3.50, at most 9,007,199 either way, got '1e9'"),
        (["--tokens", "1.5"], f"argument --tokens: {WHOLE}, got '1.5'"),
        (["--requests", "9" * 16], f"argument --requests: {WHOLE}, got '{'9' * 16}'"),
    ],
)
def test_a_number_that_is_none_is_answered_with_one_that_is(shell, arguments, expected):
    """
    In words for people, not with a function's name.
    """
    with pytest.raises(SystemExit):
        shell.run("usage", "adjust", "alice", *arguments)

    assert shell.errors().endswith(f"error: {expected}\n")


def test_ctrl_c_during_the_imports_ends_the_process_without_a_word(shell):
    """
    They take half a second, and a traceback of somebody's package explains nothing.
    """
    code = (
        "import os, runpy, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'argparse': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"sys.argv = ['gateway.py', 'check']; runpy.run_path({g.__file__!r}, run_name='__main__')\n"
    )

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=shell.folder)

    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not changed for who imports it


def test_a_working_directory_that_was_removed_is_said(shell):
    """
    A shell may still be in it.
    """
    (shell.folder / "gone").mkdir()
    command = 'rmdir ../gone; exec "$@"'

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = ["sh", "-c", command, "sh", sys.executable, g.__file__, *arguments]
        (shell.folder / "gone").mkdir(exist_ok=True)
        return subprocess.run(argv, cwd=shell.folder / "gone", capture_output=True, text=True)

    shell.run("init")
    assert run("check").stderr == "error: the working directory is not there any more: go to one that is (cd)\n"
    assert run("--config", f"{shell.folder}/config.yaml", "check").returncode == 0


def test_a_correction_that_cannot_be_written_is_said_at_once(shell):
    """
    In one sentence: no entry waits for a disk that takes none.
    """
    shell.write(LEDGER_CONFIG)
    (shell.folder / "usage").touch()
    began = time.monotonic()

    assert shell.run("usage", "adjust", "alice", "--usd", "1") == 1

    assert shell.err == f"error: nothing was written to {shell.folder}/usage: Not a directory\n"
    assert time.monotonic() - began < 1


def test_a_missing_package_is_told_with_what_helps(tmp_path):
    """
    `python3 gateway.py` with the system's Python, in place of the environment's.
    """
    ended = run_process(tmp_path, "check", python=("-S", "-I"), stdout=subprocess.PIPE)

    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"error: .* has no package \w+: .*pip install -r requirements.txt\n", ended.stderr)


class BrokenOutput(io.StringIO):
    """A standard output with a bug."""

    def write(self, text: str) -> int:
        raise RuntimeError("no\nlines")


def test_a_bug_is_one_sentence_and_its_place_is_for_those_who_ask(shell, monkeypatch):
    """
    What nobody foresaw ends with 1 and says how to learn more.
    """
    shell.run("init")
    monkeypatch.setattr(sys, "stdout", BrokenOutput())

    assert shell.run("check") == 1

    assert shell.err == (
        "error: a bug in this program (RuntimeError: no\ufffdlines); "
        "with --log-level debug before the command it says where\n"
    )


# --- edits at the same time -----------------------------------------------------------------------------


def test_of_several_edits_at_once_none_is_lost(shell):
    """
    Six keys added at once are all there, and one revoked beside them stays revoked: each that said so was made.
    """
    shell.run("init")
    shell.run("key", "add", "bob")
    commands = [["key", "add", f"user-{i}"] for i in range(6)] + [["key", "revoke", "bob"]]

    running = [
        subprocess.Popen([sys.executable, g.__file__, *command], cwd=shell.folder, stdout=subprocess.DEVNULL)
        for command in commands
    ]
    codes = [process.wait(30) for process in running]

    keys = {key.name: key for key in g.Config.load(shell.folder / "config.yaml").keys}
    assert codes == [0] * 7
    assert sorted(keys) == ["bob", "me", *(f"user-{i}" for i in range(6))]
    assert not keys["bob"].enabled


def test_an_edit_does_not_wait_for_ever(shell, monkeypatch):
    """
    Somebody's that hangs is told.
    """
    shell.run("init")
    monkeypatch.setattr(g, "EDIT_WAIT_S", 0.05)

    with g.edited(shell.folder / "config.yaml"):
        assert shell.run("key", "add", "bob") == 1

    assert "somebody else has edited it" in shell.err
    assert shell.run("key", "add", "bob") == 0


@pytest.mark.parametrize(("host", "why"), [("192.0.2.7", "assign requested address"), ("gateway.invalid", "known")])
def test_check_warns_of_a_host_that_this_machine_has_not(shell, host, why):
    """
    Often it is the public name, which belongs to a proxy in front. The start says the same.
    """
    shell.write(f"server:\n  port: 0\n  host: {host}\nupstreams: [{{name: demo, format: demo}}]\n")
    remedy = "127.0.0.1 is for this host alone, 0.0.0.0 for others, too; a proxy's name belongs into server.url"

    assert shell.run("check") == 0
    (warning,) = shell.out.partition("\nwarnings:\n  ")[2].splitlines()
    assert shell.run("serve") == 1

    assert warning.startswith("line 3: server.host: this machine cannot listen there (") and why in warning
    assert warning.endswith(f"): {remedy}")
    assert shell.err.startswith(f"error: cannot listen on {host}:0: ") and why in shell.err
    assert shell.err.endswith(f"; set server.host: {remedy}\n")
