from helpers.recognised_teacher import finished_cache, teacher_file  # noqa: F401 (fixtures)
