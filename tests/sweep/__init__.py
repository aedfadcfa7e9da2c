"""Every class of transformers that can be built tiny offline, held against the definitions."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
