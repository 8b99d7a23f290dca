"""Records of unusable samples, for reports."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perception_rt.errors import PerceptionError


@dataclass(frozen=True, slots=True)
class Unusable:
    """An unusable sample.

    Attributes:
        name: place of the sample, such as file and line.
        reason: the defect, worded alike for all samples that have it.
        detail: particulars of this sample; may be empty.
    """

    name: str
    reason: str
    detail: str = ""

    @property
    def problem(self) -> str:
        """The defect with its particulars."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def all_unusable(samples: Sequence[Unusable]) -> PerceptionError:
    """Returns the error for a series of reads that met no usable sample."""
    last = samples[-1]
    number = len({sample.name for sample in samples})
    return PerceptionError(
        f"{number} samples in a row are unusable; the last is {last.name}: {last.problem}"
    )


def summary(samples: Iterable[Unusable], *, reasons: int = 3) -> str:
    """Describes unusable samples: the most frequent reasons, each with the first sample."""
    groups: dict[str, list[Unusable]] = {}
    for sample in samples:
        groups.setdefault(sample.reason, []).append(sample)
    largest = sorted(groups.items(), key=lambda group: -len(group[1]))[:reasons]
    return "; ".join(
        f"{reason} ({len(found)}, the first is {found[0].name}"
        + (f": {found[0].detail})" if found[0].detail else ")")
        for reason, found in largest
    )
