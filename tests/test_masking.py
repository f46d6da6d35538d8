"""Secrets are in no output, log or error: one is planted in every setting."""

from __future__ import annotations

import io
import logging
import os
import pickle
import traceback
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmkv_ray.cli import app
from lmkv_ray.clock import SYSTEM_CLOCK
from lmkv_ray.config import Settings, load_settings
from lmkv_ray.errors import ConfigError
from lmkv_ray.keys import key_array
from lmkv_ray.masking import mask_options, mask_text, mask_urls
from lmkv_ray.node.tiers import open_tiers
from lmkv_ray.tiers import Tier

SECRET = "hunter2-SECRET"
OPTIONS = {
    "secret_access_key": SECRET,
    "AWS_SESSION_TOKEN": SECRET,
    "sas_key": SECRET,
    "endpoint": f"http://user:{SECRET}@127.0.0.1:9/?token={SECRET}",
    "allow_http": "true",
    "region": "us-east-1",
}
URL = f"s3://user:{SECRET}@bucket/prefix?X-Amz-Signature={SECRET}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("s3://me:pw@bucket/a@b", "s3://***@bucket/a@b"),
        ("s3://me@bucket", "s3://***@bucket"),
        ("s3://me:p@w@bucket/x", "s3://***@bucket/x"),
        ("az://c/p?sig=abc&x=1#f", "az://c/p?***"),
        ("file:///a/b#c", "file:///a/b#***"),
        ("GET http://h:1/x?sig=abc in 2 ms", "GET http://h:1/x?*** in 2 ms"),
        ("uri: Some(https://k:v@h/x?y), next", "uri: Some(https://***@h/x?***), next"),
        ("nothing://", "nothing://"),
        ("no url: a@b?c", "no url: a@b?c"),
    ],
)
def test_urls(url: str, shown: str) -> None:
    assert mask_urls(url) == shown


def test_options_are_secrets_unless_known_to_be_harmless() -> None:
    shown = mask_options(OPTIONS | {"new_option_of_tomorrow": SECRET})
    assert SECRET not in str(shown)
    assert shown["region"] == "us-east-1"
    assert shown["endpoint"] == "http://***@127.0.0.1:9/?***"
    assert shown["new_option_of_tomorrow"] == "***"
    assert mask_text("the key abcd-abcdef is wrong", ["abcd", "abcdef", "is"]) == (
        "the key ***-*** is wrong"
    )


def planted() -> dict[str, object]:
    """Settings with a secret wherever a text can be."""
    values: dict[str, object] = {"remote_url": URL, "remote_options": OPTIONS, "salt": SECRET}
    return values | {"ray_address": f"ray://user:{SECRET}@host:1"}


def test_settings_show_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(planted())
    assert SECRET not in repr(settings) + str(settings) + f"{settings}"
    assert settings.remote_options["sas_key"] == SECRET, "the cache itself can use it"
    assert pickle.loads(pickle.dumps(settings)).salt == SECRET
    monkeypatch.setenv("LMKV_REMOTE_URL", URL)
    monkeypatch.setenv("LMKV_SALT", SECRET)
    monkeypatch.setenv("LMKV_REMOTE_OPTIONS", str(OPTIONS).replace("'", '"'))
    result = CliRunner().invoke(app, ["config"], terminal_width=400)
    assert result.exit_code == 0
    assert SECRET not in result.output
    assert "us-east-1" in result.output
    assert "hunter2" not in result.output.replace("\n", "")


@pytest.mark.parametrize(
    "wrong",
    [
        {"remote_options": [SECRET]},
        {"remote_options": {"secret_access_key": {"nested": SECRET}}},
        {"salt": [SECRET]},
        {"remote_option": {"secret_access_key": SECRET}},
        {"salts": SECRET},
        {"remote_url": [URL]},
        {"ray_address": {"x": URL}},
        {"chunk_tokens": URL},
    ],
)
def test_errors_about_settings_show_no_secret(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(wrong)
    printed = "".join(traceback.format_exception(caught.value))
    assert SECRET not in printed
    assert next(iter(wrong)) in printed, "but which setting it is"


def test_errors_about_a_file_or_the_environment_show_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lmkv.yaml"
    monkeypatch.setenv("LMKV_CONFIG_FILE", str(file))
    for text in (f"remote_options: {{a: {SECRET}", f"- {SECRET}", f"salt: !{{ {SECRET}"):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_settings()
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    monkeypatch.delenv("LMKV_CONFIG_FILE")
    monkeypatch.setenv("LMKV_REMOTE_OPTIONS", f'{{"secret_access_key": "{SECRET}"')
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("url", "options"),
    [
        (URL.replace("s3", "ftp"), OPTIONS),
        (f"nonsense {SECRET}", {"secret_access_key": SECRET}),
        ("s3://bucket", OPTIONS | {"no_such_option": SECRET}),
        ("s3://bucket", {"allow_http": "true", "imdsv1_fallback": f"http://x?{SECRET}"}),
        ("s3://bucket", OPTIONS | {"endpoint": f"http://user:{SECRET}@127.0.0.1:9"}),
        (f"az://bucket?sig={SECRET}", {"sas_key": SECRET, "account_name": "x"}),
    ],
)
async def test_no_log_and_no_status_shows_a_secret_of_the_store(
    url: str,
    options: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [n for n in os.environ if n.startswith(("AWS_", "AZURE_"))]:
        monkeypatch.delenv(name)
    settings = load_settings({"remote_url": url, "remote_options": options})
    out = io.StringIO()
    with caplog.at_level(logging.DEBUG), redirect_stdout(out):
        tiers, refused = await open_tiers(settings, SYSTEM_CLOCK)
        assert tiers or refused
        for tier in tiers:
            await ask(tier)
    statuses = [*(tier.status() for tier in tiers), *refused]
    assert all(status.problem for status in statuses)
    assert SECRET not in str(statuses) + caplog.text + out.getvalue()


async def ask(tier: Tier) -> None:
    await tier.lookup(key_array([bytes(16)]), 2.0)
    await tier.close()


def test_every_setting_that_holds_text_was_thought_of() -> None:
    """A new one is either no secret, or masked in ``Settings.shown`` and planted above."""
    texts = {n for n, f in Settings.model_fields.items() if "str" in str(f.annotation)}
    assert texts == set(planted()) | {"eviction_policy", "ray_namespace", "weights_id"}
