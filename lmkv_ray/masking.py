"""Secrets do not leave the settings: what is printed, logged or raised has them masked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

MASK = "***"
SHORTEST = 4
"""Characters of the shortest secret that is looked for in texts: shorter ones are words."""

HARMLESS_OPTIONS = frozenset(
    {
        "allow_http",
        "bucket",
        "bucket_name",
        "checksum_algorithm",
        "conditional_put",
        "container_name",
        "default_region",
        "endpoint",
        "endpoint_url",
        "imdsv1_fallback",
        "region",
        "request_payer",
        "s3_express",
        "skip_signature",
        "unsigned_payload",
        "use_emulator",
        "virtual_hosted_style_request",
    }
)
"""Options of object stores, without the cloud's prefix, that are no secrets. All others are."""

_PREFIX = re.compile(r"^(aws|azure|azure_storage|google)_")
# What may follow "scheme://": user and password before the last "@" of the authority; and what
# follows "?" or "#", where signatures stand.
_URL = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^\s/?#]*@)?([^\s?#'\"<>]*)([?#][^\s'\"<>)]*)?", re.I)


def mask_urls(text: str) -> str:
    """A text with the users, passwords, queries and fragments of all URLs in it masked."""

    def masked(match: re.Match[str]) -> str:
        scheme, rest, more = match.groups()
        user = f"{MASK}@" if match.group(0)[len(scheme) :] != rest + (more or "") else ""
        return f"{scheme}{user}{rest}{more[0] + MASK if more else ''}"

    return _URL.sub(masked, text)


def mask_options(options: Mapping[str, str]) -> dict[str, str]:
    """Options of an object store, for people."""
    return {
        name: mask_urls(str(value)) if _is_harmless(name) else MASK
        for name, value in options.items()
    }


def secrets_of(options: Mapping[str, str]) -> list[str]:
    """The values of options that are secrets."""
    return [value for name, value in options.items() if not _is_harmless(name)]


def mask_text(text: str, secrets: Iterable[str] = ()) -> str:
    """A text from elsewhere, without these secrets and those that URLs carry."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, MASK)
    return mask_urls(text)


def _is_harmless(option: str) -> bool:
    return _PREFIX.sub("", option.lower()) in HARMLESS_OPTIONS
