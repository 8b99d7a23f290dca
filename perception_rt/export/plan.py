"""What an export will make, decided and checked before any work starts."""

from dataclasses import dataclass

from perception_rt.config import PeConfig
from perception_rt.errors import InputError
from perception_rt.processing.image import ImageSpec
from perception_rt.targets import Target, check_precision, get_target


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """Architecture, target, precision and shapes.

    Attributes:
        name: the model's name, as the package will state it.
        config: the architecture.
        backend: a name in `targets.TARGETS`.
        precision: one of `targets.PRECISIONS`.
        image: how images become pixels; its height and width fix the grid.
        taps: blocks whose output `features` can return, counted from the front; None for all.
    """

    name: str
    config: PeConfig
    backend: str
    precision: str
    image: ImageSpec
    taps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_precision(self.target, self.precision)
        _ = self.grid
        if not 1 <= len(self.name) <= 128 or not self.name.isprintable():
            raise InputError(f"the model's name {self.name!a:.60} is not 1 to 128 characters")
        for tap in self.taps or ():
            if self.config.vision.block_index(tap) != tap:
                raise InputError(f"tap {tap} must be counted from the front")

    @property
    def target(self) -> Target:
        """The backend's record."""
        return get_target(self.backend)

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns; InputError unless the patch size divides the image size."""
        return self.config.vision.grid_of(self.image.height, self.image.width)

    @property
    def tapped(self) -> tuple[int, ...]:
        """The tapped blocks, in order."""
        layers = self.config.vision.layers
        return tuple(range(layers)) if self.taps is None else tuple(sorted(set(self.taps)))


def parse_image_size(text: str) -> tuple[int, int]:
    """`HxW` or `S` in pixels -> (height, width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isascii() and p.isdigit() and 0 < len(p) < 6 for p in parts):
        raise InputError(f"image size must be HxW or S in pixels, not {text!r:.40}")
    return int(parts[0]), int(parts[-1])
