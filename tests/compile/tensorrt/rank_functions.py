"""What ranks run in the tests of this folder: found by name, as their processes need it."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx as trt
import torch

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.base import Weights
from headrace.compile.families.registry import describe
from headrace.compile.sharding import parts
from headrace.compile.tensorrt.decoder_network import Plan, write_decoder
from headrace.compile.tensorrt.interpreter import Interpreter
from headrace.compile.tensorrt.linear_forms import held
from headrace.compile.tensorrt.network import Network
from headrace.compile.tensorrt.process_group import Peers
from headrace.serving.domain.artifact import Precision, Sharding
from headrace.serving.errors import UnsupportedModel

STAGE = 2
"""Ranks of one stage: 0 and 1, 2 and 3."""


def exchange(operation: str, group: list[int], peers: Peers) -> Any:
    """Rank r of its stage gives 10 r + (0, 1) to a network of one collective layer."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    net = Network(trt, builder.create_network(0))
    x = net.input("x", "bf16", (2, 1))
    reduces = operation in {"ALL_REDUCE", "REDUCE_SCATTER"}
    net.output(net.collective(x, operation, group, name="met", reduces=reduces), "y", "bf16")
    first = peers.rank // STAGE * STAGE
    stage = peers.communicator(range(first, first + STAGE))
    given = torch.tensor([[0], [1]]) + 10 * peers.rank
    interpreter = Interpreter(net.definition, exact=False, collective=stage)
    return interpreter.run({"x": given.bfloat16()})["y"].flatten().tolist()


def exchange_all(peers: Peers) -> Any:
    """Every operation, over each stage; then a hidden state from stage to stage."""
    operations = ("ALL_REDUCE", "ALL_GATHER", "REDUCE_SCATTER", "ALL_TO_ALL")
    found = {operation: exchange(operation, [0, 1], peers) for operation in operations}
    if peers.rank < STAGE:
        peers.send(torch.full((2, 3), peers.rank + 0.5), to=peers.rank + STAGE)
    else:
        received = peers.receive((2, 3), torch.float32, source=peers.rank - STAGE)
        found["received"] = received.flatten().tolist()
    return found


def meet(peers: Peers) -> None:
    peers.all_gather(torch.zeros(1), tuple(range(peers.ranks)))


def _unless_last(peers: Peers, act: Callable[[], None]) -> None:
    """All meet, and the last rank does something else."""
    meet(peers)
    if peers.rank == peers.ranks - 1:
        act()
    meet(peers)


def refuse(peers: Peers) -> None:
    def act() -> None:
        raise UnsupportedModel("A layer.", why="It is.", fix="Do.")

    _unless_last(peers, act)


def crash(peers: Peers) -> None:
    _unless_last(peers, lambda: print(np.zeros(1)[1]))


def die(peers: Peers) -> None:
    _unless_last(peers, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang(peers: Peers) -> None:
    _unless_last(peers, lambda: print(threading.Event().wait()))


def say_pid_and_hang(peers: Peers) -> None:
    meet(peers)
    print("PID", os.getpid(), flush=True)
    threading.Event().wait()


def decoder_network(folder: Path, sharding: Sharding, rank: int) -> tuple[Any, Any]:
    """A rank's network of a checkpoint, with a cache of 128 places."""
    checkpoint = open_checkpoint(folder)
    model = describe(checkpoint)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    net = Network(trt, builder.create_network(0))
    part = parts(model.decoder, sharding)[rank]
    plan = Plan(part=part, sharding=sharding, cache_tokens=128)
    forms = held(
        Precision.BF16,
        model.decoder,
        Weights(checkpoint, model),
        calibrated=None,
        activations=False,
    )
    write_decoder(net, plan, forms.tensors, forms.products)
    return net.definition, net.constants
