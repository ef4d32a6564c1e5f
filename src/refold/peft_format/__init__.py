"""LoRA and DoRA checkpoints of the PEFT library, read and written without it."""

from refold.peft_format.reading import load_peft
from refold.peft_format.writing import save_peft

__all__ = ["load_peft", "save_peft"]
