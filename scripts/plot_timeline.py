"""Who was busy when in a streamed run: a picture of reads, writes, computation and waiting.

    mnemic train RECIPE update=streamed offload.kind=ssd offload.trace=true
    python scripts/plot_timeline.py RUN/timeline.json OUT.png [--last SECONDS] [--disk FOLDER]

Prints how much of the transfers ran beside computation, and with `--disk` the share of the disk's
measured speed (as `mnemic doctor` measures it) that the run reached: the seconds that its bytes
would take at full speed over the seconds they took. Needs matplotlib (extra `plot`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

LANES = ("read", "write", "compute", "wait")
COLORS = {"read": "#3b76af", "write": "#c8553d", "compute": "#5b8c5a", "wait": "#c9c9c9"}


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time as spans that do not overlap, in order."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def common(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> float:
    """Seconds that lie in both."""
    return length(union(a)) + length(union(b)) - length(union([*a, *b]))


def with_compute(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` and the time of steps in which nothing was waited for."""
    waits = union([(row["start"], row["end"]) for row in rows if row["lane"] == "wait"])
    found = []
    for step in (row for row in rows if row["lane"] == "step"):
        at = step["start"]
        inside = [span for span in waits if span[0] < step["end"] and span[1] > at]
        for start, end in [*inside, (step["end"], step["end"])]:
            if at < start:
                found.append({"lane": "compute", "start": at, "end": start, "bytes": 0})
            at = max(at, end)
    return [*rows, *found]


def summary(rows: list[dict[str, Any]], disk: dict[str, Any] | None) -> dict[str, float]:
    spans = {
        lane: [(row["start"], row["end"]) for row in rows if row["lane"] == lane] for lane in LANES
    }
    moved = {
        lane: sum(row["bytes"] for row in rows if row["lane"] == lane) for lane in ("read", "write")
    }
    transfers = [*spans["read"], *spans["write"]]
    seconds = max(row["end"] for row in rows) - min(row["start"] for row in rows)
    found = {
        "seconds": seconds,
        "read_bytes": moved["read"],
        "written_bytes": moved["write"],
        "bytes_per_second": (moved["read"] + moved["write"]) / seconds,
        "transfers_beside_compute": common(transfers, spans["compute"])
        / max(1e-9, length(union(transfers))),
        "waiting": length(union(spans["wait"])) / seconds,
    }
    if disk and "read_bytes_per_second" in disk:
        full = moved["read"] / disk["read_bytes_per_second"]
        full += moved["write"] / disk["write_bytes_per_second"]
        found["share_of_disk_speed"] = full / seconds
    return found


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = min(row["start"] for row in rows)
    figure, axes = pyplot.subplots(figsize=(12, 3.2), dpi=120)
    for place, lane in enumerate(reversed(LANES)):
        bars = [
            (row["start"] - first, row["end"] - row["start"]) for row in rows if row["lane"] == lane
        ]
        axes.broken_barh(bars, (place - 0.4, 0.8), facecolors=COLORS[lane], linewidth=0)
    axes.set_yticks(range(len(LANES)), list(reversed(LANES)))
    axes.set_xlabel("seconds")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="A picture of a streamed run's transfers.")
    parser.add_argument("timeline", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--last", type=float, help="only the last seconds of the run")
    parser.add_argument("--disk", type=Path, help="measure the disk of this folder")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    rows = with_compute(json.loads(args.timeline.read_text()))
    if args.last:
        after = max(row["end"] for row in rows) - args.last
        rows = [row for row in rows if row["start"] >= after]
    rows = [row for row in rows if row["lane"] in LANES]
    disk = None
    if args.disk:
        from mnemic.train.doctor import measure_disk

        disk = measure_disk(args.disk)
        print(
            f"disk: reads {disk['read_bytes_per_second'] / 1e9:.2f}, "
            f"writes {disk['write_bytes_per_second'] / 1e9:.2f} GB/s"
        )
    found = summary(rows, disk)
    for key, value in found.items():
        print(f"{key}: {value:,.3f}")
    draw(
        rows, args.out,
        f"{found['bytes_per_second'] / 1e9:.2f} GB/s moved, "
        f"{found['transfers_beside_compute']:.0%} of transfers beside computation",
    )  # fmt: skip
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
