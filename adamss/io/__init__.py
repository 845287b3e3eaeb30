"""Adapter files and folders, in our own format and in those of LoRA and PEFT, and weight files of base models."""
