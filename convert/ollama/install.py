"""Bring a model into Ollama: convert, quantize, prove the prompt, install, read back.

One call takes any checkpoint or GGUF. Offline the weights are written straight into the store and
become a blob by renaming; over HTTP they go into a temporary file and are sent by digest. The
prompts of a running server are compared with the model's own chat template.
"""

from __future__ import annotations

import datetime
import re
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...shardio.stream import Progress
from ..gguf import open_gguf
from ..quantize import QuantizeOptions, quantize_gguf
from ..to_gguf import to_gguf
from .build import Made, Wishes, make_modelfile
from .ends import end_token_overrides, unseen_stops, unseen_text
from .facts import ModelFacts, facts_of, open_with
from .jinja_chat import Message, TemplateRefusedError, compile_chat
from .layers import (
    CONFIG_TYPE,
    LAYER_PREFIX,
    Layer,
    api_parameters,
    config_json,
    manifest_json,
    text_layers,
)
from .modelfile_values import Modelfile
from .names import ModelName
from .prompt import merged
from .proof import CONVERSATIONS, jinja_prompt
from .server import Server, ServerError
from .store import Store, hash_file

_STORED = re.compile(r"^FROM .*sha256[-:]([0-9a-f]{64})", re.M)


@dataclass(frozen=True, slots=True)
class Installed:
    """What was installed.

    Attributes:
        name: of the model.
        where: the store or the server.
        made: its Modelfile, with the proof.
        digest: of the weights.
        nbytes: size of the weights.
        id: as ``ollama list`` shows it; empty over HTTP.
        checks: what was read back and found right.
        warnings: what a user should know.
    """

    name: ModelName
    where: str
    made: Made
    digest: str
    nbytes: int
    id: str = ""
    checks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())


