"""The stages of the labelling flow as callables on Arrow tables: decode, label, write. None imports Ray.

Images travel between stages as raw bytes and a shape, which Arrow passes between processes without a copy.
Rows carry the seconds that each stage spent on them, which the last stage reports.
"""

from pipeline.labelling.stages.decode import Decode
from pipeline.labelling.stages.label import Label
from pipeline.labelling.stages.write import Write

__all__ = ["Decode", "Label", "Write"]
