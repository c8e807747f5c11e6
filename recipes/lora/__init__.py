"""The parts of qwen3_lora.py."""
