"""Prints the results of tunnel.sh as Markdown: medians, the spread, and Selvedge's ratio to each."""

import json
import os
import statistics
import sys

OURS = "selvedge"
values, modes, tunnels, metrics = {}, [], [], []
for line in open(sys.argv[1]):
    entry = json.loads(line)
    for name, seen in (("mode", modes), ("tunnel", tunnels), ("metric", metrics)):
        if entry["tunnel"] != "limit" and entry[name] not in seen:
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


def limit():
    """The goodput that AEAD, one TCP stack and four copies leave of this machine, and our share."""
    median = lambda tunnel, metric: statistics.median(values["veth", tunnel, metric])
    # A full packet of 1,420 bytes carries 1,368 of TCP payload.
    aead = (median("limit", "aead_seal_ns") + median("limit", "aead_open_ns")) / 1368
    stack = median("none", "tcp1_machine_s_per_gb")
    copies = median("limit", "four_copies_s_per_gb")
    processors = os.cpu_count()
    gbit = processors / (aead + stack + copies) * 8
    ours = median(OURS, "tcp1_gbit_per_s")
    print(
        f"\nLimit of this machine, TCP over veth: AEAD {aead:.2f} + one TCP stack {stack:.2f} + four "
        f"copies {copies:.2f} CPU s/GB on {processors} CPUs: {gbit:.2f} Gbit/s. "
        f"Selvedge's share with one stream: {ours / gbit:.0%}."
    )


try:
    limit()
except KeyError:
    print("\nThe limit of this machine was not measured.")
