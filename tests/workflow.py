"""Runs .github/workflows/publish.yml as GitHub would, as far as that file asks: jobs, matrices, outputs, rights.

The shell is the real one, in a real clone; docker, cosign and gh ask tests/registry.py, actions are functions below.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from registry import MB, Registry, Server

ROOT = Path(__file__).parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())
WORKFLOW["on"] = WORKFLOW.pop(True)  # YAML 1.1 reads the word as a boolean
REPOSITORY = "Example/Claude-Gateway"
WORKFLOW_FILE = f"{REPOSITORY}/.github/workflows/publish.yml"
IMAGE = "ghcr.io/example/claude-gateway"
LEFT_OUT = (".ci/run", ".ci/lint", "deploy/smoke.sh")

Context = dict[str, Any]


class Failed(Exception):
    """A step failed."""


# --- expressions --------------------------------------------------------------------

TOKEN = re.compile(r"'(?:[^']|'')*'|[A-Za-z_][\w-]*(?:\.[\w-]+)*|&&|\|\||!=|!|.", re.DOTALL)
OPERATORS = {"&&": " and ", "||": " or ", "!": " not ", "true": "True", "false": "False"}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "always": lambda: True,
    "format": lambda template, *values: template.format(*values),
    "startsWith": lambda text, start: text.startswith(start),
    "toJSON": json.dumps,
}


def evaluate(expression: str, context: Context) -> Any:
    """The value of what stands within `${{ }}`."""

    def look_up(path: str) -> Any:
        value: Any = context
        for name in path.split("."):
            value = value.get(name, "") if isinstance(value, dict) else ""
        return value

    def translated(token: str) -> str:
        if token.startswith("'"):
            return repr(token[1:-1].replace("''", "'"))
        if re.match(r"[A-Za-z_]", token) and token not in (*FUNCTIONS, *OPERATORS):
            return f"look_up({token!r})"
        return OPERATORS.get(token, token)

    python = "".join(translated(token) for token in TOKEN.findall(expression.replace("\n", " ")))
    return eval(python.strip(), {"look_up": look_up, **FUNCTIONS})


def filled_in(text: Any, context: Context) -> str:
    """A value of the file, with its expressions replaced."""

    def written(match: re.Match[str]) -> str:
        value = evaluate(match[1], context)
        return str(value).lower() if isinstance(value, bool) else str(value)

    return re.sub(
        r"\$\{\{(.*?)\}\}", written, str(text).lower() if isinstance(text, bool) else str(text), flags=re.DOTALL
    )


def is_wanted(part: Context, context: Context, *, succeeded: bool) -> bool:
    """Whether a job or a step runs: one whose condition has no `always()` only after success."""
    condition = str(part.get("if", "true")).removeprefix("${{").removesuffix("}}")
    return (succeeded or "always()" in condition) and bool(evaluate(condition, context))


# --- a run --------------------------------------------------------------------------


class GitHub:
    """A repository with its registry and issues, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry()
        self.server = Server(self.registry, folder / "bin")
        self.layers = [40 * MB, 10 * MB]  # what an image of one architecture is made of, compressed
        self.is_private = False
        self.runs = 0
        self.origin = folder / "origin"
        for name in (*LEFT_OUT, ".ci/image", ".ci/notify", "deploy/retry.sh"):
            file = self.origin / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f'#!/bin/sh\nexec project {name} "$@"\n' if name in LEFT_OUT else (ROOT / name).read_text())
            file.chmod(0o755)
        shutil.copytree(self.origin, folder / "shallow")
        self.git("init", "-q", "-b", "main")
        self.git("add", ".")
        self.commit()

    @property
    def tags(self) -> dict[str, str]:
        """What people pull: the name after the image's → the digest. Without the names of single builds."""
        tags = {name.removeprefix(f"{IMAGE}:"): digest for name, digest in self.registry.tags.items()}
        return {name: digest for name, digest in tags.items() if not name.startswith("build-")}

    @property
    def issues(self) -> dict[str, str]:
        """Title → whether it is open or closed."""
        return {issue.title: "open" if issue.is_open else "closed" for issue in self.registry.issues}

    def called(self, beginning: str) -> list[str]:
        """The command lines that began so, and the actions (`JOB: NAME`)."""
        return [line for line in self.registry.calls if line.startswith(beginning)]

    def publish(self, commit: str, *names: str) -> None:
        """Have an image of a commit in the registry, under these names."""
        manifest = {"annotations": {"org.opencontainers.image.revision": commit}, "manifests": []}
        self.registry.manifests[f"sha256:{commit}"] = manifest
        self.registry.tags |= {f"{IMAGE}:{name}": f"sha256:{commit}" for name in names}

    def git(self, *arguments: str, cwd: Path | None = None) -> str:
        """Git in the repository, or in a clone."""
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        done = subprocess.run(
            ["git", *who, *arguments],
            cwd=cwd or self.origin,
            check=True,
            capture_output=True,
            text=True,
            env=self.environ,
        )
        return done.stdout.strip()

    @property
    def environ(self) -> dict[str, str]:
        """Nothing of this machine but its programs."""
        path = f"{self.folder}/bin:{os.environ['PATH']}"
        return self.server.environ | {"PATH": path, "HOME": str(self.folder)}

    def commit(self, *tags: str) -> str:
        """A new commit on main, with its tags."""
        self.git("commit", "-q", "--allow-empty", "-m", "a change")
        for tag in tags:
            self.git("tag", tag)
        return self.git("rev-parse", "HEAD")

    def run(self, event: str, ref: str, commit: str = "", cancelled: str = "") -> dict[str, str]:
        """
        Run the workflow; the result of each job.

        The job `cancelled` runs into its timeout.
        """
        self.runs += 1
        kind, _, name = ref.removeprefix("refs/").partition("/")
        github = {
            "event_name": event,
            "event": {"repository": {"private": self.is_private}},
            "actor": "someone",
            "token": "a-token",
            "repository": REPOSITORY,
            "ref": ref,
            "ref_name": name,
            "ref_type": {"tags": "tag"}.get(kind, "branch"),
            "sha": commit or self.git("rev-parse", ref),
        }
        needs: Context = {}
        for job_name, job in WORKFLOW["jobs"].items():
            wanted = job.get("needs", [])
            context = {
                "github": github,
                "needs": {n: needs[n] for n in ([wanted] if isinstance(wanted, str) else wanted)},
            }
            succeeded = all(each["result"] == "success" for each in context["needs"].values())
            result, outputs = "skipped", {}
            if job_name == cancelled:
                result = "cancelled"
            elif is_wanted(job, context, succeeded=succeeded):
                made = [self.run_job(job_name, job, context | {"matrix": each}) for each in combinations(job)]
                result = "success" if all(result == "success" for result, _ in made) else "failure"
                for _, some in made:
                    outputs |= some
            needs[job_name] = {"result": result, "outputs": outputs}
        return {name: need["result"] for name, need in needs.items()}

    def run_job(self, name: str, job: Context, context: Context) -> tuple[str, Context]:
        """One combination of a job: its result and those outputs that it has set."""
        folder = self.folder / f"run-{self.runs}-{name}-{'-'.join(context['matrix'].values())}"
        folder.mkdir()
        context = context | {"steps": {}, "env": {}, "job": name}
        self.registry.rights = job["permissions"]
        self.registry.identity = f"https://github.com/{WORKFLOW_FILE}@{context['github']['ref']}"
        context["env"] = {key: filled_in(value, context) for key, value in job.get("env", {}).items()}
        result = "success"
        for number, step in enumerate(job["steps"]):
            if not is_wanted(step, context, succeeded=result == "success"):
                continue
            try:
                outputs = self.run_step(step, context, folder)
            except Failed:
                outputs = {}
                result = "failure" if not step.get("continue-on-error") else result
            context["steps"][step.get("id", str(number))] = {"outputs": outputs}
        outputs = {key: filled_in(value, context) for key, value in job.get("outputs", {}).items()}
        return result, {key: value for key, value in outputs.items() if value}

    def run_step(self, step: Context, context: Context, folder: Path) -> Context:
        """One step: its outputs."""
        if "run" in step:
            return self.run_shell(step, context, folder)
        name = step["uses"].split("@")[0]
        inputs = {key: filled_in(value, context) for key, value in step.get("with", {}).items()}
        self.registry.calls.append(f"{context['job']}: {name}")
        if name in self.registry.broken and "false" not in inputs.get("exit-code", ""):
            raise Failed(name)
        return ACTIONS.get(name, lambda *_: {})(self, inputs, context, folder)

    def run_shell(self, step: Context, context: Context, folder: Path) -> Context:
        """A step of the shell."""
        github = context["github"]
        output, summary = folder / "output", folder / "summary"
        output.write_text("")
        summary.touch()
        environ = self.environ | {
            f"GITHUB_{key.upper()}": str(value) for key, value in github.items() if key != "event"
        }
        environ |= {
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(summary),
            "GITHUB_RUN_ID": str(self.runs),
            "GITHUB_RUN_ATTEMPT": "1",
            "GITHUB_SERVER_URL": "https://github.com",
            "GITHUB_WORKFLOW_REF": f"{WORKFLOW_FILE}@{github['ref']}",
        }
        environ |= context["env"] | {key: filled_in(value, context) for key, value in step.get("env", {}).items()}
        done = subprocess.run(
            ["bash", "-e", "-c", step["run"]],
            cwd=folder / "files" if (folder / "files").exists() else folder,
            env=environ,
            capture_output=True,
            text=True,
        )
        with (folder / "log").open("a") as log:
            log.write(f"$ {step['run']}\n{done.stdout}{done.stderr}")
        if done.returncode:
            raise Failed(done.stderr)
        return dict(line.split("=", 1) for line in output.read_text().splitlines())


