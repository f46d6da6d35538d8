"""docs/settings.md, from the declarations of the settings."""

from __future__ import annotations

from lmkv_ray.config import Settings, scope_of

_PAGE = (
    "# Settings",
    "Made by `lmkv config --markdown > docs/settings.md`.",
    "",
    "Weakest first, a value comes from its default, the file named by `LMKV_CONFIG_FILE`, the",
    "environment, and what is passed in code. Whose it is says who reads it where:",
    "",
    "- **node**: each node's own. Its shard takes it from the environment (or the file) of",
    "  `ray start` on that node; where it is not set, from the process that started the cache.",
    "- **cluster**: one for all, of the process that started the cache. A node that sets another",
    "  value says so in its shard's log.",
    "- **engine**: of the engine, or the program, that reads it.",
    "",
    "The environment of `ray start` is the raylet's; variables of a job's `runtime_env` come on",
    "top of it, on every node. Paths are absolute (`~` is the home directory of the process).",
    "",
    "| setting | of the | default | meaning |",
    "|---|---|---|---|",
)


def settings_page() -> str:
    """All settings in Markdown: docs/settings.md."""
    rows = [
        f"| `LMKV_{name.upper()}` | {scope_of(name)} | "
        f"{'' if field.default in (None, '') else f'`{field.default}`'} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join([*_PAGE, *rows, ""])
