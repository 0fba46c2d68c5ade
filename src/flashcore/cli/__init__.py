"""This package is the `flashcore` command. `app` is the typer application, `main` the script's
entry point."""

from flashcore.cli.app import app, main

__all__ = ["app", "main"]
