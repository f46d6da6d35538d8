from pathlib import Path

import pytest

from lmkv_ray.config import load_settings
from lmkv_ray.errors import ConfigError
from lmkv_ray.policies import POLICIES, registry
from lmkv_ray.policies.lru import LRU

PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_can_be_configured_and_is_documented(name: str) -> None:
    assert load_settings({"eviction_policy": name}).eviction_policy == name
    assert f"`{name}`" in PAGE.read_text()


def test_a_policy_that_is_registered_can_be_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.POLICIES, "newest", lambda _: LRU())
    assert load_settings({"eviction_policy": "newest"}).eviction_policy == "newest"


def test_an_unknown_policy_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match="eviction_policy") as caught:
        load_settings({"eviction_policy": "random"})
    assert "arc, hinted, lru, s3fifo" in str(caught.value)
