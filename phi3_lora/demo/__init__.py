"""The built-in base model and chat data, for --model demo and --data demo."""

from pathlib import Path

DEMO_MODEL_DIR = Path(__file__).parent / "model"
DEMO_DATA_DIR = Path(__file__).parent / "data"
