"""The model under training: attention kernels, LoRA, initial weights, export of weights."""
