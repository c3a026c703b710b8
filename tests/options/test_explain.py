"""Messages about one option; `test_settings.py` has them as users see them."""

from __future__ import annotations

from pretrain.options.explain import dotted, explain, pattern, short


def test_names() -> None:
    assert dotted(("data", "sources", 1, "name")) == "data.sources.1.name"
    assert dotted(()) == "the config"
    assert pattern(("data", "sources", 1, "name")) == "data.sources.*.name"


def test_long_values_are_cut() -> None:
    assert short("x" * 100) == "'" + "x" * 56 + "..."
    assert short([1, None, True]) == "[1, null, true]"


def test_the_fix_fits_the_value() -> None:
    assert explain(("optim", "name"), "literal_error", "AdamW").endswith(" Use adamw.")
    assert explain(("optim", "name"), "literal_error", 3).endswith("sgd or rmsprop.")
    assert explain(("train", "deterministic"), "bool_type", "off").endswith(" Write false.")
    assert explain(("optim", "lr"), "float_type", "3e-4").endswith(" Drop the quotes.")
    assert explain(("optim", "lr"), "float_type", "high").endswith("at most 1.")
    disk = " Use optimizer, with parallel.nvme_dir for the folder on the disk."
    assert explain(("parallel", "offload"), "literal_error", "nvme").endswith(disk)


def test_items_of_lists() -> None:
    quantize = ("parallel", "quantize")
    named = "parallel.quantize.0 is 'weight'; expected one of weights or gradients. Use weights."
    assert explain((*quantize, 0), "literal_error", "weight") == named
    assert explain(quantize, "list_type", "gradient").endswith("each one of weights or gradients. Write [gradients].")
    assert explain(("train", "profile_steps", 1), "greater_than_equal", 0) == (
        "train.profile_steps.1 is 0; expected a whole number of at least 1."
    )
    assert explain(("data", "phases", 0, "weights", "web"), "greater_than_equal", -1) == (
        "data.phases.0.weights.web is -1; expected a number above 0."
    )
