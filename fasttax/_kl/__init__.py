"""How the KL ops work beyond their kernels: heads without logits, shards of a vocabulary, torch.func."""
