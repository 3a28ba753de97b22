"""What a layout costs before the GPUs exist: memory, traffic and time of a training step.

from planning import plan

report = plan("v3_671b", gpu="h800", gpus=2048, layout="deepseek")
print(report.fits, report.step_seconds, report.to_json()["memory_gib"])
"""

from planning.api import plan
from planning.report import Report

__all__ = ["Report", "plan"]
