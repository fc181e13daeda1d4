"""Deliberate errors in acceptance, admission and replay, one at a time, and whether a test finds each.

The working files are copied to a temporary folder, one text there is replaced by another, and a few quick tests run
on the copy. An error that no test finds survives, and the script ends with 1. The real tree is never written to.

    python tests/mutations.py [--only NAME] [--list]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("dspark_sim", "tests", "pyproject.toml")
LIMIT_SECONDS = 120
EXACTNESS = "tests/test_exactness.py::"
VERIFY = "tests/test_verify.py::"
LOOP = EXACTNESS + "test_the_loop_has_the_law_of_the_target"
RULES = EXACTNESS + "test_the_engines_rules_draw_the_enumerated_outcomes"
LIVE = "tests/test_tree_engine.py::"
ROWS = "tests/test_tree_rows.py::test_a_node_is_the_end_of_the_chain_through_its_ancestors"
OUTCOMES = EXACTNESS + "test_enumerated_outcomes_are_the_rules"


@dataclass(frozen=True, slots=True)
class Mutation:
    """One edit of a file below `dspark_sim`, and the tests that should find it."""

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "ratio",
        "a draft is accepted with min(1, q/p)",
        "engine/verify.py",
        "np.minimum(1.0, p / q)",
        "np.minimum(1.0, q / p)",
        (OUTCOMES, RULES),
    ),
    Mutation(
        "residual",
        "a rejected draft is replaced from |p - q|",
        "engine/verify.py",
        "return law.clamp_(min=0.0)",
        "return law.abs_()",
        (RULES, VERIFY + "test_the_rules_have_the_law_of_the_target"),
    ),
    Mutation(
        "residual-number",
        "the replacement is drawn with the number that rejected",
        "engine/verify.py",
        'bonus, residual = (keyed_uniform(seed, ids, at_position, purpose) for purpose in ("bonus", "residual"))',
        'bonus = keyed_uniform(seed, ids, at_position, "bonus")\n'
        '    residual = keyed_uniform(seed, ids, judged.positions, "accept", num_accepted)',
        (LOOP + "[rejection-fixed-3]", RULES),
    ),
    Mutation(
        "bonus-row",
        "the bonus is drawn from the row before",
        "engine/verify.py",
        "rows = torch.from_numpy(judged.row_starts + num_accepted)",
        "rows = torch.from_numpy(judged.row_starts + np.maximum(num_accepted - 1, 0))",
        (RULES, VERIFY + "test_the_rules_have_the_law_of_the_target"),
    ),
    Mutation(
        "draft-temperature",
        "drafts are drawn at twice the temperature that they are judged at",
        "engine/drafters/choose.py",
        "return draw(law, keyed_uniform(",
        "return draw(law.sqrt(), keyed_uniform(",
        (LOOP + "[rejection-fixed-3]", LOOP + "[block-fixed-3]"),
    ),
    Mutation(
        "block-mass",
        "block verification sums what is left over at the row of the token itself",
        "engine/verify.py",
        "rest = judged.excess(requests, depths, weights[requests, depths], tokens)",
        "rest = judged.excess(requests, depths - 1, weights[requests, depths], tokens)",
        (RULES, VERIFY + "test_the_rules_have_the_law_of_the_target"),
    ),
    Mutation(
        "own-token",
        "the confidence of a draft is made from the draft itself",
        "engine/drafters/heads.py",
        "judge.estimate(drafter, hidden[:, slot], embedding, logits)",
        "judge.estimate(\n"
        "            drafter, hidden[:, slot], drafter.previous_embedding(drafter.draft_token_ids[index]), logits\n"
        "        )",
        (
            EXACTNESS + "test_a_threshold_may_not_see_one_slot_further",
            EXACTNESS + "test_a_confidence_is_made_before_its_token",
        ),
    ),
    Mutation(
        "no-stop",
        "Algorithm 1 goes on to the best prefix",
        "policy.py",
        "num_admitted = rises.size if rises.all() else int(np.argmin(rises))",
        "num_admitted = int(np.argmax(throughput))",
        (EXACTNESS + "test_appendix_a", EXACTNESS + "test_no_honest_policy_changes_its_mind"),
    ),
    Mutation(
        "draft-key",
        "draft numbers are keyed by absolute position",
        "engine/drafters/choose.py",
        'keyed_uniform(params.seed, request_ids, anchors, "draft", slot)',
        'keyed_uniform(params.seed, request_ids, anchors + 1 + slot, "draft")',
        (EXACTNESS + "test_block_verification_of_many", EXACTNESS + "test_blocks_that_overlap_draw_on_their_own"),
    ),
    Mutation(
        "coupled-position",
        "a coupled drafter races with the noise of the position before",
        "engine/drafters/choose.py",
        "request_ids, anchors + 1 + slot, token_ids)",
        "request_ids, anchors + slot, token_ids)",
        (EXACTNESS + "test_a_coupled_drafter_with_the_targets_law_is_always_right",),
    ),
    Mutation(
        "replayed-ratio",
        "dense anchors accept the output's token with min(1, p/q)",
        "engine/conditional.py",
        "(u * p_y[:, slot] < q_y[:, slot])",
        "(u * q_y[:, slot] < p_y[:, slot])",
        (
            EXACTNESS + "test_dense_blocks_have_the_law_of_the_drafter",
            EXACTNESS + "test_dense_blocks_have_their_law_given_the_output",
        ),
    ),
    Mutation(
        "lag",
        "a lagged budget lets the current confidences in",
        "policy_ranked.py",
        "lagged = self._lagged(load.request_ids, draft_len)",
        "self.history.append((load.request_ids, survival.copy()))\n"
        "        lagged = self._lagged(load.request_ids, draft_len)",
        (
            EXACTNESS + "test_no_honest_policy_changes_its_mind",
            "tests/test_policy_zoo.py::test_lagged_is_its_definition",
        ),
    ),
    Mutation(
        "guard",
        "policies that peek run under every mode",
        "loop.py",
        "if self.biased and not allow_biased:",
        "if False:",
        (EXACTNESS + "test_a_policy_that_peeks_is_refused_live",),
    ),
    Mutation(
        "kept-drafts",
        "dense anchors keep drafts that were not verified live",
        "engine/conditional.py",
        "list(draft_tokens) if rejected else list(draft_tokens[:verify_len])",
        "list(draft_tokens)",
        (EXACTNESS + "test_a_recording_in_rejection_mode_replays_another_policy",),
    ),
    Mutation(
        "tree-law",
        "a rejected child stays in the drafter's law",
        "tree_accept.py",
        "q_rest[rows, tokens] = 0.0",
        "q_rest[rows, tokens] = q[rows, tokens]",
        ("tests/test_tree_laws.py::test_one_more_node_changes_nothing_on_average",),
    ),
    Mutation(
        "tree-walk",
        "the walk down a tree takes a child that was not verified",
        "tree_accept.py",
        "matches = verified & (tree.parents == here[:, None]) &",
        "matches = (tree.parents == here[:, None]) &",
        ("tests/test_tree.py::test_the_walk_down_and_the_places_of_the_output",),
    ),
    Mutation(
        "tree-told",
        "the survival of a node is raised by what stands behind it",
        "tree.py",
        "np.minimum.accumulate(survival, axis=-1)",
        "np.maximum.accumulate(survival[..., ::-1], axis=-1)[..., ::-1]",
        ("tests/test_tree.py::test_what_a_policy_sees_never_rises_and_looks_back_only",),
    ),
    Mutation(
        "tree-mask",
        "a node sees nodes of its tree that are not above it",
        "engine/attention.py",
        "np.where(real, parents[:, node] + 1, 0)",
        "np.where(real, node, 0)",
        (ROWS, LIVE + "test_the_output_is_that_of_plain_decoding"),
    ),
    Mutation(
        "tree-position",
        "a node's position is its place in the cache",
        "engine/attention.py",
        "self.places if self.tree is None else index_tensor[3]",
        "self.places",
        (ROWS,),
    ),
    Mutation(
        "tree-compaction",
        "the accepted path stays where it was",
        "engine/kv_cache.py",
        "if not row.size:",
        "if row.size:",
        (ROWS, LIVE + "test_the_output_is_that_of_plain_decoding"),
    ),
    Mutation(
        "tree-features",
        "the drafter is told what the target knew at other nodes",
        "engine/executor.py",
        "rows[:, 1:] = 1 + path[:, : rows.shape[1] - 1]",
        "pass",
        (LIVE + "test_a_recording_replays_as_it_was_and_at_other_policies",),
    ),
    Mutation(
        "tree-draws",
        "the survival of a drawn node looks at its token",
        "engine/drafters/candidates.py",
        "law.topk(num, dim=-1).values.double()",
        "law.gather(-1, index).double()",
        (LIVE + "test_the_survival_of_a_drawn_node_does_not_look_at_it",),
    ),
    Mutation(
        "tree-places",
        "a replay accepts the node behind the last one that was verified",
        "simulate/tree_replay.py",
        "< verify_lens[:, None]).sum",
        "<= verify_lens[:, None]).sum",
        ("tests/test_tree_replay.py::test_a_replay_has_the_rounds_of_a_live_run_of_that_shape",),
    ),
)


def copy_tree(folder: Path) -> None:
    """Copy the working files, tracked and untracked."""
    listing = ["git", "ls-files", "-co", "--exclude-standard", "--", *COPIED]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        sys.exit(f"mutations: git cannot list the files of {ROOT}: {listed.stderr.strip()}")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def environment(folder: Path) -> dict[str, str]:
    """Variables under which the copy is what is imported; no bytecode, which could be of the text before."""
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def mutated(folder: Path, mutation: Mutation) -> str:
    """The text of a mutation's file in the copy, edited."""
    text = (folder / "dspark_sim" / mutation.file).read_text()
    if (found := text.count(mutation.old)) != 1:
        sys.exit(
            f"mutations: {mutation.name} looks for {mutation.old!r} in dspark_sim/{mutation.file} and finds it "
            f"{found} times, not once; bring the edit up to date"
        )
    return text.replace(mutation.old, mutation.new)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether the tests pass on the copy, and which one failed first."""
    command = [sys.executable, "-m", "pytest", *tests, "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False, f"no end within {LIMIT_SECONDS} s"
    failed = [line[7:].split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if done.returncode == 0:
        return True, ""
    if done.returncode != 1 or not failed:
        sys.exit(f"mutations: pytest did not get as far as a verdict:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return False, failed[0].partition("::")[2]


def check_import(folder: Path) -> None:
    """End unless Python imports the copy."""
    command = [sys.executable, "-c", "import dspark_sim; print(dspark_sim.__file__)"]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    if Path(done.stdout.strip()) != folder / "dspark_sim" / "__init__.py":
        sys.exit(f"mutations: Python imports {done.stdout.strip() or done.stderr[-500:]}, not the copy in {folder}")


def main() -> int:
    """Run the chosen mutations; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [mutation.name for mutation in MUTATIONS]
    parser.add_argument("--only", metavar="NAME", choices=names, help=f"one of {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="name the mutations and run nothing")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in (None, mutation.name)]
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name:18} {mutation.what} (dspark_sim/{mutation.file})")
        return 0
    lines, survived = [], 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as place:
        folder = Path(place).resolve()
        copy_tree(folder)
        check_import(folder)
        texts = [mutated(folder, mutation) for mutation in chosen]
        with tqdm(total=len(chosen) + 1, unit="run", desc="unchanged") as bar:
            every = tuple(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
            passed, failed = run_tests(folder, every)
            if not passed:
                sys.exit(f"mutations: {failed} fails without any edit; mend it first")
            bar.update()
            for mutation, text in zip(chosen, texts, strict=True):
                bar.set_description(mutation.name)
                path = folder / "dspark_sim" / mutation.file
                before, start = path.read_text(), perf_counter()
                path.write_text(text)
                passed, failed = run_tests(folder, mutation.tests)
                path.write_text(before)
                survived += passed
                seconds = perf_counter() - start
                lines.append(f"{mutation.name:18} {'SURVIVED' if passed else f'caught by {failed}'} ({seconds:.0f} s)")
                bar.update()
    print("\n".join(lines))
    print(f"{len(chosen) - survived} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
