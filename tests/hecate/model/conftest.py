from tests.hecate.moe.conftest import one_rank

__all__ = ["one_rank"]
