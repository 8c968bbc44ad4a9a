"""Options: what every public constructor takes, it takes right; all else is one line with the option and the value."""

import dataclasses
import functools
import inspect
import math
import types
import typing
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from mixers import MIXERS

import attnlab
from attnlab import config, data, models, nn, train
from attnlab.ablate import Ablation

SOFTMAX = functools.partial(nn.SoftmaxAttention, num_heads=2)
TEXT = np.arange(90, dtype=np.uint8) % 8
IMAGES = data.LabelledImages("i", 2, *[np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32)] * 2, levels=2)
CORPUS = data.Corpus("c", TEXT, TEXT, vocabulary=8)
STACK = {"mixers": [SOFTMAX], "depth": 1, "features": 8}


def experiment(**options):
    model = models.LanguageModel(vocabulary=8, **STACK)
    optimizer = train.OptimizerOptions(warmup_steps=0)
    given = {"model": model, "task": train.LanguageTask(CORPUS, sequence_length=8), "steps": 3, "batch_size": 2}
    return train.Experiment(**{**given, "optimizer": optimizer, **options})


def _mixers():
    """Of each class of mixers its first row."""
    rows = {}
    for row in MIXERS.values():
        rows.setdefault(row.mixer, {"features": 16, "is_causal": not row.is_grid, **row.options})
    return rows


# By constructor, options with which it builds: those that it needs, and others whose checks need company.
CONSTRUCTORS: dict[Any, dict[str, Any]] = {
    nn.Linear: {"inputs": 4, "outputs": 4},
    nn.RMSNorm: {"features": 4},
    nn.GatedMLP: {"features": 4, "hidden": 8},
    **_mixers(),
    nn.LinearAttention: {"features": 16, "is_causal": True, "beta": 1.0},
    nn.AgentAttention: {"features": 16, "is_causal": False, "agents": (2, 2), "bias_grid": (4, 4)},
    models.LanguageModel: {"vocabulary": 8, **STACK},
    models.SequenceRegressor: {"channels": 3, **STACK},
    models.ImageClassifier: {"image_size": (4, 4, 1), "classes": 2, **STACK},
    models.AxialTransformer: {"image_size": (4, 4, 3)},
    data.Corpus: {"name": "c", "train": TEXT, "validation": TEXT},
    data.LabelledImages: {field.name: getattr(IMAGES, field.name) for field in dataclasses.fields(IMAGES)},
    data.MultiQueryRecall: {},
    data.Copy: {},
    data.SelectiveCopy: {},
    data.Induction: {},
    data.Permutations: {},
    data.Needle: {},
    data.LinearRegressions: {},
    data.photo_crops: {"size": 128},
    data.random_tokens: {"count": 100},
    train.Mesh: {},
    train.OptimizerOptions: {},
    experiment: {},
    train.LanguageTask: {"corpus": CORPUS, "sequence_length": 8},
    train.BlockDiffusionTask: {"corpus": CORPUS, "sequence_length": 8, "block": 4},
    train.SequenceTask: {"source": data.Copy()},
    train.RegressionTask: {"source": data.LinearRegressions()},
    train.ImageClassificationTask: {"images": IMAGES},
    train.AxialImageTask: {"images": IMAGES},
    train.RasterImageTask: {"images": IMAGES},
    train.NextBlockImageTask: {"images": IMAGES},
    Ablation: {"question": "?", "arms": {"a": "a.gin"}, "seeds": [0], "baseline": "a"},
}
# What no constructor of attnlab is: protocols, variables, results.
OTHERS = {"Attention", "AuxiliaryLoss", "Buffer", "MixerCache", "Pattern", "Result", "SequenceSource", "Task"}

HUGE = 10**12


