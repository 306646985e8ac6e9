"""The speed benchmark on a tiny shape: what its rows hold, what is exact in them, and what it refuses."""

import json

import pytest
import torch
from tiny import LAYERS, SIDE, hugging_face, ours, pictures

from eval.bench import speed as bench_speed
from eval.bench.cases import EAGER_SCHEDULE
from eval.bench.eager import run_eager
from eval.bench.model import Inputs, hugging_face_twin, random_model, read_shape
from eval.bench.passes import Lengths, cache_bytes, floor_pass, run_hugging_face, run_ours
from mustdrop import MustDrop, Reducer, load_reducer
from mustdrop.hooks import LEAST_ROWS

PATCHES, TEXT = SIDE * SIDE, 12
KEYS = {
    "method", "retain", "batch_size", "vision_ms", "prefill_ms", "selector_ms", "ttft_ms", "decode_tokens_per_s",
    "peak_bytes", "cache_bytes", "predicted_cache_bytes", "flop_speedup", "measured_speedup", "share_of_flop_speedup",
    "replay_floor_ms", "share_of_replay_floor", "selector_macs",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The folder of a tiny model's config.json."""
    folder = tmp_path_factory.mktemp("shape")
    hugging_face().config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(config, tmp_path_factory):
    file = tmp_path_factory.mktemp("out") / "speed.json"
    arguments = f"--shape {config} --methods mustdrop fastv avgpool --retain 70,40 --batch-size 1 2 --text {TEXT}"
    assert bench_speed.main(f"{arguments} --new-tokens 3 --repeats 2 --device cpu --json {file}".split()) == 0
    return json.loads(file.read_text())


def test_rows_carry_everything(report):
    rows = report["rows"]
    names = [(row["method"], row["retain"], row["batch_size"]) for row in rows]
    methods = [(name, retain) for name in ("mustdrop", "fastv", "avgpool") for retain in (70, 40)]
    plain = [("huggingface", None), ("vanilla", None)]
    assert names == [(*name, batch) for batch in (1, 2) for name in (*plain, *methods)]
    assert all(set(row) >= KEYS for row in rows)
    for row in rows:
        plain = row["method"] == "huggingface"
        for key in KEYS - {"retain", "peak_bytes"}:
            assert row[key] is not None or (
                plain and key in ("selector_ms", "replay_floor_ms", "share_of_replay_floor")
            )
        assert row["spread"]["prefill_ms"] >= 0 and len(row["rounds"]["prefill_ms"]) == 2
    assert report["provenance"]["command"].startswith("mustdrop bench --shape")
    assert {"versions", "device", "date", "cpu_load"} <= set(report["provenance"])


def test_counts_are_as_forced_and_the_cache_as_predicted_to_the_byte(report):
    vanilla = report["rows"][1]
    for row in report["rows"]:
        assert row["cache_bytes"] == row["predicted_cache_bytes"]
        weights = [one["decode_step_bytes"] - one["cache_bytes"] for one in (row, vanilla)]
        assert weights[0] == weights[1] > 0
        if row["method"] in ("huggingface", "vanilla"):
            assert row["vision_tokens"] == [PATCHES] * LAYERS and row["flop_speedup"] == 1
            assert row["cache_bytes"] == row["batch_size"] * LAYERS * (PATCHES + TEXT) * 2 * 2 * 16 * 4
        else:
            assert row["mean_tokens_official"] == pytest.approx(row["retain"], abs=0.5)
            assert row["flop_speedup"] > 1 and row["ttft_flop_speedup"] > 1
        assert (row["selector_macs"] > 0) == (row["method"] in ("mustdrop", "fastv", "avgpool"))


def test_the_table_says_what_was_measured(report):
    text = bench_speed.table(report)
    assert "mustdrop 40" in text and "cache: after prefill, as predicted to the byte" in text
    names = tuple({row["method"] for row in report["rows"]})
    assert sum(line.startswith(names) for line in text.splitlines()) == len(report["rows"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_twin_is_the_same_model(config, dtype):
    shape = read_shape(str(config), 3, "float32")
    model = random_model(shape, dtype, "sdpa", "cpu")
    twin, inputs = hugging_face_twin(model, shape), Inputs.random(shape, 2, TEXT, dtype, "cpu")
    assert twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    found = model(input_ids=inputs.ids, images=inputs.pixels).logits
    theirs = twin(input_ids=inputs.expanded(shape), pixel_values=inputs.pixels).logits
    torch.testing.assert_close(found, theirs, atol=1e-5 if dtype == torch.float32 else 5e-2, rtol=0)


def test_the_floor_runs_on_the_counts_of_the_pass(config):
    shape = read_shape(str(config), None, "float32")
    model, inputs = (
        random_model(shape, torch.float32, "eager", "cpu"),
        Inputs.random(shape, 2, TEXT, torch.float32, "cpu"),
    )
    done = run_ours(model, MustDrop(budget=[60, 41, 30, 20], merge_to=104), inputs, 2, timing=True)
    expected = [104, 60, 41, 30, 20, 20, 20, 20]
    entering = [count + TEXT for count in expected]
    finished = [*entering[1:], LEAST_ROWS]  # what is dropped, and of the last layer what nobody reads, is left out
    assert done.lengths == Lengths([PATCHES + 1, 105, 105], 104, entering, finished)
    assert done.cache_bytes == 2 * LAYERS * (20 + TEXT) * 2 * 2 * 16 * 4
    assert done.times["selector_ms"] > 0 and done.times["ttft_ms"] > done.times["prefill_ms"] > 0
    seen = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape)) for layer in model.model.layers
    ]
    floor = floor_pass(model, inputs, done.lengths)()
    for hook in hooks:
        hook.remove()
    assert seen == [(2, count, 64) for count in finished] and set(floor.times) < set(done.times)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_passes_agree_on_bytes(config):
    shape = read_shape(str(config), 3, "float32")
    model, inputs = (
        random_model(shape, torch.float32, "sdpa", "cpu"),
        Inputs.random(shape, 1, TEXT, torch.float32, "cpu"),
    )
    plain = run_hugging_face(hugging_face_twin(model, shape), inputs.expanded(shape), inputs, 2)
    found = run_ours(model, Reducer(), inputs, 2, timing=False)
    assert plain.cache_bytes == found.cache_bytes and "selector_ms" not in found.times
    with torch.inference_mode():
        assert cache_bytes(model(input_ids=inputs.ids, images=inputs.pixels, use_cache=True).past_key_values)


