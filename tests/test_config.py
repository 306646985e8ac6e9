"""Reducers from YAML and dicts: what is accepted and how mistakes are named."""

import pytest

from mustdrop import MustDrop, Reducer, available_methods, load_reducer


def test_yaml_and_dict_give_the_same(tmp_path):
    path = tmp_path / "method.yaml"
    path.write_text("method: mustdrop\nglobal_threshold: 0.002\nfilter_layers: [0.25, 3]\nmerge_order: score\n")
    settings = {"method": "mustdrop", "global_threshold": 0.002, "filter_layers": [0.25, 3], "merge_order": "score"}
    assert load_reducer(path) == load_reducer(str(path)) == load_reducer(settings)
    assert load_reducer(path).parts[2].global_threshold == 0.002


def test_one_file_has_the_settings_of_several_budgets(tmp_path):
    path = tmp_path / "mustdrop.yaml"
    at = "  64: {global_threshold: 0.01, window: 2}\n  0.25: {global_threshold: 0.002}\n"
    path.write_text(f"method: mustdrop\nat:\n{at}")
    assert load_reducer(path, retain=64) == MustDrop(global_threshold=0.01, window=2)
    assert load_reducer(path, retain=0.25) == MustDrop(global_threshold=0.002)
    assert load_reducer({"method": "compose", "parts": [str(path)]}, 64).parts[0].window == 2
    assert load_reducer(tmp_path / "mustdrop_64.yaml") == load_reducer(path, retain=64), "as it was called before"
    with pytest.raises(ValueError, match="mustdrop.yaml: retain is 65: it must be one of 64, 0.25, the budgets"):
        load_reducer(path, retain=65)
    with pytest.raises(ValueError, match=r"mustdrop_65\.yaml: no such file"):
        load_reducer(tmp_path / "mustdrop_65.yaml")


def test_a_budget_is_enough_where_a_method_derives_its_settings():
    assert load_reducer({"method": "divprune"}, retain=64) == load_reducer({"method": "divprune", "retain": 64})
    with pytest.raises(ValueError, match="retain is no field of yopo"):
        load_reducer({"method": "yopo"}, retain=64)
    with pytest.raises(ValueError, match="no such file; .* none is needed for {method: fastv, retain: 64}"):
        load_reducer("configs/methods/fastv_64.yaml")


def test_a_composition_that_holds_itself_has_an_end(tmp_path):
    path = tmp_path / "method.yaml"
    path.write_text(f"method: compose\nparts: [{path}]\n")
    itself: dict = {"method": "compose"}
    itself["parts"] = [itself]
    for source in (path, itself):
        with pytest.raises(ValueError, match="a file may not name itself"):
            load_reducer(source)


