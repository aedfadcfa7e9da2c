"""What wrappers put into the names of a model's parameters."""

#: DataParallel and DistributedDataParallel, torch.compile, FSDP, activation checkpointing
TORCH = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
