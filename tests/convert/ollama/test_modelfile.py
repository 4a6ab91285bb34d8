"""The Modelfile grammar: one test per behaviour of Ollama's parser, and the round trip."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mconv.convert.ollama.modelfile import Command, parse, quoted
from mconv.convert.ollama.modelfile_check import check_modelfile
from mconv.convert.ollama.modelfile_values import Modelfile, emit, interpret
from mconv.convert.ollama.parameters import DEPRECATED, PARAMETERS
from mconv.errors import ConfigError, FormatError


def values(text: str | bytes) -> list[tuple[str, str]]:
    return [(c.name, c.value) for c in parse(text)]


def first(text: str) -> str:
    """The value of the first command of a text that gets a FROM at its end."""
    return parse(text + "\nFROM x")[0].value


@pytest.mark.parametrize(
    "data",
    [
        "FROM ü".encode(),
        codecs.BOM_UTF8 + "FROM ü".encode(),
        codecs.BOM_UTF16_LE + "FROM ü".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "FROM ü".encode("utf-16-be"),
    ],
)
def test_byte_order_marks(data: bytes) -> None:
    assert values(data) == [("model", "ü")]


def test_bad_utf8_becomes_the_replacement_character() -> None:
    assert values(b"FROM a\xff") == [("model", "a\ufffd")]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("FROM x", "x"),
        ("from x", "x"),
        ("fRoM x", "x"),
        ("  \t FROM x", "x"),
        ("FROM\tx", "x"),
        ("FROM   x  ", "x"),
        ("\n\n# comment\nFROM x", "x"),
        ("  # comment\nFROM x", "x"),
        ("FROM x # y", "x # y"),
        ('FROM "my model.gguf"', "my model.gguf"),
        ("FROM 'x'", "'x'"),
        (r"FROM a\nb", r"a\nb"),
    ],
)
def test_from_lines(text: str, value: str) -> None:
    assert values(text) == [("model", value)]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('""', ""),
        ('"a"', "a"),
        ('"a\nb"', "a\nb"),
        ('"""a"""', "a"),
        ('"""\n a \n\n"""', "\n a \n\n"),
        ('"""a\nb"""', "a\nb"),
        ('"a" and "b"', 'a" and "b'),
        ('"""say "hi""""', 'say "hi"'),
        (r'"a\"b"', r"a\"b"),
        ("a\tb", "a\tb"),
        ('"  a  "', "  a  "),
        ('"""a\r\nb"""', "a\r\nb"),
        ("a\u00a0b", "ab"),
        ('"a\u3000b"', "ab"),
        ('"\U0001f468\u200d\U0001f469"', "\U0001f468\U0001f469"),
        ('"a\u00adb"', "ab"),
        ('"a\ue000b"', "ab"),
        ('"a\u2581b\uff5cc"', "a\u2581b\uff5cc"),
        ('"e\u0301"', "e\u0301"),
    ],
)
def test_values(written: str, value: str) -> None:
    assert first(f"SYSTEM {written}") == value


def test_dropped_characters_are_told() -> None:
    assert parse('SYSTEM "a\u3000b\u200d"\nFROM x')[0].dropped == "\u3000\u200d"


def test_a_line_that_ends_in_triple_quotes_ends_the_value() -> None:
    with pytest.raises(FormatError, match=r":3: .*unknown|:3: .*instructions"):
        parse('SYSTEM """def f():\n    """Doc."""\n    pass"""\nFROM x')


def test_a_bare_value_that_starts_with_a_quote_swallows_the_rest() -> None:
    with pytest.raises(FormatError, match=r":1: unexpected end of file"):
        parse('SYSTEM "a\nFROM x\n')


@pytest.mark.parametrize("text", ["SYSTEM\nFROM x", "SYSTEM", "PARAMETER top_k\nFROM x"])
def test_a_missing_value(text: str) -> None:
    with pytest.raises(FormatError, match="a value is missing"):
        parse(text)


def test_a_blank_value_is_empty() -> None:
    assert first("SYSTEM ") == ""


@pytest.mark.parametrize("text", ['SYSTEM """a', 'FROM x\nSYSTEM "'])
def test_an_open_quote(text: str) -> None:
    with pytest.raises(FormatError, match="unexpected end of file"):
        parse(text)


