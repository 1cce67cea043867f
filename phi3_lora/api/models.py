"""A loaded base model with or without an adapter, which generates, scores and saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack, overload

from phi3_lora.adapters.adapter import Adapter
from phi3_lora.adapters.formats.folder import check_replaceable, write_adapter_folder
from phi3_lora.api.options import AnyPath, Note, SamplingOptions, log_note
from phi3_lora.data.documents.encoding import Encoding
from phi3_lora.data.options import LossOn, OnBadRow
from phi3_lora.data.sources.in_memory import Data
from phi3_lora.engine.protocol import Engine
from phi3_lora.engine.request import Sampling
from phi3_lora.errors import AdapterError
from phi3_lora.inference import generation
from phi3_lora.inference.base_model import FoundModel
from phi3_lora.inference.evaluation import Answer, Evaluation, answer_conversations
from phi3_lora.inference.evaluation import evaluate as evaluate_documents
from phi3_lora.inference.generation import Generation, Prompt
from phi3_lora.inference.scoring_data import ToScore, load_to_score

Progress = Callable[[str, int, int], None]
"""A function that receives the stage (scoring or answering), the rows done, and all rows."""
AdapterLayout = Literal["peft", "mlx", "both"]


@dataclass(frozen=True, slots=True)
class EvaluationResult(Evaluation):
    """Scores of a model on data, and its answers if they were generated."""

    answers: tuple[Answer, ...] | None = None
    """Generated answers in the order of the rows; None when none were generated."""

    @property
    def exact_match(self) -> float | None:
        """Share of answers that equal the expected text; None without answers."""
        if self.answers is None:
            return None
        return sum(answer.is_exact for answer in self.answers) / max(1, len(self.answers))

    def to_dict(self) -> dict[str, Any]:
        """Return the scores by name, without the answers."""
        names = [field.name for field in dataclasses.fields(Evaluation)]
        figures = {name: getattr(self, name) for name in names}
        if self.answers is None:
            return figures
        return {**figures, "exact_match": self.exact_match, "num_answers": len(self.answers)}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationOptions:
    """Options for scoring a model."""

    generate: bool = False
    """Also generate the last answer of each row."""
    limit: int | None = None
    """Use the first rows only."""
    max_new_tokens: int = 256
    """Most tokens of a generated answer."""
    max_length: int = 2048
    """Most tokens of a row; longer rows are skipped and counted."""
    on_bad_row: OnBadRow = "error"
    loss_on: LossOn = "assistant"
    on_progress: Progress = lambda stage, done, total: None


class LoadedModel:
    """A base model and its adapter on a device. Close it, or use it as a context manager."""

    def __init__(
        self,
        base: FoundModel,
        engine: Engine,
        adapter: Adapter | None,
        note: Note = log_note,
    ) -> None:
        self.base = base
        self.engine = engine
        self.adapter = adapter
        self._note = note

    def __repr__(self) -> str:
        adapter = "no adapter" if self.adapter is None else f"adapter of rank {self.adapter.r}"
        return (
            f"<LoadedModel {self.base.name}, {adapter}, {self.engine.dtype} on "
            f"{self.engine.device_name}>"
        )

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[False] = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Prompt, *, stream: Literal[True], **sampling: Unpack[SamplingOptions]
    ) -> Iterator[str]: ...

    def generate(
        self, prompt: Prompt, *, stream: bool = False, **sampling: Unpack[SamplingOptions]
    ) -> str | Iterator[str]:
        """Answer a user's message or a conversation.

        Args:
            prompt: a user's message, or messages that end with one.
            stream: return an iterator over the pieces of the answer as they come.
            sampling: max_new_tokens (256), temperature (0) and seed (0).

        Raises:
            DataError: when the chat template cannot render the prompt, or the prompt is too long.
        """
        if not stream:
            return self._answers([prompt], sampling)[0].text
        ids = generation.encode_prompts(self.base.tokenizer, [prompt])
        return self._pieces(ids, sampling)

    def generate_batch(
        self, prompts: Sequence[Prompt], **sampling: Unpack[SamplingOptions]
    ) -> list[str]:
        """Answer prompts together, which is faster; each answer is the one to the prompt alone.

        Args:
            prompts: users' messages or conversations.
            sampling: as for generate.

        Raises:
            DataError: as for generate.
        """
        return [answer.text for answer in self._answers(prompts, sampling)]

    def score(
        self,
        data: Data,
        *,
        max_length: int = 2048,
        on_bad_row: OnBadRow = "error",
        loss_on: LossOn = "assistant",
    ) -> Evaluation:
        """Return the loss, perplexity and token accuracy on data.

        Args:
            data: a file, a folder, a pattern, a data set of the hub, or demo.
            max_length: most tokens of a row; longer rows are skipped and counted.
            on_bad_row: error, or skip to leave out and list the rows that cannot be used.
            loss_on: assistant (every answer), last (the last answer) or all tokens; weights in a
                row override it.

        Raises:
            ConfigError: when loss_on or on_bad_row has an unknown value.
            DataError: when the data cannot be used.
        """
        options = EvaluationOptions(max_length=max_length, on_bad_row=on_bad_row, loss_on=loss_on)
        return evaluate_documents(
            self.engine, rows_to_score(self.base, data, options, self._note).dataset.documents
        )

    def evaluate(
        self,
        data: Data,
        *,
        generate: bool = False,
        limit: int | None = None,
        max_new_tokens: int = 256,
        max_length: int = 2048,
        on_bad_row: OnBadRow = "error",
        loss_on: LossOn = "assistant",
    ) -> EvaluationResult:
        """Score the model on data, and optionally compare its own answers.

        Args:
            data: as for score.
            generate: also generate the last answer of each row, and count exact matches.
            limit: use the first rows only.
            max_new_tokens: most tokens of a generated answer.
            max_length: as for score.
            on_bad_row: as for score.
            loss_on: as for score.

        Raises:
            ConfigError: as for score.
            DataError: as for score.
        """
        options = EvaluationOptions(
            generate=generate,
            limit=limit,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            on_bad_row=on_bad_row,
            loss_on=loss_on,
        )
        return self.evaluate_rows(rows_to_score(self.base, data, options, self._note), options)

    def save(self, folder: AnyPath, *, to: AdapterLayout = "both") -> None:
        """Write the adapter as a folder that PEFT and mlx-lm load.

        Args:
            folder: a new or empty folder, or the folder of an adapter to replace.
            to: peft, mlx or both layouts.

        Raises:
            AdapterError: when there is no adapter, the layout cannot store it, or the folder holds
                other files.
        """
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

    def _sampling(self, options: SamplingOptions) -> Sampling:
        return Sampling(**options, stop_ids=self.base.stop_ids)

    def _answers(self, prompts: Sequence[Prompt], options: SamplingOptions) -> list[Generation]:
        ids = generation.encode_prompts(self.base.tokenizer, prompts)
        sampling = self._sampling(options)
        return generation.generate(self.engine, self.base.tokenizer, ids, sampling)

    def _pieces(self, ids: Sequence[Sequence[int]], options: SamplingOptions) -> Iterator[str]:
        sampling = self._sampling(options)
        for piece in generation.stream(self.engine, self.base.tokenizer, ids, sampling):
            if piece.text_delta:
                yield piece.text_delta

    def evaluate_rows(self, rows: ToScore, options: EvaluationOptions) -> EvaluationResult:
        """Score the model on rows that were read with rows_to_score."""
        documents = rows.dataset.documents
        advance = _counted("scoring", len(documents), options.on_progress)
        scores = evaluate_documents(self.engine, documents, advance)
        answers = None
        if options.generate:
            asked = rows.conversations
            advance = _counted("answering", len(asked), options.on_progress)
            sampling = self._sampling({"max_new_tokens": options.max_new_tokens})
            tokenizer = self.base.tokenizer
            answers = tuple(answer_conversations(self.engine, tokenizer, asked, sampling, advance))
        return EvaluationResult(**scores.to_dict(), answers=answers)


def rows_to_score(base: FoundModel, data: Data, options: EvaluationOptions, note: Note) -> ToScore:
    """Read and encode rows to score; keep their conversations if answers are generated.

    Raises:
        ConfigError: when loss_on or on_bad_row has an unknown value.
        DataError: when the data cannot be used.
    """
    encoding = Encoding(
        max_length=options.max_length,
        context=base.config.max_position_embeddings,
        loss_on=options.loss_on,
        on_bad_row=options.on_bad_row,
    )
    return load_to_score(
        data,
        base.tokenizer,
        encoding,
        limit=options.limit,
        with_conversations=options.generate,
        note=note,
    )


def _counted(stage: str, total: int, on_progress: Progress) -> Callable[[int], None]:
    """Start a stage and return a function that adds a number of finished rows."""
    done = 0
    on_progress(stage, done, total)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(stage, done, total)

    return advance
