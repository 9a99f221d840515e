"""Which layout to train with, what it costs and whether it fits, on paper; standard library only.

    plan = make_plan(Request(model, hardware_named("h800"), gpus=2048, batch_sequences=15360))
    print(plan_text(plan))                           # the fastest layouts, and why others do not fit
    plan.recommended.gpu_hours_per_trillion_tokens

``docs/planner.md`` derives the formulas and compares them with what others measured.
"""

from lightning_dualpipe.planner.comparison import Row, side_by_side
from lightning_dualpipe.planner.hardware import HARDWARE, Hardware, Precision, hardware_named
from lightning_dualpipe.planner.layout import Layout
from lightning_dualpipe.planner.memory import Memory
from lightning_dualpipe.planner.model import Kept, LayerShape, ModelShape, Work
from lightning_dualpipe.planner.overlap import StageTimes, pair, stage_times
from lightning_dualpipe.planner.plan import Estimate, Plan, Request, make_plan
from lightning_dualpipe.planner.profile import DEEPSEEK, Profile
from lightning_dualpipe.planner.report import plan_json, plan_text
from lightning_dualpipe.planner.times import LayerTimes

__all__ = [
    "DEEPSEEK",
    "HARDWARE",
    "Estimate",
    "Hardware",
    "Kept",
    "LayerShape",
    "LayerTimes",
    "Layout",
    "Memory",
    "ModelShape",
    "Plan",
    "Precision",
    "Profile",
    "Request",
    "Row",
    "StageTimes",
    "Work",
    "hardware_named",
    "make_plan",
    "pair",
    "plan_json",
    "plan_text",
    "side_by_side",
    "stage_times",
]
