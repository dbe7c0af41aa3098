"""The control process: tells Ray Serve which models to run, now and after every change.

It decides and watches; it serves nothing. When it dies, everything that runs goes on running, and
its successor finds the same applications, whose versions are a function of what they run: nothing
restarts. A change of the configuration or of the artifact store is a rolling upgrade: new replicas
beside the old ones, which then finish their streams.
"""

import argparse
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from headrace.compile.store import Store
from headrace.deploy.app import STOP_SLACK_S, application
from headrace.deploy.processes import Message, follow_parent, hear, say, say_refused, stop_event
from headrace.deploy.replica import Wiring
from headrace.deploy.rollout import Changes, ModelPlan, changes, plan_models
from headrace.serving.config import CONFIG_FILE, Config, parse_assignment
from headrace.serving.errors import ArtifactError, ServingError

LOOK_S = 1.0
"""How often states and files are looked at. Half a second would cost 2 % of a core."""
START_LOOK_S = 0.1
"""The same while everything starts and somebody waits."""
SETTLE_S_MAX = 120.0
"""Longest that a model may take to run: several gigabytes from a slow disk."""

_FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)


class ModelDidNotStart(ArtifactError):
    """Ray Serve gave up on a model's replicas; the reason is the replica's own."""

    reason = "MODEL_DID_NOT_START"


