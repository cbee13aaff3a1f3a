"""Combinations of recipe sections (scripts/matrix.py): each runs, with the figures it must have, or
is refused with a reason before a model is built; and docs/matrix.md says which.
"""

import json
import re
from itertools import combinations
from pathlib import Path

import matrix_try
import pytest
from matrix_cells import AXES, Cell, all_cells, pairwise, write_rows
from matrix_check import compare, reference
from matrix_page import RAN, code_of, render, summarize
from matrix_try import Result, attempt, judge, try_cells

DOCS = Path(__file__).parent.parent.parent / "docs"
REPORT = json.loads((DOCS / "matrix.json").read_text())
AGAIN = "python scripts/matrix.py --write"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Reasons against each cell that is refused; None for those that may train."""
    made = write_rows(tmp_path_factory.mktemp("rows"))
    # What a judge looks for in the policy's folder, without training one.
    made.policy.mkdir(parents=True)
    (made.policy / "config.json").write_text("{}")
    found = {cell: judge(cell, made, made.folder / "run") for cell in all_cells()}
    return {cell: v.reasons if isinstance(v, Result) else None for cell, v in found.items()}


@pytest.fixture(scope="module")
def walk(verdicts, tmp_path_factory):
    """Results of the pairwise walk, and of what its cells are compared with."""
    chosen = pairwise(lambda cell: verdicts[cell] is None)
    more = {reference(cell) for cell in chosen if verdicts[cell] is None} - set(chosen)
    return try_cells([*chosen, *sorted(more)], tmp_path_factory.mktemp("cells"))


def pairs(cells):
    return {pair for cell in cells for pair in combinations(zip(AXES, cell, strict=True), 2)}


def test_every_pair_of_values_meets_and_trains_where_any_cell_with_it_may(verdicts):
    may = {cell for cell, reasons in verdicts.items() if reasons is None}
    chosen = pairwise(lambda cell: cell in may)
    assert pairs(chosen) == pairs(all_cells())
    assert pairs(may & set(chosen)) == pairs(may)
    assert len(chosen) < 40


def test_a_refusal_names_a_key_and_a_way_out(verdicts):
    for cell, reasons in verdicts.items():
        for reason in reasons or []:
            assert re.search(r"\w+\.kind=.*(; | or )(set|launch) ", reason), (cell, reason)


def test_the_page_is_right_about_every_cell_that_is_refused(verdicts):
    """All 1,728: judging one takes a millisecond."""
    for cell, reasons in verdicts.items():
        code = code_of(REPORT, cell)
        said = None if code == RAN else REPORT["reasons"][code]["reason"]
        assert said == (reasons[0] if reasons else None), f"{cell}: run {AGAIN}"


def test_the_page_is_made_from_its_table():
    assert (DOCS / "matrix.md").read_text() == render(REPORT), f"run {AGAIN}"
    codes = "".join(REPORT["cells"].values())
    assert len(codes) == len(all_cells()) == sum(REPORT["totals"].values())
    assert codes.count(RAN) == REPORT["totals"]["ran"] and "failed" not in REPORT["totals"]


@pytest.mark.timeout(300)
def test_cells_of_every_pair_run_or_are_refused(walk):
    failed = [f"{r.cell}: {r.reasons}" for r in walk if r.status == "failed"]
    assert not failed, "\n".join(failed)
    for result in walk:
        code = code_of(REPORT, result.cell)
        assert (result.status == "ran") == (code == RAN), f"{result.cell}: run {AGAIN}"
        for text in result.warnings if result.status == "ran" else []:
            assert text in REPORT["warnings"], f"{result.cell}: run {AGAIN}"
    assert {r.cell.ranks for r in walk if r.status == "ran"} == {1, 2}


def test_exact_techniques_change_nothing_and_others_something(walk):
    found = compare(walk)
    assert not found.complaints, "\n".join(found.complaints)
    assert found.equal >= 12 and found.different >= 4


def test_a_setting_without_effect_is_found(walk):
    """Figures that must be equal, changed; figures that must differ, made equal."""
    ran = {result.cell: result for result in walk if result.status == "ran"}
    cell = next(c for c in ran if reference(c) != c and reference(c) in ran)
    base = ran[reference(cell)]
    off = Result(cell, "ran", losses=[x * 1.01 for x in base.losses], norms=base.norms)
    (complaint,) = compare([off, base]).complaints
    assert complaint.startswith(f"{cell}: losses of step 1 are ")
    other = base.cell._replace(tokens="on" if base.cell.tokens == "off" else "off")
    same = Result(other, "ran", losses=base.losses, norms=base.norms)
    (complaint,) = compare([base, same]).complaints
    assert "tokens changes nothing" in complaint


FIRST = Cell("lm", "adamw", "plain", "none", "off", "none", 1)


def test_a_run_that_changes_nothing_and_a_crash_are_failures(tmp_path, monkeypatch):
    made = write_rows(tmp_path)
    tree = matrix_try.tree_of(FIRST, made, tmp_path / "run")
    tree["optimizer"]["lr"] = 1e-30
    monkeypatch.setattr(matrix_try, "tree_of", lambda *_: tree)
    result = attempt(FIRST, made, tmp_path / "run")
    assert result.status == "failed" and "weights that did not change: model.layers.0" in str(
        result.reasons
    )
    monkeypatch.setattr(matrix_try, "_train", lambda recipe: {}["gone"])
    result = attempt(FIRST, made, tmp_path / "run")
    assert (result.status, result.reasons) == ("failed", ["KeyError: 'gone'"])


def test_ranks_that_part_are_a_failure_and_the_others_go_on(tmp_path, monkeypatch):
    """The middle one of three cells has no teacher: the worker ends, and is started again."""
    cells = [FIRST._replace(ranks=2, objective=name) for name in ("lm", "distill", "sft")]

    def without_teacher(folder, train):
        return write_rows(folder)

    monkeypatch.setattr(matrix_try, "make_materials", without_teacher)
    first, middle, last = try_cells(cells, tmp_path)
    assert first.status == last.status == "ran"
    assert middle.status == "failed" and "teacher" in str(middle.reasons)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_complete_walk(tmp_path):
    results = try_cells(all_cells(), tmp_path)
    comparison = compare(results)
    failed = [f"{r.cell}: {r.reasons}" for r in results if r.status == "failed"]
    assert not failed + comparison.complaints, "\n".join(failed + comparison.complaints)
    report = summarize(results, comparison)
    # The largest difference is this machine's.
    assert {**report, "largest": 0} == {**REPORT, "largest": 0}, f"run {AGAIN}"
