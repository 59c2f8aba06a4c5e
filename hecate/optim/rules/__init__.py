"""Gradient rules beside AdamW, one a file, which begins without torch. Each brings the section of the configuration with its name: its keys
are the dataclass `SETTINGS`, and `RULE` makes of them and of the configured AdamW a `GradientRule`, or None where they choose none.
"""

import hecate.config  # noqa: F401  # which imports the rules for their keys, so that a rule must not be the first to import it
