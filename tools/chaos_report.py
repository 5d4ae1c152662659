"""What tools/chaos reports: its checks, the JSON, the table, and what must not be left over."""

import os
import pathlib
import platform

CHECKS = {
    "replay": "a log-probability or token differs from the reference's",
    "spans": "version spans out of order, or of a version that cannot have served there",
    "deadline": "a call or an update took more than twice its limit",
    "old or new": "after a fault something else served than the old version or the new one",
    "next update": "an update failed although nothing but short stops befell it, or an open one was never dropped",
    "two versions": "a worker served another version after a publish() that reported success",
    "corruption": "not DATA_LOSS, or it named other tensors",
    "death": "a worker ended by itself, or went on with a failed device",
    "stream": "a stream broke the protocol, or ended with an error that no fault explains",
    "supervision": "a worker could not be brought back",
    "left over": "a process or shared memory remained",
}


def shared_memory():
    folder = pathlib.Path("/dev/shm")
    return {p.name for p in folder.iterdir()} if folder.exists() else set()


def start_time(pid):
    """When the process started, in the kernel's ticks; None: there is none."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError):
        return None


def left_over(campaign, before):
    """Processes of the campaign, or shared memory that nobody has open: both must be gone."""
    for pid, started in campaign.pids.items():
        # A long campaign sees numbers come round again.
        if started is not None and start_time(pid) == started:
            campaign.violation("left over", f"process {pid} is still there")
    new = shared_memory() - before
    in_use = set()
    for maps in pathlib.Path("/proc").glob("[0-9]*/maps"):
        try:
            in_use |= {name for name in new if f"/dev/shm/{name}" in maps.read_text()}
        except OSError:
            continue
    for name in sorted(new - in_use):
        campaign.violation("left over", f"shared memory /dev/shm/{name}")


def device_text():
    info = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def result_of(campaign, corruptions):
    outcomes, policies = {}, {}
    for record in campaign.attempts:
        outcomes[record["outcome"]] = outcomes.get(record["outcome"], 0) + 1
        policy = policies.setdefault(record["policy"], {"updates": 0, "succeeded": 0})
        policy["updates"] += 1
        policy["succeeded"] += record["ok"]
    fired = campaign.coverage.fired
    counts = {name: fired[name]["kill"] + fired[name]["stop"] for name in fired}
    return {
        "covers": f"{len(campaign.attempts)} updates of {campaign.arguments.workers} workers, "
        f"transport {campaign.transport}; of {len(counts)} failpoints {sum(c >= 20 for c in counts.values())} fired at "
        f"least 20 times with kill or stop, "
        f"{sum(c > 0 for c in counts.values())} at least once, the fewest {min(counts.values())} times",
        "seconds": {"campaign": round(campaign.campaign_s, 1), "replay": round(campaign.replay_s, 1)},
        "updates": {
            "attempted": len(campaign.attempts),
            "succeeded": sum(r["ok"] for r in campaign.attempts),
            "without_a_fault": sum(r["clean"] for r in campaign.attempts),
            "no_fault_but_short_stops": sum(r["mild"] for r in campaign.attempts),
            "longest_s": max((r["seconds"] for r in campaign.attempts if "seconds" in r), default=None),
            "outcomes": outcomes,
            "policies": policies,
        },
        "failpoints": fired,
        "faults": {
            "kills_and_stops_at_failpoints": sum(counts.values()),
            "learner": campaign.learner_places,
            "learner_deaths": campaign.learner_deaths,
            "signals": sum(e["event"] == "external" for e in campaign.events),
            "worker_restarts": sum(e["event"] == "restarted" for e in campaign.events),
            "updates_abandoned": campaign.calls["abandon"],
            "pauses": campaign.calls["pause"],
        },
        "traffic": {
            "calls": campaign.clients.calls,
            "longest_s": round(campaign.clients.longest, 2),
            "deadline_s": campaign.clients.deadline_s,
        },
        "replay": campaign.replayed,
        "corruptions": corruptions,
        "checks": {check: sum(v["check"] == check for v in campaign.violations) for check in CHECKS},
        "violations": campaign.violations[:50],
    }


def print_table(result):
    print(f"\n{'failpoint':28}{'kill':>6}{'stop':>6}{'sleep':>7}{'error':>7}")
    for name, row in result["failpoints"].items():
        print(f"{name:28}{row['kill']:6}{row['stop']:6}{row['sleep']:7}{row['error']:7}")
    updates, replay, faults = result["updates"], result["replay"], result["faults"]
    print(f"\n{result['covers']}")
    print(
        f"updates: {updates['succeeded']} of {updates['attempted']} succeeded; {updates['without_a_fault']} met no fault, "
        f"{updates['no_fault_but_short_stops']} nothing but short stops; {updates['outcomes']}"
    )
    print(f"faults: {faults}")
    print(f"calls: {result['traffic']['calls']}, the longest {result['traffic']['longest_s']} s")
    print(
        f"tokens: {replay['tokens']} of {replay['samples']} samples under {replay['versions']} versions; "
        f"{replay['checked']} replayed in every bit ({replay['redrawn']} drawn again too), {replay['differing']} differing; "
        f"{replay['kept']} of kept states (order of versions checked only), {replay['kept_possible']} of broken "
        "streams that may have been kept (not checked)"
    )
    if result["corruptions"]:
        tried, found = (sum(row[key] for row in result["corruptions"].values()) for key in ("tried", "detected"))
        print(f"corruptions: {found} of {tried} detected")
    print("violations: " + ", ".join(f"{check} {count}" for check, count in result["checks"].items()))
