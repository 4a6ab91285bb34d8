"""``mconv modelfile MODEL``: a Modelfile with a proven prompt template, or the check of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import counted
from .options import human, render_options, show_json, warn

if TYPE_CHECKING:
    from ..convert.ollama.build import Made
    from ..convert.ollama.proof import Proof


class Pair(click.ParamType):
    """``NAME=VALUE`` (parameters) or ``ROLE:TEXT`` (messages)."""

    def __init__(self, sign: str, name: str) -> None:
        self.sign, self.name = sign, name

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value[0], value[1]
        left, found, right = str(value).partition(self.sign)
        if not found or not left:
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        return left, right


def modelfile_options(fn: Any) -> Any:
    """Options about what a model says of itself in Ollama."""
    for option in (
        click.option(
            "--ctx",
            "context",
            type=click.IntRange(0),
            default=8192,
            show_default=True,
            help="Context length, at most the model's own; 0 leaves it to Ollama.",
        ),
        click.option("--system", help="Default system message."),
        click.option(
            "--message",
            "messages",
            multiple=True,
            type=Pair(":", "ROLE:TEXT"),
            help="A message to begin every conversation with; repeatable.",
        ),
        click.option(
            "--parameter",
            "parameters",
            multiple=True,
            type=Pair("=", "NAME=VALUE"),
            help="A PARAMETER; repeatable, wins over the model's own.",
        ),
        click.option("--no-license", is_flag=True, help="Leave the licence out."),
        click.option(
            "--allow-template-drift",
            is_flag=True,
            help="Accept a template whose prompts differ from the model's own.",
        ),
    ):
        fn = option(fn)
    return fn


def checkpoint_options(fn: Any) -> Any:
    """Options about a checkpoint that is no whole model by itself; see ``given``."""
    for option in (
        click.option("--tokenizer", type=click.Path(exists=True), help="Tokenizer of SRC."),
        click.option("--config", type=click.Path(exists=True), help="config.json of SRC."),
        click.option(
            "--vocab-size", type=click.IntRange(1), help="True vocabulary of a padded checkpoint."
        ),
        click.option(
            "--adapter",
            type=click.Path(exists=True),
            help="PEFT folder to merge into a checkpoint, or a GGUF adapter for ADAPTER.",
        ),
    ):
        fn = option(fn)
    return fn


def given(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the options of ``checkpoint_options`` that were given, for the library."""
    names = ("tokenizer", "config", "vocab_size", "imatrix")
    out = {name: asked[name] for name in names if asked.get(name) is not None}
    if asked["adapter"] is not None and not is_gguf(asked["adapter"]):
        out["adapter"] = asked["adapter"]
    return out


def is_gguf(path: str) -> bool:
    """Whether an adapter is a GGUF file, for ADAPTER."""
    return path.endswith(".gguf")


