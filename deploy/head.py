"""The Ray head of one machine: starts Ray's own processes and keeps its control store alive.

The control store (GCS) keeps its state on disk. When it dies it is started again on the same
port: replicas go on serving, and placing, healing and upgrading go on after about a second. When
the raylet dies the replicas are lost with it, and this process ends so that the supervisor starts
both again. When this process ends, however it ends, the kernel ends Ray's processes.

It is `ray start --head --block` without the dashboard, the autoscaler and the log monitor (300 MB
and 4 s of two cores that one machine has no use for), and without ending when the GCS does.
Written against Ray 2.60's `Node`, which is why pyproject.toml pins the minor version.
"""

import argparse
import time
from pathlib import Path

from ray._private import ray_constants
from ray._private.node import Node
from ray._private.parameter import RayParams

from headrace.deploy.processes import follow_parent, say, say_refused, stop_event
from headrace.deploy.ray_env import make_ray_temp_dir
from headrace.serving.errors import ServingError

WATCH_S = 0.1
"""How often Ray's processes are looked at: what a dead control store adds to its restart."""
OBJECT_STORE_BYTES = 80 << 20
"""Ray's least is 75 MiB; nothing of ours passes through it."""
GCS_RESTARTS_MAX = 10
"""Within `GCS_RESTARTS_WINDOW_S`; a store that dies faster is broken, and a new head is better."""
GCS_RESTARTS_WINDOW_S = 300


class Head(Node):
    """Ray's head node, without its dashboard."""

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        """Nothing: the dashboard needs 120 MB and listens on a port that nobody here uses."""

    def restart_control_store(self) -> None:
        """Start the GCS again where it was; clients reconnect by themselves."""
        self.kill_gcs_server(check_alive=False)
        self.start_gcs_server()


def _link_logs(home: Path, logs: Path) -> None:
    """Ray's logs, the replicas' among them, where an operator looks for logs."""
    link = home / "logs" / "ray"
    link.unlink(missing_ok=True)
    link.symlink_to(logs)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--cpus", type=int, required=True)
    args = parser.parse_args()
    follow_parent()
    try:
        temp_dir = make_ray_temp_dir(args.home)
    except ServingError as refusal:
        say_refused(refusal)
        return 3
    head = Head(
        RayParams(
            node_ip_address="127.0.0.1",
            num_cpus=args.cpus,
            num_gpus=0,
            include_log_monitor=False,  # pyright: ignore[reportArgumentType]  Ray's hint is wrong.
            no_monitor=True,
            temp_dir=str(temp_dir),
            object_store_memory=OBJECT_STORE_BYTES,
            dashboard_agent_listen_port=0,
        ),
        head=True,
        shutdown_at_exit=True,
        spawn_reaper=True,
    )
    _link_logs(args.home, Path(head.get_logs_dir_path()))
    stop = stop_event()  # After Node, which installs a handler that would drain for 30 s.
    say("ready", ray_address=head.gcs_address)
    restarts: list[float] = []
    while not stop.wait(WATCH_S):
        for kind, process in head.dead_processes():
            say("status", text=f"Ray's {kind} ended with status {process.returncode}")
            now = time.monotonic()
            restarts = [at for at in restarts if now - at < GCS_RESTARTS_WINDOW_S]
            if kind != ray_constants.PROCESS_TYPE_GCS_SERVER or len(restarts) >= GCS_RESTARTS_MAX:
                return 1
            restarts.append(now)
            head.restart_control_store()
            say("status", text="Ray's control store was started again")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
