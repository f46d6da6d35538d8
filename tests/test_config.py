from pathlib import Path

import pytest

from lmkv_ray.config import Settings, load_settings, scope_of, settings_here
from lmkv_ray.errors import ConfigError
from lmkv_ray.settings_page import settings_page


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


def test_each_setting_is_somebodys_and_the_page_says_so() -> None:
    assert {scope_of(name) for name in Settings.model_fields} == {"node", "cluster", "engine"}
    page = Path(__file__).parents[1] / "docs" / "settings.md"
    assert page.read_text() == settings_page(), "lmkv config --markdown > docs/settings.md"


def test_a_node_has_its_own_capacity_and_the_clusters_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = load_settings({"capacity": "128MiB", "eviction_policy": "lru", "salt": "starter"})
    assert settings_here(given) == (given, []), "what a node does not set, the starter decides"
    monkeypatch.setenv("LMKV_CAPACITY", "64MiB")
    monkeypatch.setenv("LMKV_DISK_DIR", "/mnt/here")
    monkeypatch.setenv("LMKV_EVICTION_POLICY", "arc")
    monkeypatch.setenv("LMKV_REPLICAS", str(given.replicas))
    monkeypatch.setenv("LMKV_SALT", "node")
    here, others = settings_here(given)
    assert (here.capacity, here.disk_dir) == (64 << 20, Path("/mnt/here"))
    assert (here.eviction_policy, here.salt) == ("lru", "starter")
    assert others == ["eviction_policy"]
    monkeypatch.setenv("LMKV_CAPACITY", "much")
    with pytest.raises(ConfigError, match="capacity"):
        settings_here(given)


PATHS = ("arena_dir", "disk_dir", "encryption_key_file")


@pytest.mark.parametrize("name", PATHS)
def test_paths_mean_the_same_in_every_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert getattr(load_settings({name: "~/kv"}), name) == Path("/home/me/kv")
    for wrong in ("kv", "./kv", "../kv", "", "~nobody-here/kv", "a\0b"):
        with pytest.raises(ConfigError, match=name):
            load_settings({name: wrong})
    default = getattr(load_settings(), name)
    monkeypatch.setenv(f"LMKV_{name.upper()}", "")
    assert getattr(load_settings(), name) == default, "an empty variable is not set"
    monkeypatch.setenv(f"LMKV_{name.upper()}", "kv")
    with pytest.raises(ConfigError, match=name):
        load_settings()


@pytest.mark.parametrize(
    "url", ["", " ", "file:", "file://", "file:///", "file://kv", "file:///~/k"]
)
def test_a_remote_directory_is_absolute(url: str) -> None:
    with pytest.raises(ConfigError, match="remote_url"):
        load_settings({"remote_url": url})
    assert load_settings({"remote_url": "file:///kv"}).remote_url == "file:///kv"


def test_the_file_of_settings_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lmkv.yaml").write_text("capacity: 8MiB\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMKV_CONFIG_FILE", "~/lmkv.yaml")
    assert load_settings().capacity == 8 << 20
    monkeypatch.setenv("LMKV_CONFIG_FILE", "lmkv.yaml")
    with pytest.raises(ConfigError, match=r"LMKV_CONFIG_FILE .* relative"):
        load_settings()
    monkeypatch.setenv("LMKV_CONFIG_FILE", "")
    assert load_settings().capacity is None


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


@pytest.mark.parametrize("value", ["inf", "nan", "1e300", "-1"])
@pytest.mark.parametrize("name", [n for n in Settings.model_fields if n.endswith("_seconds")])
def test_every_wait_has_an_end(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"LMKV_{name.upper()}", value)
    with pytest.raises(ConfigError, match=name):
        load_settings()
