"""The process that builds one rank: `python -m headrace.compile.tensorrt.build_worker`.

It reads one JSON object from its standard input, says one JSON object a line on its standard
output (`{"event": "phase", …}`, at last `built` or `refused`), and TensorRT's own words on its
standard error, which is the build log. It dies with its parent.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.base import Weights
from headrace.compile.families.registry import describe
from headrace.compile.sharding import parts
from headrace.compile.tensorrt.decoder_network import Plan
from headrace.compile.tensorrt.library import open_library
from headrace.compile.tensorrt.linear_forms import Calibrated, held
from headrace.compile.tensorrt.rank_build import RankOrder, build_rank
from headrace.serving.domain.artifact import Precision, Profile, Sharding
from headrace.serving.errors import ServingError

_PR_SET_PDEATHSIG = 1


def main() -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    order = json.load(sys.stdin)
    # What anything else prints, here or in a library's own code, belongs to the log.
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _say(told, "built", **_build(order, told))
    except ServingError as error:
        _say(
            told,
            "refused",
            kind=type(error).__name__,
            what=error.what,
            why=error.why,
            fix=error.fix,
        )
        return 3
    return 0


def _build(order: Mapping[str, Any], told: TextIO) -> dict[str, Any]:
    checkpoint = open_checkpoint(Path(order["checkpoint"]))
    model = describe(checkpoint)
    sharding = Sharding(**order["sharding"])
    part = parts(model.decoder, sharding)[order["rank"]]
    cache = order["timing_cache"]
    built = build_rank(
        open_library(order["library"]),
        RankOrder(
            plan=Plan(part=part, sharding=sharding, cache_tokens=order["cache_tokens"]),
            profiles=[_profile(each) for each in order["profiles"]],
            compute_capabilities=order["compute_capabilities"],
            flags=order["flags"],
            timing_cache=None if cache is None else Path(cache),
        ),
        held(
            Precision(order["precision"]),
            model.decoder,
            Weights(checkpoint, model),
            calibrated=Calibrated.read(Path(order["folder"])) if order["is_calibrated"] else None,
            activations=order["activations"],
        ),
        folder=Path(order["folder"]),
        log=sys.stderr,
        advance=lambda phase, step, steps: _say(told, "phase", phase=phase, step=step, steps=steps),
    )
    return asdict(built)


def _profile(told: Mapping[str, Any]) -> Profile:
    return Profile(name=told["name"], rows=tuple(told["rows"]), tokens=tuple(told["tokens"]))


def _say(told: TextIO, event: str, **fields: Any) -> None:
    told.write(json.dumps({"event": event, **fields}) + "\n")
    told.flush()


if __name__ == "__main__":
    raise SystemExit(main())
