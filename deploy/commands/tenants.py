"""`headrace tenants`: another name of `headrace orgs`, for an organisation is a tenant."""

import argparse

from headrace.deploy.commands import orgs


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    orgs.add_parser(subparsers, "tenants")
