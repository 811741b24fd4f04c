"""The performance targets of the kernels, against a result of bench/kernels.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from workloads import GQA, MHA

OWN_DENSE = ("dense step", "pages=None")  # decode_step over every page; append_kv and sparse_decode
DENSE = ("cuDNN", "flash", "FlexAttention", "FlashInfer")
SPEEDUPS = (
    (MHA, 8),
    (replace(MHA, context=131072), 16),
    (GQA, 5),
    (replace(GQA, context=131072), 13),
    (replace(GQA, batch=8), 8),
)
TOPK_MICROSECONDS = {(32, 2048): 3, (32, 65536): 8}


def median(row: dict[str, Any], name: str) -> float:
    """Microseconds."""
    return row["microseconds"][name]["median"]


def fastest(row: dict[str, Any], names: tuple[str, ...]) -> float:
    """Microseconds of the fastest of these that ran."""
    return min(median(row, name) for name in names if name in row["microseconds"])


def targets(result: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(description, target, measured, met), for each target whose workload is in the result."""
    rows = {row["workload"]["name"]: row for row in result["rows"]}
    found: list[tuple[str, str, str, bool]] = []

    def at_most(description: str, most: float, values: list[float], unit: str) -> None:
        if not values:
            return
        measured = f"{max(values):.2f}{unit}"
        if len(values) > 1:
            count = sum(value <= most for value in values)
            measured = f"{min(values):.2f} to {measured}; met in {count} of {len(values)} rows"
        found.append((description, f"at most {most:g}{unit}", measured, max(values) <= most))

    for w, least in SPEEDUPS:
        if str(w) in rows:
            speedup = rows[str(w)]["speedup"]
            found.append((f"{w}: over the fastest dense", f"at least {least}x", f"{speedup:.2f}x", speedup >= least))
    selects = [row for row in rows.values() if row["workload"]["budget"] and row["workload"]["context"] > 8192]
    large = [row for row in selects if row["bytes"]["sparse"] >= 64 << 20]
    at_most("step over the read roofline, 64 MiB and more", 1.25, [row["over_limit"] for row in large], "x")
    small = [median(row, "pipeline") - median(row, "limit") for row in selects if row["bytes"]["sparse"] < 64 << 20]
    at_most("step above the read roofline, less than 64 MiB", 5, small, " us")
    for row in result["topk"]:
        most = TOPK_MICROSECONDS[row["rows"], row["n"]]
        peer = f"torch.topk: {median(row, 'torch.topk'):.1f} us"
        description = f"topk_pages, {row['rows']} rows, n {row['n']}, k {row['k']} ({peer})"
        at_most(description, most, [median(row, "topk_pages")], " us")
    dense = [row for row in rows.values() if row["workload"]["context"] >= 8192]
    peers = [fastest(row, OWN_DENSE) / fastest(row, DENSE) for row in dense]
    at_most("dense mode over the fastest dense, 8K and longer", 1.05, peers, "x")
    whole = [row for row in rows.values() if row["workload"]["selected_pages"] == row["workload"]["pages"]]
    ratios = [median(row, "pipeline") / fastest(row, OWN_DENSE) for row in whole]
    at_most("budget >= context, over our dense mode", 1.03, ratios, "x")
    return found
