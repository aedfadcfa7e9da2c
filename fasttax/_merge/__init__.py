"""How `merge` reads and writes checkpoints."""
