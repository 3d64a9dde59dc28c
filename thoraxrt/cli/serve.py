"""The server, and what stands around one: tokens, audit log, a live view."""

from __future__ import annotations

import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from thoraxrt.cli.app import Backend, Connection, Device, Precision, RequireSignature, TlsCa, TlsCert, TlsKey, items
from thoraxrt.engine.errors import ThoraxrtError

if TYPE_CHECKING:
    from thoraxrt.server.config import Config


def serve(
    models: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]", help="A bundle's folder, or a repository of them: NAME/VERSION/.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Everything else: a TOML file.", show_default=False)
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Show what would be served, and what is wrong; serve nothing.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="127.0.0.1 unless told otherwise.", show_default=False)] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="8500 unless told otherwise; 0 takes a free one.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="8501 unless told otherwise; a second server needs another."),
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option(
            "--insecure", help="Beyond loopback also without encryption and authentication.", show_default=False
        ),
    ] = None,
    backend: Backend = None,
    precision: Precision = None,
    device: Device = None,
    fall_back: Annotated[
        bool | None,
        typer.Option(
            "--fall-back",
            help="Go on with the CPU (fp32) where a lost GPU cannot be opened again.",
            show_default=False,
        ),
    ] = None,
    require_signature: RequireSignature = None,
    require_parity: Annotated[
        bool | None,
        typer.Option(
            "--require-parity",
            help="Refuse a bundle whose parity.json does not say that this backend and precision passed.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Answer gRPC requests with a bundle, or with a repository of models.

    What is given here goes over the environment (THORAXRT_SERVER__PORT=8600), that over the file, that over the
    defaults. Health, reflection, the Open Inference Protocol and metrics (port 8501) are on. Ctrl-C or SIGTERM finishes
    what is in flight, then stops; SIGHUP looks at the bundles again.

    [bold]thoraxrt serve chexnet.bundle --port 8500[/]

    [bold]thoraxrt serve --config thoraxrt.toml --check[/]
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it would end what is still starting; `server.serve` listens to it

    from thoraxrt.server.config import load_config

    flags = {
        "models.path": models,
        "models.backend": backend,
        "models.precision": precision,
        "models.device": device,
        "models.fall_back": fall_back,
        "models.trusted": [require_signature] if require_signature else None,
        "models.require_parity": require_parity,
        "server.host": host,
        "server.port": port,
        "server.insecure": insecure,
        "metrics.port": metrics_port,
    }
    loaded = load_config(config, {key: value for key, value in flags.items() if value is not None})
    if check:
        raise typer.Exit(_show_check(loaded))
    from thoraxrt.server.run import run

    run(loaded)


def _show_check(config: Config) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from thoraxrt.server.config import check, exit_status

    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    table, findings = Table("", "what", "found"), check(config)
    for finding in findings:
        level = f"[{colours[finding.level]}]{finding.level}"
        table.add_row(level, escape(finding.about), escape(finding.text))
    Console().print(table)
    return exit_status(findings)


def health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the server listens.")] = "127.0.0.1:8500",
    service: Annotated[str, typer.Option(help="Only this service of it.", show_default=False)] = "",
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The name in the server's certificate, where it is another.")
    ] = None,
) -> None:
    """Is a server ready? For probes: exit status 0, else 1 and why (Docker keeps 2 for itself).

    [bold]thoraxrt health 127.0.0.1:8500 --tls-ca ca.pem --tls-name server.hospital.example[/]
    """
    from thoraxrt.server.probe import health as probe

    try:
        probe(address, service=service, tls=Connection(None, tls_ca, tls_cert, tls_key).tls(), tls_name=tls_name)
    except ThoraxrtError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


def token(
    file: Annotated[
        Path, typer.Argument(help="The server's file of hashed tokens (security.tokens).", show_default=False)
    ],
    name: Annotated[str, typer.Argument(help="Whom the token is for, as the audit log shows it.", show_default=False)],
    roles: Annotated[
        str, typer.Option("--roles", help="predict, or predict,admin to load and unload models too.")
    ] = "predict",
    expires: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="From this day on (UTC) it is refused.", show_default=False),
    ] = None,
) -> None:
    """Make a bearer token: it is shown once, and only its hash is kept.

    A file that is new is readable by who makes it only. For a server with a user of its own, make it readable for that
    one first: install -m 0640 -g thoraxrt /dev/null tokens.toml

    [bold]thoraxrt token tokens.toml pacs-1 --expires 2027-11-24[/]
    """
    from thoraxrt.server.tokens import add_token

    until = expires and expires.replace(tzinfo=UTC)
    print(add_token(file, name, items(roles), until))  # type: ignore[arg-type]  # it checks the roles itself


def verify_audit(
    log: Annotated[Path, typer.Argument(help="The audit log (audit.path); the files it was rotated to are found.")],
    noted: Annotated[
        str | None, typer.Option(metavar="HASH", help="A hash that was noted earlier, and must be in the log.")
    ] = None,
) -> None:
    """Check that nothing in an audit log was changed, left out or cut off.

    [bold]thoraxrt audit /var/log/thoraxrt/audit.jsonl[/]
    """
    from thoraxrt.server.audit import verify

    found = verify(log, noted)
    print(f"lines {found.first} to {found.last} are unbroken; the last one's hash is {found.head}")
    if found.recovered or found.unfinished:
        print(
            f"{found.recovered} times a half-written line was closed off; {found.unfinished} bytes are half-written now"
        )


def top(
    url: Annotated[str, typer.Argument(help="Where the server's metrics are.")] = "http://127.0.0.1:8501/metrics",
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
) -> None:
    """A live view of a server: throughput, latencies, queue, batches, refusals.

    [bold]thoraxrt top[/]
    """
    from thoraxrt.server.top import top as watch

    watch(url, once=once)
