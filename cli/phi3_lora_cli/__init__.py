"""The command line: click commands that call the functions of phi3_lora."""
