"""Arms: in place of one, a product or a zip of bindings; and what is wrong with a sweep is named."""

import pytest

from attnlab.ablate import Ablation


def ablation(**options):
    arms = {"softmax": "softmax.gin", "local": ["local.gin", "WINDOW = 64"], "based": "based.gin"}
    return Ablation(**{"question": "?", "arms": arms, "seeds": [0], "baseline": "softmax", **options})


def test_arms_as_they_are():
    assert ablation().variants() == {
        "softmax": ["softmax.gin"],
        "local": ["local.gin", "WINDOW = 64"],
        "based": ["based.gin"],
    }


def test_product_has_every_combination_in_the_place_of_the_arm():
    product = {"local": {"WINDOW": [8, 16], "nn.LocalAttention.edge": ["shift", "clip"]}}
    variants = ablation(product=product, baseline="local[WINDOW=8,edge=clip]").variants()
    assert list(variants) == [
        "softmax",
        "local[WINDOW=8,edge=shift]",
        "local[WINDOW=8,edge=clip]",
        "local[WINDOW=16,edge=shift]",
        "local[WINDOW=16,edge=clip]",
        "based",
    ]
    assert variants["local[WINDOW=8,edge=clip]"] == [
        "local.gin",
        "WINDOW = 64",
        "WINDOW = 8",
        "nn.LocalAttention.edge = 'clip'",
    ]


def test_zipped_pairs_values():
    zipped = {"based": {"WINDOW": [4, 8], "LinearAttention.head_dim": [8, 16]}}
    assert list(ablation(zipped=zipped).variants())[2:] == ["based[WINDOW=4,head_dim=8]", "based[WINDOW=8,head_dim=16]"]


def test_product_of_zipped():
    variants = ablation(zipped={"based": {"A": [1, 2], "B": [3, 4]}}, product={"based": {"C": [5, 6]}}).variants()
    assert list(variants)[2:] == [
        f"based[{values}]" for values in ("A=1,B=3,C=5", "A=1,B=3,C=6", "A=2,B=4,C=5", "A=2,B=4,C=6")
    ]


def test_options_of_one_name_are_distinguished_and_names_have_no_spaces():
    product = {"based": {"LinearAttention.head_dim": [8], "LocalAttention.head_dim": [16], "PAIRS": [(2, 4)]}}
    assert list(ablation(product=product).variants())[2:] == [
        "based[LinearAttention.head_dim=8,LocalAttention.head_dim=16,PAIRS=(2,4)]"
    ]


@pytest.mark.parametrize(
    ("seeds", "searched"), [([0], 1000), ([0, 1, 2], 1000), ([999, 1000, 1001], 1002), ([*range(1000, 1010)], 1010)]
)
def test_rates_are_searched_with_the_same_seed_while_it_is_none_of_the_seeds(seeds, searched):
    assert ablation(seeds=seeds).search_seed == searched


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": {}}, "arms: got none"),
        ({"baseline": "nobody"}, r"baseline: got 'nobody'; need one of the arms \['softmax', 'local', 'based'\]"),
        ({"product": {"softmax": {"A": [1]}}}, r"baseline: got 'softmax'; need one of the arms \['softmax\[A=1\]',"),
        ({"seeds": []}, r"seeds: got \[\]"),
        ({"seeds": [1, 1]}, r"seeds: got \[1, 1\]; need at least one, each once"),
        ({"arms": {"one": [], "a/b": []}}, "arms: got the name 'a/b'"),
        ({"arms": {"one": [], "a[b]": []}}, r"arms: got the name 'a\[b\]'"),
        ({"arms": {"one": [], "..": []}}, r"arms: got the name '\.\.'"),
        ({"arms": {"one": [], "": []}}, "arms: got the name ''"),
        ({"arms": {"one": [], 3: []}}, "arms: got the name 3"),
        ({"arms": {"one": [], "a" * 300: []}}, "arms: got the name 'aaa.*need at most [0-9]+ characters"),
        ({"arms": {"one": [], "a$$": []}}, r"arms: got the name 'a\$\$'"),
        ({"arms": {"one": [], "a\nb": []}}, r"arms: got the name 'a\\nb'"),
        ({"product": {"local": {"A": ["$x$"]}}}, r"arms: got the name 'local\[A=\$x\$\]'; need one without \$"),
        ({"arms": {"softmax": [], "Softmax": []}}, "arms: got the names 'softmax' and 'Softmax'; .* more than case"),
        ({"product": {"nobody": {"WINDOW": [1]}}}, "product: got the arm 'nobody'; need one of"),
        ({"product": {"local": {}}}, "product: got no bindings for local"),
        ({"product": {"local": {"WINDOW": []}}}, r"product: got \[\] for WINDOW of local; need a list of at least one"),
        ({"product": {"local": {"WINDOW": 8}}}, "product: got 8 for WINDOW of local; need a list"),
        (
            {"product": {"local": {"WINDOW": [8, 8]}}},
            r"product: got \[8, 8\] for WINDOW of local; need each value once",
        ),
        ({"product": {"local": {"WINDOW": [object]}}}, "for WINDOW of local; need numbers, strings, lists or tuples"),
        ({"zipped": {"based": {"A": [1, 2], "B": [3]}}}, "zipped: got 2 of A, 1 of B for based; need equally many"),
        ({"learning_rates": []}, r"learning_rates: got \[\]; need at least one"),
        ({"learning_rates": [0.1, 0.1]}, r"learning_rates: got \[0.1, 0.1\]; need at least one, each once"),
        ({"learning_rates": [0.1, 0.0]}, "learning_rates: got 0.0; need a finite number, above 0"),
        ({"match": "time", "knobs": "A"}, "match: got 'time'; need one of parameters, flops, state_size"),
        ({"match": "flops"}, "knobs: got None with match 'flops'; need both or none"),
        ({"knobs": "LanguageModel.mlp_hidden"}, "knobs: got 'LanguageModel.mlp_hidden' with match None"),
        ({"match": "flops", "knobs": {"nobody": "A"}}, "knobs: got the arm 'nobody'"),
    ],
)
def test_bad_sweeps_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ablation(**options)
