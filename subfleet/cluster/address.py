"""The address of a Ray cluster, asked whether anybody answers there; without torch, so at once."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subfleet.core.errors import InputError

if TYPE_CHECKING:
    import grpc

ANSWER_S = 5.0  # how long a cluster may take to answer a knock
HEALTH = "/grpc.health.v1.Health/Check"  # a call that Ray's servers answer also without a token
ANYWHERE = (
    "check the address that `ray start` printed, leave --address out to start Ray here, or use "
    "--local"
)


def loaded_ray() -> Any:
    """Ray, with our defaults where the environment says nothing else."""
    if "ray" not in sys.modules:
        # Ray reads these when it is loaded; set later, its processes would not agree on them.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


def check_address(address: str | None) -> None:
    """InputError within seconds when no cluster answers there; Ray itself would try for minutes.

    "auto" is what Ray takes it for: RAY_ADDRESS, a Ray of this machine, or the one that the last
    `ray start` wrote down.
    """
    if address is None:
        return
    given, where, remedy = f"--address {address}", address, ANYWHERE
    if address == "auto":
        given, where, remedy = _automatic()
    host, colon, port = where.rpartition(":")
    if "/" in host or not colon or not port.isdecimal():
        raise InputError(
            f"{given}: is not of the form host:port, nor 'auto'; give the address that `ray start` "
            "printed, on a machine of the cluster"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
        _knock(where)
    except (OSError, OverflowError) as error:
        raise InputError(f"{given}: no Ray cluster answers there ({error}); {remedy}") from error


def _automatic() -> tuple[str, str, str]:
    """What "auto" stands for: words for it, its host:port, and what helps if nobody answers."""
    if (named := os.environ.get("RAY_ADDRESS", "auto")) not in ("", "auto"):
        return f"RAY_ADDRESS={named}", named, f"set the address of your cluster; {ANYWHERE}"
    loaded_ray()
    from ray._common.utils import get_ray_address_file
    from ray._private import services

    try:
        services.find_gcs_addresses.cache_clear()
        where = str(services.get_ray_address_from_environment("auto", None))
    except ConnectionError as error:
        raise InputError(
            "--address auto: no Ray cluster runs on this machine; start one with `ray start "
            "--head`, give the host:port of another, or leave --address out to start Ray here"
        ) from error
    file = get_ray_address_file(None)
    if where in services.find_gcs_addresses():
        return f"--address auto: a Ray process here belongs to {where}", where, ANYWHERE
    return (
        f"--address auto: {file} says {where}",
        where,
        f"the Ray that wrote the file has ended: remove it, or {ANYWHERE}",
    )


def _knock(address: str) -> None:
    """ConnectionError unless a server of Ray answers, as it would answer Ray."""
    import grpc

    options = [("grpc.enable_http_proxy", 0)]  # Ray goes through none, either
    with _channel(address, options) as channel:
        try:
            channel.unary_unary(HEALTH)(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            # Raised are calls, which know of their end what Python's type of them does not say.
            why: Any = error
            raise ConnectionError(f"it does not answer as Ray does: {why.details()}") from error


def _channel(address: str, options: list[tuple[str, Any]]) -> grpc.Channel:
    """As Ray's processes connect: within TLS where the environment says so."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address, options)
    variables = ("RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT")
    if missing := [name for name in variables if name not in os.environ]:
        raise InputError(
            f"RAY_USE_TLS={os.environ['RAY_USE_TLS']}: {' and '.join(missing)} not set; give the "
            "paths of the certificate and the key that the cluster's processes use"
        )
    key, certificate = (Path(os.environ[name]).read_bytes() for name in variables)
    trusted = os.environ.get("RAY_TLS_CA_CERT")
    roots = Path(trusted).read_bytes() if trusted else None
    return grpc.secure_channel(
        address, grpc.ssl_channel_credentials(roots, key, certificate), options
    )
