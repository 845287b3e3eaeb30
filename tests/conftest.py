"""Settings that all tests share."""

from hypothesis import HealthCheck, settings

# Derandomised: a test that needs luck is a bug, and a failure must be the same on every machine.
settings.register_profile(
    "adamss", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("adamss")