def test_a_yaml_file_is_taken_as_it_is(config, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("method: mustdrop\nglobal_threshold: 0.001\n")
    words = f"--shape {config} --layers 4 --methods {file} vanilla --text 4 --new-tokens 1 --repeats 1".split()
    assert bench_speed.main(words) == 0
    text = capsys.readouterr().out
    assert "\nmine " in text and "4 layers" in text and text.count("\nvanilla") == 1


def test_named_shapes():
    assert (read_shape("mini", None, "float16").layers, read_shape("13b", None, "float16").layers) == (16, 40)
    seven = read_shape("llava-1.5-7b", 8, "bfloat16")
    assert (seven.layers, seven.hidden, seven.vision_layers, seven.dtype_bytes) == (8, 4096, 23, 2)
    assert load_reducer({"method": "mustdrop", "retain": 64}).check_tokens(seven.layers, seven.patches) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--shape 70b", "shape: got '70b', expected llava-1.5-7b,"),
        ("--methods fastw", "method is 'fastw': it must be one of"),
        ("--retain many", "RETAIN: got 'many', expected a whole number above 0"),
        (
            "--retain 10 --shape llava-1.5-7b --methods fastv",
            "fastv on llava-1.5-7b: retain is 10: it must be at least",
        ),
        ("--batch-size 0", "batch_size: got '0', expected a whole number above 0"),
        ("--text 1", "text: got 1, expected at least 2"),
        ("--repeats x", "repeats: got 'x', expected a whole number above 0"),
        ("--dtype int8", "dtype: got 'int8', expected auto or one of float32"),
        ("--device cuda:99", "device: got 'cuda:99', but there are"),
        ("--attn-implementation fast", "attn_implementation: got 'fast', expected one of sdpa, eager"),
        ("--checkpoint nowhere", "MODEL: there is no folder 'nowhere'"),
        ("--checkpoint checkpoints/llava-mini --layers 2", "layers: got 2, but a checkpoint's depth is its own"),
        ("--json /no/such/folder/x.json", "json: the folder of '/no/such/folder/x.json' does not exist"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert bench_speed.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_speed.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "replay floor" in text and "--shape llava-1.5-7b --layers 8" in text


def test_compiled_rows_stand_beside_plain_ones():
    rows = bench_speed.bench_cases(["mustdrop"], [64], [1, 8], compiled=True)
    labels = ["huggingface", "vanilla", "vanilla compiled", "mustdrop 64", "mustdrop 64 compiled"]
    assert [row.label for row in rows] == 2 * labels
    assert [row.batch_size for row in rows] == [1] * 5 + [8] * 5


def test_the_eager_baseline_computes_what_mustdrop_computes(config):
    """The authors' way gives our logits and caches at their schedule, so the two times are of the same work."""
    shape = read_shape(str(config), None, "float32")
    model, inputs = ours(), Inputs.random(shape, 1, TEXT, torch.float32, "cpu")
    inputs.pixels = pictures(1)
    reducer, seen = load_reducer(EAGER_SCHEDULE), []
    handle = model.lm_head.register_forward_hook(lambda _, args, logits: seen.append(logits[:, -1:]))
    one = run_eager(model, reducer, inputs, 4)
    two = run_ours(model, reducer, inputs, 4, timing=False)
    handle.remove()
    torch.testing.assert_close(torch.cat(seen[:4]), torch.cat(seen[4:]), atol=1e-5, rtol=0)
    assert one.cache_bytes == two.cache_bytes < run_ours(model, Reducer(), inputs, 1, timing=False).cache_bytes / 4
    assert set(one.times) == set(two.times)


def test_the_eager_baseline_stands_beside_its_own_schedule(config, capsys, tmp_path):
    file = tmp_path / "speed.json"
    words = f"--shape {config} --methods mustdrop-eager --new-tokens 2 --repeats 2 --device cpu --json {file}".split()
    assert bench_speed.main(words) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["label"] for row in rows] == ["huggingface", "vanilla", "mustdrop-eager", "mustdrop"]
    assert rows[2]["vision_tokens"] == rows[3]["vision_tokens"] and rows[2]["cache_bytes"] == rows[3]["cache_bytes"]
    ratio = rows[3]["speedup_over_eager"]["prefill_ms"]
    pairs = zip(rows[2]["rounds"]["prefill_ms"], rows[3]["rounds"]["prefill_ms"], strict=True)
    assert ratio == pytest.approx(sum(one / two for one, two in pairs) / 2) and rows[1]["speedup_over_eager"] is None
    assert "mustdrop-eager / mustdrop on the same numbers of tokens: " in capsys.readouterr().out
    assert bench_speed.main([*words, "--batch-size", "1", "8"]) == 2
    assert capsys.readouterr().err == (
        "error: batch_size: got 8, mustdrop-eager runs one prompt at a time, as the authors' code\n"
    )
