"""Training text without a data set: the target writes the user's question, then answers it.

The chat template's opening of a user turn is a prompt that an instruct model continues with a question; a system
prompt steers it to a domain and topic. The question is then put to the model in the ordinary way. Answers are
drawn at temperature 0 and 1 in turn, so that a drafter meets both kinds of text. Output: one Parquet file (see
`corpus`), deduplicated by question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from dspark_sim.engine.attention import RaggedBatch
from dspark_sim.engine.kv_cache import SlotCache
from dspark_sim.engine.models import EMBEDDED, Target, load_target
from dspark_sim.errors import UserError, explain_os_errors
from dspark_sim.training.corpus import SCHEMA, write_corpus

_STEERING = {
    "math": "You are talking to a student. The student asks you to solve one {form} about {topic}, with numbers.",
    "code": "You are a programming assistant. The user asks you for {form} about {topic}.",
    "chat": "You are a helpful assistant. The user asks you for {form} about {topic}.",
}
_FORMS = {
    "math": ("word problem", "short calculation", "equation", "step by step problem", "problem with an explanation"),
    "code": ("a short Python function", "an explanation of code", "a bug fix", "a shell command", "an SQL query"),
    "chat": ("advice", "an explanation", "a short story", "a list of ideas", "an e-mail", "a summary", "an opinion"),
}
_TOPICS = {
    "math": "money,time,distance and speed,fractions,percentages,geometry,ages,averages,ratios,sharing,cooking,sports,"
    "probability,units,area,shopping,trains,work rates,sequences,linear equations",
    "code": "lists,strings,dictionaries,files,dates,sorting,recursion,classes,numbers,text parsing,web requests,"
    "databases,tests,errors,loops,matrices,graphs,random numbers,regular expressions,command line tools",
    "chat": "travel,food,health,work,school,friends,family,books,music,weather,pets,gardening,history,science,"
    "technology,sleep,sports,hobbies,money,holidays,moving house,learning languages,nature,writing",
}


@dataclass(frozen=True)
class SynthesisConfig:
    """Let the target write questions and answers to train drafters on.

    Parameters
    ----------
    out
        Parquet file to write.
    target
        Target that writes and answers.
    num_tokens
        Stop when the answers hold so many tokens.
    batch_size
        Conversations written side by side.
    max_question_tokens, max_answer_tokens
        Longest question and answer.
    dtype, device
        Of the target.
    seed
        Of the sampling.
    """

    out: str = "runs/synthesis.parquet"
    target: str = EMBEDDED
    num_tokens: int = 300_000
    batch_size: int = 64
    max_question_tokens: int = 96
    max_answer_tokens: int = 256
    dtype: str = "bfloat16"
    device: str = "auto"
    seed: int = 0


def synthesise(config: SynthesisConfig) -> Path:
    """Write a file of conversations; each wave's are on disk before the next starts.

    Raises
    ------
    UserError
        If the file exists already or cannot be written.
    """
    path = Path(config.out)
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose another file")
    target = load_target(config.target, dtype=config.dtype, device=config.device)
    generator = torch.Generator(target.device).manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    seen: set[str] = set()
    total = wave = 0
    with explain_os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.waves")
        with (
            pq.ParquetWriter(partial, SCHEMA) as writer,
            tqdm(total=config.num_tokens, unit="token", unit_scale=True, desc="synthesis") as bar,
        ):
            while total < config.num_tokens:
                rows = _wave(target, config, rng, generator, seen, temperature=float(wave % 2))
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                count = sum(len(row["tokens"]) - row["prompt_len"] for row in rows)
                total, wave = total + count, wave + 1
                bar.update(count)
        write_corpus(pq.read_table(partial), path, {"config": asdict(config)})
        partial.unlink()
    return path


def _wave(
    target: Target,
    config: SynthesisConfig,
    rng: np.random.Generator,
    generator: torch.Generator,
    seen: set[str],
    temperature: float,
) -> list[dict]:
    stop = target.eos_token_ids
    domains = [("math", "code", "chat")[index % 3] for index in range(config.batch_size)]
    openings = []
    for domain in domains:
        form, topic = rng.choice(_FORMS[domain]), rng.choice(_TOPICS[domain].split(","))
        openings.append(_opening(target, _STEERING[domain].format(form=form, topic=topic)))
    written = generate_wave(target, openings, config.max_question_tokens, 1.0, 0.95, stop, generator)
    questions: list[tuple[str, str]] = []
    for domain, tokens in zip(domains, written, strict=True):
        text = target.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        if tokens[-1] in stop and len(tokens) >= 6 and text not in seen:
            seen.add(text)
            questions.append((domain, text))
    prompts = [target.encode(text) for _, text in questions]
    answers = generate_wave(target, prompts, config.max_answer_tokens, temperature, 1.0, stop, generator)
    return [
        {"domain": domain, "temperature": temperature, "prompt_len": len(prompt), "tokens": prompt + answer}
        for (domain, _), prompt, answer in zip(questions, prompts, answers, strict=True)
    ]


def _opening(target: Target, system: str) -> list[int]:
    """The chat template up to where the user's text starts."""
    mark = "\u241e"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": mark}]
    text = target.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    return list(target.tokenizer(text.partition(mark)[0], add_special_tokens=False).input_ids)


@torch.inference_mode()
def generate_wave(
    target: Target,
    prompts: Sequence[list[int]],
    max_tokens: int,
    temperature: float,
    top_p: float,
    stop: frozenset[int],
    generator: torch.Generator,
) -> list[list[int]]:
    """Continue all prompts side by side until each has a stop token or `max_tokens` tokens.

    A fixed batch for throughput: a request that ends early keeps its place. Returns the new tokens, the stop token
    included.
    """
    config, device = target.config, target.device
    lens = np.array([len(prompt) for prompt in prompts])
    cache = SlotCache(
        config.num_hidden_layers,
        len(prompts),
        config.num_key_value_heads,
        int(lens.max()) + max_tokens,
        target.head_dim,
        dtype=target.dtype,
        device=device,
    )
    slots = np.arange(len(prompts))
    ends = torch.tensor(sorted(stop), device=device)
    flat = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    batch = RaggedBatch(cache, slots, np.zeros_like(lens), lens, device)
    rows = torch.from_numpy(np.cumsum(lens) - 1).to(device)
    new: list[torch.Tensor] = []
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(max_tokens):
        logits, _ = target.forward(flat, batch, rows)
        flat = _choose(logits, temperature, top_p, generator)
        new.append(flat)
        done |= torch.isin(flat, ends)
        if step % 16 == 15 and bool(done.all()):
            break
        batch = RaggedBatch(cache, slots, lens + step, np.ones_like(lens), device)
        rows = torch.arange(len(prompts), device=device)
    columns = torch.stack(new, dim=1).tolist()
    return [_until(row, stop) for row in columns]


def _choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> torch.Tensor:
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probs = (logits.float() / temperature).softmax(dim=-1)
    if top_p < 1.0:
        # Only the question needs a cut tail, and 256 candidates hold it.
        top, index = probs.topk(256, dim=-1)
        top = top.masked_fill(top.cumsum(dim=-1) - top >= top_p, 0.0)
        return index.gather(1, torch.multinomial(top, 1, generator=generator))[:, 0]
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def _until(row: list[int], stop: frozenset[int]) -> list[int]:
    end = next((index for index, token in enumerate(row) if token in stop), len(row) - 1)
    return row[: end + 1]
