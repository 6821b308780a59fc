"""The Hypothesis profile of mutants.py."""

from hypothesis import HealthCheck, Phase, settings

#: The same examples each time, and none made smaller: all that counts is whether a test fails.
settings.register_profile(
    "mutants",
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
