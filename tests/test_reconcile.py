"""`usage reconcile`: the ledger against what the providers' own exports say."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from conftest import KEY

import gateway as g

ANTHROPIC = """\
usage_date_utc,model_version,api_key,workspace,usage_type,context_window,usage_input_tokens_no_cache,\
usage_input_tokens_cache_write_5m,usage_input_tokens_cache_write_1h,usage_input_tokens_cache_read,\
usage_output_tokens,web_search_count,inference_geo,speed
2026-11-01,claude-opus-5-5,proxy,Default,standard,≤ 200k,1000,200,30,5000,400,0,global,standard
"""
COSTS = """\
usage_date_utc,model,workspace,api_key,usage_type,context_window,token_type,cost_usd,list_price_usd,cost_type
2026-11-01,Claude Haiku 4.5,Default,proxy,message,≤ 200k,input_no_cache,0.05,0.05,token
2026-11-01,Claude Haiku 4.5,Default,proxy,message,≤ 200k,output,0.20,0.20,token
"""
OPENAI = """\
start_time,end_time,start_time_iso,end_time_iso,project_id,num_model_requests,model,input_tokens,output_tokens,\
input_cached_tokens
1793491200,1793577600,2026-11-01T00:00:00+00:00,2026-11-02T00:00:00+00:00,p,2,gpt-5-mini-2025-08-07,1000,70,900
1793577600,1793664000,2026-11-02T00:00:00+00:00,2026-11-03T00:00:00+00:00,,,,,,
"""


class Books:
    """A folder with a config, a ledger and an export, and what the command said of them."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.out = self.err = ""
        (folder / "usage").mkdir()
        text = f"upstreams: [{{name: demo, format: demo}}]\nkeys: [{{name: me, key: {KEY}}}]\n"
        (folder / "config.yaml").write_text(text)

    def book(self, time: str, model: str, *tokens: int, cost: float = 0.0, **fields: str) -> None:
        """Append an entry; tokens are input, writes for 5 minutes and an hour, reads, output."""
        names = ("input", "cache_write_5m", "cache_write_1h", "cache_read", "output")
        counts = {f"{name}_tokens": count for name, count in zip(names, tokens, strict=False)}
        entry = {"time": time, "model": "asked", "model_served": model, "path": "/v1/messages", "cost_usd": cost}
        with open(self.folder / "usage" / f"usage-{time[:7]}.jsonl", "ab") as file:
            file.write(msgspec.json.encode(g.Entry(**entry | counts | fields)) + b"\n")

    def reconcile(self, export: str | bytes, *options: str) -> int:
        """Write the export and compare; the exit code."""
        path = self.folder / "export.csv"
        path.write_bytes(export if isinstance(export, bytes) else export.encode())
        self._capsys.readouterr()
        code = g.main(["usage", "reconcile", "export.csv", *options])
        self.out, self.err = self._capsys.readouterr()
        return code


