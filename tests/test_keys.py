"""Keys: what is kept of a secret, what is said about a bad one, who may use which."""

from __future__ import annotations

import math
import re
import string
from pathlib import Path

import pytest
from conftest import KEY
from hypothesis import given, settings
from hypothesis import strategies as st

import gateway as g

KEY_SHA256 = "7ed9286150d0a78c5773ae43d23b288084afbe7b12afc5659dd7857a9dc3f5b4"
OLD, NEW = g.Vault.new_secret(), g.Vault.new_secret()
PLAIN = "sk-ant-0123456789abcdef"


# Users' keys: made, hashed, never printed


def test_a_new_key_has_the_prefix_and_32_letters_and_digits():
    """
    190 bits leave nothing to guess, and no two keys are alike.
    """
    keys = {g.new_key() for _ in range(100)}

    assert len(keys) == 100
    assert all(re.fullmatch(r"sk-proxy-[A-Za-z0-9]{32}", key) for key in keys)


def test_a_key_is_kept_as_its_hash_and_its_last_four_characters():
    """
    The file tells whose key it is, and nobody who reads it can use the key.
    """
    sealed = g.seal_key(KEY)

    assert sealed == f"sha256:{KEY_SHA256}:stuv"


def test_a_secret_does_not_print_itself_by_accident():
    """
    A repr stands in tracebacks, asserts and debug logs.
    """
    secret = g.Secret(PLAIN)

    assert repr(secret) == "Secret(…)"
    assert repr([secret]) == "[Secret(…)]"


def test_a_call_does_not_print_its_headers():
    """
    asyncio writes the arguments of a callback that fails into the log.
    """
    config = g.Config.parse("upstreams: [{name: a, format: demo}]", Path("config.yaml"), g.Clock(), {})
    headers = [(b"x-api-key", PLAIN.encode())]

    call = g.Call(config, key(), g.ROUTES["/v1/messages"], b"", headers, "")

    assert repr(call) == f"Call('{call.id}')"


# Pasted secrets


@pytest.mark.parametrize(
    "pasted",
    [
        "",
        " \t",
        f" {PLAIN}",
        f"{PLAIN}\n",
        f"{PLAIN}\r\n",
        f"{PLAIN}\r",
        f"{PLAIN} {PLAIN}",
        f"{PLAIN}\u00a0",
        f'"{PLAIN}"',
        f"'{PLAIN}'",
        f"`{PLAIN}`",
        f"“{PLAIN}”",
        f"{PLAIN}'",
        f"Bearer {PLAIN}",
        f"bearer {PLAIN}",
        f"sk-ant-ключ{PLAIN}",
        f"{PLAIN}\u200b",
        f"{PLAIN}\x00",
    ],
)
def test_a_pasted_secret_that_holds_more_is_refused(pasted):
    """
    Keys come from mails, shells and HTTP examples, and bring along what stood around them.
    """
    with pytest.raises(ValueError) as caught:
        g.check_pasted(pasted)

    assert (
        str(caught.value) == "is empty, or has blanks, quotes or other characters that no key has: paste only the key"
    )


GOOD_KEYS = st.text(string.ascii_letters + string.digits + "-_.", min_size=20)
DIRT = st.sampled_from(["", " ", "\n", "\r\n", '"', "'", "`", "“", "”", "Bearer ", "bearer ", "\t", "\ufeff", "\x7f"])


@settings(deadline=None)
@given(DIRT, GOOD_KEYS, DIRT)
def test_no_message_about_a_pasted_secret_echoes_it(before, key, after):
    """
    A clean key passes, a dirty one does not, and the message stands in logs and on screens that others see.
    """
    said = ""
    try:
        g.check_pasted(before + key + after)
    except ValueError as error:
        said = str(error)

    assert bool(said) == bool(before + after)
    assert key not in said


# The vault: upstream keys


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_is_sealed_opens_to_the_same_text(plain):
    """
    Whatever stands in the file, sealing loses none of it and shows none of it.
    """
    vault = g.Vault([NEW], "here")

    sealed = vault.seal(plain)

    assert re.fullmatch(r"enc:gAAAA[\w-]+=*", sealed)
    assert vault.unseal(sealed) == plain


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_with_two_secrets_both_open_and_the_newest_seals(plain):
    """
    A secret is replaced without a moment in which something cannot be opened.
    """
    before, during, after = g.Vault([OLD], "here"), g.Vault([NEW, OLD], "here"), g.Vault([NEW], "here")

    rotated = during.seal(during.unseal(before.seal(plain)))

    assert during.unseal(before.seal(plain)) == during.unseal(rotated) == after.unseal(rotated) == plain
    with pytest.raises(g.SealError):
        before.unseal(rotated)


def test_the_same_text_is_sealed_differently_each_time():
    """
    Who compares two files cannot tell that two upstreams share a key.
    """
    vault = g.Vault([NEW], "here")

    assert vault.seal(PLAIN) != vault.seal(PLAIN)


def test_a_plain_value_passes_the_vault_unchanged_and_needs_no_secret():
    """
    A config without sealed values works without a sealing secret.
    """
    vault = g.Vault([], "nowhere")

    assert vault.unseal(PLAIN) == PLAIN