def combinations(job: Context) -> list[dict[str, str]]:
    """What a job's matrix has."""
    matrix = job.get("strategy", {}).get("matrix", {})
    if "include" in matrix:
        return list(matrix["include"])
    return [dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())]


# --- actions ------------------------------------------------------------------------


def checkout(hub: GitHub, inputs: Context, context: Context, folder: Path) -> Context:
    """The files, with commits and tags only if the whole history is asked for."""
    clone = hub.folder / "shallow"
    if inputs.get("fetch-depth") == "0":
        clone = hub.folder / f"clone-{hub.runs}"
        if not clone.exists():
            hub.git("clone", "-q", ".", str(clone))
            hub.git("checkout", "-q", context["github"]["sha"], cwd=clone)
    (folder / "files").symlink_to(clone)
    return {}


def metadata(hub: GitHub, inputs: Context, context: Context, folder: Path) -> Context:
    """Tags by the rules that are used here; a version before its release has its own tag alone."""
    github = context["github"]
    version = re.fullmatch(r"v((\d+)\.(\d+)\.\d+(-.+)?)", github["ref_name"]) if github["ref_type"] == "tag" else None
    tags = []
    for rule in inputs["tags"].split():
        fields = dict(part.split("=", 1) for part in rule.split(","))
        match fields:
            case {"enable": "false"}:
                pass
            case {"type": "raw", "value": value}:
                tags.append(value)
            case {"type": "ref", "event": "branch"} if github["ref_type"] == "branch":
                tags.append(github["ref_name"])
            case {"type": "sha", "format": "long", "prefix": ""}:
                tags.append(github["sha"])
            case {"type": "semver", "pattern": pattern} if version and (pattern == "{{version}}" or not version[4]):
                for name, value in zip(("version", "major", "minor"), version.groups(), strict=False):
                    pattern = pattern.replace("{{" + name + "}}", value)
                tags.append(pattern)
    assert inputs["flavor"] == "latest=false"
    annotations = (
        f"index:org.opencontainers.image.revision={github['sha']}\nindex:org.opencontainers.image.title=a title"
    )
    return {"tags": "\n".join(f"{inputs['images']}:{tag}" for tag in tags), "annotations": annotations, "labels": ""}


