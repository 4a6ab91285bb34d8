"""``mconv ollama ...``: install, bundle, unbundle, verify, lint, explain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import counted
from .modelfile import checkpoint_options, given, modelfile_options, proof_line, wishes
from .options import human, progress_bar, render_options, show_json, warn

if TYPE_CHECKING:
    from ..convert.ollama.install import Installed
    from ..convert.ollama.store import Store


def _default_store() -> Path:
    """The store of this user's Ollama."""
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")


def _store(path: str | None) -> Store:
    from ..convert.ollama.store import Store

    return Store(Path(path) if path else _default_store())


_STORE = click.option(
    "--store", type=click.Path(), help="Models folder (default: OLLAMA_MODELS, ~/.ollama/models)."
)


@click.group("ollama")
def command() -> None:
    """Bring models into Ollama, and look after them there."""


@command.command("install")
@click.argument("source", type=click.Path(exists=True))
@click.option("--name", required=True, help="Name in Ollama, [NAMESPACE/]MODEL[:TAG].")
@click.option("-q", "--quantize", metavar="TYPE", help="Type of the weights, such as Q4_K_M.")
@click.option("--store", type=click.Path(), help="Write into this models folder, no server needed.")
@click.option("--host", metavar="URL", help="Server (default: OLLAMA_HOST, 127.0.0.1:11434).")
@click.option(
    "--imatrix", type=click.Path(exists=True), help="Importance matrix that guides the rounding."
)
@checkpoint_options
@modelfile_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def install_command(
    source: str,
    name: str,
    quantize: str | None,
    store: str | None,
    host: str | None,
    as_json: bool,
    quiet: bool,
    **asked: Any,
) -> None:
    """Install SOURCE, a GGUF file or a checkpoint of any layout.

    \b
    mconv ollama install runs/zero3 --name my-model -q Q4_K_M
    mconv ollama install model.gguf --name my-model --store /usr/share/ollama/.ollama/models
    """
    from ..convert.ollama.install import install
    from ..convert.ollama.names import parse_name
    from ..convert.ollama.server import Server

    if store and host:
        raise click.UsageError("--store or --host, not both")
    address = host or os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
    with progress_bar(f"install {name}", shown=not (quiet or as_json)) as progress:
        done = install(
            source,
            parse_name(name),
            _store(store) if store else Server(address.replace("0.0.0.0", "127.0.0.1")),
            wishes("model.gguf", asked),
            quantize=quantize,
            options=given(asked),
            progress=progress,
        )
    if as_json:
        show_json(_as_dict(done))
    elif not quiet:
        _show(done)


def _as_dict(done: Installed) -> dict[str, Any]:
    proof = done.made.proof
    return {
        "name": str(done.name),
        "where": done.where,
        "id": done.id,
        "digest": done.digest,
        "nbytes": done.nbytes,
        "proven": proof.ok if proof else None,
        "parameters": done.made.modelfile.parameters,
        "checks": done.checks,
        "warnings": done.warnings,
    }


def _show(done: Installed) -> None:
    """One screen."""
    stops = done.made.modelfile.parameters.get("stop", ())
    rows = [
        ("installed", f"{done.name} in {done.where}" + (f", id {done.id}" if done.id else "")),
        ("weights", f"{human(done.nbytes)}, {done.digest[:19]}"),
        ("prompt", proof_line(done.made.proof)),
        ("stop", " ".join(map(repr, stops)) if isinstance(stops, tuple) and stops else "none"),
    ]
    if done.made.kv_bytes is not None:
        length = done.made.modelfile.parameters.get("num_ctx", "whole")
        rows.append(("context", f"{length}: {human(done.made.kv_bytes)} of keys and values (f16)"))
    rows += [("checked", text) for text in done.checks]
    rows.append(("next", f"ollama run {done.name}"))
    for key, value in rows:
        click.echo(f"{key:>10}  {value}")
    warn(done.warnings)


