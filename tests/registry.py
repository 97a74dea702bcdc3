"""An image registry and GitHub's side of it, for docker, cosign and gh as far as .ci/ calls them.

Each of those commands is a link to tests/stubs/stub.sh, which asks here, over loopback, what to print and to return.
"""

from __future__ import annotations

import hashlib
import json
import re
import socketserver
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MB = 1_000_000
STUB = Path(__file__).parent / "stubs/stub.sh"
COMMANDS = ("docker", "cosign", "gh", "gzip", "sleep", "project")  # the last is for the project's own long scripts
ISSUER = "https://token.actions.githubusercontent.com"


class Refused(Exception):
    """The command fails, with this on stderr."""


@dataclass
class Registry:
    """What is stored, and what was asked for."""

    calls: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # beginnings of the command lines that fail
    manifests: dict[str, dict[str, Any]] = field(default_factory=dict)  # digest → manifest
    tags: dict[str, str] = field(default_factory=dict)  # image:tag → digest
    signed: dict[str, str] = field(default_factory=dict)  # digest → the workflow that signed it
    attested: dict[str, str] = field(default_factory=dict)  # digest → the repository
    issues: list[Issue] = field(default_factory=list)
    packed_bytes: int = MB  # of what gzip packs
    # The job that asks: what GitHub lets its token do, and who signs.
    rights: dict[str, str] = field(default_factory=dict)
    identity: str = ""

    def answer(self, words: list[str]) -> str:
        """Do what a command line asks for; what it prints."""
        line = " ".join(words)
        self.calls.append(line)
        if any(line.startswith(beginning) for beginning in self.broken):
            raise Refused(f"{line}: is broken")
        match words:
            case ["docker", "buildx", "imagetools", "create", *rest]:
                return self.create(rest)
            case ["docker", "buildx", "imagetools", "inspect", ref, "--format", "{{json .Manifest}}"]:
                return json.dumps({"digest": self.digest_of(ref)})
            case ["docker", "buildx", "imagetools", "inspect", "--raw", ref]:
                return json.dumps(self.manifests[self.digest_of(ref)])
            case ["docker", "buildx", "imagetools", "inspect", ref, "--format", "{{json .SBOM}}"]:
                kinds = [
                    child["platform"]["architecture"] for child in self.manifests[self.digest_of(ref)]["manifests"]
                ]
                return json.dumps(["a list of parts"] * kinds.count("unknown"))
            case ["docker", "buildx", "imagetools", "inspect", ref]:
                return f"Name: {ref}\nDigest: {self.digest_of(ref)}\n"
            case ["docker", "pull", "--quiet", "--platform", platform, ref]:
                children = self.manifests[self.digest_of(ref)]["manifests"]
                if platform not in [
                    f"{each['platform']['os']}/{each['platform']['architecture']}" for each in children
                ]:
                    raise Refused(f"no {platform} in {ref}")
            case ["cosign", "sign", "--yes", ref]:
                self.need("id-token", "write")
                self.need("packages", "write")
                self.signed[self.digest_of(ref)] = self.identity
            case ["cosign", "verify", ref, *options]:
                self.verify(ref, dict(zip(options[::2], options[1::2], strict=True)))
            case ["gh", "attestation", "verify", ref, "--repo", repository]:
                self.need("attestations", "read", "write")
                if self.attested.get(self.digest_of(ref.removeprefix("oci://"))) != repository:
                    raise Refused("no attestations found")
            case ["gh", *rest]:
                return self.issue(rest)
            case ["gzip"]:
                return "x" * self.packed_bytes
            case ["docker", "save", "gateway"] | ["docker", "logout", "ghcr.io"] | ["sleep", _] | ["project", *_]:
                pass
            case _:
                raise Refused(f"{line}: nobody said what this does")
        return ""

    def need(self, right: str, *levels: str) -> None:
        """Fail unless the job's token may do it."""
        if self.rights.get(right) not in levels:
            raise Refused(f"denied: the job has no {right}: {levels[0]}")

    def digest_of(self, ref: str) -> str:
        """What a tag or a digest means."""
        self.need("packages", "read", "write")
        digest = ref.split("@")[1] if "@" in ref else self.tags.get(ref, "")
        if digest not in self.manifests:
            raise Refused(f"{ref}: not found")
        return digest

    def push(self, manifest: dict[str, Any]) -> str:
        """Store a manifest; its digest."""
        self.need("packages", "write")
        digest = "sha256:" + hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
        self.manifests[digest] = manifest
        return digest

    def create(self, arguments: list[str]) -> str:
        """Name one source as it is, or an index of several, with annotations."""
        self.need("packages", "write")
        tags: list[str] = []
        annotations: dict[str, str] = {}
        sources: list[str] = []
        words = iter(arguments)
        for word in words:
            if word == "--tag":
                tags.append(next(words))
            elif word == "--annotation":
                key, value = next(words).removeprefix("index:").split("=", 1)
                annotations[key] = value
            else:
                sources.append(self.digest_of(word))
        digest = sources[0]
        if annotations or len(sources) > 1:
            children = [child for source in sources for child in self.manifests[source]["manifests"]]
            digest = self.push({"annotations": annotations, "manifests": children})
        self.tags |= dict.fromkeys(tags, digest)
        return ""

    def verify(self, ref: str, options: dict[str, str]) -> None:
        """Fail unless this identity, or one that matches, signed it."""
        signer = self.signed.get(self.digest_of(ref), "nobody")
        exactly = "^" + re.escape(options.get("--certificate-identity", "")) + "$"
        pattern = options.get("--certificate-identity-regexp", exactly)
        if options["--certificate-oidc-issuer"] != ISSUER or not re.search(pattern, signer):
            raise Refused(f"signed by {signer}")

    def issue(self, arguments: list[str]) -> str:
        """List, open, comment and close issues."""
        match arguments:
            case ["issue", "list", "--state", "open", *_]:
                found = [(number, each) for number, each in enumerate(self.issues) if each.is_open]
                return json.dumps([{"number": number, "title": each.title} for number, each in found])
            case ["label", "create", *_]:
                self.need("issues", "write")
            case ["issue", "create", "--title", title, "--label", _, "--body", body]:
                self.need("issues", "write")
                self.issues.append(Issue(title, [body]))
            case ["issue", "comment", number, "--body", text] | ["issue", "close", number, "--comment", text]:
                self.need("issues", "write")
                self.issues[int(number)].comments.append(text)
                self.issues[int(number)].is_open &= arguments[1] != "close"
            case _:
                raise Refused(f"gh {arguments}: nobody said what this does")
        return ""


