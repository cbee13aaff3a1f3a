"""`mnemic memory show`: one episode of a run's last evaluation, chunk by chunk.

What it shows was written by a data set and a model: on the terminal no control character of theirs
gets through, and the page (memory_page.py) escapes all of it.
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mnemic.train.errors import RecipeError, UserError

Episode = dict[str, Any]
_KEYS = ("step", "id", "turns", "questions", "memory", "rewards")
SIGNS = {"insert": "+", "update": "~", "delete": "-", "core": "~"}
_STYLES = {"+": "green", "~": "yellow", "-": "red"}


def memory_show(args: Namespace) -> int:
    """The command."""
    if args.list and (args.html or args.episode is not None):
        raise RecipeError("--list: lists all episodes; leave --episode and --html out")
    file = _file_of(args.run)
    episodes = of_step(read_episodes(file), args.step, file)
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if args.list:
        for number, episode in enumerate(episodes):
            console.print(_listed(number, episode))
        return 0
    number = args.episode or 0
    if not 0 <= number < len(episodes):
        raise UserError(f"--episode {number}: there are 0 to {len(episodes) - 1} (--list)")
    if args.html:
        from mnemic.train.memory_page import page

        try:
            text = page(episodes[number], number)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise _foreign(file, number) from None
        Path(args.html).write_text(text, "utf-8", errors="replace")
        print(f"{args.html}: written")
        return 0
    try:
        lines = list(shown(episodes[number], number))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise _foreign(file, number) from None
    from rich.text import Text

    for line, style in lines:
        console.print(Text(line, style=style))
    return 0


def _file_of(run: str) -> Path:
    folder = Path(run)
    file = folder / "episodes.jsonl"
    if not file.is_file():
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"{run}: not a run folder (no recipe.yaml); give the run_dir of a run")
        raise UserError(
            f"{run}: has no episodes.jsonl, so no evaluation has played episodes there yet; set "
            "evaluation.play (objective.kind=grpo plays always)"
        )
    return file


def _foreign(file: Path, number: int) -> UserError:
    return UserError(f"{file}: episode {number} is not as this version of mnemic writes it")


def read_episodes(file: Path) -> list[Episode]:
    """All lines; `UserError` naming the line that is no episode."""
    found = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                episode = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{file}, line {number}: is not JSON") from None
            if not isinstance(episode, dict) or any(key not in episode for key in _KEYS):
                raise UserError(f"{file}, line {number}: is not an episode")
            found.append(episode)
    if not found:
        raise UserError(f"{file}: holds no episodes")
    return found


def of_step(episodes: list[Episode], step: str, file: Path) -> list[Episode]:
    """Those of one evaluation: "last", or the number of its step."""
    steps = list(dict.fromkeys(episode["step"] for episode in episodes))
    wanted = steps[-1] if step == "last" else next((s for s in steps if str(s) == step), None)
    if wanted is None:
        there = ", ".join(map(str, steps))
        raise UserError(f"--step {step}: {file} holds step {there}; give that, or last")
    return [episode for episode in episodes if episode["step"] == wanted]


def plain(text: Any) -> str:
    """`text` with control and direction characters written out; line breaks stay."""
    return "".join(map(_plain, str(text).replace("\r\n", "\n").expandtabs(4)))


def _plain(c: str) -> str:
    if c == "\n" or c.isprintable():
        return c
    return " " if c.isspace() else c.encode("unicode_escape").decode()


def call_text(call: dict[str, Any]) -> str:
    """A call in words: `update m3: anna city oslo`; as it was written if it could not be read."""
    operation = call["operation"]
    if operation is None:
        return str(call["raw"])
    name, id = operation["name"], operation.get("id") or call["id"]
    head = " ".join(str(part) for part in (name, id) if part)
    extra = [f"{key} {operation[key]}" for key in ("kind", "time") if operation.get(key)]
    head += f" ({', '.join(extra)})" if extra else ""
    return f"{head}: {operation['content']}" if "content" in operation else head


def change_text(change: dict[str, Any]) -> str:
    """The words of a line of the diff, without its sign."""
    before, after = change["before"], change["after"]
    if change["op"] in ("update", "core"):
        return f"{change['id']} {before or '(empty)'} -> {after or '(empty)'}"
    return f"{change['id']} {after if before is None else before}"


def live(episode: Episode) -> list[dict[str, Any]]:
    """Entries of the final memory that are not deleted."""
    return [entry for entry in episode["memory"]["entries"] if not entry["deleted"]]


def summary(episode: Episode) -> str:
    """What it earned, in a line."""
    rewards = episode["rewards"]
    return (
        f"r1 {rewards['correct']:.2f}, compression {rewards['compression']:.2f}, "
        f"stale {-rewards['stale'] + 0.0:.2f}"
    )


def turn_rewards(episode: Episode, index: int) -> str:
    rewards, turn = episode["rewards"], episode["turns"][index]
    return (
        f"valid {rewards['valid'][index]:.2f}, supported {rewards['supported'][index]:.2f}, "
        f"memory {turn['memory_tokens']} tokens"
    )


def shown(episode: Episode, number: int) -> Iterator[tuple[str, str]]:
    """Lines of the terminal, each with its style."""
    turns = episode["turns"]
    yield f"episode {number}: {plain(episode['id'])}, step {episode['step']}", "bold"
    yield summary(episode), ""
    for index, turn in enumerate(turns):
        yield f"\nchunk {index + 1} of {len(turns)}  ({turn_rewards(episode, index)})", "bold"
        yield from ((f"  {line}", "") for line in plain(turn["chunk"]).splitlines())
        yield "calls:" if turn["calls"] else "calls: none", "dim"
        for call in turn["calls"]:
            text = "\n    ".join(plain(call_text(call)).splitlines())
            if call["error"] is None:
                yield f"  {text}", ""
            else:
                yield f"  x {text}  [error: {plain(call['error'])}]", "red"
        yield "memory:" if turn["changes"] else "memory: unchanged", "dim"
        for change in turn["changes"]:
            sign = SIGNS[change["op"]]
            yield f"  {sign} {plain(change_text(change))}", _STYLES[sign]
    yield "\nquestions", "bold"
    for one in episode["questions"]:
        style = "green" if one["score"] >= 1 else "red" if one["score"] <= 0 else "yellow"
        gold = " | ".join(plain(answer) for answer in one["answers"])
        yield f"  {one['score']:.2f}  {plain(one['q'])}  ({plain(one['type'])})", style
        yield f"        gold: {gold}; said: {plain(one['said'])}", ""
    entries = live(episode)
    yield f"\nfinal memory, {len(entries)} entries", "bold"
    if episode["memory"]["core"]:
        yield f"  core: {plain(episode['memory']['core'])}", ""
    for entry in entries:
        time = f" [{plain(entry['time'])}]" if entry.get("time") else ""
        yield f"  {plain(entry['id'])}{time} {plain(entry['content'])}", ""


def _listed(number: int, episode: Episode) -> str:
    try:
        errors = sum(
            call["error"] is not None for turn in episode["turns"] for call in turn["calls"]
        )
        return (
            f"{number:>3}  r1 {episode['rewards']['correct']:.2f}  errors {errors:>2}  entries "
            f"{len(live(episode)):>3}  {plain(episode['id'])}"
        )
    except (KeyError, TypeError, ValueError):
        return f"{number:>3}  (not as this version of mnemic writes it)"
