"""What the workflow needs, looked at one by one: each line says OK, or what to do.

At import nothing but the standard library is needed, so that it works where nothing else does.
What needs a library is a probe, done in a child process: one that crashes or hangs is reported,
and the probes after it go on in another child.
"""

from cellseg.doctor.examination import examine
from cellseg.doctor.findings import Finding

__all__ = ["Finding", "examine"]
