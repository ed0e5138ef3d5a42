"""Prints the results of tunnel.sh as Markdown: medians, the spread, and Selvedge's ratio to each."""

import json
import statistics
import sys

OURS = "selvedge"
values, modes, tunnels, metrics = {}, [], [], []
for line in open(sys.argv[1]):
    entry = json.loads(line)
    for name, seen in (("mode", modes), ("tunnel", tunnels), ("metric", metrics)):
        if entry[name] not in seen:
            seen.append(entry[name])
    key = entry["mode"], entry["tunnel"], entry["metric"]
    values.setdefault(key, []).append(entry["value"])


def short(number):
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def cell(mode, tunnel, metric):
    found = values.get((mode, tunnel, metric))
    if not found:
        return "-"
    median = statistics.median(found)
    text = f"{short(median)} ({short(min(found))}..{short(max(found))})"
    ours = values.get((mode, OURS, metric))
    if ours and tunnel not in (OURS, "none") and median:
        text += f" ×{statistics.median(ours) / median:.2f}"
    return text


print("Medians (lowest..highest); ×: Selvedge's median as a multiple of it, of the same run.")
for mode in modes:
    print(f"\n### {mode}\n")
    print("| | " + " | ".join(tunnels) + " |")
    print("|---" * (len(tunnels) + 1) + "|")
    for metric in metrics:
        print(f"| {metric} | " + " | ".join(cell(mode, tunnel, metric) for tunnel in tunnels) + " |")
