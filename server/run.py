"""A server from its configuration: what it needs is opened here, in order, and closed in the reverse one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from thoraxrt.engine.decode import Decoder, ThreadDecoder
from thoraxrt.server.audit import AuditLog
from thoraxrt.server.config import Config
from thoraxrt.server.decoding import ProcessDecoder
from thoraxrt.server.models import Models
from thoraxrt.server.serve import ServeOptions, serve
from thoraxrt.server.telemetry import MetricsEndpoint, NullTelemetry, Telemetry, logging_to_stderr, tracing

__all__ = ["run"]


def run(config: Config, announce: Callable[[str], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; for the main thread.

    `announce` gets one line once requests are answered, see `serve`. Raises what keeps the server from starting:
    ServerError, BundleError, BackendError, RequestError, ConfigError, AuditError.
    """
    server, options = config.server, config.models
    with ExitStack() as opened:
        opened.enter_context(logging_to_stderr(config.logging.level, as_json=config.logging.json))
        telemetry = _telemetry(config)
        opened.callback(telemetry.close)
        if isinstance(telemetry, Telemetry) and config.metrics.enabled:
            opened.enter_context(MetricsEndpoint(telemetry, config.metrics.host, config.metrics.port))
        audit = opened.enter_context(AuditLog(config.audit, telemetry)) if config.audit else None
        decoder, workers = _decoder(config, telemetry)
        opened.callback(decoder.close)
        models = Models(
            options.path,
            decoder,
            replace(config.batching, workers=workers),
            telemetry,
            engine=options,
            latest=None if options.latest == "all" else options.latest,
            grace_s=server.grace_s,
            poll_s=options.poll_s,
        )
        telemetry.gpu_memory(models.device_memory)
        serve(
            models,
            ServeOptions(
                host=server.host,
                port=server.port,
                security=config.security,
                insecure=server.insecure,
                max_message_bytes=config.max_message_bytes,
                grace_s=server.grace_s,
            ),
            telemetry,
            audit,
            announce=announce,
        )


def _telemetry(config: Config) -> NullTelemetry:
    traces = tracing(config.tracing.endpoint) if config.tracing.endpoint else None
    return Telemetry(traces) if traces or config.metrics.enabled else NullTelemetry()


def _decoder(config: Config, telemetry: NullTelemetry) -> tuple[Decoder, int]:
    """The decoder, and how many images it decodes at once. A GPU looks 16-bit values up itself."""
    options, keep_stored = config.decoding, (config.models.device or "").startswith("cuda")
    if options.processes:
        processes = ProcessDecoder(
            options.workers,
            config.limits,
            keep_stored=keep_stored,
            worker_limits=options,
            on_replaced=telemetry.worker_restarted,
        )
        return processes, processes.workers
    threads = ThreadDecoder(options.workers, config.limits, keep_stored=keep_stored)
    return threads, threads.workers
