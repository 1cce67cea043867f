"""Tiny random Phi-3 folders and documents, made with numpy only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from phi3_lora.adapters.initialization import initial_weights
from phi3_lora.adapters.names import lora_a_name, lora_b_name
from phi3_lora.data.chat.tokenizer import Document
from phi3_lora.engine.lora_spec import LoraSpec
from phi3_lora.models.config import ModelConfig
from phi3_lora.models.config_json import read_model_config
from phi3_lora.models.family import FamilyMember
from phi3_lora.storage.safetensors import encode

MARKERS = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def write_tokenizer(
    folder: Path,
    markers: Sequence[str] = MARKERS,
    template: str = TEMPLATE,
    *,
    eats_space: bool = True,
) -> None:
    """Write a tokenizer of bytes and markers; markers strip white space after them by default."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(m, special=True, normalized=False, rstrip=eats_space and m != markers[0])
            for m in markers
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": markers[0], "pad_token": markers[0], "chat_template": template}
    config["bos_token"] = markers[0]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def tiny_config(**changes: Any) -> dict[str, Any]:
    """Return the config.json of a 2-layer Phi-3, with RoPE keys of both styles."""
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "bos_token_id": 256,
        "eos_token_id": 256,
        "pad_token_id": 256,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    return {**config, **changes}


def member_config(member: FamilyMember, **changes: Any) -> dict[str, Any]:
    """Return a config.json with the shape of a published model and invented LongRoPE factors."""
    config = tiny_config(
        vocab_size=member.vocab_size,
        hidden_size=member.hidden_size,
        intermediate_size=member.intermediate_size,
        num_hidden_layers=member.num_hidden_layers,
        num_attention_heads=member.num_attention_heads,
        num_key_value_heads=member.num_key_value_heads,
        max_position_embeddings=member.context,
        original_max_position_embeddings=member.original_context,
        sliding_window=member.sliding_window,
        rope_theta=member.rope_theta,
        partial_rotary_factor=member.partial_rotary_factor,
        tie_word_embeddings=member.tie_word_embeddings,
    )
    if member.rope == "longrope":
        pairs = int(member.head_dim * member.partial_rotary_factor) // 2
        config["rope_scaling"] = {
            "type": "longrope",
            "short_factor": np.linspace(1.0, 1.05, pairs).tolist(),
            "long_factor": np.geomspace(1.0, 64.0, pairs).tolist(),
        }
    return {**config, **changes}


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Return weights whose logits have a standard deviation of about 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            value = rng.normal(1.0, 0.1, shape)
        elif "embed" in name:
            scale = shape[1] ** -0.5 if config.tie_word_embeddings else 1.0
            value = rng.normal(0.0, scale, shape)
        else:
            value = rng.normal(0.0, shape[1] ** -0.5, shape)
        weights[name] = value.astype(np.float32)
    return weights


def write_model(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a complete model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(**changes)))
    write_tokenizer(folder)
    weights = random_weights(read_model_config(folder), seed)
    (folder / "model.safetensors").write_bytes(encode(weights))
    return folder


def random_documents(lengths: list[int], *, seed: int = 0, vocab_size: int = 264) -> list[Document]:
    """Return documents of random ids; about the last half of each is supervised."""
    rng = np.random.default_rng(seed)
    documents = []
    for i, length in enumerate(lengths):
        supervised = np.zeros(length, dtype=bool)
        supervised[max(1, length // 2) :] = True
        tokens = rng.integers(0, vocab_size, length).astype(np.int32)
        documents.append(Document(tokens, supervised, f"random:{i + 1}"))
    return documents


def random_adapter(shapes: dict[str, tuple[int, int]], *, r: int, seed: int = 0) -> dict:
    """Return random A and B, since with B = 0 the gradient of A is exactly 0."""
    rng = np.random.default_rng(seed)
    weights = {}
    for module, (out_features, in_features) in shapes.items():
        a = rng.normal(0, in_features**-0.5, (r, in_features))
        b = rng.normal(0, 0.3 * r**-0.5, (out_features, r))
        weights[lora_a_name(module)] = a.astype(np.float32)
        weights[lora_b_name(module)] = b.astype(np.float32)
    return weights


def lora_spec(config: ModelConfig, *, r: int = 4, scaling: float = 2.0, dropout: float = 0.0):
    """Return LoRA on every linear layer."""
    return LoraSpec.uniform(config.linear_shapes(), r=r, scaling=scaling, dropout=dropout)


def start_weights(shapes: Mapping[str, tuple[int, int]], *, r: int, seed: int) -> dict:
    """Return the starting values of training, with LoRA on every given layer."""
    return initial_weights(LoraSpec.uniform(shapes, r=r, scaling=1.0), shapes, seed=seed)


def chat(question: str, answer: str) -> dict[str, Any]:
    """Return a row of a chat file."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
