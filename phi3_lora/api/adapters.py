"""Functions on adapter files: convert, inspect and push."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from phi3_lora.adapters import inspection
from phi3_lora.adapters.convert import Conversion, ConversionRequest
from phi3_lora.adapters.convert import convert as convert_adapter
from phi3_lora.adapters.formats.folder import check_unused
from phi3_lora.adapters.formats.missing_metadata import MissingMetadata
from phi3_lora.adapters.formats.registry import TARGETS
from phi3_lora.adapters.formats.tools import CONSUMERS
from phi3_lora.adapters.inspection import AdapterReport
from phi3_lora.api.options import AnyPath, Note, OptionError, Part, folder_of, log_note, part_names
from phi3_lora.export.ollama import write_adapter_modelfile
from phi3_lora.hub.download import resolve_adapter_dir
from phi3_lora.hub.push import Pushed
from phi3_lora.hub.push import push as push_adapter
from phi3_lora.inference.base_model import find_base_model
from phi3_lora.report.heatmap import check_name, write_heat_map
from phi3_lora.verification.conversion import ConversionCheck, verify_conversion

Layout = Literal["peft", "mlx", "both", "unfused", "loralib", "gguf"]
Tool = Literal["vllm", "llama.cpp", "ollama", "mlx-lm", "peft"]


class SourceOptions(TypedDict, total=False):
    """Values that loralib files and .npz files do not store."""

    alpha: float | None
    """lora_alpha of a .pt or .npz file."""
    prefix: str
    """Text before the module paths of a loralib file."""
    enable: str | Sequence[Part] | None
    """Parts of a fused projection that a MergedLinear adapts: a list, or a text with commas."""
    parts: Literal["equal", "model"] | None
    """The cut of a MergedLinear's output into parts, if the file does not store it."""


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """A conversion, and the comparison with its source if one was made."""

    conversion: Conversion
    comparison: ConversionCheck | None

    @property
    def equal(self) -> bool:
        """False if a comparison was made and found a difference."""
        return self.comparison is None or self.comparison.is_equal

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name."""
        found = {} if self.comparison is None else self.comparison.to_dict()
        return {**self.conversion.to_dict(), "notes": self.conversion.notes, **found}


@dataclass(frozen=True, slots=True)
class InspectionResult:
    """Facts about an adapter, and the path of its heat map."""

    report: AdapterReport
    plot: str | None = None
    """Path of the heat map; None if none was written."""

    def to_dict(self) -> dict[str, Any]:
        """Return the facts by name."""
        facts = self.report.to_dict()
        return facts if self.plot is None else {**facts, "plot": self.plot}


def convert(
    source: AnyPath,
    target: AnyPath,
    *,
    to: Layout | None = None,
    for_tool: Tool | None = None,
    model: str | None = None,
    verify: bool = False,
    rank: int | None = None,
    note: Note = log_note,
    **options: Unpack[SourceOptions],
) -> ConversionResult:
    """Write an adapter in another layout and read the result back.

    Args:
        source: a folder, a hub id, or a .pt, .gguf or .npz file, of any layout.
        target: a new folder; a new file for loralib and gguf.
        to: the layout of the result; for_tool implies one.
        for_tool: the tool that must be able to read the result (--for of the command).
        model: the base model, which the layout unfused and the tool ollama need.
        verify: compare the deltas of result and source and, with model, the model's answers.
        rank: largest rank of the result; deltas of a higher rank are approximated.
        note: receives each text for the user; the default logs it as a warning.
        options: alpha, prefix, enable and parts, which loralib files and .npz files do not store.

    Raises:
        OptionError: when options do not go together.
        AdapterError: when source is damaged, target is in use, or the layout cannot store source.
        ModelError: when the base model cannot be used.
    """
    layout = _layout(to, for_tool)
    base = None if model is None else find_base_model(model, with_weights=verify)
    path = Path(target)
    if for_tool == "ollama":
        if base is None:
            raise OptionError("--for ollama needs --model: a Modelfile holds its template")
        check_unused(path)
    request = ConversionRequest(
        source=resolve_adapter_dir(str(source)),
        target=path / "adapter.gguf" if for_tool == "ollama" else path,
        to=layout,
        consumer=for_tool,
        config=None if base is None else base.config,
        row_norms=None if base is None else base.row_norms,
        missing=_missing_metadata(options),
        rank=rank,
    )
    result = convert_adapter(request)
    if for_tool == "ollama" and base is not None:
        note(write_adapter_modelfile(path, base.path, base.config))
    for text in result.notes:
        note(text)
    check = verify_conversion(result, request.target, base, note) if verify else None
    return ConversionResult(result, check)


def _layout(to: Layout | None, tool: Tool | None) -> str:
    layout = to or (CONSUMERS[tool].layout if tool else None)
    if layout is None:
        raise OptionError("say where to: --to LAYOUT or --for TOOL")
    reads = CONSUMERS[tool].layout if tool else layout
    if reads not in {layout, *(member.name for member in TARGETS[layout].members)}:
        raise OptionError(f"--for {tool} reads {reads}: leave out --to {layout}")
    return layout


def _missing_metadata(options: SourceOptions) -> MissingMetadata:
    return MissingMetadata(
        options.get("alpha"),
        options.get("prefix", ""),
        part_names(options.get("enable")),
        options.get("parts"),
    )


def inspect(
    adapter: AnyPath,
    *,
    plot: AnyPath | None = None,
    model: str | None = None,
    **options: Unpack[SourceOptions],
) -> InspectionResult:
    """Return an adapter's layout, ranks, scales, layers and norms, and the tools that load it.

    Args:
        adapter: a folder, a hub id or a file, of any layout.
        plot: write the norms as a heat map to this .png or .html file.
        model: the base model, which a loralib file may need.
        options: as for convert.

    Raises:
        OptionError: when enable names an unknown part.
        AdapterError: when the adapter is damaged.
        ConfigError: when the name of plot cannot be used.
    """
    path = None if plot is None else folder_of(plot)
    if path is not None:
        check_name(path)
    config = None if model is None else find_base_model(model, with_weights=False).config
    missing = _missing_metadata(options)
    report = inspection.inspect_adapter(resolve_adapter_dir(str(adapter)), missing, config)
    if path is not None:
        write_heat_map(path, report.delta_norms, f"Norm of each delta: {adapter}")
    return InspectionResult(report, None if path is None else str(path))


def push(
    adapter: AnyPath,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    note: Note = log_note,
) -> Pushed:
    """Send an adapter with its model card to the Hugging Face hub.

    Args:
        adapter: the adapter's folder.
        repo: owner/name.
        private: make a new repository private, and refuse one that is public.
        revision: a branch of the repository; None is main.
        message: the message of the commit.
        note: receives each text for the user; the default logs it as a warning.

    Raises:
        AdapterError: when the adapter is damaged.
        ConfigError: when the name, the token or the message cannot be used.
    """
    return push_adapter(
        folder_of(adapter), repo, private=private, revision=revision, message=message, note=note
    )
