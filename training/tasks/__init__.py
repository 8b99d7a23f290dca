"""Training tasks: contrastive, distillation and language modelling."""
