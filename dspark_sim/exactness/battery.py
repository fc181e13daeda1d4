"""`dspark-sim verify`: every law in turn, one row each, and whether it held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

import pandas as pd
from tqdm import tqdm

from dspark_sim.engine.sampling import SamplingParams
from dspark_sim.exactness import laws, numerics, statistical, toy_replay, tree_cases
from dspark_sim.exactness.replay import COST, QUICK, RealModel, Scale, depth_slope
from dspark_sim.exactness.toy import Toy
from dspark_sim.loop import Mode
from dspark_sim.policy import Fixed, PrefixScheduler, SpeculationPolicy
from dspark_sim.policy_ranked import ConfidenceThreshold

Status = Literal["pass", "FAIL", "info"]


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table.

    Parameters
    ----------
    group, case
        What was checked.
    num_cases
        Comparisons behind it.
    found, wanted
        In words, with figures.
    status
        ``info`` is reported and not judged.
    """

    group: str
    case: str
    num_cases: int
    found: str
    wanted: str
    status: Status


def _judge(group: str, case: str, num_cases: int, found: str, wanted: str, held: bool) -> Check:
    return Check(group, case, num_cases, found, wanted, "pass" if held else "FAIL")


def enumeration(quick: bool) -> Iterator[Check]:
    """Exact joint laws, the paper's example and the intervention."""
    worst: dict[tuple[str, int], tuple[float, int]] = {}
    for case in laws.exact_cases(1 if quick else 4):
        distance, count = worst.get((case.mode, case.num_requests), (0.0, 0))
        worst[case.mode, case.num_requests] = max(distance, case.total_variation), count + case.num_worlds
    for (mode, num_requests), (distance, count) in worst.items():
        name = f"{mode}, R = {num_requests}, every policy that may run"
        yield _judge("enumeration", name, count, f"TV {distance:.1e}", "< 1e-12", distance < laws.TOLERANCE)
    peeking, prefix = laws.appendix_a()
    found = f"P(A) {peeking:.2f} against {prefix:.2f}"
    held = abs(peeking - 0.85) < 1e-12 and abs(prefix - 0.70) < 1e-12
    yield _judge("enumeration", "paper's Appendix A, argmax against Algorithm 1", 2, found, "0.85 against 0.70", held)
    for case in laws.biased_cases(3 if quick else 6):
        name = f"{case.policy}, {case.mode}, R = {case.num_requests} (must be biased)"
        found = f"TV {case.total_variation:.3f}"
        yield _judge("known bad", name, case.num_worlds, found, "> 0.05", case.total_variation > 0.05)
    trials = 100 if quick else 400
    policies = laws.honest_policies()
    failures = sum(laws.intervention_failures(policy, trials) for policy in policies)
    found = f"{failures} admissions changed"
    yield _judge(
        "intervention", "confidences behind k redrawn, every policy", trials * len(policies), found, "0", failures == 0
    )


def trees(quick: bool) -> Iterator[Check]:
    """Exact joint laws of trees, their controls, the intervention, and children drawn without replacement."""
    worst: dict[tuple[str, int], tuple[float, int]] = {}
    for case in tree_cases.exact_tree_cases(1 if quick else 4):
        distance, count = worst.get((case.mode, case.num_requests), (0.0, 0))
        worst[case.mode, case.num_requests] = max(distance, case.total_variation), count + case.num_worlds
    for (mode, num_requests), (distance, count) in worst.items():
        name = f"{mode}, R = {num_requests}, every shape and policy that may run"
        yield _judge("trees", name, count, f"TV {distance:.1e}", "< 1e-12", distance < laws.TOLERANCE)
    for case in tree_cases.biased_tree_cases(3 if quick else 6):
        name = f"{case.policy}, {case.mode}, R = {case.num_requests} (must be biased)"
        found = f"TV {case.total_variation:.3f}"
        yield _judge("known bad", name, case.num_worlds, found, "> 0.05", case.total_variation > 0.05)
    trials = 100 if quick else 400
    policies = tree_cases.tree_policies()
    failures = sum(tree_cases.node_interventions(policy, trials) for policy in policies)
    name = "survivals behind a node redrawn, every policy"
    found = f"{failures} admissions changed"
    yield _judge("trees", name, trials * len(policies), found, "0", failures == 0)
    rates = tree_cases.children_accepted(*toy_replay.first_slot_laws(Toy.make(), SamplingParams(1.0)))
    found = ", ".join(f"{without:.3f} against {replaced:.3f}" for without, replaced in rates)
    (one, same), *more = rates
    held = abs(one - same) < laws.TOLERANCE and all(without > replaced for without, replaced in more)
    name = "toy: one of 1, 2, 3 children is accepted, without replacement against independent"
    yield _judge("trees", name, 3, found, "equal, larger, larger", held)


