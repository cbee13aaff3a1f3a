"""Cleaning: a real endpoint answers well to some prompts and badly in every way to others."""

import json
import time

from distill_support import (
    clean_keys,
    collect_gold,
    distill,
    good_and_bad,
    http_arguments,
    lines_of,
    prompt_of,
    rules_of,
)

from mnemic.models.memory.op_prompts import EXTRACT, GENERATE, OPERATIONS, UPDATE


def sleeps():
    time.sleep(0.8)
    return "too late"


EXTRACTIONS = [
    ("I'm sorry, but I can't help with that request.", "refused"),
    ("As an AI language model, I do not keep facts.", "refused"),
    ('["I cannot help with that."]', "refused"),
    (('["half a li', "length"), "cut"),
    ("   ", "empty"),
    ("Sure! GARBAGE was said here.", "unparsable"),
    ("[17, 18]", "unparsable"),
    ('["GARBAGE one", "GARBAGE', "unparsable"),
    ("I thought of GARBAGE [] and more", "unparsable"),
    (json.dumps(["GARBAGE loops"] * 6), "repeats"),
    ('["GARBAGE from Neptune"]', "unsupported"),
    (500, "failed"),
    (sleeps, "failed"),
]
UPDATES = [
    ("= m77 GARBAGE", "ids"),
    ("# GARBAGE", "event"),
    ("+episodic@2024 GARBAGE", "event"),
    ("GARBAGE to you", "unparsable"),
    ("I can't assist with that.", "refused"),
    (lambda row: f"+ {row['context']['shown'][0]}", "existing"),
    (lambda row: f"= m0 {row['context']['shown'][0]}", "unchanged"),
    ("+ GARBAGE of Neptune", "unsupported"),
    (("+ cu", "length"), "cut"),
]
ANSWERS = [
    ("GARBAGE", "wrong"),
    ("none", "denied"),
    ("GARBAGE " + " ".join(map(str, range(20))), "long"),
    ("GARBAGE so it is " * 5, "repeats"),
    ("I'm sorry, I can't answer that.", "refused"),
]


def spoiled(gold):
    """(prompt -> bad reply, key -> rule): one for each line above, on prompts of their own."""
    bad, rules = {}, {}
    texts = [prompt_of(row) for row in gold]
    for op, cases in ((EXTRACT, EXTRACTIONS), (UPDATE, UPDATES), (GENERATE, ANSWERS)):
        rows = [r for r in gold if r["operation"] == op and texts.count(prompt_of(r)) == 1]
        if op == EXTRACT:
            rows = [r for r in rows if r["key"].endswith("/0005")]
        if op == UPDATE:
            rows = [r for r in rows if r["key"].endswith("/0004") and r["context"]["shown"]]
        if op == GENERATE:
            rows = [r for r in rows if r["reply"] != "none"]
        # From different ends: a memory spoiled by one is not asked about by another.
        rows = rows if op != GENERATE else rows[::-1]
        assert len(rows) >= len(cases), op
        for row, (reply, rule) in zip(rows, cases, strict=False):
            made = reply(row) if callable(reply) and reply is not sleeps else reply
            bad[prompt_of(row)], rules[row["key"]] = made, rule
    return bad, rules


