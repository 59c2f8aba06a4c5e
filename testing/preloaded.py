"""What the processes of `testing.ranks` have done before they are forked: whatever most ranks and small commands begin with."""

from importlib import import_module

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hecate.parallel.loops import jit
from hecate.parallel.plan.compile_loops import compile_all
from hecate.train.rank_main import preload
from testing.interpreter import leave_out_what_is_thrown_away

preload()
leave_out_what_is_thrown_away()
for name in (
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mixtral", "olmoe", "qwen3_moe")),
    *("matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("hecate.cli", "hecate.apps.answers.answers", "hecate.apps.answers.inference"),
    *("pytest", "hypothesis", "hypothesis.strategies"),
):
    import_module(name)
if jit.state() == "ready":
    compile_all()  # loads the machine code
get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions
