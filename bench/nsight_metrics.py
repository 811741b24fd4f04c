"""The metrics that bench/nsight.py asks Nsight Compute for: the JSON's key -> Nsight's own name."""

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "duration": "gpu__time_duration.sum",
    "clock of the multiprocessors": "smsp__cycles_elapsed.avg.per_second",
    "blocks": "launch__grid_size",
    "registers a thread": "launch__registers_per_thread",
    "read from DRAM": "dram__bytes_read.sum",
    "DRAM bandwidth used": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps there, of those that fit": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "instructions of warps": "smsp__inst_executed.sum",
    "a scheduler's cycles with an instruction": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "cycles from one instruction of a warp to the next": "smsp__average_warp_latency_per_inst_issued.ratio",
    "waiting: at a barrier": STALL.format("barrier"),
    "waiting: for device memory": STALL.format("long_scoreboard"),
    "waiting: for shared memory": STALL.format("short_scoreboard"),
    "waiting: for instructions to arrive": STALL.format("no_instruction"),
    "waiting: for the instruction before": STALL.format("wait"),
    "waiting: for room among memory's requests": STALL.format("lg_throttle"),
    "waiting: for room among shared memory's": STALL.format("mio_throttle"),
    "waiting: for a turn": STALL.format("not_selected"),
}