def build(hub: GitHub, inputs: Context, context: Context, folder: Path) -> Context:
    """An index of one image and its attestations, pushed by its digest; or an image that the engine loads."""
    if inputs["outputs"].startswith("type=docker"):
        assert (inputs["sbom"], inputs["provenance"]) == ("false", "false"), "an engine cannot load them"
        return {"digest": "sha256:loaded"}
    assert inputs["outputs"] == f"type=image,name={IMAGE},push-by-digest=true,name-canonical=true,push=true"
    architecture = inputs["platforms"].removeprefix("linux/")
    image = {"layers": [{"size": size} for size in hub.layers], "of": [architecture, hub.runs]}
    pushed = hub.registry.push
    children = [
        {"digest": pushed(image), "platform": {"architecture": architecture, "os": "linux"}},
        {"digest": pushed({"layers": [{"size": 1}]}), "platform": {"architecture": "unknown", "os": "unknown"}},
    ]
    return {"digest": pushed({"manifests": children})}


def attest(hub: GitHub, inputs: Context, context: Context, folder: Path) -> Context:
    """Provenance, which GitHub keeps."""
    for right in ("attestations", "id-token", "packages"):
        hub.registry.need(right, "write")
    assert inputs["subject-name"] == IMAGE
    hub.registry.attested[inputs["subject-digest"]] = REPOSITORY
    return {}


ACTIONS: dict[str, Callable[[GitHub, Context, Context, Path], Context]] = {
    "actions/checkout": checkout,
    "docker/metadata-action": metadata,
    "docker/build-push-action": build,
    "actions/attest": attest,
}
