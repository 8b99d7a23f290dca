"""The trained model: attention kernels, LoRA, initial and pretrained weights, export."""
