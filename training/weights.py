"""Initial weights of a Perception Encoder, in place and from torch's generator."""

import torch
from torch import Tensor, nn

from perception_rt.models.pe import PerceptionEncoder

# Words must outweigh their positions, or a caption's content drowns in its length.
_TEXT_STD = {"token_embedding.weight": 0.05, "positional_embedding": 0.01}
_ROW_MAJOR = ("proj", "text_projection")  # (in, out); every other matrix is (out, in)
_BRANCH_ENDS = ("attn.out_proj.weight", "mlp.c_proj.weight")


@torch.no_grad()
def initialise(model: PerceptionEncoder) -> None:
    """Draws every weight: normal, of unit output variance for unit inputs.

    The last matrix of each residual branch is scaled down by the number of branches, so that depth
    does not widen the stream. Norms keep their ones and zeros, the logit scale its start, and
    biases are zero.
    """
    for tower in (model.visual, model.text):
        branches = 2 * tower.config.layers
        for name, parameter in tower.named_parameters():
            _draw(name, parameter)
            if name.startswith("transformer.") and name.endswith(_BRANCH_ENDS):
                parameter.mul_(branches**-0.5)
    for name, std in _TEXT_STD.items():
        nn.init.normal_(model.text.get_parameter(name), std=std)


def _draw(name: str, parameter: Tensor) -> None:
    """Draws one parameter by its name in a tower."""
    leaf = name.rpartition(".")[2]
    if leaf in ("bias", "in_proj_bias"):
        nn.init.zeros_(parameter)
    elif leaf in _ROW_MAJOR:
        nn.init.normal_(parameter, std=parameter.shape[0] ** -0.5)
    elif parameter.ndim >= 2:
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    elif leaf == "class_embedding":
        nn.init.normal_(parameter, std=parameter.numel() ** -0.5)
