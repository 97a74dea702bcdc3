"""From a commit to the tags that people pull: .github/workflows/publish.yml with .ci/image and .ci/notify."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest
from test_deploy import needs
from workflow import IMAGE, MB, ROOT, WORKFLOW, GitHub

pytestmark = [needs("jq"), needs("git")]

MAIN = "refs/heads/main"


@pytest.fixture
def hub(tmp_path) -> Iterator[GitHub]:
    """A repository with one commit, and an empty registry."""
    hub = GitHub(tmp_path)
    yield hub
    hub.server.stop()


def of(digests: dict[str, str]) -> set[str]:
    """The different digests."""
    return set(digests.values())


# --- what moves ---------------------------------------------------------------------


def test_a_push_to_main_moves_latest_main_and_the_commit(hub):
    """
    All of them are one index over both architectures, with the commit it was made of, signed and attested.
    """
    sha = hub.git("rev-parse", "HEAD")

    results = hub.run("push", MAIN)

    assert results == dict.fromkeys(("check", "build", "scan", "publish", "notify"), "success") | {"cleanup": "skipped"}
    assert set(hub.tags) == {"latest", "main", sha}
    (digest,) = of(hub.tags)
    index = hub.registry.manifests[digest]
    architectures = [child["platform"]["architecture"] for child in index["manifests"]]
    assert architectures == ["amd64", "unknown", "arm64", "unknown"]  # the others are what BuildKit attests
    assert index["annotations"]["org.opencontainers.image.revision"] == sha
    assert digest in hub.registry.signed and digest in hub.registry.attested
    assert hub.issues == {}


def test_what_is_published_is_what_was_tried(hub):
    """
    The smoke test runs each digest that is joined, before anything has a name.
    """
    hub.run("push", MAIN)

    tried = [line.split()[-1] for line in hub.called("project deploy/smoke.sh")]
    (join,) = hub.called(f"docker buildx imagetools create --tag {IMAGE}:build-1-1")
    assert len(tried) == 2 and join.split()[-2:] == tried


def test_a_version_moves_its_lines_and_leaves_latest(hub):
    """
    1.2.3, 1.2 and 1; there is no 0, and a version before its release moves no line.
    """
    hub.run("push", MAIN)
    main = hub.tags["latest"]
    sha = hub.commit("v0.9.0", "v1.2.3", "v1.3.0-rc.1")

    for tag in ("v0.9.0", "v1.2.3", "v1.3.0-rc.1"):
        assert hub.run("push", f"refs/tags/{tag}")["publish"] == "success"

    moved = {name for name, digest in hub.tags.items() if digest != main}
    assert moved == {sha, "0.9.0", "0.9", "1.2.3", "1.2", "1", "1.3.0-rc.1"}
    assert hub.tags["1.2.3"] == hub.tags["1.2"] == hub.tags["1"] != hub.tags["1.3.0-rc.1"]
    assert hub.tags["latest"] == main


def test_a_pull_request_is_built_tried_and_measured_and_pushes_nothing(hub):
    """
    From a fork, too: no login, nothing in the registry.
    """
    results = hub.run("pull_request", "refs/pull/7/merge", commit=hub.git("rev-parse", "HEAD"))

    assert results["check"] == results["build"] == "success"
    assert {results[job] for job in ("scan", "publish", "cleanup", "notify")} == {"skipped"}
    assert hub.called("project deploy/smoke.sh gateway") and hub.called("docker save gateway")
    assert hub.called("build: docker/login-action") == [] and hub.registry.manifests == {}


@pytest.mark.parametrize("event", ["release", "push"], ids=["a release after the tag", "the run is started again"])
def test_a_version_is_published_once(hub, event):
    """
    Whatever comes for the same tag finds it there, and changes nothing.
    """
    hub.commit("v1.2.3")
    hub.run("push", "refs/tags/v1.2.3")
    before = hub.tags

    results = hub.run(event, "refs/tags/v1.2.3")

    assert results["publish"] == "success" and hub.tags == before


def test_a_version_that_was_published_by_half_is_completed(hub):
    """
    With the image that its tag has, not with the new one.
    """
    hub.commit("v1.2.3")
    hub.run("push", "refs/tags/v1.2.3")
    before = hub.tags
    del hub.registry.tags[f"{IMAGE}:1.2"], hub.registry.tags[f"{IMAGE}:1"]

    hub.run("push", "refs/tags/v1.2.3")

    assert hub.tags == before


def test_a_version_is_not_published_of_another_commit(hub):
    """
    A tag that was moved in the repository is an error, and everything stays.
    """
    hub.commit("v1.2.3")
    hub.run("push", "refs/tags/v1.2.3")
    before = hub.tags
    hub.commit()
    hub.git("tag", "-f", "v1.2.3")

    results = hub.run("push", "refs/tags/v1.2.3")

    assert results["publish"] == "failure" and hub.tags == before
    assert hub.issues == {"v1.2.3 is broken": "open"}


def test_a_fix_of_an_older_line_leaves_the_newer_one(hub):
    """
    1.2.4 after 1.3.0 moves 1.2 and not 1; 1.10.0 is newer than 1.3.0.
    """
    for tag in ("v1.2.3", "v1.3.0", "v1.2.4"):
        hub.commit(tag)
        hub.run("push", f"refs/tags/{tag}")
    after = hub.tags
    hub.commit("v1.10.0")
    hub.run("push", "refs/tags/v1.10.0")

    assert after["1"] == after["1.3"] == after["1.3.0"]
    assert after["1.2"] == after["1.2.4"] != after["1.2.3"]
    assert hub.tags["1"] == hub.tags["1.10.0"]


def test_an_old_run_that_is_started_again_turns_nothing_back(hub):
    """
    latest and main stay with the later commit; the commit's own tag follows.
    """
    old = hub.git("rev-parse", "HEAD")
    hub.run("push", MAIN)
    hub.commit()
    hub.run("push", MAIN)
    before = hub.tags

    hub.run("push", MAIN, commit=old)

    assert {name: digest for name, digest in hub.tags.items() if name != old} == {
        name: digest for name, digest in before.items() if name != old
    }
    assert hub.tags[old] != before[old]


def test_a_branch_that_went_back_takes_its_tags_along(hub):
    """
    Someone took the last commit away: what is published follows.
    """
    hub.commit()
    hub.run("push", MAIN)
    hub.git("reset", "-q", "--hard", "HEAD~1")

    hub.run("push", MAIN)

    sha = hub.git("rev-parse", "HEAD")
    assert hub.tags["latest"] == hub.tags["main"] == hub.tags[sha]


def test_the_weekly_build_moves_latest_and_no_commit(hub):
    """
    It is another image of the same commit; those without a name are cleaned up.
    """
    sha = hub.git("rev-parse", "HEAD")
    hub.run("push", MAIN)
    before = hub.tags

    results = hub.run("schedule", MAIN)

    assert results["cleanup"] == "success" and hub.called("cleanup: dataaxiom/ghcr-cleanup-action")
    assert hub.tags["latest"] == hub.tags["main"] != before["latest"] and hub.tags[sha] == before[sha]


def test_a_private_repository_is_signed_and_not_attested(hub):
    """
    GitHub keeps no attestations of it.
    """
    hub.is_private = True

    results = hub.run("push", MAIN)

    assert results["publish"] == "success" and hub.registry.attested == {}
    assert hub.tags["latest"] in hub.registry.signed and hub.called("gh attestation") == []


# --- what does not ------------------------------------------------------------------

STEPS = {
    "the tests": "project .ci/run",
    "the linters": "project .ci/lint",
    "the build": "docker/build-push-action",
    "the smoke test": "project deploy/smoke.sh",
    "the scan": "aquasecurity/trivy-action",
    "the join": f"docker buildx imagetools create --tag {IMAGE}:build-",
    "the signature": "cosign sign",
    "the attestation": "actions/attest",
    "who signed": "cosign verify",
    "the provenance": "gh attestation verify",
    "a pull": "docker pull --quiet --platform linux/arm64",
    "the registry": f"docker buildx imagetools inspect {IMAGE}:1.2.3",
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_leaves_every_tag_where_it_was(hub, step):
    """
    Tags move last: after check, scan, signature and verification. An issue says that something failed.
    """
    hub.publish(hub.git("rev-parse", "HEAD"), "latest", "main", "1.2.2", "1.2", "1")
    before = hub.tags
    hub.commit("v1.2.3")
    hub.registry.broken = [STEPS[step]]

    results = hub.run("push", "refs/tags/v1.2.3")

    assert "failure" in results.values() and hub.tags == before
    assert hub.issues == {"v1.2.3 is broken": "open"}


@pytest.mark.parametrize("step", ["the tests", "the scan", "who signed"])
def test_latest_stays_when_main_fails(hub, step):
    """
    As a version does.
    """
    hub.publish(hub.git("rev-parse", "HEAD"), "latest", "main")
    before = hub.tags
    hub.commit()
    hub.registry.broken = [STEPS[step]]

    results = hub.run("push", MAIN)

    assert "failure" in results.values() and hub.tags == before


@pytest.mark.parametrize("event", ["push", "pull_request"])
def test_an_image_over_the_budget_fails_the_build(hub, event):
    """
    56 MB to download, for each architecture; of a pull request, too.
    """
    hub.layers = [40 * MB, 16 * MB]
    hub.registry.packed_bytes = 56 * MB
    at_most = hub.run(event, MAIN)
    before = hub.tags
    hub.commit()
    hub.layers = [40 * MB, 16 * MB + 1]
    hub.registry.packed_bytes += 1

    above = hub.run(event, MAIN)

    assert (at_most["build"], above["build"]) == ("success", "failure")
    assert hub.tags == before


def test_the_summary_shows_size_and_time_beside_the_budget(hub):
    """
    For each architecture, and which tags moved to what.
    """
    hub.run("push", MAIN)

    of_builds = [
        (hub.folder / f"run-1-build-{arch}/summary") for arch in ("amd64-ubuntu-24.04", "arm64-ubuntu-24.04-arm")
    ]
    for arch, file in zip(("amd64", "arm64"), of_builds, strict=True):
        assert re.match(rf"\*\*{arch}\*\*: 50 MB to download, of 56; built in \d+ s", file.read_text())
    published = (hub.folder / "run-1-publish-/summary").read_text()
    assert f"## `{IMAGE}@{hub.tags['latest']}`" in published and f"- `{IMAGE}:latest`\n" in published


# --- who hears of it ----------------------------------------------------------------


def test_an_issue_is_opened_once_and_closed_by_a_good_run_of_the_same(hub):
    """
    One for main and one for the version; another's good run closes none.
    """
    hub.commit("v1.2.3")
    hub.registry.broken = ["aquasecurity/trivy-action"]
    for ref in (MAIN, MAIN, "refs/tags/v1.2.3"):
        hub.run("push", ref)
    broken = hub.issues
    hub.registry.broken = []
    hub.run("push", MAIN)
    after_main = hub.issues
    hub.run("push", "refs/tags/v1.2.3")

    assert broken == {"main is broken": "open", "v1.2.3 is broken": "open"}
    assert after_main == {"main is broken": "closed", "v1.2.3 is broken": "open"}
    assert set(hub.issues.values()) == {"closed"}
    first, second, last = hub.registry.issues[0].comments
    assert (
        first.startswith("scan: failure, at ")
        and second.startswith("scan: failure, at ")
        and last.startswith("Fixed at ")
    )


@pytest.mark.parametrize("job", ["check", "build", "scan", "publish"])
def test_a_job_that_ran_into_its_timeout_is_told(hub, job):
    """
    GitHub calls it cancelled.
    """
    hub.run("push", MAIN, cancelled=job)

    assert hub.issues == {"main is broken": "open"}
    assert hub.registry.issues[0].comments[0].startswith(f"{job}: cancelled, at ")


@pytest.mark.parametrize("broken", ["project .ci/run", "dataaxiom/ghcr-cleanup-action"])
def test_a_weekly_run_that_failed_is_told(hub, broken):
    """
    Nobody looks at it otherwise.
    """
    hub.registry.broken = [broken]

    hub.run("schedule", MAIN)

    assert hub.issues == {"main is broken": "open"} and "(schedule)" in hub.registry.issues[0].comments[0]


def test_develop_and_pull_requests_open_no_issue(hub):
    """
    Who pushed there is told by GitHub.
    """
    hub.git("branch", "develop")
    hub.registry.broken = ["project .ci/run"]

    hub.run("push", "refs/heads/develop")
    hub.run("pull_request", "refs/pull/7/merge", commit=hub.git("rev-parse", "HEAD"))

    assert hub.issues == {} and hub.tags == {}


# --- what the README says -----------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "tag", "verified"),
    [(MAIN, "latest", True), ("refs/tags/v1.2.3", "1.2.3", True), ("refs/heads/other", "", False)],
)
def test_the_readmes_commands_verify_what_was_signed(hub, ref, tag, verified):
    """
    Of main and of versions; what another branch has signed is refused.
    """
    sha = hub.commit("v1.2.3")
    hub.git("branch", "other")
    hub.run("workflow_dispatch" if ref.endswith("other") else "push", ref)
    commands = re.search(r"```sh\n(cosign verify .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    owner = commands.replace("ghcr.io/OWNER/claude-gateway:latest", f"{IMAGE}:{tag or sha}")
    owner = owner.replace("OWNER/claude-gateway", "Example/Claude-Gateway").replace("\\\n", " ")
    hub.registry.rights = {"packages": "read", "attestations": "read"}

    done = [
        subprocess.run(shlex.split(line), env=hub.environ, capture_output=True, text=True)
        for line in owner.splitlines()
    ]

    assert [process.returncode == 0 for process in done] == [verified, True, True], done
    assert done[-1].stdout.count("a list of parts") == 2


# --- its shape ----------------------------------------------------------------------


def test_the_workflow_is_read_in_one_sitting():
    """
    A page for each script; every job says its rights and how long it may take, 15 minutes along the longest path.
    """
    lengths = {
        name: len((ROOT / name).read_text().splitlines()) for name in (".github/workflows/publish.yml", ".ci/image")
    }
    minutes: dict[str, int] = {}
    for name, job in WORKFLOW["jobs"].items():
        before = job.get("needs", [])
        minutes[name] = job["timeout-minutes"] + max(
            (minutes[each] for each in ([before] if isinstance(before, str) else before)), default=0
        )

    assert lengths[".github/workflows/publish.yml"] <= 220 and lengths[".ci/image"] <= 90
    assert max(minutes.values()) <= 15
    assert WORKFLOW["permissions"] == {} and all("permissions" in job for job in WORKFLOW["jobs"].values())


def test_no_expression_stands_in_a_script():
    """
    A branch's name, or a title, would be shell there.
    """
    steps = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]

    assert [step["run"] for step in steps if "${{" in step.get("run", "")] == []


def test_what_scans_can_neither_publish_nor_sign():
    """
    It is others' code, and was turned into a thief of tokens before.
    """
    writing = {
        name: {right for right, level in job["permissions"].items() if level == "write"}
        for name, job in WORKFLOW["jobs"].items()
    }

    assert writing == {
        "check": set(),
        "build": {"packages"},
        "scan": {"security-events"},
        "publish": {"packages", "id-token", "attestations"},
        "cleanup": {"packages"},
        "notify": {"issues"},
    }
