"""`mnemic memory show`: an episode file comes out whole, and none of it as markup or control."""

import json
import re
from html.parser import HTMLParser

import pytest

from mnemic.models.memory.episode import MemoryConfig, MemoryEpisode
from mnemic.models.memory.rule_reader import RuleReader
from mnemic.train.cli import main
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.rollout.evaluate import Played
from mnemic.train.rollout.rewards import outcome

EVIL = "<script>alert(1)</script>"
CONFIG = MemoryConfig(store="typed", syntax="lines", form="text")


def episode(id="kv-0", *texts):
    row = EpisodeRow(
        id, "test", ("anna city rome\nbob pet cat", f"{EVIL} \x1b[31mred\u202e", "bye"),
        (Question("anna city?", ("rome",), "current"), Question("bob pet?", ("cat",), "ended")),
    )  # fmt: skip
    made = MemoryEpisode(row.chunks, [q.q for q in row.questions], CONFIG)
    for text in texts or (
        "+ anna city rome\n+ bob pet cat",
        f"+ {EVIL}\n= m0 anna city oslo\n= m9 nobody\n{EVIL} is no operation\n# two people",
        "- m1",
    ):
        made.step(text)
    answers = RuleReader().answer(made.asks())
    return Played(row, made, outcome(made, row, [0, 1], answers)).trace()


@pytest.fixture
def run(tmp_path):
    lines = [
        {"step": 5, **episode("old")},
        {"step": 9, **episode()},
        {"step": 9, **episode("kv-1", "noop", "noop", "noop")},
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "episodes.jsonl").write_text(text, "utf-8")
    return tmp_path


def show(capsys, *args):
    status = main(["memory", "show", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_an_episode_on_the_terminal(run, capsys):
    status, text, _ = show(capsys, run)
    assert status == 0
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "episode 0: kv-0, step 9"
    for line in (
        "+ m0 anna city rome", "~ m0 anna city rome -> anna city oslo", "- m1 bob pet cat",
        f"+ m2 {EVIL}", "~ core (empty) -> two people", "bob pet cat", "delete m1",
        "insert m0: anna city rome", "update m0: anna city oslo", "gold: rome; said: oslo",
        "0.00  anna city?  (current)", "final memory, 2 entries", "m0 anna city oslo",
        "core: two people",
    ):  # fmt: skip
        assert line in lines, (line, text)
    assert re.search(r"x update m9: nobody  \[error: there is no 'm9'", text)
    assert re.search(rf"x {re.escape(EVIL)} is no operation  \[error: ", text)
    assert "chunk 2 of 3  (valid 0.60, supported " in text
    # Nothing of the stream steers the terminal.
    assert "\x1b" not in text and "\u202e" not in text
    assert "\\x1b[31mred\\u202e" in text


def test_lists_and_steps(run, capsys):
    _, text, _ = show(capsys, run, "--list")
    assert len(text.splitlines()) == 2
    assert re.match(r"  0  r1 0\.00  errors  2  entries   2  kv-0", text)
    assert show(capsys, run, "--step", 5)[1].startswith("episode 0: old, step 5")
    assert "calls: none" not in show(capsys, run, "--episode", 1)[1]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") or k.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_escaped_and_stands_alone(run, capsys):
    page = run / "page.html"
    assert show(capsys, run, "--html", page)[0] == 0
    text = page.read_text("utf-8")
    assert EVIL not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    found = Tags()
    found.feed(text)
    assert "script" not in found.tags and not found.links and "url(" not in text
    assert {"meta", "section", "details", "li"} <= set(found.tags)
    said = "".join(found.text)
    for part in (EVIL, "anna city oslo", "there is no 'm9'", "said oslo", "Chunk 3 of 3"):
        assert part in said
    assert "width=device-width" in text and "max-width" in text
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text
    # The deleted entry and the replaced content, struck through.
    assert re.findall(r'gone">([^<]+)<', text) == ["anna city rome", "m1 bob pet cat"]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--episode", "2"], "--episode 2: there are 0 to 1"),
        (["--step", "7"], "holds step 5, 9"),
        (["--list", "--episode", "1"], "--list: lists all episodes"),
    ],
)
def test_wrong_arguments(run, capsys, args, sentence):
    status, _, error = show(capsys, run, *args)
    assert status in (1, 2) and sentence in error


def test_wrong_files(run, capsys):
    (run / "recipe.yaml").write_text("")
    file = run / "episodes.jsonl"
    lines = file.read_text("utf-8").splitlines()
    for text, sentence in (
        (lines[0] + "\n" + lines[1][:40], "line 2: is not JSON"),
        ('{"step": 1}', "line 1: is not an episode"),
        (lines[0].replace('"chunk"', '"chunck"'), "episode 0 is not as this version"),
        ("", "holds no episodes"),
    ):
        file.write_text(text, "utf-8")
        assert sentence in show(capsys, run)[2]
    file.unlink()
    assert "no evaluation has played episodes" in show(capsys, run)[2]
    assert "not a run folder" in show(capsys, run / "nowhere")[2]
