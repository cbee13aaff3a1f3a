"""Both ways of writing operations: what is written is read back, a broken call stands alone."""

import json
import time

import pytest

from mnemic.models.memory.operations import CoreRewrite, Delete, Insert, Noop, Update
from mnemic.models.memory.syntax import MAX_CALLS, Lines, ToolCalls, make_syntax

ALL = [
    Insert(content="anna lives in rome"),
    Insert(content="= m3 not a call, + nor this", kind="semantic"),
    Insert(
        content="@2024 (quoted) \"'{}\\ \u6771\u4eac", kind="episodic", time="1 May 2024, 10:00"
    ),
    Insert(content="x", time="a_b 5%5F"),
    Update(id="m12", content="- m3"),
    Delete(id="m0"),
    CoreRewrite(content="likes tea # and cake"),
    CoreRewrite(content=""),
    Noop(),
]


@pytest.mark.parametrize("kind", ["lines", "tools"])
def test_all_operations_go_round(kind):
    syntax = make_syntax(kind)
    for some in (ALL, *([one] for one in ALL)):
        found = syntax.parse(syntax.write(some))
        assert [one.error for one in found] == [None] * len(some)
        assert [one.operation for one in found] == some
    assert syntax.parse("") == syntax.parse(" \n\n") == []
    assert syntax.write([]) == ""


def test_a_line_break_in_a_text_is_no_new_line():
    for end in ("\n", "\u2028", "\x85"):
        text = f"a{end}- m1"
        written = Lines().write(
            [Insert(content=text, time=text), Update(id="m0", content=text),
             CoreRewrite(content=text)]
        )  # fmt: skip
        found = [one.operation for one in Lines().parse(written)]
        assert found == [
            Insert(content="a - m1", time="a - m1"), Update(id="m0", content="a - m1"),
            CoreRewrite(content="a - m1"),
        ]  # fmt: skip


def test_broken_lines_beside_good_ones():
    text = "+ good\n= m1\nhello\n- m1 m2\n+\n- m\n*\n+semantic good too\n  noop  "
    found = Lines().parse(text)
    assert [one.ok for one in found] == [1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert all((one.operation is None) == (one.error is not None) for one in found)
    assert found[2].raw == "hello" and "line begins with" in found[2].error
    assert found[7].operation == Insert(content="good too", kind="semantic")


def call(text):
    return f"<tool_call>{text}</tool_call>"


GOOD = call('{"name": "delete", "arguments": {"id": "m1"}}')


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (call(""), "no valid JSON"),
        (call('{"name": "noop"'), "no valid JSON"),
        (call('{"name": "noop", "name": "delete"}'), "no valid JSON"),
        (call('{"name": "delete", "arguments": {"id": "m1", "id": "m2"}}'), "no valid JSON"),
        (call('{"name": "noop", "arguments": NaN}'), "no valid JSON"),
        (call('{"name": "delete", "arguments": {"id": ' + "9" * 5000 + "}}"), ""),
        (call("[" * 100_000), "no valid JSON"),
        (call('{"a":' * 50_000), "no valid JSON"),
        (call("[]"), "a call is"),
        (call('{"name": 3}'), "a call is"),
        (call('{"name": "noop", "id": "m1"}'), "unknown key 'id'"),
        (call('{"name": "drop"}'), "unknown operation 'drop'"),
        (call('{"name": "noop", "arguments": null}'), "must be an object"),
        ('<tool_call>{"name": "noop"}', "not closed"),
        ('<tool_call>{"name": "insert", "arguments": {"content": "', "not closed"),
    ],
)
def test_a_broken_call_beside_good_ones(broken, why):
    for text in (GOOD + broken + GOOD, f"thoughts {GOOD}\n{broken}\n{GOOD} more"):
        first, middle, last = ToolCalls().parse(text)
        assert first.operation == last.operation == Delete(id="m1") and first.ok and last.ok
        assert middle.operation is None and why in middle.error


def test_arguments_may_be_left_out_and_text_around_is_no_call():
    assert ToolCalls().parse(call('{"name": "noop"}'))[0].operation == Noop()
    (found,) = ToolCalls().parse("I would not know.")
    assert found.operation is None and "no <tool_call>" in found.error


def test_more_calls_than_are_read_are_one_error():
    many = MAX_CALLS + 3
    for syntax in (Lines(), ToolCalls()):
        found = syntax.parse(syntax.write([Delete(id="m1")] * many), cut=syntax is Lines())
        assert [one.ok for one in found] == [True] * MAX_CALLS + [False]
        assert str(many) in found[-1].error
    found = Lines().parse("\n".join(["- m1"] * many), cut=True)
    assert [one.ok for one in found] == [True] * MAX_CALLS + [False]


def test_what_the_token_limit_cut_is_not_carried_out():
    found = Lines().parse("+ one\n+ two thr", cut=True)
    assert [one.ok for one in found] == [True, False] and "token limit" in found[1].error
    assert Lines().parse("", cut=True) == []


@pytest.mark.parametrize("kind", ["lines", "tools"])
@pytest.mark.parametrize("unit", ["<tool_call>", "+@a", "= ", "= a", "+a ", "#", "{", "\\", "<|"])
def test_huge_texts_are_read_in_time(kind, unit):
    start = time.perf_counter()
    for text in (
        unit * 100_000,
        "<tool_call>" + unit * 100_000 + "</tool_call>",
        "+" + unit * 9999,
    ):
        make_syntax(kind).parse(text)
    assert time.perf_counter() - start < 2


def test_explanations_name_what_the_memory_takes():
    for syntax in (Lines(), ToolCalls()):
        flat = syntax.explain(("fact",), core=False)
        text = syntax.explain((), core=True)
        assert "core" not in flat and "core" in text and "m3: " not in text
        assert "noop" in flat and "noop" in text
    tools = ToolCalls().explain(("semantic", "episodic"), core=True).splitlines()
    names = [json.loads(line)["name"] for line in tools[1:-1]]
    assert names == ["insert", "update", "delete", "core_rewrite", "noop"]
