"""Scores of students and teachers on labelled tiles."""
