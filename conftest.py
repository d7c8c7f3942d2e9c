"""Load the plugin where the suite is run from a clone that is not installed."""

pytest_plugins = ["streamgauge.plugin"]
