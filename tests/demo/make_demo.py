"""Make the built-in demo: a small pretrained Phi-3 base model and the chat data to tune it on.

    python tests/demo/make_demo.py --output phi3_lora/demo

writes ``model/`` (a checkpoint in the layout of the Hub) and ``data/`` (train.jsonl and
valid.jsonl) into the output folder; with ``--data-only`` it writes the data alone. The texts come
from ``world.py``. The base is trained from random weights on chats about orders, so that it reads
an order and answers questions on it; the data then asks for something it never saw, namely the
order as compact JSON. The run that made the files took 22 minutes on two CPU cores that had other
work too; at the speed of its undisturbed part it takes 11. The data alone takes less than a second
and is the same to the bit each time.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import world

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import Phi3ForCausalLM

TRAIN_ROWS = 1600
VALID_ROWS = 200
VALID_SEED, TRAIN_SEED, PRETRAINING_SEED, MODEL_SEED = 101, 102, 103, 104

DOCUMENTS = 160_000
TOKENIZER_DOCUMENTS = 20_000
VOCABULARY_SIZE = 1280
# How often the tokenizer's training text has each word of the world, so that most are one token.
WORD_REPEATS = 200
BATCH_TOKENS = 3072
POOL_BATCHES = 32
LEARNING_RATE = 3e-3
WARM_UP_STEPS = 100
# What a user writes is mostly chance; its tokens count less than what the model has to answer.
USER_WEIGHT = 0.2
THREADS = 2

END_OF_TEXT, END = "<|endoftext|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (END_OF_TEXT, ASSISTANT, SYSTEM, END, USER)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ARCHITECTURE = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 432,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 512,
    "sliding_window": None,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
}


def valid_facts() -> list[world.Facts]:
    """Return the facts of the validation rows, which no other text of the demo may tell."""
    return world.draw_distinct_facts(VALID_ROWS, VALID_SEED)


def write_json(path: Path, content: object) -> None:
    """Write an object as indented JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def write_data(folder: Path) -> None:
    """Write the rows of the fine-tuning task: train.jsonl and valid.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    valid = valid_facts()
    train = world.draw_distinct_facts(TRAIN_ROWS, TRAIN_SEED, avoid=set(valid))
    for name, facts, seed in (("train", train, TRAIN_SEED), ("valid", valid, VALID_SEED)):
        rows = world.chat_rows(facts, seed)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def render(document: str | world.Chat) -> str:
    """Return the text of a pretraining document, with the markers of the chat template."""
    if isinstance(document, str):
        return document + END_OF_TEXT
    turns = (f"<|{turn['role']}|>\n{turn['content']}{END}\n" for turn in document)
    return "".join(turns) + END_OF_TEXT


def train_tokenizer(documents: list[str | world.Chat]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with Phi-3's chat markers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(token, special=True, normalized=False, rstrip=token != END_OF_TEXT)
        for token in SPECIAL_TOKENS
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=special,
        # All 256 bytes, so that every text can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(world.WORDS) * WORD_REPEATS
    for document in documents:
        turns = [document] if isinstance(document, str) else [t["content"] for t in document]
        texts.extend(turns)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": ARCHITECTURE["max_position_embeddings"],
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", config)


def write_config(tokenizer: Tokenizer, folder: Path) -> dict[str, object]:
    """Write config.json and generation_config.json, and return the former."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_of_text)
    config = {**ARCHITECTURE, "vocab_size": tokenizer.get_vocab_size(), **ids}
    write_json(folder / "config.json", config)
    ids["eos_token_id"] = [end_of_text, tokenizer.token_to_id(END)]
    write_json(folder / "generation_config.json", ids)
    return config


def token_weights(ids: list[int], tokenizer: Tokenizer) -> list[float]:
    """Return the weight in the loss of each token of a document."""
    starts = {tokenizer.token_to_id(USER), tokenizer.token_to_id(SYSTEM)}
    end = tokenizer.token_to_id(END)
    weights, weight = [], 1.0
    for token in ids:
        weights.append(weight)
        if token in starts:
            weight = USER_WEIGHT
        elif token == end:
            weight = 1.0
    return weights


