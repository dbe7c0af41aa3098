"""Which server a command talks to, and with which key."""

import argparse
import os
from pathlib import Path

from headrace.serving.admission.accounts import demo_key
from headrace.serving.config import Config


def add_connection(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that talks to a frontend."""
    parser.add_argument("--address", help="host:port of the gRPC service")
    parser.add_argument("--key", help="API key (default: HEADRACE_API_KEY, else the demo key)")
    parser.add_argument("--ca", type=Path, help="PEM file of certificates; turns TLS on")
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")


def address_and_key(args: argparse.Namespace) -> tuple[str, str]:
    """The given address, else the configured one; the given key, the environment's, or the demo's.

    Raises:
        ConfigRefused: the configuration or the key file cannot be read.
    """
    config = Config.load(args.home)
    address = args.address or local_address(config)
    key = args.key or os.environ.get("HEADRACE_API_KEY")
    if not key:
        config.prepare_home()
        key = demo_key(config)
    return address, key


def local_address(config: Config) -> str:
    """Where the frontend of this home is reached from this machine."""
    host = config.frontend.host
    # A server that listens everywhere is here, too.
    host = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104  Compared only.
    return f"{host}:{config.frontend.grpc_port}"


def certificates(args: argparse.Namespace) -> Path | None:
    """What the server's certificate is checked against; None is a connection without TLS.

    Raises:
        ConfigRefused: the configuration cannot be read.
    """
    return args.ca or Config.load(args.home).frontend.tls_cert
