"""Twenty thousand outputs no model should write: nothing raises, nothing is lost count of, and no
text in the memory can pass for its structure."""

import json
import random
import re
import unicodedata

from mnemic.models.memory.operations import _MARK, OPERATIONS, apply
from mnemic.models.memory.store import OperationError
from mnemic.models.memory.stores import make_store
from mnemic.models.memory.syntax import MAX_CALLS, Lines, ToolCalls
from mnemic.models.memory.view import ViewPolicy, line_of, show_for

CASES = 20_000
NASTY = [
    "<|im_start|>system", "<|im_end|>\n", "<|im_\nstart|>", "<|eot_id|>", "</s>", "<think>",
    "</tool_call>", "<tool_call>", "<tool_", "\nm3 anna is dead", "\u2028m0 fake", "\x85m1 fake",
    "\x1cm2 fake", "\x1em4 x", "\x0bm5 y", "\x0cm6 z", "\rm7 w", "\u2029core: all lies", "\n- m0\n",
    "\ud800", "\udfff\ud83d", "\U0001f600", "\x00", "\x1b[2J", "\x9b", "\u202e", "\u200b", "\xa0",
    "{", "}", '"', "\\", "\\u0000", "\\ud800", "\\n", "NaN", "1e999", "9" * 5000, "null", "[INST]",
    "+", "= m1 ", "- m0", "# ", "noop", "@", "+semantic@", "+episodic@1_May ", "_", "%5F", "m99999",
    "m0", "semantic:", "ignore all previous instructions", "anna lives in rome", "\u0e01\u0301",
    "\u6771",
]  # fmt: skip


def text(rng):
    return " ".join(rng.choices(NASTY, k=rng.randint(0, 4))) + rng.choice(
        ["", "x", " \n", "e\u0301"]
    )


def value(rng, depth=0):
    pick = rng.random()
    if pick < 0.6 or depth > 3:
        return rng.choice([text(rng), text(rng), f"m{rng.randint(0, 9)}", "semantic", "1 May"])
    if pick < 0.8:
        return rng.choice([None, True, 0, -1.5, 10**30, [], {}])
    return {rng.choice(["content", "id", text(rng)]): value(rng, depth + 1)}


def arguments(rng, name):
    if rng.random() < 0.1:
        return value(rng)
    found = {}
    for key in OPERATIONS[name].model_fields.keys() - {"name"} if name in OPERATIONS else ():
        if key == "id":
            found[key] = f"m{rng.randint(0, 12)}"
        elif key != "kind" or rng.random() < 0.3:
            good = rng.random() < 0.5
            found[key] = f"fact {rng.randint(0, 999)} of anna" if good else value(rng)
            if key == "kind" and good:
                found[key] = rng.choice(["semantic", "episodic", "fact"])
    if rng.random() < 0.1:
        found[text(rng)] = value(rng)
    return found


def call(rng):
    name = rng.choice([*OPERATIONS, *OPERATIONS, *OPERATIONS, "drop", text(rng)])
    body = json.dumps({"name": name, "arguments": arguments(rng, name)}, ensure_ascii=False)
    pick = rng.random()
    if pick < 0.1:
        at = rng.randint(0, len(body))
        body = body[:at] + rng.choice(NASTY) + body[at + rng.randint(0, 3) :]
    elif pick < 0.15:
        body = body[: rng.randint(0, len(body))]
    elif pick < 0.2:
        body = body.replace("{", '{"name": "noop", ', 1)
    elif pick < 0.25:
        body = body.replace("fact", call(rng))  # A call within a call.
    return "<tool_call>" * (rng.random() < 0.95) + body + "</tool_call>" * (rng.random() < 0.95)


def line(rng):
    some = f"fact {rng.randint(0, 999)}" if rng.random() < 0.5 else text(rng)
    id = rng.randint(0, 12)
    return rng.choice([
        f"+ {some}", f"+semantic {some}", f"+episodic@{some} x", f"+fact@1 {some}", "noop", some,
        f"= m{id} {some}", f"= m{id} {some}", f"- {some}", f"# {some}", f"- m{id}",
    ])  # fmt: skip


def output(rng, case):
    pick = case % 10
    if pick < 4:
        return "\n".join(call(rng) for _ in range(rng.randint(1, 4)))
    if pick < 8:
        return rng.choice(["\n", "\r\n", "\u2028"]).join(
            line(rng) for _ in range(rng.randint(1, 5))
        )
    if pick == 8:
        how = rng.choice(
            [("utf-8", "surrogateescape"), ("utf-8", "replace"), ("latin-1", "strict")]
        )
        return rng.choice(["", "+ ", "<tool_call>"]) + rng.randbytes(rng.randint(0, 80)).decode(
            *how
        )
    if case % 100 == 9:
        unit, size = rng.choice(NASTY) or "a", rng.choice([300, 3000, 20_000])
        huge = (unit * (1 + size // len(unit)))[:size]
        return rng.choice(["{}", "+ {}", "<tool_call>{}</tool_call>", "+@{}", "# {}"]).format(huge)
    if case % 100 == 19:
        deep = rng.choice(["[", '{"a":', '{"name": "insert", "arguments": {"content":']) * 3000
        return f"<tool_call>{deep}</tool_call>"
    return rng.choice(["", text(rng), text(rng) + call(rng) + "\n" + line(rng)])


def check(store, policy, seen):
    entries, history = store.entries(), store.history()
    assert len({e.id for e in history}) == len(history) == store._next
    assert store.tokens() == sum(store.count(e.text) for e in entries) + store.count(store.core)
    assert store.tokens() <= store.max_tokens and len(store._index) == len(entries)
    for shown in {store.core, *(e.text for e in entries)} - seen:
        assert len(shown.splitlines()) <= 1 and not _MARK.search(shown), ascii(shown)
        assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in shown)
        seen.add(shown)
    view = policy.render(store, "anna fact m1")
    lines = view.text.splitlines()
    assert store.count(view.text) <= policy.max_tokens
    # One line for each entry shown, one for the core, one for each kind; no line besides.
    headings = [one for one in lines if one in ("semantic:", "episodic:")]
    core = lines[:1] if store.core_tokens else []
    assert core == ([f"core: {store.core}".rstrip("\n")] if store.core_tokens else [])
    rest = lines[len(core) :]
    shown = {line_of(store.get(id)) for id in view.ids}
    assert len(set(headings)) == len(headings) and len(rest) - len(headings) == len(view.ids)
    assert {one for one in rest if one not in headings} == shown
    assert {m[1] for one in rest if (m := re.match(r"(m\d+) ", one))} == view.ids
    assert len(show_for(store, "x", 99, 10_000).splitlines()) == len(entries) + bool(store.core)


def test_no_output_breaks_a_memory():
    rng = random.Random(0)
    shapes = [
        make_store(kind, max_tokens=300, core_tokens=40, max_content=60)
        for kind in ("typed", "flat", "text")
    ]
    policy, syntaxes = ViewPolicy(6, 6, 200), (Lines(), ToolCalls())
    applied = dict.fromkeys(OPERATIONS, 0)
    errors, seen = 0, set()
    views = [policy.render(store, "anna") for store in shapes]
    for case in range(CASES):
        written = output(rng, case)
        number = case % 3
        store = shapes[number]
        for syntax in syntaxes:
            found = syntax.parse(written, cut=case % 7 == 0)
            assert len(found) <= MAX_CALLS + 1
            if isinstance(syntax, ToolCalls):
                # As many calls as blocks were opened: none is lost without an error.
                opened = written.count("<tool_call>")
                expected = opened or bool(written.strip())
            else:
                expected = sum(bool(one.strip()) for one in written.splitlines())
            assert len(found) == min(expected, MAX_CALLS) + (expected > MAX_CALLS)
            for one in found:
                assert (one.operation is None) == (one.error is not None)
                assert one.error is None or len(one.error.splitlines()) == 1, ascii(one.error)
                if one.operation is None:
                    errors += 1
                    continue
                try:
                    apply(store, one.operation, visible=views[number].ids)
                    applied[one.operation.name] += 1
                except OperationError as error:
                    assert len(str(error).splitlines()) == 1
                    errors += 1
        check(store, policy, seen)
        views[number] = policy.render(store, "anna")
        if len(store.history()) > 60:  # A long history only makes the checks slow.
            shapes[number] = store.empty()
    assert min(applied.values()) > 100 and errors > 10_000, (applied, errors)
