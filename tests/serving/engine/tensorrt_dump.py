"""Run by test_tensorrt_contract.py: prints the API of a TensorRT module as JSON.

For each class its members: the signatures of a method (its overloads) as lists of parameters, or an
empty list for a property, an enumerator or a constant. Docstrings hold them: the bindings are made
with pybind11.
"""

import importlib
import json
import re
import sys

SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)\((.*)\) -> ")


def signatures(member: object) -> list[list[str]]:
    """Each overload's parameters but self, as `name` or `name=` where it has a default."""
    found = []
    for line in (getattr(member, "__doc__", None) or "").splitlines():
        match = SIGNATURE.match(line.strip())
        if match and match[2] != "*args, **kwargs":
            found.append(parameters(match[2]))
    return found


def parameters(text: str) -> list[str]:
    names, depth, part = [], 0, ""
    for character in text + ",":
        depth += (character in "([<") - (character in ")]>")
        if character == "," and depth <= 0:
            name = part.split(":")[0].strip()
            if name and name != "self":
                names.append(name + ("=" if " = " in part else ""))
            part = ""
        else:
            part += character
    return names


def main() -> None:
    module = importlib.import_module(sys.argv[1])
    api: dict[str, dict[str, list[list[str]]]] = {}
    for name in dir(module):
        kind = getattr(module, name)
        if isinstance(kind, type):
            members = {}
            for member in dir(kind):
                if not member.startswith("__") or member in ("__init__", "__len__", "__getitem__"):
                    members[member] = signatures(getattr(kind, member, None))
            api[name] = members
    print(json.dumps({"version": module.__version__, "api": api}))


main()
