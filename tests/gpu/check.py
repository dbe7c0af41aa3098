"""`make gpu-check`: is what we build right on this machine's GPU, and what does it cost.

One command, under 8 minutes, no network; one JSON report in two parts:

* the card's ceilings and the decoder module under PyTorch (`pytorch_part.py`): needs PyTorch with
  CUDA;
* TensorRT engines of SmolLM2-135M and of Qwen3-0.6B's shape (`engine_part.py`): built, compared
  with `transformers` on the CPU, loaded and timed. Needs `tensorrt` 11 (H100, H200, B200) or
  `tensorrt_rtx` (GeForce and workstation cards), `cuda-bindings`, and the extra `compile`. Where
  one is missing the report says so under `engines`, and the PyTorch part is all there is.

Exit status: 0 all was run and is right; 1 something is wrong; 3 no GPU answers; 4 the engines were
not checked.
"""

import argparse
import importlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytorch_part

RIGHT, WRONG, NO_GPU, NOT_CHECKED = 0, 1, 3, 4

PYTORCH_SHARE = 0.25
"""Of the time: the engines, which are what is checked, come first and get the rest."""

Part = ModuleType | SimpleNamespace


def main(
    arguments: Sequence[str] | None = None,
    *,
    pytorch: Part = pytorch_part,
    engines: Part | None = None,
) -> int:
    args = parsed(arguments)
    engines = engines or engine_part()
    if not pytorch.has_gpu():
        print("No GPU answers here: gpu-check needs an NVIDIA card and PyTorch with CUDA.")
        return NO_GPU
    until_s = time.monotonic() + args.seconds
    card, ceilings = pytorch.card(), pytorch.ceilings()
    report: dict[str, object] = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": card,
        "ceilings": ceilings,
        "agreement": pytorch.agreements(),
    }
    engines_until_s = until_s - PYTORCH_SHARE * args.seconds
    report["engines"] = checked(
        engines,
        card["compute_capability"],
        smollm2=args.smollm2,
        shapes=pytorch.SHAPES,
        copy_gb_s=ceilings["copy_gb_s"],
        until_s=engines_until_s,
    )
    write(report, args.out)  # What follows is only slower or faster.
    report["steps"] = shown(pytorch.steps(ceilings["copy_gb_s"], until_s=until_s))
    report["complete"] = time.monotonic() < until_s
    write(report, args.out)
    return judged(report, pytorch)


def engine_part() -> Part:
    """The engines' part, or one that says which package it lacks: PyTorch alone is no reason to
    measure nothing."""
    try:
        return importlib.import_module("engine_part")
    except ImportError as error:
        why = f"{error.name} is not installed (pip install 'headrace[compile,gpu]')"
        return SimpleNamespace(why_not=lambda capability: why)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"))
    parser.add_argument(
        "--seconds", type=float, default=420, help="stop measuring after this long (default: 420)"
    )
    parser.add_argument(
        "--smollm2",
        type=Path,
        help="SmolLM2-135M's checkpoint folder (default: what `headrace models pull smollm2-135m` "
        "left in the home; without it, random weights of its shape)",
    )
    args = parser.parse_args(arguments)
    home = Path(os.environ.get("HEADRACE_HOME") or Path.home() / ".headrace")
    pulled = home / "checkpoints" / "smollm2-135m"
    if args.smollm2 is None and pulled.is_dir():
        args.smollm2 = pulled
    return args


def checked(
    engines: Part,
    capability: str,
    *,
    smollm2: Path | None,
    shapes: dict,
    copy_gb_s: float,
    until_s: float,
) -> dict[str, object]:
    """The engines' half of the report."""
    why = engines.why_not(capability)
    if why is not None:
        print(f"THE TENSORRT ENGINES ARE NOT CHECKED: {why}. What follows is PyTorch only.")
        return {"ran": False, "why": why, "models": []}
    target, _ = engines.target_of(capability)
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="headrace-gpu-check-") as work:
        home = Path(work) / "home"
        for model in engines.models(Path(work), shapes, smollm2):
            found.append(
                engines.check(model, target, home=home, copy_gb_s=copy_gb_s, until_s=until_s)
            )
            print(json.dumps(found[-1], indent=1), flush=True)
    return {"ran": True, "why": None, "models": found}


def shown(rows: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    kept = []
    for row in rows:
        kept.append(row)
        print(json.dumps(row), flush=True)
    return kept


def write(report: dict[str, object], out: Path) -> None:
    out.write_text(json.dumps(report, indent=1) + "\n")


def judged(report: dict, pytorch: Part) -> int:
    """Say in a few lines what came of it."""
    print(json.dumps({name: report[name] for name in ("card", "ceilings", "agreement")}, indent=1))
    engines = report["engines"]
    for each in engines["models"]:
        said = "right" if each["is_right"] else f"WRONG: {each['refused']['what']}"
        best = max((step.get("of_roofline", 0) for step in each.get("steps", ())), default=0)
        print(f"{each['name']} ({each['weights']} weights, {each['target']}): {said}; "
              f"decode up to {best:.0%} of the memory roofline")  # fmt: skip
    if not pytorch.is_right(report["agreement"]):
        print("WRONG: the decoder module differs between GPU and CPU.")
        return WRONG
    if not engines["ran"]:
        print(f"NOT CHECKED: the TensorRT engines ({engines['why']}).")
        return NOT_CHECKED
    return RIGHT if all(each["is_right"] for each in engines["models"]) else WRONG


if __name__ == "__main__":
    raise SystemExit(main())
