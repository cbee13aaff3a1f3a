"""A choice within a budget of memory, as text and as plain values."""

from typing import Any

from mnemic.train.callbacks.console import duration, size
from mnemic.train.plan.choose import Choice, Option

_REJECTED = 4


def as_values(choice: Choice) -> dict[str, Any]:
    """For `--json`: bytes, and seconds of a step."""

    def values(option: Option) -> dict[str, Any]:
        return {
            "overrides": option.candidate.overrides, "arguments": option.overrides,
            "need_bytes": option.need, "at_least": option.least, "seconds": option.seconds,
            "exactness": option.grade.word, "rounds": option.grade.rounds,
            "methods": option.grade.methods, "reason": option.reason,
        }  # fmt: skip

    return {
        "name": choice.name, "budget_bytes": choice.budget, "place": choice.place,
        "recipe": values(choice.given), "chosen": values(choice.chosen),
        "alternatives": [values(o) for o in choice.options],
        "rejected": [values(o) for o in choice.rejected], "refused": choice.refused,
        "notes": choice.notes, "counted": choice.counted, "seconds": choice.seconds,
    }  # fmt: skip


def show(choice: Choice) -> None:
    print(f"{choice.name}: to fit into {size(choice.budget)} of {choice.place}\n")
    print(f"{'':<12}{'peak':>12}{'step':>8}  {'result':<15}overrides")
    given = choice.given
    _row("chosen", choice.chosen, given)
    for option in choice.options:
        _row("or", option, given)
    if given is not choice.chosen:
        _row("as it is", given, given)
    for option in choice.rejected[:_REJECTED]:
        _row("not", option, given)
    print("\npeak: predicted, of the whole process; > at the least. step: as a multiple of the")
    print("recipe's as it is, an estimate. The quickest of those that change least is chosen.")
    for what in (*choice.chosen.grade.rounds, *choice.chosen.grade.methods):
        print(f"- the result is another: {what}")
    for text in [*choice.refused[:2], *choice.notes]:
        print(f"- {text}")
    print(f"- {choice.counted} counted in {_time(choice.seconds)}")


def _row(title: str, option: Option, given: Option) -> None:
    share = option.seconds / given.seconds if given.seconds else 1.0
    need = (">" if option.least else "~") + size(option.need) if option.need else "-"
    text = option.overrides or "(none)"
    if option.reason and option.reason != "over the budget":
        text += f": {option.reason}"
    print(f"{title:<12}{need:>12}{share:>7.2f}x  {option.grade.word:<15}{text}")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else duration(seconds)
