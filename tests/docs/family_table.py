"""Make the table of docs/family.md from the records of the models."""

from __future__ import annotations

from phi3_lora.models.family import FAMILY, FamilyMember

COLUMNS = (
    *("Model", "Hidden", "Layers", "Heads (key-value)", "Fused rows q + k + v", "Vocabulary"),
    *("Context", "RoPE", "Window", "Rotated", "Tied head", "Template", "Stops at", "Pads with"),
)


def row(member: FamilyMember) -> list[str]:
    """Return the cells of one model."""
    is_long = member.rope == "longrope"
    names = ", ".join(name.removeprefix("microsoft/") for name in member.hub_ids)
    rope = f"LongRoPE from {member.original_context:,}" if is_long else f"{member.rope_theta:,.0f}"
    return [
        names,
        f"{member.hidden_size:,}",
        str(member.num_hidden_layers),
        f"{member.num_attention_heads} ({member.num_key_value_heads})",
        " + ".join(map(str, member.fused_rows["qkv_proj"])),
        f"{member.vocab_size:,}",
        f"{member.context:,}",
        rope,
        f"{member.sliding_window:,}" if member.sliding_window else "-",
        f"{member.partial_rotary_factor:.0%}",
        "yes" if member.tie_word_embeddings else "no",
        member.template,
        " ".join(f"`{token}`" for token in member.stop_tokens),
        f"`{member.pad_token}`",
    ]


def table() -> str:
    """Return the table as Markdown, with bars inside tokens escaped."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *(row(member) for member in FAMILY)]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )
