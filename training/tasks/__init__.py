"""Training tasks: contrastive learning, distillation, language modelling."""
