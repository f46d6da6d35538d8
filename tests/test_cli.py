"""The lmkv command, without a cluster."""

import pytest
from typer.testing import CliRunner

from lmkv_ray.cli import app
from lmkv_ray.config import Settings
from lmkv_ray.directory import Location
from lmkv_ray.keys import KEY_BYTES


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "200")
    return CliRunner()


def test_config_lists_every_setting(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKV_GRANT_SECONDS", "12.5")
    result = runner.invoke(app, ["config"])
    assert result.exit_code == 0
    for name, field in Settings.model_fields.items():
        assert name.upper() in result.output
        assert field.description
    assert "12.5" in result.output


def test_a_wrong_setting_is_a_clear_error(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMKV_CAPACITY", "much")
    result = runner.invoke(app, ["config"])
    assert result.exit_code == 1
    assert "Next step" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["status", "clear", "stop", "drain abc"])
def test_no_cluster_is_a_clear_error(runner: CliRunner, command: str) -> None:
    result = runner.invoke(app, [*command.split(), "--address", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert "No Ray cluster answers at 127.0.0.1:1" in result.output
    assert "Next step" in result.output


def test_ray_client_is_refused(runner: CliRunner) -> None:
    result = runner.invoke(app, ["status", "--address", "ray://host:10001"])
    assert result.exit_code == 1
    assert "Ray Client" in result.output


def test_a_key_is_told_whole_on_a_narrow_screen(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = bytes(range(KEY_BYTES))

    class Found:
        def where(self, keys: list[bytes]) -> list[list[Location]]:
            return [[Location("n" * 56, "memory", "e" * 40)] for _ in keys]

    monkeypatch.setattr("lmkv_ray.actors.connect", lambda *_, **__: Found())
    monkeypatch.setenv("COLUMNS", "80")
    assert key.hex() in runner.invoke(app, ["where", key.hex()]).output