def statistics(quick: bool) -> Iterator[Check]:
    """G-tests of the real loop on the toy, and planted errors."""
    num_requests = 5_000 if quick else 8_000
    temperatures = (1.0,) if quick else (0.7, 1.0)
    modes: tuple[Mode, ...] = ("rejection", "block", "coupled", "target_match")
    for temperature in temperatures:
        for number, mode in enumerate(modes):
            policy: SpeculationPolicy = statistical.scheduled() if number % 2 == 0 else Fixed(3)
            result = statistical.sampled_law(
                Toy.make(), policy, mode, SamplingParams(temperature, seed=number), num_requests
            )
            name = f"{mode}, T = {temperature}, {policy.label()} (power {result.power:.2f} at TV 0.05)"
            held = result.p_value > statistical.LEVEL
            yield _judge("G-test", name, num_requests, f"p = {result.p_value:.2g}", f"> {statistical.LEVEL:g}", held)
    for name, control in statistical.controls(num_requests).items():
        if quick and "argmax" in name:
            continue  # enumerated above; decoding one request at a time takes 20 s
        result = control()
        found = f"p = {result.p_value:.1e}"
        yield _judge(
            "known bad",
            f"{name} (must fail)",
            result.num_requests,
            found,
            f"< {statistical.LEVEL:g}",
            result.p_value < statistical.LEVEL,
        )


def toy_laws(quick: bool) -> Iterator[Check]:
    """Streams and dense anchors on the toy."""
    params = SamplingParams(0.8, seed=4)
    modes: tuple[Mode, ...] = ("coupled",) if quick else ("coupled", "target_match")
    for mode in modes:
        equal, compared = toy_replay.invariance(mode, params, 20 if quick else 60)
        name = f"toy, {mode}: schedules, batches, preemption, restart"
        yield _judge("stream invariance", name, compared, f"{equal} of {compared} equal", "all", equal == compared)
    policies: list[SpeculationPolicy] = [Fixed(3), Fixed(1), PrefixScheduler(toy_replay.COST), ConfidenceThreshold(0.4)]
    for mode in (*modes, "rejection"):
        toy = Toy.make()
        verdicts = [toy_replay.identity(toy, policy, mode, params, 40 if quick else 100) for policy in policies]
        wrong = [str(verdict) for verdict in verdicts if not verdict]
        yield _judge(
            "identity", f"toy, {mode}", len(verdicts), wrong[0] if wrong else "all rounds equal", "all", not wrong
        )
    blocks = toy_replay.block_law(Toy.make(), params, 500 if quick else 2000)
    found = f"p = {blocks.p_value:.2g}"
    yield _judge(
        "dense anchors",
        "toy, rejection: blocks have the drafter's law",
        blocks.num_requests,
        found,
        f"> {statistical.LEVEL:g}",
        blocks.p_value > statistical.LEVEL,
    )
    pairs: list[tuple[SpeculationPolicy, SpeculationPolicy]] = [(Fixed(0), Fixed(3))]
    if not quick:
        pairs += [(Fixed(3), Fixed(1)), (Fixed(1), PrefixScheduler(toy_replay.COST))]
        pairs += [(Fixed(3), ConfidenceThreshold(0.4))]
    for recorded, policy in pairs:
        difference, error = toy_replay.counterfactual_difference(
            Toy.make(), recorded, policy, params, 300 if quick else 1000
        )
        name = f"toy, rejection: {policy.label()} from a recording of {recorded.label()}, rounds a request"
        found = f"{difference:+.3f} ± {1.96 * error:.3f}"
        yield _judge("counterfactual", name, 2, found, "within 3.5 s.e.", abs(difference) < 3.5 * error)


