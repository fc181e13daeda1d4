"""A target and a drafter small enough that their laws are known, run by the real engine.

Both are real networks with random weights: a one-layer Llama over a few tokens and a block drafter with Markov and
confidence heads. Every prefix of a few tokens can be fed through the target, which gives the exact joint law of what
it emits; the engine's ragged batches, caches, keys and acceptance rules are the ones of the large models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch

from dspark_sim.engine.attention import ATTENTION_NAME, register_attention
from dspark_sim.engine.drafters import Drafter
from dspark_sim.engine.drafters.block import RaggedBlockDrafter
from dspark_sim.engine.drafters.block_model import BlockDrafter, BlockDrafterConfig
from dspark_sim.engine.executor import TorchExecutor
from dspark_sim.engine.kv_cache import SlotCache
from dspark_sim.engine.models import Target
from dspark_sim.engine.sampling import SamplingParams, probabilities
from dspark_sim.loop import DecodeLoop, Mode
from dspark_sim.policy import SpeculationPolicy
from dspark_sim.request import Request
from dspark_sim.scheduler import Scheduler, SchedulerConfig
from dspark_sim.trace import TraceRecorder
from dspark_sim.tree_shapes import TreeShape

BLOCK_SIZE = 3
_HIDDEN = 24
_MAX_LEN = 64
PROMPT = [1, 3, 2]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: for networks this small a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(eq=False)
class Toy:
    """A tiny target, a tiny drafter and room for a batch.

    Parameters
    ----------
    target, drafter
        Networks; the drafter may be replaced.
    max_num_seqs
        Requests in a batch.
    tree
        Shape of the drafts, fitted to the drafter; ``None`` drafts chains.
    """

    target: Target
    drafter: Drafter | None
    max_num_seqs: int
    cache: SlotCache
    tree: TreeShape | None = None

    @staticmethod
    def make(vocab_size: int = 4, *, max_num_seqs: int = 64, sharpness: float = 2.0, seed: int = 0) -> Toy:
        """Random weights; `sharpness` scales the target's logits, which the drafter shares."""
        from transformers import LlamaConfig, LlamaForCausalLM

        register_attention()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=_HIDDEN,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=_MAX_LEN,
                initializer_range=0.3,
                tie_word_embeddings=False,
                attn_implementation=ATTENTION_NAME,
            )
            model = LlamaForCausalLM(config).float().eval().requires_grad_(False)
            head = model.get_output_embeddings()
            head.weight.mul_(sharpness / (head.weight.norm(dim=1).mean() * _HIDDEN**0.5) * 2)
            model.generation_config.eos_token_id = None
            target = Target("toy", model, SimpleNamespace(eos_token_id=None))
            shape = BlockDrafterConfig(
                target="toy",
                hidden_size=_HIDDEN,
                vocab_size=vocab_size,
                block_size=BLOCK_SIZE,
                target_layer_ids=(-1, 0),
                mask_token_id=0,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=6,
                intermediate_size=16,
                rms_norm_eps=1e-5,
                markov_rank=8,
                enable_confidence_head=True,
            )
            network = BlockDrafter(shape)
            for parameter in network.parameters():
                if parameter.ndim == 2:
                    torch.nn.init.normal_(parameter, std=0.4)
            network = network.attach(target).float().eval().requires_grad_(False)
        cache = SlotCache(2, max_num_seqs, 2, _MAX_LEN, target.head_dim, dtype=target.dtype, device=target.device)
        drafter = RaggedBlockDrafter("toy", network, max_num_seqs, _MAX_LEN)
        return Toy(target, drafter, max_num_seqs, cache)

    def executor(self, mode: Mode, params: SamplingParams, *, with_draft_prob: bool = False) -> TorchExecutor:
        """A fresh executor for the one prompt."""
        return TorchExecutor(
            self.target,
            self.drafter,
            {"toy": PROMPT},
            self.cache,
            mode,
            params,
            with_draft_prob=with_draft_prob,
            tree=self.tree,
        )

    @one_thread()
    def decode(
        self,
        policy: SpeculationPolicy,
        mode: Mode,
        params: SamplingParams,
        *,
        num_requests: int,
        num_tokens: int,
        num_pages: int | None = None,
        allow_biased: bool = False,
        executor: TorchExecutor | None = None,
        recorder: TraceRecorder | None = None,
        lens: Sequence[int] | None = None,
        max_num_seqs: int | None = None,
    ) -> npt.NDArray[np.int64]:
        """Run requests for the one prompt through the real loop; returns their first tokens [N, num_tokens].

        `lens` gives requests lengths of their own (at least `num_tokens`), so that the batch's composition changes
        all the time.
        """
        executor = executor or self.executor(mode, params, with_draft_prob=policy.signal == "draft_prob")
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs or self.max_num_seqs,
            num_pages=num_pages or self.max_num_seqs * _MAX_LEN // 4,
            page_size=4,
            max_model_len=_MAX_LEN,
        )
        scheduler = Scheduler(config, executor.block_size)
        loop = DecodeLoop(executor, scheduler, policy, recorder, allow_biased=allow_biased)
        requests = [
            Request(number, "toy", "toy", len(PROMPT), num_tokens if lens is None else lens[number])
            for number in range(num_requests)
        ]
        for request in requests:
            loop.submit(request)
        now = 0.0
        while loop.has_work:
            now += loop.step(now)
            loop.finished.clear()
        return np.array([executor.outputs[request.request_id][:num_tokens] for request in requests])

    def law(self, params: SamplingParams, num_tokens: int) -> npt.NDArray[np.float64]:
        """Exact joint law of the first `num_tokens` tokens, flat [V ** num_tokens]."""
        size = self.target.config.vocab_size
        joint = np.ones(1)
        for length in range(num_tokens):
            paths = torch.tensor([[*PROMPT, *path] for path in product(range(size), repeat=length)])
            with torch.inference_mode():
                logits = self.target.model(input_ids=paths, use_cache=False).logits[:, -1]
            conditional = probabilities(logits, params).double().numpy()
            joint = (joint[:, None] * conditional).ravel()
        law: npt.NDArray[np.float64] = joint / joint.sum()
        return law
