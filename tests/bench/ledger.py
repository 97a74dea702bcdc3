"""Bench: what the ledger costs. `python tests/bench/ledger.py [entries]`; writes to a temporary folder only."""

from __future__ import annotations

import datetime as dt
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import gateway as g

FIRST = dt.datetime(2026, 1, 1, tzinfo=dt.UTC).timestamp()
LAST = dt.datetime(2026, 12, 31, tzinfo=dt.UTC).timestamp()
DAYS = 364
CLOCK = g.Clock(lambda: LAST, time.monotonic)
APPENDS = 50_000


def entry(number: int, at: float) -> g.Entry:
    """A call as it is in everyday use: 40 keys in 8 teams, three models; 8 keys at work in any hour."""
    worker = number % 8 + 8 * (int(at // 3600) % 5)
    return g.Entry(
        time=g.utc_time(at),
        request_id=f"req_{number:024x}",
        key=f"key-{worker}",
        team=f"team-{worker % 8}",
        upstream="anthropic",
        model=("claude-opus-4-8", "claude-sonnet-4-8", "claude-haiku-4-8")[number % 3],
        model_served="claude-opus-4-8",
        path="/v1/messages",
        stream=True,
        status=200,
        outcome="completed",
        error_type="",
        attempts=1,
        input_tokens=number % 100,
        output_tokens=number % 2000,
        cache_write_5m_tokens=number % 5000,
        cache_write_1h_tokens=0,
        cache_read_tokens=number % 90_000,
        estimated=False,
        cost_usd=round(number % 977 * 1e-5, 6),
        price=g.Price(input=5.0, output=25.0),
        first_byte_ms=812.25,
        duration_ms=8123.5,
        bytes_up=150_000,
        bytes_down=40_000,
        session=f"00000000-0000-4000-8000-{number % 1000:012x}",
        client="192.0.2.1",
        user_agent="claude-cli/2.1.329 (external, cli)",
        upstream_request_id=f"req_{number:024x}",
    )


def make(directory: Path, count: int) -> None:
    """A year of entries, chained, without the ledger's own writing."""
    chain, month, lines = g.FIRST_CHAIN, "", []
    for number in range(count):
        days, of_day = divmod(number * DAYS / count, 1)
        made = entry(number, FIRST + days * 86400 + 32400 + of_day * 32400)  # from 9 to 18 o'clock
        text = g.ENTRY_ENCODER.encode(made)
        chain = g.chain_value(chain, text)
        if month != made.time[:7] or len(lines) >= 10_000:
            save(directory, month, lines)
            month, lines = made.time[:7], []
        lines.append(text[:-2] + chain + b'"}\n')
    save(directory, month, lines)


def save(directory: Path, month: str, lines: list[bytes]) -> None:
    """Append lines to a month's file."""
    if lines:
        with (directory / f"usage-{month}.jsonl").open("ab") as file:
            file.write(b"".join(lines))


def seconds(do: Callable[[], object]) -> float:
    """How long something takes."""
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def main() -> None:
    """Make the entries, and time what is done with them."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        print(f"{count:,} entries made in {seconds(lambda: make(directory, count)):.1f} s")

        first = g.Index(directory, g.Calendar(dt.UTC), LAST)
        first.open()
        for view in first.views:
            fold_s = seconds(lambda view=view: first.catch_up(view))
            print(f"full fold, {view.name:8} {fold_s:8.2f} s   {fold_s / count * 1e6:.2f} s per million")
            assert view.entries == count
        questions = {"day, model": ("day", "model"), "day, upstream, outcome": ("day", "upstream", "outcome")}
        for name, by in questions.items():
            print(f"by {name:22} {seconds(lambda by=by: first.ask(by)) * 1e3:8.2f} ms")
        first.close()

        books = g.Books(g.Ledger(directory, 1.0, CLOCK), CLOCK, dt.UTC)
        print(f"start with an index {seconds(books.load):8.2f} s   (target 0.3)")
        print(f"index               {(directory / g.Index.FILE).stat().st_size:,} bytes")
        second = books.ledger

        entries = [entry(number, LAST + number / 50) for number in range(APPENDS)]
        append_s = seconds(lambda: [second.append(each) for each in entries])
        print(f"append              {append_s / APPENDS * 1e6:8.2f} µs  (target 15)")
        second.close()
        books.close()

        text = g.ENTRY_ENCODER.encode(entries[0])
        chain_s = seconds(lambda: [g.chain_value(g.FIRST_CHAIN, text) for _ in range(APPENDS)])
        print(f"chain value alone   {chain_s / APPENDS * 1e6:8.2f} µs  (target 5)")


if __name__ == "__main__":
    main()