def install(
    source: str | Path,
    name: ModelName,
    target: Store | Server,
    wishes: Wishes,
    *,
    quantize: str | None = None,
    options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Installed:
    """Install a GGUF file or a checkpoint of any layout.

    Args:
        source: the model.
        name: in Ollama.
        target: a models folder, or a server.
        wishes: about its Modelfile.
        quantize: type of the weights, such as ``Q4_K_M``; by default a GGUF stays as it is,
            but for an end token it lacks, and a checkpoint becomes ``auto`` (its own 16-bit type).
        options: of ``to_gguf`` for checkpoints, ``adapter`` (a PEFT folder to merge), ``imatrix``.
        progress: called with (bytes done, bytes in all).

    Raises:
        MconvError: the model cannot be converted, its template not be proven, or the target does
            not take it. Nothing is visible in Ollama then.
    """
    place, more = Path(source), options or {}
    if quantize and "," in quantize:
        raise ConfigError(f"-q {quantize}: Ollama takes one type per model")
    facts = facts_of(place, **more)  # before any byte is written: a bad template costs nothing
    made = make_modelfile(facts, wishes)
    if made.modelfile.adapter is not None:
        check_adapter(Path(made.modelfile.adapter), facts.architecture)
    with ExitStack() as stack:
        if isinstance(target, Store):
            work = stack.enter_context(target.work_folder())
        else:
            target.version()  # before any work: is it there?
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mconv-")))
        change = end_token_overrides(facts, _stops(made))
        checks: tuple[str, ...] = ()
        weights = _weights(place, work, quantize, change, more, progress)
        if change:
            mended = unseen_stops(facts, _stops(made))[0]
            left = [w for w in made.warnings if w != unseen_text(facts, mended)]
            made = replace(made, warnings=tuple(left))
            checks = (f"{mended!r} named as an end token, for releases from 0.30",)
        if isinstance(target, Store):
            done = _into_store(target, work, weights, name, made, progress)
        else:
            done = _into_server(target, weights, name, made, facts, progress)
        return replace(done, checks=(*checks, *done.checks))


def check_adapter(path: Path, architecture: str) -> None:
    """Check that a file is a GGUF adapter for a model.

    Raises:
        ConfigError: it is not, or for another architecture.
        FormatError: it cannot be read.
    """
    gguf = open_gguf(path)
    if gguf.get("general.type") != "adapter":
        raise ConfigError(f"{path}: is no GGUF adapter (general.type is not 'adapter')")
    if gguf.get("general.architecture") != architecture:
        raise ConfigError(
            f"{path}: is an adapter for {gguf.get('general.architecture')}, not {architecture}"
        )


def _stops(made: Made) -> tuple[str, ...]:
    stops = made.modelfile.parameters.get("stop", ())
    return stops if isinstance(stops, tuple) else ()


def _weights(
    place: Path,
    work: Path,
    kind: str | None,
    change: tuple[str, ...],
    options: dict[str, Any],
    progress: Progress | None,
) -> Path:
    """Return one GGUF file: the source itself, or one made in ``work`` with ``change`` applied."""
    made = work / "model.gguf"
    wanted = QuantizeOptions(override_kv=change, imatrix=options.get("imatrix"))
    if place.suffix != ".gguf":
        source, rest = open_with(place, options)
        to_gguf(source, made, kind or "auto", quantization=wanted, progress=progress, **rest)
        return made
    parts = open_gguf(place).paths
    if kind or change or len(parts) > 1:  # Ollama wants one file
        quantize_gguf(place, made, [kind or "COPY"], wanted, progress=progress)
        return made
    return place


def _into_store(
    store: Store,
    work: Path,
    weights: Path,
    name: ModelName,
    made: Made,
    progress: Progress | None,
) -> Installed:
    gguf = open_gguf(weights)
    kind = f"{LAYER_PREFIX}model"
    if weights.parent == work:
        model = store.add_made(weights, kind, progress)
    else:
        model = store.add_copy(work, weights, kind, progress)
    layers = [model]
    if made.modelfile.adapter is not None:
        adapter = Path(made.modelfile.adapter)
        layers.append(store.add_copy(work, adapter, f"{LAYER_PREFIX}adapter", progress))
    for what, data in text_layers(made.modelfile):
        layers.append(store.add_bytes(work, data, LAYER_PREFIX + what))
    config = store.add_bytes(work, config_json(gguf, layers, made.modelfile), CONFIG_TYPE)
    store.write_manifest(work, name, manifest_json(config, layers))
    manifest = store.read(name)
    return Installed(
        name, str(store.root), made, model.digest, model.size, manifest.id, (), made.warnings
    )


def create_request(modelfile: Modelfile, name: str, weights: Layer) -> dict[str, Any]:
    """Return the body of ``/api/create``."""
    request: dict[str, Any] = {"model": name, "files": {"model.gguf": weights.digest}}
    for key in ("template", "system", "renderer", "parser", "requires"):
        value = getattr(modelfile, key)
        if value is not None:
            request[key] = value
    if modelfile.licenses:
        request["license"] = list(modelfile.licenses)
    if modelfile.parameters:
        text_layers(modelfile)  # the server does not check parameters
        request["parameters"] = api_parameters(modelfile)
    if modelfile.messages:
        request["messages"] = [{"role": r, "content": text} for r, text in modelfile.messages]
    return request


def _into_server(
    server: Server,
    weights: Path,
    name: ModelName,
    made: Made,
    facts: ModelFacts,
    progress: Progress | None,
) -> Installed:
    version = server.version()
    digest = hash_file(weights)
    layer = Layer(f"{LAYER_PREFIX}model", digest, weights.stat().st_size)
    sent = server.send_blob(weights, digest, progress)
    request = create_request(made.modelfile, str(name), layer)
    if made.modelfile.adapter is not None:
        adapter = Path(made.modelfile.adapter)
        request["adapters"] = {adapter.name: hash_file(adapter)}
        server.send_blob(adapter, request["adapters"][adapter.name], progress)
    server.create(request)
    checks = [f"server {version}", "weights sent" if sent else "weights were there already"]
    warnings = list(made.warnings)
    _read_back(server, name, made.modelfile, digest, checks, warnings)
    if made.proof is not None and made.modelfile.template is not None:
        _prompts(server, name, facts, made.modelfile, checks, warnings)
    return Installed(name, server.url, made, digest, layer.size, "", tuple(checks), tuple(warnings))


def _read_back(
    server: Server,
    name: ModelName,
    modelfile: Modelfile,
    digest: str,
    checks: list[str],
    warnings: list[str],
) -> None:
    """Compare what the server says of the model with what it was told."""
    said = server.show(str(name))
    stored = _STORED.search(str(said.get("modelfile", "")))
    if stored and f"sha256:{stored.group(1)}" == digest:
        checks.append("weights read back")
    elif stored:
        checks.append(
            f"the server stored weights of its own making (sha256:{stored.group(1)[:12]}): it "
            "rewrites what it is sent; --store keeps the file as it is"
        )
    for key in ("template", "system"):
        wanted = getattr(modelfile, key)
        if wanted is None:
            continue
        if said.get(key) == wanted:
            checks.append(f"{key} read back")
        else:
            warnings.append(f"{server.url}: shows another {key} than it was given")


def _with_defaults(modelfile: Modelfile, messages: Sequence[Message]) -> list[Message]:
    """Return what a server makes of a conversation: MESSAGEs go first, SYSTEM if none is given."""
    whole = [*modelfile.messages, *messages]
    if modelfile.system and messages[0][0] != "system":
        whole.insert(0, ("system", modelfile.system))
    return merged(whole)


def _prompts(
    server: Server,
    name: ModelName,
    facts: ModelFacts,
    modelfile: Modelfile,
    checks: list[str],
    warnings: list[str],
) -> None:
    """Let the server render the conversations, and compare them with the model's own template."""
    assert facts.chat_template is not None
    chat = compile_chat(facts.chat_template, facts.tokens)
    same, compared, different = 0, 0, ""
    for title, messages in CONVERSATIONS:
        if modelfile.messages and messages[0][0] == "system":
            continue  # a system message behind MESSAGEs has no agreed place
        try:
            whole = _with_defaults(modelfile, messages)
            expected = jinja_prompt(chat, whole, datetime.datetime.now(), facts.bos)
            got = server.render(str(name), messages)
        except TemplateRefusedError:
            continue
        except ServerError as error:
            warnings.append(f"the server does not render prompts: {error}")
            return
        if got is None:
            warnings.append("this server cannot show its prompts (it needs 0.11.5)")
            return
        compared += 1
        if got.removeprefix(facts.bos) == expected:
            same += 1
        else:
            different = different or title
    checks.append(f"the server renders {same} of {compared} prompts as the model's own template")
    if different:
        warnings.append(f"the server's prompt differs in conversation {different!r}")
