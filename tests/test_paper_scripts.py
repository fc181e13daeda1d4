"""What the scripts of experiments/paper reckon themselves, beside the library: against plain loops and simple laws."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from toy import toy_trace

from dspark_sim.analysis.blocks import Blocks
from dspark_sim.training.calibration import Outcomes, survival
from dspark_sim.workload import DOMAINS

FOLDER = Path(__file__).parent.parent / "experiments" / "paper"


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.fixture(scope="module")
def trace():
    made = toy_trace(12, 40, 7, 0.75, 3)
    made.requests["domain"] = [DOMAINS[number % 3] for number in range(len(made.requests))]
    return made


def test_the_threshold_sweep_is_that_of_rounds_walked_one_by_one(trace):
    """Figure 5: accepted (bonus included) and rejected tokens per round that the length limit does not cut."""
    found = script("fig5_threshold_sweep")["sweep"](Blocks.from_trace(trace))
    found = found.set_index(["confidence_threshold", "domain"])
    anchors = trace.anchors.set_index(["request_id", "position"])
    for threshold in (0.0, 0.5, 0.8):
        counts = {domain: np.zeros(3) for domain in DOMAINS}
        for request in trace.requests.itertuples():
            place = 0
            while place < request.output_len - 1:
                row = anchors.loc[request.request_id, request.prompt_len + place]
                below = np.flatnonzero(np.asarray(row["confidence"], dtype=float) < threshold)
                verified = int(below[0]) if below.size else len(row["confidence"])
                verified = min(verified, request.max_tokens - place - 2)
                accepted = min(int(row["num_accepted"]), verified)
                emitted = min(accepted + 1, request.output_len - 1 - place)
                if place + 7 + 2 <= request.max_tokens:
                    # Behind an accepted end of sequence nothing is judged.
                    judged = 1 + (verified if emitted > accepted else accepted)
                    counts[request.domain] += (emitted, judged - emitted, 1)
                place += emitted
        for domain, (accepted, rejected, rounds) in counts.items():
            row = found.loc[threshold, domain]
            assert row["accepted_tokens_per_step"] == pytest.approx(accepted / rounds)
            assert row["rejected_tokens_per_step"] == pytest.approx(rejected / rounds)
            whole = row["accepted_tokens_per_step"] + row["rejected_tokens_per_step"]
            assert row["acceptance_rate"] == pytest.approx(row["accepted_tokens_per_step"] / whole)
            assert row["acceptance_rate_low"] <= row["acceptance_rate"] <= row["acceptance_rate_high"]


def test_a_reliability_curve_counts_every_judged_block_once(trace):
    held = Outcomes.of_trace(trace)
    forecast = survival(held.confidence)
    curve = script("fig6_reliability")["curve"](forecast, held, 2, "before")
    judged = held.judged[:, 1]
    predicted, happened = forecast[judged, 1], held.survived[judged, 1]
    assert curve["num_blocks"].sum() == judged.sum()
    for row in curve[curve["num_blocks"] > 0].itertuples():
        inside = (predicted >= row.bin_low) & (predicted < row.bin_high + 1e-12 * (row.bin_high >= 1.0))
        assert row.num_blocks == inside.sum()
        assert row.frequency == pytest.approx(happened[inside].mean())
        if not np.isnan(row.frequency_low):
            assert row.frequency_low - 1e-9 <= row.frequency <= row.frequency_high + 1e-9
    assert set(curve["draft_position"]) == {2} and set(curve["calibration"]) == {"before"}


def served(name: str, users: list[int], speed: list[float], share: list[float], budget: float) -> pd.DataFrame:
    rows = {"served": name, "concurrency_requests": users, "user_tokens_per_second": speed, "mtp1_speed_share": share}
    frame = pd.DataFrame(rows).assign(verification_budget=budget)
    return frame.assign(output_throughput=frame["concurrency_requests"] * frame["user_tokens_per_second"])


@pytest.fixture()
def servers():
    """MTP-1, and servers that give every user 1.5 and 0.8 times its speed at the same load."""
    users, speed = [1, 2, 4, 8], [10.0, 9.0, 7.5, 5.0]
    share = [one / 10 for one in speed]
    return pd.concat(
        [
            served("mtp1", users, speed, share, 2.0),
            served("dspark", users, [1.5 * one for one in speed], share, 4.5),
            served("fixed", users, [0.8 * one for one in speed], share, 8.0),
        ]
    )


def test_gains_at_the_same_load_are_those_of_the_servers(servers):
    names = script("fig8_load")
    for share in (1.0, 0.9, 0.8, 0.6):
        assert names["over_mtp"](servers, share) == pytest.approx(50)
        assert names["over_mtp"](servers, share, "fixed") == pytest.approx(-20)
        assert names["budget"](servers, share) == pytest.approx(3.5)
    assert np.isnan(names["over_mtp"](servers, 0.4))
    assert names["story"](servers) == "4.5 tokens and +50 % at 1 to 4.5 tokens and +50 % at 8"


def test_gains_on_the_frontier_hold_the_other_axis(servers):
    gain = script("fig7_frontier")["gain"]
    mtp = servers[servers["served"] == "mtp1"]
    # MTP-1 at 2 users: 9 tokens/s each, 18 together. DSpark has 9 each beyond 4 users' 11.25 and 8 users' 7.5.
    at_nine = np.interp(9.0, [7.5, 11.25], [60.0, 45.0])
    assert gain(servers, 9.0, "throughput_at_matched_tps") == pytest.approx(100 * (at_nine / 18 - 1))
    # 18 together: between DSpark's 15 at one user and 27 at two.
    speed = np.interp(18.0, [15.0, 27.0], [15.0, 13.5])
    assert gain(servers, 9.0, "tps_at_matched_throughput") == pytest.approx(100 * (speed / 9 - 1))
    same = pd.concat([mtp, mtp.assign(served="dspark")])
    for kind in ("throughput_at_matched_tps", "tps_at_matched_throughput"):
        assert gain(same, 8.0, kind) == pytest.approx(0)
