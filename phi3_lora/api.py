"""The Python API: train a configuration, load a model with an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_lora.adapters.adapter import Adapter
    from phi3_lora.config.schema import RunConfig
    from phi3_lora.data.options import LossOn, OnBadRow
    from phi3_lora.data.rows.conversation import Message
    from phi3_lora.data.sources.source import Source
    from phi3_lora.engine.protocol import Engine
    from phi3_lora.inference.base_model import BaseModel
    from phi3_lora.inference.evaluation import Evaluation
    from phi3_lora.training.observer import Observer
    from phi3_lora.training.run import TrainResult


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    observer: Observer | None = None,
) -> TrainResult:
    """Fine-tune and write the run folder.

    Args:
        config: a RunConfig, the same as a mapping, or the path of a YAML file.
        resume: go on from the newest whole checkpoint of the run folder.
        observer: told of each event; the default logs notes as warnings.

    Raises:
        Phi3LoraError: with what is wrong and what to do.
    """
    from phi3_lora.config.load import RunSettings, load_settings
    from phi3_lora.config.schema import RunConfig
    from phi3_lora.training.observer import LoggingObserver
    from phi3_lora.training.run import train as run_training

    if isinstance(config, (str, Path)):
        settings = load_settings(config_file=Path(config))
    elif isinstance(config, RunConfig):
        settings = RunSettings(config, [])
    else:
        settings = load_settings(base=config)
    observer = observer or LoggingObserver()
    for note in settings.notes:
        observer.note(note)
    return run_training(settings.config, resume=resume, observer=observer)


class LoadedModel:
    """A base model with its adapter on a device; use it as a context manager or close it."""

    def __init__(self, base: BaseModel, engine: Engine, adapter: Adapter | None) -> None:
        self.base = base
        self.engine = engine
        self.adapter = adapter

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """The model's answer to a user message or a conversation."""
        (answer,) = self.generate_batch(
            [prompt], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        return answer

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """The model's answer to each prompt, the same as alone, in less time."""
        from phi3_lora.engine.request import Sampling

        tokenizer = self.base.tokenizer
        ids = [
            tokenizer.encode_prompt([{"role": "user", "content": p}] if isinstance(p, str) else p)
            for p in prompts
        ]
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_ids=self.base.stop_ids,
        )
        answers: list[list[int]] = [[] for _ in ids]
        for index, token in self.engine.generate(ids, sampling):
            if token not in sampling.stop_ids:
                answers[index].append(token)
        return [tokenizer.decode(answer) for answer in answers]

    def score(
        self,
        data: str | Source,
        *,
        max_length: int = 2048,
        on_bad_row: OnBadRow = "error",
        loss_on: LossOn = "assistant",
    ) -> Evaluation:
        """Loss, perplexity and token accuracy on data.

        Args:
            data: a file, a folder, a pattern, a data set of the hub, or demo.
            max_length: tokens a row may have; longer ones are dropped and counted.
            on_bad_row: error, or skip, which counts and names the rows that cannot be used.
            loss_on: assistant (every answer), last (the last answer) or all tokens; a row's own
                weights win.

        Raises:
            ConfigError: when loss_on or on_bad_row is none of its values.
            DataError: when the data cannot be used.
        """
        from phi3_lora.data.documents.encoding import Encoding
        from phi3_lora.inference.evaluation import evaluate
        from phi3_lora.inference.scoring_data import load_to_score
        from phi3_lora.training.observer import LoggingObserver

        dataset, _ = load_to_score(
            data,
            self.base.tokenizer,
            Encoding(
                max_length=max_length,
                context=self.base.config.max_position_embeddings,
                loss_on=loss_on,
                on_bad_row=on_bad_row,
            ),
            note=LoggingObserver().note,
        )
        return evaluate(self.engine, dataset.documents)

    def save(self, folder: str | Path, *, to: str = "both") -> None:
        """Write the adapter as a folder that PEFT and mlx-lm load.

        Raises:
            AdapterError: when there is no adapter, the layout cannot hold it, or the folder holds
                something else.
        """
        from phi3_lora.adapters.formats.folder import check_replaceable, write_adapter_folder
        from phi3_lora.errors import AdapterError

        if self.adapter is None:
            raise AdapterError("the model was loaded without an adapter: there is nothing to save")
        check_replaceable(Path(folder))
        write_adapter_folder(Path(folder), self.adapter, to=to)

    def close(self) -> None:
        """Free the model."""
        self.engine.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load(
    model: str,
    *,
    adapter: str | Path | None = None,
    backend: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
    revision: str | None = None,
) -> LoadedModel:
    """Load a base model, with an adapter of either layout or bare.

    Args:
        model: a folder, a hub id, or demo.
        adapter: an adapter folder.
        backend: mlx, cuda or auto.
        device: auto, cpu or gpu.
        dtype: float32, bfloat16, float16 or auto.
        quantize: none, 4bit, 8bit, nf4 (cuda) or mlx-affine (mlx), of the base model.
        revision: branch, tag or commit of a hub id.

    Raises:
        Phi3LoraError: with what is wrong and what to do.
    """
    from phi3_lora.inference.base_model import look_at_model
    from phi3_lora.inference.loading import load_adapter, open_engine
    from phi3_lora.training.observer import LoggingObserver

    base = look_at_model(model, revision, quantize=quantize)
    weights = None if adapter is None else load_adapter(str(adapter), base)
    opened = open_engine(
        base,
        backend=backend,
        device=device,
        dtype=dtype,
        adapter=weights,
        note=LoggingObserver().note,
    )
    return LoadedModel(base, opened.engine, weights)