def test_no_from_line() -> None:
    with pytest.raises(FormatError, match="no FROM line"):
        parse("SYSTEM x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM x\nTEMPLAT y", r":2: .*did you mean 'TEMPLATE'"),
        ("FROM x\n\nENTRYPOINT y", r":3: unknown instruction 'ENTRYPOINT'"),
        ("FROM x\nMESSAGE tool y", r":2: message role 'tool'"),
        ("FROM x\nMESSAGE User y", r":2: message role 'User'.*did you mean 'user'"),
        ("FROM: x", r":1: 'FROM:'"),
    ],
)
def test_errors_have_lines_and_hints(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(text)


def test_messages_keep_their_role() -> None:
    text = 'FROM x\nMESSAGE user hi\nMESSAGE assistant """a\nb"""\nMESSAGE system \'c\''
    assert interpret(parse(text)).messages == (
        ("user", "hi"), ("assistant", "a\nb"), ("system", "'c'"),
    )  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_parameter_is_typed(name: str) -> None:
    kind = PARAMETERS[name]
    text = {int: "3", float: "0.5", bool: "true", tuple: "a"}[kind]
    value = {int: 3, float: 0.5, bool: True, tuple: ("a",)}[kind]
    assert interpret(parse(f"FROM x\nPARAMETER {name} {text}")).parameters == {name: value}


def test_there_are_twenty_parameters() -> None:
    assert len(PARAMETERS) == 20


@pytest.mark.parametrize("name", sorted(DEPRECATED))
def test_deprecated_parameters_are_ignored_with_a_warning(name: str, tmp_path: Path) -> None:
    (tmp_path / "Modelfile").write_text(f"FROM x\nPARAMETER {name} 1\n")
    checked = check_modelfile(tmp_path / "Modelfile")
    assert not checked.modelfile.parameters
    assert "is ignored" in checked.warnings[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("top_k 3.5", r":2: parameter top_k: '3.5' is not a whole number"),
        ("top_k 3 # x", "'3 # x' is not a whole number"),
        ("temperature hot", "is not a number"),
        ("use_mmap yes", "is not true or false"),
        ("temprature 1", "unknown parameter 'temprature'.*did you mean 'temperature'"),
        ("Temperature 1", "unknown parameter 'Temperature'"),
    ],
)
def test_bad_parameters(line: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        interpret(parse(f"FROM x\nPARAMETER {line}"))


def test_what_repeats_and_what_is_replaced() -> None:
    said = interpret(
        parse(
            "FROM a\nFROM b\nTEMPLATE t\nTEMPLATE u\nSYSTEM s\nSYSTEM v\nLICENSE l\nLICENSE m\n"
            "PARAMETER top_k 1\nPARAMETER top_k 2\nPARAMETER stop x\nPARAMETER stop y\n"
            "ADAPTER p\nADAPTER q"
        )
    )
    assert said == Modelfile(
        models=("a", "b"),
        template="u",
        system="v",
        licenses=("l", "m"),
        parameters={"top_k": 2, "stop": ("x", "y")},
        adapter="q",
    )


def test_parameter_shares_its_name_with_instructions() -> None:
    said = interpret(parse("PARAMETER model x\nPARAMETER license y"))
    assert (said.models, said.licenses) == (("x",), ("y",))


def test_parameter_from_is_no_instruction() -> None:
    with pytest.raises(FormatError, match="no FROM line"):
        parse("PARAMETER from x")
    with pytest.raises(FormatError, match="unknown parameter 'from'"):
        interpret(parse("PARAMETER from x\nFROM y"))


@pytest.mark.parametrize("stray", ["\u00a0", "\ufeff", "\x00", "\u200b"])
def test_one_invisible_character_before_an_instruction_is_lost(stray: str) -> None:
    command = parse(f"FROM x\n{stray}SYSTEM y")[1]
    assert (command.name, command.value, command.dropped) == ("system", "y", stray)
    with pytest.raises(FormatError, match=":2:"):
        parse(f"FROM x\n{stray}{stray}SYSTEM y")


def test_newer_instructions() -> None:
    said = interpret(parse("FROM x\nDRAFT d\nRENDERER r\nPARSER p\nREQUIRES v0.14.0"))
    assert (said.draft, said.renderer, said.parser, said.requires) == ("d", "r", "p", "v0.14.0")


def test_commands_remember_where_they_were() -> None:
    commands = parse('# a\nSYSTEM """x\ny"""\n\nFROM z')
    assert commands[0] == Command("system", "x\ny", 2, raw='"""x\ny"""')
    assert commands[1].line == 5


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example('"')
@example('a"""\nb')
@example("#")
@example('"""')
@example('x\n"')
def test_quoting_is_exact_or_refused(text: str) -> None:
    try:
        form = quoted(text)
    except ConfigError:
        return
    assert first(f"SYSTEM {form}") == text


@given(st.text("ab \n\t#'\\{}\u2581é漢", max_size=30))
def test_plain_text_is_always_carried(text: str) -> None:
    assert first(f"SYSTEM {quoted(text)}") == text


TEXT = st.text('ab"\n #\t', max_size=12)
LEGAL = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "top_k": st.integers(0, 1000),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "use_mmap": st.booleans(),
        "stop": st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    },
)


@given(
    st.builds(
        Modelfile,
        models=st.lists(TEXT, min_size=1, max_size=2).map(tuple),
        template=st.none() | TEXT,
        system=st.none() | TEXT,
        licenses=st.lists(TEXT, max_size=2).map(tuple),
        parameters=LEGAL,
        messages=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT)).map(tuple),
        renderer=st.none() | TEXT,
    )
)
def test_emitted_files_read_back_the_same(modelfile: Modelfile) -> None:
    try:
        text = emit(modelfile, ["made by a test"])
    except ConfigError as error:
        assert "cannot carry" in str(error)
        return
    assert interpret(parse(text.encode())) == modelfile


@pytest.mark.parametrize(
    ("text", "why"),
    [("a\u3000b", r"U\+3000 IDEOGRAPHIC SPACE"), ('a"""\nb"', "line 1 of it ends like")],
)
def test_why_a_text_cannot_be_carried(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        quoted(text)


@pytest.mark.parametrize(
    "parameters", [{"temperatur": 1.0}, {"top_k": 1.5}, {"temperature": "hot"}, {"mirostat": 1}]
)
def test_only_legal_parameters_are_emitted(parameters: dict) -> None:
    with pytest.raises(ConfigError):
        emit(Modelfile(models=("x",), parameters=parameters))


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("FROM ./mdel.gguf", r":1: FROM ./mdel.gguf: there is no such file.*'model.gguf'"),
        ("FROM model.gguf # mine", ":1: .*a comment behind a value"),
        ("FROM model.gguf\nTEMPLATE a\nTEMPLATE b", ":3: template replaces that of line 2"),
        ("FROM model.gguf\nPARAMETER top_k 1\nPARAMETER top_k 2", ":3: top_k replaces"),
        ("FROM model.gguf\nSYSTEM 'x'", ":2: single quotes"),
        ("FROM model.gguf\nSYSTEM x\\ny", ":2: there are no escapes"),
        ("FROM model.gguf\nSYSTEM x\u00a0y", r":2: Ollama drops 1 .*U\+00A0 NO-BREAK SPACE"),
        ('FROM model.gguf\nSYSTEM "x\r\ny"', ":2: .*carriage returns"),
        ("FROM model.gguf\nPARAMETER license x", ":2: PARAMETER license acts as LICENSE"),
        ("FROM model.gguf\nADAPTER model.gguf", ":2: releases from 0.34.1"),
        ("FROM model.gguf\nREQUIRES soon", ":2: 'soon' is no version"),
        ("FROM model.gguf\nDRAFT model.gguf", ":2: DRAFT must be another model"),
        ("FROM model.gguf\n\u00a0SYSTEM x", r":2: Ollama drops 1 .*U\+00A0"),
        ("FROM model.gguf\nADAPTER one.safetensors", ":2: ADAPTER takes a GGUF file or a folder"),
        ("FROM one.safetensors", ":1: FROM takes a GGUF file or a folder"),
        ("FROM .", ":1: FROM a folder"),
    ],
)
def test_what_is_hardly_meant(tmp_path: Path, text: str, warning: str) -> None:
    (tmp_path / "model.gguf").touch()
    (tmp_path / "one.safetensors").touch()
    path = tmp_path / "Modelfile"
    path.write_bytes(text.encode())
    with pytest.raises(AssertionError, match=warning):
        raise AssertionError("\n".join(check_modelfile(path).warnings))


def test_a_good_file_has_no_warnings(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    path = tmp_path / "Modelfile"
    path.write_text('FROM ./model.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "</s>"\n')
    assert check_modelfile(path).warnings == ()
