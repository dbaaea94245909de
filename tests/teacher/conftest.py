from helpers.predicted_world import world  # noqa: F401 (a fixture)
from helpers.recognised_teacher import finished_cache, teacher_file  # noqa: F401 (fixtures)
from helpers.teacher_kinds import config_of, worlds  # noqa: F401 (fixtures)