@command.command("bundle")
@click.argument("name")
@click.option("-o", "--output", required=True, type=click.Path(), help="The tar file to write.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@_STORE
def bundle_command(name: str, output: str, force: bool, store: str | None) -> None:
    """Write an installed model into one file, for a machine without a network."""
    from ..convert.ollama.bundle import bundle
    from ..convert.ollama.names import parse_name

    manifest = bundle(_store(store), parse_name(name), Path(output), force)
    size = human(Path(output).stat().st_size)
    click.echo(f"wrote {output}: {manifest.name}, {counted(len(manifest.blobs()), 'blob')}, {size}")


@command.command("unbundle")
@click.argument("file", type=click.Path())
@click.option("--name", help="Another name for the model.")
@_STORE
def unbundle_command(file: str, name: str | None, store: str | None) -> None:
    """Install a bundled model; every blob is checked."""
    from ..convert.ollama.bundle import unbundle
    from ..convert.ollama.names import parse_name

    with progress_bar(f"unbundle {Path(file).name}", shown=True) as progress:
        rename = parse_name(name) if name else None
        manifest = unbundle(_store(store), Path(file), rename, progress)
    click.echo(f"installed {rename or manifest.name}, id {manifest.id}")


@command.command("verify")
@click.argument("name")
@_STORE
def verify_command(name: str, store: str | None) -> None:
    """Check every byte of an installed model, and that its parts fit together."""
    from ..convert.ollama.names import parse_name
    from ..convert.ollama.verify import verify

    with progress_bar(f"verify {name}", shown=True) as progress:
        problems = verify(_store(store), parse_name(name), progress)
    for problem in problems:
        click.echo(f"{click.style('broken:', fg='red')} {problem}", err=True)
    if problems:
        raise click.exceptions.Exit(2)
    click.echo(f"{parse_name(name)}: whole")


@command.command("lint")
@click.argument("file", type=click.Path())
@click.option("--scan/--no-scan", default=True, help="Look for NaN in unquantized tensors.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def lint_command(file: str, scan: bool, as_json: bool) -> None:
    """Look at a GGUF file with Ollama's eyes. Exits with 2 if Ollama will refuse or misread it."""
    from ..convert.ollama.lint import lint

    found = lint(Path(file), scan)
    if as_json:
        show_json([{"level": f.level, "text": f.text} for f in found])
    for finding in () if as_json else found:
        click.echo(f"{finding.level}: {finding.text}")
    if not found and not as_json:
        click.echo(f"{file}: nothing to say")
    if any(finding.level == "error" for finding in found):
        raise click.exceptions.Exit(2)


@command.command("explain")
@click.argument("model", type=click.Path(exists=True))
@click.option("--modelfile", type=click.Path(exists=True), help="With this Modelfile's TEMPLATE.")
@checkpoint_options
@render_options
def explain_command(
    model: str, modelfile: str | None, as_json: bool, quiet: bool, **asked: Any
) -> None:
    """Say which renderer, capabilities and prompt each generation of Ollama will use."""
    from ..convert.ollama.build import Wishes, make_modelfile
    from ..convert.ollama.explain import explain
    from ..convert.ollama.facts import facts_of
    from ..convert.ollama.modelfile_check import check_modelfile

    facts = facts_of(model, **given(asked))
    if modelfile:
        said = check_modelfile(Path(modelfile)).modelfile
    else:
        said = make_modelfile(facts, Wishes(source="x", allow_template_drift=True)).modelfile
    found = explain(facts, said.template)
    if as_json:
        keys = ("generation", "versions", "renderer", "why", "capabilities", "prompt")
        show_json([{key: getattr(p, key) for key in keys} for p in found])
    for p in () if as_json or quiet else found:
        click.echo(f"{p.generation} ({p.versions}): {p.renderer}: {p.why}")
        click.echo(f"   {', '.join(p.capabilities)}")
        click.echo(f"   {'cannot be foretold' if p.prompt is None else repr(p.prompt)}")
