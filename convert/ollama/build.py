"""Make the Modelfile of a model: proven TEMPLATE, stop strings, sampling, context, licence.

``make_modelfile`` decides everything and says what it decided; nothing is written here. A TEMPLATE
that could not be proven is refused, unless drift is allowed: then the best one found is used, or
none, which leaves the prompt to the chat template inside the GGUF (Ollama from 0.30).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ConfigError, UnsupportedError
from .ends import unseen_stops, unseen_text
from .facts import ModelFacts
from .go_writer import go_template, without_bos
from .induce import NotInducedError, induce
from .jinja_chat import Message, TemplateRefusedError, compile_chat
from .modelfile_values import Modelfile
from .parameters import ParameterValue
from .proof import Proof, prove
from .stops import stop_strings

DEFAULT_CONTEXT = 8192
#: The prompt as it comes, for models without a chat format.
PLAIN = "{{ .Prompt }}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a user asked for.

    Attributes:
        source: what FROM says.
        context: tokens of context, at most those the model was trained for; 0 leaves it to Ollama.
        system: default system message.
        messages: (role, content) to begin with.
        parameters: further parameters, which win.
        allow_template_drift: accept a template whose prompts differ.
        license: whether to include the licence.
        adapter: a GGUF adapter that Ollama applies at run time (before 0.34.1).
    """

    source: str
    context: int = DEFAULT_CONTEXT
    system: str | None = None
    messages: Sequence[Message] = ()
    parameters: dict[str, ParameterValue] | None = None
    allow_template_drift: bool = False
    license: bool = True
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """A Modelfile and how it came about.

    Attributes:
        modelfile: the values.
        proof: of its TEMPLATE; None for a model without a chat template, or without a TEMPLATE.
        kv_bytes: memory of keys and values of the whole context, f16; None if unknown.
        warnings: what a user should know.
    """

    modelfile: Modelfile
    proof: Proof | None
    kv_bytes: int | None
    warnings: tuple[str, ...]


def make_modelfile(facts: ModelFacts, wishes: Wishes) -> Made:
    """Return the Modelfile of a model.

    Raises:
        UnsupportedError: the prompts of its template differ from the model's own, and drift is not
            allowed; the message says where.
        ConfigError: a parameter is illegal.
    """
    template, proof, stops, warnings = _template(facts, wishes.allow_template_drift)
    parameters: dict[str, ParameterValue] = dict(facts.sampling)
    context = _context(facts, wishes.context)
    if context:
        parameters["num_ctx"] = context
    if stops:
        parameters["stop"] = stops
    parameters.update(wishes.parameters or {})
    length = parameters.get("num_ctx") or facts.context_length
    modelfile = Modelfile(
        models=(wishes.source,),
        template=template,
        system=wishes.system,
        licenses=(facts.license,) if facts.license and wishes.license else (),
        parameters=parameters,
        messages=tuple(wishes.messages),
        adapter=wishes.adapter,
    )
    if wishes.adapter:
        warnings.append(
            "releases from 0.34.1 refuse ADAPTER; for those merge the adapter into the checkpoint "
            "(--adapter with the PEFT folder)"
        )
    size = facts.kv_bytes(length) if isinstance(length, int) else None
    return Made(modelfile, proof, size, tuple(warnings))


def _context(facts: ModelFacts, asked: int) -> int:
    if asked < 0:
        raise ConfigError(f"a context of {asked} tokens: expected a positive number, or 0")
    return min(asked, facts.context_length or asked)


def _template(
    facts: ModelFacts, drift: bool
) -> tuple[str | None, Proof | None, tuple[str, ...], list[str]]:
    """Return (TEMPLATE, proof, stops, warnings)."""
    if facts.chat_template is None:
        warning = "the model has no chat template: TEMPLATE passes prompts as they come"
        return PLAIN, None, facts.eog, [warning]
    try:
        chat = compile_chat(facts.chat_template, facts.tokens)
        shape = induce(chat)
        missing = shape.dates.inexpressible()
        if missing:
            raise NotInducedError(f"chat template: date format {', '.join(missing)}")
        template = go_template(without_bos(shape, facts.bos))
    except (NotInducedError, TemplateRefusedError) as error:
        if not drift:
            raise UnsupportedError(
                f"{facts.path}: no Go template gives the model's prompts: {error}; with "
                "--allow-template-drift the Modelfile has no TEMPLATE and Ollama from 0.30 runs "
                "the model's own"
            ) from None
        return None, None, facts.eog, [f"no TEMPLATE ({error}); releases before 0.30 chat wrongly"]
    proof = prove(chat, template, facts.bos)
    warnings = list(proof.limits)
    if not proof.ok:
        different = next((row for row in proof.rows if row.difference), proof.rows[0])
        why = f"conversation {different.name!r}: {different.difference or different.refused}"
        if not drift:
            raise UnsupportedError(
                f"{facts.path}: the Go template's prompts differ from the model's own: {why}; "
                "accept this with --allow-template-drift"
            )
        warnings.insert(0, f"the prompts differ: {why}")
    if shape.dates.formats:
        warnings.append("TEMPLATE asks for the date: releases before 0.11 refuse it")
    stops = stop_strings(chat, shape, facts.eog, facts.specials or None)
    warnings += (unseen_text(facts, stop) for stop in unseen_stops(facts, stops))
    if not stops:
        warnings.append("no stop string was found; generation ends at the model's end token")
    return template, proof, stops, warnings
