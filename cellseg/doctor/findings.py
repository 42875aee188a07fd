"""A line of the examination."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        name: what was looked at.
        detail: what was found.
        remedy: what to do; empty if all is well.
        essential: the workflow cannot do without it.
    """

    name: str
    detail: str
    remedy: str = ""
    essential: bool = False

    @property
    def broken(self) -> bool:
        """Whether the workflow cannot work like this."""
        return bool(self.remedy) and self.essential

    def line(self) -> str:
        """Return it as a line: OK, MEND (nothing works before) or NOTE (something does not)."""
        if not self.remedy:
            return f"OK    {self.name}: {self.detail}"
        return f"{'MEND' if self.essential else 'NOTE'}  {self.name}: {self.detail}; {self.remedy}"
