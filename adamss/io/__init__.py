"""Adapters in files: our own format, and the folders of LoRA and PEFT."""
