"""The README.md of an adapter folder: a model card with the facts of its run."""

from __future__ import annotations

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.config.schema import RunConfig
from phi3_lora.inference.evaluation import Evaluation
from phi3_lora.models.family import peer_differences
from phi3_lora.training.open_run import OpenRun
from phi3_lora.training.plan.facts import PlanFacts
from phi3_lora.training.progress import Progress


def model_card(
    run: OpenRun, adapter: Adapter, progress: Progress, evaluation: Evaluation | None
) -> str:
    """Return the model card in Markdown, with the YAML head that the hub reads.

    Args:
        run: the run.
        adapter: the adapter that the card describes.
        progress: the progress of the run.
        evaluation: on the validation data, for the best adapter.
    """
    config, plan = run.prepared.config, run.prepared.plan
    rows = _rows(run, adapter, progress)
    rows["Steps"] = f"{progress.step:,} of {plan.total_steps:,}"
    if progress.last_loss is not None:
        rows["Training loss"] = f"{progress.last_loss:.4f} nats per supervised token"
    if evaluation is not None:
        rows["Validation loss"] = f"{evaluation.loss:.4f} (perplexity {evaluation.perplexity:.3f})"
    elif progress.best_eval_loss is not None:
        rows["Best validation loss"] = f"{progress.best_eval_loss:.4f}"
    differences = "".join(
        f"- {tool} {text}.\n" for tool, text in peer_differences(run.base.files.config).items()
    )
    if differences:
        differences = (
            "\nOther tools run this base model in ways of their own, which changes what the "
            f"adapter sees:\n\n{differences}"
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"---\n{_head(config)}\n---\n\n# LoRA adapter\n\n"
        f"Trained with phi3-lora.\n\n| | |\n|---|---|\n{table}\n\n"
        "Of the weights, `adapter_model.safetensors` is PEFT's file and `adapters.safetensors` "
        f"mlx-lm's; both tools read `adapter_config.json`.\n{differences}"
    )


def _head(config: RunConfig) -> str:
    # The import takes 0.1 s, which only a run that saves an adapter should pay.
    from huggingface_hub.repocard_data import ModelCardData

    is_hub_id = "/" in config.model and not config.model.startswith((".", "/", "~"))
    data = ModelCardData(
        library_name="peft",
        tags=["lora", "phi-3"],
        base_model=config.model if is_hub_id else None,
    )
    return data.to_yaml(original_order=["library_name", "tags", "base_model"])


def _rows(run: OpenRun, adapter: Adapter, progress: Progress) -> dict[str, str]:
    """Return the rows of the table that do not depend on the losses."""
    config, environment, facts = run.prepared.config, run.environment, run.prepared.facts()
    training = config.training_config
    return {
        "Base model": f"`{config.model}`",
        "Quantised": f"`{config.quantize}`",
        "Base identity (sha256)": f"`{run.identity.model_identity}`",
        "Training data": f"{_sources(config)}: {_amount(facts.plan, progress)}",
        "Documents a step": f"{facts.documents_per_step}",
        "Plan hash (sha256)": f"`{run.plan_hash(progress)}`",
        "Rank, alpha, scale": f"{adapter.r}, {adapter.lora_alpha:g}, {adapter.scaling:g}"
        + ("" if adapter.is_uniform else " (most modules; others in adapter_config.json)"),
        "Trainable parameters": f"{facts.num_trainable_parameters:,}",
        "Learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type}",
        "Seed": str(training.seed),
        "Trained on": f"{environment.backend}, {environment.device}, {environment.dtype}",
        "Versions": ", ".join(f"{k} {v}" for k, v in (environment.versions or {}).items()),
    }


def _amount(plan: PlanFacts, progress: Progress) -> str:
    if plan.num_documents is None:
        return f"streamed, {progress.tokens:,} tokens of it"
    return f"{plan.num_documents:,} documents, {plan.loss_tokens:,} supervised tokens"


def _sources(config: RunConfig) -> str:
    names = [config.data.train, *(source.path for source in config.data.sources)]
    return ", ".join(f"`{name}`" for name in names if name)
