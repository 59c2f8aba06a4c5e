"""The optimizers that `optim` names, one a file, which begins without torch.

`STATE` says what is kept of a parameter. `STEP` makes the step of a `GradientRule`, from the section's settings, AdamW with the keys that
optimizers share, and the peak learning rate. A file with keys of its own has their dataclass, `SETTINGS`: the section of the configuration
with the file's name. `PACKAGE` is the package that a file needs, of the extra `optim`.
"""

import hecate.config  # noqa: F401  # which imports the rules for their keys, so that a rule must not be the first to import it