def test_garbage_of_every_kind_is_counted_under_its_rule_and_in_no_row(tmp_path, server, capsys):
    collect_gold(tmp_path / "gold", 16)
    gold = lines_of(tmp_path / "gold" / "raw.jsonl")
    bad, rules = spoiled(gold)
    teacher = server(good_and_bad(gold, bad))
    out = tmp_path / "out"
    arguments = [*http_arguments(teacher.url, 16), "--timeout", 0.4]
    assert distill("collect", out, *arguments) == 0
    shown = capsys.readouterr().out
    assert "requests" in shown and "--retry-failed" in shown
    assert distill("clean", out) == 0
    found = rules_of(out)
    assert {key: found.get(key) for key in rules} == rules
    assert not clean_keys(out) & set(rules)
    for path in (out / "clean").glob("mem_*.jsonl"):
        kept = [row["completion"][0]["content"] for row in lines_of(path)]
        assert len(kept) > 20 and not any("GARBAGE" in text for text in kept)
    report = json.loads((out / "clean" / "report.json").read_text())["operations"]
    for op in OPERATIONS:
        part = report[op]
        assert part["raw"] == part["kept"] + sum(part["dropped"].values())
    assert report[EXTRACT]["dropped"]["failed"] == 2
    assert report[EXTRACT]["dropped"]["refused"] == 3

    # All of it is on disk, failures too: nobody is asked again, and nothing is written.
    before, asked = (out / "raw.jsonl").read_bytes(), len(teacher.asked)
    assert distill("collect", out, *arguments) == 0
    assert len(teacher.asked) == asked and (out / "raw.jsonl").read_bytes() == before

    # Failures are asked again where that is wanted, and the later line holds.
    known = good_and_bad(gold, {})
    teacher.reply = known
    assert distill("collect", out, *arguments, "--retry-failed") == 0
    assert len(teacher.asked) > asked
    assert (out / "raw.jsonl").read_bytes().startswith(before)
    assert distill("clean", out) == 0
    mended = {key for key, rule in rules.items() if rule == "failed"}
    assert len(mended) == 2 and mended <= clean_keys(out)
    assert len(clean_keys(out)) == sum(
        len(lines_of(p)) for p in (out / "clean").glob("mem_*.jsonl")
    )


def test_items_are_mended_in_rows_that_stay(tmp_path, server):
    collect_gold(tmp_path / "gold", 3, "--operations", "mem_update")
    gold = lines_of(tmp_path / "gold" / "raw.jsonl")
    row = next(r for r in gold if r["operation"] == EXTRACT and r["reply"] != "[]")
    facts = json.loads(row["reply"])
    reply = f"<think>hm</think>```json\n{json.dumps({'facts': [*facts, 'Neptune', *facts]})}\n```"
    last = next(r for r in gold[::-1] if r["operation"] == UPDATE)
    lines = f"Here:\n{last['reply']}\n= m55 x\nnoop"
    teacher = server(good_and_bad(gold, {prompt_of(row): reply, prompt_of(last): lines}))
    out = tmp_path / "out"
    assert distill("collect", out, *http_arguments(teacher.url, 3), "--operations", UPDATE) == 0
    assert distill("clean", out) == 0
    rows = {
        r["key"]: r for op in (EXTRACT, UPDATE) for r in lines_of(out / "clean" / f"{op}.jsonl")
    }
    assert rows[row["key"]]["completion"][0]["content"] == row["reply"]
    assert rows[last["key"]]["completion"][0]["content"] == last["reply"]
    report = json.loads((out / "clean" / "report.json").read_text())["operations"]
    assert report[EXTRACT]["repaired"] == {"unsupported": 1}
    assert report[UPDATE]["repaired"] == {"unparsable": 1, "ids": 1}
    assert report[GENERATE]["raw"] == 0


def test_times_copied_into_an_update_stay_out_of_its_target():
    from mnemic.train.distill.targets import update_target

    record = {
        "reply": "= m0 [May] Ann lives in Oslo\n= m1 [May] Bob has a cat\n+ [2nd] Bob sings",
        "context": {"facts": ["Bob sings", "Ann lives in Oslo"],
                    "shown": ["[May] Ann lives in Rome", "[May] Bob has a cat"]},
    }  # fmt: skip
    verdict = update_target(record)
    assert verdict.target == "= m0 Ann lives in Oslo\n+ [2nd] Bob sings"
    assert verdict.repaired == {"beside": 2, "unchanged": 1}


def test_a_teacher_that_says_one_thing_to_all_teaches_nothing(tmp_path, server):
    silent = {"List": "[]", "Bring": "noop", "Answer": "none"}
    for number, says in enumerate(
        (lambda prompt: '["Anna lives in Rome"]', lambda prompt: silent[prompt.split()[0]])
    ):
        out = tmp_path / str(number)
        teacher = server(says)
        assert distill("collect", out, *http_arguments(teacher.url, 4)) == 0
        assert distill("clean", out, "--no-dedupe") == 0
        found = rules_of(out)
        rules = {rule for key, rule in found.items() if EXTRACT in key}
        assert rules == {"repeats"}
        assert (out / "clean" / f"{EXTRACT}.jsonl").read_text() == ""
