from pathlib import Path

import pytest

from lmkv_ray.config import Settings, load_settings
from lmkv_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LMKV_CONFIG_FILE", "LMKV_CAPACITY", "LMKV_SALT"):
        monkeypatch.delenv(name, raising=False)


def test_works_without_any_configuration() -> None:
    assert load_settings() == Settings()


def test_every_setting_has_a_sentence() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


def test_precedence_is_file_then_environment_then_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lmkv.yaml"
    file.write_text("capacity: 8MiB\nsalt: file\ngrant_seconds: 7\n")
    monkeypatch.setenv("LMKV_CONFIG_FILE", str(file))
    monkeypatch.setenv("LMKV_SALT", "environment")
    monkeypatch.setenv("LMKV_CAPACITY", "16MiB")
    settings = load_settings({"capacity": "32MiB"})
    assert (settings.capacity, settings.salt, settings.grant_seconds) == (
        32 << 20,
        "environment",
        7.0,
    )


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"capacity": "much", "grant_seconds": -1, "no_such": 1})
    message = str(caught.value)
    assert all(name in message for name in ("capacity", "grant_seconds", "no_such", "lmkv config"))


def test_a_misspelt_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKV_CAPCITY", "1GiB")
    with pytest.raises(ConfigError, match="LMKV_CAPCITY"):
        load_settings()


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMKV_CONFIG_FILE", "/nowhere/lmkv.yaml")
    with pytest.raises(ConfigError, match=r"/nowhere/lmkv\.yaml"):
        load_settings()


@pytest.mark.parametrize("content", ["capacity: [", "- a\n- list\n"])
def test_a_file_that_is_not_settings_is_refused(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "lmkv.yaml"
    file.write_text(content)
    monkeypatch.setenv("LMKV_CONFIG_FILE", str(file))
    with pytest.raises(ConfigError):
        load_settings()
