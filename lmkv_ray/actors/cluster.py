"""Joining a Ray cluster: which one, whether it answers, and with which token.

Ray itself waits for a head that is gone for two minutes and then ends the process, waits without
an end for the one that a stale note names, and tells a wrong token from a dead head after half a
minute. So each address is tried before Ray is given it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any

import ray

from lmkv_ray.errors import ConnectError

PROBE_SECONDS = 5.0
"""In which the head of a cluster must answer."""


def join(address: str | None, *, start: bool) -> None:
    """Join a Ray cluster, if this process is in none.

    Args:
        address: host and port of its head; None: RAY_ADDRESS, else the cluster of this machine.
        start: start a local cluster if none is named and this machine has none.

    Raises:
        ConnectError: none answers, or the token for it is missing or wrong.
    """
    if ray.is_initialized():
        return
    if address in (None, "", "auto"):
        address = os.environ.get("RAY_ADDRESS") or None
    if address in (None, "auto"):
        found = _here()
        if found is None and start and address is None:
            # With its address, ray.init would look for a note of a cluster first.
            ray.init("local", configure_logging=False, log_to_driver=False, include_dashboard=False)
            return
        if found is None:
            raise _nobody(None)
        address = found
    if address != "local":
        cluster_id(address)
    try:
        ray.init(address=address, configure_logging=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _nobody(address) from error


def cluster_id(address: str) -> str:
    """The identity of the cluster whose head listens there.

    Raises:
        ConnectError: none answers in time, or the token for it is missing or wrong.
    """
    if not _listens(address):
        raise _nobody(address)
    _take_token()
    from ray import _raylet  # not public, but what 'ray status' uses
    from ray.exceptions import AuthenticationError

    client: Any = _raylet

    answer: list[str | Exception] = []

    def ask() -> None:
        try:
            answer.append(client.GcsClient(address=address).cluster_id.hex())
        except Exception as error:
            answer.append(error)

    asking = threading.Thread(target=ask, name="lmkv-probe", daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    if answer and isinstance(answer[0], str):
        return answer[0]
    if answer and isinstance(answer[0], AuthenticationError):
        raise ConnectError(
            f"The Ray cluster at {address} refuses this process: its token is missing or wrong.",
            next_step="run 'ray get-auth-token' on the head, and put the token into "
            "~/.ray/auth_token of this user, or into RAY_AUTH_TOKEN.",
        )
    raise _nobody(address)


def _here() -> str | None:
    """The head of this machine's cluster: the one that Ray's note names, else one that runs."""
    from ray._private import services, utils  # not public, but what ray.init uses

    find: Any = services.find_gcs_addresses
    note = utils.read_ray_address()
    with contextlib.suppress(AttributeError):
        find.cache_clear()  # a process that tries again sees new heads
    for address in [*filter(None, [note]), *sorted(find())]:
        if _listens(address):
            return str(address)
    return None


def _take_token() -> None:
    """Use the token of this machine, if it has one: so do 'ray status', and ray.init("auto")."""
    with contextlib.suppress(ImportError):  # a Ray without tokens
        from ray._private.authentication.authentication_token_setup import (
            maybe_enable_token_auth_if_token_available,
        )

        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _listens(address: str) -> bool:
    """Whether a process accepts connections at an address."""
    if "://" in address:
        raise ConnectError(
            f"{address} is for Ray Client, which cannot share memory with a node.",
            next_step="run on a node of the cluster, with its address or with 'auto'.",
        )
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_SECONDS):
            return True
    except (OSError, ValueError, OverflowError):
        return False


def _nobody(address: str | None) -> ConnectError:
    return ConnectError(
        f"No Ray cluster answers {f'at {address}' if address else 'on this machine'}.",
        next_step="start one with 'ray start --head' or 'ray up', or correct the address.",
    )