@pytest.fixture
def books(tmp_path, capsys, monkeypatch) -> Books:
    """Books in an empty folder."""
    monkeypatch.delenv("GATEWAY_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    return Books(tmp_path, capsys)


def test_books_that_agree_are_told_in_a_sentence(books):
    """
    Free calls, refused calls and other days are not compared.
    """
    books.book("2026-11-01T00:00:00.000Z", "claude-opus-5-5", 600, 200, 0, 5000, 100)
    books.book("2026-11-01T23:59:59.999Z", "claude-opus-5-5", 400, 0, 30, 0, 300)
    books.book("2026-11-01T12:00:00.000Z", "claude-opus-5-5", 77, path="/v1/messages/count_tokens")
    books.book("2026-11-01T12:00:00.000Z", "claude-haiku-4-5", outcome="refused")
    books.book("2026-10-31T23:59:59.999Z", "claude-opus-5-5", 1)
    books.book("2026-11-02T00:00:00.000Z", "claude-opus-5-5", 1)

    assert books.reconcile(ANTHROPIC) == 0

    assert books.out == (
        "2026-11-01 to 2026-11-01 (UTC), 1 pairs of day and model: 1 agree, 0 differ, 0 only ours, 0 only theirs.\n"
    )
    assert books.err == ""


def test_differences_are_shown_and_nothing_else(books):
    """
    A line per day, model and class that differs; the exit code is for scripts.
    """
    books.book("2026-11-01T08:00:00.000Z", "claude-opus-5-5", 1100, 200, 30, 5000, 300)
    books.book("2026-11-01T08:00:00.000Z", "claude-demo", 9, 0, 0, 0, 1900)
    theirs = "2026-11-03,claude-haiku-4-5-20251001,k,,,,0,5,7,0,0,0,,\n"

    assert books.reconcile(ANTHROPIC + theirs) == 1

    assert books.out == (
        "day         model                                    ours  theirs  difference            %\n"
        "2026-11-01  claude-demo                input            9       0          +9    only ours\n"
        "2026-11-01  claude-demo                output       1,900       0      +1,900    only ours\n"
        "2026-11-01  claude-opus-5-5            input        1,100   1,000        +100       +10.0%\n"
        "2026-11-01  claude-opus-5-5            output         300     400        -100       -25.0%\n"
        "2026-11-03  claude-haiku-4-5-20251001  cache write      0      12         -12  only theirs\n"
        "\n"
        "2026-11-01 to 2026-11-03 (UTC), 3 pairs of day and model: 0 agree, 1 differ, 1 only ours, 1 only theirs.\n"
    )


def test_one_upstreams_calls_can_be_compared_alone(books):
    """
    An export knows one provider; a gateway may have several.
    """
    books.book("2026-11-01T08:00:00.000Z", "claude-opus-5-5", 1000, 200, 30, 5000, 400, upstream="anthropic")
    books.book("2026-11-01T08:00:00.000Z", "gpt-5", 5, upstream="openai")

    assert books.reconcile(ANTHROPIC, "--upstream", "anthropic") == 0
    assert books.reconcile(ANTHROPIC) == 1


def test_for_machines_there_is_json(books):
    """
    The same, with full numbers.
    """
    books.book("2026-11-01T08:00:00.000Z", "claude-opus-5-5", 1000, 200, 30, 5000, 399)

    assert books.reconcile(ANTHROPIC, "--json") == 1

    sides = {"input": 1000, "cache write": 230, "cache read": 5000}
    assert json.loads(books.out) == {
        "first_day": "2026-11-01",
        "last_day": "2026-11-01",
        "agree": 0,
        "differ": 1,
        "only_ours": 0,
        "only_theirs": 0,
        "pairs": [
            {
                "day": "2026-11-01",
                "model": "claude-opus-5-5",
                "ours": sides | {"output": 399},
                "theirs": sides | {"output": 400},
                "difference": {"output": -1},
            }
        ],
    }


def test_costs_are_compared_under_the_names_that_people_read(books):
    """
    A cost export has display names and no tokens; less than half a cent is rounding.
    """
    books.book("2026-11-01T08:00:00.000Z", "claude-haiku-4-5-20251001", 1000, cost=0.2512)
    assert books.reconcile(COSTS) == 0

    books.book("2026-11-01T08:00:00.000Z", "claude-haiku-4-5-20251001", 1000, cost=1.0)
    assert books.reconcile(COSTS) == 1

    assert books.out.splitlines()[:2] == [
        "day         model                    ours  theirs  difference        %",
        "2026-11-01  Claude Haiku 4.5  USD  1.2512  0.2500     +1.0012  +400.5%",
    ]


def test_openais_input_includes_what_came_from_the_cache(books):
    """
    Ours does not; and a bucket without calls is a day that is covered.
    """
    books.book("2026-11-01T08:00:00.000Z", "gpt-5-mini-2025-08-07", 100, 0, 0, 900, 70)
    assert books.reconcile(OPENAI) == 0

    books.book("2026-11-02T08:00:00.000Z", "gpt-5-mini-2025-08-07", 1)
    assert books.reconcile(OPENAI) == 1
    assert "1 agree, 0 differ, 1 only ours" in books.out


def test_what_spreadsheets_do_to_a_file_is_read(books):
    """
    BOM, CRLF, blank lines, thousands, several rows for a day and model, a row of totals.
    """
    books.book("2026-11-01T08:00:00.000Z", "claude-opus-5-5", 2234, 200, 30, 5000, 400)
    rows = ANTHROPIC + "\n" + '2026-11-01,claude-opus-5-5,k2,,,,"1,234",,,,,,,\n' + ",,,,,,2234,,,,,,,\nTotal,,,,,,1\n"

    assert books.reconcile(b"\xef\xbb\xbf" + rows.replace("\n", "\r\n").encode()) == 0


@pytest.mark.parametrize(
    "export, error",
    [
        (
            "date,model,input_tokens,output_tokens\n\n2026-11-01,m,x,1\n",
            "{}:3: input_tokens: expected a number, got 'x'",
        ),
        (
            "date,model,input_tokens,output_tokens\n11/21/26,m,1,1\n",
            "{}:2: expected a date such as 2026-11-21, got '11/21/26'",
        ),
        ("date,model,input_tokens,output_tokens\n", "{} has no row with a date"),
        (b"date\xff,model\n", "cannot read {}: 'utf-8' codec can't decode byte 0xff in position 4: invalid start byte"),
        (
            "foo,bar\n1,2\n",
            "{} is no export that is known: its columns are foo, bar. Needed are day and model, and input_tokens and "
            "output_tokens or cost_usd, under the names that Anthropic or OpenAI give them",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_told_with_its_line(books, export, error):
    """
    Nothing is guessed: half an export compared would look like a difference.
    """
    assert books.reconcile(export) == 1

    assert books.err == f"error: {error.format('export.csv')}\n"
    assert books.out == ""


def test_a_file_that_is_not_there_is_named(books):
    """
    And `usage` alone still sums up.
    """
    assert g.main(["usage", "reconcile", "nowhere.csv"]) == 1
    assert books._capsys.readouterr().err == "error: cannot read nowhere.csv: No such file or directory\n"

    books.book("2026-11-01T08:00:00.000Z", "claude-opus-5-5", 5)
    assert g.main(["usage", "--by", "model_served", "--json"]) == 0
    assert '"input_tokens": 5' in books._capsys.readouterr().out


def test_what_another_model_did_is_compared_under_its_name(books):
    """
    An advisor of a cheap call stands in the provider's export under the advisor's model.
    """
    export = """usage_date_utc,model_version,usage_input_tokens_no_cache,usage_output_tokens
2026-11-01,claude-haiku-4-5,1760,531
2026-11-01,claude-opus-4-6,823,1612
"""
    advisor = {"what": "advisor_message", "usd": 0.044415, "model": "claude-opus-4-6"}
    advisor |= {"input_tokens": 823, "output_tokens": 1612}
    books.book("2026-11-01T08:00:00.000Z", "claude-haiku-4-5", 2583, 0, 0, 0, 2143, charges=[advisor])

    assert books.reconcile(export) == 0


def test_an_exports_names_cannot_steer_the_terminal(books):
    """
    The file is somebody else's.
    """
    assert books.reconcile("date,model,input_tokens,output_tokens\n2026-11-21,\x1b[31mred\u202e,5,6\n") == 1
    assert "2026-11-21  �[31mred�  input" in books.out

    assert books.reconcile("a\x1b[31mb,\u202emodel\n1,2\n") == 1
    assert "its columns are a�[31mb, �model." in books.err
