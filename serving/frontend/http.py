"""HTTP beside gRPC: /metrics for Prometheus, /healthz and /readyz for probes."""

import ssl

from aiohttp import web

from headrace.serving.frontend.health import Readiness
from headrace.serving.observe import Metrics

BODY_BYTES_MAX = 1024
"""Nobody sends us a body."""


class HttpServer:
    def __init__(
        self,
        *,
        host: str,
        port: int,
        readiness: Readiness,
        metrics: Metrics,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._readiness = readiness
        self._metrics = metrics
        self._tls = tls
        application = web.Application(client_max_size=BODY_BYTES_MAX)
        application.add_routes(
            [
                web.get("/metrics", self._scrape),
                web.get("/healthz", self._alive),
                web.get("/readyz", self._ready),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None, handle_signals=False)

    async def start(self) -> str:
        """Returns the address it listens on.

        Raises:
            OSError: the port is taken.
        """
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port, ssl_context=self._tls)
        await site.start()
        host, port, *_ = self._runner.addresses[0]
        return f"{host}:{port}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _scrape(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _alive(self, _: web.Request) -> web.Response:
        """The event loop answers, so the process lives. A restart would not help otherwise."""
        return web.json_response({"status": "alive"})

    async def _ready(self, _: web.Request) -> web.Response:
        why = self._readiness.why_not()
        if why is None:
            return web.json_response({"status": "ready"})
        return web.json_response({"status": "not ready", "why": why}, status=503)