def real_model(quick: bool, scale: Scale | None = None) -> Iterator[Check]:
    """The same laws, and numerics, on the embedded model."""
    from dspark_sim.engine.serve import Engine

    scale = scale or (QUICK if quick else Scale())
    engine = Engine.load(max_num_seqs=12, max_model_len=512)
    model = RealModel(engine, scale)
    modes: tuple[Mode, ...] = ("coupled",) if quick else ("greedy", "coupled", "target_match")
    for mode in modes[-1:] if quick else ("coupled", "target_match"):
        equal, compared = model.invariance(mode)
        name = f"{engine.target.name}, {mode}, T = 0.8: schedules and batches"
        yield _judge("stream invariance", name, compared, f"{equal} of {compared} equal", "all", equal == compared)
    for mode in (*modes, "rejection"):
        if quick and mode == "rejection":
            continue
        results = list(model.counterfactuals(mode))
        wrong = [f"{case}: {words}" for case, held, words in results if not held]
        name = f"{engine.target.name}, {mode}: {'identity' if mode == 'rejection' else 'identity and counterfactual'}"
        found = wrong[0] if wrong else "all rounds equal"
        yield _judge("replay", name, len(results), found, "all", not wrong)
    if quick:
        return
    larger = RealModel(engine, replace(scale, per_domain=4, max_tokens=24, concurrency=12))
    difference, low, high = larger.acceptance_interval(PrefixScheduler(COST))
    name = f"{engine.target.name}, rejection: prefix from a recording of fixed-7, acceptance length"
    found = f"{difference:+.2f} ({low:+.2f} to {high:+.2f})"
    yield _judge("counterfactual", name, 2, found, "interval holds 0", low <= 0 <= high)
    longer = RealModel(engine, replace(scale, per_domain=4, max_tokens=64, concurrency=12))
    recording = longer.live(Fixed(0), "greedy")
    slope, low, high = depth_slope(longer.anchored(recording))
    found = f"late - early {slope:+.3f} ({low:+.3f} to {high:+.3f})"
    yield _judge(
        "depth", "acceptance of the first draft against depth", 12, found, "interval holds 0", low <= 0 <= high
    )
    for name, count, found, wanted, held in numerics.batch_and_padding(engine):
        yield _judge("numerics", name, count, found, wanted, held)
    fast, slow = numerics.anchor_rates(engine, recording)
    found = f"{fast:.0f} a second against {slow:.1f}, ratio {fast / slow:.0f}"
    # A speed is no law: it is reported, and no load of the machine makes the battery fail.
    yield Check(
        "dense anchors", "anchors a second, dense against decoding one request, greedy", 1, found, "reported", "info"
    )
    for name, found in numerics.bfloat16_report():
        yield Check("bfloat16", name, 1, found, "reported", "info")


GROUPS: tuple[Callable[[bool], Iterator[Check]], ...] = (enumeration, trees, statistics, toy_laws, real_model)


def run(quick: bool = False, *, progress: bool = True) -> pd.DataFrame:
    """Run the battery; a row per check, columns ``group, case, num_cases, found, wanted, status, seconds``."""
    from dspark_sim.engine.models import embedded_model_folder

    embedded_model_folder()  # a missing model is said now, not after minutes
    rows = []
    with tqdm(unit="check", desc="verify", disable=not progress) as bar:
        for group in GROUPS:
            start = perf_counter()
            for check in group(quick):
                now = perf_counter()
                rows.append({name: getattr(check, name) for name in Check.__slots__} | {"seconds": now - start})
                start = now
                bar.set_postfix_str(check.group)
                bar.update()
    return pd.DataFrame(rows)
