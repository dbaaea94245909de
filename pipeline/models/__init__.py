"""The networks: teachers as they are loaded and asked, students as they are built."""

from kdpipe.pipeline.models.student import build_student

__all__ = ["build_student"]