def test_vanilla_does_nothing():
    assert type(load_reducer({"method": "vanilla"})) is Reducer
    assert {"vanilla", "mustdrop"} <= set(available_methods())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"method is None: it must be one of .*mustdrop"),
        ({"method": "mustdropp"}, r"did you mean mustdrop\?"),
        (
            {"method": "mustdrop", "global_treshold": 0.1},
            r"global_treshold is no field of mustdrop .*global_threshold\?",
        ),
        ({"method": "mustdrop", "global_threshold": "high"}, r"global_threshold is 'high': it must be of type number"),
        ({"method": "mustdrop", "window": 2.5}, r"window is 2.5: it must be of type integer"),
        ({"method": "mustdrop", "window": True}, r"window is True: it must be of type integer"),
        ({"method": "mustdrop", "filter_layers": 2}, r"must be of type list of integer or number or none"),
        ({"method": "mustdrop", "key_rate": 3}, r"key_rate is 3: it must be between 0 and 1"),
        ({"method": "vanilla", "window": 3}, r"window is no field of vanilla; its fields are: none"),
        ({"method": ["mustdrop"]}, r"method is \['mustdrop'\]: it must be one of"),
        ({"method": None}, r"method is None: it must be one of"),
        ({"method": "mustdrop", 7: 1}, r"7 is no field of mustdrop"),
        ({"method": "mustdrop", "retain": "64"}, r"retain is '64': it must be of type integer or number or none"),
        ({"method": "mustdrop", "retain": 64.5}, r"retain is 64.5: it must be 1 or more tokens, or a share above 0"),
        ({"method": "mustdrop", "retain": True}, r"retain is True: it must be of type integer or number or none"),
        ({"method": "mustdrop", "retain": 10**30}, r"retain is 10{30}: it must be of type integer or number or none"),
        ({"method": "mustdrop", "retain": -1}, r"retain is -1: it must be 1 or more"),
        ({"method": "mustdrop", "global_threshold": float("nan")}, r"global_threshold is nan: it must be of type"),
        ({"method": "mustdrop", "global_threshold": float("inf")}, r"global_threshold is inf: it must be of type"),
        ({"method": "mustdrop", "filter_layers": [2, True]}, r"filter_layers is \[2, True\]: it must be of type list"),
        ({"method": "mustdrop", "filter_layers": [2, [3]]}, r"filter_layers is \[2, \[3\]\]: it must be of type list"),
        ({"method": "prumerge", "plus": "yes"}, r"plus is 'yes': it must be of type true or false"),
        ({"method": "yopo", "heads": "x" * 999}, r"heads: 'x{76}\.\.\. cannot be read"),
        ({"method": "compose"}, r"parts is None: compose has one field, parts"),
        ({"method": "compose", "parts": []}, r"parts is \[\]: compose has one field, parts"),
        ({"method": "compose", "parts": [1]}, r"parts: got 1: it must be a mapping .* or the path of its file"),
        ({"method": "compose", "parts": [["mustdrop"]]}, r"parts: got \['mustdrop'\]: it must be a mapping"),
        ({"method": "compose", "parts": [{"method": "compose", "parts": [{}]}]}, r"parts: parts: method is None"),
        ({"method": "compose", "parts": [{"method": "vanilla"}], "retain": 9}, r"retain is 9: compose has one field"),
        ({"method": "mustdrop", "at": {64: {}, 0.5: {}}}, r"retain is None: it must be one of 64, 0.5, the budgets"),
        ({"method": "mustdrop", "at": {64: {}}, "retain": 65}, r"retain is 65: it must be one of 64, the budgets"),
        ({"method": "mustdrop", "at": {1: {}}, "retain": True}, r"retain is True: it must be one of 1, the budgets"),
        ({"method": "mustdrop", "at": {64: {}}, "retain": "64"}, r"retain is '64': it must be one of 64"),
        ({"method": "mustdrop", "at": {64: {"windw": 2}}, "retain": 64}, r"windw is no field of mustdrop .*window\?"),
        ({"method": "mustdrop", "at": {64: {"method": "fastv"}}, "retain": 64}, r"at is .*: it must be without method"),
        ({"method": "mustdrop", "at": {64: {}, "64": {}}, "retain": 64}, r"at is '64': it must be there only once"),
        ({"method": "mustdrop", "at": {}}, r"at is {}: it must be a mapping from numbers of tokens, or shares"),
        ({"method": "mustdrop", "at": [64]}, r"at is \[64\]: it must be a mapping"),
        ({"method": "mustdrop", "at": {"few": {}}}, r"at is {'few': {}}: it must be a mapping"),
        ({"method": "mustdrop", "at": {64: 0.1}}, r"at is {64: 0.1}: it must be a mapping"),
        ({"method": "mustdrop", "at": {0: {}}}, r"at is 0: it must be 1 or more tokens, or a share"),
        ({"method": "compose", "parts": [{"method": "mustdrop", "at": {64: {}}}]}, "parts: retain is None: .* 64"),
    ],
)
def test_mistakes_are_one_clear_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        load_reducer(settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no such file"), ("method: [", "not valid YAML"), ("- a\n- b", "holds list, it must be a mapping")],
)
def test_unreadable_files_are_named(tmp_path, text, message):
    path = tmp_path / "method.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_reducer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_mustdrop_is_what_the_readme_says():
    assert MustDrop(global_threshold=0.011, individual_threshold=0.01, compat="official").positions == "renumber"
