"""What a listening socket of the frontend needs, and how it is refused: certificates and ports."""

from pathlib import Path

import grpc

from headrace.serving.errors import ConfigRefused


def server_credentials(cert: Path, key: Path) -> grpc.ServerCredentials:
    """Of two PEM files. Blocks.

    Raises:
        ConfigRefused: they cannot be read.
    """
    try:
        return grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    except OSError as error:
        raise bad_certificate(str(error)) from error


def bad_certificate(detail: str) -> ConfigRefused:
    return ConfigRefused(
        f"The TLS certificate or its key cannot be used: {detail}.",
        why="frontend.tls_cert and frontend.tls_key turn TLS on, so both must load.",
        fix="Point them at PEM files that this user may read and that belong together.",
        field="frontend.tls_cert",
    )


def port_taken(field: str, where: str) -> ConfigRefused:
    return ConfigRefused(
        f"{where} cannot be listened on.",
        why="Another program holds the port, or the address is not this machine's.",
        fix=f"End that program, or set {field} to another one.",
        field=field,
    )
