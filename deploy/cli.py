"""The `headrace` command: parsing, output, exit codes.

Output is for people by default and JSON with --json, never both. Exit codes: 0 done, 1 failed,
2 wrong usage, 3 refused (the request is well-formed and will not be done), 130 interrupted.

Only the verb that was given is imported, so that `headrace --help` answers at once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from headrace.serving.errors import ServingError

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

VERBS = {
    "serve": "start the platform in the foreground",
    "compile": "build an engine from a checkpoint",
    "models": "pull, list and inspect models",
    "chat": "talk to a served model",
    "batch": "run a file of requests at half price",
    "orgs": "make, list and suspend organisations",
    "tenants": "the same as orgs",
    "projects": "make, list and suspend projects",
    "keys": "make, list, rotate and revoke API keys",
    "audit": "show and verify who changed what",
    "usage": "show what requests used and cost, or export it",
    "prices": "publish and show price books",
    "statement": "show what a tenant owes for a month",
    "credit": "give an organisation money",
    "adjust": "correct what an organisation owes",
    "invoice": "issue a month's invoices, or list them",
    "reconcile": "prove that log and ledger agree",
    "ledger": "show how far the ledger is, or make it again from the logs",
    "meterlog": "verify and print the log that usage is charged by",
    "receipts": "show what requests were promised and got",
    "sla": "state what a month promised and gave, signed",
    "limits": "set, list and remove rates, numbers in use and budgets",
    "budgets": "show what of each budget is spent, held and left",
    "bench": "measure against the peers that are installed",
    "doctor": "check this machine and installation",
}
"""Each is `headrace.deploy.commands.<verb>`, which has `add_parser(subparsers)`."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser(_verb(arguments)).parse_args(arguments)
    try:
        return args.run(args)
    except ServingError as refusal:
        print_refusal(refusal)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`headrace usage | head`). Python would complain again at exit.
        sys.stderr.close()
        return EXIT_OK


def print_refusal(refusal: ServingError) -> None:
    """What, why and fix on standard error."""
    print(f"headrace: {refusal.what}\n  why: {refusal.why}\n  fix: {refusal.fix}", file=sys.stderr)


def _verb(arguments: Sequence[str]) -> str | None:
    """The first word that is not an option."""
    for argument in arguments:
        if not argument.startswith("-"):
            return argument
    return None


def _parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser with the given verb in full and the others by name."""
    parser = argparse.ArgumentParser(
        prog="headrace", description="Compile models to engines, serve them, meter every token."
    )
    parser.add_argument("--version", action="version", version=f"headrace {version('headrace')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in VERBS.items():
        if name == verb:
            importlib.import_module(f"headrace.deploy.commands.{name}").add_parser(commands)
        else:
            commands.add_parser(name, help=what)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
