"""The configuration as types: closed (unknown keys are refused), frozen, and checked as a whole."""

from kdpipe.configs.schema.config import Config
from kdpipe.configs.schema.data import Alpha, Classes, Data, FixedRange, Percentiles
from kdpipe.configs.schema.section import Section
from kdpipe.configs.schema.student import DEFAULT_BATCH_SIZE, Distill, DistillMode, Student, Train
from kdpipe.configs.schema.teacher import MAX_VIEWS, Cache, MeanStd, Normalize, Precision, Teacher, TeacherView

__all__ = [
    "DEFAULT_BATCH_SIZE", "MAX_VIEWS", "Alpha", "Cache", "Classes", "Config", "Data", "Distill", "DistillMode", "FixedRange",
    "MeanStd", "Normalize", "Percentiles", "Precision", "Section", "Student", "Teacher", "TeacherView", "Train",
]  # fmt: skip
