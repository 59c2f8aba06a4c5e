from tests.hecate.config.conftest import folder  # noqa: F401 - the files that configurations name
