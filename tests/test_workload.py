from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dspark_sim.errors import UserError
from dspark_sim.workload import DOMAINS, ClosedLoop, Poisson, bundled_prompts, read_prompts, repeat


@pytest.mark.parametrize("rate", [0.01, 3.0, 5000.0])
def test_poisson_gaps_are_exponential(rate: float) -> None:
    arrivals = Poisson(rate, seed=1).arrivals(5000)
    gaps = np.diff(arrivals, prepend=0.0)
    assert (gaps > 0).all()
    assert stats.kstest(gaps, "expon", args=(0, 1 / rate)).pvalue > 0.01
    # No memory: neighbouring gaps are uncorrelated (standard error 1/sqrt n).
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / np.sqrt(gaps.size)


def test_poisson_counts_are_poisson() -> None:
    arrivals = Poisson(2.0, seed=5).arrivals(6000)
    counts = np.histogram(arrivals, bins=np.arange(0, 2500.0, 1.0))[0]
    # Variance over mean is 1 with standard error sqrt(2/n).
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=4 * np.sqrt(2 / counts.size))


def test_poisson_is_keyed_by_its_seed_and_extends() -> None:
    assert Poisson(2.0, 3).arrivals(5).tolist() == Poisson(2.0, 3).arrivals(9)[:5].tolist()
    assert Poisson(2.0, 3).arrivals(5).tolist() != Poisson(2.0, 4).arrivals(5).tolist()


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(UserError, match="rate is"):
        Poisson(rate)


@pytest.mark.parametrize("arguments", [(0,), (1, -1.0), (1, float("nan"))])
def test_impossible_closed_loops(arguments: tuple[int, float]) -> None:
    with pytest.raises(UserError, match=r"num_users is 0|think_seconds is"):
        ClosedLoop(*arguments)


def test_bundled_prompts_are_enough_and_unique() -> None:
    prompts = bundled_prompts()
    assert len({prompt.prompt_id for prompt in prompts}) == len(prompts)
    assert len({prompt.turns for prompt in prompts}) == len(prompts)
    for domain in DOMAINS:
        assert sum(prompt.domain == domain for prompt in prompts) >= 16
    assert [prompt.domain for prompt in bundled_prompts(per_domain=2)] == [*DOMAINS, *DOMAINS]
    assert {prompt.domain for prompt in bundled_prompts(["code"])} == {"code"}


def test_bundled_prompts_refuse_nonsense() -> None:
    with pytest.raises(UserError, match="unknown domain poems"):
        bundled_prompts(["poems"])
    with pytest.raises(UserError, match="zero prompts"):
        bundled_prompts(per_domain=0)


def test_reads_the_common_formats(tmp_path: Path) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_text(
        '{"prompt_id": "a", "domain": "math", "turns": ["one", "two"]}\n\n'
        '{"question_id": 81, "turns": ["line\u2028separator"]}\r\n{"prompt": "three"}\n',
        encoding="utf-8",
    )
    prompts = read_prompts(path)
    assert [prompt.prompt_id for prompt in prompts] == ["a", "81", "bench-0004"]
    assert [prompt.turns for prompt in prompts] == [("one", "two"), ("line\u2028separator",), ("three",)]
    assert [prompt.domain for prompt in prompts] == ["math", "bench", "bench"]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", '"turns"', "{}", '{"turns": []}', '{"turns": [" "]}', '{"turns": [1]}', '{"turns": "hello"}'],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl line 3 is not a prompt"):
        read_prompts(path)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prompt file"):
        read_prompts(tmp_path / "none.jsonl")
    path = tmp_path / "p.jsonl"
    for content, sentence in (
        (b"\n", "has zero prompts"),
        (b'{"prompt": "x", "prompt_id": "a"}\n' * 2, "twice"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            read_prompts(path)


def test_repeat() -> None:
    prompts = bundled_prompts(per_domain=1)
    assert list(repeat(prompts, 7)) == [*prompts, *prompts, prompts[0]]
    assert list(repeat(prompts, 2)) == prompts[:2]