@pytest.mark.parametrize(
    ("secrets", "value", "message"),
    [
        ([OLD], g.Vault([NEW], "").seal(PLAIN), "was sealed with another secret than the one in a/gateway.secret"),
        ([OLD], "enc:", "was sealed with another secret than the one in a/gateway.secret"),
        ([OLD], "enc:gAAAAéé", "was sealed with another secret than the one in a/gateway.secret"),
        ([], "enc:gAAAA", "cannot be opened: there is no sealing secret in a/gateway.secret"),
        (
            ["correct horse battery staple"],
            "enc:gAAAA",
            "cannot be opened: a/gateway.secret holds something that is no Fernet key (44 characters of base64)",
        ),
        (
            ["schlüssel"],
            "enc:gAAAA",
            "cannot be opened: a/gateway.secret holds something that is no Fernet key (44 characters of base64)",
        ),
    ],
)
def test_a_seal_that_cannot_be_opened_says_which_secret_was_tried(secrets, value, message):
    """
    With several hosts and secrets about, the first question is where this one came from.
    """
    with pytest.raises(g.SealError) as caught:
        g.Vault(secrets, "a/gateway.secret").unseal(value)

    assert str(caught.value) == (
        f"{message}. Restore the secret that it was sealed with (its file, or GATEWAY_SECRET), "
        "or put the value here in clear text and run `gateway.py seal`"
    )


def test_the_secret_is_taken_from_the_environment_else_a_named_file_else_beside_the_config(tmp_path):
    """
    GATEWAY_SECRET wins over GATEWAY_SECRET_FILE, and that over gateway.secret; an empty variable counts as none.
    """
    (tmp_path / "gateway.secret").write_text(f"{OLD}\n")
    (tmp_path / "named").write_text(f"{NEW}\n")
    named = str(tmp_path / "named")

    sources = [
        g.Vault.open(tmp_path, environ).source
        for environ in (
            {"GATEWAY_SECRET": NEW, "GATEWAY_SECRET_FILE": named},
            {"GATEWAY_SECRET": "", "GATEWAY_SECRET_FILE": named},
            {"GATEWAY_SECRET_FILE": ""},
        )
    ]

    assert sources == ["GATEWAY_SECRET", named, str(tmp_path / "gateway.secret")]


@pytest.mark.parametrize("between", [",", " ", ", ", "\n", "\r\n"])
def test_several_secrets_stand_side_by_side_newest_first(tmp_path, between):
    """
    In the environment commas or white space part them; in the file, lines.
    """
    sealed_before = g.Vault([OLD], "").seal(PLAIN)
    (tmp_path / "gateway.secret").write_bytes(f"{NEW} {OLD}\r\n".encode())

    for environ in ({"GATEWAY_SECRET": f"{NEW}{between}{OLD}"}, {}):
        vault = g.Vault.open(tmp_path, environ)

        assert vault.unseal(sealed_before) == PLAIN
        assert g.Vault([NEW], "").unseal(vault.seal(PLAIN)) == PLAIN


def test_a_secret_file_that_cannot_be_read_is_named(tmp_path):
    """
    A bind mount of a missing file makes a folder.
    """
    (tmp_path / "gateway.secret").mkdir()

    with pytest.raises(
        g.SealError, match=f"^cannot read the sealing secret {tmp_path}/gateway.secret: Is a directory$"
    ):
        g.Vault.open(tmp_path, {})


# Who may use a key, and who is told what

EXPIRES = 1_790_000_000.0  # 2026-09-21T14:13:20Z


def key(**changes: object) -> g.Key:
    """A key that anybody may use for ever, but for the changes."""
    fields = {
        "name": "alice",
        "digest": b"",
        "last4": "4f2a",
        "models": ("*",),
        "expires_at": math.inf,
        "networks": (),
        "enabled": True,
        "team": "",
        "budgets": (),
    }
    return g.Key(**fields | changes)


def networks(*texts: str) -> tuple[g.Network, ...]:
    """Networks as the config makes them."""
    return g.Networks.parse(list(texts))


@pytest.mark.parametrize(
    ("changes", "status", "kind", "code", "message"),
    [
        (
            {"enabled": False},
            403,
            "permission_error",
            "permission_denied",
            "The key alice (…4f2a) is disabled. Ask whoever runs this gateway.",
        ),
        (
            {"expires_at": EXPIRES},
            401,
            "authentication_error",
            "invalid_api_key",
            "The key alice (…4f2a) expired at 2026-09-21 14:13 UTC. Ask whoever runs this gateway for a new one.",
        ),
        (
            {"networks": networks("10.0.0.0/8")},
            403,
            "permission_error",
            "permission_denied",
            "The key alice (…4f2a) may not be used from 192.0.2.7.",
        ),
        (
            {"enabled": False, "expires_at": EXPIRES, "networks": networks("10.0.0.0/8"), "last4": ""},
            403,
            "permission_error",
            "permission_denied",
            "The key alice is disabled. Ask whoever runs this gateway.",
        ),
    ],
)
def test_a_disabled_expired_or_foreign_key_gets_a_message_and_a_status_of_its_own(changes, status, kind, code, message):
    """
    Its holder reads what to do, and Claude Code does not try eleven times.
    """
    with pytest.raises(g.GatewayError) as caught:
        key(**changes).check("192.0.2.7", EXPIRES)

    error = caught.value
    assert (error.status, error.type, error.code, error.should_retry) == (status, kind, code, False)
    assert error.message == message


