"""The product as functions, one module for each kind of thing; `phi3_lora` offers them all."""