@dataclass
class Issue:
    """One on GitHub."""

    title: str
    comments: list[str]
    is_open: bool = True


class Server(socketserver.ThreadingTCPServer):
    """Hands the words of tests/stubs/stub.sh to a registry; its commands lie in `folder`."""

    daemon_threads = True

    def __init__(self, registry: Registry, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.registry = registry
        self.lock = threading.Lock()
        folder.mkdir()
        for name in COMMANDS:
            (folder / name).symlink_to(STUB)
        self.environ = {"STUB_PORT": str(self.server_address[1])}
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        """End it."""
        self.shutdown()
        self.thread.join()
        self.server_close()


class Asked(socketserver.StreamRequestHandler):
    """One call: how many arguments, then name and arguments, each ended by NUL. Answered by exit code and output."""

    server: Server

    def handle(self) -> None:
        """Answer it."""
        words = [self.word()]
        words = [self.word() for _ in range(int(words[0]) + 1)]
        try:
            with self.server.lock:
                code, output = 0, self.server.registry.answer(words)
        except Refused as refused:
            code, output = 1, f"ERROR: {refused}\n"
        self.wfile.write(f"{code}\n{output}".encode())

    def word(self) -> str:
        """Read up to the next NUL."""
        read = bytearray()
        while (byte := self.rfile.read(1)) not in (b"\0", b""):
            read += byte
        return read.decode()
