"""The README does not lie: what it shows is what the program does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from conftest import KEY

import gateway as g

ROOT = Path(g.__file__).parent
README = (ROOT / "README.md").read_text()


async def test_the_curl_of_the_first_screen_gets_the_answer_that_stands_below_it(start_gateway):
    """
    The request that the README sends is answered with the very bytes that it shows.
    """
    body = re.search(r"^curl .*\n  -d '(.*)'$", README, re.MULTILINE)[1]
    shown = re.search(r"```json\n(\{\"id\":\"msg_demo\".*)\n```", README)[1]
    gateway = await start_gateway(f"upstreams: [{{name: demo, format: demo}}]\nkeys: [{{name: me, key: {KEY}}}]\n")

    reply = await gateway.post("/v1/messages", body.encode())

    assert reply.body.decode() == shown


def test_the_ledger_line_that_is_shown_is_one():
    """
    The README's entry has the fields of an entry, in their order, and its cost follows from its price.
    """
    shown = re.search(r"^\{\"type\".*\}$", README, re.MULTILINE)[0]

    entry = msgspec.json.decode(shown, type=g.Entry)

    assert list(json.loads(shown)) == ["type"] + [field.name for field in msgspec.structs.fields(g.Entry)]
    assert entry.price.cost_usd(entry) == entry.cost_usd
    assert re.fullmatch("[0-9a-f]{32}", entry.chain)


@pytest.mark.parametrize("window", [name for name in g.WINDOWS if name])
def test_every_window_of_limits_stands_in_the_docs(window):
    """
    In the table of both languages, and beside the example's first limit.
    """
    example, chinese = ((ROOT / name).read_text() for name in ("config.example.yaml", "README.zh-CN.md"))

    assert f"`{window}`" in README and f"`{window}`" in chinese
    assert window in re.findall(r"windows (.*),$", example, re.MULTILINE)[0].split(", ")


def test_every_command_stands_in_the_readme(capsys):
    """
    The table of commands has all of them.
    """
    help_text = g.arguments().format_help()
    commands = re.findall(r"^    (\w+)  ", help_text, re.MULTILINE)

    assert len(commands) == 9
    assert [command for command in commands if f"gateway.py {command}" not in README] == []


def test_every_path_that_is_served_stands_in_the_readme():
    """
    The table of requests has all routes.
    """
    paths = [endpoint.path.removesuffix("/*") for endpoint in g.ENDPOINTS]

    assert [path for path in paths if f"{path}`" not in README and f"{path} " not in README] == []


def test_the_table_of_verdicts_is_the_one_that_the_program_goes_by():
    """
    Whoever runs several upstreams reads what each failure means; the table here is the one in the code.
    """
    blamed = {"none": "nobody", "key": "the API key", "upstream": "the upstream"}
    rows = [
        (case, v.meaning, "yes" if v.try_next else "no", blamed[v.blame], v.cooldown_s, v.passes)
        for case, v in g.VERDICTS.items()
    ]

    found = re.findall(r"^\| `(\w+)` \| (.*) \| (yes|no) \| (.*) \| (.*) \| (yes)? ?\|$", README, re.MULTILINE)

    shown = [(*row[:4], g.Duration.parse(row[4].replace(" ", "") or "0s"), row[5] == "yes") for row in found]
    assert shown == rows


def test_the_headers_that_go_upstream_are_those_of_the_list():
    """
    Whoever misses a header at an upstream finds here that it does not go there, and how to let it.
    """
    shown = re.search(
        r"^\*\*Headers\*\*: .*?:((?: |`[\w*-]+`|,|\n|and the sessions of Codex and opencode:)+)\.$", README, re.M
    )[1]

    assert set(re.findall("`(.*?)`", shown)) == g.FORWARDED | {f"{start}*" for start in g.FORWARDED_STARTS}


def test_every_outcome_stands_in_the_readme():
    """
    Whoever reads the ledger finds what its words mean.
    """
    source = Path(g.__file__).read_text()
    outcomes = set(re.findall(r'(?:Outcome|Failure)\(\s*"(\w+)"', source)) | {"completed", "refused", "upstream_error"}

    assert len(outcomes) == 10
    assert [outcome for outcome in sorted(outcomes) if f"`{outcome}`" not in README] == []


PAGES = ["README.md", "README.zh-CN.md", "CHANGELOG.md", "SECURITY.md", "docs/deployment.md"]


def blocks(text: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_chinese_page_shows_the_same_commands_and_settings():
    """
    What is to be typed or pasted stands in both languages, letter by letter.
    """
    chinese = blocks((ROOT / "README.zh-CN.md").read_text())

    assert len(chinese) >= 10
    assert [block for block in chinese if block not in blocks(README)] == []


def test_the_chinese_page_has_the_same_topics():
    """
    Each section, each row of the table of verdicts, and each command.
    """
    chinese = (ROOT / "README.zh-CN.md").read_text()
    commands = re.findall(r"^    (\w+)  ", g.arguments().format_help(), re.MULTILINE)
    rows = [f"| `{case}` |" for case in g.VERDICTS] + [f"gateway.py {command}" for command in commands]

    assert [row for row in rows if row not in chinese] == []
    assert len(re.findall("^## ", chinese, re.MULTILINE)) == len(re.findall("^## ", README, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """
    To files and headings of this repository.
    """
    text = (ROOT / page).read_text()
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]

    missing = [
        t for t in targets if not t.startswith("#") and not ((ROOT / page).parent / t.partition("#")[0]).exists()
    ]
    missing += [t for t in targets if t.startswith("#") and t[1:] not in headings]
    assert missing == []


def test_the_version_that_is_shown_is_the_programs():
    """
    The first screen is what a person sees who tries it.
    """
    text = "".join((ROOT / page).read_text() for page in PAGES)
    shown = set(re.findall(r"claude-gateway (\d+\.\d+\.\d+)", text))

    assert shown == {g.VERSION}