def test_a_key_works_until_the_moment_it_expires():
    """
    The end itself is no longer in.
    """
    ending = key(expires_at=EXPIRES)

    ending.check("192.0.2.7", EXPIRES - 0.001)

    with pytest.raises(g.KeyRefused):
        ending.check("192.0.2.7", EXPIRES)


@pytest.mark.parametrize(
    ("allowed", "address", "may"),
    [
        (["10.0.0.0/8"], "10.1.2.3", True),
        (["10.0.0.0/8"], "11.0.0.1", False),
        (["10.0.0.0/8"], "::ffff:10.1.2.3", True),  # how a dual-stack socket shows an IPv4 client
        (["192.0.2.7"], "192.0.2.7", True),
        (["192.0.2.7"], "192.0.2.8", False),
        (["2001:db8::/32"], "2001:db8::1", True),
        (["2001:db8::/32"], "10.1.2.3", False),
        (["fe80::/10"], "fe80::1%eth0", True),
        (["10.0.0.0/8", "2001:db8::/32"], "2001:db8::1", True),
        (["0.0.0.0/0"], "somewhere", False),
        (["0.0.0.0/0"], "", False),
        ([], "somewhere", True),
    ],
)
def test_a_key_may_be_used_from_the_addresses_it_is_given(allowed, address, may):
    """
    No list: from anywhere. An address that is none lies in no network.
    """
    try:
        key(networks=networks(*allowed)).check(address, 0.0)
        allowed_in = True
    except g.KeyForbidden:
        allowed_in = False

    assert allowed_in is may


@pytest.mark.parametrize(
    ("globs", "model", "may"),
    [
        (["*"], "anything/at:all", True),
        (["claude-*"], "claude-opus-5-5", True),
        (["claude-*"], "gpt-6-sol", False),
        (["claude-*"], "Claude-opus-5-5", False),
        (["claude-*"], "my-claude-opus", False),
        (["gpt-*", "claude-haiku-?-?"], "claude-haiku-5-5", True),
        (["claude-opus-4-[01]"], "claude-opus-4-1", True),
        (["claude-opus-4-[01]"], "claude-opus-4-5", False),
        ([], "claude-opus-5-5", False),
    ],
)
def test_a_key_may_ask_for_the_models_its_globs_match(globs, model, may):
    """
    Case counts, and a glob matches the whole name.
    """
    assert key(models=tuple(globs)).allows_model(model) is may


# Found by what a request carries


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([(b"x-api-key", b"abc")], ["abc"]),
        ([(b"X-Api-Key", b" abc ")], ["abc"]),
        ([(b"Authorization", b"Bearer abc")], ["abc"]),
        ([(b"authorization", b"bearer  abc")], ["abc"]),
        ([(b"authorization", b"BEARER abc"), (b"x-api-key", b"abc")], ["abc", "abc"]),
        ([(b"authorization", b"Basic YTpi")], []),
        ([(b"x-api-key-2", b"abc"), (b"content-type", b"abc")], []),
        ([], []),
    ],
)
def test_a_requests_keys_are_its_x_api_key_and_its_bearer_tokens(headers, found):
    """
    Claude Code sends the one or the other or both; names and schemes have no case.
    """
    assert g.credentials(headers, g.first_values(headers)) == found


def ring() -> g.KeyRing:
    """A ring with one key, KEY."""
    return g.KeyRing([key(digest=bytes.fromhex(KEY_SHA256))])


@pytest.mark.parametrize("tokens", [[KEY], [KEY, KEY]])
def test_a_key_is_found_by_its_hash(tokens):
    """
    Sent once or twice, it is the same key.
    """
    assert ring().find(tokens).name == "alice"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "No key was sent. Set ANTHROPIC_AUTH_TOKEN to the sk-proxy-… key that you were given."),
        ([KEY, KEY + "x"], "Two different keys were sent. Unset ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN."),
        ([KEY + "x"], "This gateway does not know the key that was sent. Ask whoever runs it."),
        ([KEY.upper()], "This gateway does not know the key that was sent. Ask whoever runs it."),
        ([g.seal_key(KEY)], "This gateway does not know the key that was sent. Ask whoever runs it."),
        (["\x00ÿ\u2028"], "This gateway does not know the key that was sent. Ask whoever runs it."),
    ],
)
def test_without_a_known_key_a_request_is_refused_with_what_to_do(tokens, message):
    """
    The hash that stands in the file is no key, and what was sent is not echoed.
    """
    with pytest.raises(g.KeyRefused) as caught:
        ring().find(tokens)

    assert (caught.value.status, caught.value.should_retry) == (401, False)
    assert caught.value.message == message