@click.command("modelfile")
@click.argument("model", required=False, type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="Where to write it (default: stdout).")
@click.option("--check", type=click.Path(), help="Check this Modelfile instead of making one.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@modelfile_options
@checkpoint_options
@render_options
def command(
    model: str | None,
    output: str | None,
    check: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Make the Modelfile of MODEL, a GGUF file or any checkpoint, and prove its TEMPLATE.

    \b
    mconv modelfile model-Q4_K_M.gguf -o Modelfile
    mconv modelfile --check Modelfile
    """
    if (model is None) == (check is None):
        raise click.UsageError("name a model, or a Modelfile with --check")
    if check is not None:
        _check(Path(check), as_json, quiet)
    else:
        assert model is not None
        _make(Path(model), output, force, as_json, quiet, asked)


def _check(path: Path, as_json: bool, quiet: bool) -> None:
    from ..convert.ollama.modelfile_check import check_modelfile

    checked = check_modelfile(path)
    said = checked.modelfile
    if as_json:
        show_json({"models": said.models, "parameters": said.parameters, "template": said.template,
                   "system": said.system, "warnings": checked.warnings})  # fmt: skip
        return
    if not quiet:
        warn(checked.warnings)
        click.echo(f"{path}: legal, {counted(len(checked.warnings), 'warning')}")


def _make(
    model: Path, output: str | None, force: bool, as_json: bool, quiet: bool, asked: dict[str, Any]
) -> None:
    from ..convert.ollama.build import make_modelfile
    from ..convert.ollama.facts import facts_of
    from ..convert.ollama.modelfile_values import emit
    from ..errors import OutputError

    folder = Path(output).parent if output else Path()
    gguf = model if model.suffix == ".gguf" else model.with_name(f"{model.resolve().name}.gguf")
    made = make_modelfile(
        facts_of(model, **given(asked)), wishes(_seen_from(folder, gguf), asked, folder)
    )
    if gguf != model and not quiet:
        warn((f"FROM names {gguf}; write it with `mconv to-gguf {model} {gguf}`",))
    text = emit(made.modelfile, comments(made))
    if output:
        target = Path(output)
        if target.exists() and not force:
            raise OutputError(f"{target}: exists; replace it with --force")
        target.write_text(text, encoding="utf-8")
    if as_json:
        show_json({"modelfile": text, **as_dict(made)})
        return
    if not quiet:
        show_made(made)
    if not output:
        click.echo(text, nl=False)


def _seen_from(folder: Path, path: Path) -> str:
    """Return a path as a Modelfile in ``folder`` names it."""
    text = os.path.relpath(path, folder)
    return text if text.startswith((".", "/")) else f"./{text}"


def wishes(source: str, asked: dict[str, Any], folder: Path | None = None) -> Any:
    """Turn the options into ``Wishes``; ``folder`` is where the Modelfile goes, if it does."""
    from ..convert.ollama.build import Wishes
    from ..convert.ollama.parameters import ParameterValue, parse_parameter

    parameters: dict[str, ParameterValue] = {}
    for name, text in asked["parameters"]:
        value, before = parse_parameter(name, text), parameters.get(name)
        if isinstance(value, tuple) and isinstance(before, tuple):
            value = before + value
        parameters[name] = value
    adapter = asked["adapter"] if is_gguf(asked["adapter"] or "") else None
    if adapter and folder is not None:
        adapter = _seen_from(folder, Path(adapter))
    return Wishes(
        source=source,
        adapter=adapter,
        context=asked["context"],
        system=asked["system"],
        messages=asked["messages"],
        parameters=parameters,
        allow_template_drift=asked["allow_template_drift"],
        license=not asked["no_license"],
    )


def comments(made: Made) -> list[str]:
    """Lines for the head of the file: what was proven."""
    return [f"made by mconv; {proof_line(made.proof)}"]


def proof_line(proof: Proof | None) -> str:
    """One line about a proof."""
    if proof is None:
        return "no chat template was proven"
    same = sum(row.same for row in proof.rows)
    return (
        f"TEMPLATE gives the same prompt as the model's chat template in {same} of "
        f"{proof.compared} conversations"
    )


def show_made(made: Made) -> None:
    """Print the proof as a table, and the memory of the context, on stderr."""
    if made.proof is not None:
        for row in made.proof.rows:
            state = "same" if row.same else "refused by the model" if row.refused else "DIFFERS"
            click.echo(f"  {row.name:<28} {state:<8} {row.difference}".rstrip(), err=True)
    click.echo(proof_line(made.proof), err=True)
    stops = made.modelfile.parameters.get("stop", ())
    if isinstance(stops, tuple):
        click.echo(f"stop: {' '.join(map(repr, stops)) or 'none'}", err=True)
    if made.kv_bytes is not None:
        length = made.modelfile.parameters.get("num_ctx", "the whole")
        click.echo(f"context {length}: {human(made.kv_bytes)} of keys and values (f16)", err=True)
    warn(made.warnings)


def as_dict(made: Made) -> dict[str, Any]:
    """The same for ``--json``."""
    rows = made.proof.rows if made.proof else ()
    return {
        "proven": made.proof.ok if made.proof else None,
        "conversations": [
            {"name": r.name, "same": r.same, "refused": r.refused, "difference": r.difference}
            for r in rows
        ],
        "parameters": made.modelfile.parameters,
        "kv_bytes": made.kv_bytes,
        "warnings": made.warnings,
    }
