"""Settings as pages and `selfalign diff` show them."""

from selfalign.pages.settings import ABSENT, compare, flatten, shown


def test_what_differs_and_what_a_run_does_not_have():
    trees = {
        "a": {"seed": 0, "model": {"channels": None}, "terms": {"alignment": {"weight": 0.5}}},
        "b": {"seed": 1, "model": {"channels": None}, "terms": {}},
    }
    found = compare({name: flatten(tree) for name, tree in trees.items()})
    assert found.shared == {"model.channels": "from the data"}
    assert found.different == {
        "a": {"seed": "0", "terms.alignment.weight": "0.5"},
        "b": {"seed": "1", "terms.alignment.weight": ABSENT},
    }


def test_nothing_is_from_the_data_only_where_the_model_takes_it():
    assert shown("model.num_classes", None) == "from the data"
    assert shown("training.start_from", None) == shown("views.hidden", []) == "none"
    assert shown("views.mask_ratios", [0.25, 0.75]) == "0.25 0.75"
