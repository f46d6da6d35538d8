"""cluster_configs/ are what `ray up` accepts."""

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from lmkv_ray.config import Settings
from serve_apps.model import CHECKOUT

CONFIGS = sorted((CHECKOUT / "cluster_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_ray_accepts_it(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_node_gets_a_cache_that_the_settings_know(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    for role in ("head", "worker"):
        start = next(c for c in config[f"{role}_start_ray_commands"] if "ray start" in c)
        given = dict(word.split("=", 1) for word in start.split() if word.startswith("LMKV_"))
        settings = Settings(**{k.removeprefix("LMKV_").lower(): v for k, v in given.items()})
        assert settings.capacity is not None
        assert settings.capacity >= 1 << 30
