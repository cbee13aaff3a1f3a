"""scripts/bench_rollout.py answers in its form, and its arms do equal work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "bench_rollout.py"


@pytest.mark.slow
def test_bench_rollout_writes_its_ratios(tmp_path):
    out = tmp_path / "bench.json"
    subprocess.run([sys.executable, SCRIPT, "--quick", "--json", out], check=True)
    report = json.loads(out.read_text())
    assert {"episodes_per_second_vs_trl", "peak_rss_vs_trl"} <= report["ratios"].keys()
    assert all(value > 0 for value in report["ratios"].values())
    trl, ours = report["rows"]
    assert (trl["name"], ours["name"]) == ("trl", "mnemic")
    # The closing turn of TRL's conversation is one token more.
    assert trl["generated_tokens"] == trl["trained_tokens"] == ours["generated_tokens"] + 1
    assert ours["trained_tokens"] == ours["generated_tokens"]
    assert trl["parameters"] == ours["parameters"] < 10**6
    assert trl["reward_correct"] == pytest.approx(ours["reward_correct"], abs=0.15)
    assert report["env"]["threads"] == 1
