"""What is installed, against the image's own list or each package's RECORD."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import gateway as g

DOCKERFILE = (Path(g.__file__).parent / "Dockerfile").read_text()
RUNS = "runs code at every start of Python"


class Site:
    """A folder of packages: demo-lib, and setuptools with its .pth file."""

    def __init__(self, folder: Path) -> None:
        self.above, self.folder = folder, folder / "site-packages"
        self.list = folder / "gateway.sha256"
        self.install(
            "demo_lib", "1.0", {"demo/__init__.py": "x = 1\n", "demo/data/table": "1 2 3\n", "../bin/demo": ""}
        )
        self.write("demo/__pycache__/__init__.cpython-311.pyc", "bytecode")
        shim = "import os; var = 'SETUPTOOLS_USE_DISTUTILS'; enabled = os.environ.get(var, 'local') == 'local'; "
        shim += "enabled and __import__('_distutils_hack').add_shim(); \n"
        self.install("setuptools", "80.0", {"distutils-precedence.pth": shim, "_distutils_hack/__init__.py": ""})

    def write(self, name: str, text: str) -> None:
        """Write one file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def install(self, name: str, version: str, files: dict[str, str]) -> None:
        """Lay a package's files and their RECORD, as pip does."""
        about = f"{name}-{version}.dist-info"
        files = {**files, f"{about}/METADATA": f"Name: {name.replace('_', '-')}\nVersion: {version}\n\nText\nName: x\n"}
        rows = [f"{about}/RECORD,,", f"{name}/__pycache__/__init__.cpython-311.pyc,,"]
        for path, text in files.items():
            self.write(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
            rows.append(f"{path},sha256={digest},{len(text)}")
        self.write(f"{about}/RECORD", "\r\n".join(rows) + "\r\n")

    def make_list(self) -> None:
        """List all files, as the Dockerfile does."""
        found = re.search(r"&& find (.*) (-xtype .*) >/tmp/(\S+)", DOCKERFILE)
        assert found and found[3] == g.INTEGRITY_LIST.name
        assert found[1] == "/app /usr/local/bin /usr/local/lib $others"
        subprocess.run(["sh", "-c", f"find {self.folder} {found[2]} >{self.list}"], check=True)

    def problems(self) -> list[str]:
        """What is found, with paths from the folder on."""
        found = g.check_integrity([str(self.folder), str(self.above / "none")], self.list)
        return [problem.removeprefix(f"{self.folder}/") for problem in found.problems]


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


def write(name: str, text: str) -> Callable[[Site], None]:
    """Somebody writes a file."""
    return lambda site: site.write(name, text)


def install(name: str, version: str, files: dict[str, str]) -> Callable[[Site], None]:
    """Somebody installs a package with its RECORD."""
    return lambda site: site.install(name, version, files)


def link(name: str, target: str) -> Callable[[Site], None]:
    """Somebody lays a link in the place of what is there."""

    def lay(site: Site) -> None:
        (site.folder / name).unlink(missing_ok=True)
        (site.folder / name).symlink_to(target)

    return lay


def remove(name: str) -> Callable[[Site], None]:
    """Somebody removes a file."""
    return lambda site: (site.folder / name).unlink()


def fifo(name: str) -> Callable[[Site], None]:
    """Somebody lays a pipe in a file's place, which nobody writes to."""

    def lay(site: Site) -> None:
        (site.folder / name).unlink()
        os.mkfifo(site.folder / name)

    return lay


# What is done to the folder, what is found by RECORD, and with the image's list.
EVIL_PTH = ("evil.pth", "# harmless\nimport os\n")
EVIL_PACKAGE = install("evil", "1.0", dict([EVIL_PTH]))
BOTH_FOREIGN = ["evil-1.0.dist-info is in no list", "evil.pth is in no list"]
TAMPERING = {
    "nothing": (lambda site: None, [], []),
    "a file is changed": (write("demo/__init__.py", "x = 2\n"), *[["demo/__init__.py was changed"]] * 2),
    "a file becomes a pipe": (fifo("demo/__init__.py"), *[["demo/__init__.py was changed"]] * 2),
    "a file is missing": (remove("demo/data/table"), *[["demo/data/table is missing"]] * 2),
    "a module": (write("evil.py", ""), *[["evil.py is in no list"]] * 2),
    "in a package": (write("demo/evil.py", ""), *[["demo/evil.py is in no list"]] * 2),
    "a folder is named alone": (write("evil/a/b.py", ""), *[["evil is in no list"]] * 2),
    "a folder without files": (lambda site: (site.folder / "empty" / "inner").mkdir(parents=True), [], []),
    "a linked folder": (link("evil", "/tmp"), *[["evil is in no list"]] * 2),
    "a link to nowhere": (
        link("demo/data/table", "../../nowhere"),
        *[["demo/data/table was changed"]] * 2,
    ),
    "bytecode is changed": (
        write("demo/__pycache__/__init__.cpython-311.pyc", "other"),
        [],
        ["demo/__pycache__/__init__.cpython-311.pyc was changed"],
    ),
    "foreign bytecode": (write("demo/__pycache__/x.pyc", ""), [], ["demo/__pycache__/x.pyc is in no list"]),
    "a .pth of nobody": (
        write(*EVIL_PTH),
        ["evil.pth is in no list", f"evil.pth {RUNS}"],
        ["evil.pth is in no list"],
    ),
    "a .pth with a path": (write("path.pth", "/elsewhere\n"), *[["path.pth is in no list"]] * 2),
    "a .pth that a package lists": (EVIL_PACKAGE, [f"evil.pth {RUNS}"], BOTH_FOREIGN),
    "a .pth with a byte order mark": (
        install("evil", "1.0", {"evil.pth": "\ufeffimport\tos"}),
        [f"evil.pth {RUNS}"],
        BOTH_FOREIGN,
    ),
    "a listed .pth with a path": (install("evil", "1.0", {"evil.pth": "/elsewhere\n"}), [], BOTH_FOREIGN),
    "the known .pth is another": (
        write("distutils-precedence.pth", "import evil\n"),
        ["distutils-precedence.pth was changed", f"distutils-precedence.pth {RUNS}"],
        ["distutils-precedence.pth was changed"],
    ),
    "sitecustomize": (
        install("evil", "1.0", {"sitecustomize.py": ""}),
        [f"sitecustomize.py {RUNS}"],
        ["evil-1.0.dist-info is in no list", "sitecustomize.py is in no list"],
    ),
    "usercustomize": (
        write("usercustomize/__init__.py", ""),
        ["usercustomize is in no list", f"usercustomize {RUNS}"],
        ["usercustomize is in no list"],
    ),
    "a package without RECORD": (
        remove("demo_lib-1.0.dist-info/RECORD"),
        ["demo is in no list", "demo_lib-1.0.dist-info is in no list"],
        ["demo_lib-1.0.dist-info/RECORD is missing"],
    ),
    "a RECORD that is none": (
        write("demo_lib-1.0.dist-info/RECORD", "a,b\n"),
        ["demo is in no list", "demo_lib-1.0.dist-info is in no list"],
        ["demo_lib-1.0.dist-info/RECORD was changed"],
    ),
    "a package that says no name": (
        write("demo_lib-1.0.dist-info/METADATA", ""),
        ["demo_lib-1.0.dist-info/METADATA was changed"],
        ["demo_lib-1.0.dist-info/METADATA was changed"],
    ),
}


@pytest.mark.parametrize("tamper, by_record, by_list", TAMPERING.values(), ids=TAMPERING)
def test_what_was_tampered_with_is_named(site, tamper, by_record, by_list):
    """
    Without the image's list by the RECORDs, and with it.
    """
    site.make_list()
    kept = site.list.read_bytes()
    site.list.unlink()

    tamper(site)
    without = site.problems()
    site.list.write_bytes(kept)

    assert sorted(without) == sorted(by_record)
    assert sorted(site.problems()) == by_list


def test_what_is_foreign_is_named_once(site):
    """
    Folders of sys.path lie in one another, are links, or are named twice.
    """
    (site.folder / "inner").mkdir()
    site.write("inner/module.py", "")
    site.make_list()
    site.write("inner/evil.py", "")
    (site.above / "link").symlink_to(site.folder)
    path = [str(site.folder), str(site.above / "link"), str(site.folder / "inner")]

    there = site.list.rename(site.folder / site.list.name)  # where the image has it: the list does not name itself
    found = g.check_integrity(path, there)

    assert found.problems == [f"{site.folder}/inner/evil.py is in no list"]
    assert found.source == str(there) and found.files == 10


# At the start


def check_at_the_start(site: Site) -> g.Metrics:
    """Compare as the start does; the metrics when the thread has ended."""
    metrics = g.Metrics(0.0, g.Events(g.Guard(g.Clock())))
    g.check_in_background(metrics, [str(site.folder)], site.list)
    for thread in threading.enumerate():
        if thread.name == "integrity":
            thread.join()
    return metrics


def test_a_start_says_that_nothing_differs(site, caplog):
    """
    One line; without the image's list none.
    """
    with caplog.at_level("INFO"):
        assert check_at_the_start(site).integrity_problems == 0
        assert caplog.messages == []

        site.make_list()
        assert check_at_the_start(site).integrity_problems == 0
        assert caplog.messages == [f"integrity: 9 files are as in {site.list}"]


@pytest.mark.logs("integrity: ")
def test_a_start_names_what_differs(site, caplog):
    """
    One line at ERROR with the first five, and a metric with their number.
    """
    site.make_list()
    for name in "abcdef\n":
        site.write(f"{name}.pth", "import os\n")

    assert check_at_the_start(site).integrity_problems == 7
    (record,) = caplog.records
    told = "; ".join(f"{site.folder}/{name}.pth is in no list" for name in ("�", *"abcd"))
    assert record.levelname == "ERROR"
    assert record.getMessage() == f"integrity: differences from {site.list}: 7, such as {told}"


@pytest.mark.logs("integrity: ")
def test_a_list_that_cannot_be_read_is_a_difference(site, caplog):
    """
    The thread does not end without a word.
    """
    site.list.write_bytes(b"\xff")

    assert check_at_the_start(site).integrity_problems == 1
    assert f"such as {site.list} cannot be read: 'utf-8' codec" in caplog.messages[0]


# As processes


def test_the_command_says_how_this_environment_is():
    """
    It needs no config. Where these tests run no installed file was changed.
    """
    command = [sys.executable, g.__file__, "check", "--integrity"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    *problems, last = done.stdout.splitlines()

    assert done.stderr == ""
    assert re.fullmatch(rf"compared [\d,]+ files with the RECORD of each package; differences: {len(problems)}", last)
    assert done.returncode == bool(problems)
    assert [line for line in problems if "was changed" in line] == []


def test_a_gateway_with_a_list_compares_when_it_listens(site, start_process):
    """
    Its line comes after the port is open, and the start is not refused. `check` ends with 1.
    """
    site.make_list()
    site.write("evil.pth", "import os\n")
    program = site.above / "start.py"
    program.write_text(
        "import sys, cryptography.fernet, uvloop\n"
        f"sys.path.append({str(Path(g.__file__).parent)!r})\n"
        "import gateway\n"
        f"sys.path[:] = [{str(site.folder)!r}]\n"
        f"gateway.INTEGRITY_LIST = gateway.Path({str(site.list)!r})\n"
        "sys.exit(gateway.main())\n"
    )
    checked = subprocess.run([sys.executable, program, "check", "--integrity"], capture_output=True)
    process = start_process(site.above, program=program)
    is_told, _, _ = select.select([process.process.stderr], [], [], 20)
    assert is_told
    line = process.process.stderr.readline()
    code, _ = process.end()

    assert f"integrity: differences from {site.list}: 1, such as {site.folder}/evil.pth is in no list" in line
    assert process.port and code == 0
    assert checked.returncode == 1
    assert checked.stdout.decode().splitlines()[0] == f"{site.folder}/evil.pth is in no list"
