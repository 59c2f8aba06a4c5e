"""What the processes of `testing.ranks` have done before they are forked: imported and prepared all that a rank or a small command needs."""

import matplotlib.backends.backend_agg
import matplotlib.figure
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral
import transformers.models.olmoe.modeling_olmoe
import transformers.models.qwen3_moe.modeling_qwen3_moe
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import hecate.cli
import hecate.train.answers
import hecate.train.inference  # noqa: F401
from hecate.parallel import jit
from hecate.parallel.compile_loops import compile_all
from hecate.train.rank_main import preload

preload()
if jit.state() == "ready":
    compile_all()  # loads the machine code
get_checkpoint_conversion_mapping("llama")  # compiles a thousand regular expressions
