"""An address behind TLS: we knock as Ray's own processes do, with the cluster's certificate."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from subfleet.cluster.address import HEALTH, check_address
from subfleet.core.errors import InputError


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ray")])
    now, loopback = datetime.now(UTC), ip_address("127.0.0.1")
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(loopback)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return tmp_path / "cert.pem", tmp_path / "key.pem"


@pytest.fixture
def asked() -> list[str]:
    """The calls that came to the server."""
    return []


@pytest.fixture
def address(certificate: tuple[Path, Path], asked: list[str]) -> Iterator[str]:
    """A server as Ray's are within TLS: callers show the cluster's certificate."""

    class Health(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            asked.append(handler_call_details.method)
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"\x08\x01")

    cert, key = (path.read_bytes() for path in certificate)
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Health()])
    within = grpc.ssl_server_credentials([(key, cert)], cert, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", within)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_server_within_tls_is_taken_for_ray(
    address: str,
    certificate: tuple[Path, Path],
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(certificate[0]))
    monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(certificate[1]))
    monkeypatch.setenv("RAY_TLS_CA_CERT", str(certificate[0]))
    check_address(address)
    assert asked == [HEALTH]


def test_without_tls_it_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    with pytest.raises(InputError, match="no Ray cluster answers there"):
        check_address(address)


def test_tls_without_a_certificate_is_an_error(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    monkeypatch.delenv("RAY_TLS_SERVER_CERT", raising=False)
    monkeypatch.delenv("RAY_TLS_SERVER_KEY", raising=False)
    with pytest.raises(InputError, match="RAY_TLS_SERVER_KEY and RAY_TLS_SERVER_CERT not set"):
        check_address(address)
