"""Entry point of python -m phi3_lora_cli."""

from phi3_lora_cli.main import main

main()
