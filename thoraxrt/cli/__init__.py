"""The command line: the only part above all rooms, importing each when a command needs it.

Exit status: 0; 1 where some images failed; 2 for usage, bundle, checkpoint or server errors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Final

from thoraxrt.cli import export, info, measure, predict, serve
from thoraxrt.cli.app import app
from thoraxrt.engine.errors import ThoraxrtError

__all__ = ["app", "main"]

_COMMANDS: Final[dict[str, dict[str, Callable[..., None]]]] = {
    "Make a bundle": {
        "export": export.export,
        "compile": export.compile_bundle,
        "sign": export.sign,
        "info": info.info,
        "export-triton": export.export_triton,
    },
    "Use it": {
        "predict": predict.predict,
        "serve": serve.serve,
        "health": serve.health,
        "top": serve.top,
        "token": serve.token,
        "audit": serve.verify_audit,
    },
    "Measure it": {
        "parity": measure.parity,
        "dataset": measure.dataset,
        "score": measure.score,
        "recommend": export.recommend,
    },
    "Try it without data": {"demo": measure.demo, "phantoms": export.phantoms},
}

for _panel, _commands in _COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)
app.add_typer(measure.bench, name="bench", rich_help_panel="Measure it")


def main() -> None:
    """Run the command line; an error of ours becomes one line and exit status 2."""
    try:
        app()
    except ThoraxrtError as error:
        sys.exit(_complain(str(error)))
    except ModuleNotFoundError as error:  # an extra that is not installed
        if (error.name or "thoraxrt").startswith("thoraxrt"):
            raise
        sys.exit(
            _complain(
                f"{error.name} is not installed, which this command needs: pip install 'thoraxrt[cpu,export,bench]'"
            )
        )
    except BrokenPipeError:  # the reader of our output has gone, `| head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # a full disk under --overlay, say
        sys.exit(_complain(f"{error.filename or 'a file'}: {error.strerror}"))


def _complain(message: str) -> int:
    """Print one line to stderr; the exit status for it."""
    print("thoraxrt: error:", " ".join(message.split()), file=sys.stderr)
    return 2