def make_batches(lengths: list[int], seed: int) -> list[list[int]]:
    """Group documents of similar length into batches of about ``BATCH_TOKENS`` tokens.

    Args:
        lengths: The number of tokens of each document.
        seed: The seed of the order of the batches.

    Returns:
        The batches, each a list of positions in ``lengths``; every document is in one of them.
    """
    rng = random.Random(seed)
    batches: list[list[int]] = []
    pool_size = POOL_BATCHES * BATCH_TOKENS * len(lengths) // sum(lengths)
    for start in range(0, len(lengths), pool_size):
        pool = range(len(lengths))[start : start + pool_size]
        made: list[list[int]] = [[]]
        for index in sorted(pool, key=lengths.__getitem__):
            if (len(made[-1]) + 1) * lengths[index] > BATCH_TOKENS:
                made.append([])
            made[-1].append(index)
        rng.shuffle(made)
        batches += made
    return batches


def stack(documents: list[list[int]], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Return the tokens of a batch and their weights in the loss, padded on the right."""
    import torch

    shape = (len(documents), max(len(ids) for ids in documents))
    tokens = torch.full(shape, tokenizer.token_to_id(END_OF_TEXT))
    weights = torch.zeros(shape)
    for row, ids in enumerate(documents):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = torch.tensor(token_weights(ids, tokenizer))
    return tokens, weights


def batch_loss(model: Phi3ForCausalLM, tokens: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of the next-token losses of a batch."""
    from torch.nn.functional import cross_entropy

    # The padding is on the right, where causal attention keeps it out of the other tokens.
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    scale = weights[:, 1:].flatten()
    return (losses * scale).sum() / scale.sum()


def pretrain(
    config: dict[str, object], tokenizer: Tokenizer, documents: list[str | world.Chat]
) -> Phi3ForCausalLM:
    """Train the base from random weights, once over all the documents."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.set_num_threads(THREADS)
    torch.manual_seed(MODEL_SEED)
    encoded = tokenizer.encode_batch([render(d) for d in documents], add_special_tokens=False)
    ids = [e.ids for e in encoded]
    batches = make_batches([len(i) for i in ids], MODEL_SEED)
    # The random weights have to be made in float32, whatever precision the file is to have.
    settings = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    model = Phi3ForCausalLM(Phi3Config(**settings)).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(batches)} steps")
    start, average = time.perf_counter(), None
    for step, batch in enumerate(batches):
        loss = batch_loss(model, *stack([ids[i] for i in batch], tokenizer))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, len(batches))
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        average = value if average is None else 0.98 * average + 0.02 * value
        if step % 50 == 0 or step == len(batches) - 1:
            seconds = time.perf_counter() - start
            print(f"step {step}  loss {average:.4f}  {seconds:.0f} s", flush=True)
    return model.eval()


def learning_rate_factor(step: int, steps: int) -> float:
    """Return the part of the peak learning rate at a step: a linear rise, then half a cosine."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    done = (step - WARM_UP_STEPS) / max(1, steps - WARM_UP_STEPS)
    return 0.5 * (1.0 + math.cos(math.pi * done))


def write_weights(model: Phi3ForCausalLM, folder: Path) -> None:
    """Write model.safetensors in bfloat16."""
    import torch
    from safetensors.torch import save

    weights = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))


def main() -> None:
    """Read the command line and make what it asks for."""
    parser = argparse.ArgumentParser(description="Make the demo's base model and chat data.")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--data-only", action="store_true", help="write the chat data alone")
    arguments = parser.parse_args()
    write_data(arguments.output / "data")
    if arguments.data_only:
        return
    avoid = set(valid_facts())
    documents = list(world.pretraining_documents(DOCUMENTS, PRETRAINING_SEED, avoid))
    folder = arguments.output / "model"
    tokenizer = train_tokenizer(documents[:TOKENIZER_DOCUMENTS])
    write_tokenizer(tokenizer, folder)
    config = write_config(tokenizer, folder)
    write_weights(pretrain(config, tokenizer, documents), folder)


if __name__ == "__main__":
    main()
