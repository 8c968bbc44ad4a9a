"""A commented sweep to start from: `attnlab new FILE`."""

import re
from collections.abc import Sequence
from pathlib import Path

from attnlab import config
from attnlab.errors import UserError

_TEMPLATE = """\
# What this sweep asks, in a line.
#
#   attnlab ablate {file} --dry-run      lists the runs and what they cost, and runs nothing
#   attnlab ablate {file}
#
# A sweep is a gin file: `NAME.option = VALUE`, and %MACRO for what is set once. It is code; run those that you trust.
from __gin__ import dynamic_registration
from attnlab import ablate

# The model, the data and the training that all arms share; `attnlab list` prints others. A module of your own beside
# this file is imported like attnlab's: `import my_mixers`, and then @my_mixers.Mixer in an arm.
include '{base}'

ablate.Ablation.question = 'What does {what} lose or gain beside {baseline}?'

# By name, what makes an arm: a config, or a list of configs and bindings, read after the above. Draw what an arm sees:
#   attnlab show {base} {first}
ablate.Ablation.arms = {{
{arms}}}
# The arm that the others are compared with, seed by seed: arms with one seed share initial values and batches.
ablate.Ablation.baseline = '{baseline}'
# Fewer than three have neither interval nor test.
ablate.Ablation.seeds = [0, 1, 2]

# What may change beside the mechanism. Uncomment what you need.
# ablate.Ablation.metric = 'accuracy'
# ablate.Ablation.higher_is_better = True
#   As many parameters in every arm (or 'flops', 'state_size'), by an option that each may change:
# ablate.Ablation.match = 'parameters'
# ablate.Ablation.knobs = 'LanguageModel.mlp_hidden'
#   The best of these for each arm, searched with a seed that is not compared:
# ablate.Ablation.learning_rates = [3e-4, 1e-3, 3e-3]
#   In the place of an arm, one for each value:
# ablate.Ablation.product = {{'local': {{'WINDOW': [16, 32, 64]}}}}
"""


def write_sweep(file: Path, base: str, arms: Sequence[str]) -> None:
    """Writes a sweep of these mixers' configs over `base`; the first is the baseline.

    Raises UserError: the file exists or is none of gin's, or a config does not exist.
    """
    if file.suffix != ".gin":
        raise UserError(f"new: got {file}; need a name that ends in .gin")
    for name in (base, *arms):
        config.find(name)
    names = {re.sub(r"[^\w.-]", "_", Path(arm).stem): arm for arm in arms}
    if len(names) < 2:
        raise UserError(f"arms: got {', '.join(arms)}; need two at least, of different names")
    first, *others = names
    text = _TEMPLATE.format(
        file=file,
        base=base,
        what=" or ".join(others),
        baseline=first,
        first=arms[0],
        arms="".join(f"    '{name}': '{arm}',\n" for name, arm in names.items()),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x") as opened:
            opened.write(text)
    except FileExistsError as error:
        raise UserError(f"new: {file} exists already; give another name") from error