def kinds(annotation: Any) -> set[Any]:
    """Types that an annotation admits; of a literal, str."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if is_union else (annotation,)
    return {str if typing.get_origin(part) is typing.Literal else typing.get_origin(part) or part for part in parts}


def wrong(annotation: Any) -> list[Any]:
    """Values that no option of this annotation may take."""
    admitted = kinds(annotation)
    of_each = {
        int: [True, np.bool_(True), 2.5, math.nan, math.inf, "2", "four", object(), {}, -(10**30)],
        float: [True, np.bool_(True), math.nan, -math.inf, 10**400, "0.1", "fast", object(), [0.1]],
        bool: [0, 1, 2.0, math.nan, "false", "off", np.int64(1), object(), [True]],
        str: [3, True, math.nan, object(), ["a"], np.float32(1)],
        tuple: [3.5, "ab", (), (1, "b"), (1.5, 2), [True], {}, object()],
    }
    if Any in admitted or inspect.Parameter.empty in admitted:
        return [3.5, "nonsense", object()]
    values = [value for kind in admitted & set(of_each) for value in of_each[kind]]
    if not admitted & set(of_each):  # an object of ours, or a container
        values = [3, True, math.nan, "nonsense", object()]
    others = [kind for kind in admitted if kind in of_each and len(admitted & set(of_each)) > 1]
    if others or (int in admitted and tuple in admitted):
        # An int or a tuple of ints, say: what is wrong for both.
        values = [True, 2.5, math.nan, "x y", object(), {}, (1, "b"), (1.5, 2)]
        values = [value for value in values if not (type(value) in (str, bool) and type(value) in admitted)]
    if types.NoneType not in admitted:
        values.append(None)
    return values


def parameters(constructor: Any) -> dict[str, inspect.Parameter]:
    function = train.Experiment if constructor is experiment else constructor
    function = function.__init__ if isinstance(function, type) else function
    return {name: parameter for name, parameter in inspect.signature(function).parameters.items() if name != "self"}


def test_the_table_has_every_public_constructor():
    offered = {name: thing for package in (nn, models, data, train) for name, thing in config.offered(package).items()}
    classes = {name for name, thing in offered.items() if isinstance(thing, type)}
    have = {constructor.__name__ for constructor in CONSTRUCTORS} | {"Experiment"}
    assert classes - OTHERS - have == set()


@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=lambda constructor: constructor.__name__)
def test_a_wrong_value_is_one_line_with_the_option_and_the_value(constructor):
    good = CONSTRUCTORS[constructor]
    constructor(**good)
    for name, parameter in parameters(constructor).items():
        if parameter.annotation in (nn.MixerFactory,) or name in ("initializer", "feature_map"):
            continue
        for value in wrong(parameter.annotation):
            if type(value) is tuple and value == parameter.default:
                continue
            try:
                constructor(**{**good, name: value})
            except (TypeError, ValueError) as error:
                text = str(error)
            else:
                pytest.fail(f"{name} = {value!r} is taken")
            assert text.startswith(f"{name}: got "), (name, value, text)
            assert "\n" not in text
            assert "; need" in text, (name, value, text)


@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=lambda constructor: constructor.__name__)
def test_zero_negative_and_huge_numbers_are_taken_or_named(constructor):
    good = CONSTRUCTORS[constructor]
    for name, parameter in parameters(constructor).items():
        if not kinds(parameter.annotation) & {int, float}:
            continue
        for value in (0, -1, HUGE, 1e30, -0.5):
            if isinstance(value, float) and float not in kinds(parameter.annotation):
                continue
            try:
                built = constructor(**{**good, name: value})
            except (TypeError, ValueError) as error:
                text = str(error)
                assert "\n" not in text
                assert len(text) < 400
                mentioned = {match for match in parameters(constructor) if text.startswith(f"{match}: got ")}
                assert mentioned, (name, value, text)
                assert name in text or str(value) in text, (name, value, text)
            else:
                held = getattr(built, name, value)
                assert held == value or not isinstance(held, (int, float)), (name, value, held)


@pytest.mark.parametrize("constructor", CONSTRUCTORS, ids=lambda constructor: constructor.__name__)
def test_numpy_scalars_are_the_numbers_that_they_are(constructor):
    good = CONSTRUCTORS[constructor]
    for name, parameter in parameters(constructor).items():
        admitted, value = kinds(parameter.annotation), good.get(name, parameter.default)
        if isinstance(value, bool) and bool in admitted:
            same: Any = np.bool_(value)
        elif isinstance(value, int) and int in admitted:
            same = np.int64(value)
        elif isinstance(value, float) and float in admitted:
            same = np.float64(value)
        else:
            continue
        held = getattr(constructor(**{**good, name: same}), name, value)
        if isinstance(held, (bool, int, float, np.generic)):
            assert held == value
            assert type(held) is type(value), (name, type(held))


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.float32, jnp.dtype("float16")])
def test_a_dtype_is_one_or_its_name(dtype):
    assert models.LanguageModel(vocabulary=8, **STACK, dtype=dtype).dtype == dtype


MISSPELLED = {
    "LocalAttention has no option 'windows'; did you mean 'window'": (nn.LocalAttention, {"windows": 4}),
    "SoftmaxAttention has no option 'num_head'; did you mean 'num_heads'": (nn.SoftmaxAttention, {"num_head": 4}),
    "LanguageModel has no option 'vocab'; did you mean 'vocabulary'": (models.LanguageModel, {"vocab": 8}),
    "LanguageModel has no option 'deph'; did you mean 'depth'": (models.LanguageModel, {"deph": 2, "vocabulary": 8}),
    "local_attention has no option 'windows'; did you mean 'window'": (attnlab.local_attention, {"windows": 4}),
    "linear_step has no option 'normalise'; did you mean 'normalize'": (attnlab.linear_step, {"normalise": True}),
    "local_attention has no option 'colour'$": (attnlab.local_attention, {"colour": 4}),
}


@pytest.mark.parametrize("message", MISSPELLED)
def test_a_misspelled_option_is_named_before_one_that_is_missing(message):
    thing, options = MISSPELLED[message]
    with pytest.raises(TypeError, match=f"^{message}"):
        thing(**options)