class Control:
    """What runs, and what should. One thread owns it."""

    def __init__(self, home: Path, assignments: Sequence[str], wiring: Wiring) -> None:
        self._home = home
        self._overrides = dict(parse_assignment(text) for text in assignments)
        self._wiring = wiring
        self._running: dict[str, ModelPlan] = {}
        self._stamp: object = None
        self._states: dict[str, str] = {}

    def apply(self) -> Changes:
        """Read configuration and store, and have Ray Serve run what they ask for.

        Raises:
            ServingError: they ask for something that is not there; nothing was changed.
        """
        stamp = self._file_stamp()
        config = Config.load(self._home).with_overrides(self._overrides)
        todo = changes(self._running, plan_models(config, Store(self._home).configured))
        if self._stamp is None:
            # A predecessor may have left applications that nobody asks for any more.
            strays = serve.status().applications.keys() - todo.deploy.keys()
            todo = Changes(todo.deploy, frozenset(strays))
        self._stamp = stamp
        targets = [
            serve.RunTarget(application(plan, self._wiring), name=model, route_prefix=None)
            for model, plan in todo.deploy.items()
        ]
        if targets:
            serve.run_many(
                targets,
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
        for model in todo.delete:
            serve.delete(model, _blocking=False)
        self._running.update(todo.deploy)
        for model in todo.delete:
            self._running.pop(model, None)
        return todo

    def end(self) -> None:
        """Take every model away and wait until its replicas have drained.

        Not `serve.shutdown`, which ends Serve's controller before the drains are over.
        """
        drains = [plan.drain_s for plan in self._running.values()]
        until = time.monotonic() + max(drains, default=0.0) + STOP_SLACK_S
        for model in serve.status().applications:
            serve.delete(model, _blocking=False)
        while serve.status().applications and time.monotonic() < until:
            time.sleep(START_LOOK_S)

    def has_changed(self) -> bool:
        """Whether the files that `apply` read are others by now."""
        return self._file_stamp() != self._stamp

    def states(self) -> Mapping[str, ApplicationStatusOverview]:
        """What Ray Serve says of the models that should run."""
        found = serve.status().applications
        return {model: found[model] for model in self._running if model in found}

    def not_running(self) -> Sequence[str]:
        """The models that do not run yet.

        Raises:
            ModelDidNotStart: Ray Serve gave up on one.
        """
        states = self.states()
        for model, state in states.items():
            if state.status in _FAILED:
                raise did_not_start(model, _explanation(state))
        running = {m for m, state in states.items() if state.status == ApplicationStatus.RUNNING}
        return sorted(self._running.keys() - running)

    def report_changes(self) -> None:
        """Say which models changed their state since the last time."""
        states = {model: _told(state) for model, state in self.states().items()}
        for model, told in states.items():
            if self._states.get(model) != told:
                say("status", text=f"{model}: {told}")
        self._states = states

    def _file_stamp(self) -> object:
        """The configuration, and which artifact each model's name means."""
        names = sorted((self._home / "names").glob("*.json"))
        return tuple((path.name, _stamp(path)) for path in (self._home / CONFIG_FILE, *names))


def did_not_start(model: str, explanation: str) -> ModelDidNotStart:
    return ModelDidNotStart(
        f"The model {model} did not start.",
        why=explanation,
        fix=f"Look at `headrace models`; `headrace compile {model}` builds its artifact again.",
    )


def run(control: Control, stop: threading.Event, heard: "queue.SimpleQueue[Message | None]") -> int:
    """Bring everything up, then follow the files until told to stop."""
    for line in control.apply().describe():
        say("status", text=line)
    until = time.monotonic() + SETTLE_S_MAX
    while missing := control.not_running():
        if time.monotonic() > until:
            raise did_not_start(missing[0], f"It did not run within {SETTLE_S_MAX:.0f} s.")
        if stop.wait(START_LOOK_S):
            return 0
    say("ready")
    while not stop.wait(LOOK_S):
        asked = _drained(heard)
        if asked or control.has_changed():
            _apply_again(control)
        control.report_changes()
    return 0


def _apply_again(control: Control) -> None:
    """A change that is refused leaves everything as it was."""
    try:
        for line in control.apply().describe():
            say("status", text=line)
    except ServingError as refusal:
        say("status", text=f"the change was not applied: {refusal.what} {refusal.fix}")


def _drained(heard: "queue.SimpleQueue[Message | None]") -> bool:
    asked = False
    while not heard.empty():
        message = heard.get()
        asked = asked or (message is not None and message["event"] == "reload")
    return asked


def _told(state: ApplicationStatusOverview) -> str:
    """One line on a model: its state, its replicas, and why if it is not well."""
    text = state.status.value.lower().replace("_", " ")
    for deployment in state.deployments.values():
        counts = [f"{count} {name.lower()}" for name, count in deployment.replica_states.items()]
        text += f" ({', '.join(sorted(counts)) or 'no replicas'})"
    return f"{text}: {_explanation(state)}" if state.status in _FAILED else text


def _explanation(state: ApplicationStatusOverview) -> str:
    """The line of a replica's traceback that says what was wrong; else what Serve says."""
    texts = [state.message, *(each.message for each in state.deployments.values())]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if "headrace.serving.errors." in line:
            return line.rpartition("headrace.serving.errors.")[2]
    return lines[-1] if lines else "Ray Serve gave no reason."


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None  # No file is a state too: the defaults hold.
    return status.st_mtime_ns, status.st_ino


def _listen(heard: "queue.SimpleQueue[Message | None]") -> None:
    while (message := hear()) is not None:
        heard.put(message)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    args = parser.parse_args()
    follow_parent()
    greeting = hear()
    if greeting is None:
        return 0
    heard: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(heard,), daemon=True, name="parent").start()
    config = Config.load(args.home)
    wiring = Wiring(
        directory=greeting["directory"],
        cluster_token_path=str(config.cluster_token_file),
        host=greeting["directory"].rpartition(":")[0],
    )
    ray.init(
        address=greeting["ray_address"],
        namespace="headrace",
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    serve.start(
        proxy_location="Disabled",
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    stop = stop_event()  # After ray.init, which installs a handler that exits at once.
    try:
        control = Control(args.home, args.assignments, wiring)
        status = run(control, stop, heard)
        control.end()
    except ServingError as refusal:
        say_refused(refusal)
        return 3
    except RayError as error:
        say("status", text=f"Ray is gone: {type(error).__name__}")
        return 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
