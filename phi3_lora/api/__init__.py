"""The functions of the product, one module for each subject; `phi3_lora` exports them all."""
