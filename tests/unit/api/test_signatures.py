"""The functions take the options of the commands, under the same names and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Any, get_args

import click
import pytest

import phi3_lora
from phi3_lora.api import options as kinds
from phi3_lora.api.adapters import Layout, Tool
from phi3_lora.api.data_files import CleaningSteps
from phi3_lora.api.data_settings import DataSettings
from phi3_lora.api.export import MergeTarget, OutType
from phi3_lora.api.training import FLAGS, TrainSettings
from phi3_lora.config.schema import DtypeOption
from phi3_lora.data.options import LOSS_ON, ON_BAD_ROW, LossOn, OnBadRow
from phi3_lora.data.quality.cleaning import Cleaning
from phi3_lora.models.config import DTYPES, QUANTIZATIONS, Quantization
from phi3_lora_cli.data import check, clean, preview, split
from phi3_lora_cli.main import group

PRINTED = {"as_json", "debug", "samples", "verbose", "quiet", "dry_run", "config_file"}
"""Options for printing, and options of train with another form in Python."""
CASES: list[tuple[click.Command | str, Callable[..., Any]]] = [
    ("train", phi3_lora.train),
    ("evaluate", phi3_lora.evaluate),
    ("generate", phi3_lora.generate),
    ("convert", phi3_lora.convert),
    ("inspect", phi3_lora.inspect),
    ("merge", phi3_lora.merge),
    ("quantize", phi3_lora.quantize),
    ("verify", phi3_lora.verify),
    ("parity", phi3_lora.parity),
    ("push", phi3_lora.push),
    ("doctor", phi3_lora.doctor),
    (check, phi3_lora.check_data),
    (preview, phi3_lora.preview_data),
    (split, phi3_lora.split_data),
    (clean, phi3_lora.clean_data),
]


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """Return parameter -> default, including the keys of a typed dictionary of keywords."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            (fields,) = get_args(hints[name])
            found |= dict.fromkeys(fields.__annotations__)
        else:
            found[name] = parameter.default
    return found


@pytest.mark.parametrize(("command", "function"), CASES, ids=lambda case: getattr(case, "name", ""))
def test_every_option_is_a_keyword_with_the_same_default(
    command: click.Command | str, function: Callable[..., Any]
) -> None:
    if isinstance(command, str):
        found = group.get_command(click.Context(group), command)
        assert found is not None
        command = found
    takes = keywords(function)
    for parameter in command.params:
        if parameter.name in PRINTED:
            continue
        assert parameter.name in takes, f"{function.__name__} lacks {parameter.name}"
        default = takes[str(parameter.name)]
        is_set = parameter.default is not None and parameter.default not in (False, ())
        if is_set and default is not None and not str(parameter.default).startswith("Sentinel"):
            assert str(parameter.default) == str(default), parameter.name


def test_train_has_a_place_for_each_keyword() -> None:
    assert FLAGS.keys() | {"preset", "set"} == TrainSettings.__annotations__.keys()


def test_clean_data_has_every_step() -> None:
    steps = CleaningSteps.__annotations__.keys() - DataSettings.__annotations__.keys()
    assert steps == {field.name for field in dataclasses.fields(Cleaning)}


def test_literals_are_the_values_of_the_core_and_of_the_command_line() -> None:
    assert get_args(DtypeOption) == ("auto", *DTYPES)
    assert get_args(Quantization) == QUANTIZATIONS
    assert get_args(LossOn) == LOSS_ON
    assert get_args(OnBadRow) == ON_BAD_ROW
    assert get_args(kinds.Part) == kinds.PARTS
    choices = {
        ("convert", "to"): Layout,
        ("convert", "for_tool"): Tool,
        ("merge", "to"): MergeTarget,
        ("merge", "outtype"): OutType,
    }
    for (name, option), literal in choices.items():
        command = group.get_command(click.Context(group), name)
        assert command is not None
        (kind,) = (p.type for p in command.params if p.name == option)
        assert isinstance(kind, click.Choice) and tuple(kind.choices) == get_args(literal)
