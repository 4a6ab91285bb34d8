"""How many real chat templates become a Go template with the same prompts.

``python -m benchmarks.ollama_templates FOLDER [--go GO]`` reads ``*.jinja`` of a folder (for
instance llama.cpp's models/templates), emits a TEMPLATE for each, compares all conversations byte
for byte, and lists every miss with its reason. With a Go tool, Go's own engine renders the emitted
templates too, and must agree with our evaluator.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from pathlib import Path

from mconv.convert.ollama.go_template import parse_template
from mconv.convert.ollama.go_writer import go_template
from mconv.convert.ollama.induce import NotInducedError, induce
from mconv.convert.ollama.jinja_chat import JinjaChat, TemplateRefusedError, compile_chat
from mconv.convert.ollama.modelfile import parse
from mconv.convert.ollama.modelfile_values import Modelfile, emit, interpret
from mconv.convert.ollama.prompt import merged, ollama_prompt
from mconv.convert.ollama.proof import CONVERSATIONS, prove
from mconv.convert.ollama.stops import stop_strings

_RENDER = Path(__file__).resolve().parent.parent / "tests/fixtures/ollama/render.go"
_DAY = datetime.date(2024, 7, 26)
_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--go", help="a Go tool")
    asked = parser.parse_args()
    exact, plain, templates = 0, 0, []
    for path in sorted(asked.folder.glob("*.jinja")):
        chat = compile_chat(path.read_text(encoding="utf-8"), _TOKENS)
        if not _plain(chat):
            print(f"{path.stem:45} needs more than plain conversations")
            continue
        plain += 1
        try:
            shape = induce(chat)
            template = go_template(shape)
        except (NotInducedError, ValueError) as error:
            print(f"{path.stem:45} MISS {error}")
            continue
        proof = prove(chat, template)
        exact += proof.ok
        stops = stop_strings(chat, shape)
        said = Modelfile(
            models=("m.gguf",), template=template, parameters={"stop": stops} if stops else {}
        )
        assert interpret(parse(emit(said))) == said
        templates.append(template)
        same = sum(row.same for row in proof.rows)
        print(f"{path.stem:45} {same}/{proof.compared} {' '.join(map(repr, stops))}")
        for row in proof.rows:
            if not row.same and not row.refused:
                print(f"    {row.name}: {row.difference}")
    print(f"\nbyte-identical: {exact} of {plain} that take plain conversations")
    if asked.go:
        _ask_go(asked.go, templates)


def _plain(chat: JinjaChat) -> bool:
    try:
        chat.render([("user", "hello")])
    except TemplateRefusedError:
        return False
    return True


def _ask_go(go: str, templates: list[str]) -> None:
    """Let Go render every template on every conversation."""
    requests, ours = [], []
    for template in templates:
        parsed = parse_template(template)
        for _, messages in CONVERSATIONS:
            joined = [{"role": role, "content": text} for role, text in merged(messages)]
            system = "\n\n".join(m["content"] for m in joined if m["role"] == "system")
            requests.append({"Template": template, "Data": {"Messages": joined, "System": system}})
            ours.append(ollama_prompt(parsed, messages, _DAY))
    done = subprocess.run(
        [go, "run", str(_RENDER)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=True,
    )
    same = sum(a.get("out") == b for a, b in zip(json.loads(done.stdout), ours, strict=True))
    print(f"Go's engine agrees with the evaluator on {same} of {len(ours)} prompts")


if __name__ == "__main__":
    main()
