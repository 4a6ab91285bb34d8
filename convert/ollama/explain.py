"""Predict what each generation of Ollama does with a model: who makes the prompt, and which.

Generations: A before 0.30 knows only Go templates; B from 0.30 runs upstream llama.cpp and prefers
the GGUF's Jinja template when it can more than TEMPLATE; C from 0.34.1 no longer converts,
quantizes or applies adapters. Rules as observed of those releases.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from ...errors import MconvError
from .build import PLAIN
from .facts import ModelFacts
from .go_template import parse_template
from .jinja_chat import JinjaChat, TemplateRefusedError, compile_chat
from .prompt import ollama_prompt
from .proof import jinja_prompt

GENERATIONS = (("A", "before 0.30"), ("B", "0.30 to 0.34.0"), ("C", "from 0.34.1"))
_OWN_RENDERER = ("gemma4", "laguna", "nemotron_h")
_CONVERSATION = (("system", "Be brief."), ("user", "Hi"))


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one generation does.

    Attributes:
        generation: A, B or C.
        versions: in words.
        renderer: who makes the prompt.
        why: the rule.
        capabilities: what ``ollama show`` will list.
        prompt: of a short conversation; None where it cannot be foretold.
    """

    generation: str
    versions: str
    renderer: str
    why: str
    capabilities: tuple[str, ...]
    prompt: str | None


def explain(facts: ModelFacts, template: str | None) -> tuple[Prediction, ...]:
    """Return a prediction per generation.

    Args:
        facts: of the model.
        template: its TEMPLATE, or None.
    """
    jinja = facts.chat_template
    chat = None
    if jinja is not None:
        try:
            chat = compile_chat(jinja, facts.tokens)
        except TemplateRefusedError:
            chat = None
    out = []
    for generation, versions in GENERATIONS:
        renderer, why = _renderer(generation, facts.architecture, jinja, template)
        out.append(
            Prediction(
                generation,
                versions,
                renderer,
                why,
                _capabilities(facts, renderer, jinja, template),
                _prompt(renderer, chat, template, facts.bos),
            )
        )
    return tuple(out)


def _can(jinja: str | None) -> set[str]:
    """What a Jinja template is taken to support: Ollama looks for words in it."""
    text = jinja or ""
    found = {"tools"} if "tools" in text or "tool_call" in text else set()
    return found | ({"thinking"} if "<think>" in text and "</think>" in text else set())


def _go_can(template: str | None) -> set[str]:
    text = template or ""
    found = {"tools"} if ".Tools" in text else set()
    return found | ({"thinking"} if ".Thinking" in text else set())


def _renderer(
    generation: str, architecture: str, jinja: str | None, template: str | None
) -> tuple[str, str]:
    if generation == "A":
        if template is not None:
            return "TEMPLATE", "the only way to chat; an explicit one stops auto-detection"
        if jinja is not None:
            return "guess", "no TEMPLATE: a library template if the chat template resembles one"
        return "plain", "no TEMPLATE and no chat template"
    if architecture.startswith(_OWN_RENDERER):
        return "built in", f"architecture {architecture} has a renderer of Ollama's own"
    if template is not None and jinja is not None and _can(jinja) - _go_can(template):
        more = ", ".join(sorted(_can(jinja) - _go_can(template)))
        return "Jinja", f"the GGUF's chat template mentions {more}, TEMPLATE does not"
    if template is not None:
        return "TEMPLATE", "the GGUF's own chat template offers no more than it does"
    if jinja is not None:
        return "Jinja", "there is no TEMPLATE: llama.cpp runs the GGUF's chat template"
    return "plain", "no TEMPLATE and no chat template"


def _capabilities(
    facts: ModelFacts, renderer: str, jinja: str | None, template: str | None
) -> tuple[str, ...]:
    if f"{facts.architecture}.pooling_type" in facts.metadata:
        return ("embedding",)
    found = {"completion"} | (_can(jinja) if renderer == "Jinja" else _go_can(template))
    if template is not None and ".Suffix" in template:
        found.add("insert")
    if f"{facts.architecture}.vision.block_count" in facts.metadata:
        found.add("vision")
    return tuple(sorted(found))


def _prompt(renderer: str, chat: JinjaChat | None, template: str | None, bos: str) -> str | None:
    try:
        if renderer == "plain" or (renderer == "TEMPLATE" and template == PLAIN):
            return _CONVERSATION[-1][1]
        if renderer == "TEMPLATE" and template is not None:
            return ollama_prompt(parse_template(template), _CONVERSATION)
        if renderer == "Jinja" and chat is not None:
            now = datetime.datetime.now()
            try:
                return jinja_prompt(chat, _CONVERSATION, now, bos)
            except TemplateRefusedError:
                return jinja_prompt(chat, _CONVERSATION[1:], now, bos)
    except MconvError:
        pass
    return None
