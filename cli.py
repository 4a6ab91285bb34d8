"""The ``mconv`` command: parse, call one library function, render.

Commands live in ``commands/``, one module each, imported only when they are used, so that ``mconv
--help`` is instant. Exit codes: 0 ok, 1 a bug of ours, 2 bad input or usage.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib import import_module
from typing import NoReturn

import click

from .errors import MconvError, did_you_mean

# name -> one-line help, so that listing the commands imports none of them
_COMMANDS = {
    "demo": "Train, merge, export, quantize and prove a tiny model on this machine.",
    "inspect": "Show what a checkpoint is: format, layout, tensors, what is missing.",
    "check": "Tell whether and how a checkpoint becomes GGUF, and all that is in the way.",
    "archs": "List the architectures that can become GGUF.",
    "reshard": "Merge or reshard a checkpoint into another layout.",
    "to-gguf": "Convert a checkpoint of any layout to GGUF.",
    "from-gguf": "Bring a GGUF model back into a Hugging Face folder.",
    "gguf": "Show, edit, merge, split and hash GGUF files.",
    "quantize": "Quantize a GGUF model to one or several types.",
    "train": "Train a model under any parallel layout, on this machine or under torchrun.",
    "pipeline": "Train, merge, export to GGUF, write a Modelfile and prove all of it.",
    "tokenize": "Encode text for training; can train a small tokenizer.",
    "plot": "Draw the curves of training runs.",
    "plan": "Recommend a parallel layout, and a GGUF type, for given GPUs.",
    "roundtrip": "Prove that a chain of conversions loses nothing.",
    "ollama": "Install models into Ollama, prove their prompts, verify, bundle, lint.",
    "deploy": "Serve a model from replicas behind a balancer: compose, Kubernetes, RPC.",
    "modelfile": "Make a Modelfile with a proven prompt template, or check one.",
    "diff": "Compare two checkpoints of any formats, tensor by tensor.",
}

# what a disk or its rights refuse is no bug of ours, wherever it shows
_MACHINE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EIO}


class _Lazy(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = import_module(f".commands.{name.replace('-', '_')}", __package__)
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no such command {args[0]!r}{did_you_mean(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mconv", prog_name="mconv")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Turn any trained LLM checkpoint into a model that runs."""
    ctx.obj = {"debug": debug}


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    code = _run(sys.argv[1:] if args is None else args)
    team = sys.modules.get(f"{__package__}.shardio.team")
    if team is not None and team.of_torchrun():
        team.leave(code)
    sys.exit(code)


def _run(argv: list[str]) -> int:
    """Run the command line; returns the exit code, with the error shown."""
    try:
        code = cli.main(argv, prog_name="mconv", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as e:
        e.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run again with --resume to continue", err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MconvError as e:
        if "--debug" in argv:
            raise
        return _refused(str(e))
    except Exception as e:
        if "--debug" in argv:
            raise
        if isinstance(e, OSError) and e.errno in _MACHINE and e.filename is not None:
            return _refused(f"{os.fsdecode(e.filename)}: {e.strerror}")
        click.echo(
            f"internal error: {type(e).__name__}: {e}\nThis is a bug of mconv; run with "
            "`mconv --debug ...` for the traceback and report it.",
            err=True,
        )
        return 1


def _refused(why: str) -> int:
    click.echo(f"{click.style('error:', fg='red', bold=True)} {why}", err=True)
    return 2
