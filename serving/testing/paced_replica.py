"""A replica process around a `PacedLoop`, for measuring frontends: `python -m …paced_replica`.

It serves the step channel, announces itself and ends on SIGTERM like a real one. The artifact it
announces is a manifest and a tiny tokenizer, which it writes into a folder of its own.
"""

import argparse
import asyncio
import signal
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import uvloop

from headrace.serving import log
from headrace.serving.admission.key_store import cluster_token
from headrace.serving.channel.directory import Announcer
from headrace.serving.channel.replica_server import ReplicaServer
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.serving.testing.paced_loop import PacedLoop
from headrace.serving.testing.tiny_artifact import (
    CONTEXT_TOKENS,
    tiny_manifest,
    write_tiny_artifact,
)
from headrace.serving.tokenizer import Tokenizer

TEXT = "the"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="paced_replica", description=__doc__)
    parser.add_argument("--directory", required=True, help="address of the directory service")
    parser.add_argument("--cluster-token-file", type=Path, required=True)
    parser.add_argument("--model", default="tiny", help="name to announce (default: tiny)")
    parser.add_argument(
        "--tokens-per-s",
        type=float,
        default=45.0,
        help="of each sequence; 0 is as fast as they are taken (default: 45)",
    )
    args = parser.parse_args(argv)
    log.setup_logging()
    uvloop.run(_serve(args))


async def _serve(args: argparse.Namespace) -> None:
    ended = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, ended.set)
    with tempfile.TemporaryDirectory(prefix="paced-replica-") as folder:
        manifest = tiny_manifest(model=args.model)
        write_tiny_artifact(Path(folder), manifest)
        token_id, *_ = Tokenizer.from_folder(Path(folder), manifest).encode(TEXT)
        facts = ReplicaFacts(
            replica_id=f"{args.model}-paced-{uuid.uuid4().hex[:8]}",
            address="",
            model=args.model,
            version=manifest.artifact_id,
            ready=False,
            context_tokens=CONTEXT_TOKENS,
            precision=manifest.precision.value,
            family=manifest.family,
            artifact_path=folder,
        )
        token = cluster_token(args.cluster_token_file)
        server = ReplicaServer(
            lambda sink: PacedLoop(
                sink, tokens_per_s=args.tokens_per_s, token_id=token_id, text=TEXT
            ),
            facts,
            cluster_token=token,
        )
        address = await server.start()
        announcer = Announcer(args.directory, cluster_token=token, facts=lambda: server.facts)
        announcer.start()
        log.started(role="paced replica", version="", addresses={"step_channel": address})
        await ended.wait()
        await announcer.stop()
        await server.stop()


if __name__ == "__main__":
    main()
