"""The package offers every public name, and imports little before a name is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import phi3_lora

COST = """
import sys, time
start = time.perf_counter()
import phi3_lora
print(time.perf_counter() - start)
print([m for m in ('numpy', 'yaml', 'tokenizers', 'huggingface_hub') if m in sys.modules])
phi3_lora.Phi3LoraError
print('numpy' in sys.modules)
phi3_lora.train
print('numpy' in sys.modules)
"""
LARGEST_SECONDS = 0.05
TRIES = 5
"""The fastest of several counts: a busy machine delays some."""


def cost() -> list[str]:
    found = subprocess.run([sys.executable, "-c", COST], capture_output=True, text=True, check=True)
    return found.stdout.splitlines()


def test_import_is_fast_and_waits_for_the_first_use() -> None:
    found = [cost() for _ in range(TRIES)]
    for _, early, after_error, after_train in found:
        assert (early, after_error, after_train) == ("[]", "False", "True")
    assert min(float(seconds) for seconds, *_ in found) < LARGEST_SECONDS


def test_every_public_name_is_there() -> None:
    assert set(phi3_lora.__all__) == set(phi3_lora._MODULES) <= set(dir(phi3_lora))
    assert len(phi3_lora.__all__) == len(set(phi3_lora.__all__))
    for name in phi3_lora.__all__:
        value = getattr(phi3_lora, name)
        assert value.__doc__ and value.__module__.startswith("phi3_lora.")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'phi3_lora' has no attribute 'trian'"):
        phi3_lora.trian  # noqa: B018


def test_no_name_imports_a_framework() -> None:
    code = (
        "import sys, phi3_lora\n"
        "for name in phi3_lora.__all__: getattr(phi3_lora, name)\n"
        "print([m for m in ('torch', 'mlx', 'transformers', 'peft') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
